//! [`serve`]: the server's life, from a bound socket to the last answer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::Fenced;

/// More clients than this wait for their turn, so that descriptors do not run out.
const CONNECTIONS_MAX: usize = 512;
/// Requests under way when the server is stopped get so long; what is left then is cut off.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What a server serves, and to whom.
#[derive(Clone)]
pub struct Settings {
    /// The folder that holds a folder for each bucket; made if it is not there.
    pub root: PathBuf,
    /// Buckets to make if they are not there.
    pub buckets: Vec<String>,
    /// The only access key that is let in.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
    /// Whether conditional writes hold under races. Only a test of what happens otherwise goes without.
    pub fenced: bool,
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum S3Error {
    /// Choose another bucket name.
    #[error("'{0}' is no bucket name: 3 to 63 lower-case letters, digits and hyphens")]
    BucketName(String),
    /// Choose another folder, or free its disk.
    #[error("cannot make {}", path.display())]
    Folder {
        /// The folder that could not be made.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The folder cannot be served.
    #[error("cannot serve {}: {reason}", path.display())]
    Root {
        /// The root folder.
        path: PathBuf,
        /// In words.
        reason: String,
    },
}

/// Serves `settings.root` on `listener` until `stop`, then finishes the requests under way.
///
/// # Errors
/// [`S3Error`] when the root or a bucket cannot be made; a connection that breaks is logged, not an error.
pub async fn serve(
    listener: TcpListener,
    settings: &Settings,
    stop: CancellationToken,
) -> Result<(), S3Error> {
    let service = open(settings)?;
    let http = Builder::new(TokioExecutor::new());
    let open_connections = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, socket) = tokio::select! {
            (permit, socket) = accepted => (permit, socket),
            () = stop.cancelled() => break,
        };
        match socket {
            Ok((socket, peer)) => {
                let connection = http.serve_connection(TokioIo::new(socket), service.clone()).into_owned();
                let connection = open_connections.watch(connection);
                // Ends with its client, or by the graceful shutdown below.
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%peer, error, "connection ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => tracing::warn!(%error, "cannot accept a connection"),
        }
    }
    if tokio::time::timeout(DRAIN_TIMEOUT, open_connections.shutdown()).await.is_err() {
        tracing::warn!("stopped with requests under way");
    }
    Ok(())
}

fn open(settings: &Settings) -> Result<S3Service, S3Error> {
    for bucket in &settings.buckets {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(legal) {
            return Err(S3Error::BucketName(bucket.clone()));
        }
        let path = settings.root.join(bucket);
        std::fs::create_dir_all(&path).map_err(|source| S3Error::Folder { path, source })?;
    }
    std::fs::create_dir_all(&settings.root)
        .map_err(|source| S3Error::Folder { path: settings.root.clone(), source })?;
    let files = s3s_fs::FileSystem::new(&settings.root)
        .map_err(|error| S3Error::Root { path: settings.root.clone(), reason: format!("{error:?}") })?;
    let mut service = if settings.fenced {
        S3ServiceBuilder::new(Fenced::new(files))
    } else {
        S3ServiceBuilder::new(files)
    };
    service.set_auth(SimpleAuth::from_single(&settings.access_key, settings.secret_key.as_str()));
    Ok(service.build())
}
