//! [`Process`]: a worker's process and its sessions; after worker/src/control/session.rs.

use std::time::Duration;

use takuma_proto::v1;
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_store::Store;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::member::Member;
use crate::ring::Shared;
use crate::wire;

/// How often a member looks whether it can go on.
const LOOK: Duration = Duration::from_millis(20);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE_MS: u64 = 200;
const LONGEST_PAUSE_IN_A_RUN_MS: u64 = 2_000;
const LONGEST_PAUSE_MS: u64 = 10_000;
/// A session of this age was a good one.
const GOOD: Duration = Duration::from_millis(2_500);
const OUTBOX_MESSAGES: usize = 256;

/// A worker that works until its host crashes.
pub struct Process {
    id: String,
    host: String,
    rings: Shared,
    store: Store,
    member: Option<Member>,
    jitter: fastrand::Rng,
}

struct Session {
    outgoing: mpsc::Sender<v1::WorkerMessage>,
    directives: Streaming<v1::WorkerDirective>,
    heartbeat: Duration,
}

impl Process {
    /// A new process on `host`, with its own random numbers from the simulation's seed.
    pub fn start(host: &str, rings: Shared, store: Store, seed: u64) -> Self {
        let id = rings.borrow_mut().start(host);
        let own = id.bytes().fold(seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let jitter = fastrand::Rng::with_seed(own);
        Self { id, host: host.to_owned(), rings, store, member: None, jitter }
    }

    /// Session after session; the member outlives them.
    pub async fn work(mut self) {
        let mut pause_ms = FIRST_PAUSE_MS;
        loop {
            let begin = Instant::now();
            let opening = timeout(WELCOME_TIMEOUT, open(self.hello()));
            if let Ok(Some(session)) = self.while_training(opening).await {
                self.note("session begins");
                self.session(session).await;
                self.note("session ends");
            }
            if begin.elapsed() > GOOD {
                pause_ms = FIRST_PAUSE_MS;
            }
            let pause = Duration::from_millis(self.jitter.u64(0..=pause_ms));
            let longest = if self.member.is_some() { LONGEST_PAUSE_IN_A_RUN_MS } else { LONGEST_PAUSE_MS };
            pause_ms = (pause_ms * 2).min(longest);
            self.while_training(sleep_until(Instant::now() + pause)).await;
        }
    }

    fn note(&self, what: &str) {
        self.rings.borrow_mut().note(&self.id, what);
    }

    /// Waits for something; training goes on meanwhile.
    async fn while_training<T>(&mut self, wanted: impl Future<Output = T>) -> T {
        let mut wanted = std::pin::pin!(wanted);
        let mut looks = interval(LOOK);
        loop {
            tokio::select! {
                biased;
                done = &mut wanted => return done,
                _ = looks.tick() => self.advance().await,
            }
        }
    }

    async fn advance(&mut self) {
        if let Some(member) = &mut self.member {
            member.advance().await;
        }
    }

    /// One session, to its end.
    async fn session(&mut self, mut session: Session) {
        if let Some(member) = &mut self.member {
            member.spool.rewind();
        }
        let mut beats = interval(session.heartbeat);
        let mut looks = interval(LOOK);
        loop {
            tokio::select! {
                biased;
                directive = session.directives.message() => match directive {
                    Ok(Some(v1::WorkerDirective { directive: Some(directive) })) => self.follow(directive),
                    _ => return,
                },
                _ = beats.tick() => {
                    let beat = self.member.as_ref().map_or_else(idle, Member::heartbeat);
                    // One that finds no room says nothing.
                    session.outgoing.try_send(wrap(Message::Heartbeat(beat))).ok();
                }
                _ = looks.tick() => self.advance().await,
            }
            while let Some(member) = &mut self.member
                && let Ok(room) = session.outgoing.try_reserve()
                && let Some(message) = member.spool.next()
            {
                room.send(wrap(message));
            }
        }
    }

    fn hello(&self) -> v1::Hello {
        v1::Hello {
            protocol_version: takuma_proto::PROTOCOL_VERSION,
            process_id: self.id.clone(),
            requested_name: self.host.clone(),
            ring_address: format!("{}:1", self.host),
            host: self.host.clone(),
            device: "cpu".into(),
            threads: 1,
            membership: self.member.as_ref().and_then(Member::claim),
            ..v1::Hello::default()
        }
    }

    fn follow(&mut self, directive: Directive) {
        if let Some(told) = in_words(&directive) {
            self.note(&told);
        }
        if let Directive::Prepare(prepare) = directive {
            return self.prepare(prepare);
        }
        let Some(member) = &mut self.member else { return };
        match directive {
            Directive::Start(start) if start.run == member.run() => member.start(start.generation),
            Directive::Abort(v1::Abort { run, generation, .. }) => {
                let is_over = member.abort(&run, generation);
                if is_over {
                    self.member = None;
                }
            }
            Directive::Release(v1::Release { run, generation }) if member.is(&run, generation) => {
                self.member = None;
            }
            Directive::CheckpointCommitted(done) if done.run == member.run() => {
                member.spool.commit(done.step);
            }
            Directive::Kept(kept) if kept.run == member.run() => member.spool.keep(&kept),
            _ => {}
        }
    }

    fn prepare(&mut self, prepare: v1::Prepare) {
        match &mut self.member {
            Some(member) if member.goes_on_with(&prepare) => member.go_on(prepare),
            _ => {
                self.member = None;
                let (rings, store) = (self.rings.clone(), self.store.clone());
                self.member = Some(Member::begin(&self.id, rings, store, prepare));
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.rings.borrow_mut().end(&self.id);
    }
}

async fn open(hello: v1::Hello) -> Option<Session> {
    let channel = wire::dial().await?;
    let (outgoing, messages) = mpsc::channel(OUTBOX_MESSAGES);
    outgoing.send(wrap(Message::Hello(hello))).await.ok()?;
    let mut client = ClusterClient::new(channel);
    let mut directives = client.session(ReceiverStream::new(messages)).await.ok()?.into_inner();
    let Some(Directive::Welcome(welcome)) = directives.message().await.ok()??.directive else {
        panic!("no welcome came")
    };
    let heartbeat = Duration::from_millis(welcome.heartbeat_interval_ms.into());
    Some(Session { outgoing, directives, heartbeat })
}

fn idle() -> v1::Heartbeat {
    v1::Heartbeat { phase: "idle".into(), ..v1::Heartbeat::default() }
}

/// What of a directive belongs in the trace.
fn in_words(directive: &Directive) -> Option<String> {
    Some(match directive {
        Directive::Prepare(p) => {
            let (rank, world) = (p.rank, p.members.len());
            format!("prepare g{} {rank}/{world} {:?} {:?}", p.generation, p.state(), p.when())
        }
        Directive::Start(start) => format!("start g{}", start.generation),
        Directive::Abort(abort) => format!("abort g{}", abort.generation),
        Directive::Release(release) => format!("release g{}", release.generation),
        Directive::CheckpointCommitted(done) => format!("committed {}", done.step),
        Directive::Kept(kept) => format!("kept {} resend {}", kept.step, kept.resend),
        _ => return None,
    })
}

fn wrap(message: Message) -> v1::WorkerMessage {
    v1::WorkerMessage { message: Some(message) }
}
