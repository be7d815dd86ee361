//! [`State`]: what simulated members train. A hash chain stands for the weights: a phase that is lost or repeated, and a
//! slot that is fed twice or not at all, makes another hash for all time.

use takuma_core::event::Position;
use takuma_core::slots::SlotRange;

use crate::rng::mix;

/// Phases of a step.
pub const PHASES: u32 = 3;

/// A member's weights, and where in the run they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Finished steps, and applied phases of the next.
    pub at: Position,
    /// Over all phases so far and the slots that fed them.
    pub hash: u64,
    /// The generation that drew it from the seed or read it from a checkpoint. Real weights differ in their last bits
    /// between two pasts, so these must not be mixed.
    pub past: u64,
}

impl State {
    /// Drawn from the run's seed.
    pub fn fresh(seed: u64, past: u64) -> Self {
        Self { at: Position::default(), hash: mix(seed), past }
    }

    /// Applies a phase that was fed by these slots.
    pub fn apply(&mut self, fed: u64) {
        let place = self.at.step * u64::from(PHASES) + u64::from(self.at.phase) + 1;
        self.hash = mix(self.hash ^ mix(place)).wrapping_add(mix(fed));
        self.at.phase += 1;
        if self.at.phase == PHASES {
            self.at = Position { step: self.at.step + 1, phase: 0 };
        }
    }

    /// Phases since the beginning of the run.
    pub fn phases(&self) -> u64 {
        phases(self.at)
    }
}

/// Phases since the beginning of the run.
pub fn phases(at: Position) -> u64 {
    at.step * u64::from(PHASES) + u64::from(at.phase)
}

/// What a share of the slots adds to the sum of a step's ledger.
pub fn fed(step: u64, slots: SlotRange) -> u64 {
    slots.slots().fold(0, |sum, slot| sum.wrapping_add(mix((step << 20) | u64::from(slot.0) | 1 << 60)))
}

/// The state of a run that nothing disturbs, after each phase; and what feeds each step.
#[derive(Debug)]
pub struct Undisturbed {
    pub states: Vec<State>,
    pub fed: Vec<u64>,
}

impl Undisturbed {
    pub fn new(seed: u64, steps: u64, global_batch: u32) -> Self {
        let all = SlotRange { first: 0, count: global_batch };
        let fed: Vec<u64> = (0..steps).map(|step| fed(step, all)).collect();
        let mut states = vec![State::fresh(seed, 0)];
        for &fed in &fed {
            for _ in 0..PHASES {
                let mut next = *states.last().unwrap();
                next.apply(fed);
                states.push(next);
            }
        }
        Self { states, fed }
    }

    /// The state at a place.
    pub fn at(&self, at: Position) -> Option<&State> {
        self.states.get(phases(at) as usize)
    }
}
