//! Whole steps over sums on devices: those of a libnccl over host memory, with processors that compute.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use takuma_core::config::{Recipe, RunConfig};
use tch::Device;

use super::*;
use crate::checkpoint::Snapshot;
use crate::collective::nccl::fake::form_on_hosts;
use crate::collective::{Collective, CollectiveError, DeviceCollective, Nccl};
use crate::model::Arithmetic;
use crate::recipe::DcganState;
use crate::trainer::Exchange;

/// Images of a worker in a step.
const SLOTS: i64 = 3;

fn config(world: usize, on_nan: OnNan) -> RunConfig {
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///none");
    config.global_batch = SLOTS as u32 * world as u32;
    // Several buckets.
    config.bucket_bytes = 64 << 10;
    config.on_nan = on_nan;
    config
}

/// A worker of the group of `member`.
struct Worker {
    net: Dcgan,
    rank: u32,
    /// The same group as the exchange's.
    member: Arc<Nccl>,
}

/// Gives the exchange a group that the test keeps, too.
#[derive(Debug)]
struct Shared(Arc<Nccl>);

macro_rules! passed_on {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> $result { Collective::$name(&*self.0, $($argument),*) })*
    };
}

impl Collective for Shared {
    passed_on! {
        rank() -> takuma_core::ids::Rank;
        world() -> u32;
        generation() -> takuma_core::ids::Generation;
        all_reduce(values: &mut [f32]) -> Result<(), CollectiveError>;
        all_reduce_f64(values: &mut [f64]) -> Result<(), CollectiveError>;
        start_all_reduce(bucket: Vec<f32>) -> Result<crate::collective::PendingReduce, CollectiveError>;
        start_chain_reduce(lanes: Vec<Vec<f32>>) -> Result<crate::collective::PendingReduce, CollectiveError>;
        chain_reduce_f64(lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError>;
        broadcast(root: takuma_core::ids::Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError>;
        all_gather(bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;
        barrier() -> Result<(), CollectiveError>;
        set_timeout(timeout: Duration) -> ();
        on_device() -> Option<&dyn DeviceCollective>;
        abort_handle() -> crate::collective::AbortHandle;
    }
}

impl Worker {
    fn new(member: &Arc<Nccl>, config: &RunConfig) -> Self {
        let exchange = Exchange::new();
        exchange.enter(Box::new(Shared(Arc::clone(member))));
        let state = DcganState::new(config.recipe, 7, Arithmetic::of(config.precision, Device::Cpu));
        let net = Dcgan::new(config, state, &exchange);
        Self { net, rank: member.rank().0, member: Arc::clone(member) }
    }

    fn batch(&self, step: u64) -> Batch {
        let at = |len: i64, shift: f64| {
            let shift = shift + step as f64 * 31.0 + f64::from(self.rank) * 7.0;
            (Tensor::arange(len, (Kind::Float, Device::Cpu)) * 0.37 + shift).sin()
        };
        Batch {
            reals_nchw: at(SLOTS * 64 * 64 * 3, 1.0).view([SLOTS, 64, 64, 3]).permute([0, 3, 1, 2]),
            noise_nz: at(SLOTS * 100, 2.0).view([SLOTS, 100]),
            fed: 10 + u64::from(self.rank),
        }
    }

    fn input(&self, step: u64) -> StepInput {
        let Batch { reals_nchw, noise_nz, fed } = self.batch(step);
        let votes = Votes { step, stop: f64::from(self.rank), ready_for: 5.0, fed: fed as f64 };
        StepInput { images: Images::Ready(reals_nchw), noise_nz, votes }
    }

    fn step(&mut self, step: u64) -> Settled {
        let ticket = self.net.enqueue(self.input(step)).unwrap();
        self.net.settle(ticket).unwrap().expect("a processor is never stuck")
    }

    /// Everything that a run goes on from.
    fn bytes(&self) -> [Vec<u8>; 3] {
        Snapshot::take(&self.net, 0).unwrap().serialize().unwrap()
    }
}

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` on every rank of a fresh group; what it returns, by rank.
fn on_all<T: Send>(world: usize, on_nan: OnNan, work: impl Fn(Worker) -> T + Sync) -> Vec<T> {
    on_all_within(PATIENCE, world, on_nan, work)
}

/// [`on_all`] in a group that waits for its members no longer than `timeout`.
fn on_all_within<T: Send>(
    timeout: Duration,
    world: usize,
    on_nan: OnNan,
    work: impl Fn(Worker) -> T + Sync,
) -> Vec<T> {
    let members: Vec<_> = form_on_hosts(world, timeout).into_iter().map(Arc::new).collect();
    let config = config(world, on_nan);
    std::thread::scope(|scope| {
        let (work, config) = (&work, &config);
        let spawn = |member| scope.spawn(move || work(Worker::new(&member, config)));
        let threads: Vec<_> = members.into_iter().map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The state before each phase of step `step`, and behind the last one, in phases that are waited for.
fn by_phase(world: usize, step: u64) -> Vec<[Vec<u8>; 3]> {
    let mut states = on_all(world, OnNan::Stop, |mut worker| {
        let mut states = Vec::new();
        for earlier in 0..=step {
            let batch = worker.batch(earlier);
            for phase in Phase::ALL {
                if earlier == step {
                    states.push(worker.bytes());
                }
                worker.net.phase(&batch, phase, &mut [0.0; 3]).unwrap();
            }
        }
        states.push(worker.bytes());
        states
    });
    states.swap_remove(0)
}

fn applied(settled: &Settled) -> usize {
    settled.outcomes.iter().take_while(|outcome| matches!(outcome, Outcome::Applied(_))).count()
}

#[test]
fn steps_over_sums_on_devices_have_the_bits_of_phases_that_are_waited_for() {
    for world in [2, 3] {
        let whole = on_all(world, OnNan::Stop, |mut worker| {
            let settled: Vec<_> = (0..3).map(|step| worker.step(step)).collect();
            (worker.bytes(), settled)
        });
        let expected = by_phase(world, 2).pop().unwrap();
        for (bytes, settled) in &whole {
            assert!(*bytes == expected, "{world} workers");
            for (step, (settled, first)) in settled.iter().zip(&whole[0].1).enumerate() {
                assert!(settled.failed.is_none() && applied(settled) == 3, "{settled:?}");
                assert_eq!(settled.outcomes, first.outcomes, "all ranks report the same numbers");
                let ranks = world as f64;
                let others = ranks * (ranks - 1.0) / 2.0;
                let votes = Votes {
                    step: step as u64,
                    stop: others,
                    ready_for: 5.0 * ranks,
                    fed: 10.0 * ranks + others,
                };
                assert_eq!(settled.votes, votes);
            }
        }
    }
}

/// How rank 1 ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// It says so.
    Aborted,
    /// It says nothing, and its links break. Its own GPU then waits for the timeout.
    Killed,
    /// It says nothing, and its links stand: the timeout ends the group.
    Hangs,
}

/// What both ranks of a group have after the second step when rank 1 hangs in its sum number `sum` of it, and
/// ends so: what became of the step, and the state.
fn ended_at(sum: u64, end: End) -> Vec<(Settled, [Vec<u8>; 3])> {
    let timeout = if end == End::Aborted { PATIENCE } else { Duration::from_secs(3) };
    on_all_within(timeout, 2, OnNan::Skip, |mut worker| {
        assert_eq!(applied(&worker.step(0)), 3);
        // Both are through with it before one of them ends.
        worker.member.barrier().unwrap();
        let before = worker.member.begun();
        let (done, is_over) = sync_channel::<()>(0);
        if worker.rank == 1 {
            worker.member.hang_at(before + sum);
        }
        let member = Arc::clone(&worker.member);
        std::thread::scope(|scope| {
            let is_struck = worker.rank == 1 && end != End::Hangs;
            scope.spawn(move || {
                let deadline = Instant::now() + PATIENCE;
                while is_struck && member.begun() < before + sum {
                    assert!(Instant::now() < deadline, "it comes to its sum");
                    std::thread::yield_now();
                }
                match end {
                    End::Aborted if is_struck => member.abort_handle().abort("the test said so"),
                    End::Killed if is_struck => member.vanish(),
                    _ => {}
                }
                assert!(is_over.recv().is_err());
            });
            let settled = worker.step(1);
            drop(done);
            (settled, worker.bytes())
        })
    })
}

#[test]
fn group_that_ends_in_any_sum_leaves_the_state_between_two_phases() {
    let states = by_phase(2, 1);
    let sums = on_all(2, OnNan::Stop, |mut worker| {
        worker.step(0);
        let before = worker.member.begun();
        worker.step(1);
        worker.member.begun() - before
    })[0];
    assert!(sums > 34 + 3 + 3, "statistics, numbers, stamps and buckets: {sums}");
    let mut seen = [false; 3];
    // Each kind of sum of each phase, the last one of all among them.
    let aborted = (1..=sums).filter(|sum| sum % 4 == 1 || sums - sum < 3).map(|sum| (sum, End::Aborted));
    let others = [(sums / 2, End::Killed), (sums, End::Killed), (sums / 3, End::Hangs)];
    for (sum, end) in aborted.chain(others) {
        for (rank, (settled, bytes)) in ended_at(sum, end).into_iter().enumerate() {
            let applied = applied(&settled);
            assert!(bytes == states[applied], "sum {sum}, {end:?}, rank {rank}: {settled:?}");
            let rest = &settled.outcomes[applied..];
            assert!(rest.iter().all(|outcome| *outcome == Outcome::Ended), "sum {sum}: {settled:?}");
            assert!(applied < 3, "no phase was whole without rank 1");
            // A last sum that was under way is believed by nobody, and nothing was left to enqueue.
            if let Some(failed) = &settled.failed {
                assert!(matches!(failed, PhaseError::Exchange(_)), "sum {sum}: {failed}");
            }
            seen[applied] = true;
        }
    }
    assert_eq!(seen, [true; 3], "the group ended in each phase");
}

#[test]
fn sums_that_end_before_a_rank_hears_of_it_are_not_believed() {
    let states = by_phase(2, 1);
    let whole = on_all(2, OnNan::Skip, |mut worker| {
        worker.step(0);
        worker.member.barrier().unwrap();
        // As if the other's communicator had been told to end, and its ring had not said so yet.
        worker.member.rush();
        let settled = worker.step(1);
        assert!(settled.failed.is_none(), "nobody knows of anything: {settled:?}");
        assert_eq!(settled.outcomes, [Outcome::Ended, Outcome::Ended, Outcome::Ended]);
        // And nothing behind it either, though the run skips what is not finite.
        assert_eq!(worker.step(2).outcomes, [Outcome::Ended, Outcome::Ended, Outcome::Ended]);
        worker.bytes()
    });
    assert!(whole.iter().all(|bytes| *bytes == states[0]));
}

#[test]
fn rank_whose_group_has_ended_vouches_for_nothing() {
    let states = by_phase(2, 1);
    let whole = on_all(2, OnNan::Skip, |mut worker| {
        worker.step(0);
        worker.member.barrier().unwrap();
        if worker.rank == 0 {
            // Its communicator is about to be ended, and may be in the middle of any sum.
            worker.member.tell_device();
        }
        let settled = worker.step(1);
        assert!(settled.failed.is_none(), "{settled:?}");
        assert_eq!(settled.outcomes, [Outcome::Ended, Outcome::Ended, Outcome::Ended]);
        worker.bytes()
    });
    assert!(whole.iter().all(|bytes| *bytes == states[0]));
}

#[test]
fn image_that_is_no_number_is_left_out_alike_on_all_ranks() {
    for on_nan in [OnNan::Stop, OnNan::Skip] {
        let outcomes = on_all(2, on_nan, |mut worker| {
            let mut input = worker.input(0);
            if worker.rank == 1 {
                input.images = Images::Ready(worker.batch(0).reals_nchw * f64::NAN);
            }
            let ticket = worker.net.enqueue(input).unwrap();
            let settled = worker.net.settle(ticket).unwrap().expect("a processor is never stuck");
            assert_eq!(settled.votes.fed, 21.0, "votes are counted all the same");
            settled.outcomes
        });
        assert_eq!(outcomes[0], outcomes[1]);
        assert!(matches!(&outcomes[0][0], Outcome::NotFinite(what) if what.contains("conv1.weight")));
        assert_eq!(matches!(outcomes[0][1], Outcome::Frozen), on_nan == OnNan::Stop);
    }
}
