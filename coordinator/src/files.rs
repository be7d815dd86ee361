//! A run's files. One task per run owns them and writes them in order, so that nothing slow (the store, PNG
//! encoding, plots) is ever in the way of the owner of the state. What it did comes back as events.

mod commit;
mod fenced;
mod grids;
mod kept;
mod lines;
mod persist;
mod plot;
mod queue;
mod record;
mod records;
mod sweep;
mod tensorboard;

use std::time::Duration;

use serde::Serialize;
use takuma_core::event::{Event, Fence, GridKind, MetricsLine, RunEvent};
use takuma_core::layout;
use takuma_core::record::{CheckpointMark, RunRecord};
use takuma_core::time::Timestamp;
use takuma_store::Store;
use tokio::time::Instant;

use grids::{Grids, StoredGrid};
pub use kept::{kept_lines, lines};
use lines::LineFile;
use persist::{FIRST_PAUSE, Patience, persist};
use plot::{PlotFile, Point};
use queue::Queue;
pub use queue::{Job, Writer, WriterSetup};
use record::RecordFile;
pub use records::Records;
use records::SaveError;
use sweep::Sweeper;
use tensorboard::EventFile;

use crate::owner::Message;

/// Store outages are waited for so long before the run fails.
const OUTAGE: Duration = Duration::from_secs(900);
/// A submitter waits for the first write, so it is told sooner.
const OUTAGE_AT_SUBMIT: Duration = Duration::from_secs(20);
/// Scalars reach TensorBoard at every grid, and at most so late in between.
const TENSORBOARD_PERIOD: Duration = Duration::from_secs(30);
/// Grids that come faster share a file of TensorBoard.
const GRID_PERIOD: Duration = Duration::from_millis(250);
/// Grids that come faster do not each make small files whole.
const SMALL_PERIOD: Duration = Duration::from_secs(1);
/// Metrics of about 5000 steps.
const SMALL_BYTES: usize = 1 << 20;

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
    record: RecordFile,
    /// Read at the first need.
    growing: Option<Growing>,
    grids: Grids,
    /// Grids that lie in the store, and what is told of each when TensorBoard has it too.
    settled: Vec<StoredGrid>,
    tensorboard: EventFile,
    tensorboard_begun: Instant,
    tensorboard_stored: Option<Instant>,
    tensorboard_files: u64,
    plot: PlotFile,
    sweeper: Sweeper,
    failed: bool,
}

/// What the writer does next.
enum Wake {
    Job(Job),
    Stored(StoredGrid),
    Due,
}

impl RunFiles {
    fn new(setup: WriterSetup) -> Self {
        let store = setup.store.at(&layout::run_folder(&setup.run));
        let patience = Patience { outage: OUTAGE, first_pause: FIRST_PAUSE, hurry: setup.hurry.clone() };
        Self {
            grids: Grids::new(store.clone(), patience.clone(), setup.drawing),
            store,
            runs: setup.store.at(layout::RUNS_FOLDER),
            patience,
            record: RecordFile::new(setup.records.clone()),
            growing: None,
            settled: Vec::new(),
            tensorboard: EventFile::default(),
            tensorboard_begun: Instant::now(),
            tensorboard_stored: None,
            tensorboard_files: 0,
            plot: PlotFile::default(),
            sweeper: Sweeper::default(),
            failed: false,
            setup,
        }
    }

    async fn write(mut self, mut queue: Queue) {
        loop {
            let wake = self.wake(&mut queue).await;
            let ends = matches!(wake, Wake::Job(Job::Close));
            let result = match wake {
                Wake::Job(job) => self.work(job).await,
                Wake::Stored(grid) => {
                    self.grid_stored(grid).await;
                    Ok(())
                }
                Wake::Due => self.flush_due().await,
            };
            if let Err(error) = result {
                self.report_failure(error).await;
            }
            if ends {
                let (run, (most_jobs, most_bytes)) = (&self.setup.run, queue.most());
                tracing::debug!(run, most_jobs, most_bytes, "the run's files are written");
                return;
            }
        }
    }

    async fn wake(&mut self, queue: &mut Queue) -> Wake {
        let due = self.due();
        tokio::select! {
            biased;
            grid = self.grids.next() => Wake::Stored(grid),
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Wake::Due,
            job = queue.next() => Wake::Job(job),
        }
    }

    fn due(&self) -> Option<Instant> {
        let lines = self.growing.as_ref().map(|growing| [growing.events.due(), growing.metrics.due()]);
        let due = [self.tensorboard_due(), self.settled_due(), self.plot.due(), self.record.due()];
        // After a failure the run is over; only jobs are tried on.
        lines.into_iter().flatten().chain(due).flatten().min().filter(|_| !self.failed)
    }

    fn tensorboard_due(&self) -> Option<Instant> {
        (!self.tensorboard.is_empty()).then(|| self.tensorboard_begun + TENSORBOARD_PERIOD)
    }

    fn settled_due(&self) -> Option<Instant> {
        let at = self.tensorboard_stored.map_or_else(Instant::now, |at| at + GRID_PERIOD);
        (!self.settled.is_empty()).then_some(at)
    }

    async fn flush_due(&mut self) -> Result<(), String> {
        let now = Instant::now();
        self.flush_lines(|file| file.due().is_some_and(|at| at <= now)).await?;
        if self.settled_due().is_some_and(|at| at <= now) {
            self.settle().await;
        }
        if self.tensorboard_due().is_some_and(|at| at <= now) {
            self.flush_tensorboard().await?;
        }
        if self.plot.due().is_some_and(|at| at <= now) {
            self.flush_plot().await?;
        }
        if self.record.due().is_some_and(|at| at <= now) {
            let saved = self.record.flush(&self.patience).await;
            self.saved(saved).await?;
        }
        Ok(())
    }

