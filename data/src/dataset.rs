//! Reading a prepared dataset: open, load, inspect, verify.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use serde::Serialize;
use takuma_core::dataset::{DATASET_FORMAT, DatasetManifest, ShardEntry};
use takuma_core::layout::{MANIFEST_FILE, QUARANTINE_FILE, shard_file};
use takuma_core::slots::{ImageRef, SlotMap};
use takuma_store::{Store, StoreError};

use crate::progress::{CancelOnDrop, Job, blocking};
use crate::quarantine::Quarantined;
use crate::shard::{Shard, dataset_digest, image_range};
use crate::{DataError, Progress, Stage};

/// Batch for which [`Inspection`] counts steps: the recipes' default.
const USUAL_BATCH: u32 = 64;
/// Shards read ahead by [`verify`].
const READS_IN_FLIGHT: usize = 2;

/// A prepared dataset. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dataset {
    store: Store,
    manifest: Arc<DatasetManifest>,
}

impl Dataset {
    /// Opens the dataset in a store's folder. Reads its manifest, nothing else.
    ///
    /// # Errors
    /// There is none, its manifest is not usable, or the store does not answer.
    pub async fn open(store: Store) -> Result<Self, DataError> {
        let url = store.url().to_owned();
        let bytes = match store.get(MANIFEST_FILE).await {
            Err(StoreError::NotFound { .. }) => return Err(DataError::NoDataset { url }),
            other => other?,
        };
        let manifest: DatasetManifest = serde_json::from_slice(&bytes)
            .map_err(|error| DataError::Manifest { url: url.clone(), reason: error.to_string() })?;
        check_manifest(&manifest).map_err(|reason| DataError::Manifest { url, reason })?;
        Ok(Self { store, manifest: Arc::new(manifest) })
    }

    /// What the dataset says about itself.
    #[must_use]
    pub fn manifest(&self) -> &DatasetManifest {
        &self.manifest
    }

    /// Reads one shard and checks size, digest and tensor.
    ///
    /// # Errors
    /// No such shard, it is missing or damaged, or the store does not answer.
    pub async fn load_shard(&self, shard: u32) -> Result<Shard, DataError> {
        self.check_shard(shard).await?.map_err(|fault| self.damaged(vec![fault]))
    }

    /// Reads one image alone. Nothing but its length can be checked without the rest of its shard.
    ///
    /// # Shapes
    /// `[height, width, channels]`, u8.
    ///
    /// # Errors
    /// No such shard or image, the shard is missing or shorter than it should be, or the store does not
    /// answer.
    pub async fn read_image(&self, place: ImageRef) -> Result<Bytes, DataError> {
        let entry = self.entry_of(place)?;
        let range = image_range(entry, self.shape(), place.index)
            .map_err(|reason| DataError::Manifest { url: self.url().to_owned(), reason })?;
        let image_bytes = range.end - range.start;
        let pixels = match self.store.get_range(&entry.file, range).await {
            Err(StoreError::NotFound { .. }) => return Err(self.damaged(vec![missing(entry)])),
            read => read?,
        };
        if pixels.len() as u64 != image_bytes {
            let fault = format!("{} ends inside of image {}", entry.file, place.index);
            return Err(self.damaged(vec![fault]));
        }
        Ok(pixels)
    }

    /// The dataset's URL.
    pub(crate) fn url(&self) -> &str {
        self.store.url()
    }

    /// The manifest's entry of the shard that should hold an image.
    pub(crate) fn entry_of(&self, place: ImageRef) -> Result<&ShardEntry, DataError> {
        let ImageRef { shard, index } = place;
        let entry = self.entry(shard)?;
        if u64::from(index) < entry.images {
            return Ok(entry);
        }
        Err(DataError::NoSuchImage { url: self.url().to_owned(), shard, index, images: entry.images })
    }

    pub(crate) fn damaged(&self, faults: Vec<String>) -> DataError {
        DataError::Damaged { url: self.url().to_owned(), faults }
    }

    /// The shard, or in words what is wrong with it.
    pub(crate) async fn check_shard(&self, shard: u32) -> Result<Result<Shard, String>, DataError> {
        let entry = self.entry(shard)?;
        let Some(bytes) = self.store.get_if_exists(&entry.file).await? else {
            return Ok(Err(missing(entry)));
        };
        let (manifest, shape) = (Arc::clone(&self.manifest), self.shape());
        blocking(move || Ok(Shard::parse(bytes, &manifest.shards[shard as usize], shape))).await
    }

