//! Which slots of the global batch each worker has: even shares, or by what a slot costs each of them.

use crate::config::RunConfig;
use crate::slots::{SlotRange, split_by_cost, split_evenly};

impl RunConfig {
    /// Most workers that can have a share of the batch, or as many as were asked for.
    #[must_use]
    pub fn most_workers(&self) -> u32 {
        let parts = if self.exact { self.lanes } else { self.global_batch };
        self.workers.unwrap_or(parts).min(parts)
    }

    /// Each worker's slots, by rank: shares as even as can be, larger ones first. In exact mode a share is
    /// made of whole lanes.
    ///
    /// # Panics
    /// If `world` is 0.
    #[must_use]
    pub fn shares(&self, world: u32) -> Vec<SlotRange> {
        if !self.exact {
            return split_evenly(self.global_batch, world);
        }
        self.slots_of_lanes(split_evenly(self.lanes, world))
    }

    /// Each worker's slots, by rank, given what one slot costs each: see [`split_by_cost`]. In exact mode a share is
    /// made of whole lanes.
    ///
    /// # Panics
    /// If there are no costs.
    #[must_use]
    pub fn shares_by_cost(&self, costs: &[f64]) -> Vec<SlotRange> {
        if self.exact {
            self.slots_of_lanes(split_by_cost(self.lanes, costs))
        } else {
            split_by_cost(self.global_batch, costs)
        }
    }

    fn slots_of_lanes(&self, shares: Vec<SlotRange>) -> Vec<SlotRange> {
        let per_lane = self.slots_per_lane();
        let scaled =
            |lanes: SlotRange| SlotRange { first: lanes.first * per_lane, count: lanes.count * per_lane };
        shares.into_iter().map(scaled).collect()
    }

    /// How many lanes a worker computes that has `slots` slots: those of its share in exact mode, else one.
    #[must_use]
    pub fn lanes_of(&self, slots: u32) -> u32 {
        if self.exact { slots / self.slots_per_lane() } else { 1 }
    }

    /// Slots of one lane in exact mode.
    #[must_use]
    pub fn slots_per_lane(&self) -> u32 {
        self.global_batch / self.lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn exact_mode_deals_whole_lanes() {
        let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
        assert_eq!(config.lanes_of(22), 1);
        config.exact = true;
        let counts =
            |shares: Vec<SlotRange>| -> Vec<u32> { shares.iter().map(|share| share.count).collect() };
        assert_eq!(counts(config.shares(3)), [24, 24, 16]);
        assert_eq!(config.lanes_of(24), 3);
        assert_eq!(counts(config.shares_by_cost(&[1.0, 3.0])), [48, 16]);
    }
}
