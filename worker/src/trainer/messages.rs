//! What the trainer's thread is told, and what it tells.

use takuma_core::slots::SlotRange;
use takuma_data::DataError;
use takuma_proto::v1::run_ended;

use crate::checkpoint::CheckpointError;
use crate::collective::{CollectiveError, RingConfig};
use crate::torch::TorchError;
use crate::torch::cuda::CudaError;

/// A group to form.
#[derive(Debug, Clone)]
pub struct Seat {
    /// Peers, rank, generation and limits.
    pub ring: RingConfig,
    /// The own share of the slots.
    pub slots: SlotRange,
}

impl Seat {
    pub(super) fn generation(&self) -> u64 {
        self.ring.generation.0
    }
}

/// What the trainer is told.
#[derive(Debug)]
pub enum Command {
    /// Form this group now; the former one is over.
    Form(Seat),
    /// Change over to this group between two steps, when all members of both know of it.
    Next(Seat),
    /// Leave between two steps, when the members of this generation change over.
    Leave(u64),
}

/// What the trainer found out about its group.
#[derive(Debug)]
pub enum Note {
    /// The group stands.
    Formed {
        /// Its generation.
        generation: u64,
        /// From where it goes on: finished steps, phases of the next one.
        position: (u64, u32),
        /// Seconds since the former group broke.
        stalled_s: f64,
        /// Members that received the state from a peer.
        restored: u32,
    },
    /// The group broke; the state is kept for the next one.
    Broken {
        /// Its generation.
        generation: u64,
        /// Why.
        error: CollectiveError,
    },
    /// All is done, or stopped on request; the state is kept until the run is released.
    Ended {
        /// The group's generation.
        generation: u64,
        /// Completed or stopped.
        outcome: run_ended::Outcome,
        /// Finished steps.
        step: u64,
        /// Digest of the final weights; on rank 0 only.
        weights_sha256: String,
    },
    /// This worker cannot go on.
    Failed {
        /// The group's generation.
        generation: u64,
        /// Why.
        error: JobError,
    },
}

/// Why a trainer ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The exchange broke; a peer is suspect, not this worker.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// libtorch failed here.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// The GPU cannot be used here.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// As [`JobError::Torch`], in an operation of tch's.
    #[error("libtorch failed: {0}")]
    Tch(#[from] tch::TchError),
    /// A number that is none, equal on all ranks: nobody can go on.
    #[error("step {step}, phase {phase}: {what} is not finite; nothing of it was applied")]
    NotFinite {
        /// The step that was under way: 1 for the first.
        step: u64,
        /// "d", "g1" or "g2".
        phase: &'static str,
        /// The loss, or the first parameter with such a gradient.
        what: String,
    },
    /// Images cannot be had.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The state to continue from does not fit.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The group cannot have one state.
    #[error("{0}")]
    State(String),
    /// The last checkpoint could not be written.
    #[error("{0}")]
    Upload(String),
    /// A bug.
    #[error("the trainer's thread panicked: {0}")]
    Panicked(String),
}

/// What a thread panicked with, in words.
#[must_use]
pub fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}
