//! A run's life: from the queue to a group, through saving, preparing, training and flushing to its end.

use crate::cluster::Cluster;
use crate::event::{Action, Directive, Fence, MemberEnd, MemberFailure, Outcome, Peer, Prepare, SessionId};
use crate::ids::Step;
use crate::record::RunStatus;
use crate::run::{Attempt, Means, Member, Run, Stage, Suspicion};
use crate::slots::split_evenly;

impl Cluster {
    /// Gives the next run in the queue its workers, when no run is active and enough are idle.
    pub(crate) fn schedule(&mut self) {
        if self.active.is_some() || self.shut_down {
            return;
        }
        let Some(run) = self.queue.front().and_then(|name| self.runs.get(name)) else { return };
        let idle = self.members.idle();
        let wanted = run.record.config.workers.unwrap_or(1) as usize;
        if idle.len() < wanted || run.submitter.is_some() {
            return;
        }
        let most = run.record.config.workers.map_or(run.record.config.global_batch as usize, |n| n as usize);
        let group: Vec<SessionId> = idle.into_iter().take(most).collect();
        if let Some(name) = self.queue.pop_front() {
            self.form(&name, &group);
        }
        self.queue_changed();
    }

    /// Makes a group under a new generation. The members hear of it when the generation is saved.
    fn form(&mut self, name: &str, group: &[SessionId]) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.generation = run.record.generation.next();
        let fence = run.fence();
        let shares = split_evenly(run.record.config.global_batch, group.len() as u32);
        let mut members = Vec::with_capacity(group.len());
        for (&session, slots) in group.iter().zip(shares) {
            let Some(worker) = self.members.get_mut(session) else { continue };
            worker.assigned = Some(fence.clone());
            members.push(Member {
                session,
                name: worker.name.clone(),
                introduction: worker.introduction(),
                ring_address: worker.hello.ring_address.clone(),
                slots,
                prepared: false,
                ended: None,
            });
        }
        let shares: Vec<String> =
            members.iter().map(|member| format!("{} ({} slots)", member.name, member.slots.count)).collect();
        run.record.status = RunStatus::Preparing;
        run.record.workers = members.len() as u32;
        run.means = Means::default();
        run.attempt = Some(Attempt::new(self.now, members));
        self.active = Some(name.to_owned());
        self.record(name, "preparing", "", format!("load shards and state: {}", shares.join(", ")));
        self.save(name, true);
    }

    /// The first save answers the submitter; the save of a new generation lets its group prepare.
    pub(crate) fn on_saved(&mut self, fence: &Fence, outcome: Result<(), String>) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        if let Some(request) = run.submitter.take() {
            return self.on_submission_saved(&fence.run, request, outcome);
        }
        let waits = run.attempt.as_ref().is_some_and(|attempt| attempt.stage == Stage::Saving);
        if !waits || run.record.generation != fence.generation {
            return;
        }
        match outcome {
            Ok(()) => self.prepare(&fence.run),
            Err(error) => self.fail(&fence.run, &format!("the run's state could not be stored: {error}")),
        }
    }

    fn prepare(&mut self, name: &str) {
        let run_url = format!("{}/{}", self.options.store_url, crate::layout::run_folder(name));
        let Some(run) = self.runs.get_mut(name) else { return };
        let (start_step, resume) =
            run.record.checkpoint.as_ref().map_or((0, false), |mark| (mark.step, true));
        run.record.step = start_step;
        run.last = None;
        let fence = run.fence();
        let Some(attempt) = &mut run.attempt else { return };
        attempt.stage = Stage::Preparing;
        let members: Vec<Peer> = attempt
            .members
            .iter()
            .map(|member| Peer {
                worker: member.name.clone(),
                ring_address: member.ring_address.clone(),
                slots: member.slots,
            })
            .collect();
        self.out.push(Action::RewindMetrics { run: name.to_owned(), step: start_step });
        for (rank, member) in attempt.members.iter().enumerate() {
            if let Some(worker) = self.members.get_mut(member.session) {
                worker.progressed = self.now;
            }
            let prepare = Prepare {
                fence: fence.clone(),
                run_id: run.record.id.clone(),
                config: run.record.config.clone(),
                rank: rank as u32,
                members: members.clone(),
                run_url: run_url.clone(),
                start_step,
                resume,
                target_steps: run.record.target_steps,
            };
            let directive = Directive::Prepare(Box::new(prepare));
            self.out.push(Action::Direct { session: member.session, directive });
        }
        self.changed.insert(name.to_owned());
    }

    /// Starts the group when its last member is prepared.
    pub(crate) fn on_prepared(&mut self, session: SessionId, fence: &Fence) {
        let now = self.now;
        let Some((run, rank)) = self.fenced("Prepared", session, fence) else { return };
        let start_step = run.record.step;
        let Some(attempt) = &mut run.attempt else { return };
        if attempt.stage != Stage::Preparing {
            return;
        }
        attempt.members[rank].prepared = true;
        if !attempt.members.iter().all(|member| member.prepared) {
            return;
        }
        attempt.stage = Stage::Training;
        attempt.training_since = Some(now);
        attempt.reported = now;
        let sessions: Vec<SessionId> = attempt.members.iter().map(|member| member.session).collect();
        run.record.status = RunStatus::Running;
        for &session in &sessions {
            if let Some(worker) = self.members.get_mut(session) {
                worker.progressed = now;
            }
            self.out.push(Action::Direct { session, directive: Directive::Start(fence.clone()) });
        }
        let many = if sessions.len() == 1 {
            "1 worker trains".to_owned()
        } else {
            format!("{} workers train", sessions.len())
        };
        self.record(&fence.run, "started", "", format!("{many} from step {start_step}"));
        self.save(&fence.run, false);
    }

    /// Notes that a member is through; the last one ends the run.
    pub(crate) fn on_member_ended(&mut self, session: SessionId, end: MemberEnd) {
        let name = end.fence.run.clone();
        let Some((run, rank)) = self.fenced("RunEnded", session, &end.fence) else { return };
        let Some(attempt) = &mut run.attempt else { return };
        if attempt.stage != Stage::Training {
            return;
        }
        attempt.members[rank].ended = Some(end);
        self.try_flush(&name);
    }

    /// When all members are through and all their work is stored, the last files are written.
    pub(crate) fn try_flush(&mut self, name: &str) {
        let Some(run) = self.runs.get(name) else { return };
        let Some(attempt) = &run.attempt else { return };
        let through = attempt.stage == Stage::Training
            && attempt.members.iter().all(|member| member.ended.is_some())
            && attempt.committing.is_empty()
            && attempt.storing.is_empty();
        if !through {
            return;
        }
        if let Err(cause) = check_end(run) {
            return self.fail(name, &cause);
        }
        let fence = run.fence();
        for (step, _) in attempt.open_grids.keys().copied().collect::<Vec<_>>() {
            self.record(name, "sample_lost", "", format!("the grid of step {step} never became whole"));
        }
        self.release_members(name, None);
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.elapsed_ms = run.elapsed_ms(now);
        let Some(attempt) = &mut run.attempt else { return };
        attempt.training_since = None;
        attempt.stage = Stage::Flushing;
        self.out.push(Action::FlushRun { fence });
    }

    /// Everything is stored: the run has succeeded, or stopped as asked.
    pub(crate) fn on_flushed(&mut self, fence: &Fence, outcome: Result<(), String>) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let flushing = run.attempt.as_ref().is_some_and(|attempt| attempt.stage == Stage::Flushing);
        if !flushing || run.record.generation != fence.generation {
            return;
        }
        if let Err(error) = outcome {
            return self.fail(&fence.run, &format!("the run's results could not be stored: {error}"));
        }
        let Some(end) = run.attempt.take().and_then(|mut attempt| attempt.members.remove(0).ended) else {
            return;
        };
        let seconds = run.record.elapsed_ms as f64 / 1000.0;
        run.record.weights_sha256 = end.weights_sha256;
        let (status, kind, message) = if end.outcome == Outcome::Completed {
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

    /// A member failed by itself, or lost a peer: then news of the culprit is awaited for a moment.
    pub(crate) fn on_member_failed(&mut self, session: SessionId, failure: MemberFailure) {
        let now = self.now;
        let Some((run, rank)) = self.fenced("RunFailed", session, &failure.fence) else { return };
        let step = run.record.step.max(failure.step);
        let Some(attempt) = &mut run.attempt else { return };
        let member = &attempt.members[rank];
        let (name, introduction) = (member.name.clone(), member.introduction.clone());
        if failure.peer_lost {
            if attempt.suspicion.is_none() {
                let suspect =
                    failure.suspect_rank.map(|rank| rank as usize).filter(|&suspect| suspect != rank);
                let message = failure.message.clone();
                attempt.suspicion = Some(Suspicion { since: now, step, reporter: rank, suspect, message });
            }
            return self.record(&failure.fence.run, "link_lost", &name, failure.message);
        }
        let phase = if failure.phase.is_empty() { String::new() } else { format!(" ({})", failure.phase) };
        let cause = format!("{introduction} failed at step {step}{phase}: {}", failure.message);
        self.fail(&failure.fence.run, &cause);
    }

    /// Something of the run cannot be written.
    pub(crate) fn on_store_failed(&mut self, name: &str, message: &str) {
        let Some(run) = self.runs.get(name) else { return };
        if run.attempt.is_some() {
            self.fail(name, &format!("the run's files could not be stored: {message}"));
        }
    }
}

/// The members agree on the end, and its checkpoint exists.
fn check_end(run: &Run) -> Result<(), String> {
    let members = run.attempt.iter().flat_map(|attempt| &attempt.members);
    let ends: Vec<(&str, &MemberEnd)> =
        members.filter_map(|member| Some((member.introduction.as_str(), member.ended.as_ref()?))).collect();
    let Some((first_name, first)) = ends.first() else { return Ok(()) };
    for (name, end) in &ends {
        if (end.step, end.outcome) != (first.step, first.outcome) {
            return Err(format!(
                "{first_name} ended at step {}, but {name} at step {}",
                first.step, end.step
            ));
        }
    }
    let due: Step = if first.outcome == Outcome::Completed { run.record.target_steps } else { first.step };
    if first.step != due || run.record.step != first.step {
        let reported = run.record.step;
        return Err(format!(
            "the members ended at step {}, but step {reported} was reported last",
            first.step
        ));
    }
    let checkpointed = run.record.checkpoint.as_ref().is_some_and(|mark| mark.step == first.step);
    if first.step > 0 && !checkpointed {
        return Err(format!("the members ended at step {} without a checkpoint of it", first.step));
    }
    Ok(())
}
