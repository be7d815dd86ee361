//! [`Trainer`]: one worker's part of a run, on a thread of its own, through however many groups.
//!
//! The thread parks until it is told of a group, forms it with its peers, trains until the run ends, the group
//! changes or a link breaks, and parks again with its state. What it finds out goes into the [`Spool`]; what it
//! is told comes through [`Command`]s.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use takuma_core::config::{OnNan, RunConfig};
use takuma_core::ids::{Generation, Rank};
use takuma_proto::v1::{StepReport, run_ended};
use tch::Device;

use super::agree::{AgreeError, Agreement, Progressed, agree};
use super::exchange::Exchange;
use super::fault::Faults;
use super::feed::Feed;
use super::meet::Meeting;
use super::messages::{Command, JobError, Note, Seat};
use super::progress::Progress;
use super::samples::Samples;
use super::spool::Spool;
use super::stopper::Stopper;
use crate::checkpoint::{Loaded, Snapshot, Uploader, restore_into};
use crate::collective::{Collective, CollectiveError, Loopback, Ring, RingListener};
use crate::device;
use crate::model::Arithmetic;
use crate::recipe::{Batch, Dcgan, DcganState, LaneForm, Phase, PhaseError, PhaseSums};

/// Silence of a neighbour's data is borne for so many times the usual step, within these limits: a
/// neighbour that is behind computes, one that is stuck does not come back.
const STEPS_OF_SILENCE: f64 = 20.0;
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Steps after which the usual step is known.
const STEPS_TO_KNOW: u64 = 5;
/// After ten steps without any update the weights themselves have left the numbers, and nothing more will come.
const MAX_SKIPPED_PHASES_IN_A_ROW: u32 = 10 * Phase::ALL.len() as u32;

/// Set by tests: a CPU takes whole steps at once like a GPU does.
const WHOLE_STEPS_VARIABLE: &str = "TAKUMA_WHOLE_STEPS";
/// Set by tests: in exact mode a CPU computes all lanes in one graph like a GPU does.
const LANES_TOGETHER_VARIABLE: &str = "TAKUMA_LANES_TOGETHER";

/// What a trainer is made of.
pub struct Parts {
    /// What computes.
    pub device: Device,
    /// The run.
    pub config: RunConfig,
    /// Finished steps when the run is done.
    pub target_steps: u64,
    /// Steps that make no update: 1 for the first.
    pub passed_over: BTreeSet<u64>,
    /// Images and noise.
    pub feed: Feed,
    /// State to begin with; none = drawn from the seed, or a peer's.
    pub checkpoint: Option<Loaded>,
    /// The state comes from a peer.
    pub joins: bool,
    /// Shared with heartbeats and the control side.
    pub progress: Arc<Progress>,
    /// Takes checkpoints (used on rank 0).
    pub uploader: Uploader,
    /// Takes everything else.
    pub spool: Spool,
    /// Takes what became of the group.
    pub notes: tokio::sync::mpsc::UnboundedSender<Note>,
    /// Ends a group from outside.
    pub stopper: Stopper,
    /// Where peers come in.
    pub listener: Arc<RingListener>,
}

/// See the module.
pub struct Trainer {
    pub(super) parts: Parts,
    pub(super) net: Dcgan,
    pub(super) exchange: Arc<Exchange>,
    meeting: Meeting,
    /// Of the device, in exact mode; else empty.
    model: String,
    /// Whole steps are handed to the device where that is possible; see [`Trainer::train_ahead`].
    pub(super) runs_ahead: bool,
    /// All members of the group do that.
    pub(super) all_run_ahead: bool,
    /// When the numbers of the newest such step came.
    pub(super) settled_at: Option<Instant>,
    /// `None` until there is state.
    progressed: Option<Progressed>,
    pub(super) samples: Samples,
    /// Told, and not taken up yet: a group to form now, one to change over to, one to leave before.
    pub(super) now: Option<Seat>,
    next: Option<Seat>,
    leaves: Option<u64>,
    /// When the former group broke.
    broken_since: Option<Instant>,
    /// After a loss the newest checkpoint may have been lost with its writer.
    pub(super) checkpoint_overdue: bool,
    was_rank_0: bool,
    step_s: f64,
    steps_here: u64,
    /// Ordered by a test.
    pub(super) faults: Faults,
}

/// How training in one group ended, if it did not fail.
pub(super) enum End {
    Done(run_ended::Outcome),
    Changed(Seat),
    Left,
}

