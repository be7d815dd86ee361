//! What every [`Collective`] must do, whatever carries it. Faults of the network are in `ring/faults.rs`.

mod chain;

use std::time::{Duration, Instant};

use proptest::prelude::*;
use takuma_core::ids::{Generation, Rank};

use super::{Collective, CollectiveError, Loopback, Ring, RingConfig, RingListener};

/// Members of one group, by rank.
type Members = Vec<Box<dyn Collective>>;

/// Forms groups of a given size.
type Factory = fn(usize) -> Members;

const GENERATION: Generation = Generation(3);

fn loopback(world: usize) -> Members {
    assert_eq!(world, 1);
    vec![Box::new(Loopback::new(GENERATION))]
}

fn ring(world: usize) -> Members {
    rings(world, 2)
}

/// The ring as it is between machines.
fn ring_over_tcp(world: usize) -> Members {
    boxed(form(world, |config| config.use_local_sockets = false))
}

fn rings(world: usize, channels: usize) -> Members {
    boxed(form(world, |config| config.channels = channels))
}

/// A ring with a communicator beside it.
fn nccl(world: usize) -> Members {
    boxed(super::nccl::fake::form(world, |_| {}))
}

fn boxed<C: Collective + 'static>(members: Vec<C>) -> Members {
    members.into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect()
}

/// A ring of `world` ranks on this machine, its settings adjusted by `adjust`.
pub(super) fn form(world: usize, adjust: impl Fn(&mut RingConfig) + Sync) -> Vec<Ring> {
    let listeners: Vec<_> = (0..world).map(|_| RingListener::bind("127.0.0.1:0").unwrap()).collect();
    let listeners: Vec<_> = listeners.iter().collect();
    connect(&listeners, GENERATION, adjust)
}

/// A ring over `listeners`, by rank.
pub(super) fn connect(
    listeners: &[&RingListener],
    generation: Generation,
    adjust: impl Fn(&mut RingConfig) + Sync,
) -> Vec<Ring> {
    let members: Vec<String> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    let ranks: Vec<_> = (0..).map(Rank).zip(listeners).collect();
    together(ranks, |(rank, listener)| {
        let mut config = RingConfig::new("contract", rank, generation, members.clone());
        config.timeout = Duration::from_secs(20);
        config.silence = Duration::from_secs(10);
        adjust(&mut config);
        Ring::connect(listener, config).unwrap()
    })
}

