//! [`Spool`]: what the coordinator must get, kept until it has it.
//!
//! The trainer puts results in and never waits for the network; the session takes out what it has not sent
//! yet. A new session, or a new rank 0, sends again what was not confirmed as stored. Every rank keeps the
//! metrics, since all know them and any may be rank 0 next.
//!
//! What waits is bounded: while much of it does, since the store is away, each step ends with a pause of a second. So
//! what is left of the room lasts for longer than anybody waits for a store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use takuma_proto::v1::worker_message::Message;
use takuma_proto::v1::{CheckpointUploaded, Kept, SampleTile, StepReport, sample_tile};
use tokio::sync::Notify;

use crate::checkpoint::Finished;

/// Metrics that wait for the store: hours of a coordinator's absence at a step a second.
const MAX_REPORTS: usize = 100_000;
/// From here on each step pauses. The coordinator rewrites its file of metrics before so many lines are new in it.
const MANY_REPORTS: usize = 75_000;
/// Grids whose part waits. The coordinator takes as many that are begun.
const MAX_TILES: usize = 224;
/// From here on each step pauses: the grids of a whole run of dcgan-celeba, which a GPU makes in seconds.
const MANY_TILES: usize = 160;
/// Pixels that wait, for grids that are larger than 64 images of 64x64.
const MANY_TILE_BYTES: usize = 128 << 20;
/// A longer one would look to the other members like a worker that is gone.
const PAUSE: Duration = Duration::from_secs(1);
/// Checkpoints that were uploaded and not confirmed.
const MAX_UPLOADS: usize = 8;
/// Messages of one kind in one go, so that heartbeats are not kept waiting behind a long backlog.
const BATCH: usize = 64;

/// Whose results these are: stamped on every message when it is sent.
#[derive(Debug, Clone, Default)]
pub struct Stamp {
    /// The run.
    pub run: String,
    /// The present group.
    pub generation: u64,
    /// This worker's place in it.
    pub rank: u32,
}

/// Results on their way to the coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Spool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Notify,
    /// Told when the store has more of it.
    room: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    stamp: Stamp,
    /// By step.
    reports: BTreeMap<u64, StepReport>,
    /// By step and kind.
    tiles: BTreeMap<(u64, i32), SampleTile>,
    /// By step.
    uploads: BTreeMap<u64, CheckpointUploaded>,
    /// What the group came to: formed, ended, failed. In order, sent once a session.
    news: Vec<Message>,
    kept: Kept,
    committed: u64,
    sent: Sent,
    /// Steps pause at present.
    pauses: bool,
}

impl Inner {
    /// Whether so much waits that training has to.
    fn is_crowded(&self) -> bool {
        let bytes = || self.tiles.values().map(|tile| tile.pixels.len()).sum::<usize>();
        self.reports.len() >= MANY_REPORTS || self.tiles.len() >= MANY_TILES || bytes() >= MANY_TILE_BYTES
    }
}

/// What the present session has sent.
#[derive(Debug, Default)]
struct Sent {
    reports: u64,
    tiles: BTreeSet<(u64, i32)>,
    uploads: BTreeSet<u64>,
    news: usize,
}