impl Trainer {
    /// Builds the networks and brings them to their state.
    ///
    /// # Errors
    /// libtorch's, or a checkpoint that does not fit.
    pub fn new(mut parts: Parts) -> Result<Self, JobError> {
        device::enter(parts.device, &parts.config)?;
        let exchange = Exchange::new();
        let arithmetic = Arithmetic::of(parts.config.precision, parts.device);
        let state = DcganState::new(parts.config.recipe, parts.config.seed, arithmetic);
        let is_together = std::env::var_os(LANES_TOGETHER_VARIABLE).is_some();
        let form = if is_together { LaneForm::Together } else { LaneForm::of(parts.device) };
        if parts.config.exact && form == LaneForm::Together {
            tracing::info!("exact mode: all lanes in one graph");
        }
        let mut net = Dcgan::with_lanes(&parts.config, state, &exchange, form);
        let mut progressed = (!parts.joins).then(Progressed::default);
        if let Some(loaded) = parts.checkpoint.take() {
            restore_into(&mut net, &loaded.parts)?;
            progressed = Some(Progressed { step: loaded.manifest.step, ..Progressed::default() });
        }
        if progressed.is_some() {
            parts.progress.has_state();
        }
        let runs_ahead = parts.device.is_cuda() || std::env::var_os(WHOLE_STEPS_VARIABLE).is_some();
        let samples = Samples::new(&parts.config, parts.device, parts.spool.clone(), runs_ahead);
        Ok(Self {
            runs_ahead,
            all_run_ahead: false,
            settled_at: None,
            meeting: Meeting::new(parts.device, parts.config.exact),
            model: if parts.config.exact { device::model(parts.device)? } else { String::new() },
            parts,
            net,
            exchange,
            progressed,
            samples,
            now: None,
            next: None,
            leaves: None,
            broken_since: None,
            checkpoint_overdue: false,
            was_rank_0: true,
            step_s: 0.0,
            steps_here: 0,
            faults: Faults::from_environment(),
        })
    }

    /// Trains in one group after the other until the sender of commands is gone or this worker cannot go on.
    pub fn run(mut self, commands: &Receiver<Command>) {
        let mut seat = None;
        loop {
            let Some(current) = seat.take().or_else(|| self.park(commands)) else { return };
            let generation = current.generation();
            match self.take_part(current, commands) {
                Ok(End::Changed(next)) => seat = Some(next),
                Ok(End::Left) => self.leave_group(),
                Ok(End::Done(outcome)) => match self.finish(outcome, generation) {
                    Ok(()) => {}
                    Err(error) => return self.note(Note::Failed { generation, error }),
                },
                Err(JobError::Exchange(error)) => {
                    self.broken_since.get_or_insert_with(Instant::now);
                    self.checkpoint_overdue = true;
                    self.net.regroup();
                    self.parts.progress.enter("parked");
                    self.note(Note::Broken { generation, error });
                }
                Err(error) => {
                    // Peers that wait for this worker are let go at once.
                    self.leave_group();
                    // Grids of finished steps are worth having, whatever came after them.
                    if matches!(error, JobError::NotFinite { .. })
                        && let Err(other) = self.samples.settle()
                    {
                        tracing::warn!(error = %other, "grids of finished steps are lost");
                    }
                    return self.note(Note::Failed { generation, error });
                }
            }
        }
    }

    fn note(&self, note: Note) {
        // Nobody to tell: the process is ending.
        drop(self.parts.notes.send(note));
    }

    fn leave_group(&mut self) {
        self.net.regroup();
        let generation = self.exchange.collective().generation();
        self.exchange.enter(Box::new(Loopback::new(generation)));
    }

    /// Waits for a group; `None` when there will be none.
    fn park(&mut self, commands: &Receiver<Command>) -> Option<Seat> {
        while self.now.is_none() {
            self.take_up(commands.recv().ok()?);
        }
        self.now.take()
    }

    /// Takes in what was told meanwhile.
    pub(super) fn listen(&mut self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.try_recv() {
            self.take_up(command);
        }
    }

    /// A group that is to be formed now makes earlier plans void.
    fn take_up(&mut self, command: Command) {
        match command {
            Command::Form(seat) => {
                (self.next, self.leaves) = (None, None);
                self.now = Some(seat);
            }
            Command::Next(seat) => self.next = Some(seat),
            Command::Leave(generation) => self.leaves = Some(generation),
        }
    }

