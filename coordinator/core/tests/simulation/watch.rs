//! The invariants that are no single action's: members' states, what people see, recoveries, and how it all ends.

use takuma_core::event::*;
use takuma_core::record::RunStatus;

use crate::faults::Fault;
use crate::ring::{Key, Sums};
use crate::state::State;
use crate::world::{Pid, World};

impl World {
    pub fn note_event(&mut self, run: &str, event: &RunEvent) {
        if event.kind == "metrics_lost" {
            self.violated(&format!("{run}: {}", event.message));
        }
        *self.stats.kinds.entry(event.kind).or_default() += 1;
    }

    /// A directive has come to a worker. What counts as kept lies in the store; and who is let go at the end of a run has
    /// nothing left that it would have to keep.
    pub fn note_directive(&mut self, pid: Pid, directive: &Directive) {
        let Some(member) = &self.processes[pid].member else { return };
        let generation = member.present.fence.generation.0;
        match directive {
            Directive::Kept { run, step, grids, .. } if *run == member.present.fence.run => {
                let Some(files) = self.store.runs.get(run) else { return };
                let stored = files.metrics.last().map_or(0, |line| line.step);
                let has = *step <= stored && grids.iter().all(|step| files.grids.contains(step));
                // What a message tells may be forgotten by a return to a checkpoint before it comes: its receiver, too,
                // begins anew then.
                let lineage = self.checks.truths.get(run).map_or(0, |truth| truth.lineage);
                self.check(has || generation < lineage, || {
                    format!("{run}: step {step} counts as kept, but the store has {stored}")
                });
            }
            Directive::Release(fence) if *fence == member.present.fence && member.phase == "ended" => {
                let (left, run) = (member.spool.reports.len(), fence.run.clone());
                let given = member.spool.given;
                let view = self.coordinator.cluster.run_view(&run);
                // One that leaves a group that goes on may go with what the others have as well.
                let over = view.is_some_and(|view| view.record.status == RunStatus::Succeeded);
                self.check(left == 0 || given || !over, || {
                    format!("w{pid} is let go, but was not told that {left} steps of {run} are kept")
                });
            }
            _ => {}
        }
    }

    /// Two rings agree on nothing; one ring agrees on the furthest state, and nobody goes back by more than a phase.
    pub fn note_exchange(&mut self, key: &Key, seats: &[Pid], sums: &Sums) {
        let (Some(state), Some(truth)) = (sums.state, self.checks.truths.get_mut(&key.0)) else { return };
        if key.1 < truth.newest || sums.exchange > 0 {
            return;
        }
        truth.newest = key.1;
        let anew = truth.groups.get(&key.1).is_some_and(|told| told.state != StateSource::Peers);
        let (past, lineage) = (state.past, truth.lineage);
        let kept = truth.holders.iter().any(|pid| sums.holders.contains(pid));
        let redone = truth.furthest.saturating_sub(state.phases());
        (truth.furthest, truth.holders) = (state.phases(), seats.to_vec());
        self.check(key.1 < lineage || past == lineage, || {
            format!(
                "{}: a group of generation {} goes on with state of {past}, but {lineage} has begun anew",
                key.0, key.1
            )
        });
        if kept && !anew {
            self.stats.redone_max = self.stats.redone_max.max(redone);
            self.check(redone <= 1, || {
                format!("{}: the group of generation {} goes back {redone} phases", key.0, key.1)
            });
        }
    }

    pub fn furthest(&mut self, key: &Key, sums: &Sums) -> State {
        let Some(state) = sums.state else {
            self.violated(&format!(
                "{}: a group of generation {} was formed of which nobody has state",
                key.0, key.1
            ));
        };
        state
    }

    /// A member's state is that of the undisturbed run at its place.
    pub fn check_state(&mut self, pid: Pid, key: &Key, state: &State) {
        let now = self.now;
        let Some(truth) = self.checks.truths.get_mut(&key.0) else { return };
        let same = truth.undisturbed.at(state.at).is_some_and(|undisturbed| undisturbed.hash == state.hash);
        if key.1 == truth.newest {
            truth.furthest = truth.furthest.max(state.phases());
        }
        if truth.broken.is_some_and(|(since, generation, _)| generation == key.1 && now > since + 3_000) {
            truth.broken = None;
        }
        self.check(same, || {
            format!("w{pid} has another state of {} at {} than without faults", key.0, state.at)
        });
    }

