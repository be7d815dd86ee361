//! DCGAN's iteration: one discriminator update, then two generator updates with the same noise.
//!
//! No work is wasted, and nothing changes by that: the generator's pass of the D phase is the pass of
//! the first G phase (same noise, same weights); G phases compute no weight gradient of D; real and
//! fake images go through D in one tensor with batch statistics for each half.
//!
//! # Source
//! Radford et al. 2016; Goodfellow et al. 2014 (non-saturating loss).

use std::sync::Arc;
use std::time::Duration;

use takuma_core::config::{OnNan, Recipe, RunConfig};
use tch::Tensor;

use super::ahead::Ahead;
use super::lanes::{LaneForm, Lanes};
use super::phase::{Phase, PhaseError, PhaseSums};
use super::update::Updater;
use crate::collective::DeviceCollective;
use crate::model::{Arithmetic, Discriminator, Generator, Network, Weights};
use crate::torch::{self, TorchError};
use crate::trainer::{Adam, Exchange};

/// Channels after D's first convolution.
fn base_channels(recipe: Recipe) -> i64 {
    match recipe {
        Recipe::DcganCeleba => 64,
        Recipe::DcganTiny => 8,
    }
}

/// A worker's share of one step's input. N is the worker's slot count.
pub struct Batch {
    /// `[N, 3, 64, 64]` in `[-1, 1]`, channels_last.
    pub reals_nchw: Tensor,
    /// `[N, 100]` in `[-1, 1]`.
    pub noise_nz: Tensor,
    /// The ledger's entry: sum of [`takuma_core::slots::SlotMap::fed_hash`] over the worker's slots; the
    /// sums of all workers make [`takuma_core::slots::SlotMap::expected_fed`].
    pub fed: u64,
}

/// The networks with their optimizers: all that a checkpoint holds.
pub struct DcganState {
    /// Noise to images.
    pub generator: Generator,
    /// Images to logits.
    pub discriminator: Discriminator,
}

impl DcganState {
    /// Initial networks: a pure function of recipe and seed.
    #[must_use]
    pub fn new(recipe: Recipe, seed: u64, arithmetic: impl Into<Arithmetic>) -> Self {
        let (c, arithmetic) = (base_channels(recipe), arithmetic.into());
        Self {
            generator: Generator::new(&mut Weights::new(seed, 0, arithmetic), c),
            discriminator: Discriminator::new(&mut Weights::new(seed, 1, arithmetic), c),
        }
    }

    /// Networks over the same weights in the same memory, with gradients of their own.
    pub(super) fn alias(&self) -> Self {
        Self { generator: self.generator.alias(), discriminator: self.discriminator.alias() }
    }
}

/// DCGAN in training on one worker, in one group after another.
pub struct Dcgan {
    pub(super) state: DcganState,
    pub(super) update_g: Updater,
    pub(super) update_d: Updater,
    pub(super) lanes: Lanes,
    /// What [`Dcgan::enqueue`] keeps from step to step.
    pub(super) ahead: Option<Ahead>,
    pub(super) exchange: Arc<Exchange>,
    /// Slots of the newest step that was recorded: cuDNN knows its shapes.
    pub(super) warm_slots: i64,
    /// Whole steps are recorded where that is possible.
    pub(super) records: bool,
    image_size: i64,
    on_nan: OnNan,
    pub(super) exchange_timeout: Duration,
}

impl Dcgan {
    /// Takes over `state` for a run, in whatever groups `exchange` enters.
    #[must_use]
    pub fn new(config: &RunConfig, state: DcganState, exchange: &Arc<Exchange>) -> Self {
        let form = LaneForm::of(state.generator.arithmetic().device);
        Self::with_lanes(config, state, exchange, form)
    }

    /// The same with a form of lanes that may not be the device's own: `Together` is for both kinds of device,
    /// `Apart` for a processor alone. It changes no bit, and nothing at all outside of exact mode.
    #[must_use]
    pub fn with_lanes(
        config: &RunConfig,
        state: DcganState,
        exchange: &Arc<Exchange>,
        form: LaneForm,
    ) -> Self {
        Self {
            update_g: Updater::new(config, exchange, &state.generator),
            update_d: Updater::new(config, exchange, &state.discriminator),
            lanes: Lanes::new(config, exchange, form),
            ahead: None,
            exchange: Arc::clone(exchange),
            warm_slots: 0,
            records: true,
            image_size: i64::from(config.recipe.image_size()),
            on_nan: config.on_nan,
            exchange_timeout: Duration::from_millis(config.exchange_timeout_ms),
            state,
        }
    }

