//! [`Feed`]: the images and noise of each step, for the slots that this worker owns.

use std::sync::Arc;

use bytes::Bytes;
use takuma_core::ids::Slot;
use takuma_core::noise::fill_slot_noise;
use takuma_core::slots::{EpochOrder, ImageRef, SlotMap, SlotRange};
use takuma_data::{DataError, Fetch, ShardPool};
use tch::Tensor;

use crate::model::NOISE_LEN;
use crate::recipe::Batch;

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
    /// By slot, of the epoch that was asked for last.
    orders: Vec<EpochOrder>,
    /// The batch that is asked for next, as far as one can tell.
    ahead: Option<Ahead>,
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
        Self { slots, map, seed, image_size, pool, orders: Vec::new(), ahead: None }
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
        let Ahead { fed, fetch, .. } = match self.ahead.take() {
            Some(ahead) if ahead.step == step => ahead,
            // Another step was expected: its fetch ends here.
            _ => self.begin(step),
        };
        let floats = fetch.wait()?;
        self.ahead = Some(self.begin(step + 1));
        let (n, size) = (i64::from(self.slots.count), self.image_size);
        Ok(Batch {
            reals_nchw: Tensor::from_slice(&floats.pixels_nhwc)
                .view([n, size, size, 3])
                .permute([0, 3, 1, 2]),
            noise_nz: Tensor::from_slice(&floats.noise_nz).view([n, NOISE_LEN]),
            fed,
        })
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
        let entry = |&(slot, image): &_| u64::from(SlotMap::fed_hash(step, slot, image));
        let fed = places.iter().map(entry).sum();
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
