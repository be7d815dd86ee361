//! [`Cluster`]: the coordinator's whole state and its one function.
//!
//! The caller's duties, in order: carry out the actions of [`Cluster::apply`] in their order; report what
//! they ask to have reported; when [`Cluster::next_deadline`] has passed without another event, apply
//! [`Event::Ticked`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::event::{Action, Directive, Event, Fence, Hello, Refusal, RunEvent, SessionId};
use crate::ids::Generation;
use crate::membership::{MAX_WORKERS, Membership, Worker};
use crate::names;
use crate::record::RunStatus;
use crate::run::{Attempt, Run, Stage};
use crate::time::Timestamp;

/// The clock may be so late for a deadline before the coordinator counts as having slept itself.
const OVERSLEPT_MS: u64 = 1_000;

/// What the cluster is told at start.
#[derive(Debug, Clone)]
pub struct Options {
    /// A worker that is silent for so long is lost. Ten times the interval of its heartbeats.
    pub heartbeat_timeout_ms: u64,
    /// After a survivor reported a broken link: wait so long for news of the culprit.
    pub peer_lost_grace_ms: u64,
    /// A member whose step and phase do not change for so long is stuck. Loading shards from a distant
    /// store takes minutes, a step on a slow machine tens of seconds.
    pub progress_timeout_ms: u64,
    /// URL of the store, under which the runs lie.
    pub store_url: String,
    /// Software version, for manifests.
    pub version: String,
}

impl Options {
    /// The usual times on the given store.
    #[must_use]
    pub fn new(store_url: impl Into<String>, version: impl Into<String>) -> Self {
        Self {
            heartbeat_timeout_ms: 5_000,
            peer_lost_grace_ms: 2_000,
            progress_timeout_ms: 600_000,
            store_url: store_url.into(),
            version: version.into(),
        }
    }
}

/// Workers, runs and the queue. One owner applies events; everything else reads views.
#[derive(Debug)]
pub struct Cluster {
    pub(crate) options: Options,
    pub(crate) now: Timestamp,
    pub(crate) members: Membership,
    pub(crate) runs: BTreeMap<String, Run>,
    /// Names that stand in the store and cannot be read.
    pub(crate) reserved: BTreeSet<String>,
    /// Runs that wait, the next first.
    pub(crate) queue: VecDeque<String>,
    /// The run that workers are busy with.
    pub(crate) active: Option<String>,
    /// Nothing new is begun.
    pub(crate) shut_down: bool,
    pub(crate) out: Vec<Action>,
    pub(crate) changed: BTreeSet<String>,
}

impl Cluster {
    /// An empty cluster.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            now: Timestamp::default(),
            members: Membership::default(),
            runs: BTreeMap::new(),
            reserved: BTreeSet::new(),
            queue: VecDeque::new(),
            active: None,
            shut_down: false,
            out: Vec::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Takes in what happened and returns what to do, in order.
    pub fn apply(&mut self, now: Timestamp, event: Event) -> Vec<Action> {
        let promised = self.next_deadline();
        self.now = self.now.max(now);
        if matches!(event, Event::Ticked) && promised.is_some_and(|at| self.now.since_ms(at) > OVERSLEPT_MS) {
            self.forgive_silence();
        }
        self.dispatch(event);
        self.expire();
        self.schedule();
        let changed = std::mem::take(&mut self.changed);
        self.out.extend(changed.into_iter().map(|run| Action::PublishRun { run }));
        std::mem::take(&mut self.out)
    }

