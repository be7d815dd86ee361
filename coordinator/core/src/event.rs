//! [`Event`]s, which go into [`Cluster::apply`](crate::cluster::Cluster::apply), and [`Action`]s, which come out.
//!
//! Events tell what happened (a message came, a write ended, time passed), actions what the shell is to do
//! now, in order. Both are plain data.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::checkpoint::{CheckpointManifest, CheckpointPart, Retention};
use crate::config::RunConfig;
use crate::dataset::DatasetManifest;
pub use crate::directive::{Directive, Peer, Prepare, StateSource, When};
use crate::ids::{Generation, Step};
use crate::record::{CheckpointMark, Origin, RunRecord};
use crate::time::Timestamp;

/// A worker's connection; the shell numbers them and never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A client's request that waits for its [`Action::Answer`]; the shell numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a worker says of itself when it connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Unique to the process: tells a restarted worker from a reconnecting one.
    pub process_id: String,
    /// Empty: the coordinator picks one.
    pub requested_name: String,
    /// `host:port` where its peers reach its collective.
    pub ring_address: String,
    /// Machine.
    pub host: String,
    /// Process number on that machine.
    pub pid: u32,
    /// "cpu", "cuda:0".
    pub device: String,
    /// Compute threads.
    pub threads: u32,
    /// What it is in the middle of, when it comes back.
    pub membership: Option<Claim>,
}

/// How far a member's state is: the next thing that it would compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Finished steps.
    pub step: Step,
    /// Phases of the next step that are applied already: 0, 1 or 2.
    pub phase: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, phase } = self;
        match phase {
            0 => write!(f, "step {step}"),
            _ => write!(f, "step {step} and {phase} of the next one's phases"),
        }
    }
}

/// What a worker that connects anew says that it is in the middle of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Run and generation.
    pub fence: Fence,
    /// The run's id: a name may have been given to another run since.
    pub run_id: String,
    /// Its rank.
    pub rank: u32,
    /// Members of that generation, by rank.
    pub members: Vec<Peer>,
    /// How far its state is.
    pub position: Position,
    /// Its ring is broken; it waits for the next group.
    pub parked: bool,
    /// The group that it was told to change over to and may be in at any moment.
    pub changes_to: Option<Generation>,
}

/// What a message belongs to; one of another generation is refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// Name of the run.
    pub run: String,
    /// Member list it was sent under.
    pub generation: Generation,
}

/// A heartbeat's content.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// What the worker works on; an empty run name when idle.
    pub fence: Fence,
    /// Last finished step.
    pub step: Step,
    /// "idle", "loading", "d", "g1", "g2", "sampling", "checkpoint".
    pub phase: String,
    /// Of the last finished step.
    pub times: StepTimes,
}

/// Where a step's seconds went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTimes {
    /// Computing.
    pub compute_s: f64,
    /// Waiting for images.
    pub data_s: f64,
    /// Computing waited for the exchange.
    pub exchange_s: f64,
    /// Gradients were on the link from the previous rank. Known of each member, not of a whole group.
    pub receive_s: f64,
}

/// One finished step, as rank 0 reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Run and generation.
    pub fence: Fence,
    /// 1 for the first finished step.
    pub step: Step,
    /// 0-based.
    pub epoch: u64,
    /// Discriminator's loss over the global batch.
    pub d_loss: f64,
    /// Mean of the two generator updates.
    pub g_loss: f64,
    /// In `[0, 1]`.
    pub d_acc: f64,
    /// Wall time of the step.
    pub step_s: f64,
    /// Shares of `step_s`.
    pub times: StepTimes,
    /// Sum over all slots of the hash of what fed them.
    pub fed: u64,
    /// Updates that were left out, and why, in words; empty = none.
    pub left_out: String,
}

/// Which picture a tile is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GridKind {
    /// The first real images.
    Reals,
    /// Made by the generator from the run's fixed noise.
    Generated,
}

/// Size of the images of a grid, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellShape {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// 3 or 1.
    pub channels: u32,
}

/// A worker's part of a grid.
#[derive(Clone, PartialEq, Eq)]
pub struct Tile {
    /// Run and generation.
    pub fence: Fence,
    /// Which picture.
    pub kind: GridKind,
    /// Finished steps of the generator that made it.
    pub step: Step,
    /// Row-major place of the first image in the grid.
    pub first_cell: u32,
    /// Images of the whole grid.
    pub cells_total: u32,
    /// Size of each.
    pub cell: CellShape,
    /// uint8 `[cells, height, width, channels]`.
    pub pixels: Vec<u8>,
}

impl fmt::Debug for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fence, kind, step, first_cell, cells_total, .. } = self;
        write!(f, "Tile({fence:?} {kind:?} step {step} from cell {first_cell} of {cells_total})")
    }
}