/// What `work` returns for each of `items`, all at the same time.
pub(super) fn together<I: Send, T: Send>(items: Vec<I>, work: impl Fn(I) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The same on every rank of a fresh group of each size.
fn on_all<T: Send>(
    factory: Factory,
    worlds: &[usize],
    work: impl Fn(&dyn Collective) -> T + Sync,
    check: impl Fn(Vec<T>),
) {
    for &world in worlds {
        let members = factory(world);
        check(together(members.iter().collect(), |member| work(&**member)));
    }
}

/// Numbers of very different size, other ones for each seed, so that another order shows in the bits.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let magnitude = 10f32.powi((state >> 60) as i32 - 8);
            ((state >> 32) as u32 as f32 / u32::MAX as f32 - 0.5) * magnitude
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// `sums` are one sum, the same on all ranks, and near the exact one of `numbers(seed_of(rank), len)`.
fn assert_sums(sums: &[Vec<f32>], seed_of: impl Fn(u64) -> u64) {
    let len = sums[0].len();
    let parts: Vec<_> = (0..sums.len() as u64).map(|rank| numbers(seed_of(rank), len)).collect();
    for sum in sums {
        assert_eq!(bits(sum), bits(&sums[0]), "ranks differ");
    }
    for (place, &sum) in sums[0].iter().enumerate() {
        let exact: f64 = parts.iter().map(|part| f64::from(part[place])).sum();
        let scale: f64 = parts.iter().map(|part| f64::from(part[place]).abs()).sum();
        assert!((f64::from(sum) - exact).abs() <= scale * 1e-6, "{sum} at {place}, exactly {exact}");
    }
}

fn short_sums_are_right_and_equal(factory: Factory, worlds: &[usize]) {
    for len in [0, 1, 7, 1024, 200_000] {
        let sum = |member: &dyn Collective| {
            let mut values = numbers(u64::from(member.rank().0), len);
            member.all_reduce(&mut values).unwrap();
            values
        };
        on_all(factory, worlds, sum, |sums| assert_sums(&sums, |rank| rank));
    }
}

fn double_sums_are_taken_in_rank_order(factory: Factory, worlds: &[usize]) {
    let part = |rank: u32| [1e16, 1.0, -1e16, 0.25][rank as usize % 4];
    let sum = |member: &dyn Collective| {
        let mut values = [part(member.rank().0), 2.0];
        member.all_reduce_f64(&mut values).unwrap();
        values
    };
    on_all(factory, worlds, sum, |sums| {
        let expected = (1..sums.len() as u32).map(part).fold(part(0), |sum, next| sum + next);
        for values in &sums {
            assert_eq!(values.map(f64::to_bits), [expected, 2.0 * sums.len() as f64].map(f64::to_bits));
        }
    });
}

fn buckets_of_any_length_are_summed(factory: Factory, worlds: &[usize]) {
    let lens = [0, 1, 2, 3, 5, 8, 1000, 32_768, 65_537, 300_001];
    let sum = |member: &dyn Collective| {
        let rank = u64::from(member.rank().0);
        let pending: Vec<_> = lens
            .iter()
            .map(|&len| member.start_all_reduce(numbers(rank + len as u64, len)).unwrap())
            .collect();
        pending.into_iter().map(|pending| pending.wait().unwrap()).collect::<Vec<_>>()
    };
    on_all(factory, worlds, sum, |ranks| {
        for (place, &len) in lens.iter().enumerate() {
            let sums: Vec<_> = ranks.iter().map(|buckets| buckets[place].clone()).collect();
            assert_eq!(sums[0].len(), len);
            assert_sums(&sums, |rank| rank + len as u64);
        }
    });
}

fn sums_repeat_to_the_bit(factory: Factory, worlds: &[usize]) {
    for &world in worlds {
        let run = || {
            let members = factory(world);
            together(members.iter().collect(), |member| {
                let bucket = numbers(u64::from(member.rank().0), 10_007);
                bits(&member.start_all_reduce(bucket).unwrap().wait().unwrap())
            })
        };
        assert_eq!(run(), run());
    }
}

fn buckets_and_short_sums_overlap(factory: Factory, worlds: &[usize]) {
    let work = |member: &dyn Collective| {
        let rank = member.rank().0 as f32;
        let mut pending = Vec::new();
        for turn in 0..60 {
            pending.push(member.start_all_reduce(vec![rank + turn as f32; 500 + turn * 97]).unwrap());
            let mut short = [rank, turn as f32];
            member.all_reduce(&mut short).unwrap();
            let world = member.world() as f32;
            assert_eq!(short, [world * (world - 1.0) / 2.0, turn as f32 * world]);
        }
        for (turn, pending) in pending.into_iter().enumerate() {
            let world = member.world() as f32;
            let expected = world * (world - 1.0) / 2.0 + turn as f32 * world;
            let sum = pending.wait().unwrap();
            assert_eq!(sum.len(), 500 + turn * 97);
            assert!(sum.iter().all(|&value| value == expected));
        }
    };
    on_all(factory, worlds, work, |_| {});
}

fn broadcast_comes_from_each_root(factory: Factory, worlds: &[usize]) {
    let work = |member: &dyn Collective| {
        for root in 0..member.world() {
            for len in [0, 3, 400_000] {
                let sent: Vec<u8> = (0..len).map(|i| (i * 7 + root as usize) as u8).collect();
                let mut bytes = if member.rank() == Rank(root) { sent.clone() } else { vec![1; 11] };
                member.broadcast(Rank(root), &mut bytes).unwrap();
                assert_eq!(bytes, sent);
            }
        }
        let nobody = member.broadcast(Rank(member.world()), &mut Vec::new());
        assert!(matches!(nobody, Err(CollectiveError::Local { .. })));
    };
    on_all(factory, worlds, work, |_| {});
}

fn gather_keeps_uneven_lengths(factory: Factory, worlds: &[usize]) {
    let part = |rank: u32| vec![rank as u8; [5, 0, 300_000, 1][rank as usize % 4]];
    let gather = |member: &dyn Collective| member.all_gather(&part(member.rank().0)).unwrap();
    on_all(factory, worlds, gather, |ranks| {
        let expected: Vec<_> = (0..ranks.len() as u32).map(part).collect();
        assert!(ranks.iter().all(|parts| *parts == expected));
    });
}

fn barrier_holds_until_all_have_come(factory: Factory, worlds: &[usize]) {
    for &world in worlds {
        let members = factory(world);
        let arrived = std::sync::atomic::AtomicUsize::new(0);
        together(members.iter().collect(), |member| {
            for turn in 1..=20 {
                arrived.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                member.barrier().unwrap();
                assert!(arrived.load(std::sync::atomic::Ordering::SeqCst) >= turn * world);
            }
        });
    }
}

fn abort_ends_waits_now_and_later(factory: Factory, worlds: &[usize]) {
    for &world in worlds {
        let members = factory(world);
        let member = &members[0];
        let handle = member.abort_handle();
        // The others never join in, so with more than one rank this waits.
        let pending = member.start_all_reduce(vec![1.0; 100_000]).unwrap();
        let (at, woken_at) = std::thread::scope(|scope| {
            let waiter = scope.spawn(move || {
                let outcome = pending.wait();
                (outcome, Instant::now())
            });
            let at = Instant::now();
            handle.abort("the operator said so");
            let (outcome, woken_at) = waiter.join().unwrap();
            match outcome {
                Ok(_) => assert_eq!(world, 1),
                Err(error) => assert_is_abort(&error),
            }
            (at, woken_at)
        });
        assert!(woken_at.saturating_duration_since(at) < Duration::from_millis(100));
        assert_is_abort(&member.barrier().unwrap_err());
        assert_is_abort(&member.all_reduce(&mut [1.0]).unwrap_err());
        assert_is_abort(&member.all_reduce_f64(&mut [1.0]).unwrap_err());
        assert_is_abort(&member.broadcast(Rank(0), &mut vec![1]).unwrap_err());
        assert_is_abort(&member.all_gather(&[1]).unwrap_err());
        assert_is_abort(&member.start_all_reduce(vec![1.0]).unwrap_err());
        // The rest of the group learns why.
        for other in &members[1..] {
            assert_is_abort(&other.barrier().unwrap_err());
        }
    }
}

fn assert_is_abort(error: &CollectiveError) {
    assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
    assert!(error.to_string().contains("the operator said so"), "{error}");
    assert_eq!(error.suspect_rank(), None);
}

fn members_know_their_place(factory: Factory, worlds: &[usize]) {
    for &world in worlds {
        for (rank, member) in factory(world).iter().enumerate() {
            assert_eq!(member.rank(), Rank(rank as u32));
            assert_eq!(member.world(), world as u32);
            assert_eq!(member.generation(), GENERATION);
        }
    }
}

macro_rules! contract {
    ($implementation:ident, $worlds:expr; $($behaviour:ident)*) => {
        mod $implementation {
            $(#[test]
            fn $behaviour() {
                super::$behaviour(super::$implementation, &$worlds);
            })*
        }
    };
    ($implementation:ident, $worlds:expr) => {
        contract! { $implementation, $worlds;
            short_sums_are_right_and_equal
            double_sums_are_taken_in_rank_order
            buckets_of_any_length_are_summed
            sums_repeat_to_the_bit
            buckets_and_short_sums_overlap
            broadcast_comes_from_each_root
            gather_keeps_uneven_lengths
            barrier_holds_until_all_have_come
            abort_ends_waits_now_and_later
            members_know_their_place
        }
    };
}
contract!(loopback, [1]);
contract!(ring, [1, 2, 3, 4, 5, 8]);
contract!(ring_over_tcp, [2, 3, 4, 8]);
contract!(nccl, [1, 2, 3, 8]);

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_world_channels_and_lengths_sum_right(
        world in 1usize..=6,
        channels in 1usize..=4,
        lens in prop::collection::vec(0usize..70_000, 1..6),
    ) {
        let members = rings(world, channels);
        let ranks = together(members.iter().collect(), |member| {
            let rank = u64::from(member.rank().0);
            let pending: Vec<_> =
                lens.iter().map(|&len| member.start_all_reduce(numbers(rank, len)).unwrap()).collect();
            pending.into_iter().map(|pending| pending.wait().unwrap()).collect::<Vec<_>>()
        });
        for (place, &len) in lens.iter().enumerate() {
            let sums: Vec<_> = ranks.iter().map(|buckets| buckets[place].clone()).collect();
            prop_assert_eq!(sums[0].len(), len);
            assert_sums(&sums, |rank| rank);
        }
    }
}
