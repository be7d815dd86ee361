//! The network between workers and coordinator: ordered sessions that break and lose what is under way, and cuts that
//! hold one direction or both.

use std::collections::VecDeque;

use takuma_core::event::*;

use crate::world::{Ev, Pid, World};

/// A worker that hears nothing of the coordinator for so long calls the session lost.
const KEEPALIVE_MS: u64 = 10_000;
/// Directives that may be under way to one worker before the coordinator closes its session.
const MAX_DIRECTIVES: usize = 64;

/// What a worker sends.
#[derive(Debug, Clone)]
pub enum Up {
    Beat(Progress),
    Prepared(Fence),
    Step(StepReport),
    Tile(Tile),
    Upload(Upload),
    Ended(MemberEnd),
    Failed(MemberFailure),
    Formed(Formed),
    Leaves { at_once: bool },
}

impl Up {
    pub fn event(self, session: SessionId) -> Event {
        match self {
            Self::Beat(progress) => Event::HeartbeatReceived { session, progress },
            Self::Prepared(fence) => Event::MemberPrepared { session, fence },
            Self::Step(report) => Event::StepReported { session, report },
            Self::Tile(tile) => Event::TileReceived { session, tile },
            Self::Upload(upload) => Event::CheckpointUploaded { session, upload },
            Self::Ended(end) => Event::MemberEnded { session, end },
            Self::Failed(failure) => Event::MemberFailed { session, failure },
            Self::Formed(formed) => Event::GroupFormed { session, formed },
            Self::Leaves { at_once } => {
                Event::WorkerLeaves { session, reason: "it was told to stop".into(), at_once }
            }
        }
    }
}

/// What a worker is sent.
#[derive(Debug, Clone)]
pub enum Down {
    Welcome,
    Refused,
    Directive(Directive),
}

/// One life of a stream.
#[derive(Debug)]
pub struct Session {
    pub pid: Pid,
    /// Of the coordinator.
    pub life: u32,
    pub open_at_core: bool,
    pub open_at_worker: bool,
    /// The core was told that it has ended, or has ended it.
    pub ended: bool,
    /// What is under way is lost.
    broken: bool,
    /// When the last message of each direction arrives: a stream keeps its order.
    last: [u64; 2],
    /// Held by a cut.
    waits_up: VecDeque<Up>,
    waits_down: VecDeque<Down>,
    /// Directives that have not arrived.
    pub under_way: usize,
}

impl Session {
    pub fn new(pid: Pid, life: u32, now: u64) -> Self {
        Self {
            pid,
            life,
            open_at_core: false,
            open_at_worker: false,
            ended: false,
            broken: false,
            last: [now; 2],
            waits_up: VecDeque::new(),
            waits_down: VecDeque::new(),
            under_way: 0,
        }
    }
}

impl Session {
    /// Nothing comes before the hello, nor does the news of the end.
    pub fn begins_at(&mut self, at: u64) {
        self.last[0] = self.last[0].max(at);
    }
}

/// What is cut off from what, for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Messages to the coordinator, from it, or both.
    Session { pid: Pid, up: bool, down: bool },
    /// Two workers; which direction makes no difference to a ring.
    Link(Pid, Pid),
}

impl World {
    pub fn latency(&mut self) -> u64 {
        match self.rng.next() % 64 {
            0 => self.rng.within(50, 400),
            _ => self.rng.within(1, 4 + self.plan.latency_ms),
        }
    }

    pub fn is_cut(&self, pid: Pid, is_up: bool) -> bool {
        let cuts = |cut: &Cut| matches!(*cut, Cut::Session { pid: at, up, down } if at == pid && (if is_up { up } else { down }));
        self.cuts.iter().any(cuts)
    }

    pub fn is_link_cut(&self, a: Pid, b: Pid) -> bool {
        self.cuts.iter().any(|cut| *cut == Cut::Link(a, b) || *cut == Cut::Link(b, a))
    }

    /// Sends over the session that a worker has.
    pub fn send_up(&mut self, s: usize, message: Up) {
        let session = &self.sessions[s];
        if !session.open_at_worker || session.broken {
            return;
        }
        if !session.waits_up.is_empty() || self.is_cut(session.pid, true) {
            return self.sessions[s].waits_up.push_back(message);
        }
        self.launch_up(s, message);
    }

    fn launch_up(&mut self, s: usize, message: Up) {
        let at = (self.now + self.latency()).max(self.sessions[s].last[0]);
        self.sessions[s].last[0] = at;
        self.schedule(at, Ev::Up { s, message });
    }

    pub fn send_down(&mut self, s: usize, message: Down) {
        let session = &mut self.sessions[s];
        if session.broken {
            return;
        }
        session.under_way += 1;
        if session.under_way > MAX_DIRECTIVES {
            return self.close_core_end(s);
        }
        let pid = session.pid;
        if !session.waits_down.is_empty() || self.is_cut(pid, false) {
            return self.sessions[s].waits_down.push_back(message);
        }
        self.launch_down(s, message);
    }

