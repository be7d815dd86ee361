//! Members and links that hold their group up, named in words.
//!
//! Every member tells with its heartbeats where its last step's seconds went. The others wait for the slowest, so
//! what counts is the time that a member spent by itself: computing and waiting for images, for each of its slots.
//! A slow link holds everybody up alike; it shows in how long gradients were on it, at its receiving end.

use crate::cluster::Cluster;
use crate::event::{Progress, SessionId, StepTimes};
use crate::ids::Step;
use crate::run::Stage;

/// A member is slow when it needs so many times the others' median for a slot.
const SLOW_FACTOR: f64 = 2.0;
/// A link is slow when gradients are on it for so many times the others' median, and for so much of the step.
const SLOW_LINK_FACTOR: f64 = 4.0;
const SLOW_LINK_SHARE: f64 = 0.3;
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
    /// What a member told last, and its rank, while its group trains.
    pub(crate) fn training_member(&self, session: SessionId) -> Option<(Progress, usize)> {
        let progress = self.members.get(session)?.progress.clone()?;
        let run = self.runs.get(&progress.fence.run)?;
        let group = run.group.as_ref().filter(|group| group.stage == Stage::Training)?;
        let rank = group.rank_of(session).filter(|_| run.record.generation == progress.fence.generation)?;
        Some((progress, rank))
    }

    /// Looks whether a member of a group in training holds it up, by its heartbeat.
    pub(crate) fn watch_pace(&mut self, session: SessionId, progress: &Progress, rank: usize) {
        let Some(run) = self.runs.get(&progress.fence.run) else { return };
        let Some(group) = &run.group else { return };
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
        let others: Vec<(StepTimes, f64)> =
            (0..group.members.len()).filter(|&other| other != rank).filter_map(times).collect();
        let Some(mine) = times(rank) else { return };
        let Some(usual) = median(others.iter().copied().map(own)) else { return };
        let Some(usual_link) = median(others.iter().map(|(times, _)| times.receive_s)) else { return };
        let StepTimes { compute_s, data_s, exchange_s, receive_s } = mine.0;
        let excess_s = (own(mine) - usual) * mine.1;
        let previous = &group.members[(rank + group.members.len() - 1) % group.members.len()];
        let step_s = compute_s + data_s + exchange_s;
        let excess_link_s = receive_s - usual_link;
        let slow = if own(mine) > SLOW_FACTOR * usual && excess_s > LEAST_S {
            let why = if data_s > compute_s { "its images come late" } else { "it computes slowly" };
            Some((excess_s, why.to_owned()))
        } else if receive_s > SLOW_LINK_FACTOR * usual_link
            && receive_s > SLOW_LINK_SHARE * step_s
            && excess_link_s > LEAST_S
            // One that computes slowly also sends slowly.
            && previous.pace.looks == 0
        {
            Some((excess_link_s, format!("the network between {} and it is slow", previous.name)))
        } else {
            None
        };
        self.note_pace(session, &progress.fence.run, progress.step, slow);
    }

    fn note_pace(&mut self, session: SessionId, name: &str, step: Step, slow: Option<(f64, String)>) {
        let Some(group) = self.runs.get_mut(name).and_then(|run| run.group.as_mut()) else { return };
        let Some(member) = group.members.iter_mut().find(|member| member.session == session) else { return };
        member.pace.step = step;
        let (worker, who) = (member.name.clone(), member.introduction.clone());
        let Some((excess_s, cause)) = slow else {
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
        let message = format!("{who} holds the group up by {excess_s:.2} s a step: {cause}");
        self.record(name, "straggler", &worker, message);
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
