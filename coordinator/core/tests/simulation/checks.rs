//! The invariants: what every action and every member's state is held against.

use std::collections::{BTreeMap, BTreeSet};

use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::event::*;
use takuma_core::record::{RunRecord, RunStatus};
use takuma_core::run::MAX_OPEN_GRIDS;

use crate::faults::Fault;
use crate::plan::WantedRun;
use crate::state::Undisturbed;
use crate::world::{Pid, World};

/// What is known of a run from outside.
#[derive(Debug)]
pub struct Truth {
    pub undisturbed: Undisturbed,
    /// Generations that members were told of, over all lives, and who was to be in them.
    pub groups: BTreeMap<u64, Told>,
    /// The generation that went on from the seed or a checkpoint last.
    pub lineage: u64,
    /// In this life: the record's generation, and the last line of metrics.
    generation: u64,
    line: Option<u64>,
    committing: BTreeSet<u64>,
    /// The newest ring that stood, how far it came, and who has that state.
    pub newest: u64,
    pub furthest: u64,
    pub holders: Vec<Pid>,
    /// A fault that may break the group, when nothing hinders its recovery: its time, the generation and its kind, if it is
    /// the only one.
    pub broken: Option<(u64, u64, Option<Fault>)>,
    pub submitted: u64,
    pub accepted: Option<u64>,
    /// Resumed in this life.
    resumed: bool,
}

#[derive(Debug)]
pub struct Told {
    members: Vec<Pid>,
    pub state: StateSource,
    pub when: When,
    prepared: BTreeSet<Pid>,
    started: bool,
}

#[derive(Debug, Default)]
pub struct Checks {
    pub truths: BTreeMap<String, Truth>,
    counter: u64,
    /// Invariants that were looked at.
    pub count: u64,
    events: u64,
}

/// What was so before an event.
pub struct Before {
    active: Option<String>,
    queue: Vec<String>,
    claims: bool,
    recovers: bool,
}

impl Checks {
    pub fn taint(&mut self) {
        self.truths.values_mut().for_each(|truth| truth.broken = None);
    }

    pub fn forget_life(&mut self) {
        self.taint();
        for truth in self.truths.values_mut() {
            (truth.generation, truth.line) = (0, None);
            truth.committing.clear();
            // What became of that is not known: the store may have another place for it.
            if std::mem::take(&mut truth.resumed) {
                (truth.submitted, truth.accepted) = (0, None);
            }
        }
    }
}

