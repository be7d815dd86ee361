//! The session: Hello, heartbeats, directives; for ever, with full jitter between attempts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use takuma_core::noise::{CounterRng, Purpose};
use takuma_proto::PROTOCOL_VERSION;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::v1::{
    Goodbye, Heartbeat, Hello, LogLine, Prepare, Prepared as PreparedMessage, RunEnded, RunFailed, Welcome,
    WorkerDirective, WorkerMessage,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};

use super::logs::{LogForwarder, Place};
use super::member::{self, MemberError, Outbox, Prepared, Stopper};
use crate::collective::RingListener;
use crate::trainer::{Outcome, Progress};

/// Messages that wait for the network. Metrics and tiles of many steps fit; beyond it training waits.
const OUTBOX_MESSAGES: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// The coordinator is called lost when it does not answer pings for so long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Tiles and logs are small; a directive carries a configuration and a member list.
const LARGEST_MESSAGE_BYTES: usize = 16 << 20;

/// Who this worker is and where it belongs.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://host:port`.
    pub coordinator: String,
    /// Name to ask for; "" lets the coordinator choose.
    pub name: String,
    /// Host under which peers reach the ring listener; none = the address that the coordinator sees.
    pub advertise: Option<String>,
    /// Compute threads.
    pub threads: u32,
    /// "cpu".
    pub device: String,
}

/// Why the worker gives up for good.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The address is none.
    #[error("'{address}' is no coordinator address; give http://host:port")]
    Address {
        /// As given.
        address: String,
    },
    /// The coordinator will not have this worker, now or later.
    #[error("the coordinator at {address} refused this worker: {reason}")]
    Refused {
        /// Its address.
        address: String,
        /// Its words.
        reason: String,
    },
}

/// Why one session ended; the next one is tried.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("cannot reach the coordinator at {address}: {reason}")]
    Connect { address: String, reason: String },
    #[error("the session with the coordinator ended: {0}")]
    Session(String),
    #[error("{0}")]
    Final(ControlError),
}

/// Keeps a session with the coordinator until `shutdown`, and trains what it is told to.
///
/// # Errors
/// Only what waiting cannot mend: a wrong address, a refusal.
pub async fn serve(
    options: Options,
    listener: Arc<RingListener>,
    logs: LogForwarder,
    mut log_lines: mpsc::Receiver<LogLine>,
    shutdown: CancellationToken,
) -> Result<(), ControlError> {
    let endpoint = Endpoint::from_shared(options.coordinator.clone())
        .map_err(|_| ControlError::Address { address: options.coordinator.clone() })?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_TIMEOUT / 2)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let process_id = process_id();
    // Jitter only spreads reconnects; its seed is this process.
    let mut jitter = CounterRng::new(u64::from(std::process::id()), Purpose::Noise, 0, 0);
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    while !shutdown.is_cancelled() {
        let begin = Instant::now();
        let session = Session::open(&endpoint, &options, &listener, &process_id);
        let lost = match session.await {
            Ok(session) => {
                told = false;
                session.run(&listener, &logs, &mut log_lines, &shutdown).await
            }
            Err(lost) => lost,
        };
        match lost {
            None => break,
            Some(Lost::Final(error)) => return Err(error),
            // One line for an outage, not one for every attempt.
            Some(lost) if !told => tracing::warn!("{lost}; trying again"),
            Some(lost) => tracing::debug!("{lost}"),
        }
        told = true;
        if begin.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        let wait = pause.mul_f32(jitter.uniform_f32());
        pause = (pause * 2).min(LONGEST_PAUSE);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => {}
        }
    }
    Ok(())
}

pub(super) fn wrap(message: Message) -> WorkerMessage {
    WorkerMessage { message: Some(message) }
}

/// Tells a restarted process from a reconnecting one.
fn process_id() -> String {
    let started_ns = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
    format!("{}-{}-{started_ns:x}", gethostname::gethostname().to_string_lossy(), std::process::id())
}

/// One life of the stream.
struct Session {
    name: String,
    outbox: Outbox,
    directives: Streaming<WorkerDirective>,
    heartbeat: Duration,
    member: Option<Member>,
}

