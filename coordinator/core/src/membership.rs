//! [`Membership`]: the workers that are connected, their names, and when each was heard of last.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::event::{Fence, Hello, Progress, SessionId};
use crate::time::Timestamp;

/// More than any cluster needs; a herd of broken clients does not fill the memory.
pub const MAX_WORKERS: usize = 16_384;
/// Lost workers stay in the list for so long, so that a person sees who is missing.
const LOST_KEPT_MS: u64 = 600_000;
const MAX_LOST: usize = 64;

/// A connected worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Given at connection, unique among the connected.
    pub name: String,
    /// What it said of itself.
    pub hello: Hello,
    /// When it came.
    pub connected: Timestamp,
    heard: Timestamp,
    /// When what it works on, its step or its phase changed last.
    pub progressed: Timestamp,
    /// Its last heartbeat.
    pub progress: Option<Progress>,
    /// The run that it is a member of, or will be.
    pub assigned: Option<Fence>,
    leaving: Option<Leaving>,
    rests_until: Timestamp,
}

/// Why a worker gets no more work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// It was told to stop, and goes when its group can do without it.
    Goodbye,
    /// A person drained it; it stays connected.
    Drained,
}

impl Worker {
    /// When it was heard of last.
    #[must_use]
    pub fn heard(&self) -> Timestamp {
        self.heard
    }

    /// Why it gets no more work, if so. It is told when it may go if it wants to go itself.
    #[must_use]
    pub fn leaving(&self) -> Option<Leaving> {
        self.leaving
    }

    /// Name, host and process for a sentence: "worker-2 (host a, pid 4242)".
    #[must_use]
    pub fn introduction(&self) -> String {
        format!("{} (host {}, pid {})", self.name, self.hello.host, self.hello.pid)
    }
}

/// A worker that is gone.
#[derive(Debug, Clone)]
pub struct LostWorker {
    /// As it was.
    pub worker: Worker,
    /// When it went.
    pub lost: Timestamp,
}

/// Who is here.
///
/// What is asked at every event has an index of its own, so that a cluster of thousands is not searched for it.
#[derive(Debug, Default)]
pub struct Membership {
    workers: BTreeMap<SessionId, Worker>,
    lost: VecDeque<LostWorker>,
    by_process: BTreeMap<String, SessionId>,
    names: BTreeSet<String>,
    /// No `worker-N` with a smaller N is free.
    first_free: u64,
    by_heard: BTreeSet<(Timestamp, SessionId)>,
    resting: BTreeSet<(Timestamp, SessionId)>,
    leaving: BTreeSet<SessionId>,
}

impl Membership {
    /// Lets a worker in and returns its name: the one it asks for, or had before, or the first free `worker-N`.
    pub fn join(&mut self, now: Timestamp, session: SessionId, hello: Hello) -> String {
        let name = self.pick_name(&hello);
        // A new session does not undo what a person or a broken link decided.
        let before = self.lost.iter().rfind(|gone| gone.worker.hello.process_id == hello.process_id);
        let leaving = before.and_then(|gone| gone.worker.leaving).filter(|&why| why == Leaving::Drained);
        let rests_until = before.map_or_else(Timestamp::default, |gone| gone.worker.rests_until);
        self.lost.retain(|gone| gone.worker.name != name);
        self.names.insert(name.clone());
        self.by_process.insert(hello.process_id.clone(), session);
        self.by_heard.insert((now, session));
        if rests_until > now {
            self.resting.insert((rests_until, session));
        }
        if leaving.is_some() {
            self.leaving.insert(session);
        }
        let (connected, heard, progressed) = (now, now, now);
        let worker = Worker {
            name: name.clone(),
            hello,
            connected,
            heard,
            progressed,
            progress: None,
            assigned: None,
            leaving,
            rests_until,
        };
        self.workers.insert(session, worker);
        name
    }

