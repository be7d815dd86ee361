//! Exact mode: one SHA-256 whatever workers and threads there are, and whoever is killed when.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use takuma_core::config::RunConfig;
use takuma_core::ids::{Generation, Rank};
use takuma_core::slots::SlotRange;
use takuma_worker::checkpoint::restore_into;
use takuma_worker::collective::{
    AbortHandle, Collective, CollectiveError, PendingReduce, Ring, RingConfig, RingListener,
};
use takuma_worker::recipe::{Batch, Dcgan, LaneForm, Phase, PhaseError, PhaseSums};
use takuma_worker::trainer::Exchange;
use tch::Device;

use crate::support::{self, bytes, faces, feed, iterate};

/// Steps of each run, and its phases.
const STEPS: u64 = 3;
pub const PHASES: usize = 3 * STEPS as usize;

pub fn config() -> RunConfig {
    let mut config = support::config();
    config.exact = true;
    config
}

/// The whole batches of the run.
pub fn batches() -> Vec<Batch> {
    let mut feed = feed(&faces(), SlotRange { first: 0, count: config().global_batch });
    (0..STEPS).map(|step| feed.batch(step).unwrap()).collect()
}

/// A worker with `threads` compute threads, which has applied so many phases.
pub struct Member {
    pub net: Dcgan,
    pub exchange: Arc<Exchange>,
    threads: i32,
    pub applied: usize,
    pub sums: Vec<PhaseSums>,
}

impl Member {
    fn new(threads: i32) -> Self {
        Self::in_form(threads, LaneForm::Apart)
    }

    pub fn in_form(threads: i32, form: LaneForm) -> Self {
        let exchange = Exchange::new();
        let net = support::net_in(&config(), &exchange, Device::Cpu, form);
        Self { net, exchange, threads, applied: 0, sums: Vec::new() }
    }

    /// Runs on from where it is until `until` phases are applied.
    pub fn run(&mut self, share: &[Batch], until: usize, kill: Option<&Kill>) -> Result<(), PhaseError> {
        tch::set_num_threads(self.threads);
        self.net.regroup();
        while self.applied < until {
            if let Some(kill) = kill.filter(|kill| kill.phase == self.applied) {
                kill.is_armed.store(true, Ordering::Relaxed);
            }
            let phase = Phase::from_index((self.applied % 3) as u32).unwrap();
            self.sums.push(self.net.phase(&share[self.applied / 3], phase, &mut [])?);
            self.applied += 1;
        }
        Ok(())
    }
}

/// When a worker dies: at the `operations`-th exchange of the run's phase number `phase`.
pub struct Kill {
    pub rank: usize,
    phase: usize,
    operations: AtomicI64,
    pub(super) is_armed: AtomicBool,
}

impl Kill {
    pub fn new(rank: usize, phase: usize, operation: i64) -> Arc<Self> {
        let (operations, is_armed) = (AtomicI64::new(operation), AtomicBool::new(false));
        Arc::new(Self { rank, phase, operations, is_armed })
    }

    pub fn has_struck(&self) -> bool {
        self.operations.load(Ordering::Relaxed) < 0
    }
}

/// A ring that is dropped in the middle of a phase, as a killed process drops it.
#[derive(Debug)]
pub(super) struct Mortal {
    ring: Mutex<Option<Arc<Ring>>>,
    rank: Rank,
    world: u32,
    kill: Arc<Kill>,
}

impl std::fmt::Debug for Kill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kill at phase {}", self.phase)
    }
}

impl Mortal {
    pub(super) fn new(ring: Ring, kill: Arc<Kill>) -> Self {
        let (rank, world) = (ring.rank(), ring.world());
        Self { ring: Mutex::new(Some(Arc::new(ring))), rank, world, kill }
    }

    fn ring(&self) -> Result<Arc<Ring>, CollectiveError> {
        let mut ring = self.ring.lock().unwrap();
        if self.kill.is_armed.load(Ordering::Relaxed)
            && self.kill.operations.fetch_sub(1, Ordering::Relaxed) <= 0
        {
            *ring = None;
        }
        ring.clone().ok_or_else(|| CollectiveError::Aborted {
            operation: "this test".to_owned(),
            reason: "the worker is dead".to_owned(),
        })
    }
}

impl Collective for Mortal {
    fn rank(&self) -> Rank {
        self.rank
    }
    fn world(&self) -> u32 {
        self.world
    }
    fn generation(&self) -> Generation {
        Generation(0)
    }
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring()?.all_reduce(values)
    }
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        self.ring()?.all_reduce_f64(values)
    }
    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        self.ring()?.start_all_reduce(bucket)
    }
    fn start_chain_reduce(&self, lanes: Vec<Vec<f32>>) -> Result<PendingReduce, CollectiveError> {
        self.ring()?.start_chain_reduce(lanes)
    }
    fn chain_reduce_f64(&self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError> {
        self.ring()?.chain_reduce_f64(lanes, out)
    }
    fn broadcast(&self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.ring()?.broadcast(root, bytes)
    }
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.ring()?.all_gather(bytes)
    }
    fn barrier(&self) -> Result<(), CollectiveError> {
        self.ring()?.barrier()
    }
    fn set_timeout(&self, timeout: Duration) {
        self.ring().unwrap().set_timeout(timeout);
    }
    fn abort_handle(&self) -> AbortHandle {
        self.ring().unwrap().abort_handle()
    }
}

