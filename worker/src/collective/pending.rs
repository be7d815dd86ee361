//! A bucket on its way through the group.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::CollectiveError;

/// Never empty: the sum, then the other lanes' buffers.
pub(crate) type Lanes = Vec<Vec<f32>>;

type Outcome = Result<Lanes, CollectiveError>;

/// A bucket whose sum was started. Dropping it lets the sum finish unseen.
#[derive(Debug)]
#[must_use = "the summed bucket comes from wait()"]
pub struct PendingReduce(State);

#[derive(Debug)]
enum State {
    Ready(Lanes),
    Waiting(Receiver<Outcome>),
}

impl PendingReduce {
    /// A sum that is there already.
    pub(crate) fn ready(lanes: Lanes) -> Self {
        Self(State::Ready(lanes))
    }

    /// A sum that another thread will deliver, and where it delivers it.
    pub(crate) fn waiting() -> (SyncSender<Outcome>, Self) {
        let (deliver, outcome) = sync_channel(1);
        (deliver, Self(State::Waiting(outcome)))
    }

    /// Waits for the sum and returns it, in the bucket that [`super::Collective::start_all_reduce`] was
    /// given or the first lane that [`super::Collective::start_chain_reduce`] was. Bounded by the group's
    /// deadline.
    ///
    /// # Errors
    /// What ended the group.
    pub fn wait(self) -> Result<Vec<f32>, CollectiveError> {
        Ok(self.wait_lanes()?.swap_remove(0))
    }

    /// [`PendingReduce::wait`], and gives back every buffer that was given, to be used again: the sum
    /// first, then the other lanes in their order with values that mean nothing.
    ///
    /// # Errors
    /// What ended the group.
    pub fn wait_lanes(self) -> Result<Vec<Vec<f32>>, CollectiveError> {
        match self.0 {
            State::Ready(lanes) => Ok(lanes),
            State::Waiting(outcome) => outcome.recv().unwrap_or_else(|_| {
                Err(CollectiveError::Aborted {
                    operation: "the sum of a bucket".into(),
                    reason: "the group was dropped while the bucket was waiting".into(),
                })
            }),
        }
    }
}
