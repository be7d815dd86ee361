//! Members that come back: to a coordinator that was restarted, or over a new session.

use std::collections::{BTreeMap, BTreeSet};

use crate::cluster::Cluster;
use crate::event::{Claim, Directive, Fence, Peer, SessionId, Stored};
use crate::losses::Suspicion;
use crate::record::{CheckpointMark, RunRecord, RunStatus};
use crate::regroup::GENERATIONS_AHEAD;
use crate::run::{Group, Member, Reunion, Run, Stage};

impl Cluster {
    /// Takes in a run that the store holds. The checkpoints that are there count, not the record's word.
    pub(crate) fn on_recovered(
        &mut self,
        mut record: RunRecord,
        checkpoint: Option<CheckpointMark>,
        stored: Stored,
    ) {
        let name = record.name.clone();
        let status = record.status;
        record.checkpoint = checkpoint;
        let mut run = Run::new(record, None);
        run.floor = run.record.generations_reserved.max(run.record.generation);
        if status.is_active() {
            let began = run.record.origin.as_ref().map_or(0, |origin| origin.step);
            run.record.step = stored.step.max(began);
        }
        run.results.stored = stored;
        self.runs.insert(name.clone(), run);
        match status {
            RunStatus::Queued | RunStatus::Waiting => self.requeue_recovered(name),
            _ if status.is_active() && self.active.is_none() => {
                let until = self.now.plus_ms(self.options.reunion_ms);
                if let Some(run) = self.runs.get_mut(&name) {
                    run.reunion = Some(Reunion { until, claims: Default::default() });
                    // What was reserved may all have been given out.
                    run.record.generations_reserved = run.floor.ahead(GENERATIONS_AHEAD);
                }
                self.save(&name, true);
                self.active = Some(name.clone());
                let message = "the coordinator is back and waits for the workers that train".to_owned();
                self.record(&name, "coordinator_back", "", message);
            }
            _ if status.is_active() => {
                let cause = "the coordinator was restarted, and found another run at work";
                self.active_moves_aside(&name, cause);
            }
            _ => {}
        }
    }

    /// The queue's order is that of the submissions.
    fn requeue_recovered(&mut self, name: String) {
        let queued = |name: &String| self.runs.get(name).map(|run| (run.record.queued, name.clone()));
        let key = queued(&name);
        let place = self.queue.iter().take_while(|other| queued(other) <= key).count();
        self.queue.insert(place, name);
    }

