//! [`Ahead`]: whole steps handed to the device without waiting for any of them.
//!
//! A GPU computes a step in about a millisecond, which is what a host needs to launch it kernel by kernel or to
//! wait for its numbers three times. So whole steps are handed over: their inputs are copied into fixed places, the
//! three phases are one recorded program, and the numbers come back while the next step runs. What a host would
//! decide between the phases is decided on the device: an update whose loss or gradients are not finite is left out,
//! and so are all after it until the host has seen it, unless the run skips such updates.
//!
//! In a group the program is graphs with the group's sums between them. Its votes travel with each step. Once the group
//! ends, in whatever way and on whatever rank, no update is applied any more: see [`Vouch`]. So the state is always that
//! between two phases, and the numbers say which.
//!
//! On a CPU the same code computes at once, with the same bits as [`Dcgan::phase`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use takuma_core::config::OnNan;
use tch::{Kind, Tensor};

use super::dcgan::{Batch, Dcgan};
use super::phase::{Phase, PhaseError, PhaseSums};
use super::update::blame;
use crate::collective::EndedWord;
use crate::model::Network;
use crate::torch::cuda::{Event, Graph, Program, StreamCapture};
use crate::torch::{self, FROZEN_ENDED, Guard, Stamp, TorchError, Vouch};
use crate::trainer::DeviceSum;

/// Steps that run kernel by kernel before one is recorded: cuDNN chooses its algorithms meanwhile.
const WARM_UP_STEPS: u32 = 3;

/// A GPU that is still at a step by then is stuck: it takes milliseconds, and cuDNN's first choice of algorithms
/// and the kernels' compilation some seconds. In a group the waits for the others are borne on top of it.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// So many times the exchange's timeout a step may wait for the others before its group has ended for all: a rank
/// blames its own GPU after two.
const EXCHANGE_TIMEOUTS: u32 = 3;

/// Images and noise of a step, for the device to fetch, and what this worker has to say in it.
pub struct StepInput {
    /// Where the images come from.
    pub images: Images,
    /// f32 `[N, 100]`, on the host; page-locked if the device is a GPU.
    pub noise_nz: Tensor,
    /// Summed over the workers with the step's numbers.
    pub votes: Votes,
}

/// What a worker says in a step. Comes back as the sum over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Votes {
    /// The step, the same for all workers and another for each step; 0 for the first.
    pub step: u64,
    /// 1 if this worker was asked to stop the run.
    pub stop: f64,
    /// The generation that it is ready to change over to; 0 = none.
    pub ready_for: f64,
    /// See [`Batch::fed`].
    pub fed: f64,
}

/// A step's images.
pub enum Images {
    /// Rows of a dataset that lies on the device.
    Rows {
        /// u8 `[images, H, W, 3]`, on the device.
        dataset_nhwc: Tensor,
        /// i64 `[N]`, on the host; page-locked if the device is a GPU.
        rows: Tensor,
    },
    /// The images themselves: `[N, 3, H, W]` in `[-1, 1]`, channels_last.
    Ready(Tensor),
}

/// What became of a phase.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It was applied.
    Applied(PhaseSums),
    /// It was not: in words the loss or gradient that is not finite.
    NotFinite(String),
    /// It was not, because an earlier one was not.
    Frozen,
    /// It was not, because the group ended before its sums were whole.
    Ended,
}

/// What became of a step that was handed over.
#[derive(Debug)]
pub struct Settled {
    /// By phase.
    pub outcomes: Vec<Outcome>,
    /// Sums over the workers of what they said in the step, by the last phase that was applied; of `step` this
    /// worker's.
    pub votes: Votes,
    /// Why the step could not be handed over to its end.
    pub failed: Option<PhaseError>,
}

/// The numbers of a step under way.
pub struct Ticket {
    /// f64 `[3, NUMBERS]`, on the host.
    numbers: Tensor,
    event: Event,
    failed: Option<PhaseError>,
    step: u64,
    /// Read by the device until the step is done.
    _input: (StepInput, Tensor, Option<EndedWord>),
}

impl Ticket {
    /// Whether the step could not be handed over to its end. [`Dcgan::settle`] tells why, and how far it came.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }
}

/// Numbers of a phase: those that are summed over the workers, then whether the update was left out, why all are, and
/// the first gradient that is to blame.
const NUMBERS: i64 = 8;

