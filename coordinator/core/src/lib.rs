//! The decisions of takuma as pure functions and one pure state machine.
//!
//! Nothing here reads a clock, draws a random number, opens a socket or spawns a task: time,
//! randomness and the outcome of I/O come in as arguments. CI checks the dependency tree for it.
//!
//! * [`config`]: what a run is, validated.
//! * [`dataset`]: what a prepared dataset is; [`slots`]: which image feeds which slot at which step.
//! * [`noise`]: the counter-based generator behind noise, weights and shuffles.
//! * [`checkpoint`]: what a checkpoint's manifest says; [`layout`]: where objects lie in the store.

pub mod checkpoint;
pub mod config;
pub mod dataset;
pub mod ids;
pub mod layout;
pub mod noise;
pub mod slots;
