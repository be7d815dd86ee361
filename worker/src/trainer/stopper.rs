//! [`Stopper`]: ends a trainer's group from outside, whatever the trainer is doing.

use std::sync::{Arc, Mutex, PoisonError};

use crate::collective::AbortHandle;

/// Ends groups up to a generation: the present one, and any that is entered too late. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Stopper {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Groups below this generation are over.
    floor: u64,
    reason: String,
    group: Option<(u64, AbortHandle)>,
}

impl Stopper {
    /// Ends every group of a generation below `generation`.
    pub fn end_below(&self, generation: u64, reason: &str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if generation <= inner.floor {
            return;
        }
        inner.floor = generation;
        reason.clone_into(&mut inner.reason);
        let over = inner.group.take_if(|(present, _)| *present < generation);
        drop(inner);
        if let Some((_, group)) = over {
            group.abort(reason);
        }
    }

    /// Ends every group, now and later.
    pub fn end(&self, reason: &str) {
        self.end_below(u64::MAX, reason);
    }

    /// Puts a new group under this stopper; ends it at once if its end was asked for already.
    pub fn guard(&self, generation: u64, group: AbortHandle) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if generation < inner.floor {
            let reason = inner.reason.clone();
            drop(inner);
            return group.abort(&reason);
        }
        inner.group = Some((generation, group));
    }
}

#[cfg(test)]
mod tests {
    use takuma_core::ids::Generation;

    use super::*;
    use crate::collective::{Collective, Loopback};

    #[test]
    fn a_group_that_comes_too_late_is_ended_and_a_newer_one_is_not() {
        let stopper = Stopper::default();
        stopper.end_below(3, "a newer group");
        let (old, new) = (Loopback::new(Generation(2)), Loopback::new(Generation(3)));
        stopper.guard(2, old.abort_handle());
        assert!(old.barrier().is_err());
        stopper.guard(3, new.abort_handle());
        assert!(new.barrier().is_ok());
        stopper.end("the run is over");
        assert!(new.barrier().is_err());
    }
}