    fn active_moves_aside(&mut self, name: &str, cause: &str) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.status = RunStatus::Waiting;
        self.requeue_recovered(name.to_owned());
        self.record(name, "waiting", "", cause.to_owned());
        self.save(name, false);
    }

    /// A worker that connects is in the middle of a run.
    pub(crate) fn take_back(&mut self, session: SessionId, claim: Claim) {
        let known = self.runs.get(&claim.fence.run).filter(|run| run.record.id == claim.run_id);
        let Some(run) = known else {
            return self.turn_down(session, &claim, "this coordinator does not know the run");
        };
        if claim.fence.generation < run.record.lineage {
            return self.turn_down(session, &claim, "the run has gone back to a checkpoint since");
        }
        let name = claim.fence.run.clone();
        if run.record.status == RunStatus::Waiting && self.active.is_none() {
            self.call_back(&name);
        }
        let Some(run) = self.runs.get(&name) else { return };
        if run.reunion.is_some() {
            return self.take_claim(session, claim);
        }
        let changed = run
            .change
            .as_ref()
            .is_some_and(|change| change.started && change.generation == claim.fence.generation);
        if changed {
            self.take_over(&name);
        }
        self.reseat(session, claim);
    }

    /// The run was given up because all its workers were gone, but it was the coordinator that was cut off: they
    /// have trained on. Nobody has begun again from the checkpoint yet, so their state is still the run's.
    fn call_back(&mut self, name: &str) {
        let until = self.now.plus_ms(self.options.reunion_ms / 5);
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.status = RunStatus::Running;
        run.reunion = Some(Reunion { until, claims: BTreeMap::new() });
        self.queue.retain(|queued| queued != name);
        self.active = Some(name.to_owned());
        let message = "the workers of the run come back, and it goes on with them".to_owned();
        self.record(name, "coordinator_back", "", message);
        self.queue_changed();
    }

    fn take_claim(&mut self, session: SessionId, claim: Claim) {
        let name = claim.fence.run.clone();
        if let Some(worker) = self.members.get_mut(session) {
            worker.assigned = Some(claim.fence.clone());
        }
        let soon = self.now.plus_ms(self.options.reunion_ms / 5);
        if let Some(reunion) = self.runs.get_mut(&name).and_then(|run| run.reunion.as_mut()) {
            // A broken group stands still, so it waits less long for those who may be dead.
            if claim.parked {
                reunion.until = reunion.until.min(soon);
            }
            reunion.claims.insert(session, claim);
        }
        self.expire_reunion(&name);
    }

    /// Gives a member its place again, if it still has one.
    fn reseat(&mut self, session: SessionId, claim: Claim) {
        let name = claim.fence.run.clone();
        let until = self.now.plus_ms(self.options.link_grace_ms);
        let Some(worker) = self.members.get(session) else { return };
        let process_id = worker.hello.process_id.clone();
        let Some(run) = self.runs.get_mut(&name) else { return };
        let (step, stopping, fence) = (run.record.step, run.is_stopping(), run.fence());
        // It has not heard of the present group, but has state of the same past.
        let behind = claim.fence.generation < fence.generation;
        let ahead = claim.fence.generation > fence.generation;
        let group = run.group.as_mut().filter(|group| group.has_state() && !ahead);
        let member =
            group.and_then(|group| group.members.iter_mut().find(|member| member.process_id == process_id));
        let Some(member) = member else {
            return self.turn_down(session, &claim, "the run has gone on without it");
        };
        member.session = session;
        member.away = None;
        member.parked |= claim.parked;
        member.has_state = true;
        let reporter = member.introduction.clone();
        if let Some(group) = run.group.as_mut().filter(|group| claim.parked && group.suspicion.is_none()) {
            let message = "its ring broke".to_owned();
            group.suspicion =
                Some(Suspicion { until, step, reporter: reporter.clone(), suspect: None, message });
        }
        if let Some(worker) = self.members.get_mut(session) {
            worker.assigned = Some(fence.clone());
        }
        if behind {
            return self.regroup(&name, &format!("{reporter} did not hear of its group before it was away"));
        }
        // Its part of a change went with the old session. A change that was told to the others has to be
        // told to all of them anew.
        if self.runs.get(&name).and_then(|run| run.change.as_ref()).is_some_and(|change| change.started) {
            return self.regroup(&name, "the session of a member broke while the group changed");
        }
        self.drop_change(&name);
        self.tell_kept(session, &name, true);
        if stopping {
            self.direct(session, Directive::Stop(fence));
        }
        self.settle_losses(&name);
    }

    fn turn_down(&mut self, session: SessionId, claim: &Claim, why: &str) {
        let directive = Directive::Abort { fence: claim.fence.clone(), message: why.to_owned() };
        self.direct(session, directive);
    }

    /// Takes the group up again when all its members are back, or without those who do not come.
    pub(crate) fn expire_reunion(&mut self, name: &str) {
        let Some(reunion) = self.runs.get(name).and_then(|run| run.reunion.as_ref()) else { return };
        let newest = reunion.claims.values().max_by_key(|claim| claim.fence.generation);
        let complete = newest.is_some_and(|newest| {
            newest.members.iter().all(|peer| self.members.session_of_process(&peer.process_id).is_some())
        });
        if !complete && self.now < reunion.until {
            return;
        }
        let newest = newest.cloned();
        let run = self.runs.get_mut(name);
        let claims =
            run.and_then(|run| run.reunion.take()).map_or_else(BTreeMap::new, |reunion| reunion.claims);
        let Some(newest) = newest else {
            let cause = "the coordinator was restarted, and none of the run's workers came back";
            return self.wait_for_workers(name, cause);
        };
        let processes: BTreeSet<&str> = newest.members.iter().map(|peer| peer.process_id.as_str()).collect();
        let belongs = |session: SessionId| {
            let worker = self.members.get(session);
            worker.is_some_and(|worker| processes.contains(worker.hello.process_id.as_str()))
        };
        let (mine, others): (BTreeMap<SessionId, Claim>, BTreeMap<SessionId, Claim>) =
            claims.into_iter().partition(|&(session, _)| belongs(session));
        for (session, claim) in others {
            if let Some(worker) = self.members.get_mut(session) {
                worker.assigned = None;
            }
            self.turn_down(session, &claim, "the run has gone on without it");
            self.say_farewell(session);
        }
        self.take_up(name, &newest, &mine);
    }

    /// The group of the newest claim. Who claims a former group, or may be about to change to a later one, has
    /// the same state, but not the same ring: then the group is formed anew.
    fn take_up(&mut self, name: &str, newest: &Claim, claims: &BTreeMap<SessionId, Claim>) {
        let now = self.now;
        let fence = newest.fence.clone();
        let members: Vec<Member> =
            newest.members.iter().map(|peer| self.returned(peer, newest, claims)).collect();
        let absent = members.iter().filter(|member| member.away.is_some()).count();
        let broken = members.iter().any(|member| member.parked);
        let sessions: Vec<SessionId> =
            members.iter().filter(|member| member.away.is_none()).map(|member| member.session).collect();
        let Some(run) = self.runs.get_mut(name) else { return };
        // The group may have been formed anew behind its members' back: then none of them is in the present ring.
        let stale = run.record.generation > fence.generation;
        let fence = Fence { generation: fence.generation.max(run.record.generation), ..fence };
        run.record.generation = fence.generation;
        run.floor = run.floor.max(fence.generation);
        run.record.workers = members.len() as u32;
        let stopping = run.record.status == RunStatus::Stopping;
        if !stopping {
            run.record.status = RunStatus::Running;
        }
        run.training_since = Some(now);
        run.group = Some(Group { formed: true, ..Group::new(now, Stage::Training, members) });
        let message = format!("{} of {} workers are back", sessions.len(), newest.members.len());
        self.record(name, "reunited", "", message);
        for session in sessions {
            if let Some(worker) = self.members.get_mut(session) {
                worker.assigned = Some(fence.clone());
            }
            // What they sent before had no group to go to.
            self.tell_kept(session, name, true);
            if stopping {
                self.direct(session, Directive::Stop(fence.clone()));
            }
        }
        self.save(name, false);
        if absent > 0 || broken || stale {
            self.regroup(name, "the group broke while the coordinator was away");
        }
    }

    /// A member of the newest claim's group as it is now: back, or away.
    fn returned(&self, peer: &Peer, newest: &Claim, claims: &BTreeMap<SessionId, Claim>) -> Member {
        let session = self.members.session_of_process(&peer.process_id);
        let found =
            session.and_then(|session| Some((session, claims.get(&session)?, self.members.get(session)?)));
        let gone = (self.now, "it did not come back to the restarted coordinator".to_owned());
        let same_ring = |claim: &Claim| claim.fence == newest.fence && claim.changes_to.is_none();
        Member {
            session: found.map_or(SessionId(0), |(session, ..)| session),
            name: found.map_or_else(|| peer.worker.clone(), |(.., worker)| worker.name.clone()),
            introduction: found.map_or_else(|| peer.worker.clone(), |(.., worker)| worker.introduction()),
            process_id: peer.process_id.clone(),
            ring_address: peer.ring_address.clone(),
            slots: peer.slots,
            prepared: true,
            has_state: found.is_some(),
            parked: found.is_some_and(|(_, claim, _)| claim.parked || !same_ring(claim)),
            away: found.is_none().then_some(gone),
            ended: None,
            pace: Default::default(),
            speed: Default::default(),
        }
    }
}
