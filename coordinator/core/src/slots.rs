//! Which image feeds which slot at which step: a pure function of (dataset, seed, step, slot).
//!
//! The global batch has B slots, the dataset S shards. With B <= S a slot reads the shards
//! `slot, slot + B, slot + 2B, ...` as one stream; with B > S the B / S slots of one shard take
//! turns in it. Since shuffled image `i` lies in shard `i % S`, every stream is long enough for
//! `floor(images / B)` steps per epoch, and no image comes twice in an epoch.
//!
//! The ledger checks that this came true, whoever held the slots: each worker sums [`SlotMap::fed_hash`]
//! over what it fed, and the workers' sums together must equal [`SlotMap::expected_fed`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::config::ConfigError;
use crate::ids::{Slot, Step};
use crate::noise::{CounterRng, Purpose};

/// Where an image lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRef {
    /// Shard number.
    pub shard: u32,
    /// Place in the shard.
    pub index: u32,
}

/// The mapping from (step, slot) to images of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotMap {
    global_batch: u32,
    seed: u64,
    shard_images: Vec<u64>,
    steps_per_epoch: u64,
}

impl SlotMap {
    /// The mapping for a global batch over shards of the given sizes.
    ///
    /// # Errors
    /// When neither of batch and shard count divides the other, or there is not one full batch.
    pub fn new(global_batch: u32, seed: u64, shard_images: &[u64]) -> Result<Self, ConfigError> {
        let shards = shard_images.len() as u32;
        if shards == 0 || !(shards.is_multiple_of(global_batch) || global_batch.is_multiple_of(shards)) {
            return Err(ConfigError::BatchAndShards { global_batch, shards });
        }
        let mut map = Self { global_batch, seed, shard_images: shard_images.to_vec(), steps_per_epoch: 0 };
        map.steps_per_epoch = (0..map.streams())
            .map(|stream| map.stream_images(stream) / u64::from(map.slots_per_stream()))
            .min()
            .unwrap_or(0);
        if map.steps_per_epoch == 0 {
            return Err(ConfigError::TooFewImages { images: shard_images.iter().sum(), global_batch });
        }
        Ok(map)
    }

    /// Full batches in one pass over the data.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// Epoch (0-based) of a step index.
    #[must_use]
    pub fn epoch_of(&self, step: Step) -> u64 {
        step / self.steps_per_epoch
    }

    /// Shards that a slot reads, ascending: what its worker must hold.
    pub fn shards_of(&self, slot: Slot) -> impl Iterator<Item = u32> + use<> {
        let stream = self.stream_of(slot);
        (stream..self.shards()).step_by(self.streams() as usize)
    }

    /// The order in which a slot's stream is visited in an epoch; pass it to [`SlotMap::image`].
    #[must_use]
    pub fn epoch_order(&self, epoch: u64, slot: Slot) -> EpochOrder {
        let stream = self.stream_of(slot);
        let mut rng = CounterRng::new(self.seed, Purpose::DataOrder, epoch, u64::from(stream));
        EpochOrder { epoch, slot, order: rng.permutation(self.stream_images(stream)) }
    }

    /// The image that feeds `order`'s slot at `step`.
    ///
    /// # Panics
    /// If `step` does not lie in `order`'s epoch.
    #[must_use]
    pub fn image(&self, order: &EpochOrder, step: Step) -> ImageRef {
        assert_eq!(self.epoch_of(step), order.epoch, "the order belongs to another epoch");
        let lane = u64::from(order.slot.0 / self.streams());
        let place = (step % self.steps_per_epoch) * u64::from(self.slots_per_stream()) + lane;
        let mut index = u64::from(order.order[place as usize]);
        for shard in self.shards_of(order.slot) {
            let images = self.shard_images[shard as usize];
            if index < images {
                return ImageRef { shard, index: index as u32 };
            }
            index -= images;
        }
        unreachable!("a permutation of a stream's images stays inside the stream")
    }

    /// [`SlotMap::epoch_order`] of several slots, in their order.
    #[must_use]
    pub fn epoch_orders(&self, epoch: u64, slots: SlotRange) -> Vec<EpochOrder> {
        slots.slots().map(|slot| self.epoch_order(epoch, slot)).collect()
    }

    /// The ledger's entry for one slot at one step: 32 bits that depend on every bit of the four numbers
    /// and on nothing else, so that entries of different runs or machines can be compared.
    ///
    /// Entries are summed: of up to 65536 slots the sum stays below 2^48. That is below 2^53, so sums travel
    /// through f64 all-reduces and stay exact.
    #[must_use]
    pub fn fed_hash(step: Step, slot: Slot, image: ImageRef) -> u32 {
        let place = (u64::from(image.shard) << 32) | u64::from(image.index);
        CounterRng::new(step, Purpose::Ledger, u64::from(slot.0), place).next_u32()
    }