/// A whole grid: the pixels of all its cells in order.
#[derive(Clone, PartialEq, Eq)]
pub struct Grid {
    /// Run and generation.
    pub fence: Fence,
    /// Which picture.
    pub kind: GridKind,
    /// Finished steps of the generator that made it.
    pub step: Step,
    /// Number of images.
    pub cells: u32,
    /// Size of each.
    pub cell: CellShape,
    /// uint8 `[cells, height, width, channels]`.
    pub pixels: Vec<u8>,
}

impl fmt::Debug for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Grid({:?} {:?} step {}, {} cells)", self.fence, self.kind, self.step, self.cells)
    }
}

/// All parts of a checkpoint lie in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Run and generation.
    pub fence: Fence,
    /// Finished steps.
    pub step: Step,
    /// Name, size and digest of each.
    pub parts: Vec<CheckpointPart>,
    /// Over generator then discriminator.
    pub weights_sha256: String,
}

/// How a member came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Completed,
    /// Stopped as asked.
    Stopped,
}

/// A member is through, after its last upload was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberEnd {
    /// Run and generation.
    pub fence: Fence,
    /// All steps, or stopped.
    pub outcome: Outcome,
    /// Finished steps.
    pub step: Step,
    /// Of the final weights.
    pub weights_sha256: String,
}

/// A member cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberFailure {
    /// Run and generation.
    pub fence: Fence,
    /// Last finished step.
    pub step: Step,
    /// As in [`Progress`].
    pub phase: String,
    /// Who is concerned.
    pub kind: FailureKind,
    /// One sentence.
    pub message: String,
}

/// Whom a failure concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A link to a peer broke: the peer, not the reporter, is suspect. The reporter keeps its state.
    PeerLost {
        /// The peer's rank, if known.
        suspect: Option<u32>,
    },
    /// The reporter alone: others may go on.
    Local,
    /// Everybody: the run cannot go on.
    Run,
    /// Everybody: in the step after the last finished one, a number is none.
    NotFinite,
}

/// A group's ring stands, and its members have one state.
#[derive(Debug, Clone, PartialEq)]
pub struct Formed {
    /// Run and generation.
    pub fence: Fence,
    /// From where it goes on.
    pub position: Position,
    /// Since the former ring broke; 0 for a change between two steps.
    pub stalled_s: f64,
    /// Members that received the state from a peer.
    pub restored: u32,
}

/// What of a run's results lies in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// Metrics up to this step.
    pub step: Step,
    /// Whole grids.
    pub grids: BTreeSet<Step>,
    /// The grid of real images.
    pub reals: bool,
}

/// A run that somebody wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// None: a memorable one is picked.
    pub name: Option<String>,
    /// What to run.
    pub config: RunConfig,
    /// Of the dataset that the configuration names.
    pub dataset: DatasetManifest,
    /// The checkpoint of another run to start from.
    pub origin: Option<Box<OriginCheckpoint>>,
    /// Random bits for name and id.
    pub random: [u64; 2],
}

