//! Frames in, a dataset out: claims the destination, shuffles, writes the shards, and the manifest last.
//!
//! A dataset exists when its manifest does. Whatever ends the job before leaves shards without a
//! manifest, which nobody reads and the next job at the same place removes.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_core::layout::{MANIFEST_FILE, QUARANTINE_FILE, shard_file};
use takuma_core::noise::{CounterRng, Purpose};
use takuma_store::{Created, Store};

use crate::decode::Geometry;
use crate::progress::{Job, blocking};
use crate::quarantine::Quarantined;
use crate::spool::{Frames, Spool};
use crate::{DataError, PrepareReport, Progress, Stage, shard};

/// Shards are read and written in one piece; two in memory are far below the job's 512 MB.
const MAX_SHARD_BYTES: u64 = 128 << 20;
/// Memory of the shards that are under way to the store at once.
const IN_FLIGHT_BYTES: u64 = 192 << 20;
const MAX_IN_FLIGHT: u64 = 8;
/// More would not fit the five digits of their names.
const MAX_SHARDS: u32 = 99_999;
const MAX_SIZE: u32 = 1024;
const PROBE_FILE: &str = "write-probe";

/// What is to be made.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) source: String,
    pub(crate) geometry: Geometry,
    pub(crate) shards: u32,
    pub(crate) seed: u64,
}

impl Plan {
    /// Refuses options that cannot work.
    pub(crate) fn validate(&self) -> Result<(), DataError> {
        let out_of =
            |option, value: u32, range| Err(DataError::Option { option, value: u64::from(value), range });
        if !(1..=MAX_SIZE).contains(&self.geometry.size) {
            return out_of("--size", self.geometry.size, "1 to 1024 pixels");
        }
        if !(1..=MAX_SHARDS).contains(&self.shards) {
            return out_of("--shards", self.shards, "1 to 99999");
        }
        if self.geometry.crop > crate::decode::MAX_SIDE {
            return out_of("--crop", self.geometry.crop, "0 to 16384 pixels");
        }
        Ok(())
    }

    /// Refuses a number of images that this number of shards cannot hold.
    pub(crate) fn check_images(&self, images: u64) -> Result<(), DataError> {
        if images < u64::from(self.shards) {
            return Err(DataError::FewerImagesThanShards { images, shards: self.shards });
        }
        let frame_bytes = self.geometry.frame_bytes() as u64;
        let shard_bytes = images.div_ceil(u64::from(self.shards)) * frame_bytes;
        if shard_bytes > MAX_SHARD_BYTES {
            return Err(DataError::ShardTooLarge {
                shards: self.shards,
                shard_mib: shard_bytes >> 20,
                limit_mib: MAX_SHARD_BYTES >> 20,
                least: images.div_ceil(MAX_SHARD_BYTES / frame_bytes),
            });
        }
        Ok(())
    }
}

/// Makes a dataset of `frames` at `destination`.
pub(crate) async fn write_dataset<F: Frames + 'static>(
    frames: F,
    plan: Plan,
    threads: NonZeroUsize,
    destination: &Store,
    job: &Arc<Job>,
    started: Instant,
) -> Result<PrepareReport, DataError> {
    let (read, ignored) = (frames.len() as u64, 0);
    claim(destination).await?;
    let folder = spool_folder(destination);
    let frame_bytes = plan.geometry.frame_bytes();
    let threads_job = Arc::clone(job);
    let spool = blocking(move || Spool::fill(&frames, frame_bytes, &folder, threads, &threads_job)).await?;
    let images = spool.usable.len() as u64;
    if images == 0 {
        let first = spool.refused.first().map_or(String::new(), |line| {
            format!(" (the first: {}: {}, {})", line.file, line.reason.as_str(), line.detail)
        });
        return Err(DataError::NoUsableImage {
            path: plan.source,
            refused: spool.refused.len() as u64,
            first,
        });
    }
    plan.check_images(images)?;
    let written = write_objects(Arc::new(spool), &plan, destination, job).await;
    if written.is_err() {
        // Room for whoever needs it; should this fail too, the next job at this place removes them.
        if let Err(error) = sweep(destination).await {
            tracing::warn!(%error, "the shards of the failed job stay behind");
        }
    }
    let manifest = written?;
    let elapsed = started.elapsed();
    Ok(PrepareReport { manifest, ignored, elapsed, images_per_s: read as f64 / elapsed.as_secs_f64() })
}

/// Makes sure that nothing whole is there and that we may write, and removes what a crashed job left.
async fn claim(destination: &Store) -> Result<(), DataError> {
    let unwritable = |source| DataError::DestinationUnwritable { url: destination.url().to_owned(), source };
    if destination.size_bytes(MANIFEST_FILE).await.map_err(unwritable)?.is_some() {
        return Err(taken(destination));
    }
    destination.put(PROBE_FILE, Bytes::from_static(b"may we write here?")).await.map_err(unwritable)?;
    destination.delete(PROBE_FILE).await.map_err(unwritable)?;
    sweep(destination).await
}

fn taken(destination: &Store) -> DataError {
    DataError::DestinationTaken { url: destination.url().to_owned() }
}

