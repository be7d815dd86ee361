//! What a second way to sum, beside the ring, needs of it: one end for both, and the ring's judgement of
//! who is to blame.

use std::time::Duration;

use super::{
    Ring,
    group::{Side, VERDICT_GRACE},
};
use crate::collective::{Collective, CollectiveError};

impl Ring {
    /// What ended the group, if it is over.
    pub(in crate::collective) fn failure(&self) -> Option<CollectiveError> {
        match &self.links {
            None => self.loopback.check("the exchange").err(),
            Some(links) => links.group.failure(),
        }
    }

    /// Ends the group with `error`, unless it has ended, and returns what ended it.
    pub(in crate::collective) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let Some(links) = &self.links else {
            self.loopback.abort_handle().abort(&error.to_string());
            return error;
        };
        links.group.fail(error)
    }

    /// [`Ring::fail`] for an error that may be the consequence of a lost member: first the links get time to
    /// tell whose.
    pub(in crate::collective) fn fail_unless_told(&self, error: CollectiveError) -> CollectiveError {
        if let Some(links) = &self.links {
            links.group.await_verdict(VERDICT_GRACE);
        }
        self.fail(error)
    }

    /// Ends the group because `operation` waited for the others for so long, and returns what ended it. Blames
    /// by the same rules as the ring's own waits.
    pub(in crate::collective) fn overdue(
        &self,
        operation: &str,
        waited: Duration,
        detail: &str,
    ) -> CollectiveError {
        let Some(links) = &self.links else {
            return self.fail(CollectiveError::Local {
                operation: operation.into(),
                detail: format!("it took longer than {:.1} s", waited.as_secs_f64()),
                source: None,
            });
        };
        let side = links.group.idle_side(&Side::BOTH);
        links.group.time_out(side, operation, waited, detail)
    }

    /// Tells the neighbours, for as long as the result lives, that this rank waits for the others.
    pub(in crate::collective) fn note_waiting(&self) -> Option<impl Drop + '_> {
        self.links.as_ref().map(|links| links.group.note_waiting())
    }

    /// Longest wait for the others; none in a group of one.
    pub(in crate::collective) fn timeout(&self) -> Duration {
        self.links.as_ref().map_or(Duration::MAX, |links| links.group.timeout())
    }
}
