//! [`Writer`]: where a run's jobs go in, and how many may wait.
//!
//! Workers keep every result until it is stored, and stop training when they keep too many (see their spool). What waits
//! here is a copy of that, so these bounds are met only by a worker that does not keep to its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use takuma_core::checkpoint::{CheckpointManifest, Retention};
use takuma_core::event::{Fence, Grid, MetricsLine, RunEvent};
use takuma_core::ids::Generation;
use takuma_core::record::RunRecord;
use takuma_store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Records, RunFiles};
use crate::drawing::Drawing;
use crate::owner::Owner;

/// Jobs that may wait: metrics of more steps than a worker keeps, a hundred bytes each.
const MAX_JOBS: usize = 131_072;
/// Bytes of grids that may wait: several times what a worker keeps.
const MAX_BYTES: usize = 1 << 30;

/// What the writer of a run is asked to do.
#[derive(Debug)]
pub enum Job {
    /// Write `run.json`.
    Save { record: Box<RunRecord>, first: bool, acknowledge: bool },
    /// Append to `events.jsonl`.
    Event(RunEvent),
    /// Append to `metrics.jsonl`.
    Metrics(MetricsLine),
    /// Forget metrics and grids after this step.
    Rewind { step: u64, lineage: Generation },
    /// Store a grid and all that belongs to it.
    Grid(Grid),
    /// Commit a checkpoint.
    Commit(Box<CheckpointManifest>),
    /// Remove checkpoints that are kept no longer.
    Sweep { step: u64, generation: Generation, retention: Retention },
    /// Store everything, then say so.
    Flush(Fence),
    /// Store everything and end.
    Close,
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Grid(grid) => grid.pixels.len(),
            _ => 0,
        }
    }
}

/// What a writer needs to know.
#[derive(Debug)]
pub struct WriterSetup {
    /// The run's name.
    pub run: String,
    /// The plot's title.
    pub title: String,
    /// The store under which `runs/` lies.
    pub store: Store,
    /// What this coordinator knows of the runs' records there.
    pub records: Records,
    /// The step before the run's first one.
    pub began: u64,
    /// The generation that went on from the seed or a checkpoint last, whose metrics the store holds.
    pub lineage: Generation,
    /// Where events go.
    pub owner: Owner,
    /// Where grids and the plot are drawn.
    pub drawing: Drawing,
    /// Cancelled when the coordinator shuts down.
    pub hurry: CancellationToken,
    /// The run's writer before this one, if it may still be at work.
    pub previous: Option<JoinHandle<()>>,
}

/// How much waits, and the most that ever did.
#[derive(Debug, Default)]
struct Backlog {
    jobs: AtomicUsize,
    bytes: AtomicUsize,
    most_jobs: AtomicUsize,
    most_bytes: AtomicUsize,
}

impl Backlog {
    fn came(&self, bytes: usize) {
        let jobs = self.jobs.fetch_add(1, Ordering::Relaxed) + 1;
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.most_jobs.fetch_max(jobs, Ordering::Relaxed);
        self.most_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    fn went(&self, bytes: usize) {
        self.jobs.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Where a writer's jobs go in.
#[derive(Debug)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
    backlog: Arc<Backlog>,
    task: JoinHandle<()>,
}

impl Writer {
    /// Starts the task. It ends after [`Job::Close`]; a fault of its own fails the run.
    #[must_use]
    pub fn start(mut setup: WriterSetup) -> Self {
        let (jobs, queue) = mpsc::channel(MAX_JOBS);
        let backlog = Arc::<Backlog>::default();
        let queue = Queue { jobs: queue, backlog: Arc::clone(&backlog) };
        let task = tokio::spawn(async move {
            if let Some(previous) = setup.previous.take()
                && let Err(error) = previous.await
            {
                tracing::error!(run = setup.run, %error, "the run's former writer died");
            }
            RunFiles::new(setup).write(queue).await;
        });
        Self { jobs, backlog, task }
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// In words, when too many jobs wait or the task is gone.
    pub fn send(&self, job: Job) -> Result<(), String> {
        let bytes = job.bytes();
        if self.backlog.bytes.load(Ordering::Relaxed) + bytes > MAX_BYTES {
            return Err(format!("grids of {} MB wait for the store already", MAX_BYTES / 1_000_000));
        }
        // Counted first: the writer may take it at once.
        self.backlog.came(bytes);
        self.jobs.try_send(job).map_err(|error| {
            self.backlog.went(bytes);
            match error {
                mpsc::error::TrySendError::Full(_) => format!("{MAX_JOBS} writes wait for the store already"),
                mpsc::error::TrySendError::Closed(_) => "its writer has ended".to_owned(),
            }
        })
    }

    /// The task, after [`Job::Close`] was sent.
    #[must_use]
    pub fn into_task(self) -> JoinHandle<()> {
        self.task
    }
}

/// The writer's end.
#[derive(Debug)]
pub struct Queue {
    jobs: mpsc::Receiver<Job>,
    backlog: Arc<Backlog>,
}

impl Queue {
    /// The next job; [`Job::Close`] when nobody can send any more.
    pub async fn next(&mut self) -> Job {
        let Some(job) = self.jobs.recv().await else { return Job::Close };
        self.backlog.went(job.bytes());
        job
    }

    /// The most jobs that ever waited, and the most bytes of grids.
    #[must_use]
    pub fn most(&self) -> (usize, usize) {
        (self.backlog.most_jobs.load(Ordering::Relaxed), self.backlog.most_bytes.load(Ordering::Relaxed))
    }
}
