//! Training of a worker that is alone on a GPU: whole steps under way, their numbers taken in behind them.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use takuma_proto::v1::run_ended;

use super::messages::{Command, JobError};
use super::thread::{End, Trainer};
use crate::recipe::{Outcome, Phase, Ticket};
use crate::supervise;

/// Steps under way at the same time: the device has its next step before the host has read the numbers of the
/// one before.
const STEPS_AHEAD: usize = 2;

/// A step under way.
struct Pending {
    step: u64,
    fed: u64,
    begun: Instant,
    data_s: f64,
    ticket: Ticket,
}

impl Trainer {
    /// Whether `step` can be handed to the device whole.
    pub(super) fn may_run_ahead(&self, step: u64) -> bool {
        self.runs_ahead
            && self.exchange.is_alone()
            && !self.parts.config.exact
            && self.position() == (step, 0)
            && !self.parts.passed_over.contains(&(step + 1))
            && !self.faults.are_between_phases()
    }

    /// Trains whole steps until something else is to be done, and leaves none under way.
    ///
    /// # Errors
    /// As a step's.
    pub(super) fn train_ahead(&mut self, commands: &Receiver<Command>) -> Result<Option<End>, JobError> {
        let mut pending = VecDeque::new();
        let first = self.position().0;
        let mut next = first;
        loop {
            self.listen(commands);
            // Nothing is exchanged here, so only this tells that the group was ended from outside.
            let over = self.exchange.collective().barrier().err();
            let is_wanted = self.now.is_none() && self.ready_for() == 0 && next < self.parts.target_steps;
            let stops = self.parts.progress.stop_requested();
            let goes_on =
                is_wanted && !stops && over.is_none() && !self.parts.passed_over.contains(&(next + 1));
            if goes_on && (pending.is_empty() || !self.is_boundary(next)) {
                if next == first {
                    tracing::info!("alone, so whole steps are handed over from step {} on", first + 1);
                }
                self.parts.spool.pace();
                pending.push_back(self.hand_over(next)?);
                next += 1;
            }
            let is_full = pending.len() == STEPS_AHEAD || !goes_on || self.is_boundary(next);
            if is_full && let Some(oldest) = pending.pop_front() {
                self.take_in_step(oldest)?;
            }
            if pending.is_empty() && !goes_on {
                if let Some(error) = over {
                    return Err(error.into());
                }
                let ended = stops && next < self.parts.target_steps;
                return Ok(ended.then_some(End::Done(run_ended::Outcome::Stopped)));
            }
        }
    }

    /// Whether something is to be done with the state after `steps` finished steps, before the next one.
    fn is_boundary(&self, steps: u64) -> bool {
        let config = &self.parts.config;
        self.is_checkpoint_missed(steps)
            || steps.is_multiple_of(config.sample_every)
            || steps.is_multiple_of(config.checkpoint_every)
    }

    fn hand_over(&mut self, step: u64) -> Result<Pending, JobError> {
        let begun = Instant::now();
        self.parts.progress.enter("step");
        let (mut input, fed) = self.parts.feed.input(step)?;
        if self.faults.strike(step, Phase::D) {
            input = self.parts.feed.spoilt(input);
        }
        let data_s = begun.elapsed().as_secs_f64();
        let ticket = self.net.enqueue(input)?;
        Ok(Pending { step, fed, begun, data_s, ticket })
    }

    /// Waits for a step and does what follows it.
    fn take_in_step(&mut self, pending: Pending) -> Result<(), JobError> {
        let Pending { step, fed, begun, data_s, ticket } = pending;
        let Some(outcomes) = self.net.settle(ticket)? else {
            supervise::last_resort("the GPU does not come to the end of a step");
        };
        for (phase, outcome) in Phase::ALL.into_iter().zip(outcomes) {
            let made = match outcome {
                Outcome::Applied(sums) => Ok(sums),
                Outcome::NotFinite(what) => Err(what),
                Outcome::Frozen => unreachable!("the update that froze the others has ended the training"),
            };
            self.made(step, phase, made)?;
        }
        // Steps overlap: one has taken what has passed since the one before was there.
        let since = self.settled_at.replace(Instant::now()).map_or(begun, |settled| settled.max(begun));
        self.finish_step(step, [since.elapsed().as_secs_f64(), data_s], fed)
    }
}
