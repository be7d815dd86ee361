//! Connections without a network: what a paused clock needs, since it runs ahead whenever only a socket is waited for.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::{Service, http::Uri};
use tonic::transport::{Channel, Endpoint};

const BUFFER_BYTES: usize = 1 << 20;

/// Where a coordinator is found, whichever life it is in. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Door {
    open: Arc<Mutex<Option<mpsc::Sender<io::Result<DuplexStream>>>>>,
}

impl Door {
    /// From now on connections come here.
    pub fn open(&self) -> ReceiverStream<io::Result<DuplexStream>> {
        let (sender, connections) = mpsc::channel(16);
        *self.open.lock().unwrap() = Some(sender);
        ReceiverStream::new(connections)
    }

    /// From now on nobody is there.
    pub fn close(&self) {
        *self.open.lock().unwrap() = None;
    }

    /// A connection to whoever is there.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        Endpoint::from_static("http://coordinator").connect_with_connector(self.clone()).await
    }
}

impl Service<Uri> for Door {
    type Response = TokioIo<DuplexStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let open = self.open.lock().unwrap().clone();
        Box::pin(async move {
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let (ours, theirs) = tokio::io::duplex(BUFFER_BYTES);
            open.ok_or_else(refused)?.send(Ok(theirs)).await.map_err(|_| refused())?;
            Ok(TokioIo::new(ours))
        })
    }
}