/// A checkpoint of another run, and what a run that starts from it must have in common with that.
#[derive(Debug, Clone, PartialEq)]
pub struct OriginCheckpoint {
    /// Where it lies.
    pub mark: Origin,
    /// The configuration that it was trained with.
    pub config: RunConfig,
    /// The dataset that it was trained on.
    pub dataset_digest: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and submissions are rare")]
#[allow(missing_docs)] // The fields are the ones that their types describe.
pub enum Event {
    /// A worker opened a session.
    WorkerConnected { session: SessionId, hello: Hello },
    /// A heartbeat came.
    HeartbeatReceived { session: SessionId, progress: Progress },
    /// A member has shards and checkpoint in memory.
    MemberPrepared { session: SessionId, fence: Fence },
    /// Rank 0 finished a step.
    StepReported { session: SessionId, report: StepReport },
    /// A part of a grid came.
    TileReceived { session: SessionId, tile: Tile },
    /// Rank 0 uploaded a checkpoint.
    CheckpointUploaded { session: SessionId, upload: Upload },
    /// A member is through.
    MemberEnded { session: SessionId, end: MemberEnd },
    /// A member cannot go on.
    MemberFailed { session: SessionId, failure: MemberFailure },
    /// Rank 0 says that its group stands.
    GroupFormed { session: SessionId, formed: Formed },
    /// The worker wants to leave: now, or when its group can do without it.
    WorkerLeaves { session: SessionId, reason: String, at_once: bool },
    /// The session is over, for whatever reason; nothing more will come from it.
    SessionEnded { session: SessionId, reason: String },
    /// A client wants a run.
    RunSubmitted { request: RequestId, submission: Submission },
    /// A client wants a run to stop.
    StopRequested { request: RequestId, run: String },
    /// A client wants a worker to get no more work.
    DrainRequested { request: RequestId, worker: String },
    /// A client wants a stopped or failed run to go on; the dataset is read anew, to see that it is the same.
    ResumeRequested { request: RequestId, run: String, dataset: DatasetManifest },
    /// At start: a run found in the store, with its newest checkpoint and its other results there.
    RunRecovered { record: Box<RunRecord>, checkpoint: Option<CheckpointMark>, stored: Stored },
    /// At start: a run's folder that cannot be read; its name stays taken.
    NameReserved { run: String },
    /// An [`Action::SaveRun`] that asked for it has ended.
    RunSaved { fence: Fence, reserved: Generation, outcome: Result<(), String> },
    /// An [`Action::CommitCheckpoint`] has ended.
    CheckpointSettled { fence: Fence, mark: CheckpointMark, outcome: Result<(), String> },
    /// Metrics up to this step lie in the store; `lineage` is that of the last [`Action::RewindMetrics`].
    MetricsStored { run: String, step: Step, lineage: Generation },
    /// An [`Action::StoreGrid`] has ended.
    GridSettled { fence: Fence, kind: GridKind, step: Step, outcome: Result<(), String> },
    /// An [`Action::FlushRun`] has ended: all that was recorded lies in the store.
    RunFlushed { fence: Fence, outcome: Result<(), String> },
    /// Something of a run could not be written, and trying on makes no sense.
    StoreFailed { run: String, message: String },
    /// The coordinator ends. Nothing new is begun; workers train on and find the next coordinator.
    ShutDown,
    /// Time passed.
    Ticked,
}

/// A line of `metrics.jsonl`. Losses that are not finite become null: JSON knows no NaN.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // See StepReport.
pub struct MetricsLine {
    pub step: Step,
    pub epoch: u64,
    pub d_loss: f64,
    pub g_loss: f64,
    pub d_acc: f64,
    pub step_s: f64,
    pub compute_s: f64,
    pub data_s: f64,
    pub exchange_s: f64,
    pub images_per_s: f64,
    pub workers: u32,
    pub generation: Generation,
    pub fed: u64,
}

/// A line of `events.jsonl`: what happened to a run, in words.
#[derive(Debug, Clone, PartialEq)]
pub struct RunEvent {
    /// When.
    pub at: Timestamp,
    /// One word, stable: "submitted", "preparing", "started", "sample", "checkpoint", "stopping", ...
    pub kind: &'static str,
    /// Whom it is about; empty = nobody in particular.
    pub worker: String,
    /// In force then.
    pub generation: Generation,
    /// Finished steps then.
    pub step: Step,
    /// A sentence.
    pub message: String,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The fields are the ones that their types describe.
pub enum Action {
    /// Let the worker in under this name.
    WelcomeWorker { session: SessionId, name: String },
    /// Turn the worker away.
    RefuseWorker { session: SessionId, refusal: Refusal },
    /// End a session; the core has forgotten it already.
    CloseSession { session: SessionId, reason: String },
    /// Tell a member.
    Direct { session: SessionId, directive: Directive },
    /// Answer a client: the name of the run that it is about, or why not.
    Answer { request: RequestId, result: Result<String, Refusal> },
    /// Write `run.json`. `acknowledge`: report with [`Event::RunSaved`]. `first`: the run must be new to the store.
    SaveRun { record: Box<RunRecord>, first: bool, acknowledge: bool },
    /// Append to `events.jsonl`.
    RecordEvent { run: String, event: RunEvent },
    /// Append to `metrics.jsonl` and to TensorBoard's scalars.
    RecordMetrics { run: String, line: MetricsLine },
    /// Forget metrics after this step: the run goes on from there.
    RewindMetrics { run: String, step: Step, lineage: Generation },
    /// Make the PNG and store it; report with [`Event::GridSettled`].
    StoreGrid { grid: Grid },
    /// Check the parts and write the manifest; report with [`Event::CheckpointSettled`].
    CommitCheckpoint { manifest: Box<CheckpointManifest> },
    /// Remove checkpoints that are kept no longer, and parts that no manifest lists, up to this step; the parts
    /// of newer generations than this one may be on their way.
    SweepCheckpoints { fence: Fence, step: Step, retention: Retention },
    /// Write all that is recorded, and the plot; report with [`Event::RunFlushed`].
    FlushRun { fence: Fence },
    /// A message of another generation, or of a worker that is no member, was dropped.
    RefuseStale { session: SessionId, what: &'static str, fence: Fence },
    /// Show the run's new state to those who watch it.
    PublishRun { run: String },
    /// The run has ended: write all that is recorded, and the plot, and let go of its files.
    CloseRun { run: String },
}

/// Why a request is refused: one sentence for a person, split by what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// What it names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// Not possible in the present state.
    #[error("{0}")]
    Precondition(String),
    /// The store does not do its part.
    #[error("{0}")]
    Unavailable(String),
    /// The other side speaks another protocol.
    #[error("{0}")]
    Protocol(String),
    /// The coordinator is at its limit.
    #[error("{0}")]
    Exhausted(String),
}
