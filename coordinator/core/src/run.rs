//! [`Run`]: one run's state, and [`Attempt`]: the group of workers that is at it.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{CellShape, GridKind, MemberEnd, MetricsLine, RequestId, SessionId, Tile};
use crate::ids::Step;
use crate::record::RunRecord;
use crate::slots::SlotRange;
use crate::time::Timestamp;

/// Weight of the newest step in the running means: about the last 20 steps count.
const MEAN_WEIGHT: f64 = 0.1;
/// Grids that are begun and not whole. Members are never more than one grid apart, so this is never reached.
const MAX_OPEN_GRIDS: usize = 16;
/// Limits against absurd tiles: 4096 cells, images of 1024 pixels, 256 MiB in all.
const MAX_CELLS: u32 = 4096;
const MAX_SIDE: u32 = 1024;
const MAX_GRID_BYTES: u64 = 256 << 20;

/// A run, waiting, active or ended.
#[derive(Debug)]
pub struct Run {
    /// What outlives the coordinator.
    pub record: RunRecord,
    /// The newest line of metrics.
    pub last: Option<MetricsLine>,
    /// Running means of this attempt.
    pub means: Means,
    /// Present while the run is active.
    pub attempt: Option<Attempt>,
    /// The client that waits for the first save.
    pub submitter: Option<RequestId>,
}

impl Run {
    /// A run without a group.
    #[must_use]
    pub fn new(record: RunRecord, submitter: Option<RequestId>) -> Self {
        Self { record, last: None, means: Means::default(), attempt: None, submitter }
    }

    /// Training time up to `now`, all attempts together, in milliseconds.
    #[must_use]
    pub fn elapsed_ms(&self, now: Timestamp) -> u64 {
        let running_since = self.attempt.as_ref().and_then(|attempt| attempt.training_since);
        self.record.elapsed_ms + running_since.map_or(0, |since| now.since_ms(since))
    }
}

/// Exponential means of step times, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Means {
    /// From one report to the next, pauses for grids and checkpoints included: what an ETA needs.
    pub pace_s: Option<f64>,
    /// The steps' own time.
    pub step_s: Option<f64>,
    /// Of that, computing.
    pub compute_s: Option<f64>,
    /// Of that, waiting for images.
    pub data_s: Option<f64>,
    /// Of that, waiting for the exchange.
    pub exchange_s: Option<f64>,
}

impl Means {
    /// Takes in a step that was reported `interval_s` after the one before.
    pub fn add(&mut self, line: &MetricsLine, interval_s: f64) {
        let mix = |mean: &mut Option<f64>, value: f64| {
            *mean = Some(mean.map_or(value, |mean| mean + MEAN_WEIGHT * (value - mean)));
        };
        mix(&mut self.pace_s, interval_s);
        mix(&mut self.step_s, line.step_s);
        mix(&mut self.compute_s, line.compute_s);
        mix(&mut self.data_s, line.data_s);
        mix(&mut self.exchange_s, line.exchange_s);
    }
}

/// How far a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `run.json` with the new generation is being written; nobody was told yet. So a generation is never
    /// given out twice, even if the coordinator dies here.
    Saving,
    /// Members load shards and state.
    Preparing,
    /// Members train, or bring the last step to its end.
    Training,
    /// All members are through; the last files are being written.
    Flushing,
}

/// A group of workers at a run, under one generation.
#[derive(Debug)]
pub struct Attempt {
    /// How far it is.
    pub stage: Stage,
    /// By rank.
    pub members: Vec<Member>,
    /// When the members were told to start.
    pub training_since: Option<Timestamp>,
    /// When the newest step was reported.
    pub reported: Timestamp,
    /// Grids of which some cells have come.
    pub open_grids: BTreeMap<(Step, GridKind), OpenGrid>,
    /// Grids on their way to the store.
    pub storing: BTreeSet<(Step, GridKind)>,
    /// Checkpoints whose manifest is being written.
    pub committing: BTreeSet<Step>,
    /// A broken link whose cause is not known yet.
    pub suspicion: Option<Suspicion>,
}

impl Attempt {
    /// A group that nobody was told of yet.
    #[must_use]
    pub fn new(now: Timestamp, members: Vec<Member>) -> Self {
        Self {
            stage: Stage::Saving,
            members,
            training_since: None,
            reported: now,
            open_grids: BTreeMap::new(),
            storing: BTreeSet::new(),
            committing: BTreeSet::new(),
            suspicion: None,
        }
    }

