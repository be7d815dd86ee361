//! DCGAN's generator: noise to 64x64 colour images.

use tch::{Kind, Tensor};

use super::arithmetic::{Arithmetic, cast};
use super::batch_norm::{BatchNorm, NormUpdates, Pass};
use super::layers::{Deconv, Linear, each};
use super::parameters::{Network, Parameter, Weights, channels_last};
use crate::torch::TorchError;

/// Numbers in one noise vector.
pub const NOISE_LEN: i64 = 100;
/// Side of the first feature map.
const START: i64 = 4;
/// Transposed convolutions with a batch norm behind them.
const BLOCKS: usize = 3;
/// No activation behind a batch norm.
const LINEAR: f64 = 1.0;
/// ReLU behind a batch norm.
const RELU: f64 = 0.0;

/// A linear layer with ReLU, then batch norm and four 5x5 stride-2 transposed convolutions; tanh.
#[derive(Debug)]
pub struct Generator {
    compute: Kind,
    channels: i64,
    fc: Linear,
    bn0: BatchNorm,
    deconv1: Deconv,
    bn1: BatchNorm,
    deconv2: Deconv,
    bn2: BatchNorm,
    deconv3: Deconv,
    bn3: BatchNorm,
    deconv4: Deconv,
}

impl Generator {
    /// With `8c` channels in the first feature map, halved by each transposed convolution.
    pub fn new(weights: &mut Weights, c: i64) -> Self {
        Self {
            compute: weights.arithmetic().compute,
            channels: 8 * c,
            fc: Linear::new(weights, "fc", NOISE_LEN, 8 * c * START * START),
            bn0: BatchNorm::new(weights, "bn0", 8 * c),
            deconv1: Deconv::new(weights, "deconv1", 8 * c, 4 * c),
            bn1: BatchNorm::new(weights, "bn1", 4 * c),
            deconv2: Deconv::new(weights, "deconv2", 4 * c, 2 * c),
            bn2: BatchNorm::new(weights, "bn2", 2 * c),
            deconv3: Deconv::new(weights, "deconv3", 2 * c, c),
            bn3: BatchNorm::new(weights, "bn3", c),
            deconv4: Deconv::new(weights, "deconv4", c, 3),
        }
    }

    /// Where it lies and what it computes in.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        let weight = &self.fc.parameters()[0].tensor;
        Arithmetic { device: weight.device(), kind: weight.kind(), compute: self.compute }
    }

    /// The same weights in the same memory, with gradients of their own: for one lane of a worker.
    #[must_use]
    pub fn alias(&self) -> Self {
        Self {
            compute: self.compute,
            channels: self.channels,
            fc: self.fc.alias(),
            bn0: self.bn0.alias(),
            deconv1: self.deconv1.alias(),
            bn1: self.bn1.alias(),
            deconv2: self.deconv2.alias(),
            bn2: self.bn2.alias(),
            deconv3: self.deconv3.alias(),
            bn3: self.bn3.alias(),
            deconv4: self.deconv4.alias(),
        }
    }

    /// Images in training: of each lane, whose weights are aliases of one network's, by its own aliases.
    ///
    /// # Shapes
    /// By lane: `noise_nz` `[N, 100]` in `[-1, 1]` to `[N, 3, 64, 64]` in `[-1, 1]`, channels_last, in the type
    /// that the network computes in.
    ///
    /// # Errors
    /// libtorch's, or a failed exchange of batch statistics.
    pub fn train(
        lanes: &[&Self],
        noise_nz: &[Tensor],
        pass: &Pass,
        updates: &mut NormUpdates,
    ) -> Result<Vec<Tensor>, TorchError> {
        let mut x = each(lanes, noise_nz, |lane, noise_nz| Ok(lane.stem(&cast(noise_nz, lane.compute))))?;
        let norms: Vec<_> = lanes.iter().map(|lane| &lane.bn0).collect();
        x = BatchNorm::train(&norms, &x, LINEAR, pass, updates)?;
        for block in 0..BLOCKS {
            x = each(lanes, &x, |lane, x| Ok(lane.blocks()[block].0.forward(x)))?;
            let norms: Vec<_> = lanes.iter().map(|lane| lane.blocks()[block].1).collect();
            x = BatchNorm::train(&norms, &x, RELU, pass, updates)?;
        }
        each(lanes, &x, |lane, x| Ok(lane.deconv4.forward(x).tanh()))
    }

    /// Images with the running statistics: what samples show. Computed in the type of `noise_nz`.
    ///
    /// # Shapes
    /// `[N, 100]` to `[N, 3, 64, 64]` in `[-1, 1]`, channels_last.
    pub fn infer(&self, noise_nz: &Tensor) -> Tensor {
        tch::no_grad(|| {
            let mut x = self.bn0.infer(&self.stem(noise_nz), LINEAR);
            for (deconv, norm) in self.blocks() {
                x = norm.infer(&deconv.forward(&x), RELU);
            }
            self.deconv4.forward(&x).tanh()
        })
    }

    fn stem(&self, noise_nz: &Tensor) -> Tensor {
        let x = self.fc.forward(noise_nz).relu();
        channels_last(&x.view([-1, self.channels, START, START]))
    }

    fn blocks(&self) -> [(&Deconv, &BatchNorm); BLOCKS] {
        [(&self.deconv1, &self.bn1), (&self.deconv2, &self.bn2), (&self.deconv3, &self.bn3)]
    }
}

impl Network for Generator {
    fn parameters(&self) -> Vec<&Parameter> {
        [
            self.fc.parameters(),
            self.bn0.parameters(),
            self.deconv1.parameters(),
            self.bn1.parameters(),
            self.deconv2.parameters(),
            self.bn2.parameters(),
            self.deconv3.parameters(),
            self.bn3.parameters(),
            self.deconv4.parameters(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn norms(&self) -> Vec<&BatchNorm> {
        vec![&self.bn0, &self.bn1, &self.bn2, &self.bn3]
    }

    fn norms_mut(&mut self) -> Vec<&mut BatchNorm> {
        vec![&mut self.bn0, &mut self.bn1, &mut self.bn2, &mut self.bn3]
    }
}
