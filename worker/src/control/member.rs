//! [`Membership`]: this worker's part in one run, from Prepare to the end of its trainer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use takuma_core::config::{ConfigError, RunConfig};
use takuma_core::ids::{Generation, Rank};
use takuma_core::slots::SlotRange;
use takuma_data::{DataError, Dataset};
use takuma_proto::v1::worker_message::Message;
use takuma_proto::v1::{CheckpointUploaded, Prepare, SampleTile, StepReport, run_failed};
use takuma_store::{Store, StoreError};
use tokio::sync::mpsc;

use super::session::wrap;
use crate::checkpoint::{self, CheckpointError, Uploader};
use crate::collective::{AbortHandle, CollectiveError, Ring, RingConfig, RingListener};
use crate::trainer::{Exchange, Feed, Job, JobError, Outcome, Progress, Reports};

/// Shards read from the store at the same time.
const READS_IN_FLIGHT: usize = 4;

/// Messages on their way to the coordinator.
pub(super) type Outbox = mpsc::Sender<takuma_proto::v1::WorkerMessage>;

/// Why this worker cannot take part, or could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum MemberError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("the coordinator's Prepare makes no sense: {0}")]
    Prepare(&'static str),
    #[error("the checkpoint of step {step} was trained on dataset {expected}, but {url} is dataset {found}")]
    OtherData { step: u64, expected: String, found: String, url: String },
    #[error("the trainer's thread panicked: {0}")]
    Panicked(String),
}

impl MemberError {
    /// Whom the coordinator should blame.
    pub(super) fn blame(&self) -> (run_failed::Kind, i32) {
        match self {
            Self::Job(JobError::Exchange(error)) if !matches!(error, CollectiveError::Local { .. }) => {
                let suspect = error.suspect_rank().map_or(-1, |rank| rank.0 as i32);
                (run_failed::Kind::PeerLost, suspect)
            }
            _ => (run_failed::Kind::Local, -1),
        }
    }
}

/// Ends a trainer from outside, whatever it is doing.
#[derive(Debug, Clone, Default)]
pub(super) struct Stopper {
    aborted: Arc<AtomicBool>,
    group: Arc<Mutex<Option<AbortHandle>>>,
}

impl Stopper {
    pub(super) fn abort(&self, reason: &str) {
        self.aborted.store(true, Ordering::SeqCst);
        if let Some(group) = self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            group.abort(reason);
        }
    }

    /// Puts a new group under this stopper; aborts it at once if the abort came first.
    fn guard(&self, group: AbortHandle) {
        let abort_now = group.clone();
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = Some(group);
        if self.aborted.load(Ordering::SeqCst) {
            abort_now.abort("the run was ended by the coordinator");
        }
    }
}

/// A job that waits for Start.
pub(super) struct Prepared {
    job: Job,
    ring: RingConfig,
}

/// Loads what `prepare` asks for: configuration, shards of the own slots, checkpoint.
pub(super) async fn load(
    prepare: Prepare,
    progress: Arc<Progress>,
    outbox: Outbox,
) -> Result<Prepared, MemberError> {
    let config = RunConfig::from_json(&prepare.config_json)?;
    let me = prepare
        .members
        .get(prepare.rank as usize)
        .ok_or(MemberError::Prepare("the own rank is not in the member list"))?;
    let slots = SlotRange { first: me.first_slot, count: me.slot_count };
    let dataset = Dataset::open(Store::open(&config.data)?).await?;
    let map = config.slot_map(dataset.manifest())?;
    let needed = Feed::shards_needed(&map, slots);
    tracing::info!(slots = slots.count, shards = needed.len(), "loading {}", config.data);
    let dataset = &dataset;
    let shards: BTreeMap<_, _> = futures::stream::iter(needed)
        .map(|number| async move { Ok::<_, DataError>((number, dataset.load_shard(number).await?)) })
        .buffer_unordered(READS_IN_FLIGHT)
        .try_collect()
        .await?;
    let run_store = Store::open(&prepare.run_url)?;
    let checkpoint = if prepare.resume {
        let loaded = checkpoint::load(&run_store, prepare.start_step).await?;
        let (expected, found) = (&loaded.manifest.dataset_digest, &dataset.manifest().digest);
        if expected != found {
            return Err(MemberError::OtherData {
                step: prepare.start_step,
                expected: expected.clone(),
                found: found.clone(),
                url: config.data.clone(),
            });
        }
        Some(loaded)
    } else {
        None
    };
    let generation = Generation(prepare.generation);
    let members = prepare.members.iter().map(|member| member.ring_address.clone()).collect();
    let mut ring = RingConfig::new(&prepare.run_id, Rank(prepare.rank), generation, members);
    ring.channels = config.ring_channels as usize;
    ring.timeout = Duration::from_millis(config.exchange_timeout_ms);
    let seed = config.seed;
    let image_size = config.recipe.image_size();
    let uploader = uploader(&prepare, run_store, outbox.clone());
    let job = Job {
        run: prepare.run,
        generation,
        start_step: prepare.start_step,
        target_steps: prepare.target_steps,
        feed: Feed::new(map, slots, seed, image_size, shards),
        checkpoint,
        progress,
        uploader,
        reports: Box::new(Messages(outbox)),
        config,
    };
    Ok(Prepared { job, ring })
}

/// Connects the ring and trains, on a thread of its own: libtorch and the collective block.
pub(super) async fn train(
    prepared: Prepared,
    listener: Arc<RingListener>,
    stopper: Stopper,
) -> Result<Outcome, MemberError> {
    let (reply, result) = tokio::sync::oneshot::channel();
    let body = move || -> Result<Outcome, JobError> {
        let ring = Ring::connect(&listener, prepared.ring)?;
        let exchange = Exchange::new(Box::new(ring));
        stopper.guard(exchange.collective().abort_handle());
        prepared.job.run(&exchange)
    };
    let spawned = std::thread::Builder::new().name("trainer".to_owned()).spawn(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // The session may have ended meanwhile; then nobody wants to know.
        drop(reply.send(result));
    });
    if let Err(error) = spawned {
        return Err(MemberError::Panicked(format!("it could not be started: {error}")));
    }
    match result.await {
        Ok(Ok(outcome)) => Ok(outcome?),
        Ok(Err(panic)) => Err(MemberError::Panicked(panic_message(&*panic))),
        Err(_) => Err(MemberError::Panicked("it vanished".to_owned())),
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}

fn uploader(prepare: &Prepare, run_store: Store, outbox: Outbox) -> Uploader {
    let (run, generation) = (prepare.run.clone(), prepare.generation);
    Uploader::start(run_store, move |finished| {
        let message = wrap(Message::CheckpointUploaded(CheckpointUploaded {
            run: run.clone(),
            generation,
            step: finished.step,
            parts: finished.parts,
            weights_sha256: finished.weights_sha256,
        }));
        if let Err(error) = outbox.try_send(message) {
            tracing::warn!("the checkpoint of step {} could not be announced: {error}", finished.step);
        }
    })
}

/// The trainer's results as messages. A full outbox holds the trainer up, and so bounds memory; a
/// closed one means that the session is over and the abort on its way.
struct Messages(Outbox);

impl Messages {
    fn send(&self, message: Message) {
        if self.0.blocking_send(wrap(message)).is_err() {
            tracing::debug!("a report was dropped: the session is over");
        }
    }
}

impl Reports for Messages {
    fn step(&self, report: StepReport) {
        self.send(Message::StepReport(report));
    }

    fn tile(&self, tile: SampleTile) {
        self.send(Message::SampleTile(tile));
    }
}