impl World {
    pub fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        self.checks.count += 1;
        if !holds {
            self.violated(&what());
        }
    }

    pub fn note_submitted(&mut self, wanted: &WantedRun) {
        self.checks.counter += 1;
        let submitted = self.checks.counter;
        if let Some(truth) = self.checks.truths.get_mut(&wanted.name) {
            (truth.submitted, truth.accepted) = (submitted, None);
            return;
        }
        let truth = Truth {
            undisturbed: Undisturbed::new(self.plan.seed, wanted.steps, self.plan.global_batch),
            groups: BTreeMap::new(),
            lineage: 0,
            generation: 0,
            line: None,
            committing: BTreeSet::new(),
            newest: 0,
            furthest: 0,
            holders: Vec::new(),
            broken: None,
            submitted,
            accepted: None,
            resumed: false,
        };
        self.checks.truths.insert(wanted.name.clone(), truth);
    }

    /// The run is in the queue from now on.
    pub fn note_accepted(&mut self, run: &str) {
        self.checks.counter += 1;
        let counter = self.checks.counter;
        if let Some(truth) = self.checks.truths.get_mut(run) {
            truth.accepted.get_or_insert(counter);
        }
    }

    /// It goes to the end of the queue.
    pub fn note_enqueued(&mut self, run: &str) {
        self.checks.counter += 1;
        let counter = self.checks.counter;
        if let Some(truth) = self.checks.truths.get_mut(run) {
            (truth.submitted, truth.accepted) = (counter, Some(counter));
            truth.resumed = true;
        }
    }

    pub fn looks_at_views(&self) -> bool {
        self.checks.events.is_multiple_of(self.plan.views_every)
    }

    pub fn before(&mut self, event: &Event) -> Before {
        self.checks.events += 1;
        if let Event::MemberPrepared { session, fence } = event {
            let pid = self.sessions[session.0 as usize].pid;
            let truth = self.checks.truths.get_mut(&fence.run);
            if let Some(told) = truth.and_then(|truth| truth.groups.get_mut(&fence.generation.0)) {
                told.prepared.insert(pid);
            }
        }
        Before {
            active: self.coordinator.cluster.active().map(str::to_owned),
            queue: if self.looks_at_views() { self.queue_now() } else { Vec::new() },
            claims: matches!(event, Event::WorkerConnected { hello, .. } if hello.membership.is_some()),
            recovers: matches!(event, Event::RunRecovered { .. }),
        }
    }

    pub fn queue_now(&self) -> Vec<String> {
        let views = self.coordinator.cluster.run_views();
        let mut queued: Vec<_> = views.iter().filter(|view| view.queue_position > 0).collect();
        queued.sort_by_key(|view| view.queue_position);
        queued.iter().map(|view| view.record.name.clone()).collect()
    }

    pub fn check_actions(&mut self, before: &Before, actions: &[Action]) {
        let bound = 64 + 8 * (self.coordinator.cluster.worker_count() + self.plan.runs.len());
        self.check(actions.len() <= bound, || format!("{} actions follow from one event", actions.len()));
        let mut prepares: Vec<(Pid, &Prepare)> = Vec::new();
        let mut closed: BTreeSet<SessionId> = BTreeSet::new();
        for action in actions {
            match action {
                Action::CloseSession { session, .. } | Action::RefuseWorker { session, .. } => {
                    closed.insert(*session);
                }
                Action::Direct { session, directive } => {
                    let open = self.sessions[session.0 as usize].life == self.coordinator.life
                        && !self.sessions[session.0 as usize].ended
                        && !closed.contains(session);
                    self.check(open, || format!("{directive:?} to a session that is closed"));
                    let pid = self.sessions[session.0 as usize].pid;
                    match directive {
                        Directive::Prepare(prepare) => prepares.push((pid, prepare)),
                        Directive::Start(fence) => self.check_start(fence),
                        Directive::Kept { grids, .. } => {
                            self.check(grids.len() <= MAX_OPEN_GRIDS, || {
                                format!("{} grids in one message", grids.len())
                            });
                        }
                        _ => {}
                    }
                }
                Action::SaveRun { record, .. } => self.check_record(record),
                Action::RecordMetrics { run, line } => self.check_line(run, line),
                Action::RewindMetrics { run, step, lineage } => {
                    let Some(truth) = self.checks.truths.get_mut(run) else { continue };
                    (truth.line, truth.lineage) = (Some(*step), lineage.0);
                    truth.holders.clear();
                }
                Action::CommitCheckpoint { manifest, .. } => self.check_manifest(manifest),
                _ => {}
            }
        }
        for group in prepares.chunk_by(|(_, a), (_, b)| a.fence == b.fence) {
            self.check_group(group);
        }
        self.check_turn(before);
    }

    /// The first run in the queue has its turn; only one that its workers come back to may go before.
    fn check_turn(&mut self, before: &Before) {
        if !self.looks_at_views() || before.recovers || before.active.is_some() {
            return;
        }
        let Some(active) = self.coordinator.cluster.active().map(str::to_owned) else { return };
        let first = before.queue.first().is_none_or(|first| *first == active);
        self.check(first || before.claims, || format!("{active} was not the first of {:?}", before.queue));
    }

    fn check_start(&mut self, fence: &Fence) {
        let told = self
            .checks
            .truths
            .get_mut(&fence.run)
            .and_then(|truth| truth.groups.get_mut(&fence.generation.0));
        let Some(told) = told else {
            self.violated(&format!("a start of {fence:?}, which nobody was told of"));
        };
        told.started = true;
        let ready = told.members.iter().all(|pid| told.prepared.contains(pid));
        self.check(ready, || format!("{fence:?} was started before all of its members were prepared"));
    }

    /// The members of a group agree on it, own every slot once, and the store has reserved its number.
    fn check_group(&mut self, prepares: &[(Pid, &Prepare)]) {
        let Some((_, first)) = prepares.first() else { return };
        let (run, generation) = (&first.fence.run, first.fence.generation.0);
        let record = self.store.runs.get(run).and_then(|files| files.record.as_ref());
        let reserved = record.map_or(0, |record| record.generations_reserved.0.max(record.generation.0));
        self.check(generation <= reserved, || {
            format!("generation {generation} of {run} is given out, but the store has {reserved} reserved")
        });
        let Some(truth) = self.checks.truths.get_mut(run) else { return };
        let newest = truth.groups.last_key_value().map_or(0, |(&newest, _)| newest);
        let members: Vec<Pid> = prepares.iter().map(|&(pid, _)| pid).collect();
        let told =
            Told { members, state: first.state, when: first.when, prepared: BTreeSet::new(), started: false };
        truth.groups.insert(generation, told);
        self.check(newest < generation, || {
            format!("generation {generation} of {run} is given out after {newest}")
        });
        let mut next = 0;
        for (rank, (_, prepare)) in prepares.iter().enumerate() {
            let share = first.members[rank].slots;
            self.check(share.first == next, || {
                format!("rank {rank} of {run} begins with slot {}, not {next}", share.first)
            });
            next = share.first + share.count;
            let same = prepare.rank as usize == rank && prepare.fence == first.fence;
            let same = same && (rank > 8 || prepare.members == first.members);
            self.check(same, || format!("the members of {:?} were told of different groups", first.fence));
        }
        let all = next == first.config.global_batch && prepares.len() == first.members.len();
        self.check(all, || format!("the slots of {:?} end with {next}", first.fence));
    }

    fn check_record(&mut self, record: &RunRecord) {
        let Some(truth) = self.checks.truths.get_mut(&record.name) else { return };
        let before = std::mem::replace(&mut truth.generation, record.generation.0);
        self.check(before <= record.generation.0, || {
            format!("the generation of {} fell from {before} to {}", record.name, record.generation)
        });
        if record.status == RunStatus::Succeeded {
            let checkpoint = record.checkpoint.as_ref().map(|mark| mark.step);
            let whole = record.step == record.target_steps && checkpoint == Some(record.target_steps);
            self.check(whole, || {
                format!("{} succeeded at step {} with checkpoint {checkpoint:?}", record.name, record.step)
            });
            let last =
                self.checks.truths[&record.name].undisturbed.states.last().map_or(0, |state| state.hash);
            self.check(record.weights_sha256 == format!("{last:016x}"), || {
                format!("the final weights of {} are others than without faults", record.name)
            });
        }
    }

    fn check_line(&mut self, run: &str, line: &MetricsLine) {
        let stored =
            self.store.runs.get(run).and_then(|files| files.metrics.last()).map_or(0, |line| line.step);
        let Some(truth) = self.checks.truths.get_mut(run) else { return };
        let last = truth.line.replace(line.step).unwrap_or(stored);
        let lineage = truth.lineage;
        let expected = &truth.undisturbed;
        let step = line.step as usize;
        let same = expected.fed.get(step - 1) == Some(&line.fed)
            && expected.states.get(3 * step).is_some_and(|state| state.hash >> 12 == line.d_loss.to_bits());
        self.check(line.step == last + 1, || {
            format!("{run}: step {} was recorded after step {last}", line.step)
        });
        self.check(same, || {
            format!("{run}: step {} was recorded with other numbers than without faults", line.step)
        });
        self.check(line.generation.0 >= lineage, || {
            format!(
                "{run}: generation {} reports step {}, but generation {lineage} has begun anew",
                line.generation, line.step
            )
        });
    }

    fn check_manifest(&mut self, manifest: &CheckpointManifest) {
        let Some(truth) = self.checks.truths.get_mut(&manifest.run) else { return };
        let (lineage, run, step) = (truth.lineage, &manifest.run, manifest.step);
        let at = Position { step, phase: 0 };
        let same = truth
            .undisturbed
            .at(at)
            .is_some_and(|state| format!("{:016x}", state.hash) == manifest.weights_sha256);
        let first = truth.committing.insert(step);
        let told = truth.line.is_none_or(|line| step <= line);
        self.check(same, || format!("{run}: the checkpoint of step {step} is another than without faults"));
        self.check(manifest.generation.0 >= lineage, || {
            format!(
                "{run}: generation {} commits step {step}, but generation {lineage} has begun anew",
                manifest.generation
            )
        });
        self.check(told, || format!("{run}: step {step} is committed before its metrics are here"));
        self.check(first, || format!("{run}: the checkpoint of step {step} is committed twice at once"));
    }

    /// A manifest is being written.
    pub fn note_commit(&mut self, manifest: &CheckpointManifest) {
        if let Some(truth) = self.checks.truths.get_mut(&manifest.run) {
            truth.committing.remove(&manifest.step);
        }
    }

    /// The lines in the store are those of the first steps, each once.
    pub fn check_lines(&mut self, run: &str) {
        let Some(files) = self.store.runs.get(run) else { return };
        let in_order = files.metrics.iter().enumerate().all(|(at, line)| line.step == at as u64 + 1);
        self.check(in_order, || format!("the stored metrics of {run} have a gap or a repeat"));
    }
}