impl Spool {
    /// An empty spool for a run.
    #[must_use]
    pub fn new(stamp: Stamp) -> Self {
        let inner = Inner { stamp, ..Inner::default() };
        let shared = Shared { inner: Mutex::new(inner), changed: Notify::new(), room: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes under the lock, then wakes the session.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let result = change(&mut self.lock());
        self.shared.changed.notify_one();
        result
    }

    /// Waits until something was put in.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// Wakes the session, for what did not fit into one go.
    pub fn wake(&self) {
        self.shared.changed.notify_one();
    }

    /// The worker is in another group now: what the former one came to is no news any more, and a new
    /// rank 0 sends the metrics that are not stored yet.
    pub fn enter(&self, generation: u64, rank: u32) {
        self.change(|inner| {
            inner.stamp.generation = generation;
            inner.stamp.rank = rank;
            inner.news.clear();
            inner.sent = Sent::default();
        });
    }

    /// A new session: nothing was sent in it yet.
    pub fn rewind(&self) {
        self.change(|inner| inner.sent = Sent::default());
    }

    /// Ends a step of the trainer's thread: waits for a second while much waits for the store, and only as long as that
    /// lasts.
    pub fn pace(&self) {
        self.pause(PAUSE);
    }

    fn pause(&self, longest: Duration) {
        let inner = self.lock();
        let crowded = inner.is_crowded();
        let waited = self.shared.room.wait_timeout_while(inner, longest, |inner| inner.is_crowded());
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if crowded && !inner.pauses {
            let (reports, tiles) = (inner.reports.len(), inner.tiles.len());
            tracing::warn!(reports, tiles, "training pauses after each step: too much waits for the store");
        } else if !crowded && inner.pauses {
            tracing::info!("training goes on at full speed: the store is back");
        }
        inner.pauses = crowded;
    }

    /// Adds a finished step.
    pub fn report(&self, report: StepReport) {
        self.change(|inner| {
            inner.reports.insert(report.step, report);
            if inner.reports.len() > MAX_REPORTS {
                let lost = inner.reports.pop_first();
                tracing::error!(
                    step = lost.map_or(0, |(step, _)| step),
                    "the metrics of a step are lost: too many wait"
                );
            }
        });
    }

    /// Adds a part of a grid.
    pub fn tile(&self, tile: SampleTile) {
        self.change(|inner| {
            let key = (tile.step, tile.kind);
            inner.sent.tiles.remove(&key);
            inner.tiles.insert(key, tile);
            if inner.tiles.len() > MAX_TILES {
                let lost = inner.tiles.pop_first();
                tracing::error!(
                    step = lost.map_or(0, |((step, _), _)| step),
                    "a part of a grid is lost: too many wait"
                );
            }
        });
    }

    /// Adds a checkpoint that lies in the store.
    pub fn upload(&self, finished: Finished) {
        self.change(|inner| {
            let upload = CheckpointUploaded {
                run: String::new(),
                generation: 0,
                step: finished.step,
                parts: finished.parts,
                weights_sha256: finished.weights_sha256,
            };
            inner.uploads.insert(finished.step, upload);
            if inner.uploads.len() > MAX_UPLOADS {
                inner.uploads.pop_first();
            }
        });
    }

    /// Adds what the group came to.
    pub fn news(&self, message: Message) {
        self.change(|inner| inner.news.push(message));
    }

    /// The store has these. What else was sent may have come before the coordinator could take it.
    pub fn kept(&self, kept: Kept) {
        if kept.resend {
            self.rewind();
        }
        let mut inner = self.lock();
        inner.reports = inner.reports.split_off(&(kept.step + 1));
        let generated = i32::from(sample_tile::Kind::Generated);
        inner.tiles.retain(|&(step, kind), _| match kind == generated {
            true => !kept.grids.contains(&step),
            false => !kept.reals,
        });
        inner.kept = kept;
        drop(inner);
        self.shared.room.notify_all();
    }

    /// The manifest of this step's checkpoint is written; nobody needs older ones that are not.
    pub fn committed(&self, step: u64) {
        let mut inner = self.lock();
        inner.uploads = inner.uploads.split_off(&(step + 1));
        inner.committed = inner.committed.max(step);
    }

    /// The newest checkpoint that is known to be committed.
    #[must_use]
    pub fn committed_step(&self) -> u64 {
        self.lock().committed
    }

    /// Which results the store is known to have.
    #[must_use]
    pub fn known_kept(&self) -> Kept {
        self.lock().kept.clone()
    }

    /// Metrics that are not known to be stored, for a peer that takes over the state.
    #[must_use]
    pub fn unkept_reports(&self) -> Vec<StepReport> {
        self.lock().reports.values().cloned().collect()
    }

    /// Whether [`Spool::take_unsent`] would return anything.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        let inner = self.lock();
        let reports = inner.stamp.rank == 0 && inner.reports.range(inner.sent.reports + 1..).next().is_some();
        reports
            || inner.sent.news < inner.news.len()
            || inner.tiles.keys().any(|key| !inner.sent.tiles.contains(key))
            || inner.uploads.keys().any(|step| !inner.sent.uploads.contains(step))
    }

