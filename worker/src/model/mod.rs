//! The networks: parameters with PyTorch's names, forward passes, running statistics.
//!
//! Knows libtorch and nothing of workers: a [`Pass`] carries in what a forward pass must know of
//! the group (the global batch and how to sum statistics over it).
//!
//! Letters in shapes: N images, C channels, H height, W width, Z noise.

mod arithmetic;
mod batch_norm;
mod discriminator;
mod generator;
mod layers;
mod parameters;

pub use arithmetic::Arithmetic;
pub use batch_norm::{BatchNorm, NormUpdates, Pass};
pub use discriminator::Discriminator;
pub use generator::{Generator, NOISE_LEN};
pub use parameters::{Network, Parameter, Weights};
