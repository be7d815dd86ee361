//! [`Job`]: one worker's part of a run, from the first step to the last, on a thread of its own.

use std::sync::Arc;
use std::time::Instant;

use takuma_core::config::RunConfig;
use takuma_core::ids::Generation;
use takuma_proto::v1::{SampleTile, StepReport, run_ended, sample_tile};
use tch::Kind;

use super::exchange::Exchange;
use super::feed::Feed;
use super::progress::Progress;
use super::samples::{self, GRID_CELLS};
use crate::checkpoint::{CheckpointError, Loaded, Snapshot, Uploader, restore_into};
use crate::collective::CollectiveError;
use crate::recipe::{Dcgan, DcganState, IterationSums, PhaseError};
use crate::torch::TorchError;

/// Where the trainer's results go. Calls may block while the coordinator is slow to take them.
pub trait Reports: Send {
    /// One finished step (rank 0 only).
    fn step(&self, report: StepReport);
    /// This worker's part of a grid.
    fn tile(&self, tile: SampleTile);
}

/// What a worker trains, and with whom.
pub struct Job {
    /// Name of the run.
    pub run: String,
    /// The group's membership.
    pub generation: Generation,
    /// The run.
    pub config: RunConfig,
    /// Finished steps when the job starts.
    pub start_step: u64,
    /// Finished steps when it is done.
    pub target_steps: u64,
    /// Images and noise.
    pub feed: Feed,
    /// State to continue from.
    pub checkpoint: Option<Loaded>,
    /// Shared with heartbeats and the control thread.
    pub progress: Arc<Progress>,
    /// Takes checkpoints (used on rank 0).
    pub uploader: Uploader,
    /// Takes everything else.
    pub reports: Box<dyn Reports>,
}

/// How a job ended, if it did not fail.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Completed, or stopped on request.
    pub outcome: run_ended::Outcome,
    /// Finished steps.
    pub step: u64,
    /// Digest of the final weights; on rank 0 only.
    pub weights_sha256: String,
}

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The exchange broke; a peer is suspect, not this worker.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// libtorch failed here.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// The state to continue from does not fit.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The last checkpoint could not be written.
    #[error("{0}")]
    Upload(String),
}

impl From<PhaseError> for JobError {
    fn from(error: PhaseError) -> Self {
        match error {
            PhaseError::Exchange(error) => Self::Exchange(error),
            PhaseError::Torch(error) => Self::Torch(error),
        }
    }
}

/// Sums over the workers at the end of a step, in the order in which they travel.
struct Totals {
    losses: IterationSums,
    stop: bool,
}

impl Job {
    /// Trains to the end, to a stop request, or to an error.
    ///
    /// # Errors
    /// See [`JobError`]; whatever was applied before stays applied, nothing is applied in part.
    pub fn run(mut self, exchange: &Arc<Exchange>) -> Result<Outcome, JobError> {
        let state = DcganState::new(self.config.recipe, self.config.seed, Kind::Float);
        let mut net = Dcgan::new(&self.config, state, exchange)?;
        if let Some(loaded) = self.checkpoint.take() {
            restore_into(&mut net, &loaded.parts)?;
        } else {
            self.send_reals();
            self.send_samples(&net, exchange, 0);
        }
        let mut stopped = false;
        let mut step = self.start_step;
        while step < self.target_steps && !stopped {
            stopped = self.step(&mut net, exchange, step)?;
            step += 1;
            // The last step has a grid too: a run ends with a picture of what it became.
            if step.is_multiple_of(self.config.sample_every) || step == self.target_steps {
                self.send_samples(&net, exchange, step);
            }
            let ends = stopped || step == self.target_steps;
            if step.is_multiple_of(self.config.checkpoint_every) && !ends {
                self.offer_checkpoint(&net, exchange, step);
            }
        }
        let weights_sha256 = self.last_checkpoint(&net, exchange, step)?;
        let completed = step >= self.target_steps;
        let outcome = if completed { run_ended::Outcome::Completed } else { run_ended::Outcome::Stopped };
        Ok(Outcome { outcome, step, weights_sha256 })
    }

