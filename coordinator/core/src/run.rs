//! [`Run`]: one run's state, with the [`Group`] of workers that is at it and the [`Change`] that comes next.

use std::collections::{BTreeMap, BTreeSet};

use crate::balance::Speed;
use crate::event::{
    CellShape, Claim, Fence, GridKind, MemberEnd, MetricsLine, Peer, RequestId, SessionId, StateSource,
    Stored, Tile, Upload,
};
use crate::ids::{Generation, Step};
use crate::losses::Suspicion;
pub use crate::means::Means;
use crate::record::{RunRecord, RunStatus};
use crate::slots::SlotRange;
use crate::stragglers::Pace;
use crate::time::Timestamp;

/// Grids that are begun and not whole: as many as a worker keeps tiles for. After an absence of the coordinator one
/// member may send all of its tiles before the next one sends any.
pub const MAX_OPEN_GRIDS: usize = 224;
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
    /// Running means of the present group.
    pub means: Means,
    /// The workers at it.
    pub group: Option<Group>,
    /// The group that takes over next.
    pub change: Option<Change>,
    /// After a restart, while members come back.
    pub reunion: Option<Reunion>,
    /// What is under way to the store.
    pub results: Results,
    /// Since when it trains, for the clock that people see.
    pub training_since: Option<Timestamp>,
    /// Generations that the store has reserved for sure.
    pub reserved: Generation,
    /// The store did not take a reservation.
    pub reserve_again: bool,
    /// No generation up to this one is given out any more.
    pub floor: Generation,
    /// A group is to be formed as soon as the store has reserved a generation for it, and why.
    pub regroup_when_saved: Option<String>,
    /// It stops with a checkpoint because its last worker leaves, and goes on when another comes.
    pub pausing: bool,
    /// The two ends of the last broken link, in the order of their names, and the step at which it broke.
    pub last_cut: Option<([String; 2], Step)>,
    /// Workers that failed at this run by themselves, and of what.
    pub unfit: BTreeMap<String, String>,
    /// Members were looked at often enough to judge their shares anew.
    pub(crate) speeds_changed: bool,
    /// The client that waits for the first save.
    pub submitter: Option<RequestId>,
}

impl Run {
    /// A run without a group.
    #[must_use]
    pub fn new(record: RunRecord, submitter: Option<RequestId>) -> Self {
        let reserved = record.generations_reserved;
        Self {
            record,
            last: None,
            means: Means::default(),
            group: None,
            change: None,
            reunion: None,
            results: Results::default(),
            training_since: None,
            reserved,
            reserve_again: false,
            floor: Generation::default(),
            regroup_when_saved: None,
            pausing: false,
            last_cut: None,
            unfit: BTreeMap::new(),
            speeds_changed: false,
            submitter,
        }
    }

    /// Training time up to `now`, all groups together, in milliseconds.
    #[must_use]
    pub fn elapsed_ms(&self, now: Timestamp) -> u64 {
        self.record.elapsed_ms + self.training_since.map_or(0, |since| now.since_ms(since))
    }

    /// Stops the clock that people see.
    pub fn stop_clock(&mut self, now: Timestamp) {
        self.record.elapsed_ms = self.elapsed_ms(now);
        self.training_since = None;
    }

    /// What messages about the present group carry.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence { run: self.record.name.clone(), generation: self.record.generation }
    }

    /// What a member of the present group may believe to be in, when it is told to leave it.
    #[must_use]
    pub fn fences(&self) -> Vec<Fence> {
        let group = self.group.as_ref().filter(|group| !group.formed);
        let former = group.and_then(|group| group.former);
        let former = former.map(|generation| Fence { generation, ..self.fence() });
        former.into_iter().chain([self.fence()]).collect()
    }

    /// What messages about the next group carry.
    #[must_use]
    pub fn change_fence(&self) -> Option<Fence> {
        let generation = self.change.as_ref()?.generation;
        Some(Fence { run: self.record.name.clone(), generation })
    }

    /// Whether its members are to stop after a step: for good, or because all of them leave.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.pausing || self.record.status == RunStatus::Stopping
    }

    /// Whether all members are through, but the metrics up to the end or its checkpoint are neither here nor
    /// under way.
    #[must_use]
    pub fn lacks_results(&self) -> bool {
        let Some(group) = &self.group else { return false };
        let ends: Option<Vec<&MemberEnd>> =
            group.members.iter().map(|member| member.ended.as_ref()).collect();
        let Some(end) = ends.as_ref().and_then(|ends| ends.first()) else { return false };
        self.results.committing.is_empty() && !self.has_results_of(end.step)
    }

    /// Whether the metrics up to a step and its checkpoint are stored or on their way.
    #[must_use]
    pub fn has_results_of(&self, step: Step) -> bool {
        let checkpointed = self.record.checkpoint.as_ref().is_some_and(|mark| mark.step == step);
        self.record.step == step && (step == 0 || checkpointed)
    }

    /// The step that its first group begins with, and where the state for it comes from.
    #[must_use]
    pub fn beginning(&self) -> (Step, StateSource) {
        let own = self.record.checkpoint.as_ref().map(|mark| mark.step);
        let step = own.or(self.record.origin.as_ref().map(|origin| origin.step));
        step.map_or((0, StateSource::Fresh), |step| (step, StateSource::Checkpoint(step)))
    }
}

