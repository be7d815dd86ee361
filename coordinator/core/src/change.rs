//! A planned change of a group: workers join or leave while the others train on, and all change over
//! between two steps.

use std::collections::BTreeSet;

use crate::cluster::Cluster;
use crate::event::{Directive, FailureKind, Fence, MemberFailure, SessionId, StateSource, When};
use crate::membership::Leaving;
use crate::record::RunStatus;
use crate::run::{Change, Group, Member, Run, Stage};
use crate::time::Timestamp;

impl Cluster {
    /// Begins a change of the active run's group, when there is somebody to take in or to let go.
    pub(crate) fn plan_change(&mut self) {
        let Some(run) = self.active_run() else { return };
        let name = run.record.name.clone();
        let Some(group) = &run.group else { return };
        let steady = |group: &Group| {
            let is_steady =
                |member: &Member| member.away.is_none() && !member.parked && member.ended.is_none();
            group.stage == Stage::Training && group.suspicion.is_none() && group.members.iter().all(is_steady)
        };
        if run.change.is_some() || run.pausing || run.record.status != RunStatus::Running || !steady(group) {
            if let Some(run) = self.runs.get_mut(&name) {
                run.speeds_changed = false;
            }
            return;
        }
        let leavers: BTreeSet<SessionId> =
            self.members.leaving().filter(|&session| group.rank_of(session).is_some()).collect();
        let before = group.members.len();
        let stay = before - leavers.len();
        let most = run.record.config.most_workers() as usize;
        let joiners = self.idle().filter(|&session| self.is_fit(session, &name));
        let mut joiners: Vec<SessionId> = joiners.take(most.saturating_sub(stay)).collect();
        if leavers.is_empty() && joiners.is_empty() {
            return self.balance(&name);
        }
        let mut sessions: Vec<SessionId> = group.members.iter().map(|member| member.session).collect();
        let Some(&carrier) = sessions.first() else { return };
        sessions.retain(|session| !leavers.contains(session));
        let goes = leavers.iter().any(|&session| {
            let worker = self.members.get(session);
            worker.is_some_and(|worker| worker.leaving() == Some(Leaving::Goodbye))
        });
        if stay == 0 && !joiners.is_empty() {
            // Somebody has to bring the state along: one of those who leave goes only with the next change. Where
            // there is no room for it, a checkpoint carries the state over.
            if most < 2 {
                return self.pause(&name);
            }
            sessions.push(carrier);
            joiners.truncate(most - 1);
        }
        sessions.extend(joiners);
        if sessions.is_empty() {
            // Who was drained and is needed stays until another comes; who was told to stop does not.
            return if goes {
                self.pause(&name)
            };
        }
        if stay < before || sessions.len() > stay {
            self.begin_change(&name, &sessions);
        }
    }

    /// Workers that can be given work: four heartbeats without one are too many.
    pub(crate) fn idle(&self) -> impl Iterator<Item = SessionId> {
        self.members.idle(self.now, self.lately_ms())
    }

    /// Who was not heard of within so long may be gone.
    pub(crate) fn lately_ms(&self) -> u64 {
        self.options.heartbeat_timeout_ms * 2 / 5
    }

    /// Whether a worker may work at a run: it has not failed at it before.
    pub(crate) fn is_fit(&self, session: SessionId, name: &str) -> bool {
        let worker = self.members.get(session);
        let run = self.runs.get(name);
        worker.zip(run).is_some_and(|(worker, run)| !run.unfit.contains_key(&worker.hello.process_id))
    }

    pub(crate) fn begin_change(&mut self, name: &str, sessions: &[SessionId]) {
        let Some(generation) = self.next_generation(name) else { return };
        let assigned: Vec<_> = sessions
            .iter()
            .map(|&session| self.members.get(session).and_then(|worker| worker.assigned.clone()))
            .collect();
        let members = self.members_for(name, sessions, generation);
        // Those who train keep their present place until the change.
        for (&session, assigned) in sessions.iter().zip(assigned) {
            if let Some(worker) = self.members.get_mut(session)
                && assigned.is_some()
            {
                worker.assigned = assigned;
            }
        }
        let fence = Fence { run: name.to_owned(), generation };
        let prepares = self.prepares(name, &fence, &members, StateSource::Peers, When::NextStep);
        self.out.extend(prepares);
        let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        let message = format!("the next group is prepared: {}", names.join(", "));
        let since = self.now;
        if let Some(run) = self.runs.get_mut(name) {
            run.change = Some(Change { generation, members, started: false, since });
        }
        self.record(name, "changing", "", message);
    }

    /// A member of the next group is prepared; the last one starts it.
    pub(crate) fn on_change_prepared(&mut self, session: SessionId, fence: &Fence) {
        let Some(run) = self.runs.get_mut(&fence.run) else { return };
        let Some(change) = &mut run.change else { return };
        let Some(rank) = change.rank_of(session) else { return };
        change.members[rank].prepared = true;
        if change.started || !change.members.iter().all(|member| member.prepared) {
            return;
        }
        change.started = true;
        let present = run.group.iter().flat_map(|group| &group.members).map(|member| member.session);
        let mut sessions: Vec<SessionId> = change.members.iter().map(|member| member.session).collect();
        sessions.extend(present);
        sessions.sort_unstable();
        sessions.dedup();
        for session in sessions {
            self.direct(session, Directive::Start(fence.clone()));
        }
    }

