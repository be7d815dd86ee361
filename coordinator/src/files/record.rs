//! [`RecordFile`]: `run.json`. What has to be known after a crash is written at once; how far the run is, once a second.

use std::time::Duration;

use takuma_core::record::RunRecord;
use tokio::time::Instant;

use super::persist::Patience;
use super::records::{Records, SaveError};

/// A record that tells only of more steps waits so long after the one before.
const PERIOD: Duration = Duration::from_secs(1);

/// The record that was written last, and one that waits.
#[derive(Debug)]
pub struct RecordFile {
    records: Records,
    written: Option<(RunRecord, Instant)>,
    /// With the time at which it is due.
    waiting: Option<(Box<RunRecord>, Instant)>,
}

impl RecordFile {
    /// Nothing was written yet.
    #[must_use]
    pub fn new(records: Records) -> Self {
        Self { records, written: None, waiting: None }
    }

    /// Writes the first record of a new run.
    ///
    /// # Errors
    /// As [`Records::create`].
    pub async fn create(&mut self, patience: &Patience, record: &RunRecord) -> Result<(), SaveError> {
        self.records.create(patience, record).await?;
        self.written = Some((record.clone(), Instant::now()));
        Ok(())
    }

    /// Writes a record, now or, if nothing depends on it, a little later.
    ///
    /// # Errors
    /// As [`Records::save`].
    pub async fn save(
        &mut self,
        patience: &Patience,
        record: Box<RunRecord>,
        at_once: bool,
    ) -> Result<(), SaveError> {
        let now = Instant::now();
        let due = if at_once { now } else { self.due_of(&record).unwrap_or(now) };
        self.waiting = Some((record, due));
        if due <= now { self.flush(patience).await } else { Ok(()) }
    }

    /// When a record should be written that only tells of more steps than the one before; `None` of another one.
    fn due_of(&self, record: &RunRecord) -> Option<Instant> {
        let (written, at) = self.written.as_ref()?;
        let RunRecord { step, elapsed_ms, pace_s, .. } = *record;
        let only_further = RunRecord { step, elapsed_ms, pace_s, ..written.clone() } == *record;
        only_further.then(|| *at + PERIOD)
    }

    /// When the record that waits should be written; `None` if there is none.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|&(_, due)| due)
    }

    /// Writes the record that waits.
    ///
    /// # Errors
    /// As [`Records::save`].
    pub async fn flush(&mut self, patience: &Patience) -> Result<(), SaveError> {
        let Some((record, _)) = self.waiting.take() else { return Ok(()) };
        self.records.save(patience, &record).await?;
        self.written = Some((*record, Instant::now()));
        Ok(())
    }
}
