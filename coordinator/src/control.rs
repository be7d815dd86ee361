//! The clients' service: requests translated to events, views and streams.

use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::config::RunConfig;
use takuma_core::event::{Event, OriginCheckpoint, Refusal, Submission};
use takuma_core::layout;
use takuma_core::record::Origin;
use takuma_proto::v1::control_server::Control;
use takuma_proto::{PROTOCOL_VERSION, v1};
use takuma_store::Store;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::datasets::read_manifest;
use crate::objects;
use crate::owner::Owner;
use crate::session::check_protocol;
use crate::status::{from_refusal, refusal_of_store};
use crate::streams;

/// The `Control` service.
#[derive(Debug, Clone)]
pub struct ControlService {
    owner: Owner,
    store: Store,
}

impl ControlService {
    /// The service in front of `owner`, reading runs' objects from `store`.
    #[must_use]
    pub fn new(owner: Owner, store: Store) -> Self {
        Self { owner, store }
    }

    async fn view(&self, name: String) -> Result<v1::RunView, Refusal> {
        let unknown = Refusal::NotFound(format!("there is no run '{name}'"));
        let view = self.owner.query(move |cluster| cluster.run_view(&name)).await?;
        view.map(|view| convert::run_view(&view, self.store.url())).ok_or(unknown)
    }

    async fn resolve(&self, prefix: String) -> Result<String, Refusal> {
        self.owner.query(move |cluster| cluster.resolve(&prefix)).await?
    }

    async fn submit(&self, request: v1::SubmitRunRequest) -> Result<v1::SubmitRunReply, Refusal> {
        check_protocol("client", request.protocol_version)?;
        let mut config = RunConfig::from_json(&request.config_json)
            .map_err(|error| Refusal::Invalid(error.to_string()))?;
        let (dataset, url) = read_manifest(&self.store, &config.data).await?;
        config.data = url;
        let name = Some(request.name).filter(|name| !name.is_empty());
        let origin = match request.origin_run.as_str() {
            "" => None,
            run => Some(Box::new(self.origin(run.to_owned(), request.origin_step).await?)),
        };
        let submission = Submission { name, config, dataset, origin, random: random()? };
        let (view, plan) = if request.dry_run {
            self.owner.query(move |cluster| cluster.plan(&submission)).await??
        } else {
            let name = self.owner.request(move |request| Event::RunSubmitted { request, submission }).await?;
            let told = name.clone();
            let read = move |cluster: &takuma_core::cluster::Cluster| {
                Some((cluster.run_view(&told)?, cluster.plan_of(&told)?))
            };
            self.owner.query(read).await?.ok_or_else(|| Refusal::NotFound(format!("run {name} is gone")))?
        };
        let run = convert::run_view(&view, self.store.url());
        Ok(v1::SubmitRunReply { run: Some(run), plan: Some(convert::plan(plan, &view)) })
    }

    /// The checkpoint that a new run is to start from.
    async fn origin(&self, prefix: String, step: u64) -> Result<OriginCheckpoint, Refusal> {
        let run = self.resolve(prefix).await?;
        let manifest = objects::read_checkpoint(&self.run_store(&run), step).await?;
        let Some(manifest) = manifest else {
            return Err(Refusal::NotFound(format!(
                "run {run} has no checkpoint of step {step}; 'takuma checkpoint ls {run}' lists those that it has"
            )));
        };
        let CheckpointManifest { config, dataset_digest, .. } = manifest;
        Ok(OriginCheckpoint { mark: Origin { run, step }, config, dataset_digest })
    }

    async fn stop(&self, run: String) -> Result<v1::RunView, Refusal> {
        let name = self.owner.request(move |request| Event::StopRequested { request, run }).await?;
        self.view(name).await
    }

    async fn resume(&self, prefix: String) -> Result<v1::RunView, Refusal> {
        let run = self.resolve(prefix).await?;
        let told = run.clone();
        let view = self.owner.query(move |cluster| cluster.run_view(&told)).await?;
        let data = view.map(|view| view.record.config.data).unwrap_or_default();
        let (dataset, _) = read_manifest(&self.store, &data).await?;
        let name =
            self.owner.request(move |request| Event::ResumeRequested { request, run, dataset }).await?;
        self.view(name).await
    }

    /// The manifest of a run's dataset. Whoever asks needs no credentials for the dataset's store.
    async fn dataset_manifest(&self, name: &str) -> Result<objects::Chunks, Refusal> {
        let told = name.to_owned();
        let view = self.owner.query(move |cluster| cluster.run_view(&told)).await?;
        let data = view.map(|view| view.record.config.data).unwrap_or_default();
        let store = Store::open(&data).map_err(|error| refusal_of_store(&error))?;
        objects::read(&store, layout::MANIFEST_FILE).await
    }

