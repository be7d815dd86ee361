//! [`Owner`]: the handle to the one task that owns the [`Cluster`] and carries out its actions.
//!
//! Why one task: no locks, one order of events, and a state that is consistent between any two of them. The
//! price is that nothing in it may wait: stores, pictures and slow clients are served by other tasks, behind
//! bounded queues, and what they did comes back as an event.

mod watching;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use takuma_core::cluster::Cluster;
use takuma_core::event::{Action, Event, Hello, Refusal, RequestId, SessionId};
use takuma_core::time::Timestamp;
use takuma_proto::v1;
use takuma_store::Store;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::channels::{LogSubscription, RunChannels, Subscription};
use crate::clock::Clock;
use crate::convert;
use crate::directives::DirectiveSender;
use crate::drawing::Drawing;
use crate::files::{Job, Records, Writer, WriterSetup};

/// Messages that may wait for the owner; senders wait when it is full.
const MAX_MESSAGES: usize = 1_024;
/// The store gets so long to take a submission, see `files`; the owner itself answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(45);
/// Writers get so long at shutdown to store what they have.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the owner can be sent.
pub enum Message {
    /// Something happened.
    Event(Event),
    /// A worker wants in.
    Connect { session: SessionId, hello: Hello, seat: Seat },
    /// A client's request: the event to apply and where the answer goes.
    Request {
        event: Box<dyn FnOnce(RequestId) -> Event + Send>,
        reply: oneshot::Sender<Result<String, Refusal>>,
    },
    /// A read of the state.
    Query(Box<dyn FnOnce(&Cluster) + Send>),
    /// A client wants to watch a run.
    Watch { run: String, reply: oneshot::Sender<Result<Subscription, Refusal>> },
    /// A client wants a run's log.
    Logs { run: String, reply: oneshot::Sender<Result<LogSubscription, Refusal>> },
    /// A worker logged something.
    Log { session: SessionId, line: v1::LogLine },
    /// Another coordinator has written this object, which is ours to write: end, and write nothing more.
    StoreLost { object: String },
    /// Store everything and end.
    Shutdown,
}

/// Another coordinator works on the store.
#[derive(Debug)]
pub struct StoreLost {
    /// What it has written.
    pub object: String,
}

/// The owner's end of a worker's session.
pub struct Seat {
    /// Directives to the worker; one that does not drain it is cut.
    pub directives: DirectiveSender,
    /// Cancelled when the session is to end.
    pub closed: CancellationToken,
    /// Told whether the worker may stay.
    pub admitted: Option<oneshot::Sender<Result<(), Refusal>>>,
}

/// A handle to the owning task. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Owner {
    messages: mpsc::Sender<Message>,
    clock: Clock,
    sessions: Arc<AtomicU64>,
}

impl Owner {
    /// Starts the task. It ends after [`Message::Shutdown`], or when the store is lost to another coordinator.
    #[must_use]
    pub fn start(
        cluster: Cluster,
        store: Store,
        records: Records,
        clock: Clock,
        drawing: Drawing,
        heartbeat_interval_ms: u32,
    ) -> (Self, JoinHandle<Result<(), StoreLost>>) {
        let (messages, inbox) = mpsc::channel(MAX_MESSAGES);
        let owner = Self { messages, clock, sessions: Arc::new(AtomicU64::new(1)) };
        let state = State {
            cluster,
            store,
            records,
            drawing,
            heartbeat_interval_ms,
            owner: owner.clone(),
            seats: HashMap::new(),
            replies: HashMap::new(),
            next_request: 1,
            writers: HashMap::new(),
            closing: HashMap::new(),
            channels: HashMap::new(),
            unshown: BTreeMap::new(),
            hurry: CancellationToken::new(),
        };
        (owner, tokio::spawn(state.run(inbox)))
    }

