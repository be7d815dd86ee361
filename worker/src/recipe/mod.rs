//! Recipes: losses, phases and their order. A recipe turns a batch into updates of its networks.

mod dcgan;
mod lane;
mod lanes;
mod phase;
mod room;
mod update;

pub use dcgan::{Batch, Dcgan, DcganState};
pub use phase::{Phase, PhaseError, PhaseSums};
pub use update::Updater;
