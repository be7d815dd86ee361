//! [`Drawing`]: where pictures are drawn and encoded.

/// Where the work of a picture is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Drawing {
    /// In a thread of its own: it may take long, and sessions must not wait for it.
    #[default]
    InThreads,
    /// Where it stands. Simulations need it: when a thread is ready, no seed repeats.
    InPlace,
}

impl Drawing {
    /// Does the work of one picture.
    ///
    /// # Errors
    /// Those of the work, or its thread died.
    pub async fn draw<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        match self {
            Self::InThreads => tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?,
            Self::InPlace => work(),
        }
    }
}
