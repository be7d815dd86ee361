//! DCGAN's discriminator: 64x64 colour images to one logit each.

use tch::{Kind, Tensor};

use super::arithmetic::cast;
use super::batch_norm::{BatchNorm, NormUpdates, Pass};
use super::layers::{Conv, Linear, each};
use super::parameters::{Network, Parameter, Weights};
use crate::torch::{self, TorchError};

/// LeakyReLU's negative slope.
///
/// # Source
/// Radford et al. 2016 (DCGAN), section 4.
const SLOPE: f64 = 0.2;
/// Convolutions with a batch norm behind them.
const BLOCKS: usize = 3;

/// Four 5x5 stride-2 convolutions, batch norm on the last three, LeakyReLU after each, one linear.
#[derive(Debug)]
pub struct Discriminator {
    compute: Kind,
    conv1: Conv,
    conv2: Conv,
    bn2: BatchNorm,
    conv3: Conv,
    bn3: BatchNorm,
    conv4: Conv,
    bn4: BatchNorm,
    fc: Linear,
}

impl Discriminator {
    /// With `c` channels after the first convolution and twice as many after each further one.
    pub fn new(weights: &mut Weights, c: i64) -> Self {
        Self {
            compute: weights.arithmetic().compute,
            conv1: Conv::new(weights, "conv1", 3, c),
            conv2: Conv::new(weights, "conv2", c, 2 * c),
            bn2: BatchNorm::new(weights, "bn2", 2 * c),
            conv3: Conv::new(weights, "conv3", 2 * c, 4 * c),
            bn3: BatchNorm::new(weights, "bn3", 4 * c),
            conv4: Conv::new(weights, "conv4", 4 * c, 8 * c),
            bn4: BatchNorm::new(weights, "bn4", 8 * c),
            fc: Linear::new(weights, "fc", 8 * c * 4 * 4, 1),
        }
    }

    /// The same weights in the same memory, with gradients of their own: for one lane of a worker.
    #[must_use]
    pub fn alias(&self) -> Self {
        Self {
            compute: self.compute,
            conv1: self.conv1.alias(),
            conv2: self.conv2.alias(),
            bn2: self.bn2.alias(),
            conv3: self.conv3.alias(),
            bn3: self.bn3.alias(),
            conv4: self.conv4.alias(),
            bn4: self.bn4.alias(),
            fc: self.fc.alias(),
        }
    }

    /// Logits in training: of each lane, whose weights are aliases of one network's, by its own aliases.
    ///
    /// # Shapes
    /// By lane: `images_nchw` `[N, 3, 64, 64]` in `[-1, 1]`, of any type, to `[N]` in the weights' type.
    ///
    /// # Errors
    /// libtorch's, or a failed exchange of batch statistics.
    pub fn train(
        lanes: &[&Self],
        images_nchw: &[Tensor],
        pass: &Pass,
        updates: &mut NormUpdates,
    ) -> Result<Vec<Tensor>, TorchError> {
        let mut x = each(lanes, images_nchw, |lane, images_nchw| {
            torch::leaky_relu(&lane.conv1.forward(&cast(images_nchw, lane.compute)), SLOPE)
        })?;
        for block in 0..BLOCKS {
            x = each(lanes, &x, |lane, x| Ok(lane.blocks()[block].0.forward(x)))?;
            let norms: Vec<_> = lanes.iter().map(|lane| lane.blocks()[block].1).collect();
            x = BatchNorm::train(&norms, &x, SLOPE, pass, updates)?;
        }
        each(lanes, &x, |lane, x| Ok(lane.logits(x)))
    }

    fn logits(&self, x: &Tensor) -> Tensor {
        // PyTorch flattens in [C, H, W] order whatever the memory's. The logit has the weights' precision: the
        // loss is made of it, and one column costs nothing.
        let features = cast(&x.contiguous().flatten(1, -1), self.fc.kind());
        self.fc.forward(&features).view(-1)
    }

    fn blocks(&self) -> [(&Conv, &BatchNorm); BLOCKS] {
        [(&self.conv2, &self.bn2), (&self.conv3, &self.bn3), (&self.conv4, &self.bn4)]
    }
}

impl Network for Discriminator {
    fn parameters(&self) -> Vec<&Parameter> {
        [
            self.conv1.parameters(),
            self.conv2.parameters(),
            self.bn2.parameters(),
            self.conv3.parameters(),
            self.bn3.parameters(),
            self.conv4.parameters(),
            self.bn4.parameters(),
            self.fc.parameters(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn norms(&self) -> Vec<&BatchNorm> {
        vec![&self.bn2, &self.bn3, &self.bn4]
    }

    fn norms_mut(&mut self) -> Vec<&mut BatchNorm> {
        vec![&mut self.bn2, &mut self.bn3, &mut self.bn4]
    }
}
