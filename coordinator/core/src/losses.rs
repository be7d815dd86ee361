//! Members that go: what it means for their group, and when it goes on without them.
//!
//! A dead process breaks its session and its links at once, a stopped one only falls silent, a cut link is
//! told by both of its ends. The group goes on as soon as one of these explanations fits.

use crate::cluster::Cluster;
use crate::event::{Action, Directive, FailureKind, Fence, MemberFailure, Refusal, RequestId, SessionId};
use crate::ids::Step;
use crate::membership::Leaving;
use crate::run::{Member, Run, Stage};
use crate::time::Timestamp;

/// Whether a worker that went may come back to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Only its session is known to be gone.
    MayReturn,
    /// It left, or was silent for too long.
    ForGood,
}

/// Survivors reported a broken link; the culprit is not known yet.
#[derive(Debug, Clone)]
pub struct Suspicion {
    /// When the decision is due.
    pub until: Timestamp,
    /// Finished steps when it was reported.
    pub step: Step,
    /// Introduction of the reporter.
    pub reporter: String,
    /// Rank of the peer behind the link.
    pub suspect: Option<usize>,
    /// The reporter's words.
    pub message: String,
}

/// Members that are away and that the group cannot do without, since when, and why. A member that is through
/// is not missed, unless its results are.
fn missed(run: &Run) -> impl Iterator<Item = (&Member, Timestamp, &str)> {
    let lacking = run.lacks_results();
    let members = run.group.iter().flat_map(|group| &group.members);
    members.filter(move |member| lacking || member.ended.is_none()).filter_map(|member| {
        let (since, how) = member.away.as_ref()?;
        Some((member, *since, how.as_str()))
    })
}

impl Cluster {
    /// Takes a worker out of the cluster, and out of its group when its place is not kept.
    pub(crate) fn lose(&mut self, session: SessionId, how: &str, loss: Loss) {
        let Some(worker) = self.members.remove(self.now, session) else { return };
        self.queue_changed();
        let Some(fence) = worker.assigned.clone() else { return };
        let name = fence.run;
        let now = self.now;
        let who = worker.introduction();
        let Some(run) = self.runs.get_mut(&name) else { return };
        if let Some(reunion) = &mut run.reunion {
            reunion.claims.remove(&session);
            return;
        }
        if run.change.as_ref().is_some_and(|change| change.rank_of(session).is_some()) {
            self.drop_change(&name);
        }
        let Some(run) = self.runs.get_mut(&name) else { return };
        let Some(group) = &mut run.group else { return };
        let Some(rank) = group.rank_of(session) else {
            let message = format!("{who} was lost before it joined: {how}");
            return self.record(&name, "worker_lost", &worker.name, message);
        };
        let member = &mut group.members[rank];
        match group.stage {
            Stage::Saving | Stage::Preparing => {
                self.requeue(&name, &format!("{who} was lost before the group was ready: {how}"));
            }
            Stage::Flushing => {}
            Stage::Forming | Stage::Training if member.ended.is_some() => {
                member.away = Some((now, how.to_owned()));
                let message = format!("{who} went after its part was done: {how}");
                self.record(&name, "worker_left", &worker.name, message);
            }
            Stage::Forming | Stage::Training => {
                member.away = Some((now, how.to_owned()));
                if loss == Loss::ForGood {
                    self.regroup(&name, &format!("{who} was lost: {how}"));
                } else {
                    self.settle_losses(&name);
                }
            }
        }
    }

    /// When the group goes on without a member that is away.
    pub(crate) fn return_deadline(&self, run: &Run) -> Option<Timestamp> {
        let waits = matches!(run.group.as_ref()?.stage, Stage::Forming | Stage::Training);
        let missed = missed(run).filter(|_| waits);
        missed.map(|(_, since, _)| since.plus_ms(self.options.reconnect_grace_ms)).min()
    }

    /// Goes on without members whose loss is certain, or whose time to come back is over.
    pub(crate) fn settle_losses(&mut self, name: &str) {
        let now = self.now;
        let Some(run) = self.runs.get(name).filter(|run| run.regroup_when_saved.is_none()) else { return };
        let Some(group) = &run.group else { return };
        if !matches!(group.stage, Stage::Forming | Stage::Training) {
            return;
        }
        let broken = group.members.iter().any(|member| member.parked);
        let overdue = self.return_deadline(run).is_some_and(|at| at <= now);
        let cause =
            missed(run).next().map(|(member, _, how)| format!("{} was lost: {how}", member.introduction));
        if let Some(cause) = cause.filter(|_| broken || overdue) {
            return self.regroup(name, &cause);
        }
        let suspicion = self.runs.get(name).and_then(|run| run.group.as_ref()?.suspicion.clone());
        if let Some(suspicion) = suspicion {
            self.settle_suspicion(name, &suspicion);
        }
    }

