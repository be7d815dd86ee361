//! Training by whole steps: they are handed to the device, and their numbers taken in behind them.
//!
//! All members of a group hand over the same steps, since the devices sum with each other in the order in which they
//! are given their work. So whatever ends or interrupts that is decided by what all know alike: the run's
//! configuration, and the sums of the votes. Step k is handed over before the numbers of step k - 1 are looked at, so a
//! vote that is won in step s takes effect after step s + 1, which everybody has handed over by then.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use takuma_proto::v1::run_ended;
use tch::Device;

use super::messages::{Command, JobError};
use super::picture::Picture;
use super::thread::{End, Trainer};
use crate::collective::{Collective, CollectiveError};
use crate::recipe::{Outcome, Phase, PhaseError, Settled, Ticket, Votes};
use crate::supervise;

/// Steps under way at the same time: the device has its next step before the host has read the numbers of the
/// one before.
const STEPS_AHEAD: usize = 2;

/// A step under way.
struct Pending {
    step: u64,
    begun: Instant,
    data_s: f64,
    /// The generation that this worker said it was ready for.
    ready_for: u64,
    ticket: Ticket,
    /// What was copied behind it; none if it could not be handed over to its end.
    picture: Option<Picture>,
}

/// Steps that are handed over in one go, and those of them that are under way.
struct Pipeline<P> {
    pending: VecDeque<P>,
    next: u64,
    /// The first vote that was won, and the first step that is not handed over because of it.
    won: Option<(Votes, u64)>,
    /// A step could not be handed over to its end, so none behind it can be.
    is_cut_off: bool,
    /// Why this ends.
    failed: Option<JobError>,
}

impl<P> Pipeline<P> {
    /// Begins with step index `next`.
    fn new(next: u64) -> Self {
        Self { pending: VecDeque::new(), next, won: None, is_cut_off: false, failed: None }
    }

    /// Whether the next step may be handed over now, as far as the steps before it say.
    fn is_open(&self) -> bool {
        self.failed.is_none()
            && !self.is_cut_off
            && self.pending.len() < STEPS_AHEAD
            && self.won.is_none_or(|(_, first_not)| self.next < first_not)
    }

    fn push(&mut self, pending: P) {
        self.pending.push_back(pending);
        self.next += 1;
    }

    /// A vote was won in `step`. Another member may have handed over the step behind it before it knew, so all do.
    fn win(&mut self, step: u64, votes: Votes) {
        self.won.get_or_insert((votes, step + STEPS_AHEAD as u64));
    }

    /// The vote that was won, if all steps before it takes effect were handed over.
    fn verdict(&self) -> Option<Votes> {
        self.won.filter(|&(_, first_not)| self.next == first_not).map(|(votes, _)| votes)
    }
}

impl Trainer {
    /// Whether this worker could hand over whole steps in the group of `collective`; all members must.
    pub(super) fn can_run_ahead(&self, collective: &dyn Collective) -> bool {
        let sums_in_order = match self.parts.device {
            // What a GPU's stream waits for must be in that stream.
            Device::Cuda(_) => collective.world() == 1 || collective.on_device().is_some(),
            _ => true,
        };
        self.runs_ahead && sums_in_order && !self.parts.config.exact && !self.faults.are_inside_steps()
    }

    /// Whether `step` can be handed to the device whole: the same on all members.
    pub(super) fn may_run_ahead(&self, step: u64) -> bool {
        self.all_run_ahead && self.position() == (step, 0) && !self.is_passed_over(step)
    }

    /// Whether step index `step` makes no update.
    fn is_passed_over(&self, step: u64) -> bool {
        self.parts.passed_over.contains(&(step + 1))
    }

    /// Trains whole steps until something else is to be done, and leaves none under way.
    ///
    /// # Errors
    /// As a step's.
    pub(super) fn train_ahead(&mut self, commands: &Receiver<Command>) -> Result<Option<End>, JobError> {
        let next = self.position().0;
        let mut pipeline = Pipeline::new(next);
        tracing::info!(
            "whole steps are handed over from step {} on, in a group of {}",
            next + 1,
            self.exchange.collective().world()
        );
        loop {
            self.listen(commands);
            // Nothing is exchanged by a worker that is alone, so only this tells that its group was ended from outside.
            if self.exchange.is_alone()
                && let Err(error) = self.exchange.collective().barrier()
            {
                pipeline.failed.get_or_insert(error.into());
            }
            if self.goes_on(&pipeline) {
                self.parts.spool.pace();
                match self.hand_over(pipeline.next) {
                    Ok(pending) => {
                        pipeline.is_cut_off = pending.ticket.has_failed();
                        pipeline.push(pending);
                    }
                    Err(error) => pipeline.failed = Some(error),
                }
                continue;
            }
            let Some(oldest) = pipeline.pending.pop_front() else { return self.after(pipeline) };
            if let Err(error) = self.take_in_step(oldest, &mut pipeline) {
                // Nothing behind it was applied. It is waited for all the same: it has the step's memory.
                for behind in pipeline.pending {
                    drop(self.settled(behind.ticket));
                }
                return Err(error);
            }
        }
    }

    /// Whether the next step is to be handed over, as soon as there is room for it.
    fn goes_on(&self, pipeline: &Pipeline<Pending>) -> bool {
        // Whoever is told of a newer group leaves this one, which ends it for all.
        self.now.is_none()
            && pipeline.is_open()
            && pipeline.next < self.parts.target_steps
            && !self.is_passed_over(pipeline.next)
    }

