//! Members that hold their group up, named in words.
//!
//! Every member tells with its heartbeats where its last step's seconds went. The others wait for the slowest, so
//! what counts is the time that a member spent by itself: computing and waiting for images, for each of its slots.

use crate::cluster::Cluster;
use crate::event::{SessionId, StepTimes};
use crate::ids::Step;
use crate::run::Stage;

/// A member is slow when it needs so many times the others' median for a slot.
const SLOW_FACTOR: f64 = 2.0;
/// Below this a step is too short for its parts to mean anything.
const LEAST_S: f64 = 0.02;
/// In so many heartbeats in a row, each about another step.
const LOOKS: u32 = 3;

/// What is known of a member's pace.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    step: Step,
    looks: u32,
    named: bool,
}

impl Cluster {
    /// Looks whether the member behind a heartbeat holds its group up.
    pub(crate) fn watch_pace(&mut self, session: SessionId) {
        let Some(progress) = self.members.get(session).and_then(|worker| worker.progress.clone()) else {
            return;
        };
        let Some(run) = self
            .runs
            .get(&progress.fence.run)
            .filter(|run| run.group.as_ref().is_some_and(|group| group.stage == Stage::Training))
        else {
            return;
        };
        let Some(group) = run.group.as_ref().filter(|_| run.record.generation == progress.fence.generation)
        else {
            return;
        };
        let Some(rank) = group.rank_of(session) else { return };
        if group.members[rank].pace.step == progress.step {
            return;
        }
        let balanced = run.record.config.balance;
        let times = |rank: usize| {
            let worker = self.members.get(group.members[rank].session)?;
            let progress = worker.progress.as_ref()?;
            // Shares by speed are to take equally long; even ones say how long a slot takes.
            let slots = if balanced { 1 } else { group.members[rank].slots.count.max(1) };
            Some((progress.times, f64::from(slots)))
        };
        let own = |(times, slots): (StepTimes, f64)| (times.compute_s + times.data_s) / slots;
        let mut others: Vec<f64> =
            (0..group.members.len()).filter(|&other| other != rank).filter_map(times).map(own).collect();
        others.sort_by(f64::total_cmp);
        let Some(&median) = others.get(others.len() / 2) else { return };
        let Some(mine) = times(rank) else { return };
        let excess_s = (own(mine) - median) * mine.1;
        let slow = own(mine) > SLOW_FACTOR * median && excess_s > LEAST_S;
        let share_of_data = mine.0.data_s / (mine.0.compute_s + mine.0.data_s).max(f64::MIN_POSITIVE);
        self.note_pace(
            session,
            &progress.fence.run,
            progress.step,
            slow.then_some((excess_s, share_of_data)),
        );
    }

    fn note_pace(&mut self, session: SessionId, name: &str, step: Step, slow: Option<(f64, f64)>) {
        let Some(group) = self.runs.get_mut(name).and_then(|run| run.group.as_mut()) else { return };
        let Some(member) = group.members.iter_mut().find(|member| member.session == session) else { return };
        member.pace.step = step;
        let (worker, who) = (member.name.clone(), member.introduction.clone());
        let Some((excess_s, share_of_data)) = slow else {
            member.pace.looks = 0;
            if std::mem::take(&mut member.pace.named) {
                self.record(name, "straggler_gone", &worker, format!("{who} keeps up again"));
            }
            return;
        };
        member.pace.looks += 1;
        if member.pace.looks < LOOKS || std::mem::replace(&mut member.pace.named, true) {
            return;
        }
        let cause = if share_of_data > 0.5 { "its images come late" } else { "it computes slowly" };
        let message = format!("{who} holds the group up by {excess_s:.2} s a step: {cause}");
        self.record(name, "straggler", &worker, message);
    }
}
