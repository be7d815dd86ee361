//! [`BatchNorm`]: a layer whose running statistics commit with the phase, not with the forward pass.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::parameters::{Parameter, Weights};
use crate::torch::{self, SumReducer, TorchError};

/// Added to the variance (PyTorch's default).
const EPS: f64 = 1e-5;
/// Weight of the newest batch in the running statistics: a decay of 0.9.
const MOMENTUM: f64 = 0.1;

/// What a forward pass in training must know of the group.
pub struct Pass {
    /// Images over all workers in each part of the batch that has statistics of its own.
    pub images_per_group: i64,
    /// Parts of the batch: 2 where real and fake images go through in one tensor.
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
    batches: i64,
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
        let options = (weights.kind(), tch::Device::Cpu);
        Self {
            name: name.to_owned(),
            weight: weights.constant(&format!("{name}.weight"), &[channels], 1.0),
            bias: weights.constant(&format!("{name}.bias"), &[channels], 0.0),
            running_mean: Tensor::zeros([channels], options),
            running_var: Tensor::ones([channels], options),
            batches: 0,
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
            batches: self.batches,
        }
    }

    /// Normalises with the batch's statistics, then applies the activation (`slope` as in
    /// [`torch::BatchNormOptions`]). Running statistics change only when `updates` are committed.
    ///
    /// # Shapes
    /// `x` `[N, C, H, W]` to the same, channels_last.
    ///
    /// # Errors
    /// libtorch's, or a failed exchange of statistics.
    pub fn train(
        &self,
        x: &Tensor,
        slope: f64,
        pass: &Pass,
        updates: &mut NormUpdates,
    ) -> Result<Tensor, TorchError> {
        let options = torch::BatchNormOptions {
            groups: pass.groups,
            images_per_group: pass.images_per_group,
            eps: EPS,
            slope,
            reducer: pass.reducer.clone(),
        };
        let (y, stats) = torch::batch_norm(x, &self.weight.tensor, &self.bias.tensor, &options)?;
        let pixels: i64 = x.size().iter().skip(2).product();
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
            (format!("{}.num_batches_tracked", self.name), Tensor::from(self.batches)),
        ]
    }

    /// Sets what [`BatchNorm::buffers`] returned, in that order.
    ///
    /// # Errors
    /// libtorch's, for tensors of other shapes.
    pub fn restore(&mut self, buffers: &[Tensor; 3]) -> Result<(), tch::TchError> {
        self.running_mean.f_copy_(&buffers[0])?;
        self.running_var.f_copy_(&buffers[1])?;
        self.batches = buffers[2].int64_value(&[]);
        Ok(())
    }

    /// Mixes one part's statistics into the running ones; the running variance is the unbiased one.
    ///
    /// # Source
    /// `torch.nn.BatchNorm2d`.
    fn update(&mut self, mean: &Tensor, variance: &Tensor, elements: f64) {
        let kind = self.running_mean.kind();
        let unbiased = elements / (elements - 1.0).max(1.0);
        let mix = |running: &Tensor, new: Tensor| {
            (running.to_kind(Kind::Double) * (1.0 - MOMENTUM) + new * MOMENTUM).to_kind(kind)
        };
        self.running_mean = mix(&self.running_mean, mean.shallow_clone());
        self.running_var = mix(&self.running_var, variance * unbiased);
        self.batches += 1;
    }
}

impl NormUpdates {
    /// Commits the statistics of one forward pass to `norms`, part after part. May be called again:
    /// a forward pass that stands for two updates counts twice.
    ///
    /// # Panics
    /// If `norms` are not the layers of that pass.
    pub fn commit(&self, norms: Vec<&mut BatchNorm>) {
        assert_eq!(norms.len(), self.0.len(), "each layer normalised once in the pass");
        for (norm, update) in norms.into_iter().zip(&self.0) {
            for group in 0..update.stats.size()[0] {
                let stats = update.stats.get(group);
                norm.update(&stats.get(0), &stats.get(1), update.elements);
            }
        }
    }
}
