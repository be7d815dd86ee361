//! [`Cluster`]: the coordinator's whole state and its one function.
//!
//! The caller's duties, in order: carry out the actions of [`Cluster::apply`] in their order; report what
//! they ask to have reported; when [`Cluster::next_deadline`] has passed without another event, apply
//! [`Event::Ticked`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::event::{Action, Directive, Event, Fence, Hello, Refusal, RunEvent, SessionId};
use crate::losses::Loss;
use crate::membership::{MAX_WORKERS, Membership};
use crate::names;
use crate::record::RunStatus;
use crate::run::{Group, Member, Run, Stage};
use crate::time::Timestamp;

/// The clock may be so late for a deadline before the coordinator counts as having slept itself.
const OVERSLEPT_MS: u64 = 1_000;

/// What the cluster is told at start.
#[derive(Debug, Clone)]
pub struct Options {
    /// A worker that is silent for so long is lost. Ten times the interval of its heartbeats.
    pub heartbeat_timeout_ms: u64,
    /// When its peers report a broken link, a member that is silent for so long is the culprit.
    pub silence_ms: u64,
    /// After a report of a broken link: wait so long for news of the culprit.
    pub link_grace_ms: u64,
    /// A member whose session broke may come back within so long, as long as its peers do not miss it.
    pub reconnect_grace_ms: u64,
    /// After a restart: members of the group that was at work may come back within so long.
    pub reunion_ms: u64,
    /// A worker to which links broke twice gets no work for so long.
    pub rest_ms: u64,
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
            silence_ms: 1_200,
            link_grace_ms: 400,
            reconnect_grace_ms: 1_500,
            // Workers come back with pauses of up to ten seconds after a long outage.
            reunion_ms: 15_000,
            rest_ms: 10_000,
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
    /// Nothing is due before it. Heartbeats may have put it off.
    deadline: Option<Timestamp>,
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
            deadline: None,
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
        self.now = self.now.max(now);
        if matches!(event, Event::Ticked)
            && self.deadline.is_some_and(|at| self.now.since_ms(at) > OVERSLEPT_MS)
        {
            self.forgive_silence();
        }
        let changes_nothing = self.changes_nothing(&event);
        self.dispatch(event);
        let unbalanced = self.active_run().is_some_and(|run| run.speeds_changed);
        if !changes_nothing || unbalanced {
            self.expire();
            self.schedule();
            self.deadline = self.find_deadline();
        }
        let changed = std::mem::take(&mut self.changed);
        self.out.extend(changed.into_iter().map(|run| Action::PublishRun { run }));
        std::mem::take(&mut self.out)
    }

    /// When [`Event::Ticked`] is due, if nothing else happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.deadline
    }

    /// Whether an event only tells that a worker lives that nobody has missed: most events of a large cluster do. Then
    /// nothing new is due, and nobody new can be given work.
    fn changes_nothing(&self, event: &Event) -> bool {
        let Event::HeartbeatReceived { session, .. } = event else { return false };
        let missed = self.members.get(*session).is_some_and(|worker| {
            worker.assigned.is_none() && self.now.since_ms(worker.heard()) > self.lately_ms()
        });
        let group = self.active_run().and_then(|run| run.group.as_ref());
        let suspects = group.is_some_and(|group| group.suspicion.is_some());
        !missed && !suspects && self.deadline.is_none_or(|at| at > self.now)
    }

    fn find_deadline(&self) -> Option<Timestamp> {
        let silent = self.members.longest_silent();
        let silent = silent.map(|heard| heard.plus_ms(self.options.heartbeat_timeout_ms + 1));
        let rested = self.members.next_rested(self.now);
        let run = self.active_run();
        let reunion = run.and_then(|run| run.reunion.as_ref()).map(|reunion| reunion.until);
        let group = run.and_then(|run| run.group.as_ref());
        let suspicion = group.and_then(|group| group.suspicion.as_ref()).map(|suspicion| suspicion.until);
        // Nothing is decided while the next group waits for the store.
        let settles = run.is_some_and(|run| run.regroup_when_saved.is_none());
        let suspicion = suspicion.filter(|_| settles);
        let away = run.and_then(|run| self.return_deadline(run)).filter(|_| settles);
        let stuck = group.and_then(|group| self.stuck_members(group).map(|(_, at)| at).min());
        let change = run.and_then(|run| self.change_deadline(run));
        [silent, rested, reunion, suspicion, away, stuck, change].into_iter().flatten().min()
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(session) = session_of(&event) {
            // The rest of a session that the core has closed.
            if !self.members.note_sign(self.now, session) {
                return;
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
            Event::GroupFormed { session, formed } => self.on_formed(session, &formed),
            Event::WorkerLeaves { session, reason, at_once } => self.on_leaving(session, &reason, at_once),
            Event::SessionEnded { session, reason } => self.lose(session, &reason, Loss::MayReturn),
            Event::RunSubmitted { request, submission } => self.on_submitted(request, submission),
            Event::StopRequested { request, run } => self.on_stop(request, &run),
            Event::ResumeRequested { request, run, dataset } => self.on_resume(request, &run, &dataset),
            Event::DrainRequested { request, worker } => self.on_drain(request, &worker),
            Event::RunRecovered { record, checkpoint, stored } => {
                self.on_recovered(*record, checkpoint, stored);
            }
            Event::NameReserved { run } => {
                self.reserved.insert(run);
            }
            Event::RunSaved { fence, reserved, outcome } => self.on_saved(&fence, reserved, outcome),
            Event::MetricsStored { run, step, lineage } => self.on_metrics_stored(&run, step, lineage),
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
            // Without a claim it has given its place up.
            let loss = if hello.membership.is_some() { Loss::MayReturn } else { Loss::ForGood };
            self.lose(older, "it connected anew", loss);
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
        let claim = hello.membership.clone();
        let name = self.members.join(self.now, session, hello);
        self.out.push(Action::WelcomeWorker { session, name });
        if let Some(claim) = claim {
            self.take_back(session, claim);
        }
        self.queue_changed();
    }

    /// Workers train on without a coordinator; the next one finds them by the run's record.
    fn on_shut_down(&mut self) {
        self.shut_down = true;
        let Some(name) = self.active.clone() else { return };
        let message = "the coordinator was shut down; workers train on, and the next coordinator takes over";
        self.record(&name, "coordinator_left", "", message.to_owned());
        self.save(&name, false);
    }

    /// Ends an active run by a failure: the members drop it, the cause is kept with its remedy.
    pub(crate) fn fail(&mut self, name: &str, cause: &str) {
        let remedy = self.runs.get(name).map_or_else(String::new, remedy);
        self.fail_for(name, cause, &remedy);
    }

    /// The same with a remedy of its own.
    pub(crate) fn fail_for(&mut self, name: &str, cause: &str, remedy: &str) {
        self.release_members(name, Some(cause));
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.stop_clock(now);
        run.group = None;
        run.reunion = None;
        run.record.status = RunStatus::Failed;
        run.record.error = format!("{cause}; {remedy}");
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

    /// Frees the members of a run and of its next group; with a cause, they are told to drop it, otherwise
    /// that it is over. While they change over, each may be in either group, so it is told for both.
    pub(crate) fn release_members(&mut self, name: &str, abort: Option<&str>) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.regroup_when_saved = None;
        let (present, next) = (run.fences(), run.change_fence());
        let mut told: BTreeMap<SessionId, Vec<Fence>> = BTreeMap::new();
        for member in run.group.iter().flat_map(|group| &group.members) {
            let fences = told.entry(member.session).or_default();
            if run.group.as_ref().is_some_and(|group| group.stage != Stage::Saving) {
                fences.extend(present.iter().cloned());
            }
        }
        if let Some((change, next)) = run.change.take().zip(next) {
            for member in &change.members {
                let fences = told.entry(member.session).or_default();
                if change.started || fences.is_empty() {
                    fences.push(next.clone());
                }
            }
        }
        for (&session, claim) in run.reunion.iter().flat_map(|reunion| &reunion.claims) {
            told.entry(session).or_default().push(claim.fence.clone());
        }
        for (session, fences) in told {
            let Some(worker) = self.members.get_mut(session) else { continue };
            if worker.assigned.take().is_none() {
                continue;
            }
            for fence in fences {
                let directive = match abort {
                    Some(cause) => Directive::Abort { fence, message: cause.to_owned() },
                    None => Directive::Release(fence),
                };
                self.direct(session, directive);
            }
            self.say_farewell(session);
        }
        self.queue_changed();
    }

    /// Tells a worker, if it is connected: one that is away is told when it comes back.
    pub(crate) fn direct(&mut self, session: SessionId, directive: Directive) {
        if self.members.get(session).is_some() {
            self.out.push(Action::Direct { session, directive });
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

    /// The run and rank that a member's message belongs to; otherwise the message is refused. The first
    /// message of a group that was told to take over means that it has.
    pub(crate) fn fenced(
        &mut self,
        what: &'static str,
        session: SessionId,
        fence: &Fence,
    ) -> Option<(&mut Run, usize)> {
        let takes_over =
            self.runs.get(&fence.run).and_then(|run| run.change.as_ref()).is_some_and(|change| {
                change.started && change.generation == fence.generation && change.rank_of(session).is_some()
            });
        if takes_over {
            self.take_over(&fence.run);
        }
        let valid = self.runs.get(&fence.run).is_some_and(|run| {
            run.record.generation == fence.generation
                && run.group.as_ref().is_some_and(|group| group.rank_of(session).is_some())
        });
        if !valid {
            self.out.push(Action::RefuseStale { session, what, fence: fence.clone() });
            return None;
        }
        let run = self.runs.get_mut(&fence.run)?;
        let rank = run.group.as_ref()?.rank_of(session)?;
        Some((run, rank))
    }

    /// The run that a result belongs to. Results of a step do not depend on the group, so those of former
    /// groups count as well, unless the run has gone back to a checkpoint since.
    pub(crate) fn same_past(
        &mut self,
        what: &'static str,
        session: SessionId,
        fence: &Fence,
    ) -> Option<&mut Run> {
        let valid = self.runs.get(&fence.run).is_some_and(|run| {
            let newest = run.change.as_ref().map_or(run.record.generation, |change| change.generation);
            run.group.as_ref().is_some_and(Group::has_state)
                && (run.record.lineage..=newest).contains(&fence.generation)
        });
        if !valid {
            self.out.push(Action::RefuseStale { session, what, fence: fence.clone() });
            return None;
        }
        self.runs.get_mut(&fence.run)
    }

    /// The coordinator itself was asleep (a suspended machine): silence in that time proves nothing.
    fn forgive_silence(&mut self) {
        let sessions: Vec<SessionId> = self.members.iter().map(|(session, _)| session).collect();
        for session in sessions {
            self.members.note_sign(self.now, session);
        }
    }

    fn expire(&mut self) {
        self.members.prune(self.now);
        for (session, silence_ms) in self.members.silent(self.now, self.options.heartbeat_timeout_ms) {
            let how = format!("it sent no heartbeat for {:.1} s", silence_ms as f64 / 1000.0);
            self.lose(session, &how, Loss::ForGood);
            self.out.push(Action::CloseSession { session, reason: how });
        }
        if let Some(name) = self.active.clone() {
            self.expire_reunion(&name);
            self.settle_losses(&name);
            self.expire_change(&name);
        }
        if self.deadline.is_some_and(|at| at <= self.now) {
            self.expire_progress();
        }
    }

    /// Members that somebody waits for, each with the time at which it counts as stuck.
    fn stuck_members<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = (&'a str, Timestamp)> + 'a {
        // When all are through, their last results are still to come.
        let through = group.members.iter().all(|member| member.ended.is_some());
        let waits = move |member: &&Member| match group.stage {
            Stage::Preparing => !member.prepared,
            Stage::Forming | Stage::Training => through || member.ended.is_none(),
            Stage::Saving | Stage::Flushing => false,
        };
        group.members.iter().filter(waits).filter_map(|member| {
            let worker = self.members.get(member.session)?;
            let at = worker.progressed.plus_ms(self.options.progress_timeout_ms + 1);
            Some((member.introduction.as_str(), at))
        })
    }

    fn expire_progress(&mut self) {
        let Some(run) = self.active_run() else { return };
        let Some(group) = &run.group else { return };
        let now = self.now;
        let stuck: Vec<&str> =
            self.stuck_members(group).filter(|&(_, at)| at <= now).map(|(who, _)| who).collect();
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
        | Event::GroupFormed { session, .. }
        | Event::WorkerLeaves { session, .. }
        | Event::SessionEnded { session, .. } => Some(*session),
        _ => None,
    }
}
