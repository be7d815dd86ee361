//! [`Uploader`]: writes snapshots to the store while training goes on.

use std::time::Duration;

use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::ids::Generation;
use takuma_core::layout::{checkpoint_folder, part_file};
use takuma_proto::v1::ObjectPart;
use takuma_store::{Store, StoreError};
use tokio::sync::{mpsc, oneshot};

use super::restore::hex_sha256;
use super::snapshot::Snapshot;

/// Tries before a checkpoint is given up; each may itself retry for half a minute.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// All parts of one checkpoint lie in the store.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Finished steps.
    pub step: u64,
    /// Name, size and digest by part.
    pub parts: Vec<ObjectPart>,
    /// Over generator then discriminator.
    pub weights_sha256: String,
}

type Outcome = Result<Finished, String>;

/// The trainer's end of the upload task. At most one snapshot waits while one is written, so memory
/// holds three copies of the state at most: the live one and two snapshots.
pub struct Uploader {
    jobs: mpsc::Sender<(Snapshot, Generation, oneshot::Sender<Outcome>)>,
}

impl Uploader {
    /// Starts the upload task of a run. `announce` is called for each checkpoint that lies in the
    /// store, in order. The task ends when the uploader is dropped and its jobs are done.
    pub fn start(run: Store, announce: impl Fn(Finished) + Send + 'static) -> Self {
        let (jobs, mut inbox) = mpsc::channel::<(Snapshot, Generation, oneshot::Sender<Outcome>)>(1);
        tokio::spawn(async move {
            while let Some((snapshot, writer, reply)) = inbox.recv().await {
                let outcome = write(&run, snapshot, writer).await;
                match &outcome {
                    Ok(finished) => announce(finished.clone()),
                    Err(error) => tracing::warn!("{error}"),
                }
                // Periodic checkpoints are not waited for: nobody may be listening.
                drop(reply.send(outcome));
            }
        });
        Self { jobs }
    }

    /// Hands over a snapshot of the group of generation `writer` without waiting; `false` if two are still under way.
    pub fn offer(&self, snapshot: Snapshot, writer: Generation) -> bool {
        let (reply, _) = oneshot::channel();
        self.jobs.try_send((snapshot, writer, reply)).is_ok()
    }

    /// Writes a snapshot of the group of generation `writer` and waits until it lies in the store. Not for async code.
    ///
    /// # Errors
    /// In words: the store's answer after every attempt.
    pub fn write_through(&self, snapshot: Snapshot, writer: Generation) -> Result<Finished, String> {
        let (reply, outcome) = oneshot::channel();
        let gone = "the upload task is gone";
        self.jobs.blocking_send((snapshot, writer, reply)).map_err(|_| gone.to_owned())?;
        outcome.blocking_recv().map_err(|_| gone.to_owned())?
    }
}

async fn write(run: &Store, snapshot: Snapshot, writer: Generation) -> Result<Finished, String> {
    let step = snapshot.step;
    let told = |reason: String| format!("the checkpoint of step {step} was not written: {reason}");
    let prepared = tokio::task::spawn_blocking(move || {
        let files = snapshot.serialize().map_err(|error| error.to_string())?;
        let weights_sha256 = hex_sha256(&[&files[0], &files[1]]);
        let parts = files
            .iter()
            .zip(CHECKPOINT_PARTS)
            .map(|(file, name)| ObjectPart {
                name: part_file(writer, name),
                size_bytes: file.len() as u64,
                sha256: hex_sha256(&[file]),
            })
            .collect();
        Ok((files.map(bytes::Bytes::from), Finished { step, parts, weights_sha256 }))
    });
    let (files, finished) = prepared.await.map_err(|error| told(error.to_string()))?.map_err(told)?;
    let folder = run.at(&checkpoint_folder(step));
    for (file, part) in files.into_iter().zip(&finished.parts) {
        put(&folder, &part.name, file).await.map_err(|error| told(error.to_string()))?;
    }
    Ok(finished)
}

async fn put(folder: &Store, name: &str, content: bytes::Bytes) -> Result<(), StoreError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        match folder.put(name, content.clone()).await {
            Ok(()) => return Ok(()),
            Err(error @ StoreError::Failed { .. }) => tracing::warn!("{error}; trying again"),
            Err(error) => return Err(error),
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    folder.put(name, content).await
}
