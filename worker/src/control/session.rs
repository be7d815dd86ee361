//! The session: Hello, heartbeats, directives; for ever, with full jitter between attempts. The member
//! outlives it: without a coordinator training goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use takuma_core::noise::{CounterRng, Purpose};
use takuma_proto::PROTOCOL_VERSION;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::v1::{
    Goodbye, Heartbeat, Hello, LogLine, Prepare, Welcome, WorkerDirective, WorkerMessage,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};

use super::logs::LogForwarder;
use super::member::{Happening, Member};
use crate::collective::RingListener;
use crate::trainer::Spool;

/// Messages that wait for the network. Metrics and tiles of many steps fit; beyond it training waits.
const OUTBOX_MESSAGES: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// The coordinator is called lost when it does not answer pings for so long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// In a run, because a restarted coordinator waits for its workers.
const LONGEST_PAUSE_IN_A_RUN: Duration = Duration::from_secs(2);
/// After SIGTERM: a group gets so long to change over without this worker, or so many of its steps, if that is longer.
const LEAVE_GRACE: Duration = Duration::from_secs(12);
const STEPS_TO_LEAVE: f32 = 3.0;
/// Tiles and logs are small; a directive carries a configuration and a member list.
const LARGEST_MESSAGE_BYTES: usize = 16 << 20;

/// Who this worker is and where it belongs.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://host:port`.
    pub coordinator: String,
    /// Name to ask for; "" lets the coordinator choose.
    pub name: String,
    /// `host` or `host:port` where peers reach the ring listener; none = the address that the coordinator sees.
    pub advertise: Option<String>,
    /// Compute threads.
    pub threads: u32,
    /// What computes.
    pub device: tch::Device,
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
    // Once given, a name is asked for again: a restarted coordinator knows no names.
    let mut name = options.name.clone();
    let mut worker = Worker {
        member: None,
        listener: &listener,
        logs: &logs,
        log_lines: &mut log_lines,
        shutdown: &shutdown,
        device: options.device,
    };
    while !shutdown.is_cancelled() {
        let begin = Instant::now();
        if let Some(member) = &mut worker.member {
            member.catch_up();
        }
        let session =
            Session::open(&endpoint, &options, &listener, &process_id, &name, worker.member.as_ref());
        let lost = match session.await {
            Ok(mut session) => {
                told = false;
                name.clone_from(&session.name);
                session.run(&mut worker).await
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
        if begin.elapsed() > LONGEST_PAUSE / 4 {
            pause = FIRST_PAUSE;
        }
        let wait = pause.mul_f32(jitter.uniform_f32());
        let longest = if worker.member.is_some() { LONGEST_PAUSE_IN_A_RUN } else { LONGEST_PAUSE };
        pause = (pause * 2).min(longest);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => {}
        }
    }
    worker.drop_member("this worker was told to stop");
    Ok(())
}

fn wrap(message: Message) -> WorkerMessage {
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
    /// This worker has said that it wants to go.
    leaving: bool,
}

/// Messages on their way to the coordinator.
type Outbox = mpsc::Sender<WorkerMessage>;

/// What woke the session.
#[allow(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Wake {
    Directive(Result<Option<WorkerDirective>, tonic::Status>),
    Heartbeat,
    Log(LogLine),
    Member(Happening),
    Results,
    Shutdown,
    GraceOver,
}

/// What to do after a wake.
enum Then {
    GoOn,
    Leave,
}

