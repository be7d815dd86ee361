//! One simulation: hosts, a network, weather, and what must hold at the end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::executor::block_on;
use takuma_coordinator::{Coordinator, Drawing, Options};
use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::config::RunConfig;
use takuma_core::layout;
use takuma_core::record::{RunRecord, RunStatus};
use takuma_proto::v1::control_client::ControlClient;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::process::Process;
use crate::ring::{Rings, Shared};
use crate::support::write_dataset;
use crate::weather::{HEALED_MS, PERSON, Weather, host};
use crate::wire::{self, COORDINATOR};

/// Where the dataset lies: in the coordinator's own store, since nothing may wait for a real disk, whose time no seed
/// repeats.
pub const DATASET: &str = "memory:///datasets/faces";
const RUN: &str = "calm-otter-3";
const TICK: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_millis(HEALED_MS + 180_000);
/// The time of day at which every simulation begins.
const EPOCH: Duration = Duration::from_secs(1_800_000_000);
/// A person asks again after so long.
const PATIENCE: Duration = Duration::from_secs(1);
/// And waits so long for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// After so long no write is under way any more.
const SETTLED: Duration = Duration::from_secs(20);

/// What a simulation showed.
#[derive(Debug)]
pub struct Outcome {
    /// Of everything that happened, and when.
    pub trace: u64,
    pub lines: Vec<String>,
    pub faults: BTreeMap<&'static str, u64>,
    pub seconds: u64,
    /// Groups that stood.
    pub groups: u64,
}

/// Simulates a run in the weather of a seed.
///
/// # Errors
/// What does not hold, in words.
pub fn simulate(seed: u64, config: &RunConfig) -> Result<Outcome, String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let workers = rng.usize(3..5);
    let config = &RunConfig { exact: rng.bool(), ..config.clone() };
    let mut weather = Weather::new(&mut rng, workers);
    let (store, rings) = (Store::memory(), Shared::default());
    block_on(write_dataset(&store, "one"));
    let slowest = Duration::from_millis([10, 50, 300][rng.usize(0..3)]);
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .epoch(UNIX_EPOCH + EPOCH)
        .tick_duration(TICK)
        .simulation_duration(LONGEST)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(slowest)
        .tcp_capacity(4_096)
        .build();
    sim.host(COORDINATOR, || coordinate(Rc::clone(&rings), store.clone()));
    for worker in 0..workers {
        let (rings, store) = (Rc::clone(&rings), store.clone());
        sim.host(host(worker), move || {
            let (rings, store) = (Rc::clone(&rings), store.clone());
            async move {
                let process = Process::start(&host(worker), rings, store, seed);
                process.work().await;
                Ok(())
            }
        });
    }
    let status = Rc::new(Cell::new(v1::RunStatus::Unspecified));
    sim.client(PERSON, train(config.clone(), Rc::clone(&status)));
    let mut generation = 0;
    loop {
        rings.borrow_mut().now_ms = sim.elapsed().as_millis() as u64;
        weather.pass(&mut sim, &rings);
        rings.borrow_mut().watch();
        watch_generation(&store, &mut generation)?;
        if sim.step().map_err(|error| error.to_string())? {
            break;
        }
    }
    let seconds = sim.elapsed().as_secs();
    // Its hosts end with it, and write to the trace while they do.
    drop(sim);
    if std::env::var_os("TAKUMA_NET_TRACE").is_some() {
        println!("{}", rings.borrow().trace.join("\n"));
    }
    if status.get() != v1::RunStatus::Succeeded {
        return Err(format!("the run ended {}", status.get().as_str_name()));
    }
    block_on(check(&store, config))?;
    outcome(&store, &rings, weather.counts, seconds)
}

fn outcome(
    store: &Store,
    rings: &RefCell<Rings>,
    faults: BTreeMap<&'static str, u64>,
    seconds: u64,
) -> Result<Outcome, String> {
    let mut lines = std::mem::take(&mut rings.borrow_mut().trace);
    for object in [layout::EVENTS_FILE, layout::METRICS_FILE] {
        let content = block_on(read(store, object))?;
        lines.extend(String::from_utf8_lossy(&content).lines().map(str::to_owned));
    }
    let mut hasher = DefaultHasher::new();
    lines.hash(&mut hasher);
    Ok(Outcome { trace: hasher.finish(), lines, faults, seconds, groups: rings.borrow().stood })
}