    fn settle_suspicion(&mut self, name: &str, suspicion: &Suspicion) {
        let Some(run) = self.runs.get(name) else { return };
        let Some(group) = &run.group else { return };
        let now = self.now;
        let silent = |member: &&Member| {
            let worker = self.members.get(member.session);
            !member.parked
                && worker.is_some_and(|worker| now.since_ms(worker.heard()) > self.options.silence_ms)
        };
        let silent: Vec<(SessionId, String)> =
            group.members.iter().filter(silent).map(|m| (m.session, m.introduction.clone())).collect();
        if !silent.is_empty() {
            let names: Vec<&str> = silent.iter().map(|(_, who)| who.as_str()).collect();
            let cause = format!("{} fell silent: {}", names.join(" and "), suspicion.message);
            let sessions: Vec<SessionId> = silent.iter().map(|&(session, _)| session).collect();
            for session in sessions {
                self.expel(session, &cause);
            }
            return self.regroup(name, &cause);
        }
        if now < suspicion.until {
            return;
        }
        self.settle_link(name, suspicion);
    }

    /// All members are alive, but a link between two of them broke. Once may be a passing fault: all of them
    /// try again. When it happens a second time before a step is done, the suspect stays out for a while.
    fn settle_link(&mut self, name: &str, suspicion: &Suspicion) {
        let rests_until = self.now.plus_ms(self.options.rest_ms);
        let Some(run) = self.runs.get_mut(name) else { return };
        let Some(group) = &run.group else { return };
        let suspect = suspicion.suspect.and_then(|rank| group.members.get(rank)).cloned();
        let reporter = &suspicion.reporter;
        let Some(suspect) = suspect else {
            return self.regroup(name, &format!("{reporter} lost a peer: {}", suspicion.message));
        };
        let who = &suspect.introduction;
        let cause = format!("the link between {reporter} and {who} broke: {}", suspicion.message);
        let mut ends = [suspicion.reporter.clone(), who.clone()];
        ends.sort_unstable();
        let before = run.last_cut.replace((ends, run.record.step));
        if before == run.last_cut {
            self.expel(suspect.session, &cause);
            self.members.rest(suspect.session, rests_until);
        }
        self.regroup(name, &cause);
    }

    /// Puts a connected worker out of its group.
    pub(crate) fn expel(&mut self, session: SessionId, why: &str) {
        let Some(worker) = self.members.get_mut(session) else { return };
        let Some(fence) = worker.assigned.take() else { return };
        let run = self.runs.get(&fence.run).filter(|run| run.fence() == fence);
        for fence in run.map_or_else(|| vec![fence.clone()], Run::fences) {
            self.direct(session, Directive::Abort { fence, message: why.to_owned() });
        }
    }

    /// A member failed by itself, or lost a peer, or found that nobody can go on.
    pub(crate) fn on_member_failed(&mut self, session: SessionId, failure: MemberFailure) {
        let fence = failure.fence.clone();
        if failure.kind == FailureKind::NotFinite {
            return self.on_not_finite(session, &failure);
        }
        let joins = self.runs.get(&fence.run).and_then(|run| run.change.as_ref()).is_some_and(|change| {
            change.generation == fence.generation && !change.started && change.rank_of(session).is_some()
        });
        if joins {
            return self.on_change_failed(session, &failure);
        }
        if failure.kind == FailureKind::Local
            && let Some(present) = self.failed_before(session, &fence)
        {
            // It takes the news of the present group for a new membership.
            self.direct(
                session,
                Directive::Abort { fence: present.clone(), message: failure.message.clone() },
            );
            return self.on_member_failed(session, MemberFailure { fence: present, ..failure });
        }
        let until = self.now.plus_ms(self.options.link_grace_ms);
        let Some((run, rank)) = self.fenced("RunFailed", session, &fence) else { return };
        let step = run.record.step.max(failure.step);
        let Some(group) = &mut run.group else { return };
        let member = &mut group.members[rank];
        let (name, who) = (member.name.clone(), member.introduction.clone());
        let phase = if failure.phase.is_empty() { String::new() } else { format!(" ({})", failure.phase) };
        let cause = format!("{who} failed at step {step}{phase}: {}", failure.message);
        match failure.kind {
            FailureKind::Run | FailureKind::NotFinite => self.fail(&fence.run, &cause),
            FailureKind::Local => {
                run.unfit.insert(member.process_id.clone(), cause.clone());
                self.out_of_group(session, &fence.run, &cause);
            }
            // Before its start a group has no links, and at its end none that it needs.
            FailureKind::PeerLost { .. } if !matches!(group.stage, Stage::Forming | Stage::Training) => {}
            FailureKind::PeerLost { suspect } => {
                member.parked = true;
                let suspect = suspect.map(|rank| rank as usize).filter(|&suspect| suspect != rank);
                if group.suspicion.is_none() {
                    let (reporter, message) = (who, failure.message.clone());
                    group.suspicion = Some(Suspicion { until, step, reporter, suspect, message });
                }
                self.record(&fence.run, "link_lost", &name, failure.message);
                self.settle_losses(&fence.run);
            }
        }
    }

