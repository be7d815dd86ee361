//! The simulated store, and the writer that each run has in each life of the coordinator: calls take time, fail, and
//! may have landed when the coordinator dies in the middle of one. After coordinator/src/files.rs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::event::*;
use takuma_core::ids::{Generation, Step};
use takuma_core::record::{CheckpointMark, RunRecord};

use crate::state::State;
use crate::world::{Ev, World};

/// Lines of metrics are at most so old before they are stored.
const LINES_MS: u64 = 2_000;

/// What lies in a run's folder.
#[derive(Debug, Default)]
pub struct Files {
    pub record: Option<RunRecord>,
    pub metrics: Vec<MetricsLine>,
    pub grids: BTreeSet<Step>,
    pub reals: bool,
    /// By step: digest of the weights, and the generation that wrote it.
    pub checkpoints: BTreeMap<Step, (String, Generation)>,
}

#[derive(Debug, Default)]
pub struct Store {
    pub runs: BTreeMap<String, Files>,
    /// Calls are tried on until then.
    pub down_until: u64,
    /// So many of the next calls fail for good.
    pub failing: u32,
}

#[derive(Debug)]
pub enum Job {
    Save { record: Box<RunRecord>, first: bool, acknowledge: bool },
    Metrics(Box<MetricsLine>),
    Rewind { step: Step, lineage: Generation },
    Grid { fence: Fence, kind: GridKind, step: Step },
    Commit(Box<CheckpointManifest>),
    Flush(Fence),
    Lines,
    Close,
}

/// Writes a run's files in order.
#[derive(Debug, Default)]
pub struct Writer {
    jobs: VecDeque<Job>,
    busy: bool,
    /// Read at the first need.
    content: Option<Vec<MetricsLine>>,
    /// The store lacks some of it.
    stale: bool,
    due: bool,
    lineage: Generation,
    failed: bool,
}

fn fence_of(record: &RunRecord) -> Fence {
    Fence { run: record.name.clone(), generation: record.generation }
}

impl World {
    pub fn store_is_down(&self) -> bool {
        self.now < self.store.down_until
    }

    pub fn write(&mut self, run: &str, job: Job) {
        if !self.coordinator.writers.contains_key(run) {
            let view = self.coordinator.cluster.run_view(run);
            let lineage = view.map_or(Generation(0), |view| view.record.lineage);
            self.coordinator.writers.insert(run.to_owned(), Writer { lineage, ..Writer::default() });
        }
        let Some(writer) = self.coordinator.writers.get_mut(run) else { return };
        writer.jobs.push_back(job);
        self.start_job(run);
    }

    /// Begins the next job; lines only go into memory.
    fn start_job(&mut self, run: &str) {
        let Some(writer) = self.coordinator.writers.get_mut(run).filter(|writer| !writer.busy) else {
            return;
        };
        let files = self.store.runs.entry(run.to_owned()).or_default();
        while let Some(Job::Metrics(_)) = writer.jobs.front() {
            let Some(Job::Metrics(line)) = writer.jobs.pop_front() else { return };
            writer.content.get_or_insert_with(|| files.metrics.clone()).push(*line);
            writer.stale = true;
        }
        let (life, run) = (self.coordinator.life, run.to_owned());
        if !writer.jobs.is_empty() {
            writer.busy = true;
            let slow = self.rng.one_in(40);
            let at = self.now + if slow { self.rng.within(100, 2_500) } else { self.rng.within(1, 30) };
            self.schedule(at, Ev::Stored { life, run });
        } else if writer.stale && !std::mem::replace(&mut writer.due, true) {
            self.schedule(self.now + LINES_MS, Ev::LinesDue { life, run });
        }
    }

    pub fn lines_due(&mut self, life: u32, run: &str) {
        if life != self.coordinator.life {
            return;
        }
        let Some(writer) = self.coordinator.writers.get_mut(run) else { return };
        writer.due = false;
        if writer.stale && !writer.failed {
            self.write(run, Job::Lines);
        }
    }

    /// A call has ended.
    pub fn stored(&mut self, life: u32, run: &str) {
        if life != self.coordinator.life || !self.coordinator.up {
            return;
        }
        if self.store_is_down() {
            let at = self.store.down_until + self.rng.within(1, 2_000);
            return self.schedule(at, Ev::Stored { life, run: run.to_owned() });
        }
        let Some(writer) = self.coordinator.writers.get_mut(run) else { return };
        let Some(job) = writer.jobs.pop_front() else { return };
        let fails = self.store.failing > 0 && !matches!(job, Job::Lines | Job::Close);
        self.store.failing -= u32::from(fails);
        self.stats.store_failures += u64::from(fails);
        let outcome = if fails { Err("the disk is full".to_owned()) } else { Ok(()) };
        let mut told = Vec::new();
        self.perform_job(run, job, outcome, &mut told);
        for event in told {
            self.apply(event);
        }
        if let Some(writer) = self.coordinator.writers.get_mut(run) {
            writer.busy = false;
        }
        self.start_job(run);
    }

