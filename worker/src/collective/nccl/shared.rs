//! What the trainer's thread and the watchdog of one NCCL group share, and the waits that both have.
//!
//! The ring's end is the group's end: whoever finds a fault ends the ring, and the watchdog ends the communicator
//! of a ring that is over. So there is one first error, and one place to look for it.

use std::{
    collections::VecDeque,
    ffi::c_void,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, mpsc::sync_channel},
    time::{Duration, Instant},
};

use super::{
    NcclConfig,
    communicator::Communicator,
    events::{Events, Mark},
};
use crate::collective::{CollectiveError, DeviceKind, DeviceValues, EndedWord, HostStream, Ring};

const ENQUEUING: &str = "all_reduce on the GPU";

/// A wait is spun for this long, since most are shorter, and slept in pauses after that.
const SPIN: Duration = Duration::from_micros(500);
const PAUSE: Duration = Duration::from_micros(100);
/// How long the end of a communicator waits for a thread that is inside of one of its functions. That thread looks
/// for the end of the group all the time; if it does not come back, then the function does not, and only the
/// end of the communicator can make it.
const TURN_GRACE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub ring: Ring,
    pub comm: Communicator,
    pub config: NcclConfig,
    pub events: Events,
    /// Tells this rank's stream that the group is over.
    pub ended: EndedWord,
    /// What takes the place of a GPU's stream, in tests.
    pub host: Option<Box<dyn HostStream>>,
    /// Held by whoever calls a function of `comm`.
    turn: Mutex<()>,
    sums: Mutex<Sums>,
    looks: Mutex<Looks>,
    /// `sums` has changed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Sums {
    /// Enqueued and not yet known to be done, oldest first.
    queue: VecDeque<Sum>,
    begun: u64,
    is_closing: bool,
    /// The communicator is being ended: nothing more may be asked of it.
    is_ending: bool,
    /// The communicator is gone.
    is_released: bool,
}

/// Looks of the watchdog, and those that found the stream in a sum. Older ones fade.
#[derive(Debug, Default)]
struct Looks {
    all: f64,
    summing: f64,
}

/// What is left of a look's weight after the next one: a hundred of them, a second's, count for most.
const FADING: f64 = 0.99;

/// A sum under way.
#[derive(Debug)]
struct Sum {
    operation: Operation,
    /// Where the stream comes to the sum, and where it has it.
    before: Mark,
    after: Mark,
}

/// What a sum is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub number: u64,
    len: usize,
    kind: DeviceKind,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "all_reduce {} of {} {} values on the GPU", self.number, self.len, self.kind)
    }
}

/// How far the oldest sum under way is.
#[derive(Debug)]
pub(super) enum Front {
    /// There is none.
    Idle,
    /// This rank's stream has not come to it.
    Computing(Operation),
    /// It waits for the others, or sums.
    Summing(Operation),
}