/// Fixed places and the program over them.
pub(super) struct Ahead {
    /// Images, in the type that the networks compute in, and noise.
    batch: Batch,
    /// f64 `[4]`: stop, ready for, fed, and the number of the step, from 1.
    votes: Tensor,
    guard: Guard,
    /// The first update that is left out stops all that follow.
    is_sticky: bool,
    /// Where the group sums on devices: what tells them of its end.
    vouch: Option<(Vouch, EndedWord)>,
    /// f64 `[3, NUMBERS]`, on the device.
    numbers: Tensor,
    program: Option<Program<Graph, DeviceSum>>,
    /// [`crate::trainer::Exchange::groups`] of the group that this was made in.
    group: u64,
    /// Steps without a program so far.
    steps: u32,
    /// A step could not be recorded, and will not be tried again.
    has_no_graph: bool,
}

impl Ahead {
    fn new(net: &Dcgan, slots: i64) -> Self {
        let arithmetic = net.arithmetic();
        let (device, image_size) = (arithmetic.device, net.image_size());
        let pixels = Tensor::zeros([slots, image_size, image_size, 3], (arithmetic.compute, device));
        let collective = net.exchange.collective();
        let ended = collective.on_device().filter(|_| collective.world() > 1).map(|sums| sums.ended());
        Self {
            batch: Batch {
                reals_nchw: pixels.permute([0, 3, 1, 2]),
                noise_nz: Tensor::zeros([slots, crate::model::NOISE_LEN], (arithmetic.kind, device)),
                fed: 0,
            },
            votes: Tensor::zeros([4], (Kind::Double, device)),
            guard: Guard::new(device),
            is_sticky: net.on_nan() != OnNan::Skip,
            // SAFETY: the word stays with this and with each ticket, until the device has done the step.
            vouch: ended.map(|ended| (unsafe { Vouch::new(device, ended.as_ptr()) }, ended)),
            numbers: Tensor::zeros([Phase::ALL.len() as i64, NUMBERS], (Kind::Double, device)),
            program: None,
            group: net.exchange.groups(),
            // What cuDNN has chosen for shapes like these it keeps.
            steps: if net.warm_slots == slots { WARM_UP_STEPS - 1 } else { 0 },
            has_no_graph: !device.is_cuda() || !net.records,
        }
    }

    fn is_for(&self, net: &Dcgan, slots: i64) -> bool {
        self.batch.noise_nz.size()[0] == slots && self.group == net.exchange.groups()
    }

    /// Brings a step's images, noise and votes to their places, in the order of the device's stream, and forgets the
    /// numbers of the step before: a phase that the device never comes to leaves none.
    fn take_in(&self, input: &StepInput, votes: &Tensor) -> Result<(), TorchError> {
        torch::copy_async(&self.batch.noise_nz, &input.noise_nz)?;
        torch::copy_async(&self.votes, votes)?;
        drop(
            self.numbers
                .shallow_clone()
                .f_fill_(f64::NAN)
                .map_err(|error| TorchError { operation: "fill", message: error.to_string() })?,
        );
        match &input.images {
            Images::Ready(images_nchw) => torch::copy_async(&self.batch.reals_nchw, images_nchw),
            Images::Rows { dataset_nhwc, rows } => {
                let rows = rows.to_device_(dataset_nhwc.device(), Kind::Int64, true, false);
                torch::gather_images(dataset_nhwc, &rows, &self.batch.reals_nchw)
            }
        }
    }

    /// The host's side of the votes' place.
    fn votes_of(&self, votes: &Votes) -> Result<Tensor, TorchError> {
        let values = [votes.stop, votes.ready_for, votes.fed, (votes.step + 1) as f64];
        let host = torch::host_like(&self.votes, self.votes.device())?;
        torch::copy_async(&host, &Tensor::from_slice(&values))?;
        Ok(host)
    }

    /// The numbers of the newest step on their way to the host.
    fn numbers_on_host(&self) -> Result<(Tensor, Event), TorchError> {
        let device = self.numbers.device();
        let numbers = torch::host_like(&self.numbers, device)?;
        torch::copy_async(&numbers, &self.numbers)?;
        let mut event = Event::new(device)?;
        event.record()?;
        Ok((numbers, event))
    }
}