    /// Forms a group and trains in it.
    fn take_part(&mut self, seat: Seat, commands: &Receiver<Command>) -> Result<End, JobError> {
        // What is still rendered belongs to the group that is over.
        self.samples.settle()?;
        self.parts.progress.enter("forming");
        let generation = seat.generation();
        self.net.regroup();
        self.parts.feed.set_slots(seat.slots);
        let ring = Ring::connect(&self.parts.listener, seat.ring)?;
        // Already while the members meet: a group that is over must let go of this thread.
        self.parts.stopper.guard(generation, ring.abort_handle());
        let collective = self.meeting.join(ring)?;
        self.exchange.enter(collective);
        let collective = self.exchange.collective();
        self.parts.stopper.guard(generation, collective.abort_handle());
        let runs_ahead = self.can_run_ahead(&*collective);
        let agreement = agree(
            &collective,
            runs_ahead,
            &mut self.net,
            &mut self.progressed,
            &self.model,
            || self.parts.spool.unkept_reports(),
            |reports| reports.into_iter().for_each(|report| self.parts.spool.report(report)),
        )
        .map_err(|error| match error {
            AgreeError::Exchange(error) => JobError::Exchange(error),
            other => JobError::State(other.to_string()),
        })?;
        self.formed(generation, collective.rank(), agreement)?;
        self.train(commands)
    }

    fn formed(&mut self, generation: u64, rank: Rank, agreement: Agreement) -> Result<(), JobError> {
        let stalled_s = self.broken_since.take().map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.all_run_ahead = agreement.all_run_ahead;
        self.steps_here = 0;
        let (step, phase) = self.position();
        self.parts.progress.begin(step);
        self.parts.progress.has_state();
        let position = (step, phase as u32);
        self.note(Note::Formed { generation, position, stalled_s, restored: agreement.restored });
        // Whoever was rank 0 before may have gone with a checkpoint that nobody will commit.
        self.checkpoint_overdue |= rank == Rank(0) && !self.was_rank_0;
        self.was_rank_0 = rank == Rank(0);
        if rank == agreement.source {
            self.samples.render_missing()?;
        }
        if step == 0 && phase == 0 {
            self.samples.reals(&mut self.parts.feed)?;
            if let Some(frame) = self.samples.take(&self.net, &self.exchange, 0)? {
                self.samples.show(frame)?;
            }
        }
        Ok(())
    }

    pub(super) fn position(&self) -> (u64, usize) {
        self.progressed.as_ref().map_or((0, 0), |progressed| (progressed.step, progressed.phase()))
    }

    fn train(&mut self, commands: &Receiver<Command>) -> Result<End, JobError> {
        loop {
            let (step, _) = self.position();
            if step >= self.parts.target_steps {
                return Ok(End::Done(run_ended::Outcome::Completed));
            }
            self.listen(commands);
            if self.now.is_some() {
                let reason = "a newer group takes its place".to_owned();
                let operation = "the exchange".to_owned();
                return Err(CollectiveError::Aborted { operation, reason }.into());
            }
            if self.may_run_ahead(step) {
                if let Some(end) = self.train_ahead(commands)? {
                    return Ok(end);
                }
                continue;
            }
            self.parts.spool.pace();
            let [stops, changes] = self.step(step)?;
            if step + 1 >= self.parts.target_steps {
                continue;
            }
            if stops > 0.0 {
                return Ok(End::Done(run_ended::Outcome::Stopped));
            }
            if let Some(end) = self.change(changes) {
                return Ok(end);
            }
        }
    }

    /// The generation that this worker is ready to change over to; 0 = none.
    pub(super) fn ready_for(&self) -> u64 {
        self.next.as_ref().map(Seat::generation).or(self.leaves).unwrap_or(0)
    }

    /// Changes over when all members are ready for the same generation.
    pub(super) fn change(&mut self, changes: f64) -> Option<End> {
        let ready = self.ready_for();
        let world = f64::from(self.exchange.collective().world());
        // Generations stay far below 2^53, so their sum is exact.
        if ready == 0 || changes != ready as f64 * world {
            return None;
        }
        self.leaves = None;
        Some(self.next.take().map_or(End::Left, End::Changed))
    }

    /// One step: batch, the phases that are left, numbers. Returns the votes of the last phase.
    fn step(&mut self, step: u64) -> Result<[f64; 2], JobError> {
        let begin = Instant::now();
        let mut batch = self.parts.feed.batch(step)?;
        let data_s = begin.elapsed().as_secs_f64();
        let fed = batch.fed as f64;
        let mut votes = [0.0; 3];
        while let Some(phase) = Phase::from_index(self.position().1 as u32) {
            self.parts.progress.enter(phase.name());
            if self.faults.strike(step, phase) {
                batch.reals_nchw = batch.reals_nchw.full_like(f64::INFINITY);
            }
            let stop = f64::from(u8::from(self.parts.progress.stop_requested()));
            votes = [stop, self.ready_for() as f64, fed];
            self.update(&batch, phase, step, &mut votes)?;
        }
        let [stops, changes, fed] = votes;
        let times = [begin.elapsed().as_secs_f64(), data_s];
        self.finish_step(step, times, fed as u64)?;
        let picture = self.take_picture(step + 1)?;
        self.hand_out(picture)?;
        Ok([stops, changes])
    }

