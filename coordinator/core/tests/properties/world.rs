//! What happens to a cluster, and the world around it: who is connected, what the store has to do.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use takuma_core::cluster::Cluster;
use takuma_core::event::*;
use takuma_core::ids::Generation;
use takuma_core::record::{CheckpointMark, RunRecord, RunStatus};

use crate::support::*;

const RUNS: [&str; 3] = ["ada", "bob", "cyd"];
const SESSIONS: u64 = 4;

/// One thing that the world does. Numbers are taken modulo what is possible just then.
#[derive(Debug, Clone)]
pub enum Deed {
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
    Fail(u64, u8),
    Formed(u64),
    /// Connects again and claims its place, its ring broken or not.
    Return(u64, bool),
    Drain(u64),
    Goodbye(u64),
    /// Something under another generation.
    Stale(u64, u64),
    /// The coordinator dies and another one finds what lies in the store: the newest state, or with `true` only
    /// what was acknowledged.
    Restart(bool),
    Sleep(u64),
}

pub fn deed() -> impl Strategy<Value = Deed> {
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
        2 => (session(), 0..8u8).prop_map(|(s, kind)| Deed::Fail(s, kind)),
        6 => session().prop_map(Deed::Formed),
        6 => (session(), prop::bool::weighted(0.2)).prop_map(|(s, parked)| Deed::Return(s, parked)),
        1 => session().prop_map(Deed::Drain),
        1 => session().prop_map(Deed::Goodbye),
        1 => (session(), 0..6u64).prop_map(|(s, back)| Deed::Stale(s, back)),
        1 => any::<bool>().prop_map(Deed::Restart),
        3 => prop_oneof![9 => 0..400u64, 1 => 0..20_000u64].prop_map(Deed::Sleep),
    ]
}

/// The world around a cluster: who is connected, what the store has to do, and what was seen so far.
pub struct World {
    pub cluster: Cluster,
    pub now: u64,
    pub next_session: u64,
    /// Session number of each of the workers, when connected.
    pub sessions: BTreeMap<u64, SessionId>,
    pub connected: BTreeSet<SessionId>,
    pub prepared_for: BTreeMap<SessionId, Prepare>,
    /// Groups that take over at their Start.
    pub next_for: BTreeMap<SessionId, Prepare>,
    /// By worker, what it was in the middle of when its session broke.
    pub claims: BTreeMap<u64, Prepare>,
    pub store: VecDeque<Event>,
    /// Who was told to end after a step.
    pub stopped: BTreeSet<SessionId>,
    /// Who was told to train, and so has state.
    pub training: BTreeSet<SessionId>,
    /// By run, its newest record and the last one that the store has for sure.
    pub records: BTreeMap<String, [RunRecord; 2]>,
    /// By run, the newest checkpoint.
    pub checkpoints: BTreeMap<String, CheckpointMark>,
    /// By run, generations that the store has reserved.
    pub acknowledged: BTreeMap<String, Generation>,
    pub generations: BTreeMap<String, Generation>,
    pub groups: BTreeMap<String, Generation>,
    pub metrics: BTreeMap<String, u64>,
    pub succeeded: BTreeMap<String, RunRecord>,
    pub asked: u64,
    pub answered: BTreeSet<RequestId>,
    pub starts: usize,
    pub told: Vec<String>,
}