    /// One step: batch, three phases, numbers. Returns whether the group agreed to stop.
    fn step(&mut self, net: &mut Dcgan, exchange: &Arc<Exchange>, step: u64) -> Result<bool, JobError> {
        let begin = Instant::now();
        let batch = self.feed.batch(step);
        let data_s = begin.elapsed().as_secs_f64();
        let sums = net.iterate(&batch, |phase| self.progress.enter(phase))?;
        let totals = self.agree(exchange, sums)?;
        let step_s = begin.elapsed().as_secs_f64();
        let exchange_s = exchange.take_waited().as_secs_f64();
        let compute_s = (step_s - data_s - exchange_s).max(0.0);
        self.progress.finish_step(step + 1, [compute_s, data_s, exchange_s]);
        if exchange.collective().rank().0 == 0 {
            let IterationSums { d_loss, g_losses, d_right } = totals.losses;
            self.reports.step(StepReport {
                run: self.run.clone(),
                generation: self.generation.0,
                step: step + 1,
                epoch: self.feed.epoch_of(step),
                d_loss,
                g_loss: (g_losses[0] + g_losses[1]) / 2.0,
                d_acc: d_right / (2.0 * f64::from(self.config.global_batch)),
                step_s,
                compute_s,
                data_s,
                exchange_s,
            });
        }
        Ok(totals.stop)
    }

    /// Sums the step's numbers over the workers. A stop request rides along, so that all stop after
    /// the same step without asking the coordinator.
    fn agree(&self, exchange: &Exchange, sums: IterationSums) -> Result<Totals, CollectiveError> {
        let stop = f64::from(u8::from(self.progress.stop_requested()));
        let mut values = [sums.d_loss, sums.g_losses[0], sums.g_losses[1], sums.d_right, stop];
        exchange.wait(|collective| collective.all_reduce_f64(&mut values))?;
        let [d_loss, first, second, d_right, stop] = values;
        let losses = IterationSums { d_loss, g_losses: [first, second], d_right };
        Ok(Totals { losses, stop: stop > 0.0 })
    }

    fn send_samples(&self, net: &Dcgan, exchange: &Exchange, step: u64) {
        self.progress.enter("sampling");
        let collective = exchange.collective();
        let cells = samples::cells_of(collective.rank().0, collective.world());
        let pixels = samples::render(&net.state().generator, self.config.seed, cells);
        self.send_tile(sample_tile::Kind::Generated, step, cells.first, GRID_CELLS, pixels);
    }

    fn send_reals(&mut self) {
        let cells = GRID_CELLS.min(self.config.global_batch);
        let pixels = self.feed.raw_images(0, cells);
        self.send_tile(sample_tile::Kind::Reals, 0, self.feed.first_slot(), cells, pixels);
    }

    fn send_tile(&self, kind: sample_tile::Kind, step: u64, first_cell: u32, cells: u32, pixels: Vec<u8>) {
        if pixels.is_empty() {
            return;
        }
        let size = self.config.recipe.image_size();
        self.reports.tile(SampleTile {
            run: self.run.clone(),
            generation: self.generation.0,
            kind: kind.into(),
            step,
            first_cell,
            cells_total: cells,
            height: size,
            width: size,
            channels: 3,
            pixels,
        });
    }

    /// A periodic checkpoint: training does not wait for it.
    fn offer_checkpoint(&self, net: &Dcgan, exchange: &Exchange, step: u64) {
        if exchange.collective().rank().0 != 0 {
            return;
        }
        self.progress.enter("checkpoint");
        if !self.uploader.offer(Snapshot::take(net, step)) {
            tracing::warn!("no checkpoint at step {step}: the store is still busy with earlier ones");
        }
    }

    /// The checkpoint at the end or at a stop: the run ends when it lies in the store.
    fn last_checkpoint(&self, net: &Dcgan, exchange: &Exchange, step: u64) -> Result<String, JobError> {
        if exchange.collective().rank().0 != 0 {
            return Ok(String::new());
        }
        self.progress.enter("checkpoint");
        let finished = self.uploader.write_through(Snapshot::take(net, step)).map_err(JobError::Upload)?;
        Ok(finished.weights_sha256)
    }
}
