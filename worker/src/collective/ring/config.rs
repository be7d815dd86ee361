//! What a ring is formed from.

use std::time::Duration;

use takuma_core::ids::{Generation, Rank};

use super::greeting::fnv1a;
use crate::collective::CollectiveError;

/// Most ranks of a ring; the number of a block must fit its field.
const WORLD_MAX: usize = 4096;
/// Most lanes of all ranks: every rank's short sums get all of them.
const LANES_MAX: u32 = 65_536;
/// Most connections for buckets between two neighbours.
const CHANNELS_MAX: usize = 64;

/// Which ring to form, and its limits.
#[derive(Debug, Clone)]
pub struct RingConfig {
    /// The run's id: one run for all time, since an older generation of the same run is refused.
    pub run: String,
    /// This worker's place.
    pub rank: Rank,
    /// The membership to form.
    pub generation: Generation,
    /// Every member's [`RingListener`] as "host:port", by rank.
    pub members: Vec<String>,
    /// How many lanes of the chain operations each rank holds, at least 1; rank 0 has the first ones. The
    /// same on all ranks.
    pub lanes_by_rank: Vec<u32>,
    /// Connections for buckets between two neighbours, 1 to 64. Each is a thread. One flow is capped in
    /// many clouds, so several help there; on one machine one per core is enough.
    pub channels: usize,
    /// Longest time for forming the ring.
    pub connect_timeout: Duration,
    /// Of that, longest time until the next rank takes a connection.
    pub reach_timeout: Duration,
    /// Longest wait in an operation without a byte from the neighbours. Covers their computing, so it
    /// must be above the longest step. [`Collective::set_timeout`] changes it later.
    ///
    /// [`Collective::set_timeout`]: crate::collective::Collective::set_timeout
    pub timeout: Duration,
    /// Longest time without a sign of life from a neighbour's process, whatever it is doing. Signs come
    /// six times as often, at least every half second. Time in which this process did not run itself
    /// does not count.
    pub silence: Duration,
    /// Neighbours on one machine use Unix sockets for data, for a third of TCP's processor time.
    pub use_local_sockets: bool,
}

impl RingConfig {
    /// A configuration with the usual limits: one lane a rank, 2 channels, 30 s to form, 1.5 s to reach the next
    /// rank, 120 s without data, 1.5 s without a sign of life. The last is what a stopped process costs its group; a healthy
    /// one gives a sign every quarter of a second, whatever its trainer does.
    #[must_use]
    pub fn new(run: &str, rank: Rank, generation: Generation, members: Vec<String>) -> Self {
        Self {
            run: run.to_owned(),
            rank,
            generation,
            lanes_by_rank: vec![1; members.len()],
            members,
            channels: 2,
            connect_timeout: Duration::from_secs(30),
            reach_timeout: Duration::from_millis(1500),
            timeout: Duration::from_secs(120),
            silence: Duration::from_millis(1500),
            use_local_sockets: true,
        }
    }

    pub(super) fn world(&self) -> u32 {
        // Lossless: `check` bounds it.
        self.members.len() as u32
    }

    /// All channels between two neighbours.
    pub(super) fn sockets(&self) -> u16 {
        // Lossless: `check` bounds it.
        self.channels as u16 + 2
    }

    /// Who holds which lanes, as 16 bits for the greeting: guards against mixed-up settings.
    pub(super) fn lanes_digest(&self) -> u16 {
        let hash = fnv1a(self.lanes_by_rank.iter().flat_map(|count| count.to_le_bytes()));
        // Folded, so that all bits count.
        (hash ^ hash >> 16 ^ hash >> 32 ^ hash >> 48) as u16
    }

    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        let wrong = |detail: String| {
            Err(CollectiveError::Local { operation: "forming the ring".into(), detail, source: None })
        };
        if self.members.is_empty() || self.members.len() > WORLD_MAX {
            return wrong(format!("a ring has 1 to {WORLD_MAX} members, not {}", self.members.len()));
        }
        if self.rank.0 as usize >= self.members.len() {
            return wrong(format!("rank {} is not in a group of {}", self.rank, self.members.len()));
        }
        let lanes = &self.lanes_by_rank;
        if lanes.len() != self.members.len() {
            return wrong(format!("lanes are given for {} ranks of {}", lanes.len(), self.members.len()));
        }
        let count = lanes.iter().fold(0u32, |count, &more| count.saturating_add(more));
        if lanes.contains(&0) || count > LANES_MAX {
            return wrong(format!("each rank holds a lane or more, all together at most {LANES_MAX}"));
        }
        if !(1..=CHANNELS_MAX).contains(&self.channels) {
            return wrong(format!("channels must be 1 to {CHANNELS_MAX}, not {}", self.channels));
        }
        if self.timeout.is_zero() || self.silence.is_zero() {
            return wrong("timeout and silence must be above zero".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(lanes_by_rank: Vec<u32>) -> RingConfig {
        let members = vec!["a:1".into(), "b:1".into(), "c:1".into()];
        RingConfig { lanes_by_rank, ..RingConfig::new("run", Rank(0), Generation(1), members) }
    }

    #[test]
    fn lanes_are_wanted_for_each_rank() {
        assert!(config(vec![3, 3, 2]).check().is_ok());
        for bad in [vec![], vec![4, 4], vec![4, 0, 4], vec![LANES_MAX, 1, 1], vec![u32::MAX; 3]] {
            let refused = config(bad).check();
            assert!(matches!(refused, Err(CollectiveError::Local { .. })), "{refused:?}");
        }
    }

    #[test]
    fn other_splits_of_the_lanes_have_other_digests() {
        let digests =
            [[3, 3, 2], [3, 2, 3], [2, 3, 3], [1, 1, 6]].map(|lanes| config(lanes.into()).lanes_digest());
        for (place, digest) in digests.iter().enumerate() {
            assert!(!digests[..place].contains(digest));
        }
    }
}