    /// When [`Event::Ticked`] is due, if nothing else happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let silence = |worker: &Worker| worker.heard.plus_ms(self.options.heartbeat_timeout_ms + 1);
        let silent = self.members.iter().map(|(_, worker)| silence(worker)).min();
        let attempt = self.active_run().and_then(|run| run.attempt.as_ref());
        let suspicion = attempt.and_then(|attempt| self.suspicion_deadline(attempt));
        let stuck = attempt.and_then(|attempt| self.stuck_members(attempt).map(|(_, at)| at).min());
        [silent, suspicion, stuck].into_iter().flatten().min()
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(session) = session_of(&event) {
            match self.members.get_mut(session) {
                Some(worker) => worker.heard = self.now,
                // The rest of a session that the core has closed.
                None => return,
            }
        }
        match event {
            Event::WorkerConnected { session, hello } => self.on_connected(session, hello),
            Event::HeartbeatReceived { session, progress } => self.on_heartbeat(session, progress),
            Event::MemberPrepared { session, fence } => self.on_prepared(session, &fence),
            Event::StepReported { session, report } => self.on_step(session, report),
            Event::TileReceived { session, tile } => self.on_tile(session, tile),
            Event::CheckpointUploaded { session, upload } => self.on_upload(session, upload),
            Event::MemberEnded { session, end } => self.on_member_ended(session, end),
            Event::MemberFailed { session, failure } => self.on_member_failed(session, failure),
            Event::WorkerLeft { session, reason } => {
                self.lose(session, &format!("it left ({reason})"));
                self.out.push(Action::CloseSession { session, reason: "it said goodbye".to_owned() });
            }
            Event::SessionEnded { session, reason } => self.lose(session, &reason),
            Event::RunSubmitted { request, submission } => self.on_submitted(request, submission),
            Event::StopRequested { request, run } => self.on_stop(request, &run),
            Event::ResumeRequested { request, run, dataset } => self.on_resume(request, &run, &dataset),
            Event::RunRecovered { record, checkpoint } => self.on_recovered(*record, checkpoint),
            Event::NameReserved { run } => {
                self.reserved.insert(run);
            }
            Event::RunSaved { fence, outcome } => self.on_saved(&fence, outcome),
            Event::CheckpointSettled { fence, mark, outcome } => {
                self.on_checkpoint_settled(&fence, mark, outcome)
            }
            Event::GridSettled { fence, kind, step, outcome } => {
                self.on_grid_settled(&fence, kind, step, outcome)
            }
            Event::RunFlushed { fence, outcome } => self.on_flushed(&fence, outcome),
            Event::StoreFailed { run, message } => self.on_store_failed(&run, &message),
            Event::ShutDown => self.on_shut_down(),
            Event::Ticked => {}
        }
    }

    fn on_connected(&mut self, session: SessionId, hello: Hello) {
        let wish = &hello.requested_name;
        if !wish.is_empty()
            && let Err(error) = names::check("worker name", wish)
        {
            let refusal = Refusal::Invalid(error.to_string());
            return self.out.push(Action::RefuseWorker { session, refusal });
        }
        if let Some(older) = self.members.session_of_process(&hello.process_id) {
            self.lose(older, "it connected anew");
            self.out.push(Action::CloseSession {
                session: older,
                reason: "the worker connected anew".to_owned(),
            });
        }
        if self.members.len() >= MAX_WORKERS {
            let refusal =
                Refusal::Exhausted(format!("{MAX_WORKERS} workers are connected, and more are not taken"));
            return self.out.push(Action::RefuseWorker { session, refusal });
        }
        let name = self.members.join(self.now, session, hello);
        self.out.push(Action::WelcomeWorker { session, name });
        self.queue_changed();
    }

    fn on_shut_down(&mut self) {
        self.shut_down = true;
        let Some(run) = self.active_run() else { return };
        let (name, step) = (run.record.name.clone(), run.record.step);
        self.fail(&name, &format!("the coordinator was shut down at step {step}"));
    }

    /// Takes a worker out; a run that it had not finished has failed.
    pub(crate) fn lose(&mut self, session: SessionId, how: &str) {
        let Some(worker) = self.members.remove(self.now, session) else { return };
        self.queue_changed();
        let Some(fence) = worker.assigned.clone() else { return };
        let Some(run) = self.runs.get(&fence.run) else { return };
        let Some(attempt) = &run.attempt else { return };
        let Some(rank) = attempt.rank_of(session) else { return };
        if attempt.members[rank].ended.is_some() {
            let message = format!("{} went after its part was done: {how}", worker.name);
            return self.record(&fence.run, "worker_left", &worker.name, message);
        }
        let step = worker.progress.as_ref().map_or(0, |progress| progress.step).max(run.record.step);
        let cause = format!("{} was lost at step {step}: {how}", worker.introduction());
        self.record(&fence.run, "worker_lost", &worker.name, cause.clone());
        self.fail(&fence.run, &cause);
    }

    /// Ends an active run by a failure: the members drop it, the cause is kept with its remedy.
    pub(crate) fn fail(&mut self, name: &str, cause: &str) {
        self.release_members(name, Some(cause));
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.elapsed_ms = run.elapsed_ms(now);
        run.attempt = None;
        run.record.status = RunStatus::Failed;
        run.record.error = format!("{cause}; {}", remedy(run));
        let message = run.record.error.clone();
        self.close(name, "failed", message);
    }

    /// Records how a run ended, saves it and lets go of its files.
    pub(crate) fn close(&mut self, name: &str, kind: &'static str, message: String) {
        if self.active.as_deref() == Some(name) {
            self.active = None;
        }
        self.record(name, kind, "", message);
        self.save(name, false);
        self.out.push(Action::CloseRun { run: name.to_owned() });
        self.queue_changed();
    }

    /// Frees the members of a run; with a cause, those that were told of the run are told to drop it.
    pub(crate) fn release_members(&mut self, name: &str, abort: Option<&str>) {
        let Some(run) = self.runs.get(name) else { return };
        let fence = run.fence();
        let Some(attempt) = &run.attempt else { return };
        for member in &attempt.members {
            let Some(worker) = self.members.get_mut(member.session) else { continue };
            worker.assigned = None;
            if let Some(cause) = abort.filter(|_| attempt.stage != Stage::Saving && member.ended.is_none()) {
                let directive = Directive::Abort { fence: fence.clone(), message: cause.to_owned() };
                self.out.push(Action::Direct { session: member.session, directive });
            }
        }
    }

    /// Writes a line of the run's events.
    pub(crate) fn record(&mut self, name: &str, kind: &'static str, worker: &str, message: String) {
        let Some(run) = self.runs.get(name) else { return };
        let (generation, step) = (run.record.generation, run.record.step);
        let event = RunEvent { at: self.now, kind, worker: worker.to_owned(), generation, step, message };
        self.out.push(Action::RecordEvent { run: name.to_owned(), event });
        self.changed.insert(name.to_owned());
    }

    /// Saves a run's record.
    pub(crate) fn save(&mut self, name: &str, acknowledge: bool) {
        let now = self.now;
        let Some(run) = self.runs.get(name) else { return };
        let mut record = run.record.clone();
        record.elapsed_ms = run.elapsed_ms(now);
        self.out.push(Action::SaveRun { record: Box::new(record), first: false, acknowledge });
        self.changed.insert(name.to_owned());
    }

    /// What the runs in the queue wait for has changed.
    pub(crate) fn queue_changed(&mut self) {
        self.changed.extend(self.queue.iter().cloned());
    }

    pub(crate) fn active_run(&self) -> Option<&Run> {
        self.active.as_ref().and_then(|name| self.runs.get(name))
    }

    /// The attempt and rank that a member's message belongs to; otherwise the message is refused.
    pub(crate) fn fenced(
        &mut self,
        what: &'static str,
        session: SessionId,
        fence: &Fence,
    ) -> Option<(&mut Run, usize)> {
        let valid = self.runs.get(&fence.run).is_some_and(|run| {
            run.record.generation == fence.generation
                && run.attempt.as_ref().is_some_and(|attempt| attempt.rank_of(session).is_some())
        });
        if !valid {
            self.out.push(Action::RefuseStale { session, what, fence: fence.clone() });
            return None;
        }
        let run = self.runs.get_mut(&fence.run)?;
        let rank = run.attempt.as_ref()?.rank_of(session)?;
        Some((run, rank))
    }

    /// The coordinator itself was asleep (a suspended machine): silence in that time proves nothing.
    fn forgive_silence(&mut self) {
        let sessions: Vec<SessionId> = self.members.iter().map(|(session, _)| session).collect();
        for session in sessions {
            if let Some(worker) = self.members.get_mut(session) {
                worker.heard = self.now;
            }
        }
    }

    fn expire(&mut self) {
        self.members.prune(self.now);
        let timeout_ms = self.options.heartbeat_timeout_ms;
        let now = self.now;
        let silent: Vec<(SessionId, u64)> = self
            .members
            .iter()
            .map(|(session, worker)| (session, now.since_ms(worker.heard)))
            .filter(|&(_, silence_ms)| silence_ms > timeout_ms)
            .collect();
        for (session, silence_ms) in silent {
            let how = format!("it sent no heartbeat for {:.1} s", silence_ms as f64 / 1000.0);
            self.lose(session, &how);
            self.out.push(Action::CloseSession { session, reason: how });
        }
        self.expire_suspicion();
        self.expire_progress();
    }

    fn expire_suspicion(&mut self) {
        let Some(run) = self.active_run() else { return };
        let Some(attempt) = &run.attempt else { return };
        let Some(suspicion) = attempt.suspicion.clone() else { return };
        if self.suspicion_deadline(attempt).is_none_or(|at| self.now < at) {
            return;
        }
        let reporter = &attempt.members[suspicion.reporter].introduction;
        let step = suspicion.step;
        let cause = match suspicion.suspect.and_then(|rank| attempt.members.get(rank)) {
            Some(suspect) => format!(
                "the link between {reporter} and {} broke at step {step}, while both are connected to the \
                 coordinator: {}",
                suspect.introduction, suspicion.message
            ),
            None => format!("{reporter} lost a peer at step {step}: {}", suspicion.message),
        };
        let name = run.record.name.clone();
        self.fail(&name, &cause);
    }

    /// When a broken link counts as the link's own fault. A suspect that is silent just now gets its whole
    /// heartbeat timeout: then it is the culprit.
    fn suspicion_deadline(&self, attempt: &Attempt) -> Option<Timestamp> {
        let suspicion = attempt.suspicion.as_ref()?;
        let grace = suspicion.since.plus_ms(self.options.peer_lost_grace_ms);
        let suspect = suspicion.suspect.and_then(|rank| attempt.members.get(rank));
        let Some(worker) = suspect.and_then(|member| self.members.get(member.session)) else {
            return Some(grace);
        };
        if worker.heard > suspicion.since {
            return Some(grace);
        }
        Some(grace.max(worker.heard.plus_ms(self.options.heartbeat_timeout_ms + 2)))
    }

    /// Members that somebody waits for, each with the time at which it counts as stuck.
    fn stuck_members<'a>(&'a self, attempt: &'a Attempt) -> impl Iterator<Item = (&'a str, Timestamp)> + 'a {
        let waits = move |member: &&crate::run::Member| match attempt.stage {
            Stage::Preparing => !member.prepared,
            Stage::Training => member.ended.is_none(),
            Stage::Saving | Stage::Flushing => false,
        };
        attempt.members.iter().filter(waits).filter_map(|member| {
            let worker = self.members.get(member.session)?;
            let at = worker.progressed.plus_ms(self.options.progress_timeout_ms + 1);
            Some((member.introduction.as_str(), at))
        })
    }

    fn expire_progress(&mut self) {
        let Some(run) = self.active_run() else { return };
        let Some(attempt) = &run.attempt else { return };
        let now = self.now;
        let stuck: Vec<&str> =
            self.stuck_members(attempt).filter(|&(_, at)| at <= now).map(|(who, _)| who).collect();
        if stuck.is_empty() {
            return;
        }
        let seconds = self.options.progress_timeout_ms / 1000;
        let cause = format!(
            "{} made no progress for {seconds} s after step {}",
            stuck.join(" and "),
            run.record.step
        );
        let name = run.record.name.clone();
        self.fail(&name, &cause);
    }
}

fn remedy(run: &Run) -> String {
    match &run.record.checkpoint {
        Some(mark) => format!(
            "continue from the checkpoint of step {} with 'takuma run resume {}'",
            mark.step, run.record.name
        ),
        None => "no checkpoint was written yet: submit the run again".to_owned(),
    }
}

fn session_of(event: &Event) -> Option<SessionId> {
    match event {
        Event::HeartbeatReceived { session, .. }
        | Event::MemberPrepared { session, .. }
        | Event::StepReported { session, .. }
        | Event::TileReceived { session, .. }
        | Event::CheckpointUploaded { session, .. }
        | Event::MemberEnded { session, .. }
        | Event::MemberFailed { session, .. }
        | Event::WorkerLeft { session, .. }
        | Event::SessionEnded { session, .. } => Some(*session),
        _ => None,
    }
}

impl Run {
    /// What messages about the present group carry.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence { run: self.record.name.clone(), generation: self.record.generation }
    }

    /// The generation of the present group.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.record.generation
    }
}