    /// Takes a worker out; `None` if it is out already.
    pub fn remove(&mut self, now: Timestamp, session: SessionId) -> Option<Worker> {
        let worker = self.workers.remove(&session)?;
        self.by_heard.remove(&(worker.heard, session));
        self.resting.remove(&(worker.rests_until, session));
        self.leaving.remove(&session);
        self.names.remove(&worker.name);
        self.freed(&worker.name);
        if self.by_process.get(&worker.hello.process_id) == Some(&session) {
            self.by_process.remove(&worker.hello.process_id);
        }
        self.lost.push_back(LostWorker { worker: worker.clone(), lost: now });
        self.prune(now);
        Some(worker)
    }

    /// Notes a sign of life; false if the worker is not connected.
    pub fn note_sign(&mut self, now: Timestamp, session: SessionId) -> bool {
        let Some(worker) = self.workers.get_mut(&session) else { return false };
        self.by_heard.remove(&(worker.heard, session));
        self.by_heard.insert((now, session));
        worker.heard = now;
        true
    }

    /// The worker gets no more work.
    pub fn note_leaving(&mut self, session: SessionId, why: Leaving) {
        if let Some(worker) = self.workers.get_mut(&session) {
            worker.leaving = Some(why);
            self.leaving.insert(session);
        }
    }

    /// Workers that get no more work.
    pub fn leaving(&self) -> impl Iterator<Item = SessionId> {
        self.leaving.iter().copied()
    }

    /// The worker gets no work before then: links to it broke.
    pub fn rest(&mut self, session: SessionId, until: Timestamp) {
        if let Some(worker) = self.workers.get_mut(&session) {
            self.resting.remove(&(worker.rests_until, session));
            self.resting.insert((until, session));
            worker.rests_until = until;
        }
    }

    /// When the worker was heard of of which nothing was heard for longest.
    #[must_use]
    pub fn longest_silent(&self) -> Option<Timestamp> {
        self.by_heard.first().map(|&(heard, _)| heard)
    }

    /// Workers of which nothing was heard for longer than `timeout_ms`, and for how long, in the order in which they came.
    #[must_use]
    pub fn silent(&self, now: Timestamp, timeout_ms: u64) -> Vec<(SessionId, u64)> {
        let ages = self.by_heard.iter().map(|&(heard, session)| (session, now.since_ms(heard)));
        let mut silent: Vec<(SessionId, u64)> = ages.take_while(|&(_, age_ms)| age_ms > timeout_ms).collect();
        silent.sort_unstable();
        silent
    }

    /// Notes a heartbeat.
    pub fn heard(&mut self, now: Timestamp, session: SessionId, progress: Progress) {
        self.note_sign(now, session);
        let Some(worker) = self.workers.get_mut(&session) else { return };
        let mark = |progress: &Progress| (progress.fence.clone(), progress.step, progress.phase.clone());
        if worker.progress.as_ref().map(mark) != Some(mark(&progress)) {
            worker.progressed = now;
        }
        worker.progress = Some(progress);
    }

    /// A connected worker.
    #[must_use]
    pub fn get(&self, session: SessionId) -> Option<&Worker> {
        self.workers.get(&session)
    }

    /// A connected worker, to change.
    pub fn get_mut(&mut self, session: SessionId) -> Option<&mut Worker> {
        self.workers.get_mut(&session)
    }

