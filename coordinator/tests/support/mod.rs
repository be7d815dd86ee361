//! A coordinator on a free port and workers that speak the wire's protocol without training anything.
//! Every wait has a deadline; nothing sleeps.

#![allow(dead_code)] // Each test program uses its part.

pub mod cluster;
pub mod door;
pub mod faults;
pub mod trainer;
mod worker;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use takuma_coordinator::{Options, ServerError};
use takuma_core::config::{Recipe, RunConfig};
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_proto::v1::control_client::ControlClient;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

#[allow(unused_imports)] // As above.
pub use worker::{Worker, membership};

/// Long enough for a loaded machine; a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// Waits, but not for ever.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

/// A store in a temporary folder, with a small dataset in it.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub store: Store,
}

impl Place {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        let place = Self { folder, store };
        place.write_dataset("one").await;
        place
    }

    pub async fn write_dataset(&self, digest: &str) {
        write_dataset(&self.store, digest).await;
    }

    pub fn config(&self, steps: u64) -> RunConfig {
        let mut config = RunConfig::new(Recipe::DcganTiny, format!("{}/datasets/faces", self.store.url()));
        config.steps = Some(steps);
        config.sample_every = 2;
        config
    }
}

/// Puts a small dataset's manifest into a store.
pub async fn write_dataset(store: &Store, digest: &str) {
    let shard = |file: String| ShardEntry { file, images: 2, size_bytes: 1, sha256: String::new() };
    let manifest = DatasetManifest {
        format: DATASET_FORMAT,
        name: "faces".into(),
        images: 128,
        height: 64,
        width: 64,
        channels: 3,
        quarantined: 0,
        crop: 108,
        seed: 0,
        source: "drawn".into(),
        digest: digest.into(),
        shards: (0..64).map(takuma_core::layout::shard_file).map(shard).collect(),
    };
    let json = serde_json::to_vec(&manifest).unwrap();
    store.put("datasets/faces/manifest.json", json).await.unwrap();
}