    /// The sum of the ledger's entries for the slots of `orders` at `step`.
    ///
    /// # Panics
    /// If `step` does not lie in the orders' epoch.
    #[must_use]
    pub fn fed_sum(&self, orders: &[EpochOrder], step: Step) -> u64 {
        let entry = |order: &EpochOrder| u64::from(Self::fed_hash(step, order.slot, self.image(order, step)));
        orders.iter().map(entry).sum()
    }

    /// What the entries of all slots at `step` must sum up to. Computes the epoch's orders for it; whoever
    /// checks many steps keeps [`SlotMap::epoch_orders`] and asks [`SlotMap::fed_sum`].
    #[must_use]
    pub fn expected_fed(&self, step: Step) -> u64 {
        let all = SlotRange { first: 0, count: self.global_batch };
        self.fed_sum(&self.epoch_orders(self.epoch_of(step), all), step)
    }

    fn shards(&self) -> u32 {
        self.shard_images.len() as u32
    }

    fn streams(&self) -> u32 {
        self.global_batch.min(self.shards())
    }

    fn slots_per_stream(&self) -> u32 {
        self.global_batch / self.streams()
    }

    fn stream_of(&self, slot: Slot) -> u32 {
        slot.0 % self.streams()
    }

    fn stream_images(&self, stream: u32) -> u64 {
        self.shard_images.iter().skip(stream as usize).step_by(self.streams() as usize).sum()
    }
}

/// The visiting order of one slot's stream in one epoch.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    epoch: u64,
    slot: Slot,
    order: Vec<u32>,
}

impl EpochOrder {
    /// The epoch (0-based) that this order is for.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}

/// A worker's contiguous share of the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRange {
    /// First slot.
    pub first: u32,
    /// Number of slots.
    pub count: u32,
}

impl SlotRange {
    /// The slots of the range in order.
    pub fn slots(self) -> impl Iterator<Item = Slot> {
        (self.first..self.first + self.count).map(Slot)
    }
}

/// Cuts `total` slots into `world` contiguous ranges whose sizes differ by one at most, larger first.
///
/// # Panics
/// If `world` is 0.
#[must_use]
pub fn split_evenly(total: u32, world: u32) -> Vec<SlotRange> {
    assert!(world > 0, "slots need at least one worker");
    let mut first = 0;
    (0..world)
        .map(|rank| {
            let count = total / world + u32::from(rank < total % world);
            let range = SlotRange { first, count };
            first += count;
            range
        })
        .collect()
}

/// Cuts `total` slots into contiguous ranges, one for each cost (seconds for one slot), so that the longest of
/// all `count * cost` is as short as can be. Every range has one slot at least.
///
/// # Panics
/// If there are no costs, or more than slots.
#[must_use]
pub fn split_by_cost(total: u32, costs: &[f64]) -> Vec<SlotRange> {
    assert!(!costs.is_empty() && costs.len() <= total as usize, "slots for {} workers", costs.len());
    let mut counts = vec![1u32; costs.len()];
    // Every further slot goes to whom it costs least in the end; of equal ones to the first.
    let after = |rank: usize, count: u32| Reverse((OrderedCost(costs[rank] * f64::from(count + 1)), rank));
    let mut next: BinaryHeap<_> = (0..costs.len()).map(|rank| after(rank, 1)).collect();
    for _ in costs.len() as u32..total {
        let Some(Reverse((_, rank))) = next.pop() else { break };
        counts[rank] += 1;
        next.push(after(rank, counts[rank]));
    }
    let mut first = 0;
    let range = |count: u32| {
        let range = SlotRange { first, count };
        first += count;
        range
    };
    counts.into_iter().map(range).collect()
}

/// A cost in an order: the costs of workers are numbers, and NaN would come last.
#[derive(Debug, Clone, Copy)]
struct OrderedCost(f64);

impl PartialEq for OrderedCost {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for OrderedCost {}

impl PartialOrd for OrderedCost {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrderedCost {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn round_robin(images: u64, shards: u64) -> Vec<u64> {
        (0..shards).map(|s| images / shards + u64::from(s < images % shards)).collect()
    }

    #[test]
    fn celeba_has_3165_steps_an_epoch() {
        let map = SlotMap::new(64, 0, &round_robin(202_599, 64)).unwrap();
        assert_eq!(map.steps_per_epoch(), 3165);
    }

    #[test]
    fn shares_by_cost_are_even_for_equals_and_end_together_for_others() {
        let counts = |total, costs: &[f64]| -> Vec<u32> {
            split_by_cost(total, costs).iter().map(|range| range.count).collect()
        };
        assert_eq!(split_by_cost(64, &[1.0; 3]), split_evenly(64, 3));
        assert_eq!(counts(64, &[1.0, 3.0]), [48, 16]);
        assert_eq!(counts(8, &[1.0, 1000.0, f64::NAN]), [6, 1, 1]);
        assert_eq!(counts(2, &[5.0, 1.0]), [1, 1]);
    }

