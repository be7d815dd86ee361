//! Recipes: losses, phases and their order. A recipe turns a batch into updates of its networks.

mod ahead;
mod dcgan;
mod lane;
mod lanes;
mod phase;
mod room;
mod update;

pub use ahead::{Images, Outcome, Settled, StepInput, Ticket, Votes};
pub use dcgan::{Batch, Dcgan, DcganState};
pub use lanes::LaneForm;
pub use phase::{Phase, PhaseError, PhaseSums};
pub use update::Updater;
