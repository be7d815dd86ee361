//! takuma's worker: trains its share of every batch and exchanges gradients with its peers.

pub mod collective;
pub mod model;
pub mod torch;
