//! `takuma dataset synth`: faces drawn by program, as a dataset or as an archive like CelebA's.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use fast_image_resize::Resizer;
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use rawzip::{CompressionMethod, ZipArchiveWriter};
use takuma_store::Store;

use crate::decode::{Geometry, shrink};
use crate::face::{HEIGHT, Look, WIDTH, draw};
use crate::prepare::all_cores;
use crate::progress::{CancelOnDrop, Job};
use crate::quarantine::Refusal;
use crate::spool::Frames;
use crate::write::{Plan, write_dataset};
use crate::{DataError, PrepareReport, Progress, Stage};

/// As CelebA's aligned images are stored, about.
const JPEG_QUALITY: u8 = 90;
/// Drawn pictures that wait for the archive, per thread.
const QUEUED_PER_THREAD: usize = 16;

/// What to draw, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthOptions {
    /// How many faces.
    pub count: u64,
    /// Side of the images, in pixels.
    pub size: u32,
    /// How many files the images are spread over.
    pub shards: u32,
    /// Seed of the faces and of the shuffle.
    pub seed: u64,
    /// Side of the central square that is cut from the 178x218 drawing; 0 = the largest that fits.
    pub crop: u32,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self { count: 6000, size: 64, shards: 64, seed: 0, crop: 108 }
    }
}

/// Makes a dataset of drawn faces. Face `i` is a pure function of (seed, `i`).
///
/// # Errors
/// As [`crate::prepare`], as far as it applies.
pub async fn synth(
    options: SynthOptions,
    destination: &Store,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<PrepareReport, DataError> {
    let started = Instant::now();
    let SynthOptions { count, size, shards, seed, crop } = options;
    let geometry = Geometry { crop, size };
    let plan = Plan { source: format!("synth: {count} faces, seed {seed}"), geometry, shards, seed };
    plan.validate()?;
    if crop > WIDTH {
        let range = "0 to 178 pixels: drawings are 178x218";
        return Err(DataError::Option { option: "--crop", value: u64::from(crop), range });
    }
    check_count(count)?;
    plan.check_images(count)?;
    let job = Arc::new(Job::new(progress));
    let _cancel = CancelOnDrop(&job);
    let frames = DrawnFrames { count: count as usize, seed, geometry };
    write_dataset(frames, plan, all_cores(), destination, &job, started).await
}

/// Image numbers fill 32 bits and file names at least six digits.
fn check_count(count: u64) -> Result<(), DataError> {
    if (1..=100_000_000).contains(&count) {
        return Ok(());
    }
    Err(DataError::Option { option: "--count", value: count, range: "1 to 100000000 faces" })
}

struct DrawnFrames {
    count: usize,
    seed: u64,
    geometry: Geometry,
}

impl Frames for DrawnFrames {
    type Scratch<'a> = (Resizer, Vec<u8>);

    fn stage(&self) -> Stage {
        Stage::Drawing
    }

    fn len(&self) -> usize {
        self.count
    }

    fn name(&self, index: usize) -> String {
        file_name(index as u64)
    }

    fn scratch(&self) -> Self::Scratch<'_> {
        (Resizer::new(), vec![0; picture_bytes()])
    }

    fn draw(&self, index: usize, scratch: &mut Self::Scratch<'_>, out: &mut [u8]) -> Result<(), Refusal> {
        let (resizer, picture) = scratch;
        draw(&Look::of(self.seed, index as u64), picture);
        shrink(resizer, self.geometry, picture, (WIDTH, HEIGHT), out)
    }
}

fn picture_bytes() -> usize {
    3 * WIDTH as usize * HEIGHT as usize
}

/// CelebA counts from 1.
fn file_name(index: u64) -> String {
    format!("img_align_celeba/{:06}.jpg", index + 1)
}

/// Writes drawn faces as a zip of 178x218 JPEGs named like CelebA's. Blocks; uses all cores.
///
/// The file appears under its name when it is complete.
///
/// # Errors
/// The file cannot be written; a count of 0.
pub fn synth_archive(
    count: u64,
    seed: u64,
    path: &Path,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<(), DataError> {
    check_count(count)?;
    let unwritable = |source| DataError::ArchiveUnwritable { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(unwritable)?;
    let staged = tempfile::NamedTempFile::new_in(folder).map_err(unwritable)?;
    let job = Job::new(progress);
    let threads = all_cores().get();
    std::thread::scope(|scope| {
        // Thread t draws pictures t, t + threads, ...; taking from each in turn keeps their order.
        let pictures: Vec<Receiver<Vec<u8>>> = (0..threads as u64)
            .map(|first| {
                let (send, receive) = sync_channel(QUEUED_PER_THREAD);
                scope.spawn(move || draw_jpegs((first..count).step_by(threads), seed, &send));
                receive
            })
            .collect();
        write_zip(staged.as_file(), count, &pictures, &job)
    })
    .map_err(unwritable)?;
    persist(staged, path).map_err(unwritable)
}

fn persist(staged: tempfile::NamedTempFile, path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    staged.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    staged.as_file().sync_all()?;
    staged.persist(path).map(drop).map_err(|error| error.error)
}

/// Ends when all are drawn or nobody takes them any more.
fn draw_jpegs(indices: impl Iterator<Item = u64>, seed: u64, send: &SyncSender<Vec<u8>>) {
    let mut picture = vec![0u8; picture_bytes()];
    for index in indices {
        draw(&Look::of(seed, index), &mut picture);
        if send.send(encode(&picture)).is_err() {
            return;
        }
    }
}

fn encode(picture: &[u8]) -> Vec<u8> {
    let mut jpeg = Vec::with_capacity(16 << 10);
    let mut encoder = Encoder::new(&mut jpeg, JPEG_QUALITY);
    encoder.set_sampling_factor(SamplingFactor::F_2_2);
    encoder
        .encode(picture, WIDTH as u16, HEIGHT as u16, ColorType::Rgb)
        .expect("a picture of fixed sides goes into memory");
    jpeg
}

fn write_zip(file: &File, count: u64, pictures: &[Receiver<Vec<u8>>], job: &Job) -> std::io::Result<()> {
    let mut zip = ZipArchiveWriter::new(BufWriter::with_capacity(1 << 20, file));
    for index in 0..count {
        let lost = |_| std::io::Error::other("a drawing thread ended early");
        let jpeg = pictures[index as usize % pictures.len()].recv().map_err(lost)?;
        let name = file_name(index);
        let entry =
            zip.new_file(name.as_str()).compression_method(CompressionMethod::STORE).unix_permissions(0o644);
        let (mut entry, config) = entry.start().map_err(into_io)?;
        let mut writer = config.wrap(&mut entry);
        writer.write_all(&jpeg)?;
        let (_, written) = writer.finish().map_err(into_io)?;
        entry.finish(written).map_err(into_io)?;
        job.report(Progress { stage: Stage::Drawing, done: index + 1, total: Some(count), quarantined: 0 });
    }
    zip.finish().map_err(into_io)?.flush()
}

fn into_io(error: rawzip::Error) -> std::io::Error {
    match error.into_kind() {
        rawzip::ErrorKind::IO(error) => error,
        other => std::io::Error::other(other.to_string()),
    }
}
