//! What is kept of the state between two steps: a part of a grid, a checkpoint.
//!
//! It is taken when the state is that of a step's end, in the order of the device's work, and handed out when that step is
//! known to have gone well. So training does not wait for either.

use takuma_core::ids::Rank;

use super::messages::JobError;
use super::samples::Frame;
use super::thread::Trainer;
use crate::checkpoint::Snapshot;

/// Copies of the state after a step, as far as they are wanted.
pub(super) struct Picture {
    frame: Option<Frame>,
    snapshot: Option<Snapshot>,
}

impl Trainer {
    /// Copies what is wanted of the state after `step` finished steps.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn take_picture(&mut self, step: u64) -> Result<Picture, JobError> {
        let is_last = step == self.parts.target_steps;
        // The last step has a grid too: a run ends with a picture of what it became.
        let frame = if step.is_multiple_of(self.parts.config.sample_every) || is_last {
            self.parts.progress.enter("sampling");
            self.samples.take(&self.net, &self.exchange, step)?
        } else {
            None
        };
        // The last checkpoint is waited for, and taken where that is done.
        let snapshot = if !is_last && self.is_checkpoint_due(step) {
            self.checkpoint_overdue = false;
            self.parts.progress.enter("checkpoint");
            Some(Snapshot::take(&self.net, step)?)
        } else {
            None
        };
        Ok(Picture { frame, snapshot })
    }

    /// Whether this worker is to write a checkpoint after `step` finished steps: one of the period's, or one for one that
    /// may be lost.
    fn is_checkpoint_due(&self, step: u64) -> bool {
        let every = self.parts.config.checkpoint_every;
        let is_missed = self.checkpoint_overdue && self.parts.spool.committed_step() < step / every * every;
        self.exchange.collective().rank() == Rank(0) && (step.is_multiple_of(every) || is_missed)
    }

    /// Has the grid rendered and the checkpoint written, both in their own time.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn hand_out(&mut self, picture: Picture) -> Result<(), JobError> {
        if let Some(frame) = picture.frame {
            self.samples.show(frame)?;
        }
        let Some(snapshot) = picture.snapshot else { return Ok(()) };
        let (step, writer) = (snapshot.step, self.exchange.collective().generation());
        if !self.parts.uploader.offer(snapshot, writer) {
            tracing::warn!("no checkpoint at step {step}: the store is still busy with earlier ones");
        }
        Ok(())
    }
}