    fn entry(&self, shard: u32) -> Result<&ShardEntry, DataError> {
        self.manifest.shards.get(shard as usize).ok_or_else(|| DataError::NoSuchShard {
            url: self.url().to_owned(),
            shard,
            shards: self.manifest.shards.len(),
        })
    }

    /// Height, width and channels of every image.
    fn shape(&self) -> [u64; 3] {
        [self.manifest.height, self.manifest.width, self.manifest.channels].map(u64::from)
    }
}

fn missing(entry: &ShardEntry) -> String {
    format!("{} is missing", entry.file)
}

/// What must hold before names and sizes in a manifest are used.
fn check_manifest(manifest: &DatasetManifest) -> Result<(), String> {
    if manifest.format != DATASET_FORMAT {
        return Err(format!("it has format {} and this takuma reads {DATASET_FORMAT}", manifest.format));
    }
    if manifest.shards.is_empty() {
        return Err("it lists no shards".to_owned());
    }
    let sum = manifest.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.images));
    if sum != Some(manifest.images) {
        return Err(format!("its shards do not hold {} images together", manifest.images));
    }
    // Names are ours to choose; another one could point outside of the folder.
    if let Some(shard) =
        (0u32..).zip(&manifest.shards).find(|(number, shard)| shard.file != shard_file(*number))
    {
        return Err(format!("shard {} is called '{}'", shard.0, shard.1.file));
    }
    if manifest.digest != dataset_digest(&manifest.shards) {
        return Err("its digest is not that of its shards".to_owned());
    }
    Ok(())
}

/// What `takuma dataset inspect` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// As stored.
    pub manifest: DatasetManifest,
    /// How many images were refused for each reason, by the reason's name.
    pub quarantine: BTreeMap<String, u64>,
    /// Steps per epoch with a global batch of 64; `None` where the shards do not go with 64.
    pub steps_per_epoch: Option<u64>,
    /// All shards together.
    pub size_bytes: u64,
}

/// What a dataset holds, without reading its shards.
///
/// # Errors
/// As [`Dataset::open`]; the quarantine list is damaged.
pub async fn inspect(dataset: &Store) -> Result<Inspection, DataError> {
    let manifest = Dataset::open(dataset.clone()).await?.manifest().clone();
    let lines = dataset.get_if_exists(QUARANTINE_FILE).await?.unwrap_or_default();
    let mut quarantine = BTreeMap::new();
    for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Quarantined = serde_json::from_slice(line).map_err(|error| DataError::Damaged {
            url: dataset.url().to_owned(),
            faults: vec![format!("{QUARANTINE_FILE} is no list of refusals: {error}")],
        })?;
        *quarantine.entry(line.reason.as_str().to_owned()).or_insert(0) += 1;
    }
    let images: Vec<u64> = manifest.shards.iter().map(|shard| shard.images).collect();
    let steps_per_epoch =
        SlotMap::new(USUAL_BATCH, manifest.seed, &images).ok().map(|map| map.steps_per_epoch());
    let size_bytes = manifest.shards.iter().map(|shard| shard.size_bytes).sum();
    Ok(Inspection { manifest, quarantine, steps_per_epoch, size_bytes })
}

/// What [`verify`] has read and found whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shards.
    pub shards: u64,
    /// Images.
    pub images: u64,
    /// Bytes of all shards.
    pub size_bytes: u64,
    /// The dataset's identity.
    pub digest: String,
}

/// Reads every shard again and checks size, SHA-256 and tensor.
///
/// # Errors
/// [`DataError::Damaged`] with everything that is wrong, after all shards were read; as
/// [`Dataset::open`] otherwise.
pub async fn verify(
    dataset: &Store,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<VerifyReport, DataError> {
    let job = Job::new(progress);
    let _cancel = CancelOnDrop(&job);
    let opened = Dataset::open(dataset.clone()).await?;
    let manifest = opened.manifest();
    let shards = manifest.shards.len() as u64;
    let mut faults = Vec::new();
    let reads = (0..shards as u32).map(|shard| opened.check_shard(shard));
    let mut reads = std::pin::pin!(futures::stream::iter(reads).buffered(READS_IN_FLIGHT));
    let mut done = 0;
    while let Some(read) = reads.next().await {
        if let Err(fault) = read? {
            faults.push(fault);
        }
        done += 1;
        job.report(Progress { stage: Stage::Verifying, done, total: Some(shards), quarantined: 0 });
    }
    if !faults.is_empty() {
        return Err(DataError::Damaged { url: dataset.url().to_owned(), faults });
    }
    let size_bytes = manifest.shards.iter().map(|shard| shard.size_bytes).sum();
    Ok(VerifyReport { shards, images: manifest.images, size_bytes, digest: manifest.digest.clone() })
}