impl Shared {
    pub(super) fn new(ring: Ring, comm: Communicator, config: &NcclConfig, ended: EndedWord) -> Self {
        let events = Events::new(Arc::clone(&config.cuda));
        Self {
            ring,
            comm,
            config: config.clone(),
            events,
            ended,
            host: config.host_stream.map(|make| make()),
            turn: Mutex::default(),
            sums: Mutex::default(),
            looks: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// See [`crate::collective::DeviceCollective::all_reduce_on_device`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn enqueue(
        &self,
        values: DeviceValues,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError> {
        // Before the turn, too: the end of the communicator may have that for long.
        self.check(ENQUEUING)?;
        let turn = lock(&self.turn);
        let operation = Operation { number: self.sums().begun + 1, len: values.len, kind: values.kind };
        self.check(&operation.to_string())?;
        // SAFETY: the caller's stream.
        let before = unsafe { self.mark(stream, operation) }?;
        // SAFETY: the caller's values and stream.
        let launched = unsafe { self.launch(values, stream, operation) };
        // SAFETY: the caller's stream.
        match launched.and_then(|()| unsafe { self.mark(stream, operation) }) {
            Ok(after) => {
                let mut sums = self.sums();
                sums.begun = operation.number;
                sums.queue.push_back(Sum { operation, before, after });
                drop(turn);
                Ok(())
            }
            Err(error) => {
                self.events.take_back(before);
                Err(error)
            }
        }
    }

    /// # Safety
    /// As [`Shared::enqueue`].
    unsafe fn launch(
        &self,
        values: DeviceValues,
        stream: *mut c_void,
        operation: Operation,
    ) -> Result<(), CollectiveError> {
        // SAFETY: the caller's values and stream.
        match unsafe { self.comm.all_reduce(values, stream) } {
            Ok(true) => Ok(()),
            Ok(false) => self.until_ready(&operation.to_string(), self.ring.timeout()),
            Err(fault) => {
                let operation = operation.to_string();
                Err(self.ring.fail_unless_told(fault.to_error(&operation)).during(&operation))
            }
        }
    }

    /// # Safety
    /// `stream` is a living stream of the calling thread's current device.
    unsafe fn mark(&self, stream: *mut c_void, operation: Operation) -> Result<Mark, CollectiveError> {
        // SAFETY: the caller's stream.
        unsafe { self.events.mark(stream) }.map_err(|words| self.cuda_failed(operation, words))
    }

    fn cuda_failed(&self, operation: Operation, words: String) -> CollectiveError {
        let operation = operation.to_string();
        let error = CollectiveError::Local { operation: operation.clone(), detail: words, source: None };
        self.ring.fail(error).during(&operation)
    }

    /// What ended the group, told from `operation`.
    pub(super) fn check(&self, operation: &str) -> Result<(), CollectiveError> {
        if let Some(failure) = self.ring.failure() {
            return Err(failure.during(operation));
        }
        // Whatever the ring knows. Set before the turn is taken to free it, so who has the turn may rely on it.
        if self.sums().is_ending {
            let reason = "the communicator has ended".to_owned();
            return Err(CollectiveError::Aborted { operation: operation.to_owned(), reason });
        }
        Ok(())
    }

    /// Waits until what was begun on the communicator is under way on the device. Ends the group if it is not
    /// within `limit`. The caller has the turn.
    pub(super) fn until_ready(&self, operation: &str, limit: Duration) -> Result<(), CollectiveError> {
        let mut patience = Patience::new();
        let mut waiting = None;
        loop {
            self.check(operation)?;
            match self.comm.is_ready() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(fault) => {
                    return Err(self.ring.fail_unless_told(fault.to_error(operation)).during(operation));
                }
            }
            let waited = patience.waited();
            if waited > limit {
                return Err(self.ring.overdue(operation, waited, "its GPU did not connect to the others"));
            }
            if !pause(waited) {
                waiting.get_or_insert_with(|| self.ring.note_waiting());
            }
        }
    }

    /// See [`crate::collective::DeviceCollective::settle`].
    pub(super) fn settle(&self) -> Result<(), CollectiveError> {
        const OPERATION: &str = "waiting for sums on the GPU";
        let target = self.sums().begun;
        let begin = Instant::now();
        while self.ring.failure().is_none() {
            let oldest = match self.front()? {
                Front::Idle => None,
                Front::Computing(operation) | Front::Summing(operation) => Some(operation.number),
            };
            if oldest.is_none_or(|oldest| oldest > target) {
                break;
            }
            pause(begin.elapsed());
        }
        // Looked at after the sums: the end of a communicator makes its sums look done.
        let Some(failure) = self.ring.failure() else { return Ok(()) };
        // The watchdog bounds this wait.
        let sums = self.changed.wait_while(self.sums(), |sums| !sums.is_released);
        drop(sums.unwrap_or_else(PoisonError::into_inner));
        Err(failure.during(OPERATION))
    }

    /// Forgets the sums that are done, and tells how far the oldest other one is.
    pub(super) fn front(&self) -> Result<Front, CollectiveError> {
        let mut sums = self.sums();
        let is_reached = |sum: &Sum, mark: &Mark| {
            self.events.is_reached(mark).map_err(|words| self.cuda_failed(sum.operation, words))
        };
        // A communicator's sums are done in their order. So some looks are enough, where whole steps are handed over a
        // millisecond apart and have fifty sums each; whoever enqueues one waits meanwhile.
        let (mut done, mut rest) = (0, sums.queue.len());
        while done < rest {
            let middle = usize::midpoint(done, rest);
            let sum = &sums.queue[middle];
            if is_reached(sum, &sum.after)? {
                done = middle + 1;
            } else {
                rest = middle;
            }
        }
        for Sum { before, after, .. } in sums.queue.drain(..done) {
            self.events.take_back(before);
            self.events.take_back(after);
        }
        let Some(oldest) = sums.queue.front() else { return Ok(Front::Idle) };
        let operation = oldest.operation;
        Ok(if is_reached(oldest, &oldest.before)? {
            Front::Summing(operation)
        } else {
            Front::Computing(operation)
        })
    }

    /// Takes down where the watchdog found the stream.
    pub(super) fn note_look(&self, front: &Front) {
        let mut looks = lock(&self.looks);
        let is_summing = matches!(front, Front::Summing(_));
        looks.all = looks.all * FADING + 1.0;
        looks.summing = looks.summing * FADING + f64::from(u8::from(is_summing));
    }

    /// See [`crate::collective::DeviceCollective::summing_share`].
    pub(super) fn summing_share(&self) -> f64 {
        let looks = lock(&self.looks);
        if looks.all == 0.0 { 0.0 } else { looks.summing / looks.all }
    }

    /// Whether the communicator has a fault that it found by itself. Looks only if nobody else uses it: who does
    /// finds the fault, too.
    pub(super) fn look_for_faults(&self) -> Result<(), CollectiveError> {
        let Some(_turn) = self.turn_within(Duration::ZERO) else { return Ok(()) };
        match self.comm.is_ready() {
            Ok(_) => Ok(()),
            Err(fault) => Err(self.ring.fail_unless_told(fault.to_error("the exchange"))),
        }
    }

    fn turn_within(&self, limit: Duration) -> Option<MutexGuard<'_, ()>> {
        let begin = Instant::now();
        loop {
            match self.turn.try_lock() {
                Ok(turn) => return Some(turn),
                Err(TryLockError::Poisoned(turn)) => return Some(turn.into_inner()),
                Err(TryLockError::WouldBlock) if begin.elapsed() >= limit => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Asks the watchdog to end the group.
    pub(super) fn close(&self) {
        self.sums().is_closing = true;
        self.changed.notify_all();
    }

    /// Waits for `round`, or less if the group is to be closed, and tells whether it is.
    pub(super) fn is_closing_within(&self, round: Duration) -> bool {
        let sums = self.changed.wait_timeout_while(self.sums(), round, |sums| !sums.is_closing);
        sums.unwrap_or_else(PoisonError::into_inner).0.is_closing
    }

    /// Ends the communicator although sums may be under way: see [`Shared::release`]. The ring is over.
    pub(super) fn abort(self: &Arc<Self>) {
        // First of all: what the stream does behind sums that are ended now must not count.
        self.ended.set();
        self.release(Communicator::abort);
    }

    /// Ends the communicator by `free`, on a thread of its own and within the limit; past that, the last resort. The
    /// ring is over or no longer needed.
    pub(super) fn release(self: &Arc<Self>, free: fn(&Communicator)) {
        self.sums().is_ending = true;
        let (done, finished) = sync_channel::<()>(1);
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nccl-end".into()).spawn(move || {
            shared.events.tolerate_captures();
            let turn = shared.turn_within(TURN_GRACE);
            if let Some(hook) = &shared.config.before_abort
                && catch_unwind(AssertUnwindSafe(|| hook())).is_err()
            {
                tracing::error!("destroying graphs before the end of a communicator panicked");
            }
            free(&shared.comm);
            drop(turn);
            drop(shared);
            if done.send(()).is_err() {
                tracing::debug!("a communicator ended after its time");
            }
        });
        let limit = self.config.abort_timeout;
        let outcome =
            thread.map_err(|error| format!("no thread for it can be had ({error})")).and_then(|_| {
                finished
                    .recv_timeout(limit)
                    .map_err(|_| format!("it did not end within {:.1} s", limit.as_secs_f64()))
            });
        if let Err(words) = outcome {
            (self.config.last_resort)(&format!("ending the NCCL communicator failed: {words}"));
        }
        self.sums().is_released = true;
        self.changed.notify_all();
    }

    /// Sums that were enqueued so far.
    #[cfg(test)]
    pub(super) fn begun(&self) -> u64 {
        self.sums().begun
    }

    fn sums(&self) -> MutexGuard<'_, Sums> {
        lock(&self.sums)
    }
}

/// Lets others run for a moment. True while the wait is a short one.
fn pause(waited: Duration) -> bool {
    let is_short = waited < SPIN;
    if is_short {
        std::thread::yield_now();
    } else {
        std::thread::sleep(PAUSE);
    }
    is_short
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a wait. A time in which this thread did not run, because its machine was paused say, counts as
/// [`Patience::STRIDE`] at most: the others may not have run either.
#[derive(Debug)]
pub(super) struct Patience {
    waited: Duration,
    counted_at: Instant,
}

impl Patience {
    const STRIDE: Duration = Duration::from_millis(100);

    pub(super) fn new() -> Self {
        Self { waited: Duration::ZERO, counted_at: Instant::now() }
    }

    /// The time so far.
    pub(super) fn waited(&mut self) -> Duration {
        let now = Instant::now();
        self.waited += (now - self.counted_at).min(Self::STRIDE);
        self.counted_at = now;
        self.waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_running_is_not_counted_as_waiting() {
        let mut patience = Patience::new();
        patience.counted_at -= Duration::from_secs(3600);
        assert!(patience.waited() <= Patience::STRIDE);
    }
}