/// The run that this worker is in.
struct Member {
    run: String,
    generation: u64,
    progress: Arc<Progress>,
    stopper: Stopper,
    stage: Stage,
}

enum Stage {
    Loading(JoinHandle<Result<Prepared, MemberError>>),
    Ready(Box<Prepared>),
    Training(JoinHandle<Result<Outcome, MemberError>>),
}

/// What woke the session.
#[allow(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Wake {
    Directive(Result<Option<WorkerDirective>, tonic::Status>),
    Heartbeat,
    Log(LogLine),
    Loaded(Result<Prepared, MemberError>),
    Trained(Result<Outcome, MemberError>),
    Shutdown,
}

impl Session {
    async fn open(
        endpoint: &Endpoint,
        options: &Options,
        listener: &RingListener,
        process_id: &str,
    ) -> Result<Self, Option<Lost>> {
        let unreachable =
            |reason: String| Some(Lost::Connect { address: options.coordinator.clone(), reason });
        let channel = endpoint.connect().await.map_err(|error| unreachable(innermost(&error)))?;
        let (outbox, outgoing) = mpsc::channel(OUTBOX_MESSAGES);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            process_id: process_id.to_owned(),
            requested_name: options.name.clone(),
            ring_address: ring_address(options, listener.local_addr())
                .await
                .map_err(|e| unreachable(e.to_string()))?,
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            pid: std::process::id(),
            device: options.device.clone(),
            threads: options.threads,
            libtorch_version: crate::LIBTORCH_VERSION.to_owned(),
        };
        let refused = |status: tonic::Status| Some(refusal(&options.coordinator, &status));
        outbox.send(wrap(Message::Hello(hello))).await.map_err(|_| unreachable("no outbox".to_owned()))?;
        let mut client: ClusterClient<Channel> =
            ClusterClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE_BYTES);
        let opening = async {
            let mut directives = client.session(ReceiverStream::new(outgoing)).await?.into_inner();
            let first = directives.message().await?;
            Ok::<_, tonic::Status>((directives, first))
        };
        let (directives, first) = timeout(WELCOME_TIMEOUT, opening)
            .await
            .map_err(|_| unreachable("it did not answer in time".to_owned()))?
            .map_err(refused)?;
        let Some(Directive::Welcome(Welcome { name, heartbeat_interval_ms, .. })) =
            first.and_then(|directive| directive.directive)
        else {
            return Err(unreachable("its first message was no welcome".to_owned()));
        };
        tracing::info!("joined the coordinator at {} as {name}", options.coordinator);
        let heartbeat = Duration::from_millis(u64::from(heartbeat_interval_ms.max(10)));
        Ok(Self { name, outbox, directives, heartbeat, member: None })
    }

    /// Runs until the session ends; `None` after a shutdown.
    async fn run(
        mut self,
        listener: &Arc<RingListener>,
        logs: &LogForwarder,
        log_lines: &mut mpsc::Receiver<LogLine>,
        shutdown: &CancellationToken,
    ) -> Option<Lost> {
        let mut beat = interval(self.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let lost = loop {
            let wake = tokio::select! {
                directive = self.directives.message() => Wake::Directive(directive),
                _ = beat.tick() => Wake::Heartbeat,
                Some(line) = log_lines.recv() => Wake::Log(line),
                wake = stage_done(&mut self.member) => wake,
                () = shutdown.cancelled() => Wake::Shutdown,
            };
            let sent = match wake {
                Wake::Directive(Ok(Some(WorkerDirective { directive: Some(directive) }))) => {
                    self.follow(directive, listener, logs);
                    Ok(())
                }
                Wake::Directive(Ok(Some(_))) => Ok(()),
                Wake::Directive(Ok(None)) => break Some(Lost::Session("it closed the stream".to_owned())),
                Wake::Directive(Err(status)) => break Some(Lost::Session(status.message().to_owned())),
                Wake::Heartbeat => self.send_if_room(Message::Heartbeat(self.heartbeat_now())),
                Wake::Log(line) => self.send_if_room(Message::LogLine(line)),
                Wake::Loaded(result) => self.loaded(result).await,
                Wake::Trained(result) => self.trained(result).await,
                Wake::Shutdown => {
                    let goodbye = Message::Goodbye(Goodbye { reason: "it was told to stop".to_owned() });
                    break self.send(goodbye).await.err();
                }
            };
            if let Err(lost) = sent {
                break Some(lost);
            }
        };
        // Without its coordinator a worker commits nothing, so the run is over for it.
        if let Some(member) = self.member.take() {
            member.end("the session with the coordinator ended");
        }
        logs.enter(None);
        lost
    }

    /// Does what the coordinator says. Directives of another run or generation are dropped.
    fn follow(&mut self, directive: Directive, listener: &Arc<RingListener>, logs: &LogForwarder) {
        match directive {
            Directive::Prepare(prepare) => self.prepare(prepare, listener, logs),
            Directive::Start(start) => {
                if let Some(member) = self.member_of(&start.run, start.generation) {
                    member.start(listener);
                }
            }
            Directive::StopRun(stop) => {
                if let Some(member) = self.member_of(&stop.run, stop.generation) {
                    tracing::info!("stopping {} after this step", stop.run);
                    member.progress.request_stop();
                }
            }
            Directive::Abort(abort) => {
                if self.member_of(&abort.run, abort.generation).is_some() {
                    tracing::warn!("{} was ended: {}", abort.run, abort.message);
                    if let Some(member) = self.member.take() {
                        member.end(&abort.message);
                    }
                    logs.enter(None);
                }
            }
            Directive::CheckpointCommitted(committed) => {
                tracing::info!("the checkpoint of step {} is committed", committed.step);
            }
            Directive::Welcome(_) => tracing::warn!("the coordinator sent a second welcome; ignored"),
        }
    }

    fn prepare(&mut self, prepare: Prepare, listener: &Arc<RingListener>, logs: &LogForwarder) {
        if let Some(former) = self.member.take() {
            former.end("a newer group takes its place");
        }
        let progress = Arc::new(Progress::new(prepare.start_step));
        let (run, generation) = (prepare.run.clone(), prepare.generation);
        listener.fence(&prepare.run_id, takuma_core::ids::Generation(generation));
        logs.enter(Some(Place {
            run: run.clone(),
            rank: prepare.rank,
            generation,
            progress: Arc::clone(&progress),
        }));
        let world = prepare.members.len();
        tracing::info!(rank = prepare.rank, world, generation, step = prepare.start_step, "preparing {run}");
        let loading = tokio::spawn(member::load(prepare, Arc::clone(&progress), self.outbox.clone()));
        let stage = Stage::Loading(loading);
        self.member = Some(Member { run, generation, progress, stopper: Stopper::default(), stage });
    }

    async fn loaded(&mut self, result: Result<Prepared, MemberError>) -> Result<(), Lost> {
        let Some(member) = self.member.as_mut() else { return Ok(()) };
        match result {
            Ok(prepared) => {
                member.stage = Stage::Ready(Box::new(prepared));
                let (run, generation) = (member.run.clone(), member.generation);
                self.send(Message::Prepared(PreparedMessage { run, generation })).await
            }
            Err(error) => self.failed(&error).await,
        }
    }

    async fn trained(&mut self, result: Result<Outcome, MemberError>) -> Result<(), Lost> {
        match result {
            Ok(outcome) => {
                let Some(member) = self.member.take() else { return Ok(()) };
                tracing::info!("{} ended after step {}", member.run, outcome.step);
                self.send(Message::RunEnded(RunEnded {
                    run: member.run,
                    generation: member.generation,
                    outcome: outcome.outcome.into(),
                    step: outcome.step,
                    weights_sha256: outcome.weights_sha256,
                }))
                .await
            }
            Err(error) => self.failed(&error).await,
        }
    }

    async fn failed(&mut self, error: &MemberError) -> Result<(), Lost> {
        let Some(member) = self.member.take() else { return Ok(()) };
        tracing::error!(step = member.progress.step(), "{} cannot go on: {error}", member.run);
        let (kind, suspect_rank) = error.blame();
        self.send(Message::RunFailed(RunFailed {
            run: member.run,
            generation: member.generation,
            step: member.progress.step(),
            phase: member.progress.now().phase.to_owned(),
            kind: kind.into(),
            message: error.to_string(),
            suspect_rank,
        }))
        .await
    }

    fn member_of(&mut self, run: &str, generation: u64) -> Option<&mut Member> {
        self.member.as_mut().filter(|member| member.run == run && member.generation == generation)
    }

    fn heartbeat_now(&self) -> Heartbeat {
        let Some(member) = &self.member else {
            return Heartbeat { phase: "idle".to_owned(), ..Heartbeat::default() };
        };
        let now = member.progress.now();
        let [compute_s, data_s, exchange_s] = now.last_step_s.map(|seconds| seconds as f32);
        Heartbeat {
            run: member.run.clone(),
            generation: member.generation,
            step: member.progress.step(),
            phase: now.phase.to_owned(),
            compute_s,
            data_s,
            exchange_s,
        }
    }

    async fn send(&self, message: Message) -> Result<(), Lost> {
        let closed = || Lost::Session("its stream is closed".to_owned());
        timeout(KEEPALIVE_TIMEOUT, self.outbox.send(wrap(message)))
            .await
            .map_err(|_| Lost::Session(format!("{} cannot get a message out", self.name)))?
            .map_err(|_| closed())
    }

    /// For what comes again anyway: a full outbox is no reason to wait.
    fn send_if_room(&self, message: Message) -> Result<(), Lost> {
        match self.outbox.try_send(wrap(message)) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => {
                Err(Lost::Session("its stream is closed".to_owned()))
            }
        }
    }
}

