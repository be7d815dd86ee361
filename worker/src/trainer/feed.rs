//! [`Feed`]: the images and noise of each step, for the slots that this worker owns.

use std::collections::BTreeMap;

use takuma_core::noise::fill_slot_noise;
use takuma_core::slots::{EpochOrder, SlotMap, SlotRange};
use takuma_data::Shard;
use tch::Tensor;

use crate::model::NOISE_LEN;
use crate::recipe::Batch;

/// Value of a uint8 pixel in `[-1, 1]`.
fn scaled(pixel: u8) -> f32 {
    f32::from(pixel) / 127.5 - 1.0
}

/// A worker's slots with the shards behind them.
pub struct Feed {
    slots: SlotRange,
    map: SlotMap,
    seed: u64,
    image_size: i64,
    shards: BTreeMap<u32, Shard>,
    /// By slot, of the epoch that was asked for last.
    orders: Vec<EpochOrder>,
    scale: [f32; 256],
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

    /// A feed for `slots`. `shards` holds at least [`Feed::shards_needed`].
    #[must_use]
    pub fn new(
        map: SlotMap,
        slots: SlotRange,
        seed: u64,
        image_size: u32,
        shards: BTreeMap<u32, Shard>,
    ) -> Self {
        let mut scale = [0.0; 256];
        for (value, pixel) in scale.iter_mut().zip(0..=u8::MAX) {
            *value = scaled(pixel);
        }
        Self { slots, map, seed, image_size: i64::from(image_size), shards, orders: Vec::new(), scale }
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

    /// This worker's share of the batch of step index `step`.
    pub fn batch(&mut self, step: u64) -> Batch {
        let mut pixels = Vec::with_capacity(self.pixels_per_image() * self.slots.count as usize);
        let scale = self.scale;
        self.for_images(step, |image| pixels.extend(image.iter().map(|&pixel| scale[usize::from(pixel)])));
        let (n, size) = (i64::from(self.slots.count), self.image_size);
        let mut noise = vec![0.0f32; self.slots.count as usize * NOISE_LEN as usize];
        for (slot, out) in self.slots.slots().zip(noise.chunks_exact_mut(NOISE_LEN as usize)) {
            fill_slot_noise(self.seed, step, slot.0, out);
        }
        Batch {
            reals_nchw: Tensor::from_slice(&pixels).view([n, size, size, 3]).permute([0, 3, 1, 2]),
            noise_nz: Tensor::from_slice(&noise).view([n, NOISE_LEN]),
        }
    }

    /// The raw images of step index `step` for slots below `limit`.
    ///
    /// # Shapes
    /// uint8 `[n, H, W, 3]`, flattened.
    pub fn raw_images(&mut self, step: u64, limit: u32) -> Vec<u8> {
        let mut pixels = Vec::new();
        let bytes =
            self.pixels_per_image() * limit.saturating_sub(self.slots.first).min(self.slots.count) as usize;
        self.for_images(step, |image| {
            if pixels.len() < bytes {
                pixels.extend_from_slice(image);
            }
        });
        pixels
    }

    fn for_images(&mut self, step: u64, mut body: impl FnMut(&[u8])) {
        let epoch = self.map.epoch_of(step);
        if self.orders.first().is_none_or(|order| order.epoch() != epoch) {
            self.orders = self.slots.slots().map(|slot| self.map.epoch_order(epoch, slot)).collect();
        }
        for order in &self.orders {
            let place = self.map.image(order, step);
            body(self.shards[&place.shard].image(place.index));
        }
    }

    fn pixels_per_image(&self) -> usize {
        (self.image_size * self.image_size * 3) as usize
    }
}
