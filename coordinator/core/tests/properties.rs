//! Random schedules of events, well-meant and hostile, against the invariants that hold after every event.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use support::*;
use takuma_core::cluster::Cluster;
use takuma_core::event::*;
use takuma_core::ids::Generation;
use takuma_core::record::{RunRecord, RunStatus};
use takuma_core::time::Timestamp;

const RUNS: [&str; 3] = ["ada", "bob", "cyd"];
const SESSIONS: u64 = 4;

/// One thing that the world does. Numbers are taken modulo what is possible just then.
#[derive(Debug, Clone)]
enum Deed {
    /// Connects, or with `true` once more without having left.
    Join(u64, bool),
    Leave(u64, bool),
    Beat(u64),
    Submit(usize, u64),
    Stop(usize),
    Resume(usize),
    /// The oldest store call ends, well or badly.
    Store(bool),
    Prepared(u64),
    /// The next step, or one that is off by some.
    Step(u64, i64),
    Tile(u64, u64),
    Upload(u64, bool),
    /// Through when all is done or a stop was asked for, or rashly at any time.
    End(u64, bool),
    Fail(u64, bool),
    /// Something under another generation.
    Stale(u64, u64),
    Sleep(u64),
}

fn deed() -> impl Strategy<Value = Deed> {
    let session = || 0..SESSIONS;
    prop_oneof![
        6 => (session(), prop::bool::weighted(0.03)).prop_map(|(s, again)| Deed::Join(s, again)),
        1 => (session(), any::<bool>()).prop_map(|(s, polite)| Deed::Leave(s, polite)),
        12 => session().prop_map(Deed::Beat),
        2 => (0..3usize, 1..4u64).prop_map(|(run, steps)| Deed::Submit(run, steps)),
        1 => (0..3usize).prop_map(Deed::Stop),
        2 => (0..3usize).prop_map(Deed::Resume),
        30 => prop::bool::weighted(0.97).prop_map(Deed::Store),
        20 => session().prop_map(Deed::Prepared),
        24 => (session(), prop_oneof![40 => Just(0i64), 1 => -2..3i64]).prop_map(|(s, off)| Deed::Step(s, off)),
        3 => (session(), 0..3u64).prop_map(|(s, step)| Deed::Tile(s, step)),
        12 => (session(), prop::bool::weighted(0.97)).prop_map(|(s, now)| Deed::Upload(s, now)),
        24 => (session(), prop::bool::weighted(0.01)).prop_map(|(s, rash)| Deed::End(s, rash)),
        1 => (session(), any::<bool>()).prop_map(|(s, peer)| Deed::Fail(s, peer)),
        1 => (session(), 0..6u64).prop_map(|(s, back)| Deed::Stale(s, back)),
        3 => prop_oneof![9 => 0..400u64, 1 => 0..20_000u64].prop_map(Deed::Sleep),
    ]
}

/// The world around a cluster: who is connected, what the store has to do, and what was seen so far.
struct World {
    cluster: Cluster,
    now: u64,
    next_session: u64,
    /// Session number of each of the workers, when connected.
    sessions: BTreeMap<u64, SessionId>,
    connected: BTreeSet<SessionId>,
    prepared_for: BTreeMap<SessionId, Prepare>,
    store: VecDeque<Event>,
    acknowledged: BTreeSet<Fence>,
    generations: BTreeMap<String, Generation>,
    groups: BTreeMap<String, Generation>,
    metrics: BTreeMap<String, u64>,
    succeeded: BTreeMap<String, RunRecord>,
    asked: u64,
    answered: BTreeSet<RequestId>,
    starts: usize,
    told: Vec<String>,
}

impl World {
    fn new() -> Self {
        Self {
            cluster: cluster(),
            now: 1,
            next_session: 0,
            sessions: BTreeMap::new(),
            connected: BTreeSet::new(),
            prepared_for: BTreeMap::new(),
            store: VecDeque::new(),
            acknowledged: BTreeSet::new(),
            generations: BTreeMap::new(),
            groups: BTreeMap::new(),
            metrics: BTreeMap::new(),
            succeeded: BTreeMap::new(),
            asked: 0,
            answered: BTreeSet::new(),
            starts: 0,
            told: Vec::new(),
        }
    }

