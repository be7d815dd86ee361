//! What a ring is formed from.

use std::time::Duration;

use takuma_core::ids::{Generation, Rank};

use crate::collective::CollectiveError;

/// Most ranks of a ring; the number of a block must fit its field.
const WORLD_MAX: usize = 4096;
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
    /// Connections for buckets between two neighbours, 1 to 64. Each is a thread. One flow is capped in
    /// many clouds, so several help there; on one machine one per core is enough.
    pub channels: usize,
    /// Longest time for forming the ring.
    pub connect_timeout: Duration,
    /// Longest wait in an operation without a byte from the neighbours. Covers their computing, so it
    /// must be above the longest step.
    pub timeout: Duration,
    /// Longest time without a sign of life from a neighbour's process, whatever it is doing. Signs come
    /// five times as often, at least every half second.
    pub silence: Duration,
    /// Neighbours on one machine use Unix sockets for data, for a third of TCP's processor time.
    pub use_local_sockets: bool,
}

impl RingConfig {
    /// A configuration with the usual limits: 2 channels, 30 s to form, 120 s without data, 5 s without
    /// a sign of life.
    #[must_use]
    pub fn new(run: &str, rank: Rank, generation: Generation, members: Vec<String>) -> Self {
        Self {
            run: run.to_owned(),
            rank,
            generation,
            members,
            channels: 2,
            connect_timeout: Duration::from_secs(30),
            timeout: Duration::from_secs(120),
            silence: Duration::from_secs(5),
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
        if !(1..=CHANNELS_MAX).contains(&self.channels) {
            return wrong(format!("channels must be 1 to {CHANNELS_MAX}, not {}", self.channels));
        }
        if self.timeout.is_zero() || self.silence.is_zero() {
            return wrong("timeout and silence must be above zero".into());
        }
        Ok(())
    }
}
