//! [`Lane`]: the passes of a phase over one part of a worker's batch, up to the gradients.
//!
//! Normally a worker is one lane, which computes with all of its threads. In exact mode it has several,
//! cut by the run's configuration alone and computed each on one thread.

use std::sync::Arc;

use takuma_core::config::BatchNorm;
use tch::{Kind, Tensor};

use super::dcgan::{Batch, DcganState};
use super::phase::Phase;
use crate::model::{Network, NormUpdates, Pass};
use crate::torch::{self, SumReducer, TorchError};

/// What every lane must know of the phase.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    /// Images per step over all workers.
    pub(super) global_batch: i64,
    pub(super) batch_norm: BatchNorm,
    /// [`crate::trainer::Exchange::groups`] of the moment.
    pub(super) group: u64,
}

/// A lane's shares of a phase's numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shares {
    /// Of the mean loss over the global batch.
    pub(super) loss: f64,
    /// Logits on the right side of 0, in D's phase.
    pub(super) right: f64,
}

/// A phase's numbers as they come out of its passes: scalars that may still be computed.
pub(super) struct Results {
    /// Of the mean loss over the global batch, in the weights' type.
    pub(super) loss: Tensor,
    /// Logits on the right side of 0, f64; none in G's phases.
    pub(super) right: Option<Tensor>,
}

impl Results {
    /// Waits for the numbers.
    pub(super) fn read(&self) -> Shares {
        let right = self.right.as_ref().map_or(0.0, |right| right.double_value(&[]));
        Shares { loss: self.loss.double_value(&[]), right }
    }
}

/// A pass of G that waits for its update.
struct GeneratorPass {
    /// Where it was made: a graph exchanges with the group that it was made in.
    group: u64,
    noise_nz: Tensor,
    /// `[N, 3, 64, 64]`, with the graph back to G's weights.
    fakes_nchw: Tensor,
    norms: NormUpdates,
}

/// Networks with gradients of their own over the worker's weights.
pub(super) struct Lane {
    state: DcganState,
    /// Sums batch statistics over the global batch; none if there is nobody else.
    reducer: Option<Arc<dyn SumReducer>>,
    /// The phase's pass of G; D's is kept for G1.
    pass: Option<GeneratorPass>,
    d_norms: NormUpdates,
}

impl Lane {
    /// A lane over the weights of `state`, which must stay in their memory.
    pub(super) fn new(state: &DcganState) -> Self {
        Self { state: state.alias(), reducer: None, pass: None, d_norms: NormUpdates::default() }
    }

    /// The lane's networks: parameters in the worker's memory, gradients of its own.
    pub(super) fn state(&self) -> &DcganState {
        &self.state
    }

    /// Sets who sums the batch statistics from now on.
    pub(super) fn reduce_by(&mut self, reducer: Option<Arc<dyn SumReducer>>) {
        self.reducer = reducer;
    }

    /// Forgets the pass of G and its graph.
    pub(super) fn forget(&mut self) {
        self.pass = None;
        self.d_norms = NormUpdates::default();
    }

    /// Forward and backward of `phase`. Gradients are then complete in the phase's network or have gone to
    /// its buckets, and statistics wait in [`Lane::norms`].
    ///
    /// # Errors
    /// libtorch's, or a failed exchange inside of it. The pass of G is then unusable.
    pub(super) fn run(
        &mut self,
        phase: Phase,
        batch: &Batch,
        setting: &Setting,
    ) -> Result<Results, TorchError> {
        // Taken out: whatever fails from here on, the pass is gone, as its graph may be half used.
        let pass = match self.pass.take() {
            Some(kept) if phase == Phase::G1 && kept.is_of(batch, setting) => kept,
            _ => self.generate(&batch.noise_nz, setting)?,
        };
        let results = match phase {
            Phase::D => self.d_passes(&batch.reals_nchw, &pass, setting)?,
            Phase::G1 | Phase::G2 => self.g_passes(&pass, setting)?,
        };
        self.pass = Some(pass);
        Ok(results)
    }