    /// A member of the next group could not prepare itself, or not reach its neighbour: no change for now.
    pub(crate) fn on_change_failed(&mut self, session: SessionId, failure: &MemberFailure) {
        let name = failure.fence.run.clone();
        let rests_until = self.now.plus_ms(self.options.rest_ms);
        let Some(run) = self.runs.get(&name) else { return };
        let Some(change) = &run.change else { return };
        let suspect = match failure.kind {
            FailureKind::PeerLost { suspect } => suspect.and_then(|rank| change.members.get(rank as usize)),
            FailureKind::Local | FailureKind::Run | FailureKind::NotFinite => None,
        };
        // Of two workers that cannot reach each other, the one that trains already is believed.
        let trains =
            |session: SessionId| run.group.as_ref().is_some_and(|group| group.rank_of(session).is_some());
        let blamed = match suspect.map(|member| member.session) {
            Some(suspect) if !trains(suspect) => suspect,
            _ => session,
        };
        let joiners = change.members.iter().map(|member| member.session).filter(|&joiner| !trains(joiner));
        // Two that train and cannot reach each other in a new order would fail again at once.
        let resting: Vec<SessionId> = if trains(blamed) { joiners.collect() } else { vec![blamed] };
        let who = self.members.get(blamed).map_or(String::new(), |worker| worker.introduction());
        self.drop_change(&name);
        for session in resting {
            self.members.rest(session, rests_until);
        }
        // What is wrong with the worker itself does not pass.
        let process_id = self.members.get(blamed).map(|worker| worker.hello.process_id.clone());
        if !matches!(failure.kind, FailureKind::PeerLost { .. })
            && let Some((run, process_id)) = self.runs.get_mut(&name).zip(process_id)
        {
            run.unfit.insert(process_id, failure.message.clone());
        }
        self.record(&name, "change_failed", "", format!("{who} cannot take part: {}", failure.message));
    }

    /// When a change is given up whose members do not get ready.
    pub(crate) fn change_deadline(&self, run: &Run) -> Option<Timestamp> {
        let change = run.change.as_ref().filter(|change| !change.started)?;
        Some(change.since.plus_ms(self.options.progress_timeout_ms + 1))
    }

    pub(crate) fn expire_change(&mut self, name: &str) {
        let Some(run) = self.runs.get(name) else { return };
        let overdue = self.change_deadline(run).is_some_and(|at| at <= self.now);
        let Some(change) = run.change.as_ref().filter(|_| overdue) else { return };
        let late: Vec<(SessionId, String)> = change
            .members
            .iter()
            .filter(|member| !member.prepared)
            .map(|member| (member.session, member.introduction.clone()))
            .collect();
        self.drop_change(name);
        let rests_until = self.now.plus_ms(self.options.progress_timeout_ms);
        for (session, who) in late {
            self.members.rest(session, rests_until);
            let seconds = self.options.progress_timeout_ms / 1000;
            let message = format!("{who} cannot take part: it was not ready within {seconds} s");
            self.record(name, "change_failed", "", message);
        }
    }

    /// Gives up a change; those who were to join are free again. One that was started can take place at any
    /// moment, so it counts as done: whatever comes next starts from the new group.
    pub(crate) fn drop_change(&mut self, name: &str) {
        let Some(run) = self.runs.get_mut(name) else { return };
        if run.change.as_ref().is_some_and(|change| change.started) {
            return self.take_over(name);
        }
        let Some(change) = run.change.take() else { return };
        let fence = Fence { run: name.to_owned(), generation: change.generation };
        for member in change.members {
            if self.members.get(member.session).is_some_and(|worker| worker.assigned.as_ref() == Some(&fence))
            {
                self.expel(member.session, "the change of the group was given up");
            }
        }
        self.queue_changed();
    }

    /// The next group has taken over.
    pub(crate) fn take_over(&mut self, name: &str) {
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        let Some(change) = run.change.take() else { return };
        let former = run.group.take().map_or_else(Vec::new, |group| group.members);
        let fence = run.fence();
        let before = run.record.generation;
        run.record.generation = change.generation;
        run.record.workers = change.members.len() as u32;
        let new = run.fence();
        let here: Vec<SessionId> = change.members.iter().map(|member| member.session).collect();
        let group = Group::new(now, Stage::Training, change.members);
        run.group = Some(Group { former: Some(before), ..group });
        for &session in &here {
            // Who was put out in this moment, or failed by itself, has nothing to take over any more.
            if let Some(worker) = self.members.get_mut(session).filter(|worker| worker.assigned.is_some()) {
                worker.assigned = Some(new.clone());
            }
        }
        for member in former.iter().filter(|member| !here.contains(&member.session)) {
            if let Some(worker) = self.members.get_mut(member.session) {
                worker.assigned = None;
                let drained = worker.leaving() == Some(Leaving::Drained);
                let directive = Directive::Release(fence.clone());
                self.direct(member.session, directive);
                self.say_farewell(member.session);
                let message = format!(
                    "{} is out of the group{}",
                    member.introduction,
                    if drained { ": it is drained" } else { "" }
                );
                self.record(name, "worker_left", &member.name, message);
            }
        }
        // A member may have broken off in the moment of the change.
        if let Some(group) = self.runs.get_mut(name).and_then(|run| run.group.as_mut()) {
            for member in &mut group.members {
                if self.members.get(member.session).is_none() {
                    member.away = Some((now, "its connection closed".to_owned()));
                }
            }
        }
        let shares = self.shares(name);
        let group = self.runs.get(name).and_then(|run| run.group.as_ref());
        let new = group.iter().flat_map(|group| &group.members);
        let joined: Vec<String> = new
            .filter(|member| former.iter().all(|before| before.session != member.session))
            .map(|member| member.name.clone())
            .collect();
        let (who, message) = match joined.as_slice() {
            [] => (String::new(), format!("{shares} train")),
            [one] => (one.clone(), format!("{one} joined: {shares} train")),
            several => (String::new(), format!("{} joined: {shares} train", several.join(" and "))),
        };
        self.record(name, "regrouped", &who, message);
        self.queue_changed();
    }
}