    fn run_store(&self, name: &str) -> Store {
        self.store.at(&layout::run_folder(name))
    }
}

fn random() -> Result<[u64; 2], Refusal> {
    let bits = || getrandom::u64().map_err(|error| Refusal::Unavailable(format!("no random bits: {error}")));
    Ok([bits()?, bits()?])
}

fn told<T>(result: Result<T, Refusal>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|refusal| from_refusal(&refusal))
}

#[tonic::async_trait]
impl Control for ControlService {
    type WatchRunStream = ReceiverStream<Result<v1::RunUpdate, Status>>;
    type ReadLogsStream = ReceiverStream<Result<v1::LogLine, Status>>;
    type ReadObjectStream = objects::Chunks;

    async fn get_cluster(
        &self,
        request: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::ClusterView>, Status> {
        let version = check_protocol("client", request.into_inner().protocol_version);
        version.map_err(|refusal| from_refusal(&refusal))?;
        let read =
            |cluster: &takuma_core::cluster::Cluster| (cluster.worker_count(), cluster.active().is_some());
        told(self.owner.query(read).await.map(|(workers, active)| v1::ClusterView {
            protocol_version: PROTOCOL_VERSION,
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            store: self.store.url().to_owned(),
            workers: workers as u32,
            runs_active: u32::from(active),
        }))
    }

    async fn list_workers(
        &self,
        _request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersReply>, Status> {
        let now = self.owner.now();
        let views = self.owner.query(move |cluster| cluster.worker_views(now)).await;
        told(views.map(|views| v1::ListWorkersReply {
            workers: views.into_iter().map(convert::worker_view).collect(),
        }))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerReply>, Status> {
        let worker = request.into_inner().worker;
        let drained = self.owner.request(move |request| Event::DrainRequested { request, worker }).await;
        told(drained.map(|_| v1::DrainWorkerReply {}))
    }

    async fn submit_run(
        &self,
        request: Request<v1::SubmitRunRequest>,
    ) -> Result<Response<v1::SubmitRunReply>, Status> {
        told(self.submit(request.into_inner()).await)
    }

    async fn list_runs(
        &self,
        _request: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsReply>, Status> {
        let views = self.owner.query(takuma_core::cluster::Cluster::run_views).await;
        let convert = |view| convert::run_view(&view, self.store.url());
        told(views.map(|views| v1::ListRunsReply { runs: views.into_iter().map(convert).collect() }))
    }

    async fn get_run(&self, request: Request<v1::GetRunRequest>) -> Result<Response<v1::RunView>, Status> {
        let view = async { self.view(self.resolve(request.into_inner().run).await?).await };
        told(view.await)
    }

    async fn stop_run(&self, request: Request<v1::StopRunRequest>) -> Result<Response<v1::RunView>, Status> {
        told(self.stop(request.into_inner().run).await)
    }

    async fn resume_run(
        &self,
        request: Request<v1::ResumeRunRequest>,
    ) -> Result<Response<v1::RunView>, Status> {
        told(self.resume(request.into_inner().run).await)
    }

    async fn watch_run(
        &self,
        request: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        told(self.owner.watch(request.into_inner().run).await.map(streams::watch))
    }

    async fn read_logs(
        &self,
        request: Request<v1::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let open = async {
            let filter = streams::LogFilter::new(&request)?;
            Ok(streams::logs(self.owner.logs(request.run).await?, filter))
        };
        told(open.await)
    }

    async fn list_samples(
        &self,
        request: Request<v1::ListSamplesRequest>,
    ) -> Result<Response<v1::ListSamplesReply>, Status> {
        let list = async {
            let name = self.resolve(request.into_inner().run).await?;
            objects::list_samples(&self.run_store(&name)).await
        };
        told(list.await)
    }

    async fn read_object(
        &self,
        request: Request<v1::ReadObjectRequest>,
    ) -> Result<Response<Self::ReadObjectStream>, Status> {
        let request = request.into_inner();
        let read = async {
            let name = self.resolve(request.run).await?;
            if request.object == layout::DATASET_MANIFEST {
                return self.dataset_manifest(&name).await;
            }
            objects::read(&self.run_store(&name), &request.object).await
        };
        told(read.await)
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsReply>, Status> {
        let list = async {
            let name = self.resolve(request.into_inner().run).await?;
            let checkpoints = objects::list_checkpoints(&self.run_store(&name)).await?;
            Ok(v1::ListCheckpointsReply { checkpoints })
        };
        told(list.await)
    }
}
