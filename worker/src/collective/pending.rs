//! A bucket on its way through the group.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::CollectiveError;

type Outcome = Result<Vec<f32>, CollectiveError>;

/// A bucket whose sum was started. Dropping it lets the sum finish unseen.
#[derive(Debug)]
#[must_use = "the summed bucket comes from wait()"]
pub struct PendingReduce(State);

#[derive(Debug)]
enum State {
    Ready(Vec<f32>),
    Waiting(Receiver<Outcome>),
}

impl PendingReduce {
    /// A sum that is there already.
    pub(crate) fn ready(bucket: Vec<f32>) -> Self {
        Self(State::Ready(bucket))
    }

    /// A sum that another thread will deliver, and where it delivers it.
    pub(crate) fn waiting() -> (SyncSender<Outcome>, Self) {
        let (deliver, outcome) = sync_channel(1);
        (deliver, Self(State::Waiting(outcome)))
    }

    /// Waits for the sum and returns the bucket that [`super::Collective::start_all_reduce`] was given,
    /// summed in place. Bounded by the group's deadline.
    ///
    /// # Errors
    /// What ended the group.
    pub fn wait(self) -> Outcome {
        match self.0 {
            State::Ready(bucket) => Ok(bucket),
            State::Waiting(outcome) => outcome.recv().unwrap_or_else(|_| {
                Err(CollectiveError::Aborted {
                    operation: "all_reduce of a bucket".into(),
                    reason: "the group was dropped while the bucket was waiting".into(),
                })
            }),
        }
    }
}
