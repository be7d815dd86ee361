//! A new group agrees on one state: the furthest one, which whoever lacks it receives from a peer.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use takuma_core::ids::Rank;
use takuma_proto::v1::StepReport;

use crate::checkpoint::{CheckpointError, Snapshot, restore_into};
use crate::collective::{Collective, CollectiveError};
use crate::recipe::{Dcgan, PhaseSums};

/// How far a member is, and what it knows of the step that is under way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progressed {
    /// Finished steps.
    pub step: u64,
    /// Global sums of the phases of the next step that are applied already.
    pub sums: Vec<PhaseSums>,
    /// Of these phases, those that made no update, and why, in words.
    pub left_out: Vec<String>,
    /// Phases without an update in a row, up to now.
    pub skipped_in_a_row: u32,
}

impl Progressed {
    /// Phases of the next step that are applied already.
    #[must_use]
    pub fn phase(&self) -> usize {
        self.sums.len()
    }
}

/// What the agreement came to.
#[derive(Debug, Clone, Copy)]
pub struct Agreement {
    /// The member whose state all have now.
    pub source: Rank,
    /// Members that received it.
    pub restored: u32,
    /// All members can hand over whole steps.
    pub all_run_ahead: bool,
}

/// Why members cannot have one state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgreeError {
    /// The group broke again.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// A peer's state does not fit this member's networks.
    #[error("the state of a peer cannot be taken over: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The state cannot be written or read at all.
    #[error("the state of a peer cannot be taken over: {0}")]
    State(String),
    /// In exact mode: this member would compute other bits than the one that has the state.
    #[error(
        "exact mode has the same bits on devices of one model, and this worker computes on {own} where its group does on \
         {theirs}; start it on such a device, or run without --exact"
    )]
    OtherModel {
        /// What this member computes on.
        own: String,
        /// What the member with the state computes on.
        theirs: String,
    },
    /// Nobody has any state.
    #[error("no member of the group has any state")]
    Nobody,
}

/// What goes before the three parts of the state. Numbers travel as bits: JSON would round them.
#[derive(Serialize, Deserialize)]
struct Head {
    step: u64,
    /// By applied phase: loss, logits on the right side.
    sums: Vec<[u64; 2]>,
    left_out: Vec<String>,
    skipped_in_a_row: u32,
    /// Steps whose metrics are not stored yet, for the next rank 0: step, epoch, numbers, fed, left out.
    reports: Vec<(u64, u64, [u64; 7], u64, String)>,
    /// Bytes of each part.
    parts: [u64; 3],
}

/// Bytes of a member's place: flags, step, phase. Its device's model follows.
const PLACE_BYTES: usize = 17;
/// In a place's flags: the member has state; it can hand over whole steps.
const HAS_STATE: u8 = 1;
const RUNS_AHEAD: u8 = 2;

/// Finds the furthest member and gives its state to those who lack it.
///
/// `runs_ahead`: this member can hand over whole steps. `own` is `None` where the member has no state yet. `model` is
/// what must be the same on all members: of their devices, in exact mode, else empty. `unkept` are this member's metrics
/// that are not stored;
/// a receiver's are replaced by the source's through `take_reports`.
///
/// # Errors
/// The group broke, nobody has state, a state does not fit, or this member is of another model than the state's.
pub fn agree(
    collective: &Arc<dyn Collective>,
    runs_ahead: bool,
    net: &mut Dcgan,
    own: &mut Option<Progressed>,
    model: &str,
    unkept: impl FnOnce() -> Vec<StepReport>,
    take_reports: impl FnOnce(Vec<StepReport>),
) -> Result<Agreement, AgreeError> {
    let mut place = vec![0u8; PLACE_BYTES];
    if runs_ahead {
        place[0] |= RUNS_AHEAD;
    }
    if let Some(own) = own {
        place[0] |= HAS_STATE;
        place[1..9].copy_from_slice(&own.step.to_le_bytes());
        place[9..].copy_from_slice(&(own.phase() as u64).to_le_bytes());
    }
    place.extend_from_slice(model.as_bytes());
    let told = collective.all_gather(&place)?;
    let all_run_ahead = told.iter().all(|place| flags(place) & RUNS_AHEAD != 0);
    let places: Vec<(bool, u64, u64)> = told.iter().map(|place| read(place)).collect();
    let furthest = *places.iter().max().ok_or(AgreeError::Nobody)?;
    if !furthest.0 {
        return Err(AgreeError::Nobody);
    }
    let source = places.iter().position(|&place| place == furthest).unwrap_or(0) as u32;
    let theirs = told.get(source as usize).and_then(|place| place.get(PLACE_BYTES..)).unwrap_or_default();
    if theirs != model.as_bytes() {
        let theirs = String::from_utf8_lossy(theirs).into_owned();
        return Err(AgreeError::OtherModel { own: model.to_owned(), theirs });
    }
    let restored = places.iter().filter(|&&place| place != furthest).count() as u32;
    let received = places.get(collective.rank().0 as usize) != Some(&furthest);
    let agreement = Agreement { source: Rank(source), restored, all_run_ahead };
    if restored == 0 {
        return Ok(agreement);
    }
    let is_source = collective.rank().0 == source;
    let mut bytes = match own {
        Some(own) if is_source => pack(net, own, unkept())?,
        _ => Vec::new(),
    };
    collective.broadcast(Rank(source), &mut bytes)?;
    if received {
        let (progressed, reports) = unpack(net, &bytes)?;
        *own = Some(progressed);
        take_reports(reports);
    }
    Ok(agreement)
}

