//! What a worker needs before it can take part in a run: configuration, dataset, checkpoint.

use std::collections::BTreeSet;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::Duration;

use takuma_core::config::{ConfigError, RunConfig};
use takuma_core::ids::{Generation, Rank};
use takuma_core::slots::SlotRange;
use takuma_data::{DataError, Dataset, PoolLimits, ShardPool};
use takuma_proto::v1::{Prepare, prepare, run_failed};
use takuma_store::{Store, StoreError};

use crate::checkpoint::{self, CheckpointError, Loaded, Uploader};
use crate::collective::{CollectiveError, RingConfig};
use crate::trainer::{Feed, JobError, Progress, Seat, Spool};

/// A neighbour that does not take a connection within this is not reachable.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

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
    #[error("its neighbour rank {rank} at {address} cannot be reached: {reason}")]
    Neighbour { rank: u32, address: String, reason: String },
    #[error("a task of the worker died: {0}")]
    Died(String),
}

impl MemberError {
    /// Whom the coordinator should blame.
    pub(super) fn blame(&self) -> (run_failed::Kind, i32) {
        match self {
            Self::Job(JobError::Exchange(error)) => blame_of(error),
            Self::Neighbour { rank, .. } => (run_failed::Kind::PeerLost, *rank as i32),
            Self::Job(JobError::NotFinite { .. }) => (run_failed::Kind::NotFinite, -1),
            Self::Config(_) | Self::OtherData { .. } => (run_failed::Kind::Run, -1),
            _ => (run_failed::Kind::Local, -1),
        }
    }
}

/// Whom a broken exchange blames.
pub(super) fn blame_of(error: &CollectiveError) -> (run_failed::Kind, i32) {
    match error {
        CollectiveError::Local { .. } => (run_failed::Kind::Local, -1),
        _ => (run_failed::Kind::PeerLost, error.suspect_rank().map_or(-1, |rank| rank.0 as i32)),
    }
}

/// Everything that a trainer needs and that took waiting for.
pub(super) struct Ready {
    pub config: RunConfig,
    pub target_steps: u64,
    pub passed_over: BTreeSet<u64>,
    pub feed: Feed,
    pub pool: Arc<ShardPool>,
    pub checkpoint: Option<Loaded>,
    pub joins: bool,
    pub uploader: Uploader,
}

/// The configuration that travels with `prepare`.
pub(super) fn config_of(prepare: &Prepare) -> Result<RunConfig, MemberError> {
    Ok(RunConfig::from_json(&prepare.config_json)?)
}

/// The group that `prepare` tells of.
pub(super) fn seat_of(prepare: &Prepare, config: &RunConfig) -> Result<Seat, MemberError> {
    let me = prepare
        .members
        .get(prepare.rank as usize)
        .ok_or(MemberError::Prepare("the own rank is not in the member list"))?;
    let members = prepare.members.iter().map(|member| member.ring_address.clone()).collect();
    let generation = Generation(prepare.generation);
    let mut ring = RingConfig::new(&prepare.run_id, Rank(prepare.rank), generation, members);
    ring.channels = config.ring_channels as usize;
    ring.timeout = Duration::from_millis(config.exchange_timeout_ms);
    ring.lanes_by_rank = prepare.members.iter().map(|member| config.lanes_of(member.slot_count)).collect();
    Ok(Seat { ring, slots: SlotRange { first: me.first_slot, count: me.slot_count } })
}

/// Opens the dataset and reads the checkpoint. Shards come in the background.
pub(super) async fn load(
    prepare: Prepare,
    config: RunConfig,
    seat: Seat,
    spool: Spool,
) -> Result<Ready, MemberError> {
    let dataset = Dataset::open(Store::open(&config.data)?).await?;
    let map = config.slot_map(dataset.manifest())?;
    let digest = dataset.manifest().digest.clone();
    // Peers wait for this worker so long; its own error must reach them first.
    let exchange_timeout = Duration::from_millis(config.exchange_timeout_ms);
    let limits = PoolLimits::default();
    let limits = PoolLimits { fetch_timeout: limits.fetch_timeout.min(exchange_timeout / 2), ..limits };
    let pool = Arc::new(ShardPool::new(dataset, tokio::runtime::Handle::current(), limits));
    let run_store = Store::open(&prepare.run_url)?;
    let mut checkpoint = None;
    if prepare.state() == prepare::State::Checkpoint {
        // A forked run begins with another run's checkpoint, and writes its own to its own folder.
        let loaded = checkpoint::load(&Store::open(&prepare.checkpoint_url)?, prepare.start_step).await?;
        if loaded.manifest.dataset_digest != digest {
            return Err(MemberError::OtherData {
                step: prepare.start_step,
                expected: loaded.manifest.dataset_digest,
                found: digest,
                url: config.data.clone(),
            });
        }
        checkpoint = Some(loaded);
    }
    let size = config.recipe.image_size();
    let feed = Feed::new(map, seat.slots, config.seed, size, Arc::clone(&pool));
    if prepare.state() == prepare::State::Peers {
        probe(&seat).await?;
    }
    let uploader = Uploader::start(run_store, move |finished| spool.upload(finished));
    Ok(Ready {
        target_steps: prepare.target_steps,
        passed_over: prepare.passed_over.iter().copied().collect(),
        joins: prepare.state() == prepare::State::Peers,
        config,
        feed,
        pool,
        checkpoint,
        uploader,
    })
}

/// Finds out whether the next neighbour in the ring can be reached, before a group depends on it.
pub(super) async fn probe(seat: &Seat) -> Result<(), MemberError> {
    let world = seat.ring.members.len();
    let rank = (seat.ring.rank.0 as usize + 1) % world;
    let address = seat.ring.members[rank].clone();
    if world == 1 {
        return Ok(());
    }
    let unreachable =
        |reason: String| MemberError::Neighbour { rank: rank as u32, address: address.clone(), reason };
    let dialled = address.clone();
    let dial = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
        for resolved in dialled.to_socket_addrs()? {
            match std::net::TcpStream::connect_timeout(&resolved, PROBE_TIMEOUT) {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    });
    match dial.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(unreachable(error.to_string())),
        Err(error) => Err(MemberError::Died(error.to_string())),
    }
}

/// A trainer's progress as seen by heartbeats, before there is a trainer.
pub(super) fn progress_of(prepare: &Prepare) -> Arc<Progress> {
    Arc::new(Progress::new(prepare.start_step))
}
