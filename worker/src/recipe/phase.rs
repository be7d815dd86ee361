//! [`Phase`]: the unit that is applied as a whole or not at all.

use std::fmt;

use crate::collective::CollectiveError;
use crate::torch::TorchError;

/// The updates of one step, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The discriminator's update.
    D,
    /// The generator's first update.
    G1,
    /// The generator's second update, with the same noise.
    G2,
}

impl Phase {
    /// Every phase of a step, in order.
    pub const ALL: [Self; 3] = [Self::D, Self::G1, Self::G2];

    /// Short name for people: "d", "g1" or "g2".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::D => "d",
            Self::G1 => "g1",
            Self::G2 => "g2",
        }
    }

    /// Its place in the step: 0, 1 or 2.
    #[must_use]
    pub fn index(self) -> u32 {
        match self {
            Self::D => 0,
            Self::G1 => 1,
            Self::G2 => 2,
        }
    }

    /// The phase at place `index` of a step, if a step has so many.
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.index() == index)
    }

    /// The phase after this one; none when the step is complete.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        Self::from_index(self.index() + 1)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A phase's numbers, summed over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PhaseSums {
    /// Mean loss over the global batch: of reals and of fakes, added, in D's phase.
    pub loss: f64,
    /// Logits on the right side of 0 in D's phase, of twice the global batch; 0 in G's phases.
    pub right: f64,
}

impl PhaseSums {
    /// Of a phase that made no update: no numbers.
    pub const NONE: Self = Self { loss: f64::NAN, right: f64::NAN };
}

/// Why a phase was not applied. Nothing of it is: weights, moments and statistics are as before, and
/// the phase can be run again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PhaseError {
    /// The exchange broke: re-form the group and run the phase again.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// libtorch failed on this worker alone.
    #[error(transparent)]
    Torch(#[from] TorchError),
    /// The training has left the numbers. All workers find out in the same phase; running it again
    /// gives the same. The votes that travelled with it are counted.
    #[error("{what} became infinite or not a number in phase {phase}, so the update was not applied")]
    NotFinite {
        /// Where it happened.
        phase: Phase,
        /// "the gradient of conv2.weight", the first such parameter, with or without "the loss and".
        what: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_through_a_step() {
        let mut walked = vec![Phase::D];
        while let Some(next) = walked.last().and_then(|last| last.next()) {
            walked.push(next);
        }
        assert_eq!(walked, Phase::ALL);
        for phase in Phase::ALL {
            assert_eq!(Phase::from_index(phase.index()), Some(phase));
        }
        assert_eq!(Phase::from_index(3), None);
    }
}