impl Dcgan {
    /// Hands a whole step to the device, to be computed after those before it. All workers of the group hand over the
    /// same steps. Not for exact mode, nor for a group of GPUs that does not sum on them.
    ///
    /// What goes wrong once the device has begun with it, a group that ends above all, is told by [`Dcgan::settle`]:
    /// some of its phases may have been applied. Nothing more may then be handed over before [`Dcgan::regroup`].
    ///
    /// # Errors
    /// libtorch's. Nothing of the step is applied.
    pub fn enqueue(&mut self, input: StepInput) -> Result<Ticket, TorchError> {
        let slots = input.noise_nz.size()[0];
        let former = self.ahead.take().filter(|ahead| ahead.is_for(self, slots));
        let mut ahead = former.unwrap_or_else(|| Ahead::new(self, slots));
        let votes = ahead.votes_of(&input.votes)?;
        ahead.take_in(&input, &votes)?;
        let failed = self.launch(&mut ahead).err();
        if failed.is_some() {
            self.clear(Phase::G2)?;
        }
        let (numbers, event) = ahead.numbers_on_host()?;
        let ended = ahead.vouch.as_ref().map(|(_, ended)| ended.clone());
        self.ahead = Some(ahead);
        Ok(Ticket { numbers, event, failed, step: input.votes.step, _input: (input, votes, ended) })
    }

    /// Waits for a step that was handed over: what became of its phases. `None` if the device is stuck: nothing that
    /// it holds may then be touched, since that could wait for ever.
    ///
    /// # Errors
    /// libtorch's, when the device fails.
    pub fn settle(&self, mut ticket: Ticket) -> Result<Option<Settled>, TorchError> {
        let for_others = if self.exchange.is_alone() { Duration::ZERO } else { self.exchange_timeout };
        let deadline = Instant::now() + STEP_TIMEOUT + for_others * EXCHANGE_TIMEOUTS;
        if !ticket.event.wait(deadline)? {
            // Its memory is still written to.
            std::mem::forget(ticket);
            return Ok(None);
        }
        let mut is_frozen = false;
        let mut votes = Votes { step: ticket.step, ..Votes::default() };
        let mut outcome = |phase: Phase| {
            let row = ticket.numbers.get(i64::from(phase.index()));
            let row: Vec<f64> = (0..NUMBERS).map(|place| row.double_value(&[place])).collect();
            let [loss, right, stop, ready_for, fed, found, frozen, index] = row[..] else {
                unreachable!("a phase has so many numbers")
            };
            if found == 0.0 {
                votes = Votes { stop, ready_for, fed, ..votes };
                return Outcome::Applied(PhaseSums { loss, right });
            }
            // Without numbers the device never came to it.
            if frozen == FROZEN_ENDED || found.is_nan() {
                return Outcome::Ended;
            }
            votes = Votes { stop, ready_for, fed, ..votes };
            if is_frozen {
                return Outcome::Frozen;
            }
            is_frozen = self.on_nan() != OnNan::Skip;
            Outcome::NotFinite(self.blame(phase, loss, index as usize))
        };
        let outcomes = Phase::ALL.map(&mut outcome).to_vec();
        Ok(Some(Settled { outcomes, votes, failed: ticket.failed }))
    }