    /// The next messages to send, in order; empty when all was sent. The news that the run has ended waits until every part
    /// of a grid is sent: what comes behind it is not taken any more.
    #[must_use]
    pub fn take_unsent(&self) -> Vec<Message> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Stamp { run, generation, rank } = inner.stamp.clone();
        let is_end = |message: &Message| matches!(message, Message::RunEnded(_));
        let first = inner.sent.news;
        let before_end =
            inner.news[first..].iter().position(is_end).map_or(inner.news.len(), |at| first + at);
        let mut messages: Vec<Message> = inner.news[first..before_end].to_vec();
        inner.sent.news = before_end;
        if rank == 0 {
            for (&step, report) in inner.reports.range(inner.sent.reports + 1..).take(BATCH) {
                inner.sent.reports = step;
                messages.push(Message::StepReport(StepReport {
                    run: run.clone(),
                    generation,
                    ..report.clone()
                }));
            }
        }
        let unsent = inner.tiles.iter().filter(|(key, _)| !inner.sent.tiles.contains(*key));
        for (&key, tile) in unsent.take(BATCH).collect::<Vec<_>>() {
            inner.sent.tiles.insert(key);
            messages.push(Message::SampleTile(SampleTile { run: run.clone(), generation, ..tile.clone() }));
        }
        let unsent = inner.uploads.iter().filter(|(step, _)| !inner.sent.uploads.contains(*step));
        for (&step, upload) in unsent.take(BATCH).collect::<Vec<_>>() {
            inner.sent.uploads.insert(step);
            messages.push(Message::CheckpointUploaded(CheckpointUploaded {
                run: run.clone(),
                generation,
                ..upload.clone()
            }));
        }
        if inner.tiles.keys().all(|key| inner.sent.tiles.contains(key)) {
            messages.extend_from_slice(&inner.news[inner.sent.news..]);
            inner.sent.news = inner.news.len();
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(rank: u32) -> Spool {
        Spool::new(Stamp { run: "r".into(), generation: 1, rank })
    }

    fn report(step: u64) -> StepReport {
        StepReport { step, ..StepReport::default() }
    }

    fn steps(messages: &[Message]) -> Vec<(u64, u64)> {
        let step = |message: &Message| match message {
            Message::StepReport(report) => Some((report.step, report.generation)),
            _ => None,
        };
        messages.iter().filter_map(step).collect()
    }

    #[test]
    fn a_new_session_and_a_new_rank_0_send_what_is_not_stored() {
        let spool = spool(1);
        (1..=3).for_each(|step| spool.report(report(step)));
        assert!(spool.take_unsent().is_empty(), "only rank 0 sends metrics");
        spool.enter(2, 0);
        assert_eq!(steps(&spool.take_unsent()), [(1, 2), (2, 2), (3, 2)]);
        assert!(spool.take_unsent().is_empty());
        spool.kept(Kept { step: 2, ..Kept::default() });
        spool.rewind();
        assert_eq!(steps(&spool.take_unsent()), [(3, 2)]);
    }

    #[test]
    fn tiles_and_uploads_stay_until_they_are_confirmed() {
        let spool = spool(0);
        let kind = i32::from(sample_tile::Kind::Generated);
        spool.tile(SampleTile { step: 50, kind, ..SampleTile::default() });
        spool.upload(Finished { step: 50, parts: Vec::new(), weights_sha256: String::new() });
        assert_eq!(spool.take_unsent().len(), 2);
        spool.rewind();
        assert_eq!(spool.take_unsent().len(), 2);
        spool.kept(Kept { grids: vec![50], ..Kept::default() });
        spool.committed(50);
        spool.rewind();
        assert!(spool.take_unsent().is_empty());
        assert_eq!(spool.committed_step(), 50);
    }

    #[test]
    fn memory_is_bounded() {
        let spool = spool(0);
        (1..=MAX_REPORTS as u64 + 5).for_each(|step| spool.report(report(step)));
        assert_eq!(spool.unkept_reports().len(), MAX_REPORTS);
    }

    #[test]
    fn steps_pause_while_much_waits_and_go_on_when_the_store_has_it() {
        let (spool, kind) = (spool(0), i32::from(sample_tile::Kind::Generated));
        let tile = |step| SampleTile { step, kind, ..SampleTile::default() };
        (0..MANY_TILES as u64).for_each(|step| spool.tile(tile(step)));
        spool.pause(Duration::from_millis(1));
        assert!(spool.lock().pauses, "it goes on after the pause, as often as it must");
        let trainer = spool.clone();
        // Without the news it would wait for ever.
        let waits = std::thread::spawn(move || trainer.pause(Duration::MAX));
        spool.kept(Kept { grids: vec![3], ..Kept::default() });
        waits.join().unwrap();
        spool.pace();
        assert!(!spool.lock().pauses);
    }

    #[test]
    fn end_of_the_run_is_told_behind_every_part_of_a_grid() {
        let (spool, kind) = (spool(1), i32::from(sample_tile::Kind::Generated));
        let formed = || Message::Formed(takuma_proto::v1::Formed::default());
        let ended = || Message::RunEnded(takuma_proto::v1::RunEnded::default());
        spool.news(formed());
        (0..BATCH as u64 + 1).for_each(|step| spool.tile(SampleTile { step, kind, ..SampleTile::default() }));
        spool.news(ended());
        let first = spool.take_unsent();
        assert_eq!((first.len(), &first[0]), (BATCH + 1, &formed()));
        assert!(spool.has_unsent());
        let second = spool.take_unsent();
        assert!(matches!(&second[..], [Message::SampleTile(_), Message::RunEnded(_)]), "{second:?}");
        assert!(!spool.has_unsent() && spool.take_unsent().is_empty());
    }

    #[test]
    fn large_tiles_count_by_their_bytes() {
        let spool = spool(0);
        let half = || vec![0; MANY_TILE_BYTES / 2];
        spool.tile(SampleTile { step: 1, pixels: half(), ..SampleTile::default() });
        assert!(!spool.lock().is_crowded());
        spool.tile(SampleTile { step: 2, pixels: half(), ..SampleTile::default() });
        assert!(spool.lock().is_crowded());
    }
}