impl World {
    pub fn new() -> Self {
        Self {
            cluster: cluster(),
            now: 1,
            next_session: 0,
            sessions: BTreeMap::new(),
            connected: BTreeSet::new(),
            prepared_for: BTreeMap::new(),
            next_for: BTreeMap::new(),
            claims: BTreeMap::new(),
            store: VecDeque::new(),
            stopped: BTreeSet::new(),
            training: BTreeSet::new(),
            records: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
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

    pub fn act(&mut self, deed: &Deed) -> Result<(), TestCaseError> {
        self.now += 1;
        match deed {
            Deed::Restart(lossy) => self.restart(*lossy),
            deed => self.event(deed).map_or(Ok(()), |event| self.apply(event)),
        }
    }

    fn event(&mut self, deed: &Deed) -> Option<Event> {
        let request = RequestId(self.asked);
        Some(match *deed {
            Deed::Join(who, again) => {
                if self.sessions.contains_key(&who) && !again {
                    return None;
                }
                let session = self.open_session(who);
                Event::WorkerConnected { session, hello: hello(&format!("w{who}")) }
            }
            Deed::Leave(who, polite) => {
                let session = self.sessions.remove(&who)?;
                // Whatever the core does from here on, it must not speak to this session.
                self.connected.remove(&session);
                if polite {
                    Event::WorkerLeaves { session, reason: "SIGTERM".into(), at_once: true }
                } else {
                    self.keep_claim(who, session);
                    Event::SessionEnded { session, reason: "gone".into() }
                }
            }
            Deed::Return(who, parked) => {
                if self.sessions.contains_key(&who) {
                    return None;
                }
                let prepare = self.claims.remove(&who)?;
                let session = self.open_session(who);
                let hello = Hello { membership: Some(claim(&prepare, parked)), ..hello(&format!("w{who}")) };
                self.prepared_for.insert(session, prepare);
                self.training.insert(session);
                Event::WorkerConnected { session, hello }
            }
            Deed::Drain(who) => {
                self.asked += 1;
                Event::DrainRequested { request, worker: format!("w{who}") }
            }
            Deed::Goodbye(who) => {
                let session = *self.sessions.get(&who)?;
                Event::WorkerLeaves { session, reason: "SIGTERM".into(), at_once: false }
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
            Deed::Restart(_) => return None,
            Deed::Sleep(ms) => {
                // The shell never sleeps past a deadline.
                let until = self.cluster.next_deadline().map_or(u64::MAX, |at| at.0);
                self.now = (self.now + ms).min(until.max(self.now));
                Event::Ticked
            }
            ref deed => return self.member_event(deed),
        })
    }

    fn open_session(&mut self, who: u64) -> SessionId {
        self.next_session += 1;
        let session = SessionId(self.next_session);
        self.sessions.insert(who, session);
        self.connected.insert(session);
        session
    }

    /// Whether a worker was told to end after a step.
    pub fn stops(&self, session: SessionId) -> bool {
        self.stopped.contains(&session)
    }

    /// What a worker would say if it came back.
    fn keep_claim(&mut self, who: u64, session: SessionId) {
        if let Some(prepare) = self.prepared_for.get(&session).filter(|_| self.training.contains(&session)) {
            self.claims.insert(who, prepare.clone());
        }
    }

    /// Another coordinator takes the store's runs in; nobody is connected to it yet.
    fn restart(&mut self, lossy: bool) -> Result<(), TestCaseError> {
        for (who, session) in std::mem::take(&mut self.sessions) {
            self.keep_claim(who, session);
        }
        self.connected.clear();
        self.store.clear();
        self.answered.extend((0..self.asked).map(RequestId));
        self.cluster = cluster();
        for (name, records) in std::mem::take(&mut self.records) {
            let record = records[usize::from(lossy)].clone();
            // The end itself may be lost: then the run comes to it once more.
            self.succeeded.retain(|run, _| *run != name || record.status == RunStatus::Succeeded);
            let checkpoint = self.checkpoints.get(&name).cloned();
            let least = checkpoint.as_ref().map_or(0, |mark| mark.step);
            let reported = self.metrics.get(&name).copied().unwrap_or(0);
            let step = if lossy { least.min(reported) } else { reported };
            if self.metrics.contains_key(&name) {
                self.metrics.insert(name.clone(), step);
            }
            self.generations.insert(name.clone(), record.generation);
            self.records.insert(name, [record.clone(), record.clone()]);
            let stored = Stored { step, ..Stored::default() };
            self.apply(Event::RunRecovered { record: Box::new(record), checkpoint, stored })?;
        }
        Ok(())
    }

    pub fn store_call(&mut self, well: bool) -> Option<Event> {
        let mut call = self.store.pop_front()?;
        let result = if well { Ok(()) } else { Err("disk full".to_owned()) };
        match &mut call {
            Event::RunSaved { outcome, fence, reserved } => {
                if well {
                    self.acknowledged.insert(fence.run.clone(), *reserved);
                    if let Some([newest, sure]) = self.records.get_mut(&fence.run) {
                        sure.clone_from(newest);
                    }
                }
                *outcome = result;
            }
            Event::CheckpointSettled { outcome, fence, mark } => {
                let before = self.checkpoints.get(&fence.run).map_or(0, |mark| mark.step);
                if well && before <= mark.step {
                    self.checkpoints.insert(fence.run.clone(), mark.clone());
                }
                *outcome = result;
            }
            Event::GridSettled { outcome, .. } | Event::RunFlushed { outcome, .. } => *outcome = result,
            other => panic!("{other:?} is no store call"),
        }
        Some(call)
    }

    fn member_event(&self, deed: &Deed) -> Option<Event> {
        let (Deed::Prepared(who)
        | Deed::Formed(who)
        | Deed::Step(who, _)
        | Deed::Tile(who, _)
        | Deed::Upload(who, _)) = deed
        else {
            return self.member_end(deed);
        };
        let session = *self.sessions.get(who)?;
        if let (Deed::Prepared(_), Some(next)) = (deed, self.next_for.get(&session)) {
            return Some(Event::MemberPrepared { session, fence: next.fence.clone() });
        }
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
            Deed::Formed(_) => Event::GroupFormed { session, formed: formed(fence, done) },
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
            Deed::Fail(_, kind) => {
                let kind = match kind {
                    0 => FailureKind::Run,
                    1 => FailureKind::Local,
                    2 => FailureKind::PeerLost { suspect: None },
                    rank => FailureKind::PeerLost { suspect: Some(u32::from(rank) - 3) },
                };
                Event::MemberFailed { session, failure: failure(fence, kind) }
            }
            Deed::Stale(_, generation) => {
                let fence = Fence { generation: Generation(generation), ..fence };
                Event::StepReported { session, report: step_report(fence, done + 1) }
            }
            _ => return None,
        })
    }
}
