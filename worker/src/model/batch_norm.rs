//! [`BatchNorm`]: a layer whose running statistics commit with the phase, not with the forward pass.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::parameters::{Network, Parameter, Weights};
use crate::torch::{self, NormLane, SumReducer, TorchError};

/// Added to the variance (PyTorch's default).
const EPS: f64 = 1e-5;
/// Weight of the newest batch in the running statistics: a decay of 0.9.
const MOMENTUM: f64 = 0.1;

/// What a forward pass in training must know of the group.
pub struct Pass {
    /// Images over all lanes and workers in each part of the batch that has statistics of its own.
    pub images_per_group: i64,
    /// Parts of each lane: 2 where real and fake images go through in one tensor.
    pub groups: i64,
    /// Sums statistics over the workers; none = one's own batch.
    pub reducer: Option<Arc<dyn SumReducer>>,
}

/// Batch normalisation with its trained scale and shift and its running statistics.
#[derive(Debug)]
pub struct BatchNorm {
    name: String,
    weight: Parameter,
    bias: Parameter,
    running_mean: Tensor,
    running_var: Tensor,
    /// Shared by all normalisations of a network.
    batches: Tensor,
}

/// Statistics of a forward pass that wait for their phase to be applied.
#[derive(Debug, Default)]
pub struct NormUpdates(Vec<NormUpdate>);

#[derive(Debug)]
struct NormUpdate {
    /// f64 `[groups, 2, C]`.
    stats: Tensor,
    elements: f64,
}

impl BatchNorm {
    /// A layer over `channels`: scale 1, shift 0, running mean 0 and variance 1.
    pub fn new(weights: &Weights, name: &str, channels: i64) -> Self {
        let options = (weights.arithmetic().kind, weights.arithmetic().device);
        Self {
            name: name.to_owned(),
            weight: weights.constant(&format!("{name}.weight"), &[channels], 1.0),
            bias: weights.constant(&format!("{name}.bias"), &[channels], 0.0),
            running_mean: Tensor::zeros([channels], options),
            running_var: Tensor::ones([channels], options),
            batches: weights.batches(),
        }
    }

    /// The same trained tensors, with gradients of their own. For training: running statistics are those
    /// of the moment.
    #[must_use]
    pub fn alias(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.alias(),
            bias: self.bias.alias(),
            running_mean: self.running_mean.copy(),
            running_var: self.running_var.copy(),
            batches: self.batches.copy(),
        }
    }

    /// Normalises each lane's `x` with the statistics of the batch, then applies the activation (`slope` as in
    /// [`torch::BatchNormOptions`]). Running statistics change only when `updates` are committed.
    ///
    /// # Shapes
    /// By lane: `[N, C, H, W]` to the same, channels_last.
    ///
    /// # Errors
    /// libtorch's, or a failed exchange of statistics.
    pub fn train(
        lanes: &[&Self],
        x: &[Tensor],
        slope: f64,
        pass: &Pass,
        updates: &mut NormUpdates,
    ) -> Result<Vec<Tensor>, TorchError> {
        let options = torch::BatchNormOptions {
            groups: pass.groups,
            images_per_group: pass.images_per_group,
            eps: EPS,
            slope,
            reducer: pass.reducer.clone(),
        };
        let parts: Vec<_> = lanes
            .iter()
            .zip(x)
            .map(|(lane, x)| NormLane { x, weight: &lane.weight.tensor, bias: &lane.bias.tensor })
            .collect();
        let (y, stats) = torch::batch_norm_lanes(&parts, &options)?;
        let pixels: i64 = x[0].size().iter().skip(2).product();
        updates.0.push(NormUpdate { stats, elements: (pass.images_per_group * pixels) as f64 });
        Ok(y)
    }

    /// Normalises with the running statistics.
    ///
    /// # Shapes
    /// `x` `[N, C, H, W]` to the same.
    pub fn infer(&self, x: &Tensor, slope: f64) -> Tensor {
        let y = x.batch_norm(
            Some(&self.weight.tensor),
            Some(&self.bias.tensor),
            Some(&self.running_mean),
            Some(&self.running_var),
            false,
            MOMENTUM,
            EPS,
            false,
        );
        if slope == 1.0 { y } else { y.maximum(&(&y * slope)) }
    }

    /// The trained tensors.
    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }

    /// The untrained tensors under their PyTorch names: running mean and variance `[C]`, and the
    /// count of batches, an int64 scalar.
    pub fn buffers(&self) -> [(String, Tensor); 3] {
        [
            (format!("{}.running_mean", self.name), self.running_mean.shallow_clone()),
            (format!("{}.running_var", self.name), self.running_var.shallow_clone()),
            (format!("{}.num_batches_tracked", self.name), self.batches.shallow_clone()),
        ]
    }

    /// Sets what [`BatchNorm::buffers`] returned, in that order.
    ///
    /// # Errors
    /// libtorch's, for tensors of other shapes.
    pub fn restore(&mut self, buffers: &[Tensor; 3]) -> Result<(), tch::TchError> {
        self.running_mean.f_copy_(&buffers[0])?;
        self.running_var.f_copy_(&buffers[1])?;
        self.batches.f_copy_(&buffers[2])?;
        Ok(())
    }
}

impl NormUpdates {
    /// Commits the statistics of one forward pass to the layers of `network`, part after part, unless the scalar
    /// `left_out` is 1 by then. May be called again: a forward pass that stands for two updates counts twice.
    /// The running variance is the unbiased one.
    ///
    /// # Errors
    /// libtorch's.
    ///
    /// # Panics
    /// If `network` is not that of the pass.
    ///
    /// # Source
    /// `torch.nn.BatchNorm2d`.
    pub fn commit(&self, network: &dyn Network, left_out: Option<&Tensor>) -> Result<(), TorchError> {
        let norms = network.norms();
        assert_eq!(norms.len(), self.0.len(), "each layer normalised once in the pass");
        let layers: Vec<_> = norms
            .iter()
            .zip(&self.0)
            .map(|(norm, update)| torch::RunningStatistics {
                mean: &norm.running_mean,
                variance: &norm.running_var,
                batch: &update.stats,
                elements: update.elements,
            })
            .collect();
        torch::commit_statistics(&layers, MOMENTUM, left_out)?;
        let groups = self.0.first().map_or(0, |update| update.stats.size()[0]);
        let counted = match left_out {
            None => Tensor::from(groups),
            Some(left_out) => (left_out * -(groups as f64) + groups as f64).to_kind(Kind::Int64),
        };
        // Shared by all layers.
        if let Some(norm) = norms.first() {
            drop(norm.batches.shallow_clone().g_add_(&counted));
        }
        Ok(())
    }
}
