//! [`Arithmetic`]: where a network's tensors lie, and in which type of number it computes.

use takuma_core::config::Precision;
use tch::{Device, Kind};

/// Where tensors lie and what they are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arithmetic {
    /// Where they lie.
    pub device: Device,
    /// Type of weights, running statistics, losses and the optimizer's state.
    pub kind: Kind,
    /// Type of images and feature maps in training: what convolutions compute in.
    pub compute: Kind,
}

impl Arithmetic {
    /// What a run of this precision computes in on `device`. TF32 is no type of its own: it is how a GPU
    /// multiplies f32, and set where the device is.
    #[must_use]
    pub fn of(precision: Precision, device: Device) -> Self {
        let compute = match precision {
            Precision::F32 | Precision::Tf32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        Self { device, kind: Kind::Float, compute }
    }
}

/// One type for everything, on the CPU.
impl From<Kind> for Arithmetic {
    fn from(kind: Kind) -> Self {
        Self { device: Device::Cpu, kind, compute: kind }
    }
}

/// `tensor` in `kind`: itself if it is, so that f32 costs nothing.
pub(super) fn cast(tensor: &tch::Tensor, kind: Kind) -> tch::Tensor {
    if tensor.kind() == kind { tensor.shallow_clone() } else { tensor.to_kind(kind) }
}
