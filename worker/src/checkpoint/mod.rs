//! Checkpoints: what is in them, and how they come and go.
//!
//! A [`Snapshot`] is a copy taken between two steps; [`Uploader`] writes it to the store while training
//! goes on, and the coordinator commits it by its manifest. [`restore`] is the way back.

mod restore;
mod snapshot;
mod upload;

pub use restore::{CheckpointError, Loaded, load};
pub use snapshot::{Snapshot, network_tensors, restore_into, restore_network};
pub use upload::{Finished, Uploader};
