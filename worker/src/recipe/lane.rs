//! [`LaneGraph`]: the passes of a phase over parts of a worker's batch, up to the gradients.
//!
//! Normally a worker is one lane, which computes with all of its threads. In exact mode it has several,
//! cut by the run's configuration alone. They are computed each in a graph of its own, or all in one, with the same
//! bits: whatever is computed, is computed for one lane at a time, but for the sums of batch statistics.

use std::sync::Arc;

use takuma_core::config::BatchNorm;
use tch::{Kind, Tensor};

use super::dcgan::{Batch, DcganState};
use super::phase::Phase;
use crate::model::{Discriminator, Generator, Network, NormUpdates, Pass};
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

/// A pass of G that waits for its update. Lists are by lane.
struct GeneratorPass {
    /// Where it was made: a graph exchanges with the group that it was made in.
    group: u64,
    noise_nz: Vec<Tensor>,
    /// `[N, 3, 64, 64]`, with the graph back to G's weights.
    fakes_nchw: Vec<Tensor>,
    norms: NormUpdates,
}

/// One or more lanes that share an autograd graph, and with it a thread.
#[derive(Default)]
pub(super) struct LaneGraph {
    /// By lane: networks over the worker's weights, with gradients of their own.
    states: Vec<DcganState>,
    /// Sums batch statistics over the global batch; none if there is nobody else.
    reducer: Option<Arc<dyn SumReducer>>,
    /// The phase's pass of G; D's is kept for G1.
    pass: Option<GeneratorPass>,
    d_norms: NormUpdates,
}

impl LaneGraph {
    /// By lane, its networks: parameters in the worker's memory, gradients of its own.
    pub(super) fn states(&self) -> &[DcganState] {
        &self.states
    }

    /// Adds a lane over the weights that the others have, too, and that must stay in their memory.
    pub(super) fn push(&mut self, state: DcganState) {
        self.states.push(state);
    }

