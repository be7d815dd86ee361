//! All frames of a job, made by all cores, in one nameless temporary file in the order of their names.
//!
//! The shuffle needs to know which images are usable, and that is known only after decoding; memory
//! must not grow with their number. Every frame has its place by its index, so threads write without
//! waiting for one another and the result does not depend on them.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::progress::Job;
use crate::quarantine::{Quarantined, Refusal};
use crate::{DataError, Progress, Stage};

/// Frames made and written in one go: few enough that threads end together, many enough that a write
/// is worth its call.
const BATCH_FRAMES: usize = 32;
const BATCH_BYTES: usize = 4 << 20;

/// Something that makes frames, each a pure function of its index.
pub(crate) trait Frames: Send + Sync {
    /// What one thread keeps between frames.
    type Scratch<'a>
    where
        Self: 'a;
    fn stage(&self) -> Stage;
    fn len(&self) -> usize;
    fn name(&self, index: usize) -> String;
    fn scratch(&self) -> Self::Scratch<'_>;
    /// Fills `out` (`[size, size, 3]`, u8 RGB) or says why not.
    fn draw(&self, index: usize, scratch: &mut Self::Scratch<'_>, out: &mut [u8]) -> Result<(), Refusal>;
}

/// The finished frames.
pub(crate) struct Spool {
    file: File,
    folder: PathBuf,
    frame_bytes: usize,
    /// Indices of the usable frames, ascending.
    pub(crate) usable: Vec<u32>,
    /// The others, in the order of their names.
    pub(crate) refused: Vec<Quarantined>,
}

impl Spool {
    /// Makes every frame.
    pub(crate) fn fill<F: Frames>(
        frames: &F,
        frame_bytes: usize,
        folder: &Path,
        threads: NonZeroUsize,
        job: &Job,
    ) -> Result<Self, DataError> {
        let needed_bytes = frames.len() as u64 * frame_bytes as u64;
        let full = |source| DataError::Spool {
            folder: folder.to_owned(),
            needed_mib: needed_bytes.div_ceil(1 << 20),
            source,
        };
        let file = tempfile::tempfile_in(folder).map_err(full)?;
        let work = Work {
            frames,
            frame_bytes,
            file: &file,
            job,
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            refused: Mutex::new(Vec::new()),
        };
        let ended: Vec<Result<(), Stop>> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads.get()).map(|_| scope.spawn(|| work.run())).collect();
            started
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
                .collect()
        });
        let mut refused = work.refused.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        for result in ended {
            result.map_err(|stop| match stop {
                Stop::Job(error) => error,
                Stop::Write(source) => full(source),
            })?;
        }
        refused.sort_by_key(|&(index, _)| index);
        let mut bad = refused.iter().map(|&(index, _)| index).peekable();
        let usable = (0..frames.len())
            .filter(|index| bad.next_if_eq(index).is_none())
            .map(|index| index as u32)
            .collect();
        let refused = refused.into_iter().map(|(_, line)| line).collect();
        Ok(Self { file, folder: folder.to_owned(), frame_bytes, usable, refused })
    }

    /// Reads one frame.
    pub(crate) fn read(&self, index: u32, out: &mut [u8]) -> Result<(), DataError> {
        let at = u64::from(index) * self.frame_bytes as u64;
        self.file.read_exact_at(out, at).map_err(|source| DataError::SourceUnreadable {
            path: format!("the temporary file in {}", self.folder.display()),
            source,
        })
    }
}

/// Why a thread ended early.
enum Stop {
    Job(DataError),
    Write(std::io::Error),
}

/// What the threads share.
struct Work<'a, F> {
    frames: &'a F,
    frame_bytes: usize,
    file: &'a File,
    job: &'a Job,
    next: AtomicUsize,
    done: AtomicU64,
    refused: Mutex<Vec<(usize, Quarantined)>>,
}

impl<F: Frames> Work<'_, F> {
    fn run(&self) -> Result<(), Stop> {
        let total = self.frames.len();
        let batch = (BATCH_BYTES / self.frame_bytes).clamp(1, BATCH_FRAMES);
        let mut scratch = self.frames.scratch();
        let mut pixels = vec![0u8; batch * self.frame_bytes];
        loop {
            let first = self.next.fetch_add(batch, Ordering::Relaxed);
            if first >= total {
                return Ok(());
            }
            let indices = first..total.min(first + batch);
            for (index, out) in indices.clone().zip(pixels.chunks_exact_mut(self.frame_bytes)) {
                self.job.check().map_err(Stop::Job)?;
                if let Err(refusal) = self.frames.draw(index, &mut scratch, out) {
                    out.fill(0);
                    self.refused().push((index, refusal.of(self.frames.name(index))));
                }
            }
            let bytes = &pixels[..indices.len() * self.frame_bytes];
            if let Err(error) = self.file.write_all_at(bytes, first as u64 * self.frame_bytes as u64) {
                // The others would fail too: let them end.
                self.next.store(total, Ordering::Relaxed);
                return Err(Stop::Write(error));
            }
            let done = self.done.fetch_add(indices.len() as u64, Ordering::Relaxed) + indices.len() as u64;
            let quarantined = self.refused().len() as u64;
            let stage = self.frames.stage();
            self.job.report(Progress { stage, done, total: Some(total as u64), quarantined });
        }
    }

    fn refused(&self) -> std::sync::MutexGuard<'_, Vec<(usize, Quarantined)>> {
        self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
