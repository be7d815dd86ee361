//! [`Records`]: `run.json` of every run, each write in place of the version that this coordinator read or wrote last.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use takuma_core::layout;
use takuma_core::record::{RunRecord, writer_of};
use takuma_store::{Store, StoreError, Version};

use super::fenced;
use super::persist::{Patience, persist};

/// Late writes of a predecessor that a successor sits out at its start, one by one. Each run has one writer, so there is
/// at most one.
const TRIES_TO_TAKE_OVER: u32 = 5;

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Another coordinator works on the store: end.
    #[error("another coordinator has written {0} since; it works on the store now")]
    Lost(String),
    /// Give the new run another name.
    #[error("{0} exists already; give the run another --name")]
    Exists(String),
    /// The store's last error, in words.
    #[error("{0}")]
    Store(String),
}

/// The records as this coordinator knows them. Cheap to clone.
///
/// Every write carries this coordinator's id and a number. So of two records that look at a version, each sees which
/// of them made it; and no two writes are equal, which matters where a store derives versions from contents.
#[derive(Debug, Clone)]
pub struct Records {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The folder of all runs: where it is a local one, they share its lock. The lease has another one, so a write
    /// that waits for a valid lease does not hinder its renewal.
    runs: Store,
    id: String,
    writes: AtomicU64,
    /// By run. Locked for look-ups only.
    versions: Mutex<HashMap<String, Version>>,
}

impl Records {
    /// Knows no record yet. `id` is of this coordinator alone.
    #[must_use]
    pub fn new(store: &Store, id: String) -> Self {
        let (runs, writes, versions) = (store.at(layout::RUNS_FOLDER), AtomicU64::new(0), Mutex::default());
        Self { shared: Arc::new(Shared { runs, id, writes, versions }) }
    }

    /// Reads a run's record, at the start. One that is not ended is written again as it is: whatever its last
    /// coordinator has under way for it comes too late then.
    ///
    /// # Errors
    /// The store does not answer. The inner error tells in words why the record cannot be used.
    pub async fn take_over(&self, run: &str) -> Result<Result<RunRecord, String>, StoreError> {
        let object = object(run);
        for _ in 0..TRIES_TO_TAKE_OVER {
            let Some((json, version)) = self.shared.runs.get_versioned(&object).await? else {
                return Ok(Err("there is none".to_owned()));
            };
            let record = match RunRecord::from_json(&json) {
                Ok(record) if record.name == run => record,
                Ok(record) => return Ok(Err(format!("it is the one of run '{}'", record.name))),
                Err(reason) => return Ok(Err(reason)),
            };
            let version = if record.status.is_ended() {
                Some(version)
            } else {
                self.shared.runs.replace_versioned(&object, self.sealed(&record), &version).await?
            };
            if let Some(version) = version {
                self.versions().insert(run.to_owned(), version);
                return Ok(Ok(record));
            }
        }
        Err(StoreError::Busy { action: "write", url: self.url(run) })
    }

    /// Writes the first record of a new run.
    ///
    /// # Errors
    /// [`SaveError::Exists`], or the store's answer.
    pub async fn create(&self, patience: &Patience, record: &RunRecord) -> Result<(), SaveError> {
        let written = self.write(patience, record, None, |_| true).await?;
        written.then_some(()).ok_or_else(|| SaveError::Exists(self.url(&record.name)))
    }

    /// Writes a record in place of the one before.
    ///
    /// # Errors
    /// [`SaveError::Lost`], or the store's answer.
    pub async fn save(&self, patience: &Patience, record: &RunRecord) -> Result<(), SaveError> {
        let known = self.versions().get(&record.name).cloned();
        // A write of ours that failed may have landed since: it stands back behind this one.
        let theirs = |present: &[u8]| !self.is_ours(present);
        let written = self.write(patience, record, known, theirs).await?;
        written.then_some(()).ok_or_else(|| SaveError::Lost(self.url(&record.name)))
    }

    async fn write(
        &self,
        patience: &Patience,
        record: &RunRecord,
        known: Option<Version>,
        give_way: impl Fn(&[u8]) -> bool,
    ) -> Result<bool, SaveError> {
        let (object, content) = (object(&record.name), self.sealed(record));
        let runs = &self.shared.runs;
        let call = || fenced::write(runs, &object, &content, known.as_ref(), &give_way);
        let Some(version) = persist(patience, call).await.map_err(SaveError::Store)? else {
            return Ok(false);
        };
        self.versions().insert(record.name.clone(), version);
        Ok(true)
    }

    fn sealed(&self, record: &RunRecord) -> Bytes {
        let number = self.shared.writes.fetch_add(1, Ordering::Relaxed);
        Bytes::from(record.to_sealed_json(&format!("{}-{number}", self.shared.id)))
    }

    fn is_ours(&self, json: &[u8]) -> bool {
        let writer = writer_of(json).and_then(|writer| writer.rsplit_once('-'));
        writer.is_some_and(|(id, _)| id == self.shared.id)
    }

    fn versions(&self) -> MutexGuard<'_, HashMap<String, Version>> {
        self.shared.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn url(&self, run: &str) -> String {
        format!("{}/{}", self.shared.runs.url(), object(run))
    }
}

/// Name of a run's record in the folder of all runs.
fn object(run: &str) -> String {
    format!("{run}/{}", layout::RUN_FILE)
}
