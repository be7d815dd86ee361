//! [`Exchange`]: the trainer's side of the collective, with the time that computing waited for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::collective::{Collective, CollectiveError};
use crate::torch::SumReducer;

/// A collective plus what the step loop wants to know of it: time lost waiting, and the first error,
/// which cannot travel through libtorch's backward pass.
#[derive(Debug)]
pub struct Exchange {
    collective: Box<dyn Collective>,
    waited_ns: AtomicU64,
    error: Mutex<Option<CollectiveError>>,
}

impl Exchange {
    /// Takes over the group's collective.
    #[must_use]
    pub fn new(collective: Box<dyn Collective>) -> Arc<Self> {
        Arc::new(Self { collective, waited_ns: AtomicU64::new(0), error: Mutex::new(None) })
    }

    /// The group's collective.
    #[must_use]
    pub fn collective(&self) -> &dyn Collective {
        &*self.collective
    }

    /// Whether there is anybody to exchange with.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.collective.world() == 1
    }

    /// Runs a blocking exchange and counts its time as waited.
    ///
    /// # Errors
    /// The exchange's own.
    pub fn wait<T>(
        &self,
        exchange: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let begin = Instant::now();
        let result = exchange(&*self.collective);
        self.waited_ns.fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Keeps an error that happened inside a pass; the first one stays.
    pub fn fail(&self, error: CollectiveError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// The error that ended a pass, if the exchange was the reason.
    #[must_use]
    pub fn take_error(&self) -> Option<CollectiveError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Time waited since the last call.
    #[must_use]
    pub fn take_waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.swap(0, Ordering::Relaxed))
    }
}

impl SumReducer for Exchange {
    fn sum(&self, values: &mut [f64]) -> bool {
        match self.wait(|collective| collective.all_reduce_f64(values)) {
            Ok(()) => true,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }
}