    /// All connected workers in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Worker)> {
        self.workers.iter().map(|(&session, worker)| (session, worker))
    }

    /// Workers that went lately.
    pub fn lost(&self) -> impl Iterator<Item = &LostWorker> {
        self.lost.iter()
    }

    /// Sessions that can be given work, in the order in which they came: without a run, heard of within
    /// `lately_ms`, neither leaving nor resting.
    pub fn idle(&self, now: Timestamp, lately_ms: u64) -> impl Iterator<Item = SessionId> {
        let idle = move |worker: &Worker| {
            worker.assigned.is_none()
                && worker.leaving.is_none()
                && worker.rests_until <= now
                && now.since_ms(worker.heard) <= lately_ms
        };
        self.iter().filter(move |(_, worker)| idle(worker)).map(|(session, _)| session)
    }

    /// When the next worker has rested, if one rests.
    #[must_use]
    pub fn next_rested(&self, now: Timestamp) -> Option<Timestamp> {
        self.resting.range((now.plus_ms(1), SessionId(0))..).next().map(|&(at, _)| at)
    }

    /// Number of connected workers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether nobody is connected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// The session of another connection of the same process, which the new one replaces.
    #[must_use]
    pub fn session_of_process(&self, process_id: &str) -> Option<SessionId> {
        self.by_process.get(process_id).copied()
    }

    /// Forgets workers that went long ago.
    pub fn prune(&mut self, now: Timestamp) {
        while self.lost.len() > MAX_LOST
            || self.lost.front().is_some_and(|gone| now.since_ms(gone.lost) > LOST_KEPT_MS)
        {
            if let Some(gone) = self.lost.pop_front() {
                self.freed(&gone.worker.name);
            }
        }
    }

    /// A name may be given again.
    fn freed(&mut self, name: &str) {
        if let Some(number) = name.strip_prefix("worker-").and_then(|number| number.parse().ok()) {
            self.first_free = self.first_free.min(number);
        }
    }

    fn pick_name(&mut self, hello: &Hello) -> String {
        let free = |name: &str| !name.is_empty() && !self.names.contains(name);
        if free(&hello.requested_name) {
            return hello.requested_name.clone();
        }
        let before = self.lost.iter().find(|gone| gone.worker.hello.process_id == hello.process_id);
        if let Some(gone) = before.filter(|gone| free(&gone.worker.name)) {
            return gone.worker.name.clone();
        }
        // A name of somebody lost lately is not given to another process: messages about it would mislead.
        let usable = |&number: &u64| {
            let name = format!("worker-{number}");
            free(&name) && self.lost.iter().all(|gone| gone.worker.name != name)
        };
        let number = (self.first_free.max(1)..).find(usable).expect("fewer than 2^64 workers are connected");
        // Whoever is told this one takes it.
        self.first_free = number;
        format!("worker-{number}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(process_id: &str, requested_name: &str) -> Hello {
        Hello {
            process_id: process_id.into(),
            requested_name: requested_name.into(),
            ring_address: "h:1".into(),
            host: "h".into(),
            pid: 1,
            device: "cpu".into(),
            threads: 1,
            membership: None,
        }
    }

    #[test]
    fn names_count_up_and_a_free_wish_is_granted() {
        let mut members = Membership::default();
        let mut join =
            |session, process, wish| members.join(Timestamp(0), SessionId(session), hello(process, wish));
        assert_eq!(join(1, "a", ""), "worker-1");
        assert_eq!(join(2, "b", "left"), "left");
        assert_eq!(join(3, "c", "left"), "worker-2");
    }

    #[test]
    fn a_name_returns_to_its_process_and_not_to_another() {
        let mut members = Membership::default();
        members.join(Timestamp(0), SessionId(1), hello("a", ""));
        members.remove(Timestamp(1), SessionId(1)).unwrap();
        assert_eq!(members.join(Timestamp(2), SessionId(2), hello("b", "")), "worker-2");
        assert_eq!(members.join(Timestamp(3), SessionId(3), hello("a", "")), "worker-1");
    }

    #[test]
    fn lost_workers_are_forgotten_after_a_while() {
        let mut members = Membership::default();
        members.join(Timestamp(0), SessionId(1), hello("a", ""));
        members.remove(Timestamp(1), SessionId(1)).unwrap();
        members.prune(Timestamp(LOST_KEPT_MS + 2));
        assert_eq!(members.lost().count(), 0);
    }
}
