//! [`Clock`]: the time that the core is told. It starts at the wall clock and then follows the monotonic
//! one, so it never falls and no time service can make all workers look silent.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use takuma_core::time::Timestamp;
// tokio's, so that a test that pauses time pauses the core's too.
use tokio::time::Instant;

/// A source of timestamps. Copies agree.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
    origin_unix: Duration,
}

impl Clock {
    /// A clock that starts now, when the wall clock shows `wall`.
    #[must_use]
    pub fn start(wall: SystemTime) -> Self {
        let origin_unix = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { origin: Instant::now(), origin_unix }
    }

    /// The present time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp((self.origin_unix + self.origin.elapsed()).as_millis() as u64)
    }

    /// How long until `at`.
    #[must_use]
    pub fn until(&self, at: Timestamp) -> Duration {
        Duration::from_millis(at.since_ms(self.now()))
    }
}