    /// The present group of a member that failed by itself in one before it, and did not hear of the present one in time:
    /// what is wrong with it is wrong in every group of this past.
    fn failed_before(&self, session: SessionId, fence: &Fence) -> Option<Fence> {
        let run = self.runs.get(&fence.run)?;
        let is_member = run.group.as_ref().is_some_and(|group| group.rank_of(session).is_some());
        let before = (run.record.lineage..run.record.generation).contains(&fence.generation);
        (is_member && before).then(|| run.fence())
    }

    /// A member is out of the run for good, though connected: the others go on, if there are any.
    fn out_of_group(&mut self, session: SessionId, name: &str, cause: &str) {
        if let Some(worker) = self.members.get_mut(session) {
            worker.assigned = None;
        }
        let Some(group) = self.runs.get(name).and_then(|run| run.group.as_ref()) else { return };
        let others = group.members.iter().any(|member| {
            let worker = self.members.get(member.session);
            let here = worker.is_some_and(|worker| worker.assigned.is_some());
            member.session != session && (here || member.away.is_some())
        });
        match group.stage {
            // It was through already.
            Stage::Flushing => {}
            _ if !others => self.fail(name, cause),
            Stage::Saving | Stage::Preparing => self.requeue(name, cause),
            Stage::Forming | Stage::Training => self.regroup(name, cause),
        }
    }

    /// A worker wants to leave: its group changes over without it first, if there is time.
    pub(crate) fn on_leaving(&mut self, session: SessionId, reason: &str, at_once: bool) {
        if at_once {
            self.lose(session, &format!("it left ({reason})"), Loss::ForGood);
            let reason = "it said goodbye".to_owned();
            return self.out.push(Action::CloseSession { session, reason });
        }
        self.members.note_leaving(session, Leaving::Goodbye);
        let Some(worker) = self.members.get(session) else { return };
        if worker.assigned.is_none() {
            return self.say_farewell(session);
        }
        self.let_leave(session, &format!("it is leaving ({reason})"));
    }

    /// Lets a worker go that only waited for its group.
    pub(crate) fn say_farewell(&mut self, session: SessionId) {
        let free = self
            .members
            .get(session)
            .is_some_and(|worker| worker.leaving() == Some(Leaving::Goodbye) && worker.assigned.is_none());
        if free {
            self.direct(session, Directive::Farewell);
        }
    }

    /// A group that is not ready yet is formed anew, and so is a change that counts on the worker. A group
    /// that trains changes over when it is steady, see [`Cluster::plan_change`].
    fn let_leave(&mut self, session: SessionId, why: &str) {
        let Some(worker) = self.members.get(session) else { return };
        let (who, worker_name) = (worker.introduction(), worker.name.clone());
        let Some(fence) = worker.assigned.clone() else { return };
        self.record(&fence.run, "leaving", &worker_name, format!("{who}: {why}"));
        let Some(run) = self.runs.get(&fence.run) else { return };
        if run.change.as_ref().is_some_and(|change| !change.started && change.rank_of(session).is_some()) {
            self.drop_change(&fence.run);
            self.say_farewell(session);
        }
        let Some(group) = self.runs.get(&fence.run).and_then(|run| run.group.as_ref()) else { return };
        if matches!(group.stage, Stage::Saving | Stage::Preparing) && group.rank_of(session).is_some() {
            self.requeue(&fence.run, &format!("{who}: {why}"));
        }
    }

    /// A person wants a worker to get no more work.
    pub(crate) fn on_drain(&mut self, request: RequestId, name: &str) {
        let result = self.drain(name).map(|()| name.to_owned());
        self.answer(request, result);
    }

    fn drain(&mut self, name: &str) -> Result<(), Refusal> {
        let found = self.members.iter().find(|(_, worker)| worker.name == name);
        let Some((session, worker)) = found else {
            let message =
                format!("there is no worker '{name}'; 'takuma worker ls' lists those that are connected");
            return Err(Refusal::NotFound(message));
        };
        if worker.leaving().is_some() {
            return Ok(());
        }
        if let Some(run) = worker.assigned.as_ref().map(|fence| fence.run.as_str())
            && !self.can_do_without(run, session)
        {
            return Err(Refusal::Precondition(format!(
                "{name} is the only worker that run {run} can go on with; stop the run ('takuma run stop {run}') or start \
                 another worker first"
            )));
        }
        self.members.note_leaving(session, Leaving::Drained);
        self.let_leave(session, "it is drained");
        Ok(())
    }

    /// Whether a run's group has somebody who stays, or can have, when a worker goes.
    fn can_do_without(&self, name: &str, session: SessionId) -> bool {
        let Some(group) = self.runs.get(name).and_then(|run| run.group.as_ref()) else { return true };
        let stays = |other: SessionId| {
            let worker = self.members.get(other);
            other != session && worker.is_some_and(|worker| worker.leaving().is_none())
        };
        group.rank_of(session).is_none()
            || group.members.iter().any(|member| stays(member.session))
            || self.idle().any(|idle| self.is_fit(idle, name))
    }
}
