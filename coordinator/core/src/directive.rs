//! [`Directive`]s: what the coordinator tells the members of a group.

use crate::config::RunConfig;
use crate::event::Fence;
use crate::ids::Step;
use crate::slots::SlotRange;

/// What the coordinator tells a member.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // The fields are the ones that their types describe.
pub enum Directive {
    /// Load shards and state.
    Prepare(Box<Prepare>),
    /// All members are prepared: train.
    Start(Fence),
    /// End at a step that the members agree on.
    Stop(Fence),
    /// Drop the run at once.
    Abort { fence: Fence, message: String },
    /// The manifest of this step's checkpoint is written.
    CheckpointCommitted { run: String, step: Step },
    /// These results are safe and need not be sent again; with `resend`, all others are to be.
    Kept { run: String, step: Step, grids: Vec<Step>, reals: bool, resend: bool },
    /// The run is over for this worker.
    Release(Fence),
    /// Nothing needs this worker any more.
    Farewell,
}

/// Where the state of a new group's members comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateSource {
    /// Drawn from the seed.
    Fresh,
    /// The checkpoint of this step.
    Checkpoint(Step),
    /// The member that is furthest.
    Peers,
}

/// When members change over from their former group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// At once, wherever they are.
    Now,
    /// Between two steps, when all members of both groups were told to start.
    NextStep,
}

/// A member's part of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepare {
    /// Run and generation.
    pub fence: Fence,
    /// One run for all time.
    pub run_id: String,
    /// What to run.
    pub config: RunConfig,
    /// The receiver's rank.
    pub rank: u32,
    /// By rank.
    pub members: Vec<Peer>,
    /// Where the run's objects lie.
    pub run_url: String,
    /// Where the objects of the run lie whose checkpoint it begins with: its own, or the one it was forked from.
    pub checkpoint_url: String,
    /// Where the state comes from.
    pub state: StateSource,
    /// When the change takes place.
    pub when: When,
    /// Steps of the whole run.
    pub target_steps: Step,
    /// Steps that make no update: 1 for the first.
    pub passed_over: Vec<Step>,
}

/// A member, as its peers know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Name of the worker.
    pub worker: String,
    /// Unique to its process.
    pub process_id: String,
    /// Where its collective listens.
    pub ring_address: String,
    /// Its share of the slots.
    pub slots: SlotRange,
}