/// Removes shards and quarantine list of a job that never committed; touches nothing else.
async fn sweep(destination: &Store) -> Result<(), DataError> {
    for entry in destination.list("").await? {
        if is_ours(&entry.name) {
            destination.delete(&entry.name).await?;
        }
    }
    // A local store writes `name#1` first and renames; a crash in between leaves it, and listings hide it.
    let Some(folder) = destination.local_path() else { return Ok(()) };
    blocking(move || {
        let unreadable = |source| DataError::SourceUnreadable { path: folder.display().to_string(), source };
        for item in std::fs::read_dir(&folder).map_err(unreadable)? {
            let item = item.map_err(unreadable)?;
            let name = item.file_name();
            let staged = name.to_str().and_then(|name| name.rsplit_once('#'));
            if staged.is_some_and(|(name, number)| is_ours(name) && number.parse::<u64>().is_ok()) {
                std::fs::remove_file(item.path()).map_err(unreadable)?;
            }
        }
        Ok(())
    })
    .await
}

fn is_ours(name: &str) -> bool {
    let number = name.strip_prefix("shard-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_shard =
        number.and_then(|digits| digits.parse().ok()).is_some_and(|shard| name == shard_file(shard));
    is_shard || name == QUARANTINE_FILE || name == MANIFEST_FILE || name == PROBE_FILE
}

/// Beside a local destination, where the shards must fit too; otherwise the system's place.
fn spool_folder(destination: &Store) -> PathBuf {
    destination.local_path().unwrap_or_else(std::env::temp_dir)
}

async fn write_objects(
    spool: Arc<Spool>,
    plan: &Plan,
    destination: &Store,
    job: &Arc<Job>,
) -> Result<DatasetManifest, DataError> {
    let images = spool.usable.len() as u64;
    let quarantined = spool.refused.len() as u64;
    let order = CounterRng::new(plan.seed, Purpose::DatasetShuffle, 0, 0).permutation(images);
    let layout =
        Arc::new(Layout { spool: Arc::clone(&spool), order, shards: plan.shards, size: plan.geometry.size });
    let largest_bytes = images.div_ceil(u64::from(plan.shards)) * plan.geometry.frame_bytes() as u64;
    let in_flight = (IN_FLIGHT_BYTES / largest_bytes).clamp(1, MAX_IN_FLIGHT) as usize;
    let total = Some(u64::from(plan.shards));
    let mut shards = Vec::with_capacity(plan.shards as usize);
    let mut writes = std::pin::pin!(
        futures::stream::iter(0..plan.shards)
            .map(|number| write_shard(Arc::clone(&layout), number, destination))
            .buffered(in_flight)
    );
    job.report(Progress { stage: Stage::Writing, done: 0, total, quarantined });
    while let Some(entry) = writes.try_next().await? {
        job.check()?;
        shards.push(entry);
        job.report(Progress { stage: Stage::Writing, done: shards.len() as u64, total, quarantined });
    }
    destination.put(QUARANTINE_FILE, quarantine_lines(&spool.refused)).await?;
    let manifest = DatasetManifest {
        format: DATASET_FORMAT,
        name: destination.name().to_owned(),
        images,
        height: plan.geometry.size,
        width: plan.geometry.size,
        channels: 3,
        quarantined,
        crop: plan.geometry.crop,
        seed: plan.seed,
        source: plan.source.clone(),
        digest: shard::dataset_digest(&shards),
        shards,
    };
    commit(&manifest, destination).await?;
    Ok(manifest)
}

/// The commit point: of two jobs at one place, one wins.
async fn commit(manifest: &DatasetManifest, destination: &Store) -> Result<(), DataError> {
    let json = serde_json::to_vec_pretty(manifest).expect("a manifest has only strings and numbers");
    match destination.create(MANIFEST_FILE, Bytes::from(json)).await? {
        Created::New => Ok(()),
        Created::Exists => Err(taken(destination)),
    }
}

/// Which frame lies where.
struct Layout {
    spool: Arc<Spool>,
    /// Shuffled image `i` is the usable frame `order[i]`.
    order: Vec<u32>,
    shards: u32,
    size: u32,
}

impl Layout {
    /// A shard's file, as bytes.
    fn gather(&self, number: u32) -> Result<(Bytes, u64), DataError> {
        let places = (number as usize..self.order.len()).step_by(self.shards as usize);
        let images = places.len() as u64;
        let mut bytes = shard::header(images, self.size);
        let frame_bytes = Geometry { crop: 0, size: self.size }.frame_bytes();
        let data_at = bytes.len();
        bytes.resize(data_at + places.len() * frame_bytes, 0);
        for (place, out) in places.zip(bytes[data_at..].chunks_exact_mut(frame_bytes)) {
            self.spool.read(self.spool.usable[self.order[place] as usize], out)?;
        }
        Ok((Bytes::from(bytes), images))
    }
}

async fn write_shard(layout: Arc<Layout>, number: u32, destination: &Store) -> Result<ShardEntry, DataError> {
    let (bytes, entry) = blocking(move || {
        let (bytes, images) = layout.gather(number)?;
        let (size_bytes, sha256) = (bytes.len() as u64, shard::sha256_hex(&bytes));
        Ok((bytes, ShardEntry { file: shard_file(number), images, size_bytes, sha256 }))
    })
    .await?;
    destination.put(&entry.file, bytes).await?;
    Ok(entry)
}

fn quarantine_lines(refused: &[Quarantined]) -> Bytes {
    let mut lines = Vec::new();
    for line in refused {
        serde_json::to_writer(&mut lines, line).expect("a line has only strings, and memory takes it");
        lines.push(b'\n');
    }
    Bytes::from(lines)
}
