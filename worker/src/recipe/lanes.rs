//! [`Lanes`]: a worker's batch computed as a whole, or lane by lane in exact mode.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use takuma_core::config::RunConfig;

use super::dcgan::{Batch, DcganState};
use super::lane::{Lane, Results, Setting, Shares};
use super::phase::{Phase, PhaseError};
use super::room::{Room, Seat};
use super::update::Updater;
use crate::collective::CollectiveError;
use crate::model::NormUpdates;
use crate::torch::{self, SumReducer, TorchError};
use crate::trainer::Exchange;

/// The lanes of one worker.
pub(super) struct Lanes {
    exchange: Arc<Exchange>,
    setting: Setting,
    /// Slots of one lane in exact mode.
    slots_per_lane: Option<i64>,
    room: Arc<Room>,
    lanes: Vec<Lane>,
}

impl Lanes {
    pub(super) fn new(config: &RunConfig, exchange: &Arc<Exchange>) -> Self {
        let (global_batch, batch_norm) = (i64::from(config.global_batch), config.batch_norm);
        Self {
            exchange: Arc::clone(exchange),
            setting: Setting { global_batch, batch_norm, group: exchange.groups() },
            slots_per_lane: config.exact.then(|| i64::from(config.slots_per_lane())),
            room: Room::new(exchange),
            lanes: Vec::new(),
        }
    }

    /// Cuts a share of the batch into its lanes, with networks over the weights of `state`, whose
    /// gradients go to `updaters`. Returns how many there are.
    ///
    /// # Errors
    /// libtorch's.
    ///
    /// # Panics
    /// If in exact mode the share is not made of whole lanes.
    pub(super) fn prepare(
        &mut self,
        batch: &Batch,
        state: &DcganState,
        updaters: [&Updater; 2],
    ) -> Result<usize, TorchError> {
        self.setting.group = self.exchange.groups();
        let slots = batch.noise_nz.size()[0];
        let count = self.slots_per_lane.map_or(1, |per_lane| {
            assert!(slots > 0 && slots % per_lane == 0, "{slots} slots are no lanes of {per_lane}");
            (slots / per_lane) as usize
        });
        while self.lanes.len() < count {
            let lane = Lane::new(state);
            updaters[0].hook(self.lanes.len(), &lane.state().generator)?;
            updaters[1].hook(self.lanes.len(), &lane.state().discriminator)?;
            self.lanes.push(lane);
        }
        // Lanes that another worker has now.
        self.lanes.truncate(count);
        for number in 0..count {
            let reducer = self.reducer(number);
            self.lanes[number].reduce_by(reducer);
        }
        Ok(count)
    }

    /// Forward and backward of `phase` in all lanes.
    ///
    /// # Errors
    /// The first failure of a lane or of its exchange; the passes are then unusable.
    pub(super) fn run(&mut self, phase: Phase, batch: &Batch) -> Result<Vec<Shares>, PhaseError> {
        // What ended an earlier phase says nothing of this one.
        drop(self.exchange.take_error());
        match self.slots_per_lane {
            None => {
                let lane = self.lanes.first_mut().expect("lanes are prepared before they run");
                let results = lane.run(phase, batch, &self.setting);
                Ok(vec![results.map_err(|error| cause(&self.exchange, error))?.read()])
            }
            Some(per_lane) => self.run_apart(phase, batch, per_lane),
        }
    }

    /// Forward and backward of `phase` of a worker that is one lane, without waiting for the numbers.
    ///
    /// # Errors
    /// libtorch's or the exchange's; the passes are then unusable.
    pub(super) fn run_whole(&mut self, phase: Phase, batch: &Batch) -> Result<Results, PhaseError> {
        // What ended an earlier phase says nothing of this one.
        drop(self.exchange.take_error());
        let lane = self.lanes.first_mut().expect("lanes are prepared before they run");
        lane.run(phase, batch, &self.setting).map_err(|error| cause(&self.exchange, error))
    }