    /// One phase. Its votes are summed whether there is an update in it or not.
    fn update(&mut self, batch: &Batch, phase: Phase, step: u64, votes: &mut [f64]) -> Result<(), JobError> {
        if self.parts.passed_over.contains(&(step + 1)) {
            self.exchange.wait(|collective| collective.all_reduce_f64(votes))?;
            self.leave_out(format!("no update in phase {phase}: the step is passed over"));
            return Ok(());
        }
        match self.net.phase(batch, phase, votes) {
            Ok(sums) => self.made(step, phase, Ok(sums)),
            Err(PhaseError::Exchange(error)) => Err(error.into()),
            Err(PhaseError::Torch(error)) => Err(error.into()),
            Err(PhaseError::NotFinite { what, .. }) => self.made(step, phase, Err(what)),
        }
    }

    /// Takes down what became of a phase: its numbers, or what in it is not finite.
    pub(super) fn made(
        &mut self,
        step: u64,
        phase: Phase,
        made: Result<PhaseSums, String>,
    ) -> Result<(), JobError> {
        let Some(progressed) = &mut self.progressed else { return Ok(()) };
        let may_skip = self.parts.config.on_nan == OnNan::Skip
            && progressed.skipped_in_a_row < MAX_SKIPPED_PHASES_IN_A_ROW;
        match made {
            Ok(sums) => {
                progressed.skipped_in_a_row = 0;
                progressed.sums.push(sums);
            }
            Err(what) if may_skip => {
                progressed.skipped_in_a_row += 1;
                self.leave_out(format!("no update in phase {phase}: {what} is not finite"));
            }
            Err(what) => return Err(JobError::NotFinite { step: step + 1, phase: phase.name(), what }),
        }
        Ok(())
    }

    /// Takes down that there is no update in a phase, and why.
    fn leave_out(&mut self, reason: String) {
        if let Some(progressed) = &mut self.progressed {
            progressed.sums.push(PhaseSums::NONE);
            progressed.left_out.push(reason);
        }
    }

    /// Takes down and reports a step whose last phase is made.
    pub(super) fn finish_step(
        &mut self,
        step: u64,
        [step_s, data_s]: [f64; 2],
        fed: u64,
    ) -> Result<(), JobError> {
        let Some(progressed) = &mut self.progressed else { return Ok(()) };
        progressed.step = step + 1;
        let left_out = std::mem::take(&mut progressed.left_out).join("; ");
        let sums = std::mem::take(&mut progressed.sums);
        let [d, g1, g2] = sums.as_slice() else { return Ok(()) };
        let exchange_s = self.exchange.take_waited(step_s);
        let compute_s = (step_s - data_s - exchange_s).max(0.0);
        let receive_s = self.exchange.collective().take_receiving().as_secs_f64();
        self.parts.progress.finish_step(step + 1, [compute_s, data_s, exchange_s, receive_s]);
        self.adapt_timeout(step_s);
        self.parts.spool.report(StepReport {
            step: step + 1,
            epoch: self.parts.feed.epoch_of(step),
            d_loss: d.loss,
            g_loss: (g1.loss + g2.loss) / 2.0,
            d_acc: d.right / (2.0 * f64::from(self.parts.config.global_batch)),
            step_s,
            compute_s,
            data_s,
            exchange_s,
            fed,
            left_out,
            ..StepReport::default()
        });
        Ok(())
    }

    fn adapt_timeout(&mut self, step_s: f64) {
        self.steps_here += 1;
        self.step_s = if self.step_s == 0.0 { step_s } else { 0.8 * self.step_s + 0.2 * step_s };
        if self.steps_here < STEPS_TO_KNOW {
            return;
        }
        let longest = Duration::from_millis(self.parts.config.exchange_timeout_ms);
        let usual = Duration::from_secs_f64(self.step_s * STEPS_OF_SILENCE);
        self.exchange.collective().set_timeout(usual.clamp(SHORTEST_TIMEOUT.min(longest), longest));
    }

    /// The end of the run or a stop: its checkpoint, which is waited for.
    fn finish(&mut self, outcome: run_ended::Outcome, generation: u64) -> Result<(), JobError> {
        self.samples.settle()?;
        let (step, _) = self.position();
        let mut weights_sha256 = String::new();
        if self.exchange.collective().rank() == Rank(0) {
            self.parts.progress.enter("checkpoint");
            let snapshot = Snapshot::take(&self.net, step)?;
            let written = self.parts.uploader.write_through(snapshot, Generation(generation));
            weights_sha256 = written.map_err(JobError::Upload)?.weights_sha256;
        }
        self.parts.progress.enter("ended");
        self.note(Note::Ended { generation, outcome, step, weights_sha256 });
        Ok(())
    }
}
