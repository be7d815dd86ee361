//! [`Lanes`]: a worker's batch computed as a whole, or lane by lane in exact mode.
//!
//! Lane by lane has two forms with the same bits. Apart, each lane is a graph on a thread of its own, and the threads
//! meet where statistics are summed; so a processor's cores are used. Together, all lanes are one graph on one thread.
//! A GPU needs that: libtorch runs all backward passes of a device in one thread, where a pass that waited for the
//! others would wait for ever.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use takuma_core::config::RunConfig;
use tch::Device;

use super::dcgan::{Batch, DcganState};
use super::lane::{LaneGraph, Results, Setting, Shares};
use super::phase::{Phase, PhaseError};
use super::room::{Room, Seat};
use super::update::Updater;
use crate::collective::CollectiveError;
use crate::model::NormUpdates;
use crate::torch::{self, SumReducer, TorchError};
use crate::trainer::Exchange;

/// How the lanes of a worker are computed in exact mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneForm {
    /// Each in a graph on a thread of its own.
    Apart,
    /// All in one graph on one thread.
    Together,
}

impl LaneForm {
    /// What `device` needs.
    #[must_use]
    pub fn of(device: Device) -> Self {
        if device.is_cuda() { Self::Together } else { Self::Apart }
    }
}

/// The lanes of one worker.
pub(super) struct Lanes {
    exchange: Arc<Exchange>,
    setting: Setting,
    /// Slots of one lane in exact mode.
    slots_per_lane: Option<i64>,
    form: LaneForm,
    room: Arc<Room>,
    /// One lane each, or all lanes in one.
    graphs: Vec<LaneGraph>,
}

