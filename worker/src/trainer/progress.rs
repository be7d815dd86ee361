//! [`Progress`]: what the rest of the process may know of the trainer, and the one thing it may ask.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Shared between the trainer's thread (writes), heartbeats and log lines (read).
#[derive(Debug)]
pub struct Progress {
    step: AtomicU64,
    stop: AtomicBool,
    has_state: AtomicBool,
    now: Mutex<Now>,
}

/// Where a trainer is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Now {
    /// "loading", "forming", "d", "g1", "g2", "sampling", "checkpoint", "parked" or "ended".
    pub phase: &'static str,
    /// Seconds of computing, data and exchange in the last finished step, and how long what was exchanged was on
    /// the link from the previous rank.
    pub last_step_s: [f64; 4],
}

impl Progress {
    /// A trainer that is loading, with `start_step` finished steps.
    #[must_use]
    pub fn new(start_step: u64) -> Self {
        Self {
            step: AtomicU64::new(start_step),
            stop: AtomicBool::new(false),
            has_state: AtomicBool::new(false),
            now: Mutex::new(Now { phase: "loading", last_step_s: [0.0; 4] }),
        }
    }

    /// Finished steps.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// Phase and times.
    #[must_use]
    pub fn now(&self) -> Now {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the group to stop after a step.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// A group goes on from `step` finished steps.
    pub(super) fn begin(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// The trainer has a state that a group could go on from.
    pub(super) fn has_state(&self) {
        self.has_state.store(true, Ordering::Relaxed);
    }

    /// Whether the trainer has a state that a group could go on from.
    #[must_use]
    pub fn is_stateful(&self) -> bool {
        self.has_state.load(Ordering::Relaxed)
    }

    pub(super) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self, phase: &'static str) {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).phase = phase;
    }

    pub(super) fn finish_step(&self, step: u64, last_step_s: [f64; 4]) {
        self.step.store(step, Ordering::Relaxed);
        self.now.lock().unwrap_or_else(PoisonError::into_inner).last_step_s = last_step_s;
    }
}
