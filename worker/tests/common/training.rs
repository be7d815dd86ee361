//! Data, networks and rings of the tests that train.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::{Arc, LazyLock};

use takuma_core::config::{Recipe, RunConfig};
use takuma_core::ids::{Generation, Rank};
use takuma_core::slots::{SlotRange, split_evenly};
use takuma_data::{Dataset, PoolLimits, ShardPool, SynthOptions, synth};
use takuma_store::Store;
use takuma_worker::checkpoint::Snapshot;
use takuma_worker::collective::{Collective, Ring, RingConfig, RingListener};
use takuma_worker::model::Arithmetic;
use takuma_worker::recipe::{Batch, Dcgan, DcganState, LaneForm, Phase, PhaseSums};
use takuma_worker::trainer::{Exchange, Feed};
use tch::Device;
use tokio::runtime::Runtime;

const SEED: u64 = 11;

/// dcgan-tiny in several buckets.
pub fn config() -> RunConfig {
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///none");
    config.seed = SEED;
    // Small buckets, so that there are several.
    config.bucket_bytes = 64 << 10;
    config
}

/// Where shards are loaded in the background.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// Drawn faces in a store of this process's memory.
pub fn faces() -> Dataset {
    let store = Store::memory();
    let options = SynthOptions { count: 640, ..SynthOptions::default() };
    RUNTIME.block_on(async {
        synth(options, &store, |_| {}).await.unwrap();
        Dataset::open(store).await.unwrap()
    })
}

/// The batches of `slots`.
pub fn feed(faces: &Dataset, slots: SlotRange) -> Feed {
    let map = config().slot_map(faces.manifest()).unwrap();
    let pool = ShardPool::new(faces.clone(), RUNTIME.handle().clone(), PoolLimits::default());
    Feed::new(map, slots, SEED, 64, Arc::new(pool))
}

/// Freshly drawn networks on the CPU.
pub fn net(config: &RunConfig, exchange: &Arc<Exchange>) -> Dcgan {
    net_on(config, exchange, Device::Cpu)
}

/// Freshly drawn networks on `device`, in the run's precision.
pub fn net_on(config: &RunConfig, exchange: &Arc<Exchange>, device: Device) -> Dcgan {
    net_in(config, exchange, device, LaneForm::of(device))
}

/// The same, with its lanes in a form that may not be the device's own.
pub fn net_in(config: &RunConfig, exchange: &Arc<Exchange>, device: Device, form: LaneForm) -> Dcgan {
    let arithmetic = Arithmetic::of(config.precision, device);
    Dcgan::with_lanes(config, DcganState::new(config.recipe, config.seed, arithmetic), exchange, form)
}

/// One step.
pub fn iterate(net: &mut Dcgan, batch: &Batch) -> [PhaseSums; 3] {
    Phase::ALL.map(|phase| net.phase(batch, phase, &mut []).unwrap())
}

/// What the lanes of `slots` come to, all in one graph, in three steps on `device`: losses and state.
pub fn trained_together(
    config: &RunConfig,
    exchange: &Arc<Exchange>,
    slots: SlotRange,
    device: Device,
) -> Vec<u8> {
    let mut net = net_in(config, exchange, device, LaneForm::Together);
    let mut feed = feed(&faces(), slots).on(device);
    let sums: Vec<_> = (0..3).map(|step| iterate(&mut net, &feed.batch(step).unwrap())).collect();
    [format!("{sums:?}").into_bytes(), bytes(&net).concat()].concat()
}

/// Everything that a run goes on from.
pub fn bytes(net: &Dcgan) -> [Vec<u8>; 3] {
    Snapshot::take(net, 0).unwrap().serialize().unwrap()
}

/// Runs `worker(rank, exchange)` on every rank of a group; what they return, by rank.
pub fn group<T: Send>(world: u32, worker: impl Fn(u32, &Arc<Exchange>) -> T + Sync) -> Vec<T> {
    group_over(world, |ring| Box::new(ring), worker)
}

/// [`group`] whose exchanges go through what `wrap` makes of each ring.
pub fn group_over<T: Send>(
    world: u32,
    wrap: impl Fn(Ring) -> Box<dyn Collective> + Sync,
    worker: impl Fn(u32, &Arc<Exchange>) -> T + Sync,
) -> Vec<T> {
    let listeners: Vec<RingListener> =
        (0..world).map(|_| RingListener::bind("127.0.0.1:0").unwrap()).collect();
    let members: Vec<String> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    let run = |rank: u32, listener: &RingListener| {
        let ring = RingConfig::new("test", Rank(rank), Generation(1), members.clone());
        let exchange = Exchange::new();
        exchange.enter(wrap(Ring::connect(listener, ring).unwrap()));
        worker(rank, &exchange)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            (0..).zip(&listeners).map(|(rank, listener)| scope.spawn(move || run(rank, listener))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The slots of a rank.
pub fn share(rank: u32, world: u32) -> SlotRange {
    split_evenly(config().global_batch, world)[rank as usize]
}
