//! takuma's coordinator: a thin tonic shell around the decisions of `takuma-core`.
//!
//! [`run`] takes its socket, its store and its stop signal, so that tests bind port 0:
//!
//! ```no_run
//! # async fn example() -> Result<(), takuma_coordinator::ServerError> {
//! let (listener, address) = takuma_coordinator::bind("127.0.0.1:0").await?;
//! let store = takuma_store::Store::memory();
//! let stop = tokio_util::sync::CancellationToken::new();
//! takuma_coordinator::run(listener, store, takuma_coordinator::Options::default(), stop).await
//! # }
//! ```
//!
//! One task owns the state (`owner`); `session` and `control` translate between the wire and its
//! events; one task per run writes the run's files (`files`).

mod channels;
mod clock;
mod connections;
mod control;
mod convert;
mod datasets;
mod directives;
mod drawing;
mod files;
pub mod lease;
mod objects;
mod owner;
mod recover;
mod samples;
mod session;
mod status;
mod streams;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use futures::Stream;
use takuma_core::cluster::Cluster;
use takuma_proto::v1::cluster_server::ClusterServer;
use takuma_proto::v1::control_server::ControlServer;
use takuma_store::{Store, StoreError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use clock::Clock;
use control::ControlService;
pub use drawing::Drawing;
use files::Records;
use owner::{Message, Owner, StoreLost};
use session::ClusterService;

/// A tile of a large grid; gRPC's default of 4 MiB is too small for one of 256 cells of 128x128.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Workers and clients together; each costs a descriptor and some tens of kilobytes.
const MAX_CONNECTIONS: usize = 8_192;
/// Streams of one connection: a session or a client's few calls.
const MAX_STREAMS: u32 = 64;
/// A connection whose other end is gone without a word is found out after twice this.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A call must have its answer, or a stream its first header, within so long.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections get so long to end at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Below this a loaded machine's scheduling looks like silence.
const SHORTEST_SILENCE_MS: u64 = 1_200;

/// What can be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// A worker that is silent for so long is lost, in milliseconds. It is asked for ten heartbeats in that time.
    pub heartbeat_timeout_ms: u64,
    /// After a restart: members of the group that was at work may come back within so long.
    pub reunion_ms: u64,
    /// A worker whose step and phase do not change for so long is stuck.
    pub progress_timeout_ms: u64,
    /// Asked once, at the start, for the time of day; a simulation has its own.
    pub wall_clock: fn() -> SystemTime,
    /// Where pictures are drawn.
    pub drawing: Drawing,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat_timeout_ms: 5_000,
            reunion_ms: 15_000,
            progress_timeout_ms: 600_000,
            wall_clock: SystemTime::now,
            drawing: Drawing::default(),
        }
    }
}