    #[test]
    fn three_workers_hold_22_21_21_slots() {
        let counts: Vec<u32> = split_evenly(64, 3).iter().map(|range| range.count).collect();
        assert_eq!(counts, [22, 21, 21]);
    }

    #[test]
    fn ledger_never_changes_between_versions() {
        // Written down once. If this fails, workers and coordinators of two versions would accuse each other.
        let hash = SlotMap::fed_hash(1, Slot(2), ImageRef { shard: 3, index: 4 });
        assert_eq!(hash, HASH_OF_1_2_3_4);
        let largest = 65_536 * u64::from(u32::MAX);
        assert!(largest < 1 << 48, "{largest}");
    }
    const HASH_OF_1_2_3_4: u32 = 1_289_070_306;

    #[test]
    fn batch_that_does_not_divide_is_refused() {
        let error = SlotMap::new(48, 0, &round_robin(6400, 64)).unwrap_err();
        assert_eq!(error, ConfigError::BatchAndShards { global_batch: 48, shards: 64 });
    }

    #[test]
    fn fewer_images_than_slots_are_refused() {
        let error = SlotMap::new(64, 0, &round_robin(63, 64)).unwrap_err();
        assert_eq!(error, ConfigError::TooFewImages { images: 63, global_batch: 64 });
    }

    proptest! {
        #[test]
        fn every_image_at_most_once_an_epoch_and_epochs_are_full(
            shards_log2 in 0u32..6, batch_log2 in 0u32..7, extra in 0u64..200, seed: u64, epoch in 0u64..3,
        ) {
            let (shards, batch) = (1u64 << shards_log2, 1u32 << batch_log2);
            let images = shards.max(u64::from(batch)) + extra;
            let map = SlotMap::new(batch, seed, &round_robin(images, shards)).unwrap();
            prop_assert_eq!(map.steps_per_epoch(), images / u64::from(batch));
            let mut seen = HashSet::new();
            for slot in (0..batch).map(Slot) {
                let order = map.epoch_order(epoch, slot);
                let held: HashSet<u32> = map.shards_of(slot).collect();
                for t in 0..map.steps_per_epoch() {
                    let image = map.image(&order, epoch * map.steps_per_epoch() + t);
                    prop_assert!(held.contains(&image.shard));
                    prop_assert!(seen.insert(image), "{image:?} came twice");
                }
            }
        }

        #[test]
        fn workers_sums_make_the_expected_sum_and_what_was_fed_wrongly_changes_it(
            batch_log2 in 1u32..7, world in 1u32..9, seed: u64, step in 0u64..40, picks: (u32, u32),
        ) {
            let batch = 1u32 << batch_log2;
            let map = SlotMap::new(batch, seed, &round_robin(u64::from(batch) * 10, 16)).unwrap();
            let expected = map.expected_fed(step);
            let of_worker = |slots| map.fed_sum(&map.epoch_orders(map.epoch_of(step), slots), step);
            let sum: u64 = split_evenly(batch, world).into_iter().map(of_worker).sum();
            prop_assert_eq!(sum, expected);
            prop_assert_eq!(sum as f64 as u64, sum);

            let all = SlotRange { first: 0, count: batch };
            let fed: Vec<(Slot, ImageRef)> = map
                .epoch_orders(map.epoch_of(step), all)
                .iter()
                .map(|order| (order.slot, map.image(order, step)))
                .collect();
            let sum = |fed: &[(Slot, ImageRef)]| -> u64 {
                fed.iter().map(|&(slot, image)| u64::from(SlotMap::fed_hash(step, slot, image))).sum()
            };
            prop_assert_eq!(sum(&fed), expected);
            let one = (picks.0 % batch) as usize;
            let other = (one + 1 + (picks.1 % (batch - 1)) as usize) % batch as usize;
            let mut lost = fed.clone();
            lost.remove(one);
            let mut doubled = fed.clone();
            doubled.push(fed[one]);
            let mut replaced = fed.clone();
            replaced[one].1 = fed[other].1;
            let mut swapped = replaced.clone();
            swapped[other].1 = fed[one].1;
            for wrong in [lost, doubled, replaced, swapped] {
                prop_assert_ne!(sum(&wrong), expected);
            }
            // The right images at the wrong time.
            let late = fed.iter().map(|&(slot, image)| u64::from(SlotMap::fed_hash(step + 1, slot, image)));
            prop_assert_ne!(late.sum::<u64>(), expected);
        }

        #[test]
        fn ranges_cover_every_slot_once(total in 1u32..500, world in 1u32..20) {
            let slots: Vec<u32> = split_evenly(total, world).iter().flat_map(|r| r.slots()).map(|s| s.0).collect();
            prop_assert_eq!(slots, (0..total).collect::<Vec<_>>());
        }
    }
}
