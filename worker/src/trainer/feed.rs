//! [`Feed`]: the images and noise of each step, for the slots that this worker owns.

use std::sync::Arc;

use bytes::Bytes;
use takuma_core::ids::Slot;
use takuma_core::noise::fill_slot_noise;
use takuma_core::slots::{EpochOrder, ImageRef, SlotMap, SlotRange};
use takuma_data::{DataError, Fetch, ShardPool};
use tch::{Device, Kind, Tensor};

use super::messages::JobError;
use super::resident::Resident;
use crate::model::NOISE_LEN;
use crate::recipe::{Batch, Images, StepInput, Votes};
use crate::torch::{self, TorchError};

/// Value of a uint8 pixel in `[-1, 1]`.
fn scaled(pixel: u8) -> f32 {
    f32::from(pixel) / 127.5 - 1.0
}

/// A worker's slots over a pool of shards.
///
/// While the trainer computes, the images of the step behind the one asked for last are fetched and made
/// into floats in the background.
pub struct Feed {
    slots: SlotRange,
    map: SlotMap,
    seed: u64,
    image_size: i64,
    pool: Arc<ShardPool>,
    /// What computes.
    device: Device,
    /// The images on the device: not asked for, on their way or there, no room for them.
    resident: Residency,
    /// By slot, of the epoch that was asked for last.
    orders: Vec<EpochOrder>,
    /// The batch that is asked for next, as far as one can tell.
    ahead: Option<Ahead>,
}

enum Residency {
    NotYet,
    Begun(Resident),
    NoRoom,
}

/// A batch on its way.
struct Ahead {
    step: u64,
    fed: u64,
    fetch: Fetch<Floats>,
}

/// A batch before it is tensors.
struct Floats {
    /// `[N, H, W, 3]` in `[-1, 1]`.
    pixels_nhwc: Vec<f32>,
    /// `[N, NOISE_LEN]` in `[-1, 1)`.
    noise_nz: Vec<f32>,
}

