//! What NCCL groups are formed with, the same for all groups of a process.

use std::{fmt, sync::Arc, time::Duration};

use super::library::{CudaRuntime, NcclLibrary};
use crate::{
    collective::{CollectiveError, HostStream},
    supervise,
};

/// The libraries and limits of NCCL groups.
#[derive(Clone)]
pub struct NcclConfig {
    /// NCCL itself.
    pub library: Arc<NcclLibrary>,
    /// Tells where a stream has come to.
    pub cuda: Arc<CudaRuntime>,
    /// Longest time for forming a communicator, once the ring stands. NCCL takes some tenths of a second on one
    /// machine, and some seconds between many.
    pub init_timeout: Duration,
    /// Longest time for ending a communicator. A kernel that hears of the end stops within milliseconds; one that
    /// has not after this long never will.
    pub abort_timeout: Duration,
    /// Runs before a communicator is ended, in peace or not, on a thread of its own: must destroy all CUDA graphs that
    /// hold sums of it. Its time counts as `abort_timeout`.
    pub before_abort: Option<Arc<dyn Fn() + Send + Sync>>,
    /// What to do, with the reason, when a communicator does not end. Should not return.
    pub last_resort: Arc<dyn Fn(&str) + Send + Sync>,
    /// In tests, where the devices are the hosts: makes the stream of a group.
    pub host_stream: Option<fn() -> Box<dyn HostStream>>,
}

impl NcclConfig {
    /// The usual configuration, over the libraries that libtorch uses: they should be loaded before. 60 s to
    /// form, 10 s to end, and [`supervise::last_resort`].
    ///
    /// # Errors
    /// [`CollectiveError::Local`] with what to install, if a library is missing or does not fit.
    pub fn load() -> Result<Self, CollectiveError> {
        Ok(Self::new(NcclLibrary::open()?, CudaRuntime::open()?))
    }

    /// [`NcclConfig::load`] over given libraries.
    #[must_use]
    pub fn new(library: Arc<NcclLibrary>, cuda: Arc<CudaRuntime>) -> Self {
        Self {
            library,
            cuda,
            init_timeout: Duration::from_secs(60),
            abort_timeout: Duration::from_secs(10),
            before_abort: None,
            last_resort: Arc::new(|reason| supervise::last_resort(reason)),
            host_stream: None,
        }
    }
}

impl fmt::Debug for NcclConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclConfig")
            .field("library", &self.library)
            .field("init_timeout", &self.init_timeout)
            .field("abort_timeout", &self.abort_timeout)
            .finish_non_exhaustive()
    }
}
