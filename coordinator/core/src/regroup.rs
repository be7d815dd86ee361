//! A group that goes on at once with whoever is left, and a run that waits when nobody is.

use crate::cluster::Cluster;
use crate::event::{Action, Directive, Fence, Formed, Prepare, SessionId, StateSource, When};
use crate::ids::Generation;
use crate::record::RunStatus;
use crate::run::{Group, MAX_OPEN_GRIDS, Member, Stage};

/// Generations are reserved in the store ahead of time, so that a group need not wait for the store before
/// it goes on. So many groups may be formed while the store is away.
pub(crate) const GENERATIONS_AHEAD: u64 = 1_000;

impl Cluster {
    /// Puts the connected members of a group under a new generation: they leave their ring where they are,
    /// agree on the furthest state among them and run the interrupted phase again.
    pub(crate) fn regroup(&mut self, name: &str, cause: &str) {
        self.drop_change(name);
        if self.runs.get(name).is_none_or(|run| run.group.is_none()) {
            return;
        }
        self.record(name, "worker_lost", "", cause.to_owned());
        self.form_anew(name, cause);
    }

    /// The next group of those who are left. Without a generation for it, it waits for the store's word.
    pub(crate) fn form_anew(&mut self, name: &str, cause: &str) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.regroup_when_saved = None;
        let Some(group) = &run.group else { return };
        let mine = |session: SessionId| {
            let worker = self.members.get(session)?;
            worker.assigned.as_ref().filter(|fence| fence.run == name).map(|_| session)
        };
        let survivors: Vec<SessionId> =
            group.members.iter().filter_map(|member| mine(member.session)).collect();
        let with_state = |member: &Member| member.has_state && survivors.contains(&member.session);
        if !group.members.iter().any(with_state) {
            let left = if survivors.is_empty() { "no worker is left" } else { "nobody left has its state" };
            return self.wait_for_workers(name, &format!("{cause}; {left}"));
        }
        let Some(generation) = self.next_generation(name) else {
            if let Some(run) = self.runs.get_mut(name) {
                run.regroup_when_saved = Some(cause.to_owned());
            }
            return;
        };
        let members = self.members_for(name, &survivors, generation);
        let now = self.now;
        let Some(run) = self.runs.get_mut(name) else { return };
        run.record.generation = generation;
        run.record.workers = members.len() as u32;
        run.group = Some(Group::new(now, Stage::Forming, members));
        let message = format!("{} go on", self.shares(name));
        self.record(name, "regrouping", "", message);
        self.tell_prepare(name, StateSource::Peers, When::Now);
    }

    /// Members with their shares of the slots, which are theirs from now on: even ones, or by speed.
    pub(crate) fn members_for(
        &mut self,
        name: &str,
        sessions: &[SessionId],
        generation: Generation,
    ) -> Vec<Member> {
        let Some(run) = self.runs.get(name) else { return Vec::new() };
        let config = &run.record.config;
        let shares = if config.balance {
            config.shares_by_cost(&self.slot_costs(name, sessions))
        } else {
            config.shares(sessions.len() as u32)
        };
        let mut members = Vec::with_capacity(sessions.len());
        for (&session, slots) in sessions.iter().zip(shares) {
            let Some(worker) = self.members.get_mut(session) else { continue };
            worker.assigned = Some(Fence { run: name.to_owned(), generation });
            worker.progressed = self.now;
            let group = self.runs.get(name).and_then(|run| run.group.as_ref());
            let before = group.and_then(|group| Some(&group.members[group.rank_of(session)?]));
            members.push(Member {
                session,
                name: worker.name.clone(),
                introduction: worker.introduction(),
                process_id: worker.hello.process_id.clone(),
                ring_address: worker.hello.ring_address.clone(),
                slots,
                prepared: false,
                has_state: before.is_some_and(|member| member.has_state),
                parked: false,
                away: None,
                ended: None,
                pace: Default::default(),
                speed: before.map_or_else(Default::default, |member| member.speed.carried_over()),
            });
        }
        members
    }

    /// Sends every member of the present group its part.
    pub(crate) fn tell_prepare(&mut self, name: &str, state: StateSource, when: When) {
        let Some(run) = self.runs.get(name) else { return };
        let Some(group) = &run.group else { return };
        let fence = run.fence();
        let prepares = self.prepares(name, &fence, &group.members, state, when);
        self.out.extend(prepares);
    }

    /// The directives that tell `members` of the group under `fence`.
    pub(crate) fn prepares(
        &self,
        name: &str,
        fence: &Fence,
        members: &[Member],
        state: StateSource,
        when: When,
    ) -> Vec<Action> {
        let Some(run) = self.runs.get(name) else { return Vec::new() };
        let url = |run: &str| format!("{}/{}", self.options.store_url, crate::layout::run_folder(run));
        let origin = run.record.origin.as_ref().filter(|_| run.record.checkpoint.is_none());
        let checkpoint_url = url(origin.map_or(name, |origin| &origin.run));
        let run_url = url(name);
        let peers: Vec<_> = members.iter().map(Member::peer).collect();
        let prepare = |(rank, member): (usize, &Member)| {
            let prepare = Prepare {
                fence: fence.clone(),
                run_id: run.record.id.clone(),
                config: run.record.config.clone(),
                rank: rank as u32,
                members: peers.clone(),
                run_url: run_url.clone(),
                checkpoint_url: checkpoint_url.clone(),
                state,
                when,
                target_steps: run.record.target_steps,
                passed_over: run.record.passed_over.iter().copied().collect(),
            };
            Action::Direct { session: member.session, directive: Directive::Prepare(Box::new(prepare)) }
        };
        members.iter().enumerate().map(prepare).collect()
    }

    /// A generation that was never given out, unless the store has not confirmed enough of them.
    pub(crate) fn next_generation(&mut self, name: &str) -> Option<Generation> {
        let run = self.runs.get_mut(name)?;
        let record = &mut run.record;
        let planned = run.change.as_ref().map_or(record.generation, |change| change.generation);
        let next = record.generation.max(planned).max(run.floor).next();
        let short = next.ahead(GENERATIONS_AHEAD / 2) > record.generations_reserved;
        if std::mem::take(&mut run.reserve_again) || short {
            record.generations_reserved = record.generations_reserved.max(next.ahead(GENERATIONS_AHEAD));
            self.save(name, true);
        }
        let run = self.runs.get_mut(name).filter(|run| next <= run.reserved)?;
        run.floor = next;
        Some(next)
    }

    /// "a (32 slots), b (32 slots)".
    pub(crate) fn shares(&self, name: &str) -> String {
        let group = self.runs.get(name).and_then(|run| run.group.as_ref());
        let members = group.iter().flat_map(|group| &group.members);
        let shares: Vec<String> =
            members.map(|member| format!("{} ({} slots)", member.name, member.slots.count)).collect();
        shares.join(", ")
    }

    /// The group stands and trains on.
    pub(crate) fn on_formed(&mut self, session: SessionId, formed: &Formed) {
        let now = self.now;
        let fence = formed.fence.clone();
        let Some((run, rank)) = self.fenced("Formed", session, &fence) else { return };
        let stopping = run.is_stopping();
        // A new session tells everything once more.
        let Some(group) = run.group.as_mut().filter(|group| rank == 0 && !group.formed) else { return };
        group.formed = true;
        group.members.iter_mut().for_each(|member| member.has_state = true);
        if group.stage == Stage::Forming {
            group.stage = Stage::Training;
            group.reported = now;
        }
        let sessions: Vec<SessionId> = group.members.iter().map(|member| member.session).collect();
        let world = sessions.len();
        let many = if world == 1 { "1 worker goes".to_owned() } else { format!("{world} workers go") };
        let restored = match formed.restored {
            0 => String::new(),
            1 => "; 1 received the state from a peer".to_owned(),
            n => format!("; {n} received the state from a peer"),
        };
        let message = format!("{many} on from {} after {:.2} s{restored}", formed.position, formed.stalled_s);
        self.record(&fence.run, "formed", "", message);
        for session in sessions {
            self.tell_kept(session, &fence.run, false);
            if stopping {
                self.direct(session, Directive::Stop(fence.clone()));
            }
        }
        self.save(&fence.run, false);
    }

    /// Tells a worker which results need not be sent again, and with `resend` that all others must be.
    pub(crate) fn tell_kept(&mut self, session: SessionId, name: &str, resend: bool) {
        let Some(run) = self.runs.get(name) else { return };
        let stored = &run.results.stored;
        // Members keep tiles of so many grids at most, so only the newest ones are of interest.
        let grids = stored.grids.iter().rev().take(MAX_OPEN_GRIDS).copied().collect();
        let directive =
            Directive::Kept { run: name.to_owned(), step: stored.step, grids, reals: stored.reals, resend };
        self.direct(session, directive);
    }

    /// The group was not ready yet: the run goes back to the head of the queue.
    pub(crate) fn requeue(&mut self, name: &str, cause: &str) {
        self.release_members(name, Some(cause));
        let Some(run) = self.runs.get_mut(name) else { return };
        run.group = None;
        let trained = run.record.step > 0 || run.record.checkpoint.is_some();
        run.record.status = if trained { RunStatus::Waiting } else { RunStatus::Queued };
        self.active = None;
        self.queue.push_front(name.to_owned());
        self.record(name, "waiting", "", format!("{cause}; the run waits for workers"));
        self.save(name, false);
        self.queue_changed();
    }

    /// No worker is left: the run goes on from its newest checkpoint when one comes.
    pub(crate) fn wait_for_workers(&mut self, name: &str, cause: &str) {
        let stopping = self.runs.get(name).is_some_and(|run| run.record.status == RunStatus::Stopping);
        let Some(from) = self.put_back(name, cause) else { return };
        if stopping {
            self.queue.retain(|queued| queued != name);
            let message = format!("{cause}; stopped as asked: 'takuma run resume {name}' goes on {from}");
            return self.end_untrained(name, &message);
        }
        let message = format!("{cause}; the run waits, and goes on {from} when a worker comes");
        self.record(name, "waiting", "", message);
        self.save(name, false);
    }

    /// Lets go of the members, and puts the run at the head of the queue. Returns from where it goes on.
    pub(crate) fn put_back(&mut self, name: &str, cause: &str) -> Option<String> {
        self.release_members(name, Some(cause));
        let now = self.now;
        let run = self.runs.get_mut(name)?;
        run.stop_clock(now);
        run.group = None;
        run.reunion = None;
        run.pausing = false;
        run.results.open_grids.clear();
        run.record.status = RunStatus::Waiting;
        let from = match run.beginning() {
            (step, StateSource::Checkpoint(_)) => format!("from the checkpoint of step {step}"),
            _ => "from the beginning".to_owned(),
        };
        self.active = None;
        self.queue.push_front(name.to_owned());
        self.queue_changed();
        Some(from)
    }
}