/// One life of the coordinator; the store outlives it.
async fn coordinate(rings: Shared, store: Store) -> turmoil::Result {
    rings.borrow_mut().note(COORDINATOR, "starts");
    let wall_clock = || -> SystemTime { UNIX_EPOCH + turmoil::since_epoch().unwrap_or_default() };
    let options = Options { wall_clock, drawing: Drawing::InPlace, ..Options::default() };
    let coordinator = Coordinator::open(store, options).await?;
    coordinator.serve_on(wire::accept().await?, CancellationToken::new()).await?;
    Err("the coordinator ended by itself".into())
}

/// Submits the run and waits for its end. Like a person, it asks again when it gets no answer.
async fn train(config: RunConfig, status: Rc<Cell<v1::RunStatus>>) -> turmoil::Result {
    use v1::RunStatus::{Failed, Stopped, Succeeded};
    while !timeout(ANSWER, submitted(&config)).await.unwrap_or(false) {
        sleep(PATIENCE).await;
    }
    while !matches!(status.get(), Failed | Stopped | Succeeded) {
        if let Ok(Some(run)) = timeout(ANSWER, view()).await {
            status.set(run.status());
        }
        sleep(PATIENCE).await;
    }
    sleep(SETTLED).await;
    Ok(())
}

async fn submitted(config: &RunConfig) -> bool {
    let Some(channel) = wire::dial().await else { return false };
    let request = v1::SubmitRunRequest {
        protocol_version: PROTOCOL_VERSION,
        config_json: config.to_json(),
        name: RUN.into(),
        ..v1::SubmitRunRequest::default()
    };
    ControlClient::new(channel).submit_run(request).await.is_ok() || view().await.is_some()
}

async fn view() -> Option<v1::RunView> {
    let mut client = ControlClient::new(wire::dial().await?);
    Some(client.get_run(v1::GetRunRequest { run: RUN.into() }).await.ok()?.into_inner())
}

async fn read(store: &Store, object: &str) -> Result<Vec<u8>, String> {
    let run = store.at(&layout::run_folder(RUN));
    Ok(run.get(object).await.map_err(|error| error.to_string())?.to_vec())
}

/// The generation in the record never falls.
fn watch_generation(store: &Store, newest: &mut u64) -> Result<(), String> {
    // A store in memory has its answer at once.
    let Some(Ok(json)) = read(store, layout::RUN_FILE).now_or_never() else { return Ok(()) };
    let generation = RunRecord::from_json(&json)?.generation.0;
    if generation < *newest {
        return Err(format!("the record's generation fell from {newest} to {generation}"));
    }
    *newest = generation;
    Ok(())
}

/// What must hold of the store when the run has succeeded.
async fn check(store: &Store, config: &RunConfig) -> Result<(), String> {
    let steps = config.steps.unwrap();
    let record = RunRecord::from_json(&read(store, layout::RUN_FILE).await?)?;
    same("the record's step", record.step, steps)?;
    same("the record's status", record.status, RunStatus::Succeeded)?;
    same("the newest checkpoint", record.checkpoint.map(|mark| mark.step), Some(steps))?;
    let metrics = lines_of(store, layout::METRICS_FILE).await?;
    let told: Vec<_> = metrics.iter().filter_map(|line| line["step"].as_u64()).collect();
    same("metrics", told, (1..=steps).collect())?;
    lines_of(store, layout::EVENTS_FILE).await?;
    let json = read(store, &layout::checkpoint_object(steps, layout::MANIFEST_FILE)).await?;
    let manifest: CheckpointManifest = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    for part in &manifest.parts {
        let content = read(store, &layout::checkpoint_object(steps, &part.file)).await?;
        same(&part.file, content.len() as u64, part.size_bytes)?;
    }
    Ok(())
}

async fn lines_of(store: &Store, object: &str) -> Result<Vec<serde_json::Value>, String> {
    let content = read(store, object).await?;
    let lines = content.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).map_err(|error| format!("{object}: {error}"))).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, due: T) -> Result<(), String> {
    if is == due { Ok(()) } else { Err(format!("{what}: {is:?} instead of {due:?}")) }
}
