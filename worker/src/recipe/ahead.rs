//! [`Ahead`]: whole steps handed to the device without waiting for any of them.
//!
//! A GPU computes a step in about a millisecond, which is what a host needs to launch it kernel by kernel or to
//! wait for its numbers three times. So a worker that is alone in its group hands over whole steps: their inputs
//! are copied into fixed places, the three phases are one CUDA graph, and the numbers come back while the next
//! step runs. What a host would decide between the phases is decided on the device: an update whose loss or
//! gradients are not finite is left out, and so are all after it until the host has seen it, unless the run
//! skips such updates.
//!
//! On a CPU the same code computes at once, with the same bits as [`Dcgan::phase`].

use std::time::{Duration, Instant};

use takuma_core::config::OnNan;
use tch::{Kind, Tensor};

use super::dcgan::{Batch, Dcgan};
use super::phase::{Phase, PhaseSums};
use super::update::blame;
use crate::model::Network;
use crate::torch::cuda::{Event, Graph};
use crate::torch::{self, Guard, TorchError};

/// Steps that run kernel by kernel before the graph is captured: cuDNN chooses its algorithms meanwhile.
const WARM_UP_STEPS: u32 = 3;
/// Numbers of a phase: loss, logits on the right side, whether the update was left out, first gradient that is
/// to blame.
const NUMBERS: i64 = 4;

/// A GPU that is still at a step by then is stuck: it takes milliseconds, and cuDNN's first choice of algorithms
/// and the kernels' compilation some seconds.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// Images and noise of a step, for the device to fetch.
pub struct StepInput {
    /// Where the images come from.
    pub images: Images,
    /// f32 `[N, 100]`, on the host; page-locked if the device is a GPU.
    pub noise_nz: Tensor,
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
}

/// The numbers of a step under way.
pub struct Ticket {
    /// f64 `[3, NUMBERS]`, on the host.
    numbers: Tensor,
    event: Event,
    /// Read by the device until the step is done.
    _input: StepInput,
}

/// Fixed places and the graph over them.
pub(super) struct Ahead {
    /// Images, in the type that the networks compute in, and noise.
    batch: Batch,
    guard: Guard,
    /// The first update that is left out stops all that follow.
    is_sticky: bool,
    /// f64 `[3, NUMBERS]`, on the device.
    numbers: Tensor,
    graph: Option<Graph>,
    /// Steps without a graph so far.
    steps: u32,
    /// A step could not be captured, and will not be tried again.
    has_no_graph: bool,
}

impl Ahead {
    fn new(net: &Dcgan, slots: i64, image_size: i64) -> Self {
        let arithmetic = net.arithmetic();
        let device = arithmetic.device;
        let pixels = Tensor::zeros([slots, image_size, image_size, 3], (arithmetic.compute, device));
        Self {
            batch: Batch {
                reals_nchw: pixels.permute([0, 3, 1, 2]),
                noise_nz: Tensor::zeros([slots, crate::model::NOISE_LEN], (arithmetic.kind, device)),
                fed: 0,
            },
            guard: Guard::new(device),
            is_sticky: net.on_nan() != OnNan::Skip,
            numbers: Tensor::zeros([Phase::ALL.len() as i64, NUMBERS], (Kind::Double, device)),
            graph: None,
            steps: 0,
            has_no_graph: !device.is_cuda(),
        }
    }

    /// Brings a step's images and noise to their places, in the order of the device's stream.
    fn take_in(&self, input: &StepInput) -> Result<(), TorchError> {
        torch::copy_async(&self.batch.noise_nz, &input.noise_nz)?;
        match &input.images {
            Images::Ready(images_nchw) => torch::copy_async(&self.batch.reals_nchw, images_nchw),
            Images::Rows { dataset_nhwc, rows } => {
                let rows = rows.to_device_(dataset_nhwc.device(), Kind::Int64, true, false);
                torch::gather_images(dataset_nhwc, &rows, &self.batch.reals_nchw)
            }
        }
    }
}

impl Dcgan {
    /// Hands a whole step to the device, to be computed after those before it. For a worker that is alone in
    /// its group, and not for exact mode.
    ///
    /// # Errors
    /// libtorch's. The state may then be anywhere within the step.
    pub fn enqueue(&mut self, input: StepInput) -> Result<Ticket, TorchError> {
        let slots = input.noise_nz.size()[0];
        let fits = |ahead: &Ahead| ahead.batch.noise_nz.size()[0] == slots;
        let image_size = self.image_size();
        let mut ahead = match self.ahead.take().filter(fits) {
            Some(ahead) => ahead,
            None => Ahead::new(self, slots, image_size),
        };
        ahead.take_in(&input)?;
        self.launch(&mut ahead)?;
        let numbers = torch::host_like(&ahead.numbers, ahead.numbers.device())?;
        torch::copy_async(&numbers, &ahead.numbers)?;
        let mut event = Event::new(ahead.numbers.device())?;
        event.record()?;
        self.ahead = Some(ahead);
        Ok(Ticket { numbers, event, _input: input })
    }

