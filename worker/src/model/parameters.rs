//! [`Weights`]: initial values as a pure function of the seed. [`Network`]: what all networks share.

use takuma_core::noise::{CounterRng, Purpose};
use tch::{Kind, Tensor};

use super::arithmetic::Arithmetic;
use super::batch_norm::BatchNorm;

/// Standard deviation of initial weights.
///
/// # Source
/// Radford et al. 2016 (DCGAN), section 4.
const INIT_STD: f32 = 0.02;
/// A truncated normal draws again beyond so many standard deviations (TensorFlow's `truncated_normal`).
const TRUNCATED_AT: f32 = 2.0;

/// A trained tensor under its PyTorch name.
#[derive(Debug)]
pub struct Parameter {
    /// Key in PyTorch's `state_dict`.
    pub name: String,
    /// Leaf that takes gradients. Convolution weights are channels_last.
    pub tensor: Tensor,
}

impl Parameter {
    fn new(name: String, values: &Tensor) -> Self {
        let tensor = values.copy().detach().set_requires_grad(true);
        Self { name, tensor }
    }
}

impl Parameter {
    /// The same values in the same memory, with a gradient of its own.
    #[must_use]
    pub fn alias(&self) -> Self {
        Self { name: self.name.clone(), tensor: self.tensor.detach().set_requires_grad(true) }
    }
}

/// A network seen from the optimizer and the checkpoint.
pub trait Network {
    /// Every trained tensor, in the order of PyTorch's `parameters()`.
    fn parameters(&self) -> Vec<&Parameter>;
    /// Every batch normalisation, in order of the forward pass.
    fn norms(&self) -> Vec<&BatchNorm>;
    /// The same, to commit running statistics and to restore a checkpoint.
    fn norms_mut(&mut self) -> Vec<&mut BatchNorm>;

    /// The trained tensors alone.
    fn tensors(&self) -> Vec<&Tensor> {
        self.parameters().into_iter().map(|parameter| &parameter.tensor).collect()
    }
}

/// Draws initial weights: each tensor from a stream of its own, so every worker has the same ones
/// without an exchange.
#[derive(Debug)]
pub struct Weights {
    seed: u64,
    network: u64,
    drawn: u64,
    arithmetic: Arithmetic,
    /// See [`Weights::batches`].
    batches: Tensor,
}

impl Weights {
    /// Weights of network number `network` of the run with `seed`.
    #[must_use]
    pub fn new(seed: u64, network: u64, arithmetic: impl Into<Arithmetic>) -> Self {
        let arithmetic = arithmetic.into();
        let batches = Tensor::zeros([], (Kind::Int64, arithmetic.device));
        Self { seed, network, drawn: 0, arithmetic, batches }
    }

    /// Where the network lies and what it computes in.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The count of batches that all normalisations of the network share: they see the same ones.
    pub fn batches(&self) -> Tensor {
        self.batches.shallow_clone()
    }

    /// Normal(0, 0.02).
    pub fn normal(&mut self, name: &str, size: &[i64]) -> Parameter {
        self.draw(name, size, f32::INFINITY)
    }

    /// Normal(0, 0.02), drawn again beyond two standard deviations.
    pub fn truncated_normal(&mut self, name: &str, size: &[i64]) -> Parameter {
        self.draw(name, size, TRUNCATED_AT)
    }

    /// One value throughout.
    pub fn constant(&self, name: &str, size: &[i64], value: f64) -> Parameter {
        let values = Tensor::full(size, value, (self.arithmetic.kind, self.arithmetic.device));
        Parameter::new(name.to_owned(), &values)
    }

    fn draw(&mut self, name: &str, size: &[i64], bound: f32) -> Parameter {
        let mut rng = CounterRng::new(self.seed, Purpose::Weights, self.network, self.drawn);
        self.drawn += 1;
        let mut values = vec![0.0f32; size.iter().product::<i64>() as usize];
        rng.fill_normal(&mut values);
        for value in &mut values {
            while value.abs() > bound {
                rng.fill_normal(std::slice::from_mut(value));
            }
            *value *= INIT_STD;
        }
        let Arithmetic { device, kind, .. } = self.arithmetic;
        let values = channels_last(&Tensor::from_slice(&values).view(size).to_kind(kind));
        Parameter::new(name.to_owned(), &values.to_device(device))
    }
}

/// The same values with the channel innermost in memory, for tensors of four dimensions.
pub fn channels_last(tensor: &Tensor) -> Tensor {
    if tensor.dim() != 4 {
        return tensor.contiguous();
    }
    tensor.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_draw_equal_weights_and_networks_differ() {
        let draw = |seed, network| {
            let parameter = Weights::new(seed, network, Kind::Float).normal("w", &[4, 3, 5, 5]);
            Vec::<f32>::try_from(parameter.tensor.detach().contiguous().view(-1)).unwrap()
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(2, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
    }

    #[test]
    fn truncated_weights_stay_within_two_deviations() {
        let parameter = Weights::new(1, 0, Kind::Float).truncated_normal("w", &[64, 64, 5, 5]);
        let largest = parameter.tensor.abs().max().double_value(&[]);
        assert!(largest <= 0.04 + 1e-8 && largest > 0.039, "{largest}");
    }
}
