//! [`Samples`]: the fixed grid of 64 noise vectors a run, of which each worker renders its part.
//!
//! A grid whose worker died before its part arrived must not be missing. So the generator of each grid is kept
//! until the grid is stored, and a new group's most advanced member renders whole whatever is not.

use std::collections::BTreeMap;

use takuma_core::config::RunConfig;
use takuma_core::noise::fill_grid_noise;
use takuma_core::slots::{SlotRange, split_evenly};
use takuma_data::DataError;
use takuma_proto::v1::{SampleTile, sample_tile};
use tch::{Device, Kind, Tensor};

use super::exchange::Exchange;
use super::feed::Feed;
use super::spool::Spool;
use crate::checkpoint::{network_tensors, restore_network};
use crate::model::{Generator, NOISE_LEN};
use crate::recipe::{Dcgan, DcganState};

/// Cells of a grid: 8x8.
pub const GRID_CELLS: u32 = 64;
/// Generators that are kept for grids on their way, 20 MB each. Older grids have had the time of hundreds of
/// steps to be stored.
const MAX_KEPT: usize = 4;

/// Renders a run's grids and keeps what it needs to render them again.
pub struct Samples {
    config: RunConfig,
    spool: Spool,
    /// By finished steps, the generator's tensors by name.
    kept: BTreeMap<u64, BTreeMap<String, Tensor>>,
}

impl Samples {
    /// For a run whose tiles go into `spool`.
    #[must_use]
    pub fn new(config: &RunConfig, spool: Spool) -> Self {
        Self { config: config.clone(), spool, kept: BTreeMap::new() }
    }

    /// Renders the own part of a grid.
    pub fn render(&mut self, net: &Dcgan, exchange: &Exchange, step: u64) {
        let known = self.spool.known_kept().grids;
        self.kept.retain(|step, _| !known.contains(step));
        if known.contains(&step) {
            return;
        }
        let generator = &net.state().generator;
        let copies =
            network_tensors(generator).into_iter().map(|(name, tensor)| (name, tensor.detach().copy()));
        self.kept.insert(step, copies.collect());
        if self.kept.len() > MAX_KEPT {
            self.kept.pop_first();
        }
        let collective = exchange.collective();
        let cells = split_evenly(GRID_CELLS, collective.world())[collective.rank().0 as usize];
        self.send(step, cells, render(generator, self.config.seed, cells));
    }

    /// Renders whole every grid that is not known to be stored.
    pub fn render_missing(&mut self) {
        let known = self.spool.known_kept().grids;
        self.kept.retain(|step, _| !known.contains(step));
        let cells = SlotRange { first: 0, count: GRID_CELLS };
        for (&step, tensors) in &self.kept {
            let mut generator = DcganState::new(self.config.recipe, self.config.seed, Kind::Float).generator;
            if let Err(error) = tch::no_grad(|| restore_network(&mut generator, tensors)) {
                tracing::error!(step, %error, "a grid cannot be rendered again");
                continue;
            }
            self.send(step, cells, render(&generator, self.config.seed, cells));
        }
    }

    /// Sends the own part of the grid of real images, unless it is stored.
    ///
    /// # Errors
    /// The images cannot be had.
    pub fn reals(&self, feed: &mut Feed) -> Result<(), DataError> {
        if self.spool.known_kept().reals {
            return Ok(());
        }
        let cells_total = GRID_CELLS.min(self.config.global_batch);
        let pixels = feed.raw_images(0, cells_total)?;
        if !pixels.is_empty() {
            let kind = sample_tile::Kind::Reals.into();
            self.spool.tile(SampleTile {
                kind,
                first_cell: feed.first_slot(),
                cells_total,
                pixels,
                ..self.tile(0)
            });
        }
        Ok(())
    }

    fn send(&self, step: u64, cells: SlotRange, pixels: Vec<u8>) {
        if !pixels.is_empty() {
            self.spool.tile(SampleTile { first_cell: cells.first, pixels, ..self.tile(step) });
        }
    }

    /// A tile without pixels; the spool stamps run and generation.
    fn tile(&self, step: u64) -> SampleTile {
        let size = self.config.recipe.image_size();
        SampleTile {
            kind: sample_tile::Kind::Generated.into(),
            step,
            cells_total: GRID_CELLS,
            height: size,
            width: size,
            channels: 3,
            ..SampleTile::default()
        }
    }
}

/// Renders `cells` of the run's grid with the running statistics.
///
/// # Shapes
/// uint8 `[cells.count, 64, 64, 3]`, flattened.
#[must_use]
fn render(generator: &Generator, seed: u64, cells: SlotRange) -> Vec<u8> {
    if cells.count == 0 {
        return Vec::new();
    }
    let mut noise = vec![0.0f32; cells.count as usize * NOISE_LEN as usize];
    for (cell, out) in cells.slots().zip(noise.chunks_exact_mut(NOISE_LEN as usize)) {
        fill_grid_noise(seed, cell.0, out);
    }
    let noise_nz = Tensor::from_slice(&noise).view([i64::from(cells.count), NOISE_LEN]);
    let images_nchw = generator.infer(&noise_nz.to_device(generator.arithmetic().device));
    let pixels = ((images_nchw + 1.0) * 127.5).round().clamp(0.0, 255.0).to_kind(Kind::Uint8);
    let flat = pixels.permute([0, 2, 3, 1]).contiguous().view(-1).to_device(Device::Cpu);
    let mut out = vec![0u8; flat.numel()];
    flat.copy_data(&mut out, flat.numel());
    out
}
