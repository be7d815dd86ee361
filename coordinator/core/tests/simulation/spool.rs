//! [`Spool`]: what a simulated member keeps until the coordinator has it, after worker/src/trainer/spool.rs.

use std::collections::{BTreeMap, BTreeSet};

use takuma_core::event::*;
use takuma_core::ids::{Generation, Step};

use crate::net::Up;
use crate::support::{step_report, upload};

/// Messages of one kind in one go.
const BATCH: usize = 64;

/// A finished step, as its members know it.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    pub step: Step,
    pub fed: u64,
    pub hash: u64,
}

/// Results on their way to the coordinator.
#[derive(Debug, Default)]
pub struct Spool {
    run: String,
    generation: Generation,
    rank: u32,
    pub reports: BTreeMap<Step, Report>,
    tiles: BTreeMap<(Step, GridKind), Tile>,
    uploads: BTreeMap<Step, u64>,
    news: Vec<Up>,
    pub kept: Stored,
    /// Some reports came from a peer since the store's word of them came last.
    pub given: bool,
    pub committed: Step,
    sent_reports: Step,
    sent_tiles: BTreeSet<(Step, GridKind)>,
    sent_uploads: BTreeSet<Step>,
    sent_news: usize,
}

impl Spool {
    pub fn new(fence: &Fence, rank: u32) -> Self {
        Self { run: fence.run.clone(), generation: fence.generation, rank, ..Self::default() }
    }

    pub fn enter(&mut self, generation: Generation, rank: u32) {
        (self.generation, self.rank) = (generation, rank);
        self.news.clear();
        self.rewind();
    }

    /// A new session: nothing was sent in it yet.
    pub fn rewind(&mut self) {
        self.sent_reports = 0;
        self.sent_tiles.clear();
        self.sent_uploads.clear();
        self.sent_news = 0;
    }

    pub fn report(&mut self, report: Report) {
        self.reports.insert(report.step, report);
    }

    pub fn tile(&mut self, tile: Tile) {
        let key = (tile.step, tile.kind);
        self.sent_tiles.remove(&key);
        self.tiles.insert(key, tile);
    }

    pub fn upload(&mut self, step: Step, hash: u64) {
        self.uploads.insert(step, hash);
        if self.uploads.len() > 8 {
            self.uploads.pop_first();
        }
    }

    pub fn news(&mut self, message: Up) {
        self.news.push(message);
    }

    pub fn keep(&mut self, stored: Stored, resend: bool) {
        if resend {
            self.rewind();
        }
        self.reports = self.reports.split_off(&(stored.step + 1));
        self.tiles.retain(|&(step, kind), _| match kind {
            GridKind::Generated => !stored.grids.contains(&step),
            GridKind::Reals => !stored.reals,
        });
        self.kept = stored;
        self.given = false;
    }

    pub fn commit(&mut self, step: Step) {
        self.uploads.remove(&step);
        self.committed = self.committed.max(step);
    }

    pub fn has_unsent(&self) -> bool {
        let reports = self.rank == 0 && self.reports.range(self.sent_reports + 1..).next().is_some();
        reports
            || self.sent_news < self.news.len()
            || self.tiles.keys().any(|key| !self.sent_tiles.contains(key))
            || self.uploads.keys().any(|step| !self.sent_uploads.contains(step))
    }

    /// The next messages to send, in order.
    pub fn take_unsent(&mut self) -> Vec<Up> {
        let fence = Fence { run: self.run.clone(), generation: self.generation };
        let mut messages = self.news[self.sent_news..].to_vec();
        self.sent_news = self.news.len();
        if self.rank == 0 {
            for (&step, report) in self.reports.range(self.sent_reports + 1..).take(BATCH) {
                self.sent_reports = step;
                // The hash of the weights travels as the bits of a loss, so that the stored lines tell it.
                let d_loss = f64::from_bits(report.hash >> 12);
                let told = StepReport { fed: report.fed, d_loss, ..step_report(fence.clone(), step) };
                messages.push(Up::Step(told));
            }
        }
        let unsent: Vec<_> =
            self.tiles.keys().filter(|key| !self.sent_tiles.contains(key)).copied().collect();
        for key in unsent.into_iter().take(BATCH) {
            self.sent_tiles.insert(key);
            messages.push(Up::Tile(Tile { fence: fence.clone(), ..self.tiles[&key].clone() }));
        }
        for (&step, hash) in self.uploads.iter().filter(|(step, _)| !self.sent_uploads.contains(step)) {
            let weights_sha256 = format!("{hash:016x}");
            messages.push(Up::Upload(Upload { weights_sha256, ..upload(fence.clone(), step) }));
        }
        self.sent_uploads.extend(self.uploads.keys());
        messages
    }
}