    /// Statistics of the phase that just ran, of the generator and of the discriminator.
    ///
    /// # Panics
    /// If it did not run to its end.
    pub(super) fn norms(&self) -> (&NormUpdates, &NormUpdates) {
        let pass = self.pass.as_ref().expect("a phase that ran to its end leaves its pass of G");
        (&pass.norms, &self.d_norms)
    }

    fn d_passes(
        &mut self,
        reals_nchw: &Tensor,
        pass: &GeneratorPass,
        setting: &Setting,
    ) -> Result<Results, TorchError> {
        let images = joined(reals_nchw, &pass.fakes_nchw.detach());
        let logits = self.discriminate(&images, 2, setting)?;
        let half = logits.size()[0] / 2;
        let (real, fake) = (logits.narrow(0, 0, half), logits.narrow(0, half, half));
        let loss = cross_entropy(&real, 1.0, setting) + cross_entropy(&fake, 0.0, setting);
        torch::backward(&loss, &self.state.discriminator.tensors())?;
        let right = real.gt(0.0).sum(Kind::Double) + fake.lt(0.0).sum(Kind::Double);
        Ok(Results { loss: loss.detach(), right: Some(right) })
    }

    fn g_passes(&mut self, pass: &GeneratorPass, setting: &Setting) -> Result<Results, TorchError> {
        let logits = self.discriminate(&pass.fakes_nchw, 1, setting)?;
        let loss = cross_entropy(&logits, 1.0, setting);
        torch::backward(&loss, &self.state.generator.tensors())?;
        Ok(Results { loss: loss.detach(), right: None })
    }

    fn generate(&self, noise_nz: &Tensor, setting: &Setting) -> Result<GeneratorPass, TorchError> {
        let mut norms = NormUpdates::default();
        let fakes_nchw =
            self.state.generator.train(noise_nz, &self.pass_of(noise_nz, 1, setting), &mut norms)?;
        Ok(GeneratorPass { group: setting.group, noise_nz: noise_nz.shallow_clone(), fakes_nchw, norms })
    }

    /// Logits of D in training, of `groups` parts with statistics of their own.
    fn discriminate(
        &mut self,
        images_nchw: &Tensor,
        groups: i64,
        setting: &Setting,
    ) -> Result<Tensor, TorchError> {
        let mut norms = NormUpdates::default();
        let pass = self.pass_of(images_nchw, groups, setting);
        let logits = self.state.discriminator.train(images_nchw, &pass, &mut norms)?;
        self.d_norms = norms;
        Ok(logits)
    }

    /// What a pass over `groups` parts of a batch must know of the whole batch.
    fn pass_of(&self, local: &Tensor, groups: i64, setting: &Setting) -> Pass {
        match setting.batch_norm {
            BatchNorm::Sync => {
                Pass { images_per_group: setting.global_batch, groups, reducer: self.reducer.clone() }
            }
            BatchNorm::Local => Pass { images_per_group: local.size()[0] / groups, groups, reducer: None },
        }
    }
}

impl GeneratorPass {
    /// Whether it was made in this group from this batch's noise.
    fn is_of(&self, batch: &Batch, setting: &Setting) -> bool {
        let (own, other) = (&self.noise_nz, &batch.noise_nz);
        // The same memory holds the same noise, and to see that a GPU need not be waited for.
        self.group == setting.group
            && own.size() == other.size()
            && (own.data_ptr() == other.data_ptr() || own.equal(other))
    }
}

/// Sigmoid cross-entropy against one label, summed here and divided by the *global* batch, so that
/// shares add up to the mean.
fn cross_entropy(logits: &Tensor, label: f64, setting: &Setting) -> Tensor {
    let labels = logits.full_like(label);
    logits.binary_cross_entropy_with_logits::<Tensor>(&labels, None, None, tch::Reduction::Sum)
        / setting.global_batch as f64
}

/// `a` then `b` along N, channels_last, in the type of `b`.
fn joined(a: &Tensor, b: &Tensor) -> Tensor {
    let a = if a.kind() == b.kind() { a.shallow_clone() } else { a.to_kind(b.kind()) };
    Tensor::cat(&[a.permute([0, 2, 3, 1]), b.permute([0, 2, 3, 1])], 0).permute([0, 3, 1, 2])
}
