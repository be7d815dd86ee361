//! The thread that watches an NCCL group, whatever the trainer is doing: a sum that cannot end keeps the GPU busy
//! for ever, and nobody who waits for the GPU can be woken.
//!
//! It sees three things: that the ring is over (a member died, was cut off or ended the group), that the
//! communicator has found a fault, and that the oldest sum takes too long. Whatever it is, the ring is ended with it, and
//! then the communicator, which lets go of the GPU.

use std::{sync::Arc, time::Duration};

use super::{
    communicator::Communicator,
    shared::{Front, Patience, Shared},
};
use crate::collective::CollectiveError;

/// Time between two looks. The end of a group costs half of it on average, a look some microseconds.
const ROUND: Duration = Duration::from_millis(10);
/// Longest time for a communicator to end in peace.
const FINALIZE_MAX: Duration = Duration::from_secs(2);
/// This rank blames its own GPU only after so many timeouts: the others blame it after one, and their word
/// lets it come back into a later group.
const OWN_TIMEOUTS: u32 = 2;

/// Watches until the group is over or closed, and ends the communicator.
pub(super) fn watch(shared: &Arc<Shared>) {
    shared.events.tolerate_captures();
    let mut clock = Clock { oldest: 0, is_summing: false, patience: Patience::new() };
    let mut waiting = None;
    let is_peace = loop {
        let is_closing = shared.is_closing_within(ROUND);
        if shared.ring.failure().is_some() || shared.look_for_faults().is_err() {
            break false;
        }
        // Its error has ended the ring, as has that of `look_for_faults`.
        let Ok(front) = shared.front() else { break false };
        shared.note_look(&front);
        if is_closing {
            break is_idle(shared, &front);
        }
        match &front {
            Front::Summing(_) => {
                waiting.get_or_insert_with(|| shared.ring.note_waiting());
            }
            Front::Idle | Front::Computing(_) => waiting = None,
        }
        if clock.is_overdue(shared, &front) {
            break false;
        }
    };
    drop(waiting);
    if is_peace && is_finalized(shared) {
        shared.release(Communicator::destroy);
    } else {
        shared.abort();
    }
}

/// Whether no sum is under way. If one is, the group ends with that.
fn is_idle(shared: &Shared, front: &Front) -> bool {
    let (Front::Computing(operation) | Front::Summing(operation)) = front else { return true };
    shared.ring.fail(CollectiveError::Aborted {
        operation: operation.to_string(),
        reason: "the group was dropped with sums under way".into(),
    });
    false
}

/// Ends the communicator in peace, as far as that goes quickly.
fn is_finalized(shared: &Shared) -> bool {
    let mut patience = Patience::new();
    let mut is_ready = shared.comm.finalize();
    while let Ok(false) = is_ready
        && patience.waited() < FINALIZE_MAX
    {
        std::thread::sleep(Duration::from_millis(1));
        is_ready = shared.comm.is_ready();
    }
    matches!(is_ready, Ok(true))
}

/// How long the oldest sum is where it is.
struct Clock {
    oldest: u64,
    is_summing: bool,
    patience: Patience,
}

impl Clock {
    /// Whether `front` takes too long. Then the group was ended with that.
    fn is_overdue(&mut self, shared: &Shared, front: &Front) -> bool {
        let (operation, is_summing) = match front {
            Front::Idle => return false,
            Front::Computing(operation) => (operation, false),
            Front::Summing(operation) => (operation, true),
        };
        if (operation.number, is_summing) != (self.oldest, self.is_summing) {
            *self = Self { oldest: operation.number, is_summing, patience: Patience::new() };
        }
        let waited = self.patience.waited();
        let timeout = shared.ring.timeout();
        if is_summing && waited > timeout {
            shared.ring.overdue(&operation.to_string(), waited, "its GPU did not come to the sum");
            return true;
        }
        if !is_summing && waited > timeout.saturating_mul(OWN_TIMEOUTS) {
            shared.ring.fail_unless_told(CollectiveError::Local {
                operation: operation.to_string(),
                detail: format!(
                    "this worker's GPU has not come to it within {:.1} s; it hangs, or a step takes longer than the timeout",
                    waited.as_secs_f64()
                ),
                source: None,
            });
            return true;
        }
        false
    }
}
