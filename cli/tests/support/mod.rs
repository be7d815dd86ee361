//! A coordinator that only pretends, and the program under test beside it.

#![allow(clippy::unwrap_used)] // All of this is a test's, though no single function is one.
#![allow(dead_code)] // Each test program uses its part.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Output;
use std::sync::{Arc, Mutex};

use futures::Stream;
use takuma_proto::PROTOCOL_VERSION;
use takuma_proto::v1::control_server::{Control, ControlServer};
use takuma_proto::v1::*;
use tonic::{Request, Response, Status};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake answers, and what it was asked.
#[derive(Debug, Default)]
pub struct Script {
    /// Each WatchRun takes the first list; a list that does not end with an ended run is a broken stream.
    pub watches: Vec<Vec<RunUpdate>>,
    /// The run of every call.
    pub run: RunView,
    pub workers: Vec<WorkerView>,
    /// What the workers are at the first calls; after those, `workers`.
    pub workers_before: Vec<Vec<WorkerView>>,
    pub drained: Vec<String>,
    pub checkpoints: Vec<CheckpointView>,
    pub samples: Vec<SampleView>,
    pub has_plot: bool,
    pub objects: HashMap<String, Vec<u8>>,
    pub submitted: Vec<SubmitRunRequest>,
    pub read: Vec<String>,
    pub stops: u32,
    pub protocol_version: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct Fake {
    pub script: Arc<Mutex<Script>>,
    pub address: SocketAddr,
}

impl Fake {
    /// Listens on a free port until the runtime ends.
    pub async fn start(script: Script) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self { script: Arc::new(Mutex::new(script)), address: listener.local_addr().unwrap() };
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(ControlServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        fake
    }

    /// Runs `takuma ARGS` against this coordinator.
    pub async fn takuma(&self, arguments: &[&str]) -> Ran {
        takuma(arguments, Some(self.address)).await
    }

