//! Batches are the same whatever is resident and whoever owned the slots before; the ledger counts them.
#![allow(missing_docs, clippy::unwrap_used, reason = "what fails in a helper fails the test")]

#[path = "../../data/tests/common/faults.rs"]
mod faults;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use faults::{Doors, doors};
use takuma_core::slots::{SlotMap, SlotRange, split_evenly};
use takuma_data::{DataError, Dataset, PoolLimits, ShardPool, SynthOptions, synth};
use takuma_store::Store;
use takuma_worker::trainer::Feed;
use tch::Tensor;
use tokio::runtime::Runtime;

const SEED: u64 = 5;
const BATCH: u32 = 8;
/// Ten images in each of eight shards: ten steps an epoch.
const STEPS_PER_EPOCH: u64 = 10;
const ALL: SlotRange = SlotRange { first: 0, count: BATCH };

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

fn drawn() -> Store {
    let store = Store::memory();
    let options = SynthOptions { count: 80, shards: 8, ..SynthOptions::default() };
    RUNTIME.block_on(synth(options, &store, |_| {})).unwrap();
    store
}

fn map(dataset: &Dataset) -> SlotMap {
    let images: Vec<u64> = dataset.manifest().shards.iter().map(|shard| shard.images).collect();
    SlotMap::new(BATCH, SEED, &images).unwrap()
}

struct Bench {
    feed: Feed,
    pool: Arc<ShardPool>,
    map: SlotMap,
    doors: Arc<Doors>,
}

fn bench(store: &Store, slots: SlotRange) -> Bench {
    let (store, doors) = doors(store);
    let dataset = RUNTIME.block_on(Dataset::open(store)).unwrap();
    let map = map(&dataset);
    let limits = PoolLimits { fetch_timeout: Duration::from_secs(20), ..PoolLimits::default() };
    let pool = Arc::new(ShardPool::new(dataset, RUNTIME.handle().clone(), limits));
    let feed = Feed::new(map.clone(), slots, SEED, 64, Arc::clone(&pool));
    Bench { feed, pool, map, doors }
}

/// A feed whose shards are all here.
fn resident(store: &Store, slots: SlotRange) -> Bench {
    let bench = bench(store, slots);
    bench.doors.whole.open();
    let status = RUNTIME.block_on(bench.pool.loaded(Duration::from_secs(20))).unwrap();
    assert_eq!(status.resident, status.wanted);
    bench
}

/// A feed that reads every image alone.
fn ranged(store: &Store, slots: SlotRange) -> Bench {
    let bench = bench(store, slots);
    bench.doors.single.open();
    bench
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.size() == b.size() && a.equal(b)
}

#[test]
fn batches_are_the_same_bits_from_shards_and_from_single_reads() {
    let store = drawn();
    let (mut here, mut away) = (resident(&store, ALL), ranged(&store, ALL));
    for step in [0, 1, 2, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 3] {
        let (here, away) = (here.feed.batch(step).unwrap(), away.feed.batch(step).unwrap());
        assert_eq!(here.reals_nchw.size(), [8, 3, 64, 64]);
        assert!(same(&here.reals_nchw, &away.reals_nchw), "step {step}");
        assert!(same(&here.noise_nz, &away.noise_nz), "step {step}");
        assert_eq!(here.fed, away.fed);
    }
    assert_eq!(here.feed.raw_images(4, 5).unwrap(), away.feed.raw_images(4, 5).unwrap());
    assert_eq!(here.doors.single.calls(), 0);
    assert_eq!(away.pool.status().resident, 0);
}

#[test]
fn pixels_lie_between_minus_one_and_one_as_the_raw_images_say() {
    let store = drawn();
    let mut here = resident(&store, ALL);
    let raw = here.feed.raw_images(2, BATCH).unwrap();
    assert_eq!(raw.len(), 8 * 64 * 64 * 3);
    let expected: Vec<f32> = raw.iter().map(|&pixel| f32::from(pixel) / 127.5 - 1.0).collect();
    let expected = Tensor::from_slice(&expected).view([8, 64, 64, 3]).permute([0, 3, 1, 2]);
    assert!(same(&here.feed.batch(2).unwrap().reals_nchw, &expected));
}

#[test]
fn slots_change_hands_in_the_middle_of_an_epoch() {
    let store = drawn();
    let mut whole = resident(&store, ALL);
    let mut survivor = ranged(&store, SlotRange { first: 0, count: 3 });
    let mut check = |survivor: &mut Bench, step: u64, slots: SlotRange| {
        let (whole, part) = (whole.feed.batch(step).unwrap(), survivor.feed.batch(step).unwrap());
        let (first, count) = (i64::from(slots.first), i64::from(slots.count));
        assert!(same(&part.reals_nchw, &whole.reals_nchw.narrow(0, first, count)), "step {step}");
        assert!(same(&part.noise_nz, &whole.noise_nz.narrow(0, first, count)), "step {step}");
    };
    check(&mut survivor, 3, SlotRange { first: 0, count: 3 });
    // Step 4 is on its way for the old slots; now it is wanted for others, and step 3 once more.
    let slots = SlotRange { first: 2, count: 6 };
    survivor.feed.set_slots(slots);
    assert_eq!(survivor.feed.first_slot(), 2);
    assert_eq!(survivor.pool.status().wanted, 6);
    for step in [3, 4, 5] {
        check(&mut survivor, step, slots);
    }
    survivor.doors.whole.open();
    RUNTIME.block_on(survivor.pool.loaded(Duration::from_secs(20))).unwrap();
    check(&mut survivor, 6, slots);
}

#[test]
fn next_batch_is_fetched_while_the_trainer_computes() {
    let mut away = bench(&drawn(), ALL);
    away.doors.single.pass(2 * BATCH as usize);
    away.feed.batch(0).unwrap();
    // No read is allowed any more: these images are on their way already.
    away.feed.batch(1).unwrap();
}

#[test]
fn ledgers_of_all_workers_make_the_expected_sum() {
    let store = drawn();
    let mut workers: Vec<Bench> =
        split_evenly(BATCH, 3).into_iter().map(|slots| resident(&store, slots)).collect();
    for step in [0, 7, STEPS_PER_EPOCH] {
        let sum: u64 = workers.iter_mut().map(|worker| worker.feed.batch(step).unwrap().fed).sum();
        assert_eq!(sum, workers[0].map.expected_fed(step), "step {step}");
    }
}

#[test]
fn a_batch_that_cannot_be_had_is_an_error_and_can_be_asked_for_again() {
    let store = drawn();
    let file = "shard-00003.safetensors";
    let content = RUNTIME.block_on(store.get(file)).unwrap();
    RUNTIME.block_on(store.delete(file)).unwrap();
    let mut away = ranged(&store, ALL);
    let Err(error) = away.feed.batch(0) else { panic!("shard 3 is missing") };
    assert!(matches!(error, DataError::Damaged { .. }), "{error}");
    RUNTIME.block_on(store.put(file, content)).unwrap();
    assert_eq!(away.feed.batch(0).unwrap().fed, away.map.expected_fed(0));
}
