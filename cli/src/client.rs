//! The connection to the coordinator: every call has a deadline, every failure its exit code.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use takuma_proto::PROTOCOL_VERSION;
use takuma_proto::v1::control_client::ControlClient;
use takuma_proto::v1::{ClusterView, GetClusterRequest, GetRunRequest, RunStatus, RunView};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::context::Address;
use crate::error::CliError;

/// A listening coordinator accepts at once; five seconds are a lossy network's worst case.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The coordinator may read a manifest from a slow store, which itself gives up after 30 s.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(45);
/// Streams may be silent for long, so the connection itself is asked whether it lives.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Thousands of runs with their configurations; more is not a listing for people.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The generated client on its channel.
pub type Control = ControlClient<Channel>;

/// A greeted coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    control: Control,
    address: Address,
}

impl Client {
    /// Connects and greets.
    ///
    /// # Errors
    /// [`CliError::Unreachable`] with the remedy, or the coordinator speaks another protocol version.
    pub async fn connect(address: Address) -> Result<(Self, ClusterView), CliError> {
        let endpoint = Endpoint::from_shared(address.url.clone())
            .map_err(|error| CliError::Usage(format!("'{}' is no address: {error}", address.url)))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
        let channel = match connected {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                return Err(unreachable_error(&address, &innermost(&error), Some(Box::new(error))));
            }
            Err(_) => {
                let why = format!("no answer within {} s", CONNECT_TIMEOUT.as_secs());
                return Err(unreachable_error(&address, &why, None));
            }
        };
        let control = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let client = Self { control, address };
        let request = GetClusterRequest { protocol_version: PROTOCOL_VERSION };
        let cluster = client.call(client.control().get_cluster(request)).await?;
        if cluster.protocol_version != PROTOCOL_VERSION {
            return Err(CliError::failed(format!(
                "the coordinator at {} speaks protocol {} (takuma {}), but this takuma speaks {PROTOCOL_VERSION}; \
                 use the takuma of the coordinator's version",
                client.address.url, cluster.protocol_version, cluster.software_version
            )));
        }
        Ok((client, cluster))
    }

    /// A client to call on; each call takes its own.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Where the coordinator listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Awaits a call's answer for [`CALL_TIMEOUT`] at most.
    ///
    /// # Errors
    /// The coordinator's own sentence, or [`CliError::Unreachable`].
    pub async fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CliError> {
        self.within(call).await?.map(Response::into_inner).map_err(|status| self.refused(status))
    }

    /// Awaits anything the coordinator owes us for [`CALL_TIMEOUT`] at most.
    ///
    /// # Errors
    /// [`CliError::Unreachable`] after that time.
    pub async fn within<T>(&self, answer: impl Future<Output = T>) -> Result<T, CliError> {
        tokio::time::timeout(CALL_TIMEOUT, answer).await.map_err(|_| {
            unreachable_error(&self.address, &format!("no answer within {} s", CALL_TIMEOUT.as_secs()), None)
        })
    }

    /// The run of a name or a unique prefix.
    ///
    /// # Errors
    /// There is none, several, or as [`Client::call`].
    pub async fn run(&self, run: &str) -> Result<RunView, CliError> {
        self.call(self.control().get_run(GetRunRequest { run: run.to_owned() })).await
    }

    /// What a refused call means for the person.
    #[must_use]
    pub fn refused(&self, status: Status) -> CliError {
        if connection_broke(&status) {
            let why = innermost(&status);
            return unreachable_error(&self.address, &why, Some(Box::new(status)));
        }
        let message = crate::output::visible(status.message());
        let message =
            if message.is_empty() { format!("the coordinator refused: {}", status.code()) } else { message };
        match status.code() {
            Code::InvalidArgument => CliError::Usage(message),
            _ => CliError::Failed { message, source: Some(Box::new(status)) },
        }
    }
}

/// Whether a status was made here because the connection failed, and not sent by the coordinator.
#[must_use]
pub fn connection_broke(status: &Status) -> bool {
    status.source().is_some()
}

fn unreachable_error(address: &Address, why: &str, source: Option<Box<dyn Error + Send + Sync>>) -> CliError {
    let message = format!(
        "the coordinator at {} ({}) cannot be reached: {why}; start one with 'takuma up', or give the address with \
         --coordinator",
        address.url, address.origin
    );
    CliError::Unreachable { message, source }
}

fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let text = last.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

/// Whether a run is over.
#[must_use]
pub fn has_ended(run: &RunView) -> bool {
    matches!(run.status(), RunStatus::Stopped | RunStatus::Succeeded | RunStatus::Failed)
}

/// The status as people and JSON spell it.
#[must_use]
pub fn status_name(status: RunStatus) -> &'static str {
    match status {
        RunStatus::Unspecified => "unknown",
        RunStatus::Queued => "queued",
        RunStatus::Preparing => "preparing",
        RunStatus::Running => "running",
        RunStatus::Stopping => "stopping",
        RunStatus::Stopped => "stopped",
        RunStatus::Succeeded => "succeeded",
        RunStatus::Failed => "failed",
        RunStatus::Waiting => "waiting",
    }
}