    fn event(&mut self, deed: &Deed) -> Option<Event> {
        let request = RequestId(self.asked);
        Some(match *deed {
            Deed::Join(who, again) => {
                if self.sessions.contains_key(&who) && !again {
                    return None;
                }
                self.next_session += 1;
                let session = SessionId(self.next_session);
                self.sessions.insert(who, session);
                self.connected.insert(session);
                Event::WorkerConnected { session, hello: hello(&format!("w{who}")) }
            }
            Deed::Leave(who, polite) => {
                let session = self.sessions.remove(&who)?;
                // Whatever the core does from here on, it must not speak to this session.
                self.connected.remove(&session);
                if polite {
                    Event::WorkerLeft { session, reason: "SIGTERM".into() }
                } else {
                    Event::SessionEnded { session, reason: "gone".into() }
                }
            }
            Deed::Beat(who) => {
                let session = *self.sessions.get(&who)?;
                let (fence, phase) = (fence("", 0), self.now.to_string());
                let progress = Progress { fence, step: 0, phase, times: StepTimes::default() };
                Event::HeartbeatReceived { session, progress }
            }
            Deed::Submit(run, steps) => {
                self.asked += 1;
                Event::RunSubmitted { request, submission: submission(RUNS[run], steps, None) }
            }
            Deed::Stop(run) => {
                self.asked += 1;
                Event::StopRequested { request, run: RUNS[run].into() }
            }
            Deed::Resume(run) => {
                self.asked += 1;
                Event::ResumeRequested { request, run: RUNS[run].into(), dataset: dataset() }
            }
            Deed::Store(well) => self.store_call(well)?,
            Deed::Sleep(ms) => {
                // The shell never sleeps past a deadline.
                let until = self.cluster.next_deadline().map_or(u64::MAX, |at| at.0);
                self.now = (self.now + ms).min(until.max(self.now));
                Event::Ticked
            }
            ref deed => return self.member_event(deed),
        })
    }

    fn store_call(&mut self, well: bool) -> Option<Event> {
        let mut call = self.store.pop_front()?;
        let result = if well { Ok(()) } else { Err("disk full".to_owned()) };
        match &mut call {
            Event::RunSaved { outcome, fence } => {
                if well {
                    self.acknowledged.insert(fence.clone());
                }
                *outcome = result;
            }
            Event::CheckpointSettled { outcome, .. }
            | Event::GridSettled { outcome, .. }
            | Event::RunFlushed { outcome, .. } => *outcome = result,
            other => panic!("{other:?} is no store call"),
        }
        Some(call)
    }

    fn member_event(&self, deed: &Deed) -> Option<Event> {
        let (Deed::Prepared(who) | Deed::Step(who, _) | Deed::Tile(who, _) | Deed::Upload(who, _)) = deed
        else {
            return self.member_end(deed);
        };
        let session = *self.sessions.get(who)?;
        let prepare = self.prepared_for.get(&session)?;
        let fence = prepare.fence.clone();
        let done = *self.metrics.get(&fence.run)?;
        Some(match *deed {
            Deed::Step(_, off) => {
                let report = step_report(fence, (done + 1).saturating_add_signed(off));
                Event::StepReported { session, report }
            }
            Deed::Tile(_, step) => {
                let share = prepare.members[prepare.rank as usize].slots;
                Event::TileReceived { session, tile: tile(fence, step, share.first, share.count) }
            }
            Deed::Upload(_, now) => {
                let upload = upload(fence, if now { done } else { done + 1 });
                Event::CheckpointUploaded { session, upload }
            }
            _ => Event::MemberPrepared { session, fence },
        })
    }

    fn member_end(&self, deed: &Deed) -> Option<Event> {
        let (Deed::End(who, _) | Deed::Fail(who, _) | Deed::Stale(who, _)) = deed else { return None };
        let session = *self.sessions.get(who)?;
        let prepare = self.prepared_for.get(&session)?;
        let fence = prepare.fence.clone();
        let done = *self.metrics.get(&fence.run)?;
        Some(match *deed {
            Deed::End(_, rash) => {
                let status = self.cluster.run_view(&fence.run)?.record.status;
                let stopping = status == RunStatus::Stopping;
                if !(rash || stopping || done == prepare.target_steps) {
                    return None;
                }
                let outcome = if stopping { Outcome::Stopped } else { Outcome::Completed };
                Event::MemberEnded { session, end: member_end(fence, outcome, done) }
            }
            Deed::Fail(_, peer_lost) => {
                Event::MemberFailed { session, failure: failure(fence, peer_lost, Some(0)) }
            }
            Deed::Stale(_, generation) => {
                let fence = Fence { generation: Generation(generation), ..fence };
                Event::StepReported { session, report: step_report(fence, done + 1) }
            }
            _ => return None,
        })
    }

