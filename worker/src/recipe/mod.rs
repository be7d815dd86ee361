//! Recipes: losses, phases and their order. A recipe turns a batch into updates of its networks.

mod dcgan;
mod update;

pub use dcgan::{Batch, Dcgan, DcganState, IterationSums};
pub use update::{PhaseError, Updater};