    /// The networks.
    #[must_use]
    pub fn state(&self) -> &DcganState {
        &self.state
    }

    /// Where the networks lie and what they compute in.
    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.state.generator.arithmetic()
    }

    /// Side of the images in pixels.
    pub(super) fn image_size(&self) -> i64 {
        self.image_size
    }

    /// What happens to an update that is not finite.
    pub(super) fn on_nan(&self) -> OnNan {
        self.on_nan
    }

    /// The networks, to restore a state into. Weights must stay in their memory: copy into them.
    pub fn state_mut(&mut self) -> &mut DcganState {
        self.forget();
        &mut self.state
    }

    /// The optimizers of generator and discriminator.
    #[must_use]
    pub fn optimizers(&self) -> [&Adam; 2] {
        [self.update_g.optimizer(), self.update_d.optimizer()]
    }

    /// Lets whole steps run kernel by kernel from the next group on, to compare.
    pub fn without_recording(&mut self) {
        self.forget();
        self.records = false;
    }

    /// Drops what was made in the group that is over, captured graphs too. To be called by every worker when it
    /// leaves a group, before the group's collective is dropped.
    pub fn regroup(&mut self) {
        self.forget();
    }

    fn forget(&mut self) {
        self.lanes.forget();
        self.ahead = None;
    }

    /// Runs one phase on this worker's share of the batch and applies it. `votes` travel with the phase's
    /// numbers: each becomes its sum over all workers.
    ///
    /// All workers of the group run the same phases in the same order. A worker may begin with any phase:
    /// without the pass of G that D's phase leaves behind, G1 makes it again, with the same result.
    ///
    /// # Errors
    /// Nothing of the phase is then applied; its votes are summed only with [`PhaseError::NotFinite`]. The same
    /// phase may be run again, in another group and with another share too, and gives what it would have given.
    ///
    /// # Panics
    /// If in exact mode the share is not made of whole lanes; see [`RunConfig::shares`].
    pub fn phase(&mut self, batch: &Batch, phase: Phase, votes: &mut [f64]) -> Result<PhaseSums, PhaseError> {
        let result = self.try_phase(batch, phase, votes);
        for updater in [&self.update_g, &self.update_d] {
            updater.end();
        }
        self.clear(phase)?;
        if result.is_err() {
            self.lanes.forget();
        }
        result
    }

    /// Drops what a phase leaves behind, but for the pass of G that D's phase leaves to G1.
    pub(super) fn clear(&mut self, phase: Phase) -> Result<(), TorchError> {
        for state in self.lanes.states() {
            torch::clear_gradients(&state.generator.tensors())?;
            torch::clear_gradients(&state.discriminator.tensors())?;
        }
        if phase != Phase::D {
            self.lanes.forget();
        }
        Ok(())
    }

    fn try_phase(&mut self, batch: &Batch, phase: Phase, votes: &mut [f64]) -> Result<PhaseSums, PhaseError> {
        let count = self.lanes.prepare(batch, &self.state, [&self.update_g, &self.update_d])?;
        self.updater(phase).begin(count);
        let shares = self.lanes.run(phase, batch)?;
        // Sums on devices are waited for before the last exchange of the phase: that all take part in it says that nobody's
        // group had ended before their sums were whole.
        self.exchange.wait(|collective| collective.on_device().map_or(Ok(()), DeviceCollective::settle))?;
        // Else while the last gradients are under way.
        let sums = self.lanes.sum(&shares, votes)?;
        votes.copy_from_slice(&sums[2..]);
        let (state, first) = (&self.state, self.lanes.first());
        match phase {
            Phase::D => {
                self.update_d.apply(phase, sums[0], &state.discriminator, &first.discriminator)?;
            }
            Phase::G1 | Phase::G2 => {
                self.update_g.apply(phase, sums[0], &state.generator, &first.generator)?;
            }
        }
        // D's pass of G stands for two updates: it commits here, and with G1 again.
        let (g_norms, d_norms) = self.lanes.norms();
        g_norms.commit(&self.state.generator, None)?;
        d_norms.commit(&self.state.discriminator, None)?;
        Ok(PhaseSums { loss: sums[0], right: sums[1] })
    }

    /// The updater of the network that `phase` updates.
    pub(super) fn updater(&self, phase: Phase) -> &Updater {
        match phase {
            Phase::D => &self.update_d,
            Phase::G1 | Phase::G2 => &self.update_g,
        }
    }
}
