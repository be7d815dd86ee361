//! A coordinator on a free port and workers that speak the wire's protocol without training anything.
//! Every wait has a deadline; nothing sleeps.

#![allow(dead_code)] // Each test program uses its part.

use std::net::SocketAddr;
use std::time::Duration;

use takuma_coordinator::{Options, ServerError};
use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::config::{Recipe, RunConfig};
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_proto::v1::cluster_client::ClusterClient;
use takuma_proto::v1::control_client::ControlClient;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

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
        self.store.put("datasets/faces/manifest.json", json).await.unwrap();
    }

    pub fn config(&self, steps: u64) -> RunConfig {
        let mut config = RunConfig::new(Recipe::DcganTiny, format!("{}/datasets/faces", self.store.url()));
        config.steps = Some(steps);
        config.sample_every = 2;
        config
    }
}

/// A running coordinator.
pub struct Server {
    pub address: SocketAddr,
    pub control: ControlClient<Channel>,
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), ServerError>>,
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
        Self { address, control, stop, task }
    }

    /// The real binary, as a child process that a test can kill.
    pub async fn spawn(place: &Place) -> (Self, tokio::process::Child) {
        let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_takuma-coordinator"))
            .args(["--listen", "127.0.0.1:0", "--log-format", "json", "--store", place.store.url()])
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
        // Its log must go somewhere, or the pipe fills up.
        let task = tokio::spawn(async move {
            while let Ok(Some(_)) = lines.next_line().await {}
            Ok(())
        });
        let connect = ControlClient::connect(format!("http://{address}"));
        let control = soon("the connection", connect).await.unwrap();
        (Self { address, control, stop: CancellationToken::new(), task }, child)
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
    pub async fn until_event(&mut self, run: &str, kind: &str) {
        let request = v1::WatchRunRequest { run: run.into() };
        let mut updates = soon("the stream", self.control.watch_run(request)).await.unwrap().into_inner();
        loop {
            let update = soon("an update", updates.message()).await.unwrap().expect("the run goes on");
            if update.events.iter().any(|event| event.kind == kind) {
                return;
            }
        }
    }

    pub async fn worker(&self, name: &str) -> Worker {
        Worker::join(self.address, name, PROTOCOL_VERSION).await.unwrap()
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

/// A worker that does as it is told by the test.
pub struct Worker {
    pub name: String,
    pub outgoing: Option<mpsc::Sender<v1::WorkerMessage>>,
    pub directives: Streaming<v1::WorkerDirective>,
    heart: JoinHandle<()>,
}

impl Worker {
    pub async fn join(address: SocketAddr, name: &str, protocol_version: u32) -> Result<Self, Status> {
        let mut client =
            soon("the connection", ClusterClient::connect(format!("http://{address}"))).await.unwrap();
        let (outgoing, messages) = mpsc::channel(64);
        let hello = v1::Hello {
            protocol_version,
            software_version: "0.1.0".into(),
            process_id: format!("process-{name}"),
            requested_name: name.into(),
            ring_address: format!("127.0.0.1:1{}", name.len()),
            host: "testhost".into(),
            pid: 4242,
            device: "cpu".into(),
            threads: 1,
            libtorch_version: "2.11.0".into(),
        };
        outgoing.send(v1::WorkerMessage { message: Some(Message::Hello(hello)) }).await.unwrap();
        let session = client.session(ReceiverStream::new(messages));
        let mut directives = soon("the welcome", session).await?.into_inner();
        let Some(Directive::Welcome(welcome)) = next(&mut directives).await else {
            panic!("no welcome came")
        };
        let mut beats = tokio::time::interval(Duration::from_millis(welcome.heartbeat_interval_ms.into()));
        let sender = outgoing.clone();
        let heart = tokio::spawn(async move {
            loop {
                beats.tick().await;
                let beat =
                    Message::Heartbeat(v1::Heartbeat { phase: "d".into(), ..v1::Heartbeat::default() });
                if sender.send(v1::WorkerMessage { message: Some(beat) }).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { name: welcome.name, outgoing: Some(outgoing), directives, heart })
    }

    pub async fn send(&self, message: Message) {
        let outgoing = self.outgoing.as_ref().expect("the worker is connected");
        let message = v1::WorkerMessage { message: Some(message) };
        soon("room for a message", outgoing.send(message)).await.unwrap();
    }

    pub async fn next(&mut self) -> Directive {
        next(&mut self.directives).await.expect("the session ended")
    }

    /// Stops the heartbeats and stays connected: what SIGSTOP does.
    pub fn fall_silent(&self) {
        self.heart.abort();
    }

    /// Breaks the connection: what SIGKILL does.
    pub fn die(self) {
        self.heart.abort();
    }

    /// Takes a Prepare, answers it and takes the Start; the last worker's Start needs all to be prepared.
    pub async fn prepare(&mut self) -> v1::Prepare {
        let Directive::Prepare(prepare) = self.next().await else { panic!("no Prepare came") };
        let prepared = v1::Prepared { run: prepare.run.clone(), generation: prepare.generation };
        self.send(Message::Prepared(prepared)).await;
        prepare
    }

    pub async fn start(&mut self) {
        let Directive::Start(_) = self.next().await else { panic!("no Start came") };
    }

    pub async fn report(&self, prepare: &v1::Prepare, step: u64) {
        self.send(Message::StepReport(v1::StepReport {
            run: prepare.run.clone(),
            generation: prepare.generation,
            step,
            epoch: 0,
            d_loss: 1.0 / step as f64,
            g_loss: step as f64,
            d_acc: 0.5,
            step_s: 0.5,
            compute_s: 0.4,
            data_s: 0.04,
            exchange_s: 0.06,
        }))
        .await;
    }

    pub async fn tile(&self, prepare: &v1::Prepare, kind: v1::sample_tile::Kind, step: u64) {
        let share = &prepare.members[prepare.rank as usize];
        let (height, width, channels) = (64, 64, 3);
        let cell = |cell: u32| vec![(cell * 3) as u8; (height * width * channels) as usize];
        self.send(Message::SampleTile(v1::SampleTile {
            run: prepare.run.clone(),
            generation: prepare.generation,
            kind: kind.into(),
            step,
            first_cell: share.first_slot,
            cells_total: 64,
            height,
            width,
            channels,
            pixels: (share.first_slot..share.first_slot + share.slot_count).flat_map(cell).collect(),
        }))
        .await;
    }

    /// Uploads a checkpoint as rank 0 does, and waits for its commit.
    pub async fn checkpoint(&mut self, prepare: &v1::Prepare, step: u64) {
        self.upload(prepare, step).await;
        self.committed(step).await;
    }

    pub async fn upload(&self, prepare: &v1::Prepare, step: u64) {
        let store = Store::open(&prepare.run_url).unwrap().at(&takuma_core::layout::checkpoint_folder(step));
        let mut parts = Vec::new();
        for part in CHECKPOINT_PARTS {
            store.put(part, format!("weights {step}")).await.unwrap();
            let size_bytes = format!("weights {step}").len() as u64;
            parts.push(v1::ObjectPart { name: part.into(), size_bytes, sha256: format!("{step:064}") });
        }
        let (run, generation) = (prepare.run.clone(), prepare.generation);
        let weights_sha256 = format!("{step:064}");
        let uploaded = v1::CheckpointUploaded { run, generation, step, parts, weights_sha256 };
        self.send(Message::CheckpointUploaded(uploaded)).await;
    }

    pub async fn committed(&mut self, step: u64) {
        let directive = self.next().await;
        assert!(matches!(&directive, Directive::CheckpointCommitted(c) if c.step == step), "{directive:?}");
    }

    pub async fn end(&self, prepare: &v1::Prepare, outcome: v1::run_ended::Outcome, step: u64) {
        let (run, generation) = (prepare.run.clone(), prepare.generation);
        let weights_sha256 = format!("{step:064}");
        let ended = v1::RunEnded { run, generation, outcome: outcome.into(), step, weights_sha256 };
        self.send(Message::RunEnded(ended)).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

async fn next(directives: &mut Streaming<v1::WorkerDirective>) -> Option<Directive> {
    soon("a directive", directives.message()).await.unwrap().and_then(|message| message.directive)
}