impl Lanes {
    pub(super) fn new(config: &RunConfig, exchange: &Arc<Exchange>, form: LaneForm) -> Self {
        let (global_batch, batch_norm) = (i64::from(config.global_batch), config.batch_norm);
        Self {
            exchange: Arc::clone(exchange),
            setting: Setting { global_batch, batch_norm, group: exchange.groups() },
            slots_per_lane: config.exact.then(|| i64::from(config.slots_per_lane())),
            form,
            room: Room::new(exchange),
            graphs: Vec::new(),
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
        let (graphs, lanes_of_each) = match self.form {
            LaneForm::Together => (1, count),
            LaneForm::Apart => (count, 1),
        };
        // Lanes that another worker has now are dropped, here and in the graphs.
        self.graphs.resize_with(graphs, LaneGraph::default);
        for number in 0..graphs {
            let reducer = self.reducer(number);
            let graph = &mut self.graphs[number];
            graph.truncate(lanes_of_each);
            while graph.states().len() < lanes_of_each {
                let lane = number + graph.states().len();
                let alias = state.alias();
                updaters[0].hook(lane, &alias.generator)?;
                updaters[1].hook(lane, &alias.discriminator)?;
                graph.push(alias);
            }
            graph.reduce_by(reducer);
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
        match (self.slots_per_lane, self.form) {
            (None, _) => Ok(vec![self.run_whole(phase, batch)?.read()]),
            (Some(per_lane), LaneForm::Apart) => self.run_apart(phase, batch, per_lane),
            (Some(per_lane), LaneForm::Together) => self.run_together(phase, batch, per_lane),
        }
    }

    /// Forward and backward of `phase` of a worker that is one lane, without waiting for the numbers.
    ///
    /// # Errors
    /// libtorch's or the exchange's; the passes are then unusable.
    pub(super) fn run_whole(&mut self, phase: Phase, batch: &Batch) -> Result<Results, PhaseError> {
        // What ended an earlier phase says nothing of this one.
        drop(self.exchange.take_error());
        let graph = self.graphs.first_mut().expect("lanes are prepared before they run");
        let results = graph.run(phase, std::slice::from_ref(batch), &self.setting);
        Ok(results.map_err(|error| cause(&self.exchange, error))?.swap_remove(0))
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
        self.graphs.first().expect("lanes ran before their statistics are asked for").norms()
    }

    /// The first lane's networks, where the gradients are if none were exchanged.
    pub(super) fn first(&self) -> &DcganState {
        self.states().next().expect("lanes are prepared before they are asked for")
    }

    /// The networks of all lanes.
    pub(super) fn states(&self) -> impl Iterator<Item = &DcganState> {
        self.graphs.iter().flat_map(LaneGraph::states)
    }

    /// Forgets the passes of G.
    pub(super) fn forget(&mut self) {
        self.graphs.iter_mut().for_each(LaneGraph::forget);
    }

    /// Who sums the batch statistics of graph `number`.
    fn reducer(&self, number: usize) -> Option<Arc<dyn SumReducer>> {
        match (self.slots_per_lane, self.form) {
            (None, _) => {
                (!self.exchange.is_alone()).then(|| Arc::clone(&self.exchange) as Arc<dyn SumReducer>)
            }
            (Some(_), LaneForm::Apart) => Some(Arc::new(Seat { room: Arc::clone(&self.room), lane: number })),
            (Some(_), LaneForm::Together) => Some(Arc::new(Chain { exchange: Arc::clone(&self.exchange) })),
        }
    }

    /// All lanes in one graph, with the bits of [`Lanes::run_apart`].
    fn run_together(
        &mut self,
        phase: Phase,
        batch: &Batch,
        per_lane: i64,
    ) -> Result<Vec<Shares>, PhaseError> {
        let graph = self.graphs.first_mut().expect("lanes are prepared before they run");
        let lanes = 0..graph.states().len() as i64;
        let batches: Vec<Batch> = lanes.map(|lane| part(batch, lane * per_lane, per_lane)).collect();
        let (setting, is_on_gpu) = (self.setting, batch.noise_nz.device().is_cuda());
        let mut run = move || Ok(graph.run(phase, &batches, &setting)?.iter().map(Results::read).collect());
        // A GPU's stream is this thread's; a processor's order of sums is that of one thread.
        let shares = if is_on_gpu { run() } else { on_one_thread(run) };
        shares.map_err(|error| cause(&self.exchange, error))
    }

    /// Each lane on a thread of its own, as many at a time as this thread has compute threads.
    fn run_apart(&mut self, phase: Phase, batch: &Batch, per_lane: i64) -> Result<Vec<Shares>, PhaseError> {
        self.room.open(self.graphs.len(), torch::compute_threads());
        let (room, exchange, setting) = (&*self.room, &*self.exchange, self.setting);
        let shares = std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, graph) in self.graphs.iter_mut().enumerate() {
                let batch = [part(batch, number as i64 * per_lane, per_lane)];
                let body = move || {
                    torch::compute_on_this_thread_alone();
                    in_room(room, exchange, || Ok(graph.run(phase, &batch, &setting)?[0].read()))
                };
                match std::thread::Builder::new().name(format!("lane-{number}")).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => room.fail(not_started(&error).into()),
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

/// Computes `lanes` on a thread of their own, which has one compute thread, whatever the calling one has.
fn on_one_thread<T: Send>(lanes: impl FnOnce() -> Result<T, TorchError> + Send) -> Result<T, TorchError> {
    let body = || {
        torch::compute_on_this_thread_alone();
        lanes()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("lanes".to_owned()).spawn_scoped(scope, body);
        let thread = thread.map_err(|error| not_started(&error))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn not_started(error: &std::io::Error) -> TorchError {
    TorchError { operation: "starting a lane's thread", message: error.to_string() }
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

/// Sums the rows of a graph that has all lanes of its worker.
struct Chain {
    exchange: Arc<Exchange>,
}

impl SumReducer for Chain {
    fn sum(&self, values: &mut [f64]) -> bool {
        let row = values.to_vec();
        self.sum_lanes(&row, values)
    }

    fn sum_lanes(&self, rows: &[f64], sums: &mut [f64]) -> bool {
        let summed = self.exchange.wait(|collective| collective.chain_reduce_f64(rows, sums));
        summed.map_err(|error| self.exchange.fail(error)).is_ok()
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