impl Session {
    async fn open(
        endpoint: &Endpoint,
        options: &Options,
        listener: &RingListener,
        process_id: &str,
        name: &str,
        member: Option<&Member>,
    ) -> Result<Self, Option<Lost>> {
        let unreachable =
            |reason: String| Some(Lost::Connect { address: options.coordinator.clone(), reason });
        let channel = endpoint.connect().await.map_err(|error| unreachable(innermost(&error)))?;
        let (outbox, outgoing) = mpsc::channel(OUTBOX_MESSAGES);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            process_id: process_id.to_owned(),
            requested_name: name.to_owned(),
            ring_address: ring_address(options, listener.local_addr())
                .await
                .map_err(|e| unreachable(e.to_string()))?,
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            pid: std::process::id(),
            device: crate::device::name(options.device),
            threads: options.threads,
            libtorch_version: crate::LIBTORCH_VERSION.to_owned(),
            membership: member.and_then(Member::claim),
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
        Ok(Self { name, outbox, directives, heartbeat, leaving: false })
    }

    /// Runs until the session ends; `None` when the worker may go.
    async fn run(&mut self, worker: &mut Worker<'_>) -> Option<Lost> {
        let mut beat = interval(self.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leave_by = None;
        if let Some(member) = &worker.member {
            member.spool().rewind();
        }
        loop {
            let spool = worker.member.as_ref().map(|member| member.spool().clone());
            let wake = tokio::select! {
                directive = self.directives.message() => Wake::Directive(directive),
                _ = beat.tick() => Wake::Heartbeat,
                Some(line) = worker.log_lines.recv() => Wake::Log(line),
                happening = happening(&mut worker.member) => Wake::Member(happening),
                () = results(spool) => Wake::Results,
                () = worker.shutdown.cancelled(), if !self.leaving => Wake::Shutdown,
                () = grace_over(leave_by), if self.leaving => Wake::GraceOver,
            };
            if matches!(wake, Wake::Shutdown) {
                leave_by = Some(Instant::now() + leave_grace(worker.member.as_ref()));
            }
            match self.take(wake, worker).await {
                Ok(Then::GoOn) => {}
                Ok(Then::Leave) => return None,
                Err(lost) => return Some(lost),
            }
        }
    }

    async fn take(&mut self, wake: Wake, worker: &mut Worker<'_>) -> Result<Then, Lost> {
        match wake {
            Wake::Directive(Ok(Some(WorkerDirective { directive: Some(Directive::Farewell(_)) }))) => {
                return Ok(Then::Leave);
            }
            Wake::Directive(Ok(Some(WorkerDirective { directive: Some(directive) }))) => {
                worker.follow(directive);
            }
            Wake::Directive(Ok(Some(_))) => {}
            Wake::Directive(Ok(None)) => return Err(Lost::Session("it closed the stream".to_owned())),
            Wake::Directive(Err(status)) => return Err(Lost::Session(status.message().to_owned())),
            Wake::Heartbeat => {
                let idle = || Heartbeat { phase: "idle".to_owned(), ..Heartbeat::default() };
                let beat = worker.member.as_ref().map_or_else(idle, Member::heartbeat);
                self.send_if_room(Message::Heartbeat(beat))?;
            }
            Wake::Log(line) => self.send_if_room(Message::LogLine(line))?,
            Wake::Member(happening) => {
                if let Some(member) = &mut worker.member {
                    member.take_in(happening);
                    worker.logs.enter(Some(member.place()));
                }
            }
            Wake::Results => self.send_results(worker).await?,
            Wake::Shutdown => {
                self.leaving = true;
                let at_once = false;
                self.send(Message::Goodbye(Goodbye { reason: "it was told to stop".to_owned(), at_once }))
                    .await?;
            }
            Wake::GraceOver => {
                let reason = "it was told to stop and cannot wait any longer".to_owned();
                self.send(Message::Goodbye(Goodbye { reason, at_once: true })).await?;
                return Ok(Then::Leave);
            }
        }
        Ok(Then::GoOn)
    }

    /// Sends what was not sent yet, as long as there is something.
    async fn send_results(&mut self, worker: &mut Worker<'_>) -> Result<(), Lost> {
        let Some(member) = &worker.member else { return Ok(()) };
        for message in member.spool().take_unsent() {
            self.send(message).await?;
        }
        if member.spool().has_unsent() {
            member.spool().wake();
        } else if member.is_over() {
            worker.drop_member("it cannot go on");
        }
        Ok(())
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

async fn happening(member: &mut Option<Member>) -> Happening {
    match member {
        Some(member) => member.happening().await,
        None => std::future::pending().await,
    }
}

async fn results(spool: Option<Spool>) {
    match spool {
        Some(spool) => spool.changed().await,
        None => std::future::pending().await,
    }
}

fn leave_grace(member: Option<&Member>) -> Duration {
    let step_s =
        member.map(Member::heartbeat).map_or(0.0, |beat| beat.compute_s + beat.data_s + beat.exchange_s);
    LEAVE_GRACE.max(Duration::try_from_secs_f32(step_s * STEPS_TO_LEAVE).unwrap_or(LEAVE_GRACE))
}

async fn grace_over(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What outlives sessions.
struct Worker<'a> {
    member: Option<Member>,
    listener: &'a Arc<RingListener>,
    logs: &'a LogForwarder,
    log_lines: &'a mut mpsc::Receiver<LogLine>,
    shutdown: &'a CancellationToken,
    device: tch::Device,
}

impl Worker<'_> {
    /// Does what the coordinator says. Directives of another run or generation are dropped.
    fn follow(&mut self, directive: Directive) {
        match directive {
            Directive::Prepare(prepare) => self.prepare(prepare),
            Directive::Start(start) => {
                if let Some(member) = self.member.as_mut().filter(|member| member.run() == start.run) {
                    member.start(start.generation, self.listener);
                }
            }
            Directive::StopRun(stop) => {
                if let Some(member) =
                    self.member.as_ref().filter(|member| member.is(&stop.run, stop.generation))
                {
                    member.stop();
                }
            }
            Directive::Abort(abort) => self.abort(&abort.run, abort.generation, &abort.message),
            Directive::Release(release) => {
                if self.member.as_ref().is_some_and(|member| member.is(&release.run, release.generation)) {
                    self.drop_member("the run is over for it");
                }
            }
            Directive::CheckpointCommitted(committed) => {
                tracing::info!("the checkpoint of step {} is committed", committed.step);
                if let Some(member) = self.member.as_ref().filter(|member| member.run() == committed.run) {
                    member.spool().committed(committed.step);
                }
            }
            Directive::Kept(kept) => {
                if let Some(member) = self.member.as_ref().filter(|member| member.run() == kept.run) {
                    member.spool().kept(kept);
                }
            }
            Directive::Farewell(_) => {}
            Directive::Welcome(_) => tracing::warn!("the coordinator sent a second welcome; ignored"),
        }
    }

    fn prepare(&mut self, prepare: Prepare) {
        match &mut self.member {
            Some(member) if member.goes_on_with(&prepare) => member.go_on(prepare, self.listener),
            _ => {
                self.drop_member("another group takes its place");
                self.member = Some(Member::begin(prepare, self.listener, self.device));
            }
        }
        self.logs.enter(self.member.as_ref().map(Member::place));
    }

    fn abort(&mut self, run: &str, generation: u64, message: &str) {
        let Some(member) = &mut self.member else { return };
        if member.drop_next(run, generation) {
            tracing::debug!("{run}: {message}");
        } else if member.is(run, generation) || member.changes_to(run, generation) {
            tracing::warn!("{run} is over for this worker: {message}");
            self.drop_member(message);
        }
    }

    fn drop_member(&mut self, reason: &str) {
        if let Some(member) = self.member.take() {
            member.end(reason);
        }
        self.logs.enter(None);
    }
}

/// Where peers reach this worker: the listener's port at the advertised host, or at the local
/// address of a connection to the coordinator.
async fn ring_address(options: &Options, listening: SocketAddr) -> std::io::Result<String> {
    if let Some(host) = &options.advertise {
        // Behind a forwarded port the whole address is another one.
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        return Ok(if has_port { host.clone() } else { format!("{host}:{}", listening.port()) });
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