    fn launch_down(&mut self, s: usize, message: Down) {
        let at = (self.now + self.latency()).max(self.sessions[s].last[1]);
        self.sessions[s].last[1] = at;
        self.schedule(at, Ev::Down { s, message });
    }

    /// A message has come to the coordinator's end.
    pub fn arrived_up(&mut self, s: usize, message: Up) {
        let session = &mut self.sessions[s];
        if session.broken || !session.open_at_core || session.life != self.coordinator.life {
            return;
        }
        let pid = session.pid;
        if self.is_cut(pid, true) {
            return self.sessions[s].waits_up.push_back(message);
        }
        self.apply(message.event(SessionId(s as u64)));
    }

    /// A message has come to the worker's end.
    pub fn arrived_down(&mut self, s: usize, message: Down) {
        let session = &mut self.sessions[s];
        if session.broken {
            return;
        }
        let pid = session.pid;
        if self.is_cut(pid, false) {
            return self.sessions[s].waits_down.push_back(message);
        }
        self.sessions[s].under_way -= 1;
        self.take_down(pid, s, message);
    }

    /// Both ends lose the session, each at its time, and what is under way is lost.
    pub fn break_session(&mut self, s: usize) {
        self.sessions[s].broken = true;
        for is_core in [true, false] {
            let at = self.now + self.rng.within(1, 250);
            self.schedule(at, if is_core { Ev::UpClosed { s } } else { Ev::DownClosed { s } });
        }
    }

    /// The worker's process has gone; what it sent last may still come.
    pub fn hang_up(&mut self, s: usize) {
        self.sessions[s].open_at_worker = false;
        self.sessions[s].broken |= self.rng.one_in(2);
        let at = (self.now + self.latency()).max(self.sessions[s].last[0]);
        if self.is_cut(self.sessions[s].pid, true) {
            // Nobody hears of it before the silence is noticed.
            return;
        }
        self.schedule(at, Ev::UpClosed { s });
    }

    /// The coordinator closes a session: its last directives still come.
    pub fn close_core_end(&mut self, s: usize) {
        if !std::mem::take(&mut self.sessions[s].open_at_core) {
            return;
        }
        let at = (self.now + self.latency()).max(self.sessions[s].last[1]);
        self.schedule(at, Ev::DownClosed { s });
        self.schedule(self.now, Ev::UpClosed { s });
    }

    /// The reader of a session has come to its end.
    pub fn up_closed(&mut self, s: usize) {
        let session = &mut self.sessions[s];
        session.open_at_core = false;
        session.broken = true;
        if session.life == self.coordinator.life {
            self.sessions[s].ended = true;
            let reason = "its connection closed".to_owned();
            self.apply(Event::SessionEnded { session: SessionId(s as u64), reason });
        }
    }

    pub fn cut(&mut self, cut: Cut) {
        self.cuts.push(cut);
        match cut {
            Cut::Session { pid, .. } => {
                if let Some(s) = self.processes[pid].session {
                    let at = self.now + KEEPALIVE_MS + self.rng.within(0, 5_000);
                    self.schedule(at, Ev::Keepalive { s });
                }
            }
            Cut::Link(a, b) => self.watch_rings(a, b),
        }
    }

    /// Pings got no answer for too long.
    pub fn keepalive(&mut self, s: usize) {
        let pid = self.sessions[s].pid;
        if self.sessions[s].open_at_worker && (self.is_cut(pid, true) || self.is_cut(pid, false)) {
            self.sessions[s].broken = true;
            self.schedule(self.now, Ev::DownClosed { s });
            let at = self.now + self.rng.within(1, 5_000);
            self.schedule(at, Ev::UpClosed { s });
        }
    }

    /// What was held goes on its way.
    pub fn heal(&mut self, cut: Cut) {
        if let Some(place) = self.cuts.iter().position(|known| *known == cut) {
            self.cuts.swap_remove(place);
        }
        match cut {
            Cut::Session { pid, .. } => {
                for s in 0..self.sessions.len() {
                    if self.sessions[s].pid == pid {
                        self.release(s);
                    }
                }
            }
            Cut::Link(..) => self.try_rings(),
        }
    }

    fn release(&mut self, s: usize) {
        let pid = self.sessions[s].pid;
        while !self.is_cut(pid, true)
            && let Some(message) = self.sessions[s].waits_up.pop_front()
        {
            self.launch_up(s, message);
        }
        while !self.is_cut(pid, false)
            && let Some(message) = self.sessions[s].waits_down.pop_front()
        {
            self.launch_down(s, message);
        }
    }
}
