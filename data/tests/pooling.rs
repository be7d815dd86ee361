//! Images are the same whether their shard is here or not; what goes wrong on the way is waited out or told.
#![allow(missing_docs, clippy::unwrap_used, reason = "helpers of tests")]

#[path = "common/faults.rs"]
mod faults;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use faults::{Doors, doors};
use takuma_core::slots::ImageRef;
use takuma_data::{DataError, Dataset, PoolLimits, PoolStatus, ShardPool, SynthOptions, synth};
use takuma_store::{Store, StoreError};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;

/// For what must come and takes milliseconds.
const SOON: Duration = Duration::from_secs(20);
/// For what must not come.
const BRIEFLY: Duration = Duration::from_millis(60);
const SHARDS: u32 = 4;
const FILE: &str = "shard-00001.safetensors";

/// A drawn dataset of four shards with ten images each.
async fn drawn() -> Store {
    let store = Store::memory();
    let options = SynthOptions { count: 40, shards: SHARDS, ..SynthOptions::default() };
    synth(options, &store, |_| {}).await.unwrap();
    store
}

/// Patient with the store, and quick to ask again.
fn limits() -> PoolLimits {
    let first_pause = Duration::from_millis(1);
    PoolLimits { fetch_timeout: SOON, first_pause, ..PoolLimits::default() }
}

async fn pool_with(store: &Store, limits: PoolLimits) -> (ShardPool, Arc<Doors>) {
    let (store, doors) = doors(store);
    let dataset = Dataset::open(store).await.unwrap();
    (ShardPool::new(dataset, Handle::current(), limits), doors)
}

async fn pool(store: &Store) -> (ShardPool, Arc<Doors>) {
    pool_with(store, limits()).await
}

/// Two images of each shard.
fn places(shards: impl IntoIterator<Item = u32>) -> Vec<ImageRef> {
    shards.into_iter().flat_map(|shard| [7, 2].map(|index| ImageRef { shard, index })).collect()
}

async fn images(pool: &ShardPool, places: Vec<ImageRef>) -> Result<Vec<Bytes>, DataError> {
    let fetch = pool.fetch(places, |images| images);
    tokio::task::spawn_blocking(move || fetch.wait()).await.unwrap()
}

async fn until(count: &watch::Sender<u32>, number: u32) {
    let mut count = count.subscribe();
    timeout(SOON, count.wait_for(|count| *count == number)).await.unwrap().unwrap();
}