    /// The time that the core is told.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// A number for a new session.
    #[must_use]
    pub fn new_session(&self) -> SessionId {
        SessionId(self.sessions.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends a message; waits while the owner is behind.
    ///
    /// # Errors
    /// The coordinator is shutting down.
    pub async fn send(&self, message: Message) -> Result<(), Refusal> {
        self.messages.send(message).await.map_err(|_| shutting_down())
    }

    /// Applies a client's request and waits for the answer.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn request(
        &self,
        event: impl FnOnce(RequestId) -> Event + Send + 'static,
    ) -> Result<String, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Request { event: Box::new(event), reply }).await?;
        wait(answer).await?
    }

    /// Reads the state.
    ///
    /// # Errors
    /// The coordinator is shutting down.
    pub async fn query<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Cluster) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let read = move |cluster: &Cluster| {
            if reply.send(read(cluster)).is_err() {
                tracing::trace!("a client left before its answer");
            }
        };
        self.send(Message::Query(Box::new(read))).await?;
        wait(answer).await
    }

    /// Begins to watch a run, by a prefix of its name.
    ///
    /// # Errors
    /// No such run.
    pub async fn watch(&self, run: String) -> Result<Subscription, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Watch { run, reply }).await?;
        wait(answer).await?
    }

    /// Begins to read a run's log, by a prefix of its name.
    ///
    /// # Errors
    /// No such run.
    pub async fn logs(&self, run: String) -> Result<LogSubscription, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Logs { run, reply }).await?;
        wait(answer).await?
    }
}

fn shutting_down() -> Refusal {
    Refusal::Unavailable("the coordinator is shutting down".to_owned())
}

async fn wait<T>(answer: oneshot::Receiver<T>) -> Result<T, Refusal> {
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(shutting_down()),
        Err(_) => Err(Refusal::Unavailable("the coordinator is waiting for the store; try again".to_owned())),
    }
}

struct State {
    cluster: Cluster,
    store: Store,
    records: Records,
    drawing: Drawing,
    heartbeat_interval_ms: u32,
    owner: Owner,
    seats: HashMap<SessionId, Seat>,
    replies: HashMap<RequestId, oneshot::Sender<Result<String, Refusal>>>,
    next_request: u64,
    writers: HashMap<String, Writer>,
    /// Writers that were told to end and may still be at work.
    closing: HashMap<String, JoinHandle<()>>,
    channels: HashMap<String, RunChannels>,
    /// Runs whose newest state nobody was shown, and when it is to be.
    unshown: BTreeMap<String, Instant>,
    hurry: CancellationToken,
}

