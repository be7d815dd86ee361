//! One phase: backward, exchange, commit.

use std::sync::Arc;

use takuma_core::config::RunConfig;
use tch::Tensor;

use crate::collective::CollectiveError;
use crate::torch::{self, TorchError};
use crate::trainer::{Adam, Exchange, GradientBuckets};

/// Why a phase was not applied. Nothing of it is: weights, moments and statistics are as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PhaseError {
    /// The exchange broke: re-form the group and run the phase again.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// libtorch failed on this worker alone.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// Applies losses to one network: its optimizer and its gradients' exchange.
pub struct Updater {
    exchange: Arc<Exchange>,
    optimizer: Adam,
    /// None when alone: gradients are used where backward left them.
    buckets: Option<GradientBuckets>,
}

impl Updater {
    /// An updater of the network that owns `params`, with Adam's state at zero.
    ///
    /// # Errors
    /// libtorch's, for a tensor that takes no gradient.
    pub fn new(config: &RunConfig, exchange: &Arc<Exchange>, params: &[&Tensor]) -> Result<Self, TorchError> {
        let buckets = if exchange.is_alone() {
            None
        } else {
            Some(GradientBuckets::new(exchange, params, config.bucket_bytes)?)
        };
        Ok(Self { exchange: Arc::clone(exchange), optimizer: Adam::new(config, params), buckets })
    }

    /// Backward of `loss` into `params`, sum over all workers, optimizer step.
    ///
    /// # Errors
    /// The parameters are then unchanged.
    pub fn apply(&mut self, loss: &Tensor, params: &[&Tensor]) -> Result<(), PhaseError> {
        let result = self.try_apply(loss, params);
        if result.is_err()
            && let Some(buckets) = &self.buckets
        {
            buckets.discard();
        }
        torch::clear_gradients(params)?;
        result
    }

    /// The optimizer, for checkpoints.
    #[must_use]
    pub fn optimizer(&self) -> &Adam {
        &self.optimizer
    }

    fn try_apply(&mut self, loss: &Tensor, params: &[&Tensor]) -> Result<(), PhaseError> {
        torch::backward(loss, params).map_err(|error| self.cause(error))?;
        match &self.buckets {
            None => {
                let grads: Vec<Tensor> = params.iter().map(|param| param.grad()).collect();
                self.optimizer.step(params, &grads.iter().collect::<Vec<_>>())?;
            }
            Some(buckets) => {
                let gradients = buckets.finish()?;
                self.optimizer.step(params, &gradients.tensors())?;
                buckets.recycle(gradients);
            }
        }
        Ok(())
    }

    /// What made libtorch give up: the exchange inside it, if that failed.
    pub fn cause(&self, error: TorchError) -> PhaseError {
        self.exchange.take_error().map_or(PhaseError::Torch(error), PhaseError::Exchange)
    }
}
