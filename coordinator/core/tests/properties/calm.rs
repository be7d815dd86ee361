//! Calm after any storm: when the store answers and the workers do as they are told, every run comes to an end.

use proptest::prelude::*;
use takuma_core::event::*;
use takuma_core::record::RunStatus;

use crate::support::*;
use crate::world::{Deed, World};

/// Long enough for every time-out but that of progress, which must not be needed.
const ROUNDS: u64 = 400;
const ROUND_MS: u64 = 250;
/// One that no storm has seen.
const FRESH: u64 = 9;

impl World {
    /// Runs every run to its end, with a fresh worker among the others.
    pub fn calm_down(&mut self) -> Result<(), TestCaseError> {
        self.act(&Deed::Join(FRESH, false))?;
        for _ in 0..ROUNDS {
            self.now += ROUND_MS;
            while let Some(event) = self.store_call(true) {
                self.apply(event)?;
            }
            for (who, session) in self.sessions.clone() {
                self.act(&Deed::Beat(who))?;
                for event in self.dutiful(session) {
                    self.apply(event)?;
                }
            }
            self.apply(Event::Ticked)?;
        }
        for view in self.cluster.run_views() {
            let record = &view.record;
            prop_assert!(
                record.status.is_ended(),
                "{} is {:?} at step {} of {} for ever:\n{}",
                record.name,
                record.status,
                record.step,
                record.target_steps,
                self.told
                    .iter()
                    .filter(|line| !line.starts_with("refuse") && !line.starts_with("publish"))
                    .cloned()
                    .collect::<Vec<_>>()
                    .join("\n")
            );
        }
        Ok(())
    }

    /// What an honest worker does next.
    fn dutiful(&self, session: SessionId) -> Vec<Event> {
        let next = self.next_for.get(&session);
        let mut events: Vec<Event> = next
            .map(|next| Event::MemberPrepared { session, fence: next.fence.clone() })
            .into_iter()
            .collect();
        let Some(prepare) = self.prepared_for.get(&session) else { return events };
        let fence = prepare.fence.clone();
        if !self.training.contains(&session) {
            return vec![Event::MemberPrepared { session, fence }];
        }
        if !self.ring_holds(prepare) {
            let failure = failure(fence, FailureKind::PeerLost { suspect: None });
            return vec![Event::MemberFailed { session, failure }];
        }
        let done = self.metrics.get(&fence.run).copied().unwrap_or(0);
        let run = self.cluster.run_view(&fence.run);
        let stops = run.is_some_and(|view| view.record.status == RunStatus::Stopping) || self.stops(session);
        let outcome = if done >= prepare.target_steps { Outcome::Completed } else { Outcome::Stopped };
        let ends = stops || outcome == Outcome::Completed;
        if prepare.rank == 0 {
            events.push(Event::GroupFormed { session, formed: formed(fence.clone(), done) });
            if ends {
                events.push(Event::CheckpointUploaded { session, upload: upload(fence.clone(), done) });
            } else {
                events.push(Event::StepReported { session, report: step_report(fence.clone(), done + 1) });
            }
        }
        if ends {
            events.push(Event::MemberEnded { session, end: member_end(fence, outcome, done) });
        }
        events
    }

    /// Whether all members are in one ring.
    fn ring_holds(&self, prepare: &Prepare) -> bool {
        prepare.members.iter().all(|peer| {
            let mut there = self.prepared_for.iter().filter(|(session, _)| self.connected.contains(session));
            there.any(|(session, other)| {
                other.fence == prepare.fence
                    && other.members[other.rank as usize].process_id == peer.process_id
                    && self.training.contains(session)
            })
        })
    }
}