/// Why the coordinator cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// As given.
        address: String,
        /// In words, with the remedy.
        reason: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The store cannot be used.
    #[error("the store {url} cannot be used: {source}")]
    Store {
        /// As given.
        url: String,
        /// The store's answer.
        #[source]
        source: StoreError,
    },
    /// Another coordinator works on the store: this one has no business there any more.
    #[error(
        "another coordinator has taken over the store: it has written {object} since; this one ends and leaves the runs \
         to that one"
    )]
    StoreLost {
        /// What the other one wrote.
        object: String,
    },
    /// There are no random bits to be had.
    #[error("the system gives no random bits: {0}")]
    Random(#[from] getrandom::Error),
    /// The server ended by itself.
    #[error("the server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A task of the coordinator died: a bug.
    #[error("the coordinator's state was lost: {0}")]
    Owner(#[from] tokio::task::JoinError),
}

/// Binds a listening socket; port 0 takes a free one. Returns the actual address too.
///
/// # Errors
/// [`ServerError::Bind`] with the remedy.
pub async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), ServerError> {
    let refused = |source: std::io::Error| {
        let reason = match source.kind() {
            std::io::ErrorKind::AddrInUse => {
                "another program, perhaps another coordinator, listens there; stop it or choose another --listen"
                    .to_owned()
            }
            std::io::ErrorKind::PermissionDenied => {
                "this user may not; choose a port above 1023 with --listen".to_owned()
            }
            std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address".to_owned(),
            _ => source.to_string(),
        };
        ServerError::Bind { address: address.to_owned(), reason, source }
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let local = listener.local_addr().map_err(refused)?;
    Ok((listener, local))
}

/// A coordinator whose store was tried and read, ready to serve.
#[derive(Debug)]
pub struct Coordinator {
    owner: Owner,
    /// Aborted with the coordinator, if nobody shuts it down.
    task: AbortOnDropHandle<Result<(), StoreLost>>,
    store: Store,
}

/// Serves workers and clients until `shutdown` is cancelled; then workers are told, everything is stored,
/// and the call returns.
///
/// # Errors
/// A store that cannot be used, or a failure of the server itself.
pub async fn run(
    listener: TcpListener,
    store: Store,
    options: Options,
    shutdown: CancellationToken,
) -> Result<(), ServerError> {
    Coordinator::open(store, options).await?.serve(listener, shutdown).await
}

impl Coordinator {
    /// Tries the store and takes over its runs; one that was at work waits for its workers to come back.
    ///
    /// # Errors
    /// [`ServerError::Store`], or there are no random bits.
    pub async fn open(store: Store, options: Options) -> Result<Self, ServerError> {
        let unusable = |source| ServerError::Store { url: store.url().to_owned(), source };
        recover::probe(&store).await.map_err(unusable)?;
        let records = Records::new(&store, format!("{:016x}", getrandom::u64()?));
        let recovered = recover::recover(&store, &records).await.map_err(unusable)?;
        let cluster = Cluster::new(takuma_core::cluster::Options {
            heartbeat_timeout_ms: options.heartbeat_timeout_ms,
            reunion_ms: options.reunion_ms,
            progress_timeout_ms: options.progress_timeout_ms,
            // Two heartbeats and a bit: one may be late.
            silence_ms: (options.heartbeat_timeout_ms * 24 / 100).max(SHORTEST_SILENCE_MS),
            ..takuma_core::cluster::Options::new(store.url(), env!("CARGO_PKG_VERSION"))
        });
        let interval_ms = u32::try_from(options.heartbeat_timeout_ms / 10).unwrap_or(u32::MAX).max(1);
        let clock = Clock::start((options.wall_clock)());
        let (owner, task) =
            Owner::start(cluster, store.clone(), records, clock, options.drawing, interval_ms);
        let coordinator = Self { owner, task: AbortOnDropHandle::new(task), store };
        for event in recovered {
            tell(&coordinator.owner, Message::Event(event)).await;
        }
        Ok(coordinator)
    }

    /// Serves on a socket until `shutdown` is cancelled.
    ///
    /// # Errors
    /// A failure of the server itself.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), ServerError> {
        self.serve_on(connections::accept(listener, MAX_CONNECTIONS), shutdown).await
    }

    /// Serves on connections that somebody else accepts, as tests do that have no network.
    ///
    /// # Errors
    /// A failure of the server itself.
    pub async fn serve_on<C>(
        self,
        connections: impl Stream<Item = std::io::Result<C>>,
        shutdown: CancellationToken,
    ) -> Result<(), ServerError>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let workers = ClusterServer::new(ClusterService::new(self.owner.clone()))
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let clients = ControlServer::new(ControlService::new(self.owner.clone(), self.store.clone()));
        let serving = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(Some(MAX_STREAMS))
            .timeout(CALL_TIMEOUT)
            .add_service(workers)
            .add_service(clients)
            .serve_with_incoming_shutdown(connections, shutdown.clone().cancelled_owned());
        let mut serving = std::pin::pin!(serving);
        let mut task = self.task;
        let served = tokio::select! {
            served = &mut serving => Some(served),
            () = shutdown.cancelled() => None,
            ended = &mut task => return ended?.map_err(ServerError::from),
        };
        tell(&self.owner, Message::Shutdown).await;
        task.await??;
        let ended = match served {
            Some(served) => Ok(served),
            None => tokio::time::timeout(SHUTDOWN_TIMEOUT, serving).await,
        };
        match ended {
            Ok(served) => Ok(served?),
            Err(_) => {
                tracing::warn!("some connections did not end in time and are cut");
                Ok(())
            }
        }
    }
}

impl From<StoreLost> for ServerError {
    fn from(lost: StoreLost) -> Self {
        Self::StoreLost { object: lost.object }
    }
}

async fn tell(owner: &Owner, message: Message) {
    if owner.send(message).await.is_err() {
        tracing::error!("the coordinator's state is gone");
    }
}
