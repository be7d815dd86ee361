//! DCGAN's iteration: one discriminator update, then two generator updates with the same noise.
//!
//! No work is wasted, and nothing changes by that: the generator's pass of the D phase is the pass of
//! the first G phase (same noise, same weights); G phases compute no weight gradient of D; real and
//! fake images go through D in one tensor with batch statistics for each half.
//!
//! # Source
//! Radford et al. 2016; Goodfellow et al. 2014 (non-saturating loss).

use std::sync::Arc;

use takuma_core::config::{BatchNorm, Recipe, RunConfig};
use tch::{Kind, Tensor};

use super::update::{PhaseError, Updater};
use crate::model::{Discriminator, Generator, Network, NormUpdates, Pass, Weights};
use crate::torch::{SumReducer, TorchError};
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
}

/// This worker's share of the reported numbers: to be summed over workers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct IterationSums {
    /// Cross-entropy of reals and fakes over the global batch.
    pub d_loss: f64,
    /// The same of the first and of the second G update.
    pub g_losses: [f64; 2],
    /// Logits on the right side of 0, of twice the global batch.
    pub d_right: f64,
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
    pub fn new(recipe: Recipe, seed: u64, kind: Kind) -> Self {
        let c = base_channels(recipe);
        Self {
            generator: Generator::new(&mut Weights::new(seed, 0, kind), c),
            discriminator: Discriminator::new(&mut Weights::new(seed, 1, kind), c),
        }
    }
}

/// DCGAN in training on one worker of a group.
pub struct Dcgan {
    state: DcganState,
    update_g: Updater,
    update_d: Updater,
    global_batch: i64,
    batch_norm: BatchNorm,
    exchange: Arc<Exchange>,
}

impl Dcgan {
    /// Takes over `state` for a run in a group.
    ///
    /// # Errors
    /// libtorch's.
    pub fn new(config: &RunConfig, state: DcganState, exchange: &Arc<Exchange>) -> Result<Self, TorchError> {
        Ok(Self {
            update_g: Updater::new(config, exchange, &state.generator.tensors())?,
            update_d: Updater::new(config, exchange, &state.discriminator.tensors())?,
            state,
            global_batch: i64::from(config.global_batch),
            batch_norm: config.batch_norm,
            exchange: Arc::clone(exchange),
        })
    }

    /// The networks.
    #[must_use]
    pub fn state(&self) -> &DcganState {
        &self.state
    }

    /// The networks, to restore a checkpoint into.
    pub fn state_mut(&mut self) -> &mut DcganState {
        &mut self.state
    }

    /// The optimizers of generator and discriminator.
    #[must_use]
    pub fn optimizers(&self) -> [&Adam; 2] {
        [self.update_g.optimizer(), self.update_d.optimizer()]
    }

    /// One iteration, its three phases announced to `on_phase` as "d", "g1" and "g2".
    ///
    /// # Errors
    /// The phase that failed is not applied; those before it are.
    pub fn iterate(
        &mut self,
        batch: &Batch,
        mut on_phase: impl FnMut(&'static str),
    ) -> Result<IterationSums, PhaseError> {
        on_phase("d");
        let mut g_norms = NormUpdates::default();
        let fakes_nchw = self.generate(&batch.noise_nz, &mut g_norms)?;
        let (d_loss, d_right) = self.d_phase(&batch.reals_nchw, &fakes_nchw)?;
        // This pass of G stands for two: the one of the D update and the one of the first G update.
        g_norms.commit(self.state.generator.norms_mut());

        on_phase("g1");
        let first = self.g_phase(&fakes_nchw, &g_norms)?;
        drop(fakes_nchw);

        on_phase("g2");
        let mut g_norms = NormUpdates::default();
        let fakes_nchw = self.generate(&batch.noise_nz, &mut g_norms)?;
        let second = self.g_phase(&fakes_nchw, &g_norms)?;
        Ok(IterationSums { d_loss, g_losses: [first, second], d_right })
    }

    /// D's update. Returns its loss and the logits on the right side, both as this worker's share.
    fn d_phase(&mut self, reals_nchw: &Tensor, fakes_nchw: &Tensor) -> Result<(f64, f64), PhaseError> {
        let images = joined(reals_nchw, &fakes_nchw.detach());
        let mut norms = NormUpdates::default();
        let logits = self
            .state
            .discriminator
            .train(&images, &self.pass(reals_nchw, 2), &mut norms)
            .map_err(|error| self.update_d.cause(error))?;
        let (real, fake) = (
            logits.narrow(0, 0, logits.size()[0] / 2),
            logits.narrow(0, logits.size()[0] / 2, logits.size()[0] / 2),
        );
        let loss = self.cross_entropy(&real, 1.0) + self.cross_entropy(&fake, 0.0);
        self.update_d.apply(&loss, &self.state.discriminator.tensors())?;
        norms.commit(self.state.discriminator.norms_mut());
        let right = real.gt(0.0).sum(Kind::Double) + fake.lt(0.0).sum(Kind::Double);
        Ok((loss.double_value(&[]), right.double_value(&[])))
    }

    /// G's update on images that it made. Returns this worker's share of the loss.
    fn g_phase(&mut self, fakes_nchw: &Tensor, g_norms: &NormUpdates) -> Result<f64, PhaseError> {
        let mut d_norms = NormUpdates::default();
        let logits = self
            .state
            .discriminator
            .train(fakes_nchw, &self.pass(fakes_nchw, 1), &mut d_norms)
            .map_err(|error| self.update_g.cause(error))?;
        let loss = self.cross_entropy(&logits, 1.0);
        self.update_g.apply(&loss, &self.state.generator.tensors())?;
        g_norms.commit(self.state.generator.norms_mut());
        d_norms.commit(self.state.discriminator.norms_mut());
        Ok(loss.double_value(&[]))
    }

    fn generate(&self, noise_nz: &Tensor, norms: &mut NormUpdates) -> Result<Tensor, PhaseError> {
        self.state
            .generator
            .train(noise_nz, &self.pass(noise_nz, 1), norms)
            .map_err(|error| self.update_g.cause(error))
    }

    /// What a pass over this worker's part of a batch must know of the whole batch.
    fn pass(&self, local_part: &Tensor, groups: i64) -> Pass {
        match self.batch_norm {
            BatchNorm::Sync => Pass {
                images_per_group: self.global_batch,
                groups,
                reducer: (!self.exchange.is_alone())
                    .then(|| Arc::clone(&self.exchange) as Arc<dyn SumReducer>),
            },
            BatchNorm::Local => Pass { images_per_group: local_part.size()[0], groups, reducer: None },
        }
    }

    /// Sigmoid cross-entropy against one label, summed here and divided by the *global* batch, so
    /// that the workers' shares add up to the mean.
    fn cross_entropy(&self, logits: &Tensor, label: f64) -> Tensor {
        let labels = logits.full_like(label);
        logits.binary_cross_entropy_with_logits::<Tensor>(&labels, None, None, tch::Reduction::Sum)
            / self.global_batch as f64
    }
}

/// `a` then `b` along N, channels_last.
fn joined(a: &Tensor, b: &Tensor) -> Tensor {
    Tensor::cat(&[a.permute([0, 2, 3, 1]), b.permute([0, 2, 3, 1])], 0).permute([0, 3, 1, 2])
}