    fn perform_job(&mut self, run: &str, job: Job, outcome: Result<(), String>, told: &mut Vec<Event>) {
        match job {
            Job::Save { record, first, acknowledge } => {
                let outcome = outcome.and_then(|()| self.save(&record, first));
                let (fence, reserved) = (fence_of(&record), record.generations_reserved);
                match outcome {
                    outcome if acknowledge => told.push(Event::RunSaved { fence, reserved, outcome }),
                    Ok(()) => {}
                    Err(message) => self.report_failure(run, message, told),
                }
            }
            Job::Metrics(_) => {}
            Job::Rewind { step, lineage } => {
                if let Some(writer) = self.coordinator.writers.get_mut(run) {
                    writer.lineage = lineage;
                }
                self.rewind(run, step);
                if let Err(message) = outcome {
                    self.report_failure(run, message, told);
                }
            }
            Job::Grid { fence, kind, step } => {
                if outcome.is_ok() {
                    self.save_grid(run, kind, step);
                    self.flush_lines(run, told);
                }
                told.push(Event::GridSettled { fence, kind, step, outcome });
            }
            Job::Commit(manifest) => {
                let fence = Fence { run: manifest.run.clone(), generation: manifest.generation };
                let mark =
                    CheckpointMark { step: manifest.step, weights_sha256: manifest.weights_sha256.clone() };
                self.note_commit(&manifest);
                let outcome = outcome.and_then(|()| {
                    self.flush_lines(run, told);
                    self.commit(&manifest)
                });
                told.push(Event::CheckpointSettled { fence, mark, outcome });
            }
            Job::Flush(fence) => {
                if outcome.is_ok() {
                    self.flush_lines(run, told);
                }
                told.push(Event::RunFlushed { fence, outcome });
            }
            Job::Lines | Job::Close => self.flush_lines(run, told),
        }
    }

    fn report_failure(&mut self, run: &str, message: String, told: &mut Vec<Event>) {
        let Some(writer) = self.coordinator.writers.get_mut(run) else { return };
        if !std::mem::replace(&mut writer.failed, true) {
            told.push(Event::StoreFailed { run: run.to_owned(), message });
        }
    }

    fn save(&mut self, record: &RunRecord, first: bool) -> Result<(), String> {
        let files = self.store.runs.entry(record.name.clone()).or_default();
        if first && files.record.as_ref().is_some_and(|present| present != record) {
            return Err("run.json exists already".to_owned());
        }
        files.record = Some(record.clone());
        Ok(())
    }

    fn rewind(&mut self, run: &str, step: Step) {
        let files = self.store.runs.entry(run.to_owned()).or_default();
        files.grids.retain(|&at| at <= step);
        let Some(writer) = self.coordinator.writers.get_mut(run) else { return };
        let content = writer.content.get_or_insert_with(|| files.metrics.clone());
        let kept = content.iter().take_while(|line| line.step <= step).count();
        writer.stale |= kept < content.len();
        content.truncate(kept);
    }

    fn save_grid(&mut self, run: &str, kind: GridKind, step: Step) {
        let files = self.store.runs.entry(run.to_owned()).or_default();
        match kind {
            GridKind::Generated => {
                files.grids.insert(step);
            }
            GridKind::Reals => files.reals = true,
        }
    }

    fn flush_lines(&mut self, run: &str, told: &mut Vec<Event>) {
        let files = self.store.runs.entry(run.to_owned()).or_default();
        let Some(writer) = self.coordinator.writers.get_mut(run).filter(|writer| writer.stale) else {
            return;
        };
        files.metrics = writer.content.clone().unwrap_or_default();
        writer.stale = false;
        let step = files.metrics.last().map_or(0, |line| line.step);
        told.push(Event::MetricsStored { run: run.to_owned(), step, lineage: writer.lineage });
        self.check_lines(run);
    }

    fn commit(&mut self, manifest: &CheckpointManifest) -> Result<(), String> {
        let files = self.store.runs.entry(manifest.run.clone()).or_default();
        match files.checkpoints.get(&manifest.step) {
            Some((weights, _)) if *weights == manifest.weights_sha256 => return Ok(()),
            Some((_, newer)) if *newer > manifest.generation => {
                return Err("it was written by a newer generation".into());
            }
            _ => {}
        }
        let written = (manifest.weights_sha256.clone(), manifest.generation);
        files.checkpoints.insert(manifest.step, written);
        Ok(())
    }

    /// The state in a checkpoint that a member was told to begin with.
    pub fn read_checkpoint(&mut self, run: &str, step: Step, past: u64) -> State {
        let files = self.store.runs.get(run);
        let Some((weights, _)) = files.and_then(|files| files.checkpoints.get(&step)) else {
            self.violated(&format!(
                "{run} is to begin with the checkpoint of step {step}, which does not exist"
            ));
        };
        let hash = u64::from_str_radix(weights, 16).unwrap_or(0);
        State { at: Position { step, phase: 0 }, hash, past }
    }

    /// The coordinator dies: the call that is under way may have landed, all later ones have not.
    pub fn abandon_writers(&mut self, only_acknowledged: bool) {
        let runs: Vec<String> = self.coordinator.writers.keys().cloned().collect();
        for run in runs {
            let lands = !only_acknowledged && !self.store_is_down() && self.rng.one_in(2);
            let Some(writer) = self.coordinator.writers.get_mut(&run) else { continue };
            if let Some(job) = writer.jobs.pop_front().filter(|_| lands && writer.busy) {
                self.perform_job(&run, job, Ok(()), &mut Vec::new());
            }
        }
        self.coordinator.writers.clear();
    }

    /// What a coordinator that starts finds.
    pub fn found_in_store(&self) -> Vec<Event> {
        let found = |(_, files): (&String, &Files)| {
            let record = files.record.clone()?;
            let newest = files.checkpoints.iter().next_back();
            let checkpoint =
                newest.map(|(&step, (weights, _))| CheckpointMark { step, weights_sha256: weights.clone() });
            let stored = if record.status.is_active() {
                let step = files.metrics.last().map_or(0, |line| line.step);
                Stored { step, grids: files.grids.clone(), reals: files.reals }
            } else {
                Stored::default()
            };
            Some(Event::RunRecovered { record: Box::new(record), checkpoint, stored })
        };
        self.store.runs.iter().filter_map(found).collect()
    }
}