fn flags(place: &[u8]) -> u8 {
    place.first().copied().unwrap_or(0)
}

/// Has state, step, phase.
fn read(place: &[u8]) -> (bool, u64, u64) {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(place.get(at..at + 8).unwrap_or(&[0; 8]));
        u64::from_le_bytes(bytes)
    };
    (flags(place) & HAS_STATE != 0, number(1), number(9))
}

fn pack(net: &Dcgan, own: &Progressed, reports: Vec<StepReport>) -> Result<Vec<u8>, AgreeError> {
    let failed = |error: &dyn std::fmt::Display| AgreeError::State(error.to_string());
    let parts = Snapshot::take(net, own.step)
        .map_err(|error| failed(&error))?
        .serialize()
        .map_err(|error| failed(&error))?;
    let line = |report: StepReport| {
        let StepReport { d_loss, g_loss, d_acc, step_s, compute_s, data_s, exchange_s, .. } = report;
        let numbers = [d_loss, g_loss, d_acc, step_s, compute_s, data_s, exchange_s].map(f64::to_bits);
        (report.step, report.epoch, numbers, report.fed, report.left_out)
    };
    let head = Head {
        step: own.step,
        sums: own.sums.iter().map(|sums| [sums.loss.to_bits(), sums.right.to_bits()]).collect(),
        left_out: own.left_out.clone(),
        skipped_in_a_row: own.skipped_in_a_row,
        reports: reports.into_iter().map(line).collect(),
        parts: [0, 1, 2].map(|part: usize| parts[part].len() as u64),
    };
    let head = serde_json::to_vec(&head).map_err(|error| failed(&error))?;
    let mut bytes = (head.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&head);
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    Ok(bytes)
}

fn unpack(net: &mut Dcgan, bytes: &[u8]) -> Result<(Progressed, Vec<StepReport>), AgreeError> {
    let torn = || AgreeError::State("it is cut short".to_owned());
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(torn)?;
    let (head, mut rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).ok_or_else(torn)?;
    let head: Head = serde_json::from_slice(head).map_err(|error| AgreeError::State(error.to_string()))?;
    let mut parts: [&[u8]; 3] = [&[]; 3];
    for (part, &length) in parts.iter_mut().zip(&head.parts) {
        (*part, rest) = rest.split_at_checked(length as usize).ok_or_else(torn)?;
    }
    restore_into(net, &parts)?;
    let report = |(step, epoch, numbers, fed, left_out): (u64, u64, [u64; 7], u64, String)| {
        let [d_loss, g_loss, d_acc, step_s, compute_s, data_s, exchange_s] = numbers.map(f64::from_bits);
        let numbers =
            StepReport { d_loss, g_loss, d_acc, step_s, compute_s, data_s, exchange_s, ..Default::default() };
        StepReport { step, epoch, fed, left_out, ..numbers }
    };
    let sums =
        |&[loss, right]: &[u64; 2]| PhaseSums { loss: f64::from_bits(loss), right: f64::from_bits(right) };
    let progressed = Progressed {
        step: head.step,
        sums: head.sums.iter().map(sums).collect(),
        left_out: head.left_out,
        skipped_in_a_row: head.skipped_in_a_row,
    };
    Ok((progressed, head.reports.into_iter().map(report).collect()))
}

#[cfg(test)]
mod tests {
    use takuma_core::config::{Recipe, RunConfig};
    use takuma_core::ids::Generation;
    use tch::Kind;

    use super::*;
    use crate::collective::{Ring, RingConfig, RingListener};
    use crate::recipe::DcganState;
    use crate::trainer::Exchange;

    #[test]
    fn member_of_another_model_than_the_state_s_is_refused_and_the_others_are_not() {
        let listeners = [0, 1, 2].map(|_| RingListener::bind("127.0.0.1:0").unwrap());
        let members: Vec<String> =
            listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
        let join = |rank: u32, model: &str| {
            let config = RingConfig::new("test", Rank(rank), Generation(1), members.clone());
            let ring = Ring::connect(&listeners[rank as usize], config).unwrap();
            let collective: Arc<dyn Collective> = Arc::new(ring);
            let config = RunConfig::new(Recipe::DcganTiny, "file:///none");
            let state = DcganState::new(config.recipe, config.seed, Kind::Float);
            let mut net = Dcgan::new(&config, state, &Exchange::new());
            let mut own = Some(Progressed { step: 3, ..Progressed::default() });
            let agreed = agree(&collective, false, &mut net, &mut own, model, Vec::new, drop);
            // Nobody closes the ring while others are at it.
            drop(collective.barrier());
            agreed
        };
        std::thread::scope(|scope| {
            let source = scope.spawn(|| join(0, "NVIDIA H100"));
            let other = scope.spawn(|| join(1, "a processor"));
            assert_eq!(join(2, "NVIDIA H100").unwrap().source, Rank(0));
            assert_eq!(source.join().unwrap().unwrap().restored, 0);
            let error = other.join().unwrap().unwrap_err();
            assert!(matches!(error, AgreeError::OtherModel { .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains("on a processor where its group does on NVIDIA H100"), "{message}");
        });
    }
}
