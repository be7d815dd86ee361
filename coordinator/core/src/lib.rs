//! The decisions of takuma as pure functions and one pure state machine.
//!
//! Nothing here reads a clock, draws a random number, opens a socket or spawns a task: time,
//! randomness and the outcome of I/O come in as arguments. CI checks the dependency tree for it.
//!
//! * [`config`]: what a run is, validated.
//! * [`dataset`]: what a prepared dataset is; [`slots`]: which image feeds which slot at which step.
//! * [`noise`]: the counter-based generator behind noise, weights and shuffles.
//! * [`cluster`]: the coordinator's state machine; [`event`]: what goes in and comes out; [`membership`],
//!   [`run`], [`record`], [`names`], [`time`]: its parts; [`view`]: what people see of it.
//! * [`checkpoint`]: what a checkpoint's manifest says; [`layout`]: where objects lie in the store.

mod balance;
mod change;
pub mod checkpoint;
pub mod cluster;
pub mod config;
pub mod dataset;
mod directive;
pub mod event;
pub mod ids;
mod intake;
pub mod layout;
mod lifecycle;
mod losses;
mod means;
pub mod membership;
pub mod names;
pub mod noise;
mod not_finite;
pub mod record;
mod regroup;
mod requests;
mod reunion;
pub mod run;
mod shares;
pub mod slots;
mod stragglers;
pub mod time;
pub mod view;
