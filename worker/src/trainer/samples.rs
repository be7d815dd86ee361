//! [`Samples`]: the fixed grid of 64 noise vectors a run, of which each worker renders its part.
//!
//! A grid whose worker died before its part arrived must not be missing. So the generator of each grid is kept
//! until the grid is stored, and a new group's most advanced member renders whole whatever is not.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use takuma_core::config::RunConfig;
use takuma_core::noise::fill_grid_noise;
use takuma_core::slots::{SlotRange, split_evenly};
use takuma_data::DataError;
use takuma_proto::v1::{SampleTile, sample_tile};
use tch::{Device, Kind, Tensor};

use super::exchange::Exchange;
use super::feed::Feed;
use super::painter::{Painter, Painting};
use super::spool::Spool;
use crate::checkpoint::{network_tensors, restore_network};
use crate::model::{Generator, NOISE_LEN};
use crate::recipe::{Dcgan, DcganState};
use crate::torch::cuda::Event;
use crate::torch::{self, TorchError};

/// Cells of a grid: 8x8.
pub const GRID_CELLS: u32 = 64;
/// Generators that are kept for grids on their way, 20 MB each. Older grids have had the time of hundreds of
/// steps to be stored.
const MAX_KEPT: usize = 4;

/// Renders a run's grids and keeps what it needs to render them again.
pub struct Samples {
    config: RunConfig,
    device: Device,
    spool: Spool,
    /// Renders beside the training, on a thread that starts at the first grid.
    beside: Option<OnceCell<Painter>>,
    /// By finished steps, the generator's tensors by name.
    kept: BTreeMap<u64, BTreeMap<String, Tensor>>,
}

/// The own part of a grid as it is to be after a step.
pub struct Frame {
    step: u64,
    cells: SlotRange,
    tensors: BTreeMap<String, Tensor>,
    work: Work,
}

enum Work {
    Done(Vec<u8>),
    /// Of a copy that is made when the event is reached.
    ToDo(Event),
}

impl Samples {
    /// For a run whose tiles go into `spool`. Grids are rendered where they are taken, or, if `is_beside`, on a thread
    /// of their own.
    #[must_use]
    pub fn new(config: &RunConfig, device: Device, spool: Spool, is_beside: bool) -> Self {
        let beside = is_beside.then(OnceCell::new);
        Self { config: config.clone(), device, spool, beside, kept: BTreeMap::new() }
    }

    /// Copies what the own part of a grid needs; `None` if the grid is stored.
    ///
    /// # Errors
    /// libtorch's.
    pub fn take(&self, net: &Dcgan, exchange: &Exchange, step: u64) -> Result<Option<Frame>, TorchError> {
        if self.spool.known_kept().grids.contains(&step) {
            return Ok(None);
        }
        let collective = exchange.collective();
        let cells = split_evenly(GRID_CELLS, collective.world())[collective.rank().0 as usize];
        let generator = &net.state().generator;
        let live = network_tensors(generator);
        let copies = torch::copies(&live.values().collect::<Vec<_>>())?;
        let tensors = live.into_keys().zip(copies).collect();
        let work = if self.beside.is_some() {
            let mut ready = Event::new(self.device)?;
            ready.record()?;
            Work::ToDo(ready)
        } else {
            Work::Done(render(generator, self.config.seed, cells))
        };
        Ok(Some(Frame { step, cells, tensors, work }))
    }

    /// Sends a frame, or has it rendered and sent.
    ///
    /// # Errors
    /// libtorch's, also that of an earlier frame that was rendered beside.
    pub fn show(&mut self, frame: Frame) -> Result<(), TorchError> {
        let Frame { step, cells, tensors, work } = frame;
        let known = self.spool.known_kept().grids;
        self.kept.retain(|step, _| !known.contains(step));
        let again = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        self.kept.insert(step, again);
        if self.kept.len() > MAX_KEPT {
            self.kept.pop_first();
        }
        match work {
            Work::Done(pixels) => send(&self.config, &self.spool, step, cells, pixels),
            Work::ToDo(ready) => self.painter()?.hand_over(Painting { step, cells, tensors, ready })?,
        }
        Ok(())
    }

    /// Waits until all frames are sent.
    ///
    /// # Errors
    /// What kept one of them from being rendered.
    pub fn settle(&self) -> Result<(), TorchError> {
        self.beside.as_ref().and_then(OnceCell::get).map_or(Ok(()), Painter::settle)
    }

    /// Renders whole every grid that is not known to be stored.
    ///
    /// # Errors
    /// libtorch's.
    pub fn render_missing(&mut self) -> Result<(), TorchError> {
        let known = self.spool.known_kept().grids;
        self.kept.retain(|step, _| !known.contains(step));
        let cells = SlotRange { first: 0, count: GRID_CELLS };
        for (&step, tensors) in &self.kept {
            if self.beside.is_some() {
                let tensors =
                    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
                // Not recorded, so it counts as reached: the copy is an old one.
                let ready = Event::new(self.device)?;
                self.painter()?.hand_over(Painting { step, cells, tensors, ready })?;
                continue;
            }
            let mut generator = DcganState::new(self.config.recipe, self.config.seed, Kind::Float).generator;
            if let Err(error) = tch::no_grad(|| restore_network(&mut generator, tensors)) {
                tracing::error!(step, %error, "a grid cannot be rendered again");
                continue;
            }
            let pixels = render(&generator, self.config.seed, cells);
            send(&self.config, &self.spool, step, cells, pixels);
        }
        Ok(())
    }

    fn painter(&self) -> Result<&Painter, TorchError> {
        let Some(cell) = &self.beside else { unreachable!("frames that are rendered here need no painter") };
        if let Some(painter) = cell.get() {
            return Ok(painter);
        }
        let (config, spool) = (self.config.clone(), self.spool.clone());
        let deliver = move |step, cells, pixels| send(&config, &spool, step, cells, pixels);
        let painter = Painter::start(&self.config, self.device, deliver)?;
        Ok(cell.get_or_init(|| painter))
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
                ..tile(&self.config, 0)
            });
        }
        Ok(())
    }
}

fn send(config: &RunConfig, spool: &Spool, step: u64, cells: SlotRange, pixels: Vec<u8>) {
    if !pixels.is_empty() {
        spool.tile(SampleTile { first_cell: cells.first, pixels, ..tile(config, step) });
    }
}

/// A tile without pixels; the spool stamps run and generation.
fn tile(config: &RunConfig, step: u64) -> SampleTile {
    let size = config.recipe.image_size();
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

/// Renders `cells` of the run's grid with the running statistics.
///
/// # Shapes
/// uint8 `[cells.count, 64, 64, 3]`, flattened.
#[must_use]
pub(super) fn render(generator: &Generator, seed: u64, cells: SlotRange) -> Vec<u8> {
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
