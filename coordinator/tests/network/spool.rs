//! [`Spool`]: what a member keeps until the coordinator has it, after worker/src/trainer/spool.rs.

use std::collections::{BTreeMap, BTreeSet};

use takuma_proto::v1;
use takuma_proto::v1::worker_message::Message;

const GENERATED: i32 = v1::sample_tile::Kind::Generated as i32;

/// Results on their way.
#[derive(Default)]
pub struct Spool {
    run: String,
    generation: u64,
    rank: u32,
    pub reports: BTreeMap<u64, v1::StepReport>,
    tiles: BTreeMap<(u64, i32), v1::SampleTile>,
    uploads: BTreeMap<u64, v1::CheckpointUploaded>,
    news: Vec<Message>,
    /// The newest checkpoint that is known to be committed.
    pub committed: u64,
    /// Grids that are known to be stored.
    pub grids: BTreeSet<u64>,
    sent: Sent,
}

/// What this session has sent already.
#[derive(Default)]
struct Sent {
    report: u64,
    tiles: BTreeSet<(u64, i32)>,
    uploads: BTreeSet<u64>,
    news: usize,
}

impl Spool {
    /// Nothing yet, of a run that begins with the checkpoint of a step.
    pub fn new(committed: u64) -> Self {
        Self { committed, ..Self::default() }
    }

    /// Everything goes out under this group from now on.
    pub fn enter(&mut self, seat: &v1::Prepare) {
        self.run.clone_from(&seat.run);
        (self.generation, self.rank) = (seat.generation, seat.rank);
        self.news.clear();
        self.rewind();
    }

    /// A new session: nothing was sent in it yet.
    pub fn rewind(&mut self) {
        self.sent = Sent::default();
    }

    pub fn news(&mut self, message: Message) {
        self.news.push(message);
    }

    pub fn tile(&mut self, tile: v1::SampleTile) {
        let key = (tile.step, tile.kind);
        self.sent.tiles.remove(&key);
        self.tiles.insert(key, tile);
    }

    pub fn upload(&mut self, upload: v1::CheckpointUploaded) {
        self.sent.uploads.remove(&upload.step);
        self.uploads.insert(upload.step, upload);
    }

    pub fn commit(&mut self, step: u64) {
        self.uploads.remove(&step);
        self.committed = self.committed.max(step);
    }

    pub fn keep(&mut self, kept: &v1::Kept) {
        if kept.resend {
            self.rewind();
        }
        self.reports = self.reports.split_off(&(kept.step + 1));
        self.tiles.retain(|&(step, kind), _| match kind {
            GENERATED => !kept.grids.contains(&step),
            _ => !kept.reals,
        });
        self.grids = kept.grids.iter().copied().collect();
    }

    /// The next message to send; it counts as sent.
    pub fn next(&mut self) -> Option<Message> {
        if let Some(message) = self.news.get(self.sent.news) {
            self.sent.news += 1;
            return Some(message.clone());
        }
        let (run, generation) = (self.run.clone(), self.generation);
        // Every member knows the reports; rank 0 sends them.
        if self.rank == 0
            && let Some((&step, report)) = self.reports.range(self.sent.report + 1..).next()
        {
            self.sent.report = step;
            return Some(Message::StepReport(v1::StepReport { run, generation, ..report.clone() }));
        }
        if let Some((&key, tile)) = self.tiles.iter().find(|(key, _)| !self.sent.tiles.contains(key)) {
            self.sent.tiles.insert(key);
            return Some(Message::SampleTile(v1::SampleTile { run, generation, ..tile.clone() }));
        }
        let unsent = |(step, _): &(&u64, &v1::CheckpointUploaded)| !self.sent.uploads.contains(step);
        let (&step, upload) = self.uploads.iter().find(unsent)?;
        self.sent.uploads.insert(step);
        Some(Message::CheckpointUploaded(v1::CheckpointUploaded { run, generation, ..upload.clone() }))
    }
}
