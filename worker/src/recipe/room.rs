//! [`Room`]: where the lanes of one worker share its processors and meet.
//!
//! Each lane has a thread. So many work at the same time as the worker has compute threads; a lane that
//! waits for the others gives up its place. The last lane to arrive at a meeting does the exchange for all.
//! The first failure ends every wait, present and future, until the room is opened again.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::phase::PhaseError;
use crate::torch::{SumReducer, TorchError};
use crate::trainer::Exchange;

/// Lanes of one worker during one phase.
#[derive(Debug)]
pub(super) struct Room {
    exchange: Arc<Exchange>,
    state: Mutex<State>,
    /// Wakes one lane for a place that was given up.
    place_free: Condvar,
    /// Wakes all lanes after a meeting.
    met: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Lanes that meet.
    lanes: usize,
    /// Lanes that may work at the same time, and those that do.
    places: usize,
    working: usize,
    /// Lanes that wait in the meeting of the moment, and how many meetings there were.
    arrived: usize,
    meetings: u64,
    /// What the lanes brought, lane after lane, and what the last meeting made of it.
    row: Vec<f64>,
    sums: Vec<f64>,
    has_failed: bool,
    error: Option<PhaseError>,
}

impl Room {
    pub(super) fn new(exchange: &Arc<Exchange>) -> Arc<Self> {
        let exchange = Arc::clone(exchange);
        Arc::new(Self { exchange, state: Mutex::default(), place_free: Condvar::new(), met: Condvar::new() })
    }

    /// Gets ready for a phase of `lanes` lanes, of which `places` work at the same time. Nobody is in.
    pub(super) fn open(&self, lanes: usize, places: usize) {
        *self.lock() = State { lanes, places: places.max(1), ..State::default() };
    }

    /// Waits for a place to work; false if the phase has failed.
    pub(super) fn enter(&self) -> bool {
        self.take_place(self.lock())
    }

    /// Gives the place up.
    pub(super) fn leave(&self) {
        self.lock().working -= 1;
        self.place_free.notify_one();
    }

    /// Ends the phase for all lanes. The first error stays; the later ones follow from it.
    pub(super) fn fail(&self, error: PhaseError) {
        let mut state = self.lock();
        state.has_failed = true;
        state.error.get_or_insert(error);
        self.met.notify_all();
        self.place_free.notify_all();
    }

    /// The error that ended the phase.
    pub(super) fn take_error(&self) -> Option<PhaseError> {
        self.lock().error.take()
    }

    /// Waits for all lanes of this worker and replaces `values` by the sum over the lanes of all workers.
    /// False if the phase has failed.
    fn meet(&self, lane: usize, values: &mut [f64]) -> bool {
        let mut state = self.lock();
        if state.has_failed {
            return false;
        }
        let lanes = state.lanes;
        if state.arrived == 0 {
            state.row.resize(lanes * values.len(), 0.0);
        }
        let place = lane * values.len()..(lane + 1) * values.len();
        if state.row.len() != lanes * values.len() || place.end > state.row.len() {
            drop(state);
            let message = format!("lane {lane} came with {} values, unlike the others", values.len());
            self.fail(TorchError { operation: "a meeting of lanes", message }.into());
            return false;
        }
        state.row[place].copy_from_slice(values);
        state.arrived += 1;
        if state.arrived == lanes { self.exchange(state, values) } else { self.wait(state, values) }
    }

    /// The last lane's part: everybody else waits, so it may keep the lock.
    fn exchange(&self, mut state: MutexGuard<'_, State>, values: &mut [f64]) -> bool {
        if let Err(error) = self.exchange.wait(|collective| collective.chain_reduce_f64(&state.row, values)) {
            drop(state);
            self.fail(error.into());
            return false;
        }
        state.sums.clear();
        state.sums.extend_from_slice(values);
        state.arrived = 0;
        state.meetings += 1;
        self.met.notify_all();
        true
    }

