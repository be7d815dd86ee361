//! [`Adam`]: the optimizer's state of one network, applied in one fused call.

use takuma_core::config::RunConfig;
use tch::{Device, Kind, Tensor};

use crate::torch::{AdamOptions, AdamTensors, TorchError, fused_adam};

/// Added to Adam's denominator (PyTorch's default).
const EPS: f64 = 1e-8;

/// First and second moments and the step count, by parameter.
#[derive(Debug)]
pub struct Adam {
    options: AdamOptions,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    /// f32 scalars, as PyTorch keeps them.
    steps: Vec<Tensor>,
}

impl Adam {
    /// Zero moments for `params`, with the run's numbers.
    #[must_use]
    pub fn new(config: &RunConfig, params: &[&Tensor]) -> Self {
        // zeros_like keeps the memory format, which the fused kernel wants equal throughout.
        let zeros = || params.iter().map(|param| param.detach().zeros_like()).collect();
        Self {
            options: AdamOptions {
                learning_rate: config.learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                eps: EPS,
            },
            exp_avgs: zeros(),
            exp_avg_sqs: zeros(),
            steps: params.iter().map(|_| Tensor::zeros([], (Kind::Float, Device::Cpu))).collect(),
        }
    }

    /// Updates `params` by `grads`.
    ///
    /// # Errors
    /// libtorch's, for tensors that do not fit together.
    pub fn step(&mut self, params: &[&Tensor], grads: &[&Tensor]) -> Result<(), TorchError> {
        fused_adam(
            &AdamTensors {
                params,
                grads,
                exp_avgs: &self.exp_avgs.iter().collect::<Vec<_>>(),
                exp_avg_sqs: &self.exp_avg_sqs.iter().collect::<Vec<_>>(),
                steps: &self.steps.iter().collect::<Vec<_>>(),
                found_inf: None,
            },
            self.options,
        )
    }

    /// Per parameter its moments and step count, under PyTorch's names.
    pub fn state(&self) -> impl Iterator<Item = [(&'static str, &Tensor); 3]> {
        (0..self.steps.len()).map(|i| {
            [("exp_avg", &self.exp_avgs[i]), ("exp_avg_sq", &self.exp_avg_sqs[i]), ("step", &self.steps[i])]
        })
    }
}
