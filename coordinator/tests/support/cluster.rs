//! A coordinator that is started again whenever it dies, one worker and one client: all in paused time, over a
//! store in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use takuma_coordinator::{Coordinator, Options};
use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::config::RunConfig;
use takuma_core::layout;
use takuma_core::record::RunRecord;
use takuma_proto::v1::control_client::ControlClient;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::door::Door;
use super::faults::Faults;
use super::trainer::Trainer;

/// The run's name.
pub const RUN: &str = "calm-otter-3";
/// A supervisor starts a coordinator again after so long.
const RESTART: Duration = Duration::from_secs(1);
/// After so long no write is under way any more.
const SETTLED: Duration = Duration::from_secs(20);
/// No scenario takes longer, in its own time.
const LONGEST: Duration = Duration::from_secs(7_200);

/// What a scenario is made of.
pub struct Cluster {
    /// The store itself, without faults.
    pub store: Store,
    /// On the coordinator's way to it.
    pub faults: Arc<Faults>,
    /// Where the coordinator is.
    pub door: Door,
    /// Coordinators that were started.
    pub lives: Arc<AtomicUsize>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { store: Store::memory(), faults: Arc::default(), door: Door::default(), lives: Arc::default() }
    }
}

impl Cluster {
    /// Starts coordinator after coordinator, and a worker. They end with the runtime. Returns the most reports and
    /// tiles that the worker ever kept.
    pub fn start(&self, pace: Duration) -> Arc<[AtomicUsize; 2]> {
        let trainer = Trainer::new(self.door.clone(), self.store.clone(), pace);
        let most_kept = trainer.most_kept();
        tokio::spawn(trainer.work());
        let (store, faults, door) = (self.store.clone(), Arc::clone(&self.faults), self.door.clone());
        let lives = Arc::clone(&self.lives);
        tokio::spawn(async move {
            loop {
                lives.fetch_add(1, Ordering::Relaxed);
                let life = CancellationToken::new();
                let store = faults.over(&store, &life);
                let living = async {
                    // One that cannot read its store ends, and is started again.
                    let Ok(coordinator) = Coordinator::open(store, Options::default()).await else { return };
                    coordinator.serve_on(door.open(), CancellationToken::new()).await.ok();
                };
                tokio::select! {
                    () = living => {}
                    () = life.cancelled() => {}
                }
                door.close();
                sleep(RESTART).await;
            }
        });
        most_kept
    }

    /// Submits the run and waits for its end. Like a person, it asks again when it gets no answer.
    pub async fn train(&self, config: &RunConfig) -> v1::RunView {
        let ended = async {
            while !self.submitted(config).await {
                sleep(RESTART).await;
            }
            loop {
                if let Some(run) = self.view().await
                    && ended(&run)
                {
                    return run;
                }
                sleep(RESTART).await;
            }
        };
        let run = timeout(LONGEST, ended).await.expect("the run comes to an end");
        // What is under way is in its place by then, or has lost.
        sleep(SETTLED).await;
        run
    }

    /// Whether the run is known to the coordinator.
    async fn submitted(&self, config: &RunConfig) -> bool {
        let Ok(channel) = self.door.connect().await else { return false };
        let mut client = ControlClient::new(channel);
        let request = v1::SubmitRunRequest {
            protocol_version: PROTOCOL_VERSION,
            config_json: config.to_json(),
            name: RUN.into(),
            ..v1::SubmitRunRequest::default()
        };
        client.submit_run(request).await.is_ok() || self.view().await.is_some()
    }

    /// The run as the coordinator sees it, if there is one that answers.
    pub async fn view(&self) -> Option<v1::RunView> {
        let mut client = ControlClient::new(self.door.connect().await.ok()?);
        Some(client.get_run(v1::GetRunRequest { run: RUN.into() }).await.ok()?.into_inner())
    }

    /// What must hold of the store when a run of `steps` has succeeded.
    pub async fn check(&self, config: &RunConfig) -> Result<(), String> {
        let steps = config.steps.unwrap();
        let run = self.store.at(&layout::run_folder(RUN));
        let read = async |object: &str| run.get(object).await.map_err(|error| error.to_string());
        let record = RunRecord::from_json(&read(layout::RUN_FILE).await?)?;
        same("the record's step", record.step, steps)?;
        same("the record's status", record.status, takuma_core::record::RunStatus::Succeeded)?;
        let metrics = read(layout::METRICS_FILE).await?;
        same("metrics", steps_of(&metrics), (1..=steps).collect())?;
        let events = read(layout::EVENTS_FILE).await?;
        let whole = |line: &[u8]| serde_json::from_slice::<serde_json::Value>(line).is_ok();
        same("whole events", events.split(|&byte| byte == b'\n').filter(|l| !l.is_empty()).all(whole), true)?;
        for step in (0..=steps).filter(|step| step.is_multiple_of(config.sample_every) || *step == steps) {
            read(&layout::sample_file(step)).await?;
        }
        read(layout::REALS_FILE).await?;
        read(layout::PLOT_FILE).await?;
        for step in (1..=steps).filter(|step| step.is_multiple_of(config.checkpoint_every) || *step == steps)
        {
            let json = read(&layout::checkpoint_object(step, layout::MANIFEST_FILE)).await?;
            let manifest: CheckpointManifest =
                serde_json::from_slice(&json).map_err(|error| error.to_string())?;
            for part in &manifest.parts {
                let object = layout::checkpoint_object(step, &part.file);
                let size = run.size_bytes(&object).await.map_err(|error| error.to_string())?;
                same(&object, size, Some(part.size_bytes))?;
            }
        }
        same("the newest checkpoint", record.checkpoint.map(|mark| mark.step), Some(steps))
    }
}

fn ended(run: &v1::RunView) -> bool {
    use v1::RunStatus::{Failed, Stopped, Succeeded};
    matches!(run.status(), Failed | Stopped | Succeeded)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, due: T) -> Result<(), String> {
    if is == due { Ok(()) } else { Err(format!("{what}: {is:?} instead of {due:?}")) }
}

fn steps_of(metrics: &[u8]) -> Vec<u64> {
    let lines = metrics.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let step = |line| serde_json::from_slice::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    lines.map(step).collect()
}

/// Runs a scenario in a runtime of its own, whose time is paused: it passes when everybody waits.
pub fn in_paused_time<T>(scenario: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(scenario)
}