    /// The other lanes' part. There is no deadline: the lanes that are awaited compute, and end or fail.
    fn wait(&self, mut state: MutexGuard<'_, State>, values: &mut [f64]) -> bool {
        state.working -= 1;
        self.place_free.notify_one();
        let meeting = state.meetings;
        state = wait_while(&self.met, state, |state| state.meetings == meeting && !state.has_failed);
        if state.has_failed {
            return false;
        }
        // The next meeting needs this lane, so these are still the sums of this one.
        values.copy_from_slice(&state.sums);
        self.take_place(state)
    }

    fn take_place(&self, state: MutexGuard<'_, State>) -> bool {
        let is_full = |state: &State| state.working >= state.places && !state.has_failed;
        let mut state = wait_while(&self.place_free, state, is_full);
        state.working += 1;
        !state.has_failed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait_while<'a>(
    condvar: &Condvar,
    state: MutexGuard<'a, State>,
    condition: impl Fn(&State) -> bool,
) -> MutexGuard<'a, State> {
    condvar.wait_while(state, |state| condition(state)).unwrap_or_else(PoisonError::into_inner)
}

/// A lane's seat in the room, for its batch normalisations.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) room: Arc<Room>,
    pub(super) lane: usize,
}

impl SumReducer for Seat {
    fn sum(&self, values: &mut [f64]) -> bool {
        self.room.meet(self.lane, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `lane(number)` on a thread per lane, `places` at a time; what they return, in order.
    fn run<T: Send>(
        room: &Arc<Room>,
        lanes: usize,
        places: usize,
        lane: impl Fn(usize) -> T + Sync,
    ) -> Vec<T> {
        room.open(lanes, places);
        std::thread::scope(|scope| {
            let lane = &lane;
            let threads: Vec<_> = (0..lanes).map(|number| scope.spawn(move || lane(number))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn lanes_meet_in_their_order_however_few_work_at_once() {
        let room = Room::new(&Exchange::new());
        for places in [1, 2, 5] {
            let sums = run(&room, 5, places, |lane| {
                let seat = Seat { room: Arc::clone(&room), lane };
                assert!(room.enter());
                let mut values = [[1e16, 1.0, -1e16, 1.0, 3.0][lane], lane as f64];
                assert!(seat.sum(&mut values));
                let mut again = [values[0]];
                assert!(seat.sum(&mut again));
                room.leave();
                (values, again)
            });
            let first = (((1e16f64 + 1.0) + -1e16) + 1.0) + 3.0;
            assert!(sums.iter().all(|sum| *sum == ([first, 10.0], [5.0 * first])), "{sums:?}");
        }
    }

    #[test]
    fn failing_lane_releases_the_others_and_its_error_stays() {
        let room = Room::new(&Exchange::new());
        for places in [1, 4] {
            let went_well = run(&room, 4, places, |lane| {
                let seat = Seat { room: Arc::clone(&room), lane };
                if !room.enter() {
                    return false;
                }
                if lane == 2 {
                    room.fail(TorchError { operation: "test", message: "the cause".into() }.into());
                    return false;
                }
                let is_summed = seat.sum(&mut [0.0]);
                room.fail(TorchError { operation: "test", message: "a consequence".into() }.into());
                is_summed
            });
            assert_eq!(went_well, [false; 4]);
            assert!(room.take_error().unwrap().to_string().contains("the cause"));
        }
    }

    #[test]
    fn ended_exchange_ends_the_meeting() {
        let exchange = Exchange::new();
        let room = Room::new(&exchange);
        exchange.collective().abort_handle().abort("of the test");
        let went_well = run(&room, 3, 2, |lane| {
            let seat = Seat { room: Arc::clone(&room), lane };
            room.enter() && seat.sum(&mut [0.0])
        });
        assert_eq!(went_well, [false; 3]);
        assert!(matches!(room.take_error(), Some(PhaseError::Exchange(_))));
    }

    #[test]
    fn lanes_with_other_values_are_refused() {
        let room = Room::new(&Exchange::new());
        let went_well = run(&room, 2, 2, |lane| {
            let seat = Seat { room: Arc::clone(&room), lane };
            room.enter() && seat.sum(&mut vec![0.0; lane + 1])
        });
        assert_eq!(went_well, [false; 2]);
        assert!(matches!(room.take_error(), Some(PhaseError::Torch(_))));
    }
}