/// How far a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// `run.json` with the new generation is being written; nobody was told yet. So a generation is never
    /// given out twice, even if the coordinator dies here.
    Saving,
    /// Members of a first group load shards and state.
    Preparing,
    /// Members connect their ring and agree on one state.
    Forming,
    /// Members train, or bring the last step to its end.
    Training,
    /// All members are through; the last files are being written.
    Flushing,
}

/// The workers at a run, under one generation.
#[derive(Debug)]
pub struct Group {
    /// How far it is.
    pub stage: Stage,
    /// By rank.
    pub members: Vec<Member>,
    /// When the newest step was reported.
    pub reported: Timestamp,
    /// A broken link whose cause is not known yet.
    pub suspicion: Option<Suspicion>,
    /// Rank 0 has said that its ring stands.
    pub formed: bool,
    /// The group from which it has taken over. Until its ring stands, members may believe that they are in that one.
    pub former: Option<Generation>,
}

impl Group {
    /// A group that nobody was told of yet.
    #[must_use]
    pub fn new(now: Timestamp, stage: Stage, members: Vec<Member>) -> Self {
        Self { stage, members, reported: now, suspicion: None, formed: false, former: None }
    }

    /// Rank of a session.
    #[must_use]
    pub fn rank_of(&self, session: SessionId) -> Option<usize> {
        self.members.iter().position(|member| member.session == session)
    }

    /// Whether members have state that a next group can go on with.
    #[must_use]
    pub fn has_state(&self) -> bool {
        matches!(self.stage, Stage::Forming | Stage::Training | Stage::Flushing)
    }
}

/// A group that takes over between two steps, when all its members are prepared.
#[derive(Debug)]
pub struct Change {
    /// Its generation.
    pub generation: Generation,
    /// By rank.
    pub members: Vec<Member>,
    /// Everybody was told to change over.
    pub started: bool,
    /// When it was begun.
    pub since: Timestamp,
}

impl Change {
    /// Rank of a session.
    #[must_use]
    pub fn rank_of(&self, session: SessionId) -> Option<usize> {
        self.members.iter().position(|member| member.session == session)
    }
}

/// After a restart: members of the group that was at work come back one by one.
#[derive(Debug)]
pub struct Reunion {
    /// Who does not come until then is not waited for.
    pub until: Timestamp,
    /// What those who came say.
    pub claims: BTreeMap<SessionId, Claim>,
}

/// Results under way to the store, whatever group made them.
#[derive(Debug, Default)]
pub struct Results {
    /// Grids of which some cells have come.
    pub open_grids: BTreeMap<(Step, GridKind), OpenGrid>,
    /// Grids on their way to the store.
    pub storing: BTreeSet<(Step, GridKind)>,
    /// Checkpoints whose manifest is being written.
    pub committing: BTreeSet<Step>,
    /// Checkpoints that came before the metrics up to their step; at most one for each step that is due.
    pub early: BTreeMap<Step, (SessionId, Upload)>,
    /// What the store has.
    pub stored: Stored,
    /// Metrics came with a gap before them, and all since were asked for again: the last step before the gap, and the
    /// furthest one behind it that has come.
    pub gap: Option<(Step, Step)>,
}

impl Results {
    /// Whether a grid needs no more tiles.
    #[must_use]
    pub fn has_grid(&self, step: Step, kind: GridKind) -> bool {
        self.storing.contains(&(step, kind))
            || match kind {
                GridKind::Generated => self.stored.grids.contains(&step),
                GridKind::Reals => self.stored.reals,
            }
    }