    /// Jobs that somebody waits for report by themselves; the others fail the run.
    async fn work(&mut self, job: Job) -> Result<(), String> {
        match job {
            Job::Save { record, first, acknowledge } => {
                let fence = Fence { run: record.name.clone(), generation: record.generation };
                let reserved = record.generations_reserved;
                let outcome = self.save(record, first, acknowledge).await;
                if acknowledge {
                    self.tell(Event::RunSaved { fence, reserved, outcome }).await;
                    return Ok(());
                }
                outcome
            }
            Job::Event(event) => self.event(&event).await,
            Job::Metrics(line) => self.metrics(&line).await,
            Job::Rewind { step, lineage } => {
                self.grids_through().await;
                self.setup.lineage = lineage;
                self.rewind(step).await
            }
            Job::Grid(grid) => {
                while !self.grids.has_room() {
                    let stored = self.grids.next().await;
                    self.grid_stored(stored).await;
                }
                self.grids.begin(grid);
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
                // Grids and metrics first: whoever resumes from this checkpoint finds all up to it.
                self.grids_through().await;
                let outcome = match self.flush_lines_all().await {
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

    async fn save(&mut self, record: Box<RunRecord>, first: bool, at_once: bool) -> Result<(), String> {
        let saved = if first {
            let patience = Patience { outage: OUTAGE_AT_SUBMIT, ..self.patience.clone() };
            self.record.create(&patience, &record).await
        } else {
            self.record.save(&self.patience, record, at_once).await
        };
        self.saved(saved).await
    }

    async fn saved(&self, saved: Result<(), SaveError>) -> Result<(), String> {
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
            self.tensorboard_begun = Instant::now();
        }
        self.tensorboard.scalars(self.setup.owner.now().unix_s(), line.step, &scalars);
        self.plot.is_stale = true;
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
            self.plot.is_stale = true;
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

    /// A grid lies in the store. At a slow pace all that goes with it is written at once, else a few times a second.
    async fn grid_stored(&mut self, grid: StoredGrid) {
        if let Ok((size, png)) = &grid.outcome {
            if self.tensorboard.is_empty() {
                self.tensorboard_begun = Instant::now();
            }
            let tag = match grid.kind {
                GridKind::Generated => "samples",
                GridKind::Reals => "reals",
            };
            self.tensorboard.image(self.setup.owner.now().unix_s(), grid.step, tag, *size, png.to_vec());
        }
        self.settled.push(grid);
        if self.settled_due().is_some_and(|at| at <= Instant::now()) {
            self.settle().await;
        }
    }

    /// Writes what goes with the stored grids, and says that they are stored.
    async fn settle(&mut self) {
        let written = self.write_with_grids().await;
        for StoredGrid { fence, kind, step, outcome } in std::mem::take(&mut self.settled) {
            let outcome = outcome.map(|_| ()).and_then(|()| written.clone());
            self.tell(Event::GridSettled { fence, kind, step, outcome }).await;
        }
    }

    async fn write_with_grids(&mut self) -> Result<(), String> {
        self.flush_tensorboard().await?;
        let now = Instant::now();
        // Small files are whole at every grid; large ones keep to their period.
        let small = |file: &LineFile| file.size_bytes() < SMALL_BYTES && file.stored() + SMALL_PERIOD <= now;
        self.growing().await?;
        self.flush_lines(|file| small(file) || file.due().is_some_and(|at| at <= now)).await?;
        self.plot.is_wanted = true;
        if self.plot.due().is_some_and(|at| at <= now) { self.flush_plot().await } else { Ok(()) }
    }

    /// Waits for the grids that are under way.
    async fn grids_through(&mut self) {
        while !self.grids.is_empty() {
            let grid = self.grids.next().await;
            self.grid_stored(grid).await;
        }
        if !self.settled.is_empty() {
            self.settle().await;
        }
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
            self.plot.is_stale |= !points.is_empty();
            self.growing = Some(Growing { events, metrics, points });
        }
        self.growing.as_mut().ok_or_else(|| "the run's files are not open".to_owned())
    }

    /// Stores those of the two files that are to be.
    async fn flush_lines(&mut self, is_due: impl Fn(&LineFile) -> bool) -> Result<(), String> {
        let Some(growing) = &mut self.growing else { return Ok(()) };
        if is_due(&growing.events) {
            growing.events.flush(&self.runs, &self.patience).await?;
        }
        if is_due(&growing.metrics) && growing.metrics.flush(&self.runs, &self.patience).await? {
            let step = growing.points.last().map_or(0, |point| point.step);
            let (run, lineage) = (self.setup.run.clone(), self.setup.lineage);
            self.tell(Event::MetricsStored { run, step, lineage }).await;
        }
        Ok(())
    }

    async fn flush_lines_all(&mut self) -> Result<(), String> {
        self.flush_lines(|_| true).await?;
        self.flush_tensorboard().await
    }

    async fn flush_tensorboard(&mut self) -> Result<(), String> {
        self.tensorboard_stored = Some(Instant::now());
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
        self.grids_through().await;
        self.flush_lines_all().await?;
        let saved = self.record.flush(&self.patience).await;
        self.saved(saved).await?;
        self.flush_plot().await
    }

    async fn flush_plot(&mut self) -> Result<(), String> {
        let Some(growing) = self.growing.as_ref() else { return Ok(()) };
        let (store, patience) = (&self.store, &self.patience);
        self.plot.flush(&self.setup.title, &growing.points, self.setup.drawing, store, patience).await
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