    /// Whether whole steps run as a recorded program by now.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        self.ahead.as_ref().is_some_and(|ahead| ahead.program.is_some())
    }

    /// Runs the newest step again over the input that lies in its place: what a step costs without its input.
    ///
    /// # Errors
    /// libtorch's, what ended the group, or that no step was handed over yet.
    pub fn replay(&mut self) -> Result<(), PhaseError> {
        let nothing =
            || TorchError { operation: "a replay", message: "no step was handed over yet".to_owned() };
        let mut ahead = self.ahead.take().ok_or_else(nothing)?;
        let launched = self.launch(&mut ahead);
        self.ahead = Some(ahead);
        launched
    }

    /// What is not finite in a phase that was left out, in words.
    fn blame(&self, phase: Phase, loss: f64, index: usize) -> String {
        let network: &dyn Network = match phase {
            Phase::D => &self.state.discriminator,
            Phase::G1 | Phase::G2 => &self.state.generator,
        };
        let gradient = (index < network.parameters().len()).then_some(index);
        blame(loss, network, gradient).unwrap_or_else(|| "the loss or a gradient".to_owned())
    }

    /// Runs the step over the fixed places: as a program once it has been recorded.
    fn launch(&mut self, ahead: &mut Ahead) -> Result<(), PhaseError> {
        let exchange = Arc::clone(&self.exchange);
        let launch = |graph: &mut Graph| graph.replay().map_err(PhaseError::from);
        if let Some(program) = &mut ahead.program {
            return exchange.replay(program, launch);
        }
        if !ahead.has_no_graph && ahead.steps >= WARM_UP_STEPS {
            // Sums in a backward pass cut the capture on libtorch's thread.
            let capture = StreamCapture::new(!exchange.is_alone());
            match exchange.record(capture, || self.iterate(ahead)) {
                Ok(program) => {
                    self.warm_slots = ahead.batch.noise_nz.size()[0];
                    return exchange.replay(ahead.program.insert(program), launch);
                }
                // Nothing of it has run, so the step can still be computed.
                Err(error) => {
                    tracing::warn!("steps run kernel by kernel, several times slower: {error}");
                    ahead.has_no_graph = true;
                    self.clear(Phase::G2)?;
                }
            }
        }
        ahead.steps += 1;
        self.iterate(ahead)
    }

    /// The three phases, without a look at any number.
    fn iterate(&mut self, ahead: &Ahead) -> Result<(), PhaseError> {
        for phase in Phase::ALL {
            let made = self.iterate_phase(ahead, phase);
            for updater in [&self.update_g, &self.update_d] {
                updater.end();
            }
            made?;
        }
        Ok(())
    }

    fn iterate_phase(&mut self, ahead: &Ahead, phase: Phase) -> Result<(), PhaseError> {
        let Ahead { batch, guard, is_sticky, numbers, .. } = ahead;
        let count = self.lanes.prepare(batch, &self.state, [&self.update_g, &self.update_d])?;
        self.updater(phase).begin(count);
        let results = self.lanes.run_whole(phase, batch)?;
        let right = results.right.unwrap_or_else(|| results.loss.zeros_like().to_kind(Kind::Double));
        let own = Tensor::stack(&[results.loss.to_kind(Kind::Double), right], 0);
        // In the order of `Dcgan::phase`, and so with the bits of its sums.
        let sums = Tensor::cat(&[own, ahead.votes.narrow(0, 0, 3)], 0);
        self.exchange.sum_tensor(&sums)?;
        let (state, first) = (&self.state, self.lanes.first());
        let (updater, network, first): (_, &dyn Network, &dyn Network) = match phase {
            Phase::D => (&self.update_d, &state.discriminator, &first.discriminator),
            Phase::G1 | Phase::G2 => (&self.update_g, &state.generator, &first.generator),
        };
        let gradients = updater.gradients(first)?;
        self.vouch(ahead, phase)?;
        let vouch = ahead.vouch.as_ref().map(|(vouch, _)| vouch);
        torch::guard(&gradients.tensors(), &sums.get(0), vouch, guard, *is_sticky)?;
        updater.optimizer().step(&network.tensors(), &gradients.tensors(), Some(&guard.found))?;
        updater.recycle(gradients);
        let (g_norms, d_norms) = self.lanes.norms();
        g_norms.commit(&self.state.generator, Some(&guard.found))?;
        d_norms.commit(&self.state.discriminator, Some(&guard.found))?;
        self.clear(phase)?;
        let verdict = [&guard.found, &guard.frozen, &guard.index].map(|scalar| scalar.to_kind(Kind::Double));
        let row = Tensor::cat(&[sums, Tensor::stack(&verdict, 0)], 0);
        torch::copy_async(&numbers.get(i64::from(phase.index())), &row)?;
        Ok(())
    }

    /// The phase's last sum, where the group sums on devices: says whether the others may be believed.
    fn vouch(&self, ahead: &Ahead, phase: Phase) -> Result<(), PhaseError> {
        let Some((vouch, _)) = &ahead.vouch else { return Ok(()) };
        vouch.sign(&Stamp {
            number: &ahead.votes.get(3),
            phases: Phase::ALL.len() as u32,
            phase: phase.index(),
            ranks: self.exchange.collective().world(),
        })?;
        Ok(self.exchange.sum_tensor(&vouch.pair.narrow(0, 0, 1))?)
    }
}

#[cfg(test)]
mod tests;