impl Feed {
    /// Shards that `slots` read.
    #[must_use]
    pub fn shards_needed(map: &SlotMap, slots: SlotRange) -> Vec<u32> {
        let mut shards: Vec<u32> = slots.slots().flat_map(|slot| map.shards_of(slot)).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    /// A feed for `slots`, whose shards the pool begins to load, if it has not yet. From now on the feed
    /// alone says what the pool holds. Blocks nowhere.
    #[must_use]
    pub fn new(map: SlotMap, slots: SlotRange, seed: u64, image_size: u32, pool: Arc<ShardPool>) -> Self {
        pool.want(Self::shards_needed(&map, slots));
        let image_size = i64::from(image_size);
        Self {
            slots,
            map,
            seed,
            image_size,
            pool,
            device: Device::Cpu,
            resident: Residency::NotYet,
            orders: Vec::new(),
            ahead: None,
        }
    }

    /// The same feed for a worker that computes on `device`.
    #[must_use]
    pub fn on(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Takes over other slots, between any two steps. Returns at once: the next batch reads single images
    /// of shards that are not here yet, and shards that only the former slots needed are dropped.
    pub fn set_slots(&mut self, slots: SlotRange) {
        if slots == self.slots {
            return;
        }
        self.slots = slots;
        self.orders.clear();
        self.ahead = None;
        self.resident = Residency::NotYet;
        self.pool.want(Self::shards_needed(&self.map, slots));
    }

    /// Epoch (0-based) of a step index.
    #[must_use]
    pub fn epoch_of(&self, step: u64) -> u64 {
        self.map.epoch_of(step)
    }

    /// First slot of this worker.
    #[must_use]
    pub fn first_slot(&self) -> u32 {
        self.slots.first
    }

    /// This worker's share of the batch of step index `step`. Blocks while images are missing.
    ///
    /// # Errors
    /// As [`Fetch::wait`]. Nothing is lost by one: the same step can be asked for again.
    pub fn batch(&mut self, step: u64) -> Result<Batch, DataError> {
        let (floats, fed) = self.floats(step)?;
        Ok(Batch {
            reals_nchw: self.images_nchw(&floats.pixels_nhwc).to_device(self.device),
            noise_nz: self.noise_nz(&floats.noise_nz).to_device(self.device),
            fed,
        })
    }

    /// What [`Feed::batch`] makes, for the device to fetch, and its ledger entry. Once all shards are here, the
    /// images are brought to the device's memory, a shard at a call, and from then on named by row.
    ///
    /// # Errors
    /// As [`Feed::batch`], and libtorch's.
    pub fn input(&mut self, step: u64) -> Result<(StepInput, u64), JobError> {
        if let Some(dataset_nhwc) = self.resident()? {
            let places = self.places(step);
            let fed = fed_of(step, &places);
            let Residency::Begun(resident) = &self.resident else { unreachable!("its images were given") };
            if let Some(rows) = resident.rows(places.into_iter().map(|(_, image)| image)) {
                self.ahead = None;
                let rows = self.pinned(rows)?;
                let noise_nz = self.pinned(self.noise_nz(&noise_of(self.slots, self.seed, step)))?;
                let images = Images::Rows { dataset_nhwc, rows };
                return Ok((StepInput { images, noise_nz, votes: votes_of(step, fed) }, fed));
            }
        }
        let (floats, fed) = self.floats(step)?;
        let images = Images::Ready(self.pinned(self.images_nchw(&floats.pixels_nhwc))?);
        let noise_nz = self.pinned(self.noise_nz(&floats.noise_nz))?;
        Ok((StepInput { images, noise_nz, votes: votes_of(step, fed) }, fed))
    }

    /// A step's input with images that are no numbers, as a test orders it.
    #[must_use]
    pub fn spoilt(&self, input: StepInput) -> StepInput {
        let (n, size) = (i64::from(self.slots.count), self.image_size);
        let images = Tensor::full([n, size, size, 3], f64::INFINITY, (Kind::Float, Device::Cpu));
        StepInput { images: Images::Ready(images.permute([0, 3, 1, 2])), ..input }
    }

    /// The images on the device, if all are there.
    fn resident(&mut self) -> Result<Option<Tensor>, tch::TchError> {
        if let Residency::NotYet = self.resident
            && let Some(shards) = self.pool.resident()
        {
            let begun = Resident::begin(shards, self.image_size, self.device);
            self.resident = begun.map_or(Residency::NoRoom, Residency::Begun);
        }
        match &mut self.resident {
            Residency::Begun(resident) => Ok(resident.advance()?.then(|| resident.images_nhwc())),
            Residency::NotYet | Residency::NoRoom => Ok(None),
        }
    }

    /// A step's images and noise as numbers, and its ledger entry.
    fn floats(&mut self, step: u64) -> Result<(Floats, u64), DataError> {
        let Ahead { fed, fetch, .. } = match self.ahead.take() {
            Some(ahead) if ahead.step == step => ahead,
            // Another step was expected: its fetch ends here.
            _ => self.begin(step),
        };
        let floats = fetch.wait()?;
        self.ahead = Some(self.begin(step + 1));
        Ok((floats, fed))
    }

    /// `[N, 3, H, W]`, channels_last, on the host.
    fn images_nchw(&self, pixels_nhwc: &[f32]) -> Tensor {
        let size = [i64::from(self.slots.count), self.image_size, self.image_size, 3];
        Tensor::from_slice(pixels_nhwc).view(size).permute([0, 3, 1, 2])
    }

    /// `[N, NOISE_LEN]`, on the host.
    fn noise_nz(&self, noise: &[f32]) -> Tensor {
        Tensor::from_slice(noise).view([i64::from(self.slots.count), NOISE_LEN])
    }

    /// `tensor` where a GPU fetches it by itself.
    fn pinned(&self, tensor: Tensor) -> Result<Tensor, TorchError> {
        if !self.device.is_cuda() {
            return Ok(tensor);
        }
        let host = torch::host_like(&tensor, self.device)?;
        torch::copy_async(&host, &tensor)?;
        Ok(host)
    }

    /// The raw images of step index `step` for slots below `limit`. Blocks while images are missing.
    ///
    /// # Shapes
    /// uint8 `[n, H, W, 3]`, flattened.
    ///
    /// # Errors
    /// As [`Fetch::wait`].
    pub fn raw_images(&mut self, step: u64, limit: u32) -> Result<Vec<u8>, DataError> {
        let count = limit.saturating_sub(self.slots.first).min(self.slots.count);
        let places = self.places(step).into_iter().take(count as usize).map(|(_, image)| image);
        self.pool.fetch(places.collect(), |images| images.concat()).wait()
    }

    /// Starts to fetch a step's images.
    fn begin(&mut self, step: u64) -> Ahead {
        let places = self.places(step);
        let fed = fed_of(step, &places);
        let (slots, seed) = (self.slots, self.seed);
        let images = places.into_iter().map(|(_, image)| image).collect();
        let fetch = self.pool.fetch(images, move |images| Floats {
            pixels_nhwc: floats_of(&images),
            noise_nz: noise_of(slots, seed, step),
        });
        Ahead { step, fed, fetch }
    }

    /// What feeds each of the own slots at a step.
    fn places(&mut self, step: u64) -> Vec<(Slot, ImageRef)> {
        let epoch = self.map.epoch_of(step);
        if self.orders.first().is_none_or(|order| order.epoch() != epoch) {
            self.orders = self.map.epoch_orders(epoch, self.slots);
        }
        self.slots.slots().zip(self.orders.iter().map(|order| self.map.image(order, step))).collect()
    }
}

/// What a worker that wants nothing says in a step.
fn votes_of(step: u64, fed: u64) -> Votes {
    Votes { step, fed: fed as f64, ..Votes::default() }
}

/// The ledger's entry of a step.
fn fed_of(step: u64, places: &[(Slot, ImageRef)]) -> u64 {
    places.iter().map(|&(slot, image)| u64::from(SlotMap::fed_hash(step, slot, image))).sum()
}

/// Pixels of all images, in `[-1, 1]`.
fn floats_of(images: &[Bytes]) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(images.iter().map(Bytes::len).sum());
    for image in images {
        pixels.extend(image.iter().map(|&pixel| scaled(pixel)));
    }
    pixels
}

/// Noise of all slots.
fn noise_of(slots: SlotRange, seed: u64, step: u64) -> Vec<f32> {
    let mut noise = vec![0.0f32; slots.count as usize * NOISE_LEN as usize];
    for (slot, out) in slots.slots().zip(noise.chunks_exact_mut(NOISE_LEN as usize)) {
        fill_slot_noise(seed, step, slot.0, out);
    }
    noise
}