fn status(resident: usize, wanted: usize) -> PoolStatus {
    PoolStatus { resident, wanted }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_the_same_bytes_before_and_after_their_shard_is_here() {
    let store = drawn().await;
    let (pool, doors) = pool(&store).await;
    pool.want(0..SHARDS);
    doors.single.open();
    let alone = images(&pool, places(0..SHARDS)).await.unwrap();
    assert_eq!((pool.status(), doors.single.calls()), (status(0, 4), 8));

    doors.whole.open();
    assert_eq!(pool.loaded(SOON).await.unwrap(), status(4, 4));
    assert_eq!(images(&pool, places(0..SHARDS)).await.unwrap(), alone);
    assert_eq!(doors.single.calls(), 8, "resident shards need no other read");

    let dataset = Dataset::open(store).await.unwrap();
    for (place, image) in places(0..SHARDS).into_iter().zip(&alone) {
        assert_eq!(dataset.load_shard(place.shard).await.unwrap().image(place.index), image);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_comes_first_spares_the_single_reads() {
    let (pool, doors) = pool(&drawn().await).await;
    pool.want(0..SHARDS);
    let fetch = pool.fetch(places(0..SHARDS), |images| images.len());
    until(&doors.single.waiting, 8).await;
    doors.whole.open();
    assert_eq!(tokio::task::spawn_blocking(move || fetch.wait()).await.unwrap().unwrap(), 8);
    until(&doors.single.waiting, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn loading_shows_how_far_it_is() {
    let (pool, doors) = pool(&drawn().await).await;
    pool.want(0..3);
    assert_eq!(pool.loaded(Duration::ZERO).await.unwrap().to_string(), "0 of 3 shards resident");
    doors.whole.pass(2);
    let two = async {
        while pool.status().resident < 2 {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, two).await.unwrap();
    assert_eq!(pool.status().to_string(), "2 of 3 shards resident");
    assert_eq!(pool.loaded(BRIEFLY).await.unwrap(), status(2, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_are_not_wanted_any_more_leave_memory() {
    let (pool, doors) = pool(&drawn().await).await;
    doors.whole.open();
    doors.single.open();
    pool.want(0..SHARDS);
    pool.loaded(SOON).await.unwrap();
    until(&doors.alive, 4).await;
    pool.want([3]);
    until(&doors.alive, 1).await;
    assert_eq!(pool.status(), status(1, 1));
    let calls = doors.whole.calls();
    images(&pool, places([3])).await.unwrap();
    assert_eq!((doors.whole.calls(), doors.single.calls()), (calls, 0), "what was kept is not read again");
    let error = images(&pool, places([2])).await.unwrap_err();
    assert!(matches!(error, DataError::Unwanted { shard: 2, .. }), "{error}");
    pool.want([2, 3]);
    assert_eq!(pool.loaded(SOON).await.unwrap(), status(2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn work_ends_with_the_pool() {
    let (pool, doors) = pool(&drawn().await).await;
    pool.want(0..SHARDS);
    let fetch = pool.fetch(places([0]), |images| images);
    let dropped = pool.fetch(places([1, 2]), |images| images);
    until(&doors.single.waiting, 6).await;
    until(&doors.whole.waiting, 4).await;
    drop(dropped);
    until(&doors.single.waiting, 2).await;
    drop(pool);
    until(&doors.whole.waiting, 0).await;
    until(&doors.single.waiting, 0).await;
    let error = tokio::task::spawn_blocking(move || fetch.wait()).await.unwrap().unwrap_err();
    assert!(matches!(error, DataError::Cancelled), "{error}");
}

#[test]
fn a_runtime_that_ends_ends_the_waiting() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (pool, doors) = runtime.block_on(async { pool(&drawn().await).await });
    pool.want(0..SHARDS);
    let fetch = pool.fetch(places([0]), |images| images);
    runtime.block_on(until(&doors.single.waiting, 2));
    runtime.shutdown_background();
    assert!(matches!(fetch.wait(), Err(DataError::Cancelled)));
    assert!(matches!(pool.fetch(places([0]), |images| images).wait(), Err(DataError::Cancelled)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_for_a_while_is_asked_again() {
    let (pool, doors) = pool(&drawn().await).await;
    doors.whole.fail(5);
    doors.single.fail(5);
    doors.single.open();
    pool.want(0..SHARDS);
    assert_eq!(images(&pool, places(0..SHARDS)).await.unwrap().len(), 8);
    assert_eq!(doors.single.calls(), 13);
    doors.whole.open();
    assert_eq!(pool.loaded(SOON).await.unwrap(), status(4, 4));
    assert_eq!(doors.whole.calls(), 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_is_told_with_shard_and_url_when_the_time_is_over() {
    let limits = PoolLimits { fetch_timeout: BRIEFLY, ..limits() };
    let (pool, doors) = pool_with(&drawn().await, limits.clone()).await;
    pool.want(0..SHARDS);
    // A background fetch has all the time until somebody waits for it.
    let fetch = pool.fetch(places([1]), |images| images);
    let others = images(&pool, places([2])).await.unwrap_err();
    let DataError::Unavailable { url, shard: 2, waited: BRIEFLY, source } = &others else {
        panic!("{others}");
    };
    assert_eq!(url, "memory://");
    assert!(matches!(source, StoreError::NoAnswer { .. }), "{source}");
    assert!(others.to_string().contains("shard-00002.safetensors: no answer within 60ms"), "{others}");
    doors.single.open();
    let waited = tokio::task::spawn_blocking(move || fetch.wait()).await.unwrap();
    assert_eq!(waited.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_is_given_up_for_another() {
    let read_timeout = Duration::from_millis(20);
    let (pool, doors) = pool_with(&drawn().await, PoolLimits { read_timeout, ..limits() }).await;
    pool.want(0..SHARDS);
    let fetch = pool.fetch(places([1]), |images| images);
    let asked_again = async {
        while doors.single.calls() < 6 {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, asked_again).await.unwrap();
    doors.single.open();
    assert_eq!(tokio::task::spawn_blocking(move || fetch.wait()).await.unwrap().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_for_good_is_told_with_its_own_words() {
    let (pool, doors) = pool_with(&drawn().await, PoolLimits { fetch_timeout: BRIEFLY, ..limits() }).await;
    doors.whole.fail(u32::MAX);
    doors.single.fail(u32::MAX);
    pool.want(0..SHARDS);
    let message = images(&pool, places([1])).await.unwrap_err().to_string();
    for part in ["shard 1 of memory://", "60ms", "planted fault", "mend the store, then resume"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(pool.loaded(BRIEFLY).await.unwrap(), status(0, 4));
}

/// Writes over the stored shard 1.
async fn change(store: &Store, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = store.get(FILE).await.unwrap().to_vec();
    change(&mut bytes);
    store.put(FILE, bytes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_shard_is_told_at_the_next_access_of_any() {
    let store = drawn().await;
    // In the last image, which nobody reads here.
    change(&store, |bytes| *bytes.last_mut().unwrap() ^= 1).await;
    let (pool, doors) = pool(&store).await;
    pool.want(0..SHARDS);
    doors.single.open();
    images(&pool, places([1])).await.unwrap();
    let ready = pool.fetch(places([0]), |images| images);
    until(&doors.single.waiting, 0).await;

    doors.whole.open();
    let error = pool.loaded(SOON).await.unwrap_err();
    assert!(matches!(&error, DataError::Damaged { faults, .. } if faults.len() == 1), "{error}");
    assert!(error.to_string().contains(&format!("{FILE} has SHA-256")), "{error}");
    for error in [
        tokio::task::spawn_blocking(move || ready.wait()).await.unwrap().unwrap_err(),
        images(&pool, places([0])).await.unwrap_err(),
    ] {
        assert!(matches!(error, DataError::Damaged { .. }), "{error}");
    }
    // Whoever gives it away is rid of it.
    pool.want([0, 2, 3]);
    assert_eq!(pool.loaded(SOON).await.unwrap(), status(3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_came_with_other_bytes_is_found_when_its_shard_is_here() {
    let (pool, doors) = pool(&drawn().await).await;
    pool.want([1, 2]);
    doors.single.open();
    images(&pool, places([2])).await.unwrap();
    doors.spoil_singles.store(true, Ordering::SeqCst);
    images(&pool, places([1])).await.unwrap();
    doors.whole.open();
    let message = pool.loaded(SOON).await.unwrap_err().to_string();
    assert!(message.contains("image 2 of shard 1 was read alone with other bytes"), "{message}");
    assert!(!message.contains("shard 2"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_cut_shard_is_damage_in_words() {
    let store = drawn().await;
    let (pool, doors) = pool(&store).await;
    doors.single.open();
    // Ends inside of image 2.
    change(&store, |bytes| bytes.truncate(bytes.len() - 8 * 12_288 + 1)).await;
    pool.want([1]);
    let cut = images(&pool, vec![ImageRef { shard: 1, index: 2 }]).await.unwrap_err().to_string();
    assert!(cut.contains(&format!("{FILE} ends inside of image 2")), "{cut}");

    store.delete(FILE).await.unwrap();
    let missing = images(&pool, places([1])).await.unwrap_err();
    assert!(matches!(missing, DataError::Damaged { .. }), "{missing}");
    assert!(missing.to_string().contains(&format!("{FILE} is missing")), "{missing}");
    doors.whole.open();
    let missing = pool.loaded(SOON).await.unwrap_err().to_string();
    assert!(missing.contains(&format!("{FILE} is missing")), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_outside_of_the_dataset_is_told_in_words() {
    let store = drawn().await;
    let dataset = Dataset::open(store.clone()).await.unwrap();
    let (pool, _doors) = pool(&store).await;
    pool.want(0..SHARDS);
    for (place, words) in [
        (ImageRef { shard: 4, index: 0 }, "memory:// has 4 shards and no shard 4"),
        (ImageRef { shard: 3, index: 10 }, "shard 3 of memory:// has 10 images and no image 10"),
    ] {
        assert_eq!(dataset.read_image(place).await.unwrap_err().to_string(), words);
        assert_eq!(images(&pool, vec![place]).await.unwrap_err().to_string(), words);
    }
    assert_eq!(images(&pool, Vec::new()).await.unwrap(), Vec::<Bytes>::new());
}
