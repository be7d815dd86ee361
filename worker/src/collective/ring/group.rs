//! What the threads of one ring share: its sockets and how it ended.
//!
//! The first failure decides. It is kept, told to both neighbours on the control connections, and every
//! data socket is shut down, which wakes whoever waits. A neighbour's warden does the same with what it
//! was told, so all ranks come to blame the same one within a few round trips.

use std::{
    io::{self, ErrorKind, Write},
    net::Shutdown,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};
use socket2::Socket;
use takuma_core::ids::{Generation, Rank};

use super::{
    connect::set_unacknowledged,
    frame::Operation,
    notice::{Notice, Verdict},
};
use crate::collective::CollectiveError;

/// How long a broken data socket waits for the control connection to tell who is really to blame. The
/// word is on its way when the socket breaks; this covers a lost packet and its repeat.
pub(super) const VERDICT_GRACE: Duration = Duration::from_millis(300);

/// A direction in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Previous = 0,
    Next = 1,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::Previous, Self::Next];
}

/// `timeout` in microseconds; at least one, since nothing can be waited for in none.
fn whole_us(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX).max(1)
}

/// One ring as its threads see it.
#[derive(Debug)]
pub(super) struct Group {
    pub rank: Rank,
    pub world: u32,
    pub generation: Generation,
    /// Longest wait without a byte, in microseconds.
    timeout_us: AtomicU64,
    /// Longest time without a sign of life on a control connection.
    pub silence: Duration,
    /// Longest time that a neighbour may take to meet its other neighbour.
    pub forming: Duration,
    /// Every rank has met its neighbours.
    pub is_formed: AtomicBool,
    data: Vec<Arc<Socket>>,
    control: [Socket; 2],
    /// Held while writing to `control`, so that notices do not mix.
    control_turn: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that wait for a neighbour.
    waiting: AtomicUsize,
    /// How long frames took from their first byte to their last, all channels together, in microseconds.
    receiving_us: AtomicU64,
    /// Buckets started and not yet summed.
    pub in_flight: AtomicUsize,
    /// The warden does nothing, as in a stopped process.
    #[cfg(test)]
    pub is_frozen: AtomicBool,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    failure: Option<CollectiveError>,
    is_closing: bool,
    /// The neighbours have been told; only now may the control connections be closed.
    is_told: bool,
    sides: [SideState; 2],
}

/// What is known of a neighbour.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SideState {
    /// It has said farewell.
    pub has_left: bool,
    /// At its last sign of life it was waiting for a neighbour itself.
    pub is_waiting: bool,
}

/// Counts a waiting thread for as long as it lives.
pub(super) struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a group is made of.
pub(super) struct Parts {
    pub rank: Rank,
    pub world: u32,
    pub generation: Generation,
    pub timeout: Duration,
    pub silence: Duration,
    pub forming: Duration,
    /// By [`Side`].
    pub control: [Socket; 2],
    pub data: Vec<Arc<Socket>>,
}

impl Group {
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        let Parts { rank, world, generation, timeout, silence, forming, control, data } = parts;
        Ok(Self {
            rank,
            world,
            generation,
            timeout_us: AtomicU64::new(whole_us(timeout)),
            silence,
            forming,
            is_formed: AtomicBool::new(false),
            data,
            control,
            control_turn: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            receiving_us: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            #[cfg(test)]
            is_frozen: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Longest wait without a byte.
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_micros(self.timeout_us.load(Ordering::Relaxed))
    }

    pub(super) fn set_timeout(&self, timeout: Duration) {
        self.timeout_us.store(whole_us(timeout), Ordering::Relaxed);
        for socket in self.control.iter().chain(self.data.iter().map(|socket| &**socket)) {
            if let Err(error) = set_unacknowledged(socket, timeout.max(self.silence)) {
                // The group is over, or else the old limit still ends it, if early or late.
                tracing::debug!(rank = self.rank.0, %error, "a socket kept its old limit");
            }
        }
        self.wake_warden();
    }

    pub(super) fn peer(&self, side: Side) -> Rank {
        match side {
            Side::Previous => Rank((self.rank.0 + self.world - 1) % self.world),
            Side::Next => Rank((self.rank.0 + 1) % self.world),
        }
    }

    pub(super) fn control(&self, side: Side) -> &Socket {
        &self.control[side as usize]
    }

    /// Readable when the group failed or closes, or has another timeout.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.wake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn failure(&self) -> Option<CollectiveError> {
        self.state().failure.clone()
    }

    /// The group failed or closed, and the neighbours have been told.
    pub(super) fn is_over(&self) -> bool {
        self.state().is_told
    }

    pub(super) fn side(&self, side: Side) -> SideState {
        self.state().sides[side as usize]
    }

    pub(super) fn update_side(&self, side: Side, update: impl FnOnce(&mut SideState)) {
        update(&mut self.state().sides[side as usize]);
        self.changed.notify_all();
    }