/// Lets `members` run as one group until `until` phases are applied or `kill` strikes. Whoever has the
/// furthest state gives it to the others first, as the product does.
pub fn run(
    members: &mut [Member],
    batches: &[Batch],
    generation: u64,
    until: usize,
    kill: Option<&Arc<Kill>>,
) {
    let furthest = members.iter().max_by_key(|member| member.applied).unwrap();
    let (applied, sums) = (furthest.applied, furthest.sums.clone());
    let state = bytes(&furthest.net);
    for member in members.iter_mut().filter(|member| member.applied < applied) {
        restore_into(&mut member.net, &state).unwrap();
        member.applied = applied;
        member.sums.clone_from(&sums);
    }
    let world = members.len() as u32;
    let shares = config().shares(world);
    let listeners: Vec<RingListener> =
        members.iter().map(|_| RingListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    let results = std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (rank, (member, listener)) in members.iter_mut().zip(&listeners).enumerate() {
            let ranked = Rank(rank as u32);
            let mut ring = RingConfig::new("test", ranked, Generation(generation), addresses.clone());
            ring.lanes_by_rank = shares.iter().map(|share| config().lanes_of(share.count)).collect();
            let kill = kill.filter(|kill| kill.rank == rank);
            let mine: Vec<Batch> = batches.iter().map(|batch| part(batch, shares[rank])).collect();
            workers.push(scope.spawn(move || {
                let ring = Ring::connect(listener, ring).unwrap();
                member.exchange.enter(match kill {
                    Some(kill) => Box::new(Mortal::new(ring, Arc::clone(kill))),
                    None => Box::new(ring),
                });
                member.run(&mine, until, kill.map(|kill| &**kill))
            }));
        }
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    for result in results {
        match (result, kill) {
            (Ok(()), _) | (Err(PhaseError::Exchange(_)), Some(_)) => {}
            (Err(error), _) => panic!("{error}"),
        }
    }
}

/// A share of a batch.
fn part(batch: &Batch, share: SlotRange) -> Batch {
    let (first, count) = (i64::from(share.first), i64::from(share.count));
    Batch {
        reals_nchw: batch.reals_nchw.narrow(0, first, count),
        noise_nz: batch.noise_nz.narrow(0, first, count),
        fed: 0,
    }
}

/// What one worker makes of the run.
pub fn alone(batches: &[Batch]) -> (Vec<PhaseSums>, [Vec<u8>; 3]) {
    let mut one = [Member::new(1)];
    run(&mut one, batches, 1, PHASES, None);
    (one[0].sums.clone(), bytes(&one[0].net))
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    for (world, threads) in [(1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2), (8, 1), (8, 2)] {
        let mut members: Vec<Member> = (0..world).map(|_| Member::new(threads)).collect();
        run(&mut members, &batches, 1, PHASES, None);
        for (rank, member) in members.iter().enumerate() {
            assert_eq!(member.sums, sums, "losses of rank {rank} of {world}, {threads} threads");
            assert!(bytes(&member.net) == state, "state of rank {rank} of {world}, {threads} threads");
        }
    }
}

#[test]
fn worker_killed_in_any_phase_leaves_no_trace_in_the_bits() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    // In the second step: before anything was exchanged, in the forward pass, in the backward pass with
    // gradients under way. The killed one is each rank in turn.
    for phase in 3..6 {
        for (place, operation) in [0, 4, 9].into_iter().enumerate() {
            let kill = Kill::new((phase + place) % 3, phase, operation);
            let mut members: Vec<Member> = (0..3).map(|_| Member::new(1)).collect();
            run(&mut members, &batches, 1, PHASES, Some(&kill));
            assert!(kill.has_struck(), "phase {phase} has no operation {operation}");
            let dead = members.remove(kill.rank);
            assert_eq!(dead.applied, phase, "the phase did not go through");
            run(&mut members, &batches, 2, PHASES, None);
            for member in &members {
                assert_eq!(member.sums, sums, "killed in phase {phase} at operation {operation}");
                assert!(bytes(&member.net) == state, "killed in phase {phase} at operation {operation}");
            }
        }
    }
}

#[test]
fn group_that_grows_and_shrinks_between_phases_gives_the_same_bits() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    let mut members = vec![Member::new(1), Member::new(2)];
    for (generation, until) in (1..).zip(1..=PHASES) {
        // Newcomers begin at any phase, with a state from a peer.
        members.truncate([2, 1, 4, 3, 8, 2, 5, 1, 3][until - 1]);
        members.resize_with([2, 1, 4, 3, 8, 2, 5, 1, 3][until - 1], || Member::new(2));
        run(&mut members, &batches, generation, until, None);
    }
    for member in &members {
        assert_eq!(member.sums, sums);
        assert!(bytes(&member.net) == state);
    }
}

#[test]
fn exact_mode_trains_the_model_of_default_mode() {
    let batches = batches();
    let exact = alone(&batches).0;
    let mut default = support::net(&support::config(), &Exchange::new());
    for (exact, default) in exact.iter().zip(iterate(&mut default, &batches[0])) {
        let off = (exact.loss - default.loss).abs() / default.loss.abs();
        assert!(off < 1e-5, "{exact:?}, not {default:?}");
        assert_eq!(exact.right, default.right);
    }
}

#[test]
fn failing_exchange_releases_all_lanes_and_applies_nothing() {
    let batches = batches();
    let (_, state) = alone(&batches);
    let mut one = Member::new(2);
    let before = bytes(&one.net);
    one.exchange.collective().abort_handle().abort("of the test");
    let error = one.run(&batches, PHASES, None).unwrap_err();
    assert!(matches!(error, PhaseError::Exchange(CollectiveError::Aborted { .. })), "{error}");
    assert!(bytes(&one.net) == before);
    let mut members = [one];
    run(&mut members, &batches, 2, PHASES, None);
    assert!(bytes(&members[0].net) == state);
}