    /// A fault hits a worker.
    pub fn note_fault(&mut self, pid: Pid, fault: Fault) {
        let Some(member) = &self.processes[pid].member else { return };
        let (fence, now) = (member.present.fence.clone(), self.now);
        if !self.coordinator.up || self.coordinator.stopped || self.store_is_down() {
            return;
        }
        if let Some(truth) = self.checks.truths.get_mut(&fence.run) {
            match &mut truth.broken {
                Some((.., kind)) => *kind = None,
                none => *none = Some((now, fence.generation.0, Some(fault))),
            }
        }
    }

    /// A member's ring stands.
    pub fn note_formed(&mut self, key: &Key) {
        let now = self.now;
        let Some(truth) = self.checks.truths.get_mut(&key.0) else { return };
        let told = truth.groups.get(&key.1);
        let here = told.is_some_and(|told| told.state == StateSource::Peers && told.when == When::Now);
        if let Some((since, _, kind)) = truth.broken.take_if(|(_, generation, _)| *generation < key.1)
            && here
        {
            self.stats.recoveries_ms.entry(kind).or_default().push(now - since);
        }
    }

    /// What people see fits together, after every event.
    pub fn check_cluster(&mut self) {
        if !self.looks_at_views() {
            return;
        }
        let cluster = &self.coordinator.cluster;
        let views = cluster.run_views();
        let active: Vec<&str> = views
            .iter()
            .filter(|view| view.record.status.is_active())
            .map(|view| view.record.name.as_str())
            .collect();
        let one = active.len() <= 1 && active.first().copied() == cluster.active();
        let lost = views
            .iter()
            .find(|view| {
                matches!(view.record.status, RunStatus::Queued | RunStatus::Waiting)
                    != (view.queue_position > 0)
            })
            .map(|view| view.record.name.clone());
        let spins = cluster.next_deadline().filter(|at| *at <= self.core_time());
        let workers = cluster.worker_views(self.core_time());
        let strayed = workers
            .iter()
            .find(|worker| {
                worker.status != "lost"
                    && !worker.run.is_empty()
                    && Some(worker.run.as_str()) != cluster.active()
            })
            .map(|worker| worker.name.clone());
        let many = workers.len() > cluster.worker_count() + 64;
        self.check(one, || "two runs are active".to_owned());
        self.check(lost.is_none(), || format!("{lost:?} is in no queue, or in one for nothing"));
        self.check(spins.is_none(), || format!("the deadline {spins:?} has passed and would spin the shell"));
        self.check(strayed.is_none(), || format!("{strayed:?} belongs to no group"));
        self.check(!many, || "lost workers are kept without bound".to_owned());
        self.check_order();
    }

    /// Whoever was in the queue before another was submitted stays before it.
    fn check_order(&mut self) {
        let queue = self.queue_now();
        let truths = &self.checks.truths;
        let overtaken = queue.iter().enumerate().find_map(|(at, first)| {
            let submitted = truths.get(first)?.submitted;
            let overtakes = |later: &&String| {
                truths
                    .get(*later)
                    .and_then(|truth| truth.accepted)
                    .is_some_and(|accepted| accepted < submitted)
            };
            queue[at + 1..].iter().find(overtakes).map(|later| (first.clone(), later.clone()))
        });
        self.check(overtaken.is_none(), || format!("the queue is out of order: {overtaken:?} in {queue:?}"));
    }

    /// All runs have succeeded: what the store holds is what it would hold without faults.
    pub fn check_end(&mut self) {
        for wanted in self.plan.runs.clone() {
            self.check_lines(&wanted.name);
            let Some(files) = self.store.runs.get(&wanted.name) else { continue };
            let lines = files.metrics.len() as u64;
            let digest = files.checkpoints.get(&wanted.steps).map(|(weights, _)| weights.clone());
            let last =
                self.checks.truths[&wanted.name].undisturbed.states.last().map_or(0, |state| state.hash);
            self.check(lines == wanted.steps, || format!("{} has {lines} lines of metrics", wanted.name));
            self.check(digest == Some(format!("{last:016x}")), || {
                format!("{} has no final checkpoint", wanted.name)
            });
        }
    }
}
