//! The worker's side of the coordinator: one session at a time, reconnecting for life.
//!
//! Knows no tensors: it loads what a run needs, starts the trainer's thread and carries messages.

mod load;
mod logs;
mod member;
mod session;

pub use logs::LogForwarder;
pub use session::{ControlError, Options, serve};
