//! Convolutions and the linear layer: parameters and the fastest exact way through libtorch.
//!
//! A layer computes in the type of its input; its weights are cast to it, and their gradients come back in
//! the weights' own type.

use tch::{Kind, Tensor};

use super::arithmetic::cast;
use super::parameters::{Parameter, Weights};
use crate::torch::TorchError;

/// Side of every kernel.
const KERNEL: i64 = 5;

/// What `layer` makes of each lane's tensor: whatever number of lanes there is, a kernel sees one of them.
pub fn each<N>(
    lanes: &[&N],
    x: &[Tensor],
    layer: impl Fn(&N, &Tensor) -> Result<Tensor, TorchError>,
) -> Result<Vec<Tensor>, TorchError> {
    lanes.iter().zip(x).map(|(lane, x)| layer(lane, x)).collect()
}

/// 5x5 convolution of stride 2 with bias: halves height and width.
#[derive(Debug)]
pub struct Conv {
    weight: Parameter,
    bias: Parameter,
}

impl Conv {
    pub fn new(weights: &mut Weights, name: &str, inputs: i64, outputs: i64) -> Self {
        Self {
            weight: weights.truncated_normal(&format!("{name}.weight"), &[outputs, inputs, KERNEL, KERNEL]),
            bias: weights.constant(&format!("{name}.bias"), &[outputs], 0.0),
        }
    }

    /// `[N, C, H, W]` to `[N, outputs, H/2, W/2]`. Source: `torch.nn.Conv2d(C, outputs, 5, 2, 2)`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [weight, bias] = self.parameters().map(|parameter| cast(&parameter.tensor, x.kind()));
        x.conv2d(&weight, Some(&bias), [2, 2], [2, 2], [1, 1], 1)
    }

    pub fn alias(&self) -> Self {
        Self { weight: self.weight.alias(), bias: self.bias.alias() }
    }

    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}

/// 5x5 transposed convolution of stride 2 with bias: doubles height and width.
#[derive(Debug)]
pub struct Deconv {
    weight: Parameter,
    bias: Parameter,
}

impl Deconv {
    pub fn new(weights: &mut Weights, name: &str, inputs: i64, outputs: i64) -> Self {
        Self {
            weight: weights.normal(&format!("{name}.weight"), &[inputs, outputs, KERNEL, KERNEL]),
            bias: weights.constant(&format!("{name}.bias"), &[outputs], 0.0),
        }
    }

    /// `[N, C, H, W]` to `[N, outputs, 2H, 2W]`.
    /// Source: `torch.nn.ConvTranspose2d(C, outputs, 5, 2, 2, output_padding=1)`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [weight, bias] = self.parameters().map(|parameter| cast(&parameter.tensor, x.kind()));
        x.conv_transpose2d(&weight, Some(&bias), [2, 2], [2, 2], [1, 1], 1, [1, 1])
    }

    pub fn alias(&self) -> Self {
        Self { weight: self.weight.alias(), bias: self.bias.alias() }
    }

    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}

/// Fully connected layer with bias.
#[derive(Debug)]
pub struct Linear {
    weight: Parameter,
    bias: Parameter,
}

impl Linear {
    pub fn new(weights: &mut Weights, name: &str, inputs: i64, outputs: i64) -> Self {
        Self {
            weight: weights.normal(&format!("{name}.weight"), &[outputs, inputs]),
            bias: weights.constant(&format!("{name}.bias"), &[outputs], 0.0),
        }
    }

    /// `[N, inputs]` to `[N, outputs]`. Source: `torch.nn.Linear`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [weight, bias] = self.parameters().map(|parameter| cast(&parameter.tensor, x.kind()));
        x.linear(&weight, Some(&bias))
    }

    /// Type of the weights.
    pub fn kind(&self) -> Kind {
        self.weight.tensor.kind()
    }

    pub fn alias(&self) -> Self {
        Self { weight: self.weight.alias(), bias: self.bias.alias() }
    }

    pub fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}
