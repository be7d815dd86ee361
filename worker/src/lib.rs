//! takuma's worker: trains its share of every batch and exchanges gradients with its peers.
//!
//! * [`control`]: the session with the coordinator; loads a run and starts its trainer.
//! * [`trainer`]: the step loop. [`recipe`]: losses and phases. [`model`]: the networks.
//! * [`collective`]: sums over workers. [`checkpoint`]: state to the store and back.
//! * [`device`]: processor or GPU. [`supervise`]: the parent of a worker whose GPU may hang.
//! * [`torch`]: what takuma needs of libtorch and tch lacks.

pub mod checkpoint;
pub mod collective;
pub mod control;
pub mod device;
pub mod model;
pub mod recipe;
pub mod supervise;
pub mod torch;
pub mod trainer;

/// The libtorch that this worker is built against.
pub const LIBTORCH_VERSION: &str = "2.11.0";