    /// Counts a frame that took so long from its first byte to its last.
    pub(super) fn note_received(&self, took: Duration) {
        self.receiving_us.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// The time that was counted since the last call.
    pub(super) fn take_receiving(&self) -> Duration {
        Duration::from_micros(self.receiving_us.swap(0, Ordering::Relaxed))
    }

    /// Tells the neighbours, for as long as the result lives, that this rank waits.
    pub(super) fn note_waiting(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(&self.waiting)
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Ends the group with `error`, unless it has ended, and returns what ended it.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let verdict = Verdict::of(&error, self.rank);
        self.end(error, verdict)
    }

    /// Ends the group with what a neighbour told.
    pub(super) fn fail_as_told(&self, verdict: Verdict) {
        self.end(verdict.to_error(self.rank), verdict);
    }

    fn end(&self, error: CollectiveError, verdict: Verdict) -> CollectiveError {
        {
            let mut state = self.state();
            if let Some(first) = &state.failure {
                return first.clone();
            }
            if state.is_closing {
                return error;
            }
            state.failure = Some(error.clone());
        }
        self.changed.notify_all();
        self.finish(&Notice::Over(verdict));
        error
    }

    /// Ends the group in peace: the neighbours may need nothing more of this rank.
    pub(super) fn close(&self) {
        {
            let mut state = self.state();
            if state.failure.is_some() || state.is_closing {
                return;
            }
            state.is_closing = true;
        }
        self.finish(&Notice::Farewell);
    }

    fn finish(&self, notice: &Notice) {
        for side in Side::BOTH {
            self.tell(side, notice);
        }
        self.state().is_told = true;
        self.shut_data();
        self.wake_warden();
    }

    /// Sends a notice without waiting. False if the connection cannot take it; then whoever watches it
    /// finds out.
    pub(super) fn tell(&self, side: Side, notice: &Notice) -> bool {
        let bytes = notice.encode(self.generation);
        let _turn = self.control_turn.lock().unwrap_or_else(PoisonError::into_inner);
        match self.control(side).write(&bytes) {
            Ok(count) if count == bytes.len() => true,
            // A notice cut short would garble the next one, and a connection this full belongs to a
            // neighbour that has read nothing for hundreds of notices.
            Ok(_) => {
                self.shut(self.control(side), Shutdown::Both);
                false
            }
            Err(error) => error.kind() == ErrorKind::Interrupted,
        }
    }

    /// What a broken data socket means. Waits briefly for the control connection's word.
    pub(super) fn lost(
        &self,
        side: Side,
        operation: Operation,
        source: Option<io::Error>,
    ) -> CollectiveError {
        let peer = self.peer(side);
        let state = self.state();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, VERDICT_GRACE, |state| {
                state.failure.is_none() && !state.is_closing && !state.sides[side as usize].has_left
            })
            .unwrap_or_else(PoisonError::into_inner);
        let has_left = state.sides[side as usize].has_left;
        drop(state);
        let detail = match &source {
            _ if has_left => "it has left the group".into(),
            None => "it closed the connection".into(),
            Some(error) => format!("the connection broke ({error})"),
        };
        self.fail(CollectiveError::PeerLost {
            rank: peer,
            operation: operation.to_string(),
            detail,
            source: source.map(Arc::new),
        })
        .during(&operation.to_string())
    }

    /// What it means that no byte moved on `sides` (one or both) for the whole timeout.
    pub(super) fn overdue(&self, sides: &[Side], operation: Operation, waited: Duration) -> CollectiveError {
        let side = self.idle_side(sides);
        let detail = match side {
            Side::Previous => "no data came from it",
            Side::Next => "it takes no data",
        };
        self.time_out(side, &operation.to_string(), waited, detail)
    }

    /// The neighbour to blame for a wait that led to nothing: one that is not itself waiting. If all of
    /// `sides` are, somebody further on is at fault and its neighbours are about to say so; only if they do
    /// not is a neighbour blamed.
    pub(super) fn idle_side(&self, sides: &[Side]) -> Side {
        let idle = sides.iter().copied().find(|&side| !self.side(side).is_waiting);
        if idle.is_none() {
            self.await_verdict(VERDICT_GRACE.max(self.timeout() / 4));
        }
        idle.or_else(|| sides.first().copied()).unwrap_or(Side::Previous)
    }

    /// Gives the others time to end the group with what they know.
    pub(super) fn await_verdict(&self, grace: Duration) {
        let state = self.state();
        let outcome = self
            .changed
            .wait_timeout_while(state, grace, |state| state.failure.is_none() && !state.is_closing);
        drop(outcome.unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends the group because the neighbour on `side` was waited for in vain.
    pub(super) fn time_out(
        &self,
        side: Side,
        operation: &str,
        waited: Duration,
        detail: &str,
    ) -> CollectiveError {
        self.fail(CollectiveError::Timeout {
            rank: self.peer(side),
            waited,
            operation: operation.into(),
            detail: detail.into(),
        })
        .during(operation)
    }

    /// Breaks every connection without a word, as the kernel does for a killed process.
    #[cfg(test)]
    pub(super) fn vanish(&self) {
        {
            let mut state = self.state();
            state.is_closing = true;
            state.is_told = true;
        }
        self.shut_data();
        for side in Side::BOTH {
            self.shut(self.control(side), Shutdown::Both);
        }
        self.wake_warden();
    }

    fn shut_data(&self) {
        for socket in &self.data {
            self.shut(socket, Shutdown::Both);
        }
    }

    pub(super) fn shut(&self, socket: &Socket, how: Shutdown) {
        if let Err(error) = socket.shutdown(how) {
            // The other end was faster.
            tracing::trace!(rank = self.rank.0, %error, "socket was already shut");
        }
    }

    /// The warden is awake; whoever wakes it has changed before what it is to look at.
    pub(super) fn heed_wake(&self) {
        match rustix::io::read(&self.wake, &mut [0u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => tracing::debug!(rank = self.rank.0, %error, "the warden cannot hear who wakes it"),
        }
    }

    fn wake_warden(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            // Only possible when the counter is full, and then the warden is awake.
            tracing::trace!(rank = self.rank.0, %error, "warden was already woken");
        }
    }
}
