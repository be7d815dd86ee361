//! [`Timestamp`]: time as the core sees it, always an argument.

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970. Whoever makes them guarantees that they never fall.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This time and so many milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds since `earlier`; 0 if that lies ahead.
    #[must_use]
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn unix_s(self) -> f64 {
        self.0 as f64 / 1000.0
    }
}