impl Member {
    fn start(&mut self, listener: &Arc<RingListener>) {
        // A placeholder for the moment in which the stage changes hands.
        let idle = Stage::Training(tokio::spawn(std::future::pending()));
        match std::mem::replace(&mut self.stage, idle) {
            Stage::Ready(prepared) => {
                let training = member::train(*prepared, Arc::clone(listener), self.stopper.clone());
                self.stage = Stage::Training(tokio::spawn(training));
            }
            other => {
                tracing::warn!("{} was started out of turn; ignored", self.run);
                self.stage = other;
            }
        }
    }

    /// Ends the membership at once; nothing of it is reported any more.
    fn end(self, reason: &str) {
        self.stopper.abort(reason);
        match self.stage {
            Stage::Loading(task) => task.abort(),
            Stage::Ready(_) => {}
            // The thread ends by itself within one operation of the collective.
            Stage::Training(task) => drop(task),
        }
    }
}

/// Waits for the present stage to be done; for ever if there is nothing to wait for.
async fn stage_done(member: &mut Option<Member>) -> Wake {
    let panicked = |error: tokio::task::JoinError| MemberError::Panicked(error.to_string());
    match member.as_mut().map(|member| &mut member.stage) {
        Some(Stage::Loading(task)) => Wake::Loaded(task.await.map_err(panicked).and_then(|result| result)),
        Some(Stage::Training(task)) => Wake::Trained(task.await.map_err(panicked).and_then(|result| result)),
        Some(Stage::Ready(_)) | None => std::future::pending().await,
    }
}

/// Where peers reach this worker: the listener's port at the advertised host, or at the local
/// address of a connection to the coordinator.
async fn ring_address(options: &Options, listening: SocketAddr) -> std::io::Result<String> {
    if let Some(host) = &options.advertise {
        return Ok(format!("{host}:{}", listening.port()));
    }
    if !listening.ip().is_unspecified() {
        return Ok(listening.to_string());
    }
    let authority = options.coordinator.split("://").last().unwrap_or_default().trim_end_matches('/');
    let probe = timeout(CONNECT_TIMEOUT, tokio::net::TcpStream::connect(authority)).await??;
    Ok(SocketAddr::new(probe.local_addr()?.ip(), listening.port()).to_string())
}

fn refusal(address: &str, status: &tonic::Status) -> Lost {
    match status.code() {
        Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented | Code::PermissionDenied => {
            Lost::Final(ControlError::Refused {
                address: address.to_owned(),
                reason: status.message().to_owned(),
            })
        }
        _ => Lost::Session(status.message().to_owned()),
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