    fn run(&self, name: &str) -> Result<RunView, Status> {
        let run = self.script.lock().unwrap().run.clone();
        if !name.is_empty() && run.name.starts_with(name) {
            Ok(run)
        } else {
            Err(Status::not_found(format!("there is no run '{name}'; 'takuma run ls' lists them")))
        }
    }
}

/// How the program ended, and what it said.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `takuma ARGS` without terminal, with a home of its own.
pub async fn takuma(arguments: &[&str], coordinator: Option<SocketAddr>) -> Ran {
    takuma_in(arguments, coordinator, &[]).await
}

/// The same with further environment variables.
pub async fn takuma_in(
    arguments: &[&str],
    coordinator: Option<SocketAddr>,
    variables: &[(&str, &str)],
) -> Ran {
    let home = tempfile::tempdir().unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_takuma"));
    command.args(arguments).env_clear().env("HOME", home.path()).current_dir(home.path()).kill_on_drop(true);
    command.stdin(std::process::Stdio::null()).envs(variables.iter().copied());
    if let Some(address) = coordinator {
        command.env("TAKUMA_COORDINATOR", address.to_string());
    }
    let Output { status, stdout, stderr } = command.output().await.unwrap();
    Ran {
        code: status.code().unwrap(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// A run in a state.
pub fn run_view(status: RunStatus, step: u64) -> RunView {
    RunView {
        name: "calm-otter-3".into(),
        id: "id-1".into(),
        recipe: "dcgan-tiny".into(),
        status: status.into(),
        step,
        steps: 10,
        workers: 2,
        global_batch: 64,
        data: "file:///d".into(),
        store: "file:///s/runs/calm-otter-3".into(),
        elapsed_s: 5.0,
        ..RunView::default()
    }
}

/// A checkpoint in a list.
pub fn checkpoint(step: u64) -> CheckpointView {
    CheckpointView { step, size_bytes: 7, url: "file:///c".into(), ..CheckpointView::default() }
}

/// The updates of these states.
pub fn updates(states: &[(RunStatus, u64)]) -> Vec<RunUpdate> {
    states
        .iter()
        .map(|(status, step)| RunUpdate { run: Some(run_view(*status, *step)), events: Vec::new() })
        .collect()
}

#[tonic::async_trait]
impl Control for Fake {
    type WatchRunStream = Streamed<RunUpdate>;
    type ReadLogsStream = Streamed<LogLine>;
    type ReadObjectStream = Streamed<ObjectChunk>;

    async fn get_cluster(&self, _: Request<GetClusterRequest>) -> Result<Response<ClusterView>, Status> {
        let protocol_version = self.script.lock().unwrap().protocol_version.unwrap_or(PROTOCOL_VERSION);
        Ok(Response::new(ClusterView {
            protocol_version,
            software_version: "0.1.0".into(),
            ..ClusterView::default()
        }))
    }

    async fn list_workers(
        &self,
        _: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersReply>, Status> {
        let mut script = self.script.lock().unwrap();
        let before =
            if script.workers_before.is_empty() { None } else { Some(script.workers_before.remove(0)) };
        let workers = before.unwrap_or_else(|| script.workers.clone());
        Ok(Response::new(ListWorkersReply { workers }))
    }

    async fn drain_worker(
        &self,
        request: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerReply>, Status> {
        let worker = request.into_inner().worker;
        if worker == "nobody" {
            return Err(Status::not_found("there is no worker 'nobody'; 'takuma worker ls' lists them"));
        }
        self.script.lock().unwrap().drained.push(worker);
        Ok(Response::new(DrainWorkerReply {}))
    }

    async fn submit_run(
        &self,
        request: Request<SubmitRunRequest>,
    ) -> Result<Response<SubmitRunReply>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock().unwrap();
        if request.config_json.contains("file:///missing") {
            return Err(Status::invalid_argument("there is no dataset at file:///missing; prepare one"));
        }
        script.submitted.push(request);
        let plan = Plan {
            workers: 2,
            slots_per_worker: vec![32, 32],
            global_batch: 64,
            steps: 10,
            ..Plan::default()
        };
        Ok(Response::new(SubmitRunReply { run: Some(script.run.clone()), plan: Some(plan) }))
    }

    async fn list_runs(&self, _: Request<ListRunsRequest>) -> Result<Response<ListRunsReply>, Status> {
        Ok(Response::new(ListRunsReply { runs: vec![self.script.lock().unwrap().run.clone()] }))
    }

    async fn get_run(&self, request: Request<GetRunRequest>) -> Result<Response<RunView>, Status> {
        self.run(&request.get_ref().run).map(Response::new)
    }

    async fn stop_run(&self, request: Request<StopRunRequest>) -> Result<Response<RunView>, Status> {
        self.script.lock().unwrap().stops += 1;
        self.run(&request.get_ref().run).map(Response::new)
    }

    async fn resume_run(&self, request: Request<ResumeRunRequest>) -> Result<Response<RunView>, Status> {
        self.run(&request.get_ref().run).map(Response::new)
    }

    async fn watch_run(
        &self,
        request: Request<WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        self.run(&request.get_ref().run)?;
        let mut script = self.script.lock().unwrap();
        if script.watches.is_empty() {
            return Err(Status::unavailable("the coordinator is going down"));
        }
        let updates = script.watches.remove(0);
        Ok(Response::new(Box::pin(futures::stream::iter(updates.into_iter().map(Ok)))))
    }

    async fn read_logs(
        &self,
        request: Request<ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let message = format!("tail {} level {} rank {:?}", request.tail, request.level, request.rank);
        let line = LogLine {
            level: "INFO".into(),
            worker: "worker-1".into(),
            rank: -1,
            message,
            ..LogLine::default()
        };
        Ok(Response::new(Box::pin(futures::stream::iter([Ok(line)]))))
    }

    async fn list_samples(
        &self,
        _: Request<ListSamplesRequest>,
    ) -> Result<Response<ListSamplesReply>, Status> {
        let script = self.script.lock().unwrap();
        Ok(Response::new(ListSamplesReply { samples: script.samples.clone(), has_plot: script.has_plot }))
    }

    async fn read_object(
        &self,
        request: Request<ReadObjectRequest>,
    ) -> Result<Response<Self::ReadObjectStream>, Status> {
        let object = request.into_inner().object;
        let mut script = self.script.lock().unwrap();
        script.read.push(object.clone());
        let bytes =
            script.objects.get(&object).cloned().ok_or_else(|| Status::not_found(format!("no {object}")))?;
        let chunks: Vec<_> = bytes.chunks(3).map(|chunk| Ok(ObjectChunk { data: chunk.to_vec() })).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    async fn list_checkpoints(
        &self,
        _: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsReply>, Status> {
        let checkpoints = self.script.lock().unwrap().checkpoints.clone();
        Ok(Response::new(ListCheckpointsReply { checkpoints }))
    }
}