    /// `shares` of all lanes summed over all workers, then `votes` of all workers.
    ///
    /// # Errors
    /// The exchange's.
    pub(super) fn sum(&self, shares: &[Shares], votes: &[f64]) -> Result<Vec<f64>, CollectiveError> {
        let mut rows: Vec<f64> = Vec::with_capacity(shares.len() * (2 + votes.len()));
        for (number, share) in shares.iter().enumerate() {
            rows.extend([share.loss, share.right]);
            // A worker votes once.
            rows.extend(votes.iter().map(|&vote| if number == 0 { vote } else { 0.0 }));
        }
        if self.slots_per_lane.is_none() {
            self.exchange.wait(|collective| collective.all_reduce_f64(&mut rows))?;
            return Ok(rows);
        }
        let mut sums = vec![0.0; 2 + votes.len()];
        self.exchange.wait(|collective| collective.chain_reduce_f64(&rows, &mut sums))?;
        Ok(sums)
    }

    /// Statistics of the phase that ran, of generator and discriminator: over the global batch, so that
    /// all lanes have the same. With local statistics there is one lane.
    pub(super) fn norms(&self) -> (&NormUpdates, &NormUpdates) {
        self.lanes.first().expect("lanes ran before their statistics are asked for").norms()
    }

    /// The first lane's networks, where the gradients are if none were exchanged.
    pub(super) fn first(&self) -> &DcganState {
        self.lanes.first().expect("lanes are prepared before they are asked for").state()
    }

    /// The networks of all lanes.
    pub(super) fn states(&self) -> impl Iterator<Item = &DcganState> {
        self.lanes.iter().map(Lane::state)
    }

    /// Forgets the passes of G.
    pub(super) fn forget(&mut self) {
        self.lanes.iter_mut().for_each(Lane::forget);
    }

    /// Who sums the batch statistics of lane `number`.
    fn reducer(&self, number: usize) -> Option<Arc<dyn SumReducer>> {
        if self.slots_per_lane.is_some() {
            return Some(Arc::new(Seat { room: Arc::clone(&self.room), lane: number }));
        }
        (!self.exchange.is_alone()).then(|| Arc::clone(&self.exchange) as Arc<dyn SumReducer>)
    }

    /// Each lane on a thread of its own, as many at a time as this thread has compute threads.
    fn run_apart(&mut self, phase: Phase, batch: &Batch, per_lane: i64) -> Result<Vec<Shares>, PhaseError> {
        self.room.open(self.lanes.len(), torch::compute_threads());
        let (room, exchange, setting) = (&*self.room, &*self.exchange, self.setting);
        let shares = std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, lane) in self.lanes.iter_mut().enumerate() {
                let batch = part(batch, number as i64 * per_lane, per_lane);
                let body = move || {
                    torch::compute_on_this_thread_alone();
                    in_room(room, exchange, || Ok(lane.run(phase, &batch, &setting)?.read()))
                };
                match std::thread::Builder::new().name(format!("lane-{number}")).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        let (operation, message) = ("starting a lane's thread", error.to_string());
                        room.fail(TorchError { operation, message }.into());
                    }
                }
            }
            let join = |thread: std::thread::ScopedJoinHandle<'_, Option<Shares>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Option<Vec<Shares>>>()
        });
        match (self.room.take_error(), shares) {
            (None, Some(shares)) => Ok(shares),
            (Some(error), _) => Err(error),
            (None, None) => unreachable!("a lane without shares has failed the phase"),
        }
    }
}

/// Runs a lane while it has a place in the room. Whatever ends it early releases the other lanes.
fn in_room(
    room: &Room,
    exchange: &Exchange,
    lane: impl FnOnce() -> Result<Shares, TorchError>,
) -> Option<Shares> {
    if !room.enter() {
        return None;
    }
    match std::panic::catch_unwind(AssertUnwindSafe(lane)) {
        Ok(Ok(shares)) => {
            room.leave();
            Some(shares)
        }
        Ok(Err(error)) => {
            room.fail(cause(exchange, error));
            None
        }
        Err(panic) => {
            room.fail(TorchError { operation: "a lane", message: "it panicked".to_owned() }.into());
            std::panic::resume_unwind(panic);
        }
    }
}

/// What made libtorch give up: the exchange inside it, if that failed.
fn cause(exchange: &Exchange, error: TorchError) -> PhaseError {
    exchange.take_error().map_or(PhaseError::Torch(error), PhaseError::Exchange)
}

/// `count` slots of a batch from `first` on.
fn part(batch: &Batch, first: i64, count: i64) -> Batch {
    Batch {
        reals_nchw: batch.reals_nchw.narrow(0, first, count),
        // A copy begins at a whole cache line, as at every worker; MKL's sums may depend on that.
        noise_nz: batch.noise_nz.narrow(0, first, count).copy(),
        // The ledger is the whole batch's affair.
        fed: 0,
    }
}
