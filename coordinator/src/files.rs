//! A run's files. One task per run owns them and writes them in order, so that nothing slow (the store, PNG
//! encoding, plots) is ever in the way of the owner of the state. What it did comes back as events.

mod commit;
mod fenced;
mod kept;
mod lines;
mod persist;
mod plot;
mod records;
mod sweep;
mod tensorboard;

use std::time::Duration;

use serde::Serialize;
use takuma_core::checkpoint::{CheckpointManifest, Retention};
use takuma_core::event::{Event, Fence, Grid, GridKind, MetricsLine, RunEvent};
use takuma_core::ids::Generation;
use takuma_core::layout;
use takuma_core::record::{CheckpointMark, RunRecord};
use takuma_core::time::Timestamp;
use takuma_store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use kept::{kept_lines, lines};
use lines::LineFile;
use persist::{FIRST_PAUSE, Patience, persist};
use plot::Point;
pub use records::Records;
use records::SaveError;
use sweep::Sweeper;
use tensorboard::EventFile;

use crate::drawing::Drawing;
use crate::owner::{Message, Owner};

/// Jobs that may wait: ten minutes without a store at 20 steps a second. Small ones, but for the grids.
const MAX_JOBS: usize = 16_384;
/// Store outages are waited for so long before the run fails.
const OUTAGE: Duration = Duration::from_secs(900);
/// A submitter waits for the first write, so it is told sooner.
const OUTAGE_AT_SUBMIT: Duration = Duration::from_secs(20);
/// Scalars reach TensorBoard at every grid, and at most so late in between.
const TENSORBOARD_PERIOD: Duration = Duration::from_secs(30);
/// Metrics of about 5000 steps.
const SMALL_BYTES: usize = 1 << 20;

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

/// Where a writer's jobs go in.
#[derive(Debug)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
    task: JoinHandle<()>,
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

impl Writer {
    /// Starts the task. It ends after [`Job::Close`]; a fault of its own fails the run.
    #[must_use]
    pub fn start(mut setup: WriterSetup) -> Self {
        let (jobs, queue) = mpsc::channel(MAX_JOBS);
        let task = tokio::spawn(async move {
            if let Some(previous) = setup.previous.take()
                && let Err(error) = previous.await
            {
                tracing::error!(run = setup.run, %error, "the run's former writer died");
            }
            RunFiles::new(setup).write(queue).await;
        });
        Self { jobs, task }
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// In words, when too many jobs wait or the task is gone.
    pub fn send(&self, job: Job) -> Result<(), String> {
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => format!("{MAX_JOBS} writes wait for the store already"),
            mpsc::error::TrySendError::Closed(_) => "its writer has ended".to_owned(),
        })
    }

    /// The task, after [`Job::Close`] was sent.
    #[must_use]
    pub fn into_task(self) -> JoinHandle<()> {
        self.task
    }
}

/// Names of `events.jsonl`, in its order.
#[derive(Serialize)]
struct EventLine<'a> {
    at: f64,
    kind: &'a str,
    worker: &'a str,
    generation: u64,
    step: u64,
    message: &'a str,
}

struct Growing {
    events: LineFile,
    metrics: LineFile,
    points: Vec<Point>,
}

struct RunFiles {
    setup: WriterSetup,
    store: Store,
    /// Where the files that grow are written, by names that begin with the run's: see [`Records`] for the lock.
    runs: Store,
    patience: Patience,
    /// Read at the first need.
    growing: Option<Growing>,
    tensorboard: EventFile,
    tensorboard_stored: Instant,
    tensorboard_files: u64,
    /// The plot lacks points.
    plot_stale: bool,
    sweeper: Sweeper,
    failed: bool,
}

impl RunFiles {
    fn new(setup: WriterSetup) -> Self {
        Self {
            store: setup.store.at(&layout::run_folder(&setup.run)),
            runs: setup.store.at(layout::RUNS_FOLDER),
            patience: Patience { outage: OUTAGE, first_pause: FIRST_PAUSE, hurry: setup.hurry.clone() },
            setup,
            growing: None,
            tensorboard: EventFile::default(),
            tensorboard_stored: Instant::now(),
            tensorboard_files: 0,
            plot_stale: false,
            sweeper: Sweeper::default(),
            failed: false,
        }
    }