    /// Adds a tile; returns the grid's pixels when it became whole. Tiles of a grid that is whole are repeats.
    ///
    /// # Errors
    /// In words, when the tile does not fit the grid.
    pub fn add_tile(&mut self, tile: &Tile) -> Result<Option<Vec<u8>>, String> {
        let key = (tile.step, tile.kind);
        let cells = tile_cells(tile)?;
        if self.has_grid(tile.step, tile.kind) {
            return Ok(None);
        }
        let grid = self.open_grids.entry(key).or_insert_with(|| OpenGrid::new(tile));
        grid.add(tile, cells)?;
        if grid.missing > 0 {
            return Ok(None);
        }
        self.storing.insert(key);
        Ok(self.open_grids.remove(&key).map(|grid| grid.pixels))
    }

    /// Makes room for the grid of a tile, if there is none: the oldest one, whose last tiles went with their worker, is
    /// given up and returned.
    pub fn make_room(&mut self, tile: &Tile) -> Option<Step> {
        let key = (tile.step, tile.kind);
        let is_new = !self.open_grids.contains_key(&key) && !self.has_grid(tile.step, tile.kind);
        if !is_new || self.open_grids.len() < MAX_OPEN_GRIDS {
            return None;
        }
        self.open_grids.pop_first().map(|((step, _), _)| step)
    }

    /// A grid lies in the store.
    pub fn note_stored(&mut self, step: Step, kind: GridKind) {
        match kind {
            GridKind::Generated => {
                self.stored.grids.insert(step);
            }
            GridKind::Reals => self.stored.reals = true,
        }
    }

    /// What it means that a step has come which is not the one after the last.
    pub fn note_gap(&mut self, last: Step, came: Step) -> Gap {
        match &mut self.gap {
            // What is sent again comes in order: it begins with a step that came before.
            Some((before, furthest)) if *before == last && came <= *furthest => Gap::Lost,
            Some((before, furthest)) if *before == last => {
                *furthest = came;
                Gap::Asked
            }
            gap => {
                *gap = Some((last, came));
                Gap::New
            }
        }
    }

    /// Forgets what lies after a step: the run goes on from there.
    pub fn rewind(&mut self, step: Step) {
        self.open_grids.retain(|&(at, _), _| at <= step);
        self.early.clear();
        self.gap = None;
        self.stored.grids.retain(|&at| at <= step);
        self.stored.step = self.stored.step.min(step);
    }
}

/// Steps that are missing before one that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gap {
    /// They may be under way: they are asked for.
    New,
    /// They were asked for.
    Asked,
    /// Nobody has them any more.
    Lost,
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
    /// Its connection; the last one while it is away.
    pub session: SessionId,
    /// Its name.
    pub name: String,
    /// Name, host and process, for sentences.
    pub introduction: String,
    /// Unique to its process.
    pub process_id: String,
    /// Where its collective listens.
    pub ring_address: String,
    /// Its share of the slots.
    pub slots: SlotRange,
    /// Can feed its slots, and has its state or will get it.
    pub prepared: bool,
    /// Has the run's state; one that joins has it when its group stands.
    pub has_state: bool,
    /// Its ring is broken; it waits for the next group.
    pub parked: bool,
    /// Its session broke, and why; it may come back.
    pub away: Option<(Timestamp, String)>,
    /// Is through.
    pub ended: Option<MemberEnd>,
    /// Whether it keeps up with the others.
    pub(crate) pace: Pace,
    /// How fast it was seen to be.
    pub(crate) speed: Speed,
}

impl Member {
    /// As its peers know it.
    #[must_use]
    pub fn peer(&self) -> Peer {
        Peer {
            worker: self.name.clone(),
            process_id: self.process_id.clone(),
            ring_address: self.ring_address.clone(),
            slots: self.slots,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_that_never_becomes_whole_makes_room_for_later_ones() {
        let mut results = Results::default();
        let cell = CellShape { height: 1, width: 1, channels: 1 };
        let mut first_half = |step| {
            let fence = Fence { run: "r".into(), generation: Generation(1) };
            let (kind, pixels) = (GridKind::Generated, vec![0; 4]);
            let tile = Tile { fence, kind, step, first_cell: 0, cells_total: 8, cell, pixels };
            let lost = results.make_room(&tile);
            assert_eq!(results.add_tile(&tile), Ok(None));
            (lost, results.open_grids.len())
        };
        let most = MAX_OPEN_GRIDS as u64;
        assert!((0..most).all(|step| first_half(step).0.is_none()));
        assert_eq!(first_half(most - 1), (None, MAX_OPEN_GRIDS), "a repeat needs no room");
        assert_eq!(first_half(most), (Some(0), MAX_OPEN_GRIDS));
    }
}
