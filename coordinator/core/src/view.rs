//! What people see of the cluster: views and plans, computed from the state, changing nothing.

use crate::cluster::Cluster;
use crate::event::{MetricsLine, Refusal, SessionId, StepTimes, Submission};
use crate::membership::{Leaving, Worker};
use crate::record::{RunRecord, RunStatus};
use crate::run::{Means, Run};
use crate::slots::SlotRange;
use crate::time::Timestamp;

/// A run, as lists and `run show` tell it.
#[derive(Debug, Clone)]
pub struct RunView {
    /// The run's state.
    pub record: RunRecord,
    /// Training time so far.
    pub elapsed_s: f64,
    /// Newest metrics since the run was begun or resumed.
    pub last: Option<MetricsLine>,
    /// Recent means.
    pub means: Means,
    /// Seconds to the end at the recent pace; only while it trains.
    pub eta_s: Option<f64>,
    /// 0-based epoch of the last finished step.
    pub epoch: u64,
    /// 1 = next, 0 = not in the queue.
    pub queue_position: u32,
    /// In words, while queued.
    pub waiting_for: String,
}

/// A worker, as `worker ls` tells it.
#[derive(Debug, Clone)]
pub struct WorkerView {
    /// Its name.
    pub name: String,
    /// Machine.
    pub host: String,
    /// Process.
    pub pid: u32,
    /// "cpu", "cuda:0".
    pub device: String,
    /// Compute threads.
    pub threads: u32,
    /// "idle", "preparing", "joining", "training", "leaving", "drained", "lost".
    pub status: &'static str,
    /// Name of its run, or empty.
    pub run: String,
    /// Its place in the group.
    pub rank: Option<u32>,
    /// Its share of the slots.
    pub slots: Option<SlotRange>,
    /// Last finished step.
    pub step: u64,
    /// Of that step.
    pub times: StepTimes,
    /// Since it came.
    pub connected_s: f64,
    /// Since it was heard of.
    pub heartbeat_age_s: f64,
}

/// What a run will do.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Members it would get now, or wait for.
    pub workers: u32,
    /// Their shares.
    pub slots_per_worker: Vec<u32>,
    /// Measured on the last run of this recipe with as many workers.
    pub eta_s: Option<f64>,
    /// Workers without a run now.
    pub workers_idle: u32,
    /// Runs before it, the active one included.
    pub runs_ahead: u32,
}

impl Cluster {
    /// Every run, newest first.
    #[must_use]
    pub fn run_views(&self) -> Vec<RunView> {
        let mut runs: Vec<&Run> = self.runs.values().filter(|run| run.submitter.is_none()).collect();
        runs.sort_by(|a, b| (b.record.created, &b.record.name).cmp(&(a.record.created, &a.record.name)));
        runs.into_iter().map(|run| self.view(run)).collect()
    }

    /// One run, by its full name.
    #[must_use]
    pub fn run_view(&self, name: &str) -> Option<RunView> {
        self.runs.get(name).map(|run| self.view(run))
    }

    /// Where a run stands, by its full name.
    #[must_use]
    pub fn run_status(&self, name: &str) -> Option<RunStatus> {
        self.runs.get(name).map(|run| run.record.status)
    }