    async fn write(mut self, mut queue: mpsc::Receiver<Job>) {
        loop {
            let job = match self.due() {
                Some(due) => tokio::select! {
                    biased;
                    () = tokio::time::sleep_until(due) => None,
                    job = queue.recv() => Some(job.unwrap_or(Job::Close)),
                },
                None => Some(queue.recv().await.unwrap_or(Job::Close)),
            };
            let ends = matches!(job, Some(Job::Close));
            let result = match job {
                Some(job) => self.work(job).await,
                None => self.flush_lines(false).await,
            };
            if let Err(error) = result {
                self.report_failure(error).await;
            }
            if ends {
                return;
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        let lines = self.growing.as_ref().map(|growing| [growing.events.due(), growing.metrics.due()]);
        let tensorboard =
            (!self.tensorboard.is_empty()).then(|| self.tensorboard_stored + TENSORBOARD_PERIOD);
        // After a failure the run is over; only jobs are tried on.
        lines.into_iter().flatten().flatten().chain(tensorboard).min().filter(|_| !self.failed)
    }

    /// Jobs that somebody waits for report by themselves; the others fail the run.
    async fn work(&mut self, job: Job) -> Result<(), String> {
        match job {
            Job::Save { record, first, acknowledge } => {
                let fence = Fence { run: record.name.clone(), generation: record.generation };
                let reserved = record.generations_reserved;
                let outcome = self.save(&record, first).await;
                if acknowledge {
                    self.tell(Event::RunSaved { fence, reserved, outcome }).await;
                    return Ok(());
                }
                outcome
            }
            Job::Event(event) => self.event(&event).await,
            Job::Metrics(line) => self.metrics(&line).await,
            Job::Rewind { step, lineage } => {
                self.setup.lineage = lineage;
                self.rewind(step).await
            }
            Job::Grid(grid) => {
                let (fence, kind, step) = (grid.fence.clone(), grid.kind, grid.step);
                let outcome = self.grid(grid).await;
                self.tell(Event::GridSettled { fence, kind, step, outcome }).await;
                Ok(())
            }
            Job::Sweep { step, generation, retention } => {
                self.sweeper.sweep(&self.store, step, generation, &retention).await;
                Ok(())
            }
            Job::Commit(manifest) => {
                let fence = Fence { run: manifest.run.clone(), generation: manifest.generation };
                let mark =
                    CheckpointMark { step: manifest.step, weights_sha256: manifest.weights_sha256.clone() };
                // Metrics first: whoever resumes from this checkpoint finds every line up to it.
                let outcome = match self.flush_lines(true).await {
                    Ok(()) => commit::commit(&self.store, &self.patience, &manifest).await,
                    Err(error) => Err(error),
                };
                self.tell(Event::CheckpointSettled { fence, mark, outcome }).await;
                Ok(())
            }
            Job::Flush(fence) => {
                let outcome = self.flush_all().await;
                self.tell(Event::RunFlushed { fence, outcome }).await;
                Ok(())
            }
            Job::Close => self.flush_all().await,
        }
    }

    async fn save(&self, record: &RunRecord, first: bool) -> Result<(), String> {
        let saved = if first {
            let patience = Patience { outage: OUTAGE_AT_SUBMIT, ..self.patience.clone() };
            self.setup.records.create(&patience, record).await
        } else {
            self.setup.records.save(&self.patience, record).await
        };
        if let Err(SaveError::Lost(object)) = saved {
            if self.setup.owner.send(Message::StoreLost { object }).await.is_err() {
                tracing::debug!(run = self.setup.run, "the coordinator has ended before it heard of its end");
            }
            // Nothing is written any more; the owner ends this task with the others.
            return std::future::pending().await;
        }
        saved.map_err(|error| error.to_string())
    }

    async fn event(&mut self, event: &RunEvent) -> Result<(), String> {
        let line = EventLine {
            at: event.at.unix_s(),
            kind: event.kind,
            worker: &event.worker,
            generation: event.generation.0,
            step: event.step,
            message: &event.message,
        };
        self.growing().await?.events.push(&line);
        Ok(())
    }

    async fn metrics(&mut self, line: &MetricsLine) -> Result<(), String> {
        let growing = self.growing().await?;
        // A line that the former coordinator had under way may have come after this one had looked.
        if growing.points.last().is_some_and(|last| line.step <= last.step) {
            return Ok(());
        }
        growing.metrics.push(line);
        growing.points.push(Point { step: line.step, d_loss: line.d_loss, g_loss: line.g_loss });
        let scalars = [
            ("d_loss", line.d_loss),
            ("g_loss", line.g_loss),
            ("d_acc", line.d_acc),
            ("images_per_s", line.images_per_s),
        ];
        if self.tensorboard.is_empty() {
            self.tensorboard_stored = Instant::now();
        }
        self.tensorboard.scalars(self.setup.owner.now().unix_s(), line.step, &scalars);
        self.plot_stale = true;
        Ok(())
    }

    /// Forgets what lies after a step: the run goes on from there.
    async fn rewind(&mut self, step: u64) -> Result<(), String> {
        let growing = self.growing().await?;
        let kept = growing.points.partition_point(|point| point.step <= step);
        if kept < growing.points.len() {
            growing.points.truncate(kept);
            growing.metrics.truncate(kept);
            let now_s = self.setup.owner.now().unix_s();
            self.tensorboard.restart(now_s, step + 1);
            self.plot_stale = true;
        }
        self.remove_later_grids(step).await?;
        self.cut_tensorboard(step).await
    }

    async fn remove_later_grids(&self, step: u64) -> Result<(), String> {
        let store = &self.store;
        for entry in persist(&self.patience, || store.list(layout::SAMPLES_FOLDER)).await? {
            let later =
                entry.name.rsplit('/').next().and_then(layout::step_of_name).is_some_and(|at| at > step);
            if later {
                persist(&self.patience, || store.delete(&entry.name)).await?;
            }
        }
        Ok(())
    }

    /// A TensorBoard that reads the folder anew must not see steps twice.
    async fn cut_tensorboard(&self, step: u64) -> Result<(), String> {
        let store = &self.store;
        for entry in persist(&self.patience, || store.list(layout::TENSORBOARD_FOLDER)).await? {
            let file = persist(&self.patience, || store.get(&entry.name)).await?;
            match tensorboard::without_later(&file, step).map(bytes::Bytes::from) {
                None => {}
                Some(kept) if kept.is_empty() => {
                    persist(&self.patience, || store.delete(&entry.name)).await?
                }
                Some(kept) => persist(&self.patience, || store.put(&entry.name, kept.clone())).await?,
            }
        }
        Ok(())
    }

    async fn grid(&mut self, grid: Grid) -> Result<(), String> {
        let (kind, step) = (grid.kind, grid.step);
        let encode = move || {
            let picture = crate::samples::stitch(&grid);
            crate::samples::png(&picture)
                .map(|png| ((picture.height, picture.width), bytes::Bytes::from(png)))
        };
        let (size, png) = self.setup.drawing.draw(encode).await?;
        let (object, tag) = match kind {
            GridKind::Generated => (layout::sample_file(step), "samples"),
            GridKind::Reals => (layout::REALS_FILE.to_owned(), "reals"),
        };
        persist(&self.patience, || self.store.put(&object, png.clone())).await?;
        let now_s = self.setup.owner.now().unix_s();
        self.tensorboard.image(now_s, step, tag, size, png.to_vec());
        self.flush_tensorboard().await?;
        // Small files are whole at every grid; large ones keep to their period.
        let small = self.growing().await?.metrics.size_bytes() < SMALL_BYTES;
        self.flush_lines(small).await?;
        self.flush_plot().await
    }

    async fn growing(&mut self) -> Result<&mut Growing, String> {
        if self.growing.is_none() {
            let name = |file: &str| format!("{}/{file}", self.setup.run);
            let events = LineFile::open(&self.runs, &self.patience, name(layout::EVENTS_FILE)).await?;
            let mut metrics = LineFile::open(&self.runs, &self.patience, name(layout::METRICS_FILE)).await?;
            let loss = |value: Option<f64>| value.unwrap_or(f64::NAN);
            let kept = kept_lines(metrics.lines(), self.setup.began).into_iter();
            let points: Vec<Point> = kept
                .map(|line| Point { step: line.step, d_loss: loss(line.d_loss), g_loss: loss(line.g_loss) })
                .collect();
            let found = metrics.lines().count();
            if points.len() < found {
                let (run, kept) = (&self.setup.run, points.len());
                tracing::warn!(
                    run,
                    "{} is damaged after line {kept} of {found}; the rest is dropped",
                    name(layout::METRICS_FILE)
                );
            }
            metrics.truncate(points.len());
            // Whoever wrote these lines may have died before it drew them.
            self.plot_stale |= !points.is_empty();
            self.growing = Some(Growing { events, metrics, points });
        }
        self.growing.as_mut().ok_or_else(|| "the run's files are not open".to_owned())
    }

    async fn flush_lines(&mut self, all: bool) -> Result<(), String> {
        let now = Instant::now();
        let due = |at: Option<Instant>| all || at.is_some_and(|at| at <= now);
        if let Some(growing) = &mut self.growing {
            if due(growing.events.due()) {
                growing.events.flush(&self.runs, &self.patience).await?;
            }
            if due(growing.metrics.due()) && growing.metrics.flush(&self.runs, &self.patience).await? {
                let step = growing.points.last().map_or(0, |point| point.step);
                let (run, lineage) = (self.setup.run.clone(), self.setup.lineage);
                self.tell(Event::MetricsStored { run, step, lineage }).await;
            }
        }
        if all || self.tensorboard_stored + TENSORBOARD_PERIOD <= now {
            self.flush_tensorboard().await?;
        }
        Ok(())
    }

    async fn flush_tensorboard(&mut self) -> Result<(), String> {
        self.tensorboard_stored = Instant::now();
        if self.tensorboard.is_empty() {
            return Ok(());
        }
        let records = bytes::Bytes::from(self.tensorboard.take());
        let Timestamp(now_ms) = self.setup.owner.now();
        // TensorBoard reads by name: time first, then a number for files of one millisecond.
        let number = self.tensorboard_files;
        self.tensorboard_files += 1;
        let folder = layout::TENSORBOARD_FOLDER;
        let object = format!("{folder}/events.out.tfevents.{now_ms:013}.{number:06}.takuma");
        persist(&self.patience, || self.store.put(&object, records.clone())).await
    }

    async fn flush_all(&mut self) -> Result<(), String> {
        self.flush_lines(true).await?;
        self.flush_plot().await
    }

    async fn flush_plot(&mut self) -> Result<(), String> {
        let Some(growing) = self.growing.as_ref().filter(|_| self.plot_stale) else { return Ok(()) };
        let (title, points) = (self.setup.title.clone(), growing.points.clone());
        let drawn = self.setup.drawing.draw(move || plot::draw(&title, &points)).await?;
        let png = bytes::Bytes::from(drawn);
        persist(&self.patience, || self.store.put(layout::PLOT_FILE, png.clone())).await?;
        self.plot_stale = false;
        Ok(())
    }

    async fn report_failure(&mut self, message: String) {
        tracing::error!(run = self.setup.run, error = message, "the run's files cannot be written");
        if !self.failed {
            self.failed = true;
            self.tell(Event::StoreFailed { run: self.setup.run.clone(), message }).await;
        }
    }

    async fn tell(&self, event: Event) {
        // An owner that is gone has no use for the news.
        if self.setup.owner.send(Message::Event(event)).await.is_err() {
            tracing::debug!(run = self.setup.run, "the coordinator has ended before its writer");
        }
    }
}
