//! The fixed grid: 64 noise vectors a run, of which each worker renders its part.

use takuma_core::noise::fill_grid_noise;
use takuma_core::slots::{SlotRange, split_evenly};
use tch::{Kind, Tensor};

use crate::model::{Generator, NOISE_LEN};

/// Cells of a grid: 8x8.
pub const GRID_CELLS: u32 = 64;

/// The cells that rank `rank` of `world` renders.
#[must_use]
pub fn cells_of(rank: u32, world: u32) -> SlotRange {
    split_evenly(GRID_CELLS, world)[rank as usize]
}

/// Renders `cells` of the run's grid with the running statistics.
///
/// # Shapes
/// uint8 `[cells.count, 64, 64, 3]`, flattened.
#[must_use]
pub fn render(generator: &Generator, seed: u64, cells: SlotRange) -> Vec<u8> {
    if cells.count == 0 {
        return Vec::new();
    }
    let mut noise = vec![0.0f32; cells.count as usize * NOISE_LEN as usize];
    for (cell, out) in cells.slots().zip(noise.chunks_exact_mut(NOISE_LEN as usize)) {
        fill_grid_noise(seed, cell.0, out);
    }
    let noise_nz = Tensor::from_slice(&noise).view([i64::from(cells.count), NOISE_LEN]);
    let images_nchw = generator.infer(&noise_nz);
    let pixels = ((images_nchw + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let flat = pixels.permute([0, 2, 3, 1]).contiguous().view(-1);
    let mut out = vec![0u8; flat.numel()];
    flat.copy_data(&mut out, flat.numel());
    out
}