    /// The run that workers are busy with.
    #[must_use]
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// Number of connected workers.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.members.len()
    }

    /// Name of a connected worker.
    #[must_use]
    pub fn worker_name(&self, session: SessionId) -> Option<String> {
        self.members.get(session).map(|worker| worker.name.clone())
    }

    /// Connected workers in the order in which they came, then those lost lately.
    #[must_use]
    pub fn worker_views(&self, now: Timestamp) -> Vec<WorkerView> {
        let here = self.members.iter().map(|(session, worker)| {
            let fence = worker.assigned.as_ref();
            let run = fence.and_then(|fence| self.runs.get(&fence.run));
            let group = run.and_then(|run| run.group.as_ref());
            let rank = group.and_then(|group| group.rank_of(session));
            let status = match (run.map(|run| run.record.status), worker.leaving()) {
                (None, None) => "idle",
                (None, Some(Leaving::Drained)) => "drained",
                (_, Some(_)) => "leaving",
                (Some(RunStatus::Preparing), None) => "preparing",
                (Some(_), None) if rank.is_none() => "joining",
                (Some(_), None) => "training",
            };
            let slots = group.zip(rank).map(|(group, rank)| group.members[rank].slots);
            let rank = rank.map(|rank| rank as u32);
            WorkerView { status, rank, slots, ..self.worker_view(now, worker) }
        });
        let gone = self
            .members
            .lost()
            .map(|gone| WorkerView { status: "lost", ..self.worker_view(now, &gone.worker) });
        here.chain(gone).collect()
    }

    /// What a submission would do now.
    ///
    /// # Errors
    /// What a real submission would be refused for.
    pub fn plan(&self, submission: &Submission) -> Result<(RunView, Plan), Refusal> {
        let mut record = self.record_for(submission)?;
        record.id.clear();
        let idle = self.idle().count() as u32;
        let available = if self.active.is_some() { self.members.len() as u32 } else { idle };
        let most = record.config.most_workers();
        let workers = record.config.workers.unwrap_or(available.clamp(1, most));
        record.workers = workers;
        let plan = Plan {
            workers,
            slots_per_worker: record.config.shares(workers).iter().map(|range| range.count).collect(),
            eta_s: self.measured_pace_s(&record).map(|pace_s| pace_s * record.target_steps as f64),
            workers_idle: idle,
            runs_ahead: self.queue.len() as u32 + u32::from(self.active.is_some()),
        };
        Ok((self.view(&Run::new(record, None)), plan))
    }

    /// The plan of a run that was just submitted.
    #[must_use]
    pub fn plan_of(&self, name: &str) -> Option<Plan> {
        let record = &self.runs.get(name)?.record;
        let idle = self.idle().count() as u32;
        let most = record.config.most_workers();
        let available = (self.members.len() as u32).clamp(1, most);
        let workers = if record.status.is_active() {
            record.workers
        } else {
            record.config.workers.unwrap_or(available)
        };
        let position = self.queue.iter().position(|queued| queued == name).unwrap_or(0) as u32;
        let others = self.active.as_deref().is_some_and(|active| active != name);
        Some(Plan {
            workers,
            slots_per_worker: record.config.shares(workers.max(1)).iter().map(|range| range.count).collect(),
            eta_s: self.measured_pace_s(record).map(|pace_s| pace_s * record.target_steps as f64),
            workers_idle: idle,
            runs_ahead: position + u32::from(others),
        })
    }

    fn measured_pace_s(&self, record: &RunRecord) -> Option<f64> {
        let alike = |other: &&RunRecord| {
            let (a, b) = (&other.config, &record.config);
            (a.recipe, a.global_batch, other.workers) == (b.recipe, b.global_batch, record.workers.max(1))
        };
        let records = self.runs.values().map(|run| &run.record);
        records.filter(alike).filter(|other| other.pace_s.is_some()).max_by_key(|other| other.queued)?.pace_s
    }

    fn view(&self, run: &Run) -> RunView {
        let record = &run.record;
        let position = self.queue.iter().position(|name| *name == record.name);
        let training = matches!(record.status, RunStatus::Running | RunStatus::Stopping);
        let left = record.target_steps.saturating_sub(record.step) as f64;
        RunView {
            record: record.clone(),
            elapsed_s: run.elapsed_ms(self.now) as f64 / 1000.0,
            last: run.last.clone(),
            means: run.means,
            eta_s: run.means.pace_s.filter(|_| training).map(|pace_s| pace_s * left),
            epoch: record.step.saturating_sub(1) / record.dataset.steps_per_epoch.max(1),
            queue_position: position.map_or(0, |index| index as u32 + 1),
            waiting_for: position.map_or(String::new(), |index| self.waiting_for(run, index)),
        }
    }

    fn waiting_for(&self, run: &Run, index: usize) -> String {
        if index > 0 {
            return format!("{index} {} ahead in the queue", if index == 1 { "run" } else { "runs" });
        }
        if let Some(active) = &self.active {
            return format!("run {active} to end");
        }
        let waits = run.record.status == RunStatus::Waiting;
        let wanted = run.record.config.workers.filter(|_| !waits).unwrap_or(1);
        let workers = if wanted == 1 { "worker" } else { "workers" };
        match self.members.len() {
            0 => format!("{wanted} {workers} (none is connected)"),
            1 => format!("{wanted} {workers} (1 is connected)"),
            here => format!("{wanted} {workers} ({here} are connected)"),
        }
    }

    fn worker_view(&self, now: Timestamp, worker: &Worker) -> WorkerView {
        let progress = worker.progress.as_ref();
        WorkerView {
            name: worker.name.clone(),
            host: worker.hello.host.clone(),
            pid: worker.hello.pid,
            device: worker.hello.device.clone(),
            threads: worker.hello.threads,
            status: "idle",
            run: worker.assigned.as_ref().map_or(String::new(), |fence| fence.run.clone()),
            rank: None,
            slots: None,
            step: progress.map_or(0, |progress| progress.step),
            times: progress.map_or(StepTimes::default(), |progress| progress.times),
            connected_s: now.since_ms(worker.connected) as f64 / 1000.0,
            heartbeat_age_s: now.since_ms(worker.heard()) as f64 / 1000.0,
        }
    }
}
