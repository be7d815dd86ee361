//! `takuma dataset prepare`: a source of images in, a dataset out.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use takuma_core::dataset::DatasetManifest;
use takuma_store::Store;

use crate::archive::Archive;
use crate::decode::{Budget, Decoder, Geometry};
use crate::progress::{CancelOnDrop, Job, blocking};
use crate::quarantine::Refusal;
use crate::spool::Frames;
use crate::write::{Plan, write_dataset};
use crate::{DataError, Progress, Stage};

/// What to prepare, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareOptions {
    /// Path or `file://` URL of a zip, tar, gzipped tar or folder with JPEG and PNG images.
    pub source: String,
    /// Side of the central square that is cut out, in pixels; 0 = the largest that fits.
    pub crop: u32,
    /// Side of the prepared images, in pixels.
    pub size: u32,
    /// How many files the images are spread over.
    pub shards: u32,
    /// Seed of the one shuffle over all images.
    pub seed: u64,
}

impl Default for PrepareOptions {
    /// CelebA for `dcgan-celeba`.
    fn default() -> Self {
        Self { source: String::new(), crop: 108, size: 64, shards: 64, seed: 0 }
    }
}

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareReport {
    /// As stored.
    pub manifest: DatasetManifest,
    /// Files of the source that are no images by their name.
    pub ignored: u64,
    /// From the call to the commit.
    pub elapsed: Duration,
    /// Images of the source, refused ones included, over [`PrepareReport::elapsed`].
    pub images_per_s: f64,
}

/// Makes a dataset at `destination` from a source of images, on all cores.
///
/// The manifest is written last. If the future is dropped or fails before, there is no dataset.
///
/// # Errors
/// Nothing at the source, no usable image, fewer images than shards, an unwritable or taken
/// destination, a full disk: see [`DataError`]. Single bad images are no error: they are listed in
/// `quarantine.jsonl`.
pub async fn prepare(
    options: PrepareOptions,
    destination: &Store,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<PrepareReport, DataError> {
    prepare_with_threads(options, all_cores(), destination, progress).await
}

/// [`prepare`] with a number of decoding threads. The result does not depend on it.
///
/// # Errors
/// As [`prepare`].
pub async fn prepare_with_threads(
    options: PrepareOptions,
    threads: NonZeroUsize,
    destination: &Store,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<PrepareReport, DataError> {
    let started = Instant::now();
    let PrepareOptions { source, crop, size, shards, seed } = options;
    let plan = Plan { source, geometry: Geometry { crop, size }, shards, seed };
    plan.validate()?;
    let job = Arc::new(Job::new(progress));
    let _cancel = CancelOnDrop(&job);
    let (scan_job, from) = (Arc::clone(&job), plan.source.clone());
    let archive = blocking(move || Archive::open(&from, &scan_job)).await?;
    if archive.len() == 0 {
        let first = String::new();
        return Err(DataError::NoUsableImage { path: plan.source, refused: 0, first });
    }
    // What cannot work with every image usable cannot work at all: say so before decoding.
    plan.check_images(archive.len() as u64)?;
    let ignored = archive.ignored;
    let frames = ArchiveFrames { archive, geometry: plan.geometry, budget: Budget::new() };
    let report = write_dataset(frames, plan, threads, destination, &job, started).await?;
    Ok(PrepareReport { ignored, ..report })
}

/// As many threads as the process may run at once.
pub(crate) fn all_cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

struct ArchiveFrames {
    archive: Archive,
    geometry: Geometry,
    budget: Budget,
}

impl Frames for ArchiveFrames {
    type Scratch<'a> = (Decoder<'a>, Vec<u8>);

    fn stage(&self) -> Stage {
        Stage::Decoding
    }

    fn len(&self) -> usize {
        self.archive.len()
    }

    fn name(&self, index: usize) -> String {
        self.archive.name(index).to_owned()
    }

    fn scratch(&self) -> Self::Scratch<'_> {
        (Decoder::new(self.geometry, &self.budget), Vec::new())
    }

    fn draw(&self, index: usize, scratch: &mut Self::Scratch<'_>, out: &mut [u8]) -> Result<(), Refusal> {
        let (decoder, file) = scratch;
        self.archive.read(index, file)?;
        let result = decoder.frame(file, out);
        file.shrink_to(SPARE_FILE_BYTES);
        result
    }
}

/// Kept between files; what a larger one needed is given back.
const SPARE_FILE_BYTES: usize = 1 << 20;