/// A running coordinator.
pub struct Server {
    pub address: SocketAddr,
    pub control: ControlClient<Channel>,
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), ServerError>>,
    /// What a child process has logged, a line of JSON each.
    pub log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub async fn start(place: &Place) -> Self {
        Self::start_with(place, Options::default()).await
    }

    pub async fn start_with(place: &Place, options: Options) -> Self {
        let (listener, address) = takuma_coordinator::bind("127.0.0.1:0").await.unwrap();
        let stop = CancellationToken::new();
        let serving = takuma_coordinator::run(listener, place.store.clone(), options, stop.clone());
        let task = tokio::spawn(serving);
        let connect = ControlClient::connect(format!("http://{address}"));
        let control = soon("the connection", connect).await.unwrap();
        Self { address, control, stop, task, log: Arc::default() }
    }

    /// The real binary, as a child process that a test can kill.
    pub async fn spawn(place: &Place) -> (Self, tokio::process::Child) {
        Self::spawn_with(place.store.url(), &[]).await
    }

    /// The same on any store, with variables that it needs.
    pub async fn spawn_with(store_url: &str, env: &[(&str, String)]) -> (Self, tokio::process::Child) {
        let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_takuma-coordinator"))
            .args(["--listen", "127.0.0.1:0", "--log-format", "json", "--store", store_url])
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line =
                soon("the ready line", lines.next_line()).await.unwrap().expect("it listens before it ends");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(address) =
                line["message"].as_str().and_then(|text| text.strip_prefix("listening on "))
            {
                break address.parse().unwrap();
            }
        };
        let log = Arc::<Mutex<Vec<String>>>::default();
        let kept = Arc::clone(&log);
        let task = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                kept.lock().unwrap().push(line);
            }
            Ok(())
        });
        let connect = ControlClient::connect(format!("http://{address}"));
        let control = soon("the connection", connect).await.unwrap();
        (Self { address, control, stop: CancellationToken::new(), task, log }, child)
    }

    pub async fn stop(self) {
        self.stop.cancel();
        soon("the coordinator's end", self.task).await.unwrap().unwrap();
    }

    pub async fn try_submit(&mut self, config: &RunConfig, name: &str) -> Result<v1::SubmitRunReply, Status> {
        let request = v1::SubmitRunRequest {
            protocol_version: PROTOCOL_VERSION,
            config_json: config.to_json(),
            name: name.into(),
            dry_run: false,
            ..v1::SubmitRunRequest::default()
        };
        soon("the answer", self.control.submit_run(request)).await.map(tonic::Response::into_inner)
    }

    pub async fn submit(&mut self, config: &RunConfig, name: &str) -> v1::RunView {
        self.try_submit(config, name).await.unwrap().run.unwrap()
    }

    pub async fn run(&mut self, run: &str) -> v1::RunView {
        let request = v1::GetRunRequest { run: run.into() };
        soon("the run", self.control.get_run(request)).await.unwrap().into_inner()
    }

    /// Watches until a view fulfils the condition; returns it and all events on the way.
    pub async fn until(
        &mut self,
        run: &str,
        condition: impl Fn(&v1::RunView) -> bool,
    ) -> (v1::RunView, Vec<v1::RunEvent>) {
        let request = v1::WatchRunRequest { run: run.into() };
        let mut updates = soon("the stream", self.control.watch_run(request)).await.unwrap().into_inner();
        let mut events = Vec::new();
        loop {
            let update = soon("an update", updates.message()).await.unwrap();
            let update = update.expect("the run ended before the condition held");
            events.extend(update.events);
            let view = update.run.unwrap();
            if condition(&view) {
                return (view, events);
            }
        }
    }

    pub async fn until_status(
        &mut self,
        run: &str,
        status: v1::RunStatus,
    ) -> (v1::RunView, Vec<v1::RunEvent>) {
        self.until(run, |view| view.status() == status).await
    }

    /// Watches until an event of a kind has come.
    pub async fn until_event(&mut self, run: &str, kind: &str) -> v1::RunEvent {
        let request = v1::WatchRunRequest { run: run.into() };
        let mut updates = soon("the stream", self.control.watch_run(request)).await.unwrap().into_inner();
        loop {
            let update = soon("an update", updates.message()).await.unwrap().expect("the run goes on");
            if let Some(event) = update.events.into_iter().find(|event| event.kind == kind) {
                return event;
            }
        }
    }

    pub async fn worker(&self, name: &str) -> Worker {
        Worker::join(self.address, name, PROTOCOL_VERSION).await.unwrap()
    }

    /// A worker that comes back in the middle of `prepare`'s group.
    pub async fn returning(&self, name: &str, prepare: &v1::Prepare) -> Worker {
        self.returning_as(name, worker::membership(prepare)).await
    }

    pub async fn returning_as(&self, name: &str, membership: v1::Membership) -> Worker {
        Worker::connect(self.address, name, PROTOCOL_VERSION, Some(membership)).await.unwrap()
    }

    pub async fn drain(&mut self, worker: &str) -> Result<(), Status> {
        let request = v1::DrainWorkerRequest { worker: worker.into() };
        soon("the answer", self.control.drain_worker(request)).await.map(|_| ())
    }

    /// Name and status of every worker.
    pub async fn workers(&mut self) -> Vec<(String, String)> {
        let listed = soon("workers", self.control.list_workers(v1::ListWorkersRequest {})).await.unwrap();
        listed.into_inner().workers.into_iter().map(|worker| (worker.name, worker.status)).collect()
    }

    /// Steps of the lines of metrics that lie in the store.
    pub async fn stored_steps(&mut self, run: &str) -> Vec<u64> {
        let metrics = String::from_utf8(self.read(run, "metrics.jsonl").await.unwrap()).unwrap();
        let step = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
        metrics.lines().map(step).collect()
    }

    pub async fn read(&mut self, run: &str, object: &str) -> Result<Vec<u8>, Status> {
        let request = v1::ReadObjectRequest { run: run.into(), object: object.into() };
        let mut chunks = soon("the object", self.control.read_object(request)).await?.into_inner();
        let mut content = Vec::new();
        while let Some(chunk) = soon("a chunk", chunks.message()).await? {
            content.extend(chunk.data);
        }
        Ok(content)
    }
}

/// Two workers at a run that has a checkpoint of step 1 and has finished step 2.
pub async fn training(server: &mut Server, place: &Place) -> (Worker, Worker, [v1::Prepare; 2]) {
    let (mut a, mut b) = (server.worker("a").await, server.worker("b").await);
    server.submit(&place.config(10), "calm-otter-3").await;
    let prepares = [a.prepare().await, b.prepare().await];
    a.start().await;
    b.start().await;
    a.formed(&prepares[0], 0).await;
    a.report(&prepares[0], 1).await;
    a.checkpoint(&prepares[0], 1).await;
    b.committed(1).await;
    a.report(&prepares[0], 2).await;
    server.until("calm-otter-3", |view| view.step == 2).await;
    (a, b, prepares)
}

/// The most jobs that ever waited for a run's writer, and the most bytes of grids, as the writer logs at its end.
pub fn most_that_waited(log: &[String]) -> Option<(u64, u64)> {
    let lines = log.iter().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let told = |line: serde_json::Value| Some((line["most_jobs"].as_u64()?, line["most_bytes"].as_u64()?));
    lines.filter_map(told).next_back()
}
