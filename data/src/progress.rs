//! How far a job is, told at most twenty times a second, and whether it should go on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::DataError;

/// A terminal shows no more than this; a quicker stream would cost more than it tells.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// What a job is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Listing the source's images.
    Scanning,
    /// Decoding, cropping and resizing.
    Decoding,
    /// Drawing faces.
    Drawing,
    /// Writing shards.
    Writing,
    /// Reading shards back.
    Verifying,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Images (scanning, decoding, drawing) or shards (writing, verifying) that are done.
    pub done: u64,
    /// Of how many, where that is known.
    pub total: Option<u64>,
    /// Images refused until now.
    pub quarantined: u64,
}

/// The job's line to its caller: progress out, cancellation in.
pub(crate) struct Job {
    tell: Box<dyn Fn(Progress) + Send + Sync>,
    told: Mutex<Option<(Stage, Instant)>>,
    cancelled: AtomicBool,
}

impl Job {
    pub(crate) fn new(tell: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self { tell: Box::new(tell), told: Mutex::new(None), cancelled: AtomicBool::new(false) }
    }

    /// Tells the caller, unless it heard of the same stage just now and this is not its end.
    pub(crate) fn report(&self, progress: Progress) {
        let now = Instant::now();
        {
            let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let fresh = told.is_some_and(|(stage, at)| stage == progress.stage && now - at < REPORT_EVERY);
            if fresh && Some(progress.done) != progress.total {
                return;
            }
            *told = Some((progress.stage, now));
        }
        (self.tell)(progress);
    }

    /// An error as soon as the caller has gone: worker threads ask between images.
    pub(crate) fn check(&self) -> Result<(), DataError> {
        if self.cancelled.load(Ordering::Relaxed) { Err(DataError::Cancelled) } else { Ok(()) }
    }
}

/// Held by the job's future: when that is dropped (Ctrl-C), the worker threads stop too.
pub(crate) struct CancelOnDrop<'a>(pub(crate) &'a Job);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Runs blocking work off the async threads. A panic there is a panic here.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DataError> + Send + 'static,
) -> Result<T, DataError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(DataError::Cancelled),
        },
    }
}
