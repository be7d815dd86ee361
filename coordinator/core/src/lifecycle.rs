//! A run's life: from the queue to a group, through saving, preparing, training and flushing to its end.

use crate::cluster::Cluster;
use crate::event::{Action, Directive, Fence, MemberEnd, Outcome, SessionId, When};
use crate::ids::{Generation, Step};
use crate::record::RunStatus;
use crate::run::{Group, Means, Run, Stage};

impl Cluster {
    /// Gives the next run in the queue its workers, when no run is active and enough are idle; an active one
    /// takes in who is idle.
    pub(crate) fn schedule(&mut self) {
        if self.shut_down {
            return;
        }
        if self.active.is_some() {
            return self.plan_change();
        }
        let Some(run) = self.queue.front().and_then(|name| self.runs.get(name)) else { return };
        let name = run.record.name.clone();
        let config = &run.record.config;
        // A run that waits goes on with whoever comes first; the others join it.
        let waits = run.record.status == RunStatus::Waiting;
        let wanted = config.workers.filter(|_| !waits).unwrap_or(1) as usize;
        let most = config.most_workers() as usize;
        let group: Vec<SessionId> =
            self.idle().filter(|&session| self.is_fit(session, &name)).take(most).collect();
        if group.len() < wanted || run.submitter.is_some() {
            return;
        }
        self.queue.pop_front();
        self.form(&name, &group);
        self.queue_changed();
    }

    /// Makes a first group under a new generation. The members hear of it when the generation is saved.
    fn form(&mut self, name: &str, sessions: &[SessionId]) {
        let Some(run) = self.runs.get_mut(name) else { return };
        // The save below reserves what it gives out.
        run.reserved = run.reserved.max(run.record.generation.max(run.floor).next());
        self.active = Some(name.to_owned());
        let Some(generation) = self.next_generation(name) else { return };
        let members = self.members_for(name, sessions, generation);
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.generation = generation;
        run.record.lineage = generation;
        run.record.status = RunStatus::Preparing;
        run.record.workers = members.len() as u32;
        run.means = Means::default();
        run.group = Some(Group::new(now, Stage::Saving, members));
        let message = format!("load shards and state: {}", self.shares(name));
        self.record(name, "preparing", "", message);
        self.save(name, true);
    }

