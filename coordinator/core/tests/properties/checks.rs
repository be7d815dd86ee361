//! The invariants: every action is held against what was seen before it, and the state after every event.

use proptest::prelude::*;
use takuma_core::event::*;
use takuma_core::record::{RunRecord, RunStatus};
use takuma_core::time::Timestamp;

use crate::support::*;
use crate::world::World;

impl World {
    /// Applies an event and checks every action against what was seen before it.
    pub fn apply(&mut self, event: Event) -> Result<(), TestCaseError> {
        let actions = self.cluster.apply(Timestamp(self.now), event);
        let mut prepares: Vec<Prepare> = Vec::new();
        for action in actions {
            self.told.push(tell(&action));
            match action {
                Action::CloseSession { session, .. } | Action::RefuseWorker { session, .. } => {
                    self.connected.remove(&session);
                    self.sessions.retain(|_, known| *known != session);
                }
                Action::Direct { session, directive } => {
                    prop_assert!(self.connected.contains(&session), "{directive:?} to a lost worker");
                    self.directed(session, directive, &mut prepares)?;
                }
                Action::Answer { request, .. } => {
                    prop_assert!(self.answered.insert(request), "{request:?} was answered twice");
                }
                Action::SaveRun { record, acknowledge, .. } => self.saved(*record, acknowledge)?,
                Action::RecordMetrics { run, line } => {
                    let last = self.metrics.insert(run, line.step);
                    prop_assert!(last < Some(line.step), "metrics went back");
                }
                Action::RewindMetrics { run, step, .. } => {
                    let last = self.metrics.insert(run, step);
                    prop_assert!(step <= last.unwrap_or(0), "a rewind went forward");
                }
                Action::StoreGrid { grid } => {
                    let (fence, kind, step) = (grid.fence, grid.kind, grid.step);
                    self.store.push_back(Event::GridSettled { fence, kind, step, outcome: Ok(()) });
                }
                Action::CommitCheckpoint { manifest, .. } => {
                    let fence = fence(&manifest.run, manifest.generation.0);
                    let mark = mark(manifest.step);
                    self.store.push_back(Event::CheckpointSettled { fence, mark, outcome: Ok(()) });
                }
                Action::FlushRun { fence } => {
                    self.store.push_back(Event::RunFlushed { fence, outcome: Ok(()) })
                }
                _ => {}
            }
        }
        self.check_group(&prepares)?;
        self.check_state()
    }

    fn directed(
        &mut self,
        session: SessionId,
        directive: Directive,
        prepares: &mut Vec<Prepare>,
    ) -> Result<(), TestCaseError> {
        match directive {
            Directive::Prepare(prepare) => {
                prop_assert!(
                    self.acknowledged.get(&prepare.fence.run) >= Some(&prepare.fence.generation),
                    "a generation was told before it was reserved"
                );
                if prepare.when == When::Now {
                    self.next_for.remove(&session);
                    if prepare.state != StateSource::Peers {
                        self.training.remove(&session);
                    }
                    self.prepared_for.insert(session, (*prepare).clone());
                } else {
                    self.next_for.insert(session, (*prepare).clone());
                }
                prepares.push(*prepare);
            }
            Directive::Start(fence) => {
                self.stopped.remove(&session);
                self.starts += 1;
                self.training.insert(session);
                if self.next_for.get(&session).is_some_and(|next| next.fence == fence)
                    && let Some(next) = self.next_for.remove(&session)
                {
                    self.prepared_for.insert(session, next);
                }
            }
            Directive::Abort { fence, .. } | Directive::Release(fence) => {
                self.prepared_for.retain(|&at, prepare| at != session || prepare.fence != fence);
                self.next_for.retain(|&at, prepare| at != session || prepare.fence != fence);
            }
            Directive::Stop(fence) => {
                // One that has changed over already drops it, and is told again when its group stands.
                if self.prepared_for.get(&session).is_some_and(|prepare| prepare.fence == fence) {
                    self.stopped.insert(session);
                }
            }
            Directive::CheckpointCommitted { .. } | Directive::Kept { .. } | Directive::Farewell => {}
        }
        Ok(())
    }

    fn saved(&mut self, record: RunRecord, acknowledge: bool) -> Result<(), TestCaseError> {
        let before = self.generations.insert(record.name.clone(), record.generation);
        prop_assert!(before <= Some(record.generation), "a generation fell");
        if let Some(kept) = self.succeeded.get(&record.name) {
            prop_assert_eq!(kept, &record, "a finished run changed");
        }
        let sure = self.records.get(&record.name).map_or(&record, |[_, sure]| sure).clone();
        self.records.insert(record.name.clone(), [record.clone(), sure]);
        if record.status == RunStatus::Succeeded {
            prop_assert_eq!(record.step, record.target_steps);
            let checkpoint = record.checkpoint.as_ref().map(|mark| mark.step);
            prop_assert_eq!(checkpoint, Some(record.target_steps), "success without its checkpoint");
            self.succeeded.insert(record.name.clone(), record.clone());
        }
        if acknowledge {
            let fence = fence(&record.name, record.generation.0);
            let reserved = record.generations_reserved;
            // A coordinator that dies now finds this or the one before.
            self.store.push_back(Event::RunSaved { fence, reserved, outcome: Ok(()) });
        }
        Ok(())
    }

    /// The members of a group agree on it, and own every slot exactly once.
    fn check_group(&mut self, prepares: &[Prepare]) -> Result<(), TestCaseError> {
        let Some(first) = prepares.first() else { return Ok(()) };
        let before = self.groups.insert(first.fence.run.clone(), first.fence.generation);
        prop_assert!(before < Some(first.fence.generation), "two groups have one generation");
        prop_assert_eq!(prepares.len(), first.members.len());
        let slots: Vec<u32> =
            first.members.iter().flat_map(|peer| peer.slots.slots()).map(|slot| slot.0).collect();
        prop_assert_eq!(slots, (0..first.config.global_batch).collect::<Vec<_>>());
        for (rank, prepare) in prepares.iter().enumerate() {
            prop_assert_eq!(prepare.rank as usize, rank);
            prop_assert_eq!((&prepare.members, &prepare.fence), (&first.members, &first.fence));
        }
        Ok(())
    }

    fn check_state(&self) -> Result<(), TestCaseError> {
        let views = self.cluster.run_views();
        let active: Vec<_> = views.iter().filter(|view| view.record.status.is_active()).collect();
        prop_assert!(active.len() <= 1, "two runs are active");
        prop_assert_eq!(active.first().map(|view| view.record.name.as_str()), self.cluster.active());
        for view in &views {
            let queued = matches!(view.record.status, RunStatus::Queued | RunStatus::Waiting);
            prop_assert_eq!(queued, view.queue_position > 0, "{} is lost", view.record.name);
            prop_assert_eq!(queued, !view.waiting_for.is_empty());
            prop_assert_eq!(view.record.status == RunStatus::Failed, !view.record.error.is_empty());
        }
        let busy = self.cluster.worker_views(Timestamp(self.now));
        let active = self.cluster.active().unwrap_or_default();
        for worker in busy.iter().filter(|worker| worker.status != "lost" && !worker.run.is_empty()) {
            prop_assert_eq!(worker.run.as_str(), active, "{} belongs to no group", worker.name);
        }
        let next = self.cluster.next_deadline();
        prop_assert!(
            next.is_none_or(|at| at.0 > self.now),
            "a deadline that has passed would spin the shell"
        );
        Ok(())
    }
}