    /// Keeps the first `lanes` lanes.
    pub(super) fn truncate(&mut self, lanes: usize) {
        self.states.truncate(lanes);
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

    /// Forward and backward of `phase`, with a batch for each lane. Gradients are then complete in the phase's
    /// networks or have gone to its buckets, and statistics wait in [`LaneGraph::norms`]. Results are by lane.
    ///
    /// # Errors
    /// libtorch's, or a failed exchange inside of it. The pass of G is then unusable.
    pub(super) fn run(
        &mut self,
        phase: Phase,
        batches: &[Batch],
        setting: &Setting,
    ) -> Result<Vec<Results>, TorchError> {
        assert_eq!(batches.len(), self.states.len(), "each lane has its batch");
        // Taken out: whatever fails from here on, the pass is gone, as its graph may be half used.
        let pass = match self.pass.take() {
            Some(kept) if phase == Phase::G1 && kept.is_of(batches, setting) => kept,
            _ => self.generate(batches, setting)?,
        };
        let results = match phase {
            Phase::D => self.d_passes(batches, &pass, setting)?,
            Phase::G1 | Phase::G2 => self.g_passes(&pass, setting)?,
        };
        self.pass = Some(pass);
        Ok(results)
    }

    /// Statistics of the phase that just ran, of the generator and of the discriminator, the same for all lanes.
    ///
    /// # Panics
    /// If it did not run to its end.
    pub(super) fn norms(&self) -> (&NormUpdates, &NormUpdates) {
        let pass = self.pass.as_ref().expect("a phase that ran to its end leaves its pass of G");
        (&pass.norms, &self.d_norms)
    }

    fn d_passes(
        &mut self,
        batches: &[Batch],
        pass: &GeneratorPass,
        setting: &Setting,
    ) -> Result<Vec<Results>, TorchError> {
        let fakes_nchw = pass.fakes_nchw.iter().map(Tensor::detach);
        let images: Vec<Tensor> =
            batches.iter().zip(fakes_nchw).map(|(batch, fakes)| joined(&batch.reals_nchw, &fakes)).collect();
        let logits = self.discriminate(&images, 2, setting)?;
        let halves: Vec<[Tensor; 2]> = logits
            .iter()
            .map(|logits| {
                let half = logits.size()[0] / 2;
                [logits.narrow(0, 0, half), logits.narrow(0, half, half)]
            })
            .collect();
        let losses: Vec<Tensor> = halves
            .iter()
            .map(|[real, fake]| cross_entropy(real, 1.0, setting) + cross_entropy(fake, 0.0, setting))
            .collect();
        backward(&losses, self.states.iter().map(|state| &state.discriminator))?;
        let results = losses.iter().zip(&halves).map(|(loss, [real, fake])| {
            let right = real.gt(0.0).sum(Kind::Double) + fake.lt(0.0).sum(Kind::Double);
            Results { loss: loss.detach(), right: Some(right) }
        });
        Ok(results.collect())
    }

    fn g_passes(&mut self, pass: &GeneratorPass, setting: &Setting) -> Result<Vec<Results>, TorchError> {
        let logits = self.discriminate(&pass.fakes_nchw, 1, setting)?;
        let losses: Vec<Tensor> = logits.iter().map(|logits| cross_entropy(logits, 1.0, setting)).collect();
        backward(&losses, self.states.iter().map(|state| &state.generator))?;
        Ok(losses.iter().map(|loss| Results { loss: loss.detach(), right: None }).collect())
    }

    fn generate(&self, batches: &[Batch], setting: &Setting) -> Result<GeneratorPass, TorchError> {
        let noise_nz: Vec<Tensor> = batches.iter().map(|batch| batch.noise_nz.shallow_clone()).collect();
        let lanes: Vec<&Generator> = self.states.iter().map(|state| &state.generator).collect();
        let mut norms = NormUpdates::default();
        let pass = self.pass_of(&noise_nz, 1, setting);
        let fakes_nchw = Generator::train(&lanes, &noise_nz, &pass, &mut norms)?;
        Ok(GeneratorPass { group: setting.group, noise_nz, fakes_nchw, norms })
    }

    /// By lane, logits of D in training, of `groups` parts with statistics of their own.
    fn discriminate(
        &mut self,
        images_nchw: &[Tensor],
        groups: i64,
        setting: &Setting,
    ) -> Result<Vec<Tensor>, TorchError> {
        let lanes: Vec<&Discriminator> = self.states.iter().map(|state| &state.discriminator).collect();
        let mut norms = NormUpdates::default();
        let pass = self.pass_of(images_nchw, groups, setting);
        let logits = Discriminator::train(&lanes, images_nchw, &pass, &mut norms)?;
        self.d_norms = norms;
        Ok(logits)
    }

    /// What a pass over `groups` parts of each lane must know of the whole batch.
    fn pass_of(&self, lanes: &[Tensor], groups: i64, setting: &Setting) -> Pass {
        match setting.batch_norm {
            BatchNorm::Sync => {
                Pass { images_per_group: setting.global_batch, groups, reducer: self.reducer.clone() }
            }
            // Of one lane: exact mode has no local statistics.
            BatchNorm::Local => Pass { images_per_group: lanes[0].size()[0] / groups, groups, reducer: None },
        }
    }
}

impl GeneratorPass {
    /// Whether it was made in this group from the noise of these batches.
    fn is_of(&self, batches: &[Batch], setting: &Setting) -> bool {
        let is_same = |(own, batch): (&Tensor, &Batch)| {
            let other = &batch.noise_nz;
            // The same memory holds the same noise, and to see that a GPU need not be waited for.
            own.size() == other.size() && (own.data_ptr() == other.data_ptr() || own.equal(other))
        };
        self.group == setting.group
            && self.noise_nz.len() == batches.len()
            && self.noise_nz.iter().zip(batches).all(is_same)
    }
}

/// One backward pass from the losses of all lanes to their networks' gradients: each lane's are those of its own loss.
fn backward<'a, N: Network + 'a>(
    losses: &[Tensor],
    networks: impl Iterator<Item = &'a N>,
) -> Result<(), TorchError> {
    let parameters: Vec<&Tensor> = networks.flat_map(Network::tensors).collect();
    let (first, others) = losses.split_first().expect("there is a lane");
    let sum = others.iter().fold(first.shallow_clone(), |sum, loss| sum + loss);
    torch::backward(&sum, &parameters)
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
