//! [`Updater`]: exchange, check and optimizer step of one network.

use std::sync::Arc;

use takuma_core::config::RunConfig;
use tch::Tensor;

use super::phase::{Phase, PhaseError};
use crate::collective::CollectiveError;
use crate::model::Network;
use crate::torch::{self, TorchError};
use crate::trainer::{Adam, Exchange, GradientBuckets, SumOrder, SummedGradients};

/// Applies summed gradients to one network: its optimizer and its gradients' exchange.
pub struct Updater {
    optimizer: Adam,
    buckets: GradientBuckets,
}

impl Updater {
    /// An updater of networks like `network`, with Adam's state at zero.
    #[must_use]
    pub fn new(config: &RunConfig, exchange: &Arc<Exchange>, network: &dyn Network) -> Self {
        let params = network.tensors();
        let order = if config.exact { SumOrder::Lanes } else { SumOrder::Workers };
        Self {
            optimizer: Adam::new(config, &params),
            buckets: GradientBuckets::new(exchange, order, &params, config.bucket_bytes),
        }
    }

    /// Takes the gradients of lane number `lane`, whose network over the same weights is `network`.
    ///
    /// # Errors
    /// libtorch's, for a tensor that takes no gradient.
    pub fn hook(&self, lane: usize, network: &dyn Network) -> Result<(), TorchError> {
        self.buckets.hook(lane, &network.tensors())
    }

    /// Gets ready for a backward pass in the first `lanes` lanes.
    ///
    /// # Panics
    /// If gradients have to be exchanged and are not f32: only that goes over the wire.
    pub fn begin(&self, lanes: usize) {
        self.buckets.begin(lanes);
    }

    /// Waits for the sums of the backward pass that just ended (sums on devices have been waited for), checks them and
    /// `loss`, and updates `network`. `first` is the first lane's.
    ///
    /// # Errors
    /// The network is then unchanged.
    pub fn apply(
        &self,
        phase: Phase,
        loss: f64,
        network: &dyn Network,
        first: &dyn Network,
    ) -> Result<(), PhaseError> {
        let gradients = self.gradients(first)?;
        // All workers hold the same sums, so all of them decide alike without another exchange.
        check_finite(phase, loss, network, &gradients.tensors())?;
        self.optimizer.step(&network.tensors(), &gradients.tensors(), None)?;
        self.recycle(gradients);
        Ok(())
    }

    /// The sums of the backward pass that just ended, in the order of the parameters. `first` is the first lane's
    /// network. In a group that sums on devices they are enqueued only.
    ///
    /// # Errors
    /// The first exchange that failed.
    pub fn gradients(&self, first: &dyn Network) -> Result<SummedGradients, CollectiveError> {
        self.buckets.finish(&first.tensors())
    }

    /// Takes the buffers of gradients back for the next pass.
    pub fn recycle(&self, gradients: SummedGradients) {
        self.buckets.recycle(gradients);
    }

    /// Forgets the backward pass, applied or failed half-way.
    pub fn end(&self) {
        self.buckets.end();
    }

    /// The optimizer, for checkpoints.
    #[must_use]
    pub fn optimizer(&self) -> &Adam {
        &self.optimizer
    }
}

/// Refuses sums that are infinite or not a number.
fn check_finite(
    phase: Phase,
    loss: f64,
    network: &dyn Network,
    gradients: &[&Tensor],
) -> Result<(), PhaseError> {
    let gradient = torch::first_not_finite(gradients)?;
    blame(loss, network, gradient).map_or(Ok(()), |what| Err(PhaseError::NotFinite { phase, what }))
}

/// What is not finite, in words: the loss, the gradient of parameter number `gradient`, or both.
pub(super) fn blame(loss: f64, network: &dyn Network, gradient: Option<usize>) -> Option<String> {
    let gradient = gradient.map(|index| format!("the gradient of {}", network.parameters()[index].name));
    match (loss.is_finite(), gradient) {
        (true, gradient) => gradient,
        (false, None) => Some("the loss".to_owned()),
        (false, Some(gradient)) => Some(format!("the loss and {gradient}")),
    }
}

#[cfg(test)]
mod tests {
    use takuma_core::config::Recipe;
    use tch::Kind;

    use super::*;
    use crate::model::{BatchNorm, Parameter, Weights};

    /// Two parameters of zeros.
    struct Zeros([Parameter; 2]);

    impl Network for Zeros {
        fn parameters(&self) -> Vec<&Parameter> {
            self.0.iter().collect()
        }
        fn norms(&self) -> Vec<&BatchNorm> {
            Vec::new()
        }
        fn norms_mut(&mut self) -> Vec<&mut BatchNorm> {
            Vec::new()
        }
    }

    #[test]
    fn infinite_gradient_of_a_finite_loss_is_named_and_not_applied() {
        let weights = Weights::new(0, 0, Kind::Float);
        let zeros = Zeros(["one.weight", "two.weight"].map(|name| weights.constant(name, &[3], 0.0)));
        let config = RunConfig::new(Recipe::DcganTiny, "file:///none");
        let updater = Updater::new(&config, &Exchange::new(), &zeros);
        let [one, two] = &zeros.0;
        // The square root's slope at 0 is infinite.
        let loss = (&one.tensor + two.tensor.sqrt()).sum(Kind::Float);
        updater.begin(1);
        torch::backward(&loss, &zeros.tensors()).unwrap();
        let error = updater.apply(Phase::G2, 0.0, &zeros, &zeros).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("the gradient of two.weight") && message.contains("g2"), "{message}");
        for parameter in &zeros.0 {
            assert_eq!(parameter.tensor.abs().max().double_value(&[]), 0.0);
        }
        torch::clear_gradients(&zeros.tensors()).unwrap();
        let loss = one.tensor.sum(Kind::Float) + two.tensor.sum(Kind::Float);
        torch::backward(&loss, &zeros.tensors()).unwrap();
        updater.apply(Phase::G2, 0.0, &zeros, &zeros).unwrap();
        assert!(two.tensor.max().double_value(&[]) < 0.0);
    }
}