    /// The first save answers the submitter; the save of a new generation lets its group prepare.
    pub(crate) fn on_saved(&mut self, fence: &Fence, reserved: Generation, outcome: Result<(), String>) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        if let Some(request) = run.submitter.take() {
            return self.on_submission_saved(&fence.run, request, outcome);
        }
        if outcome.is_ok() {
            run.reserved = run.reserved.max(reserved);
        } else {
            // What the store did not take is asked for again when it is needed. The record keeps the number: a later
            // write that succeeds must not take back what an earlier one was confirmed for.
            run.reserve_again = true;
        }
        if let Some(cause) = run.regroup_when_saved.take() {
            return match outcome {
                Ok(()) => self.form_anew(&fence.run, &cause),
                Err(error) => {
                    self.fail(&fence.run, &format!("{cause}; no new group could be formed: {error}"))
                }
            };
        }
        let waits = run.group.as_ref().is_some_and(|group| group.stage == Stage::Saving);
        if !waits || run.record.generation != fence.generation {
            return;
        }
        match outcome {
            Ok(()) => self.prepare(&fence.run),
            Err(error) => self.fail(&fence.run, &format!("the run's state could not be stored: {error}")),
        }
    }

    fn prepare(&mut self, name: &str) {
        let Some(run) = self.runs.get_mut(name) else { return };
        let (step, state) = run.beginning();
        run.record.step = step;
        run.last = None;
        run.results.rewind(step);
        if let Some(group) = &mut run.group {
            group.stage = Stage::Preparing;
        }
        let lineage = run.record.lineage;
        self.out.push(Action::RewindMetrics { run: name.to_owned(), step, lineage });
        self.tell_prepare(name, state, When::Now);
        self.changed.insert(name.to_owned());
    }

    /// Starts a first group when its last member is prepared.
    pub(crate) fn on_prepared(&mut self, session: SessionId, fence: &Fence) {
        let changes = self.runs.get(&fence.run).and_then(|run| run.change.as_ref());
        if changes.is_some_and(|change| change.generation == fence.generation) {
            return self.on_change_prepared(session, fence);
        }
        let now = self.now;
        let Some((run, rank)) = self.fenced("Prepared", session, fence) else { return };
        let start_step = run.record.step;
        let Some(group) = &mut run.group else { return };
        group.members[rank].prepared = true;
        if group.stage != Stage::Preparing || !group.members.iter().all(|member| member.prepared) {
            return;
        }
        group.stage = Stage::Training;
        group.reported = now;
        group.members.iter_mut().for_each(|member| member.has_state = true);
        let sessions: Vec<SessionId> = group.members.iter().map(|member| member.session).collect();
        run.training_since = Some(now);
        run.record.status = RunStatus::Running;
        for &session in &sessions {
            if let Some(worker) = self.members.get_mut(session) {
                worker.progressed = now;
            }
            self.direct(session, Directive::Start(fence.clone()));
            self.tell_kept(session, &fence.run, false);
        }
        let many = if sessions.len() == 1 {
            "1 worker trains".to_owned()
        } else {
            format!("{} workers train", sessions.len())
        };
        self.record(&fence.run, "started", "", format!("{many} from step {start_step}"));
        self.save(&fence.run, false);
    }

    /// All workers of a run leave: they write a checkpoint first, then the run waits for another one.
    pub(crate) fn pause(&mut self, name: &str) {
        let message = "all workers leave: they end the step and write a checkpoint first";
        self.record(name, "pausing", "", message.to_owned());
        let Some(run) = self.runs.get_mut(name) else { return };
        run.pausing = true;
        let fence = run.fence();
        let sessions: Vec<SessionId> =
            run.group.iter().flat_map(|group| &group.members).map(|member| member.session).collect();
        for session in sessions {
            self.direct(session, Directive::Stop(fence.clone()));
        }
    }

    /// Notes that a member is through; the last one ends the run.
    pub(crate) fn on_member_ended(&mut self, session: SessionId, end: MemberEnd) {
        let name = end.fence.run.clone();
        let Some((run, rank)) = self.fenced("RunEnded", session, &end.fence) else { return };
        let Some(group) = &mut run.group else { return };
        if !matches!(group.stage, Stage::Training | Stage::Forming) {
            return;
        }
        group.members[rank].ended = Some(end);
        self.try_flush(&name);
    }

    /// When all members are through and all their work is stored, the last files are written.
    pub(crate) fn try_flush(&mut self, name: &str) {
        let Some(run) = self.runs.get(name) else { return };
        let Some(group) = &run.group else { return };
        let through = matches!(group.stage, Stage::Training | Stage::Forming)
            && group.members.iter().all(|member| member.ended.is_some())
            && run.results.committing.is_empty()
            && run.results.storing.is_empty();
        if !through {
            return;
        }
        match check_end(run) {
            Ok(true) => {}
            // After an absence of the coordinator, results may come behind the news of the end.
            Ok(false) => return,
            Err(cause) => return self.fail(name, &cause),
        }
        let fence = run.fence();
        for (step, _) in run.results.open_grids.keys().copied().collect::<Vec<_>>() {
            self.record(name, "sample_lost", "", format!("the grid of step {step} never became whole"));
        }
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.stop_clock(now);
        if let Some(group) = &mut run.group {
            group.stage = Stage::Flushing;
            group.suspicion = None;
        }
        self.out.push(Action::FlushRun { fence });
    }

    /// Everything is stored: the run has succeeded, or stopped as asked.
    pub(crate) fn on_flushed(&mut self, fence: &Fence, outcome: Result<(), String>) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let Some(group) = run.group.as_mut().filter(|group| group.stage == Stage::Flushing) else { return };
        if run.record.generation != fence.generation {
            return;
        }
        if let Err(error) = outcome {
            return self.fail(&fence.run, &format!("the run's results could not be stored: {error}"));
        }
        let Some(end) = group.members.first_mut().and_then(|member| member.ended.take()) else { return };
        let completed = end.outcome == Outcome::Completed;
        if run.pausing && !completed {
            return self.wait_for_workers(&fence.run, "the last worker left");
        }
        self.release_members(&fence.run, None);
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        run.group = None;
        let seconds = run.record.elapsed_ms as f64 / 1000.0;
        run.record.weights_sha256 = end.weights_sha256;
        let (status, kind, message) = if completed {
            (RunStatus::Succeeded, "succeeded", format!("all {} steps are done, in {seconds:.1} s", end.step))
        } else {
            let name = &fence.run;
            let message =
                format!("stopped after step {}; 'takuma run resume {name}' goes on from there", end.step);
            (RunStatus::Stopped, "stopped", message)
        };
        run.record.status = status;
        self.close(&fence.run, kind, message);
    }

    /// Something of the run cannot be written.
    pub(crate) fn on_store_failed(&mut self, name: &str, message: &str) {
        let Some(run) = self.runs.get(name) else { return };
        if run.group.is_some() {
            self.fail(name, &format!("the run's files could not be stored: {message}"));
        }
    }
}

/// Whether the metrics up to the end and its checkpoint are here. An error if the members do not agree on it.
fn check_end(run: &Run) -> Result<bool, String> {
    let members = run.group.iter().flat_map(|group| &group.members);
    let ends: Vec<(&str, &MemberEnd)> =
        members.filter_map(|member| Some((member.introduction.as_str(), member.ended.as_ref()?))).collect();
    let Some((first_name, first)) = ends.first() else { return Ok(false) };
    for (name, end) in &ends {
        if (end.step, end.outcome) != (first.step, first.outcome) {
            return Err(format!(
                "{first_name} ended at step {}, but {name} at step {}",
                first.step, end.step
            ));
        }
    }
    let due: Step = if first.outcome == Outcome::Completed { run.record.target_steps } else { first.step };
    if first.step != due || run.record.step > first.step {
        let reported = run.record.step;
        return Err(format!(
            "the members ended at step {}, but step {reported} was reported last",
            first.step
        ));
    }
    Ok(run.has_results_of(first.step))
}