impl State {
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>) -> Result<(), StoreLost> {
        loop {
            let deadline = self.cluster.next_deadline();
            let now = Instant::now();
            let deadline = deadline.map(|at| now + self.owner.clock.until(at));
            let wake = deadline.into_iter().chain(self.unshown.values().copied()).min();
            let message = tokio::select! {
                // Messages first: a heartbeat that has come in must count before its deadline does.
                biased;
                message = inbox.recv() => message,
                () = tokio::time::sleep_until(wake.unwrap_or(now)), if wake.is_some() => {
                    self.show_due();
                    if deadline.is_none_or(|at| at > Instant::now()) {
                        continue;
                    }
                    Some(Message::Event(Event::Ticked))
                }
            };
            match message {
                Some(Message::Shutdown) | None => break,
                Some(Message::StoreLost { object }) => return Err(self.abandon(object)),
                Some(message) => self.handle(message),
            }
            self.show_due();
        }
        self.shut_down(inbox).await
    }

    /// Stops all writers where they are.
    fn abandon(self, object: String) -> StoreLost {
        let writing = self.writers.into_values().map(Writer::into_task).chain(self.closing.into_values());
        writing.for_each(|task| task.abort());
        StoreLost { object }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Event(event) => self.apply(event),
            Message::Connect { session, hello, seat } => {
                self.seats.insert(session, seat);
                self.apply(Event::WorkerConnected { session, hello });
            }
            Message::Request { event, reply } => {
                let request = RequestId(self.next_request);
                self.next_request += 1;
                self.replies.insert(request, reply);
                self.apply(event(request));
            }
            Message::Query(read) => read(&self.cluster),
            Message::Watch { run, reply } => {
                self.show_all();
                answer(reply, self.channels_of(&run).map(|run| run.subscribe()));
            }
            Message::Logs { run, reply } => {
                answer(reply, self.channels_of(&run).map(|run| run.subscribe_logs()))
            }
            Message::Log { session, line } => self.log(session, line),
            Message::StoreLost { .. } | Message::Shutdown => {}
        }
    }

    fn apply(&mut self, event: Event) {
        let actions = self.cluster.apply(self.owner.clock.now(), event);
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::WelcomeWorker { session, name } => self.welcome(session, name),
            Action::RefuseWorker { session, refusal } => {
                if let Some(admitted) = self.seats.remove(&session).and_then(|mut seat| seat.admitted.take())
                {
                    answer(admitted, Err(refusal));
                }
            }
            Action::CloseSession { session, reason } => self.close_session(session, &reason),
            Action::Direct { session, directive } => self.direct(session, convert::directive(directive)),
            Action::Answer { request, result } => {
                if let Some(reply) = self.replies.remove(&request) {
                    answer(reply, result);
                }
            }
            Action::SaveRun { record, first, acknowledge } => {
                let run = record.name.clone();
                self.write(&run, Job::Save { record, first, acknowledge });
            }
            Action::RecordEvent { run, event } => self.record(run, event),
            Action::RecordMetrics { run, line } => self.write(&run, Job::Metrics(line)),
            Action::RewindMetrics { run, step, lineage } => self.write(&run, Job::Rewind { step, lineage }),
            Action::StoreGrid { grid } => self.write(&grid.fence.run.clone(), Job::Grid(grid)),
            Action::CommitCheckpoint { manifest } => self.write(&manifest.run.clone(), Job::Commit(manifest)),
            Action::SweepCheckpoints { fence, step, retention } => {
                self.write(&fence.run, Job::Sweep { step, generation: fence.generation, retention });
            }
            Action::FlushRun { fence } => self.write(&fence.run.clone(), Job::Flush(fence)),
            Action::CloseRun { run } => self.close_run(&run),
            Action::RefuseStale { session, what, fence } => {
                let (run, generation) = (&fence.run, fence.generation.0);
                tracing::debug!(session = session.0, run, generation, "refused a stale {what}");
            }
            Action::PublishRun { run } => self.publish(&run),
        }
    }

    fn welcome(&mut self, session: SessionId, name: String) {
        let welcome = v1::Welcome {
            protocol_version: takuma_proto::PROTOCOL_VERSION,
            name: name.clone(),
            heartbeat_interval_ms: self.heartbeat_interval_ms,
        };
        tracing::info!(worker = name, session = session.0, "worker connected");
        let directive = v1::worker_directive::Directive::Welcome(welcome);
        self.direct(session, v1::WorkerDirective { directive: Some(directive) });
        if let Some(admitted) = self.seats.get_mut(&session).and_then(|seat| seat.admitted.take()) {
            answer(admitted, Ok(()));
        }
    }

    fn direct(&mut self, session: SessionId, directive: v1::WorkerDirective) {
        let Some(seat) = self.seats.get(&session) else { return };
        if seat.directives.send(directive) {
            return;
        }
        // The session's reader sees it and tells the core.
        self.close_session(session, "it does not take what it is sent");
    }

    fn close_session(&mut self, session: SessionId, reason: &str) {
        if let Some(seat) = self.seats.remove(&session) {
            tracing::info!(session = session.0, reason, "session closed");
            seat.closed.cancel();
        }
    }

    fn record(&mut self, run: String, event: takuma_core::event::RunEvent) {
        let (step, generation, worker) = (event.step, event.generation.0, &event.worker);
        if event.kind == "failed" {
            tracing::error!(run, step, generation, worker, "{}: {}", event.kind, event.message);
        } else {
            tracing::info!(run, step, generation, worker, "{}: {}", event.kind, event.message);
        }
        if let Some(channels) = self.channels_by_name(&run) {
            channels.event(convert::run_event(&event));
            channels.line(convert::event_line(&run, &event));
        }
        self.write(&run, Job::Event(event));
    }

    fn write(&mut self, run: &str, job: Job) {
        if !self.writers.contains_key(run) {
            let record = self.cluster.run_view(run).map(|view| view.record);
            let recipe = record.as_ref().map_or("", |record| record.config.recipe.name());
            let setup = WriterSetup {
                run: run.to_owned(),
                title: format!("{run}: {recipe}, cost vs iteration"),
                store: self.store.clone(),
                records: self.records.clone(),
                began: record.as_ref().and_then(|record| record.origin.as_ref()).map_or(0, |from| from.step),
                lineage: record.map_or_else(Default::default, |record| record.lineage),
                owner: self.owner.clone(),
                drawing: self.drawing,
                hurry: self.hurry.clone(),
                previous: self.closing.remove(run),
            };
            self.writers.insert(run.to_owned(), Writer::start(setup));
        }
        let Some(Err(message)) = self.writers.get(run).map(|writer| writer.send(job)) else { return };
        tracing::error!(run, message, "a write could not be queued");
        let event = Event::StoreFailed { run: run.to_owned(), message };
        if self.owner.messages.try_send(Message::Event(event)).is_err() {
            tracing::error!(run, "and the run could not be told");
        }
    }

    fn close_run(&mut self, run: &str) {
        self.closing.retain(|_, task| !task.is_finished());
        if let Some(writer) = self.writers.remove(run) {
            if let Err(message) = writer.send(Job::Close) {
                tracing::error!(run, message, "the run's last files may be incomplete");
            }
            // Dropping the queue's end closes the writer too, after the jobs that are in it.
            self.closing.insert(run.to_owned(), writer.into_task());
        }
    }

    async fn shut_down(mut self, mut inbox: mpsc::Receiver<Message>) -> Result<(), StoreLost> {
        self.apply(Event::ShutDown);
        self.show_all();
        // Dropping the seats ends the sessions once their last directives are sent.
        self.seats.clear();
        self.channels.clear();
        let runs: Vec<String> = self.writers.keys().cloned().collect();
        runs.iter().for_each(|run| self.close_run(run));
        let tasks: Vec<_> = self.closing.drain().map(|(_, task)| task).collect();
        let ends: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let all = futures::future::join_all(tasks);
        // Writers report to the inbox while they finish: it is emptied, so that none waits for room.
        let drained = async {
            tokio::pin!(all);
            loop {
                tokio::select! {
                    results = &mut all => break Ok(results.iter().all(Result::is_ok)),
                    Some(message) = inbox.recv() => {
                        if let Message::StoreLost { object } = message {
                            break Err(StoreLost { object });
                        }
                    }
                }
            }
        };
        let hurry = self.hurry.clone();
        let hurried = async {
            tokio::time::sleep(SHUTDOWN_TIMEOUT / 2).await;
            hurry.cancel();
            std::future::pending::<()>().await;
        };
        let finished = tokio::select! {
            finished = tokio::time::timeout(SHUTDOWN_TIMEOUT, drained) => finished.unwrap_or(Ok(false)),
            () = hurried => Ok(false),
        };
        if !matches!(finished, Ok(true)) {
            // What is still at work would go on behind the process's back, where it is part of another one.
            ends.iter().for_each(tokio::task::AbortHandle::abort);
            tracing::error!("some of the runs' files could not be stored before the end");
        }
        finished.map(|_| ())
    }
}

fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    if reply.send(value).is_err() {
        tracing::trace!("a client left before its answer");
    }
}