    /// Rank of a session.
    #[must_use]
    pub fn rank_of(&self, session: SessionId) -> Option<usize> {
        self.members.iter().position(|member| member.session == session)
    }

    /// Adds a tile; returns the grid's pixels when it became whole.
    ///
    /// # Errors
    /// In words, when the tile does not fit the grid.
    pub fn add_tile(&mut self, tile: &Tile) -> Result<Option<Vec<u8>>, String> {
        let key = (tile.step, tile.kind);
        if self.storing.contains(&key) {
            return Err("the grid is whole already".to_owned());
        }
        let cells = tile_cells(tile)?;
        if !self.open_grids.contains_key(&key) && self.open_grids.len() >= MAX_OPEN_GRIDS {
            return Err(format!("{MAX_OPEN_GRIDS} grids are begun and not whole"));
        }
        let grid = self.open_grids.entry(key).or_insert_with(|| OpenGrid::new(tile));
        grid.add(tile, cells)?;
        if grid.missing > 0 {
            return Ok(None);
        }
        self.storing.insert(key);
        Ok(self.open_grids.remove(&key).map(|grid| grid.pixels))
    }
}

/// Number of cells in a tile.
fn tile_cells(tile: &Tile) -> Result<u32, String> {
    let CellShape { height, width, channels } = tile.cell;
    let sides = 1..=MAX_SIDE;
    if !sides.contains(&height) || !sides.contains(&width) || !matches!(channels, 1 | 3) {
        return Err(format!("cells of {height}x{width}x{channels} cannot be"));
    }
    let cell_bytes = u64::from(height) * u64::from(width) * u64::from(channels);
    let total = u64::from(tile.cells_total);
    if total == 0 || total > u64::from(MAX_CELLS) || total * cell_bytes > MAX_GRID_BYTES {
        return Err(format!("a grid of {total} cells cannot be"));
    }
    let cells = tile.pixels.len() as u64 / cell_bytes;
    if cells == 0
        || cells * cell_bytes != tile.pixels.len() as u64
        || u64::from(tile.first_cell) + cells > total
    {
        return Err(format!("{} bytes from cell {} do not fit", tile.pixels.len(), tile.first_cell));
    }
    Ok(cells as u32)
}

/// A grid of which some cells have come.
#[derive(Debug)]
pub struct OpenGrid {
    cell: CellShape,
    came: Vec<bool>,
    missing: usize,
    pixels: Vec<u8>,
}

impl OpenGrid {
    fn new(tile: &Tile) -> Self {
        let cells = tile.cells_total as usize;
        let bytes = cells * (tile.cell.height * tile.cell.width * tile.cell.channels) as usize;
        Self { cell: tile.cell, came: vec![false; cells], missing: cells, pixels: vec![0; bytes] }
    }

    fn add(&mut self, tile: &Tile, cells: u32) -> Result<(), String> {
        if tile.cell != self.cell || tile.cells_total as usize != self.came.len() {
            return Err("another member's tile has another shape".to_owned());
        }
        let first = tile.first_cell as usize;
        for came in &mut self.came[first..first + cells as usize] {
            self.missing -= usize::from(!*came);
            *came = true;
        }
        let start = first * (tile.pixels.len() / cells as usize);
        self.pixels[start..start + tile.pixels.len()].copy_from_slice(&tile.pixels);
        Ok(())
    }
}

/// A worker in its group.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its connection.
    pub session: SessionId,
    /// Its name.
    pub name: String,
    /// Name, host and process, for sentences.
    pub introduction: String,
    /// Where its collective listens.
    pub ring_address: String,
    /// Its share of the slots.
    pub slots: SlotRange,
    /// Has everything in memory.
    pub prepared: bool,
    /// Is through.
    pub ended: Option<MemberEnd>,
}

/// A survivor reported a broken link; the culprit is not known yet.
#[derive(Debug, Clone)]
pub struct Suspicion {
    /// When it was reported.
    pub since: Timestamp,
    /// Finished steps then.
    pub step: Step,
    /// Rank of the reporter.
    pub reporter: usize,
    /// Rank of the peer behind the link.
    pub suspect: Option<usize>,
    /// The reporter's words.
    pub message: String,
}
