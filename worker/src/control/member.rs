//! [`Member`]: this worker's part in one run, through however many groups and sessions.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use takuma_core::ids::Generation;
use takuma_data::ShardPool;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::v1::{
    Formed, Heartbeat, Membership, Position, Prepare, Prepared, RunEnded, RunFailed, prepare, run_failed,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

use super::load::{MemberError, Ready, blame_of, config_of, load, probe, progress_of, seat_of};
use super::logs::Place;
use crate::collective::{CollectiveError, RingListener};
use crate::trainer::{
    Command, JobError, Note, Parts, Progress, Seat, Spool, Stamp, Stopper, Trainer, panic_words,
};

/// See the module.
pub(super) struct Member {
    /// What the present group was told by.
    present: Prepare,
    /// The group that takes over next, and what finds out whether it can.
    next: Option<Next>,
    stage: Stage,
    progress: Arc<Progress>,
    stopper: Stopper,
    spool: Spool,
    /// What computes.
    device: tch::Device,
    parked: bool,
    /// Cannot go on, and why; only that must still be sent.
    failed: Option<((run_failed::Kind, i32), String)>,
}

struct Next {
    prepare: Prepare,
    seat: Seat,
    probing: Option<JoinHandle<Result<(), MemberError>>>,
    started: bool,
}

enum Stage {
    Loading(JoinHandle<Result<Ready, MemberError>>),
    Ready(Box<Ready>),
    Training { commands: Sender<Command>, notes: UnboundedReceiver<Note>, pool: Arc<ShardPool> },
    Over,
}

/// What happened to a member.
#[allow(clippy::large_enum_variant, reason = "one at a time, on the stack")]
pub(super) enum Happening {
    Loaded(Result<Ready, MemberError>),
    Probed(Result<(), MemberError>),
    Noted(Note),
}

impl Member {
    /// Begins to load what `prepare` asks for.
    pub(super) fn begin(prepare: Prepare, listener: &RingListener, device: tch::Device) -> Self {
        listener.fence(&prepare.run_id, Generation(prepare.generation));
        let (run, generation, rank) = (prepare.run.clone(), prepare.generation, prepare.rank);
        let spool = Spool::new(Stamp { run: run.clone(), generation, rank });
        let progress = progress_of(&prepare);
        let world = prepare.members.len();
        tracing::info!(rank, world, generation, step = prepare.start_step, "preparing {run}");
        let (told, news) = (prepare.clone(), spool.clone());
        let loading = tokio::spawn(async move {
            let config = config_of(&told)?;
            let seat = seat_of(&told, &config)?;
            load(told, config, seat, news).await
        });
        Self {
            present: prepare,
            next: None,
            stage: Stage::Loading(loading),
            progress,
            stopper: Stopper::default(),
            spool,
            device,
            parked: false,
            failed: None,
        }
    }

    /// Name of the run.
    pub(super) fn run(&self) -> &str {
        &self.present.run
    }

    /// What is on its way to the coordinator.
    pub(super) fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Its last news was the last thing to do.
    pub(super) fn is_over(&self) -> bool {
        self.failed.is_some()
    }

    /// Where log lines come from.
    pub(super) fn place(&self) -> Place {
        Place {
            run: self.present.run.clone(),
            rank: self.present.rank,
            generation: self.present.generation,
            progress: Arc::clone(&self.progress),
        }
    }

    /// What a new session is told of it; nothing while it has no state that the group could miss.
    pub(super) fn claim(&self) -> Option<Membership> {
        if !matches!(self.stage, Stage::Training { .. }) || !self.progress.is_stateful() {
            return None;
        }
        let next = self.next.as_ref().filter(|next| next.started);
        Some(Membership {
            run: self.present.run.clone(),
            run_id: self.present.run_id.clone(),
            generation: self.present.generation,
            rank: self.present.rank,
            members: self.present.members.clone(),
            position: Some(Position { step: self.progress.step(), phase: 0 }),
            parked: self.parked,
            changes_to: next.map_or(0, |next| next.prepare.generation),
        })
    }

    pub(super) fn heartbeat(&self) -> Heartbeat {
        let now = self.progress.now();
        let [compute_s, data_s, exchange_s, receive_s] = now.last_step_s.map(|seconds| seconds as f32);
        Heartbeat {
            run: self.present.run.clone(),
            generation: self.present.generation,
            step: self.progress.step(),
            phase: now.phase.to_owned(),
            compute_s,
            data_s,
            exchange_s,
            receive_s,
        }
    }

    /// Whether `prepare` tells of a further group of the run that this member has state of.
    pub(super) fn goes_on_with(&self, prepare: &Prepare) -> bool {
        self.present.run_id == prepare.run_id
            && prepare.state() == prepare::State::Peers
            && matches!(self.stage, Stage::Training { .. })
    }

    /// Goes on in another group: now, or later between two steps.
    pub(super) fn go_on(&mut self, prepare: Prepare, listener: &RingListener) {
        let seat = match config_of(&prepare).and_then(|config| seat_of(&prepare, &config)) {
            Ok(seat) => seat,
            Err(error) => return self.fail(&error),
        };
        if let Some((blame, message)) = self.failed.clone() {
            // The trainer is gone; the new group must hear of it under its own generation.
            let generation = prepare.generation;
            self.enter(prepare);
            return self.say_failed(generation, blame, message);
        }
        if prepare.when() == prepare::When::NextStep {
            // The change before this one has taken place, even if the trainer's word of it is still under way.
            if let Some(before) = self.next.take_if(|next| next.started) {
                self.enter(before.prepare);
            }
            if let Stage::Training { pool, .. } = &self.stage {
                tracing::debug!("{}; the next group is prepared", pool.status());
            }
            let probed = seat.clone();
            let probing = Some(tokio::spawn(async move { probe(&probed).await }));
            self.next = Some(Next { prepare, seat, probing, started: false });
            return;
        }
        self.next = None;
        let generation = prepare.generation;
        listener.fence(&prepare.run_id, Generation(generation));
        tracing::info!(
            rank = prepare.rank,
            world = prepare.members.len(),
            generation,
            "{} goes on",
            prepare.run
        );
        self.enter(prepare);
        self.stopper.end_below(generation, "a newer group takes its place");
        self.command(Command::Form(seat));
    }

    fn enter(&mut self, prepare: Prepare) {
        self.spool.enter(prepare.generation, prepare.rank);
        self.present = prepare;
        self.parked = false;
    }

    fn command(&mut self, command: Command) {
        if let Stage::Training { commands, .. } = &self.stage
            && commands.send(command).is_err()
        {
            // Its last note says why.
            tracing::debug!("the trainer has ended");
        }
    }

    /// All members of a generation are prepared.
    pub(super) fn start(&mut self, generation: u64, listener: &Arc<RingListener>) {
        if let Some(next) = self.next.as_mut().filter(|next| next.prepare.generation == generation) {
            next.started = true;
            let seat = next.seat.clone();
            return self.command(Command::Next(seat));
        }
        if generation > self.present.generation {
            return self.command(Command::Leave(generation));
        }
        if generation != self.present.generation {
            return;
        }
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Ready(ready) => self.spawn(*ready, Arc::clone(listener)),
            other => {
                tracing::warn!("{} was started out of turn; ignored", self.present.run);
                self.stage = other;
            }
        }
    }

    /// Starts the trainer's thread: libtorch and the collective block.
    fn spawn(&mut self, ready: Ready, listener: Arc<RingListener>) {
        let seat = match seat_of(&self.present, &ready.config) {
            Ok(seat) => seat,
            Err(error) => return self.fail(&error),
        };
        let (commands, inbox) = std::sync::mpsc::channel();
        let (notes, outbox) = unbounded_channel();
        let generation = self.present.generation;
        let parts = Parts {
            device: self.device,
            config: ready.config,
            target_steps: ready.target_steps,
            passed_over: ready.passed_over,
            feed: ready.feed.on(self.device),
            checkpoint: ready.checkpoint,
            joins: ready.joins,
            progress: Arc::clone(&self.progress),
            uploader: ready.uploader,
            spool: self.spool.clone(),
            notes: notes.clone(),
            stopper: self.stopper.clone(),
            listener,
        };
        let body = move || {
            let trained =
                std::panic::AssertUnwindSafe(|| Trainer::new(parts).map(|trainer| trainer.run(&inbox)));
            let error = match std::panic::catch_unwind(trained) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(panic) => JobError::Panicked(panic_words(&*panic)),
            };
            // The session side is gone only when the process ends.
            drop(notes.send(Note::Failed { generation, error }));
        };
        let spawned = std::thread::Builder::new().name("trainer".to_owned()).spawn(body);
        self.stage = Stage::Training { commands, notes: outbox, pool: ready.pool };
        match spawned {
            Ok(_) => self.command(Command::Form(seat)),
            Err(error) => self.fail(&MemberError::Died(format!("it could not be started: {error}"))),
        }
    }

    /// Asks the group to stop after a step.
    pub(super) fn stop(&self) {
        tracing::info!("stopping {} after this step", self.present.run);
        self.progress.request_stop();
    }

    /// Whether a directive about `run` and `generation` is about this membership.
    pub(super) fn is(&self, run: &str, generation: u64) -> bool {
        self.present.run == run && self.present.generation == generation
    }

    /// Whether `generation` is the one that this member may have changed over to already.
    pub(super) fn changes_to(&self, run: &str, generation: u64) -> bool {
        let next = self.next.as_ref().filter(|next| next.started);
        self.present.run == run && next.is_some_and(|next| next.prepare.generation == generation)
    }

    /// Whether `generation` is the one that this member only prepares for.
    pub(super) fn drop_next(&mut self, run: &str, generation: u64) -> bool {
        let is_next = self.present.run == run
            && self.next.as_ref().is_some_and(|next| next.prepare.generation == generation && !next.started);
        if is_next {
            self.next = None;
        }
        is_next
    }

    /// Waits for the next thing to happen to this member.
    pub(super) async fn happening(&mut self) -> Happening {
        let died = |error: tokio::task::JoinError| MemberError::Died(error.to_string());
        let probing = async {
            match self.next.as_mut().and_then(|next| next.probing.as_mut()) {
                Some(task) => task.await.map_err(died).and_then(|result| result),
                None => std::future::pending().await,
            }
        };
        let staged = async {
            match &mut self.stage {
                Stage::Loading(task) => Happening::Loaded(task.await.map_err(died).and_then(|result| result)),
                Stage::Training { notes, .. } => match notes.recv().await {
                    Some(note) => Happening::Noted(note),
                    None => std::future::pending().await,
                },
                Stage::Ready(_) | Stage::Over => std::future::pending().await,
            }
        };
        tokio::select! {
            probed = probing => Happening::Probed(probed),
            happening = staged => happening,
        }
    }

    /// Takes in what the trainer noted while there was no session.
    pub(super) fn catch_up(&mut self) {
        while let Stage::Training { notes, .. } = &mut self.stage
            && let Ok(note) = notes.try_recv()
        {
            self.noted(note);
        }
    }

    /// Takes in what happened. What the coordinator must know goes into the spool.
    pub(super) fn take_in(&mut self, happening: Happening) {
        match happening {
            Happening::Loaded(Ok(ready)) => {
                self.stage = Stage::Ready(Box::new(ready));
                self.prepared(self.present.generation);
            }
            Happening::Loaded(Err(error)) => self.fail(&error),
            Happening::Probed(result) => self.probed(&result),
            Happening::Noted(note) => self.noted(note),
        }
    }

    fn prepared(&self, generation: u64) {
        self.spool.news(Message::Prepared(Prepared { run: self.present.run.clone(), generation }));
    }

    fn probed(&mut self, result: &Result<(), MemberError>) {
        let Some(next) = &mut self.next else { return };
        next.probing = None;
        let generation = next.prepare.generation;
        match result {
            Ok(()) => self.prepared(generation),
            Err(error) => {
                tracing::warn!("the next group cannot be formed: {error}");
                self.next = None;
                self.say_failed(generation, error.blame(), error.to_string());
            }
        }
    }

    fn noted(&mut self, note: Note) {
        let generation = match &note {
            Note::Formed { generation, .. }
            | Note::Broken { generation, .. }
            | Note::Ended { generation, .. }
            | Note::Failed { generation, .. } => *generation,
        };
        // The group that was to take over has: it formed, or broke while it did.
        if let Some(next) = self.next.take_if(|next| next.prepare.generation == generation) {
            self.enter(next.prepare);
        }
        // A trainer that cannot go on is through with every group.
        if generation != self.present.generation && !matches!(note, Note::Failed { .. }) {
            return;
        }
        let run = self.present.run.clone();
        match note {
            Note::Formed { position: (step, phase), stalled_s, restored, .. } => {
                if self.present.rank == 0 {
                    let position = Some(Position { step, phase });
                    self.spool.news(Message::Formed(Formed {
                        run,
                        generation,
                        position,
                        stalled_s,
                        restored,
                    }));
                }
            }
            Note::Broken { error: CollectiveError::StaleGeneration { .. }, .. } => self.parked = true,
            Note::Broken { error, .. } => {
                tracing::warn!(step = self.progress.step(), "{run} waits for its next group: {error}");
                self.parked = true;
                self.say_failed(generation, blame_of(&error), error.to_string());
            }
            Note::Ended { outcome, step, weights_sha256, .. } => {
                tracing::info!("{run} ended after step {step}");
                let outcome = outcome.into();
                self.spool.news(Message::RunEnded(RunEnded {
                    run,
                    generation,
                    outcome,
                    step,
                    weights_sha256,
                }));
            }
            Note::Failed { error, .. } => self.fail(&MemberError::Job(error)),
        }
    }

    fn say_failed(&self, generation: u64, (kind, suspect_rank): (run_failed::Kind, i32), message: String) {
        self.spool.news(Message::RunFailed(RunFailed {
            run: self.present.run.clone(),
            generation,
            step: self.progress.step(),
            phase: self.progress.now().phase.to_owned(),
            kind: kind.into(),
            message,
            suspect_rank,
        }));
    }

    /// This worker cannot go on.
    fn fail(&mut self, error: &MemberError) {
        tracing::error!(step = self.progress.step(), "{} cannot go on: {error}", self.present.run);
        self.failed = Some((error.blame(), error.to_string()));
        self.say_failed(self.present.generation, error.blame(), error.to_string());
    }

    /// Ends the membership at once; nothing of it is reported any more.
    pub(super) fn end(self, reason: &str) {
        self.stopper.end(reason);
        if let Stage::Loading(task) = self.stage {
            task.abort();
        }
        // Without its sender of commands the trainer's thread ends, within one operation of the collective.
    }
}