    /// Waits for a step that was handed over: what became of its phases. `None` if the device is stuck: nothing that
    /// it holds may then be touched, since that could wait for ever.
    ///
    /// # Errors
    /// libtorch's, when the device fails.
    pub fn settle(&self, mut ticket: Ticket) -> Result<Option<Vec<Outcome>>, TorchError> {
        if !ticket.event.wait(Instant::now() + STEP_TIMEOUT)? {
            // Its memory is still written to.
            std::mem::forget(ticket);
            return Ok(None);
        }
        let mut is_frozen = false;
        let outcomes = Phase::ALL.iter().map(|&phase| {
            let row = ticket.numbers.get(phase as i64);
            let [loss, right, found, index] = [0, 1, 2, 3].map(|place| row.double_value(&[place]));
            if found == 0.0 {
                return Outcome::Applied(PhaseSums { loss, right });
            }
            if is_frozen {
                return Outcome::Frozen;
            }
            is_frozen = self.on_nan() != OnNan::Skip;
            Outcome::NotFinite(self.blame(phase, loss, index as usize))
        });
        Ok(Some(outcomes.collect()))
    }

    /// Whether whole steps run as a graph by now.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        self.ahead.as_ref().is_some_and(|ahead| ahead.graph.is_some())
    }

    /// Runs the newest step again over the input that lies in its place: what a step costs without its input.
    ///
    /// # Errors
    /// libtorch's, or that no step was handed over yet.
    pub fn replay(&mut self) -> Result<(), TorchError> {
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

    /// Runs the step over the fixed places: as a graph once it has been captured.
    fn launch(&mut self, ahead: &mut Ahead) -> Result<(), TorchError> {
        if let Some(graph) = &mut ahead.graph {
            return graph.replay();
        }
        if !ahead.has_no_graph && ahead.steps >= WARM_UP_STEPS {
            match Graph::capture(|| self.iterate(ahead)) {
                Ok(mut graph) => {
                    graph.replay()?;
                    ahead.graph = Some(graph);
                    return Ok(());
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
    fn iterate(&mut self, ahead: &Ahead) -> Result<(), TorchError> {
        let Ahead { batch, guard, is_sticky, numbers, .. } = ahead;
        let Guard { found, index, .. } = guard;
        let mut rows = Vec::new();
        for phase in Phase::ALL {
            let (loss, right) = self.pass(batch, phase)?;
            let (state, first) = (&self.state, self.lanes.first());
            let (updater, network, first): (_, &dyn Network, &dyn Network) = match phase {
                Phase::D => (&self.update_d, &state.discriminator, &first.discriminator),
                Phase::G1 | Phase::G2 => (&self.update_g, &state.generator, &first.generator),
            };
            let gradients: Vec<Tensor> = first.tensors().iter().map(|tensor| tensor.grad()).collect();
            let gradients: Vec<&Tensor> = gradients.iter().collect();
            torch::guard(&gradients, &loss, guard, *is_sticky)?;
            updater.optimizer().step(&network.tensors(), &gradients, Some(found))?;
            let (g_norms, d_norms) = self.lanes.norms();
            g_norms.commit(&self.state.generator, Some(found))?;
            d_norms.commit(&self.state.discriminator, Some(found))?;
            self.clear(phase)?;
            rows.extend([loss.to_kind(Kind::Double), right, found.to_kind(Kind::Double)]);
            rows.push(index.to_kind(Kind::Double));
        }
        torch::copy_async(numbers, &Tensor::stack(&rows, 0).view_as(numbers))
    }

    /// The loss and the logits on the right side, f64, of a phase whose gradients are complete after it.
    fn pass(&mut self, batch: &Batch, phase: Phase) -> Result<(Tensor, Tensor), TorchError> {
        self.lanes.prepare(batch, &self.state, [&self.update_g, &self.update_d])?;
        let results = self.lanes.run_whole(phase, batch)?;
        let right = results.right.unwrap_or_else(|| results.loss.zeros_like().to_kind(Kind::Double));
        Ok((results.loss, right))
    }
}
