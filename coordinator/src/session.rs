//! The workers' service: one session per worker, translated to events.

use std::time::Duration;

use takuma_core::event::{Event, Refusal, SessionId};
use takuma_proto::v1::cluster_server::Cluster;
use takuma_proto::v1::worker_message::Message as Wire;
use takuma_proto::{PROTOCOL_VERSION, v1};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::convert;
use crate::directives::{self, DirectiveStream};
use crate::owner::{Message, Owner, Seat};
use crate::status::from_refusal;

/// A worker says hello at once, or it is none.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer log messages are cut.
const MAX_LOG_BYTES: usize = 4_096;

/// The `Cluster` service.
#[derive(Debug, Clone)]
pub struct ClusterService {
    owner: Owner,
}

impl ClusterService {
    /// The service in front of `owner`.
    #[must_use]
    pub fn new(owner: Owner) -> Self {
        Self { owner }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type SessionStream = DirectiveStream;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut messages = request.into_inner();
        let hello = first_hello(&mut messages).await.map_err(|refusal| from_refusal(&refusal))?;
        check_protocol("worker", hello.protocol_version).map_err(|refusal| from_refusal(&refusal))?;
        let (directives, outgoing) = directives::queue();
        let (admitted, admission) = oneshot::channel();
        let closed = CancellationToken::new();
        let session = self.owner.new_session();
        let seat = Seat { directives, closed: closed.clone(), admitted: Some(admitted) };
        let hello = convert::hello(hello);
        let connect = Message::Connect { session, hello, seat };
        self.owner.send(connect).await.map_err(|refusal| from_refusal(&refusal))?;
        match admission.await {
            Ok(Ok(())) => {}
            Ok(Err(refusal)) => return Err(from_refusal(&refusal)),
            Err(_) => return Err(Status::unavailable("the coordinator is shutting down")),
        }
        // Named: session reader. Ends with the session or the coordinator; a fault of its own ends the session.
        tokio::spawn(read(self.owner.clone(), session, messages, closed));
        Ok(Response::new(outgoing))
    }
}

async fn first_hello(messages: &mut Streaming<v1::WorkerMessage>) -> Result<v1::Hello, Refusal> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, messages.message()).await;
    let first =
        first.map_err(|_| Refusal::Invalid(format!("no hello came within {} s", HELLO_TIMEOUT.as_secs())))?;
    match first {
        Ok(Some(v1::WorkerMessage { message: Some(Wire::Hello(hello)) })) => Ok(hello),
        Ok(_) => Err(Refusal::Invalid("a session begins with a hello".to_owned())),
        Err(status) => Err(Refusal::Invalid(format!("the hello cannot be read: {}", status.message()))),
    }
}

/// Refuses another protocol version in words.
///
/// # Errors
/// [`Refusal::Protocol`].
pub fn check_protocol(who: &str, version: u32) -> Result<(), Refusal> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Refusal::Protocol(format!(
        "this coordinator (takuma {}) speaks protocol {PROTOCOL_VERSION}, but the {who} speaks protocol {version}; \
         use the same takuma version for both",
        env!("CARGO_PKG_VERSION")
    )))
}

/// Reads a session to its end and tells the owner how it ended.
async fn read(
    owner: Owner,
    session: SessionId,
    mut messages: Streaming<v1::WorkerMessage>,
    closed: CancellationToken,
) {
    let reason = loop {
        let message = tokio::select! {
            // In this order, so that a simulation of the same seed takes the same way.
            biased;
            message = messages.message() => message,
            () = closed.cancelled() => break "it did not take its directives".to_owned(),
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => break "its connection closed".to_owned(),
            Err(status) => break format!("its connection broke ({})", brief(&status)),
        };
        let Some(message) = message.message else { continue };
        let sent = match message {
            Wire::LogLine(line) => owner.send(Message::Log { session, line: cut(line) }).await,
            message => match convert::event(session, message) {
                Ok(Some(event)) => owner.send(Message::Event(event)).await,
                Ok(None) => Ok(()),
                Err(reason) => break format!("it broke the protocol: {reason}"),
            },
        };
        if sent.is_err() {
            return;
        }
    };
    tracing::debug!(session = session.0, reason, "session ended");
    if owner.send(Message::Event(Event::SessionEnded { session, reason })).await.is_err() {
        tracing::debug!(session = session.0, "the coordinator ended first");
    }
}

/// The transport's words without its layers: a person wants to know that it broke, not which frame said so.
fn brief(status: &Status) -> &str {
    let message = status.message();
    if message.is_empty() || message.contains("h2 protocol error") {
        "the process died or the network failed"
    } else {
        message
    }
}

fn cut(mut line: v1::LogLine) -> v1::LogLine {
    if line.message.len() > MAX_LOG_BYTES {
        let end = (0..=MAX_LOG_BYTES).rev().find(|&at| line.message.is_char_boundary(at)).unwrap_or(0);
        line.message.truncate(end);
        line.message.push_str(" ...");
    }
    line
}
