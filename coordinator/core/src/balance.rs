//! Shares of the batch that follow the workers' speeds, so that machines that are not alike finish a phase together.
//!
//! Every member tells with its heartbeats how long it computed in its last step. When other shares would make the
//! slowest member's part clearly shorter, the group changes over to them between two steps, like for a worker that
//! joins. The result does not depend on shares, only the time does.

use crate::cluster::Cluster;
use crate::event::{Progress, SessionId};
use crate::ids::Step;
use crate::run::Group;

/// Heartbeats about different steps that every member must have sent since the group's shares were dealt.
const LOOKS: u32 = 10;
/// A change is worth it when the slowest member's part shrinks to less than this share of itself.
const WORTH: f64 = 0.9;
/// Weight of the newest step in the running mean: about the last five count.
const NEWEST: f64 = 0.2;

/// How fast a member was seen to be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Speed {
    /// Seconds of computing for one slot in one step; 0 = not known.
    slot_s: f64,
    step: Step,
    looks: u32,
}

impl Speed {
    /// Takes in a step. Returns whether it is time to judge the shares.
    fn look(&mut self, step: Step, slot_s: f64) -> bool {
        if step == self.step || slot_s <= 0.0 {
            return false;
        }
        self.step = step;
        self.looks += 1;
        self.slot_s = if self.slot_s == 0.0 { slot_s } else { self.slot_s + NEWEST * (slot_s - self.slot_s) };
        self.looks.is_multiple_of(LOOKS)
    }

    /// What is known of it in another group.
    pub(crate) fn carried_over(self) -> Self {
        Self { looks: 0, ..self }
    }
}

impl Cluster {
    /// Takes in how long a member of a group in training computed, by its heartbeat.
    pub(crate) fn note_speed(&mut self, progress: &Progress, rank: usize) {
        let run = self.runs.get_mut(&progress.fence.run).filter(|run| run.record.config.balance);
        let Some(run) = run else { return };
        let Some(group) = &mut run.group else { return };
        let member = &mut group.members[rank];
        let slots = f64::from(member.slots.count.max(1));
        run.speeds_changed |= member.speed.look(progress.step, progress.times.compute_s / slots);
    }

    /// Seconds for a slot of each of these workers; who is not known yet counts as the mean of the others.
    pub(crate) fn slot_costs(&self, name: &str, sessions: &[SessionId]) -> Vec<f64> {
        let group = self.runs.get(name).and_then(|run| run.group.as_ref());
        let known = |session: &SessionId| {
            let group = group?;
            Some(group.members[group.rank_of(*session)?].speed.slot_s).filter(|&slot_s| slot_s > 0.0)
        };
        let costs: Vec<Option<f64>> = sessions.iter().map(known).collect();
        let sum: f64 = costs.iter().flatten().sum();
        let count = costs.iter().flatten().count();
        let mean = if count == 0 { 1.0 } else { sum / count as f64 };
        costs.into_iter().map(|cost| cost.unwrap_or(mean)).collect()
    }

    /// Begins a change to shares that follow the speeds, if that is wanted and worth it.
    pub(crate) fn balance(&mut self, name: &str) {
        let Some(run) = self.runs.get_mut(name).filter(|run| run.record.config.balance) else { return };
        if !std::mem::take(&mut run.speeds_changed) {
            return;
        }
        let Some(run) = self.runs.get(name) else { return };
        let Some(group) = &run.group else { return };
        if group.members.iter().any(|member| member.speed.looks < LOOKS) {
            return;
        }
        let sessions: Vec<SessionId> = group.members.iter().map(|member| member.session).collect();
        let costs = self.slot_costs(name, &sessions);
        let slowest = |counts: &mut dyn Iterator<Item = u32>| {
            counts.zip(&costs).map(|(count, cost)| f64::from(count) * cost).fold(0.0, f64::max)
        };
        let now_s = slowest(&mut group.members.iter().map(|member| member.slots.count));
        let then_s = slowest(&mut run.record.config.shares_by_cost(&costs).iter().map(|share| share.count));
        if then_s >= WORTH * now_s {
            return;
        }
        if let Some(Group { members, .. }) = self.runs.get_mut(name).and_then(|run| run.group.as_mut()) {
            members.iter_mut().for_each(|member| member.speed = member.speed.carried_over());
        }
        let message = format!(
            "the slowest worker computes {now_s:.2} s a step; with shares by speed it would be {then_s:.2} s"
        );
        self.begin_change(name, &sessions);
        // Without a generation for it there is no change yet.
        if self.runs.get(name).is_some_and(|run| run.change.is_some()) {
            self.record(name, "balancing", "", message);
        }
    }
}