    /// What follows when no step is under way any more.
    fn after(&mut self, pipeline: Pipeline<Pending>) -> Result<Option<End>, JobError> {
        let (verdict, next) = (pipeline.verdict(), pipeline.next);
        if let Some(error) = pipeline.failed {
            return Err(error);
        }
        // A vote whose last step cannot be handed over is cast again in that step.
        let Some(votes) = verdict else { return Ok(None) };
        if next >= self.parts.target_steps {
            return Ok(None);
        }
        if votes.stop > 0.0 {
            return Ok(Some(End::Done(run_ended::Outcome::Stopped)));
        }
        Ok(self.change(votes.ready_for))
    }

    fn hand_over(&mut self, step: u64) -> Result<Pending, JobError> {
        let begun = Instant::now();
        self.parts.progress.enter("step");
        let (mut input, _) = self.parts.feed.input(step)?;
        if self.faults.strike(step, Phase::D) {
            input = self.parts.feed.spoilt(input);
        }
        let ready_for = self.ready_for();
        input.votes.stop = f64::from(u8::from(self.parts.progress.stop_requested()));
        input.votes.ready_for = ready_for as f64;
        let data_s = begun.elapsed().as_secs_f64();
        let ticket = self.net.enqueue(input)?;
        let picture = if ticket.has_failed() { None } else { Some(self.take_picture(step + 1)?) };
        Ok(Pending { step, begun, data_s, ready_for, ticket, picture })
    }

    /// Waits for a step and does what follows it, as far as it was made.
    fn take_in_step(&mut self, pending: Pending, pipeline: &mut Pipeline<Pending>) -> Result<(), JobError> {
        let Pending { step, begun, data_s, ready_for, ticket, picture } = pending;
        let settled = self.settled(ticket)?;
        let votes = settled.votes;
        self.take_down(step, settled)?;
        // Steps overlap: one has taken what has passed since the one before was there.
        let since = self.settled_at.replace(Instant::now()).map_or(begun, |settled| settled.max(begun));
        self.finish_step(step, [since.elapsed().as_secs_f64(), data_s], votes.fed as u64)?;
        if let Some(picture) = picture {
            self.hand_out(picture)?;
        }
        let world = f64::from(self.exchange.collective().world());
        let is_change = ready_for > 0 && votes.ready_for == ready_for as f64 * world;
        if votes.stop > 0.0 || is_change {
            pipeline.win(step, votes);
        }
        Ok(())
    }

    fn settled(&self, ticket: Ticket) -> Result<Settled, JobError> {
        let Some(settled) = self.net.settle(ticket)? else {
            supervise::last_resort("the GPU does not come to the end of a step")
        };
        Ok(settled)
    }

    /// Takes down what became of a step's phases.
    ///
    /// # Errors
    /// Why the step was not made to its end; its phases before that are taken down.
    fn take_down(&mut self, step: u64, settled: Settled) -> Result<(), JobError> {
        for (phase, outcome) in Phase::ALL.into_iter().zip(settled.outcomes) {
            let made = match outcome {
                Outcome::Applied(sums) => Ok(sums),
                Outcome::NotFinite(what) => Err(what),
                Outcome::Frozen => unreachable!("the update that froze the others has ended the training"),
                Outcome::Ended => return Err(self.why_ended(settled.failed)),
            };
            self.made(step, phase, made)?;
        }
        settled.failed.map_or(Ok(()), |error| Err(error_of(error)))
    }

    /// Why a group's sums were not whole.
    fn why_ended(&self, failed: Option<PhaseError>) -> JobError {
        if let Some(error) = failed {
            return error_of(error);
        }
        // This worker's device may have heard of it from another's before its ring has; that says it, soon.
        match self.exchange.collective().barrier() {
            Err(error) => error.into(),
            Ok(()) => CollectiveError::Aborted {
                operation: "a step on the GPU".to_owned(),
                reason: "a member's GPU says that the group has ended, and its ring has not; the group is formed again"
                    .to_owned(),
            }
            .into(),
        }
    }
}

fn error_of(error: PhaseError) -> JobError {
    match error {
        PhaseError::Exchange(error) => error.into(),
        PhaseError::Torch(error) => error.into(),
        PhaseError::NotFinite { .. } => unreachable!("a step that is handed over looks at no number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps that a member hands over when a vote is won in step `won_in`. It waits for all steps under way before
    /// those of `waits_before`.
    fn handed_over(won_in: u64, waits_before: &[u64]) -> Vec<u64> {
        let mut pipeline = Pipeline::new(0);
        let mut handed_over = Vec::new();
        loop {
            let waits = waits_before.contains(&pipeline.next) && !pipeline.pending.is_empty();
            if pipeline.is_open() && !waits {
                handed_over.push(pipeline.next);
                pipeline.push(pipeline.next);
                continue;
            }
            let Some(step) = pipeline.pending.pop_front() else { break };
            // Who has won goes on winning until it takes effect.
            if step >= won_in {
                pipeline.win(step, Votes { step, stop: 1.0, ..Votes::default() });
            }
        }
        assert_eq!(pipeline.verdict().map(|votes| votes.step), Some(won_in), "the first vote counts");
        handed_over
    }

    #[test]
    fn members_that_wait_at_different_steps_hand_over_the_same_ones() {
        for won_in in 0..4 {
            let expected: Vec<u64> = (0..won_in + 2).collect();
            for waiting in 0..64u64 {
                let waits_before: Vec<u64> = (0..6).filter(|step| waiting >> step & 1 == 1).collect();
                assert_eq!(handed_over(won_in, &waits_before), expected, "waits before {waits_before:?}");
            }
        }
    }

    #[test]
    fn nothing_is_handed_over_behind_a_failure() {
        let mut pipeline = Pipeline::new(5);
        pipeline.push(5);
        assert!(pipeline.is_open());
        pipeline.is_cut_off = true;
        assert!(!pipeline.is_open());
        assert!(pipeline.verdict().is_none());
    }
}
