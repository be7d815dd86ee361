//! Identifiers: newtypes, so that a rank can never stand where a slot is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Place of a worker in its group: `0..world`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

/// One place in the global batch: `0..global_batch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

/// Rises whenever a run's member list changes; whatever carries an older one is refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        self.ahead(1)
    }

    /// The generation `count` after this one.
    #[must_use]
    pub fn ahead(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

/// A step of a run. As a count: finished steps; as an index: `0..steps`.
pub type Step = u64;

macro_rules! display_inner {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_inner!(Rank, Slot, Generation);