    /// Applies an event and checks every action against what was seen before it.
    fn apply(&mut self, event: Event) -> Result<(), TestCaseError> {
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
                    prop_assert_eq!(last.map(|last| last + 1), Some(line.step), "a gap in the metrics");
                }
                Action::RewindMetrics { run, step } => {
                    let last = self.metrics.insert(run, step);
                    prop_assert!(step <= last.unwrap_or(0), "a rewind went forward");
                }
                Action::StoreGrid { grid } => {
                    let (fence, kind, step) = (grid.fence, grid.kind, grid.step);
                    self.store.push_back(Event::GridSettled { fence, kind, step, outcome: Ok(()) });
                }
                Action::CommitCheckpoint { manifest } => {
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
                    self.acknowledged.contains(&prepare.fence),
                    "a generation was told before it was saved"
                );
                self.prepared_for.insert(session, (*prepare).clone());
                prepares.push(*prepare);
            }
            Directive::Start(_) => self.starts += 1,
            Directive::Abort { .. } => {
                self.prepared_for.remove(&session);
            }
            Directive::Stop(_) | Directive::CheckpointCommitted { .. } => {}
        }
        Ok(())
    }

    fn saved(&mut self, record: RunRecord, acknowledge: bool) -> Result<(), TestCaseError> {
        let before = self.generations.insert(record.name.clone(), record.generation);
        prop_assert!(before <= Some(record.generation), "a generation fell");
        if let Some(kept) = self.succeeded.get(&record.name) {
            prop_assert_eq!(kept, &record, "a finished run changed");
        }
        if record.status == RunStatus::Succeeded {
            prop_assert_eq!(record.step, record.target_steps);
            let checkpoint = record.checkpoint.as_ref().map(|mark| mark.step);
            prop_assert_eq!(checkpoint, Some(record.target_steps), "success without its checkpoint");
            self.succeeded.insert(record.name.clone(), record.clone());
        }
        if acknowledge {
            let fence = fence(&record.name, record.generation.0);
            self.store.push_back(Event::RunSaved { fence, outcome: Ok(()) });
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
            let queued = view.record.status == RunStatus::Queued;
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_every_event(deeds in prop::collection::vec(deed(), 1..250)) {
        let mut world = World::new();
        for deed in &deeds {
            world.now += 1;
            if let Some(event) = world.event(deed) {
                world.apply(event)?;
            }
        }
        // When the store has answered everything, so has the cluster.
        while let Some(event) = world.store_call(true) {
            world.apply(event)?;
        }
        prop_assert_eq!(world.answered.len() as u64, world.asked, "a request was never answered");
    }

    #[test]
    fn equal_schedules_lead_to_equal_actions(deeds in prop::collection::vec(deed(), 1..120)) {
        let transcript = || -> Result<Vec<String>, TestCaseError> {
            let mut world = World::new();
            for deed in &deeds {
                world.now += 1;
                if let Some(event) = world.event(deed) {
                    world.apply(event)?;
                }
            }
            Ok(world.told)
        };
        prop_assert_eq!(transcript()?, transcript()?);
    }
}

#[test]
fn random_schedules_reach_training() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut starts, mut successes) = (0, 0);
    for _ in 0..400 {
        let deeds = prop::collection::vec(deed(), 250).new_tree(&mut runner).unwrap().current();
        let mut world = World::new();
        for deed in &deeds {
            world.now += 1;
            if let Some(event) = world.event(deed) {
                world.apply(event).unwrap();
            }
        }
        starts += world.starts;
        successes += world.succeeded.len();
    }
    // If not, the properties above would hold of nothing.
    assert!(starts > 400 && successes >= 10, "{starts} starts, {successes} successes");
}
