//! Simulated workers' processes and their sessions: after worker/src/control/session.rs.

use std::collections::BTreeMap;

use takuma_core::event::*;

use crate::member::{Member, Stage};
use crate::net::{Down, Session, Up};
use crate::support;
use crate::trainer::Trainer;
use crate::world::{Ev, Pid, World};

const HEARTBEAT_MS: u64 = 500;
const FIRST_PAUSE_MS: u64 = 200;
const LONGEST_PAUSE_MS: u64 = 10_000;
const LONGEST_PAUSE_IN_A_RUN_MS: u64 = 2_000;
const CONNECT_TIMEOUT_MS: u64 = 5_000;
const WELCOME_TIMEOUT_MS: u64 = 10_000;
const LEAVE_GRACE_MS: u64 = 12_000;

/// A worker's process.
#[derive(Debug)]
pub struct Process {
    /// Unique to it.
    pub id: String,
    pub name: String,
    pub alive: bool,
    /// Alive, but nothing moves in it until it is resumed.
    pub stopped: bool,
    /// What came while it was stopped.
    pub held: Vec<Ev>,
    pub session: Option<usize>,
    pub attempt: Option<usize>,
    pub attempts: u64,
    pause_ms: u64,
    pub leaving: bool,
    pub member: Option<Member>,
    /// By run, the newest generation that it was told of: older rings are turned away.
    pub fenced: BTreeMap<String, u64>,
}

impl Process {
    pub fn new(id: String, name: String) -> Self {
        Self {
            id,
            name,
            alive: true,
            stopped: false,
            held: Vec::new(),
            session: None,
            attempt: None,
            attempts: 0,
            pause_ms: FIRST_PAUSE_MS,
            leaving: false,
            member: None,
            fenced: BTreeMap::new(),
        }
    }

    pub fn trainer(&mut self) -> Option<&mut Trainer> {
        match &mut self.member.as_mut()?.stage {
            Stage::Training(trainer) => Some(trainer),
            _ => None,
        }
    }

    fn hello(&self) -> Hello {
        let membership = self.member.as_ref().and_then(Member::claim);
        Hello { process_id: self.id.clone(), membership, ..support::hello(&self.name) }
    }
}

impl World {
    /// Starts a process that connects at once.
    pub fn start_process(&mut self, name: &str) -> Pid {
        let pid = self.processes.len();
        let id = format!("{name}#{pid}");
        self.pids.insert(id.clone(), pid);
        self.processes.push(Process::new(id, name.to_owned()));
        let at = self.now + self.rng.within(0, 200);
        self.schedule(at, Ev::Connect { pid });
        pid
    }

    pub fn connect(&mut self, pid: Pid) {
        let process = &mut self.processes[pid];
        if process.session.is_some() || process.attempt.is_some() {
            return;
        }
        process.attempts += 1;
        let cut = self.is_cut(pid, true) || self.is_cut(pid, false);
        if !self.coordinator.up || cut {
            let at = self.now + if cut { CONNECT_TIMEOUT_MS } else { 5 };
            return self.try_later(pid, at);
        }
        let s = self.sessions.len();
        self.sessions.push(Session::new(pid, self.coordinator.life, self.now));
        let process = &mut self.processes[pid];
        process.attempt = Some(s);
        let hello = process.hello();
        let at = self.now + self.latency();
        self.sessions[s].begins_at(at);
        self.schedule(at, Ev::Hello { s, hello: Box::new(hello) });
        self.schedule(self.now + WELCOME_TIMEOUT_MS, Ev::WelcomeDue { pid, s });
    }

    /// Full jitter between attempts.
    fn try_later(&mut self, pid: Pid, from: u64) {
        let longest = match self.processes[pid].member {
            Some(_) => LONGEST_PAUSE_IN_A_RUN_MS,
            None => LONGEST_PAUSE_MS,
        };
        let pause_ms = self.processes[pid].pause_ms;
        self.processes[pid].pause_ms = (pause_ms * 2).min(longest);
        let at = from + self.rng.within(0, pause_ms);
        self.schedule(at, Ev::Connect { pid });
    }

    pub fn welcome_due(&mut self, pid: Pid, s: usize) {
        if self.processes[pid].attempt == Some(s) {
            self.processes[pid].attempt = None;
            self.hang_up(s);
            self.try_later(pid, self.now);
        }
    }

    /// The worker's end of a session, or of an attempt, is gone.
    pub fn down_closed(&mut self, s: usize) {
        let pid = self.sessions[s].pid;
        self.sessions[s].open_at_worker = false;
        let process = &mut self.processes[pid];
        if process.session != Some(s) && process.attempt != Some(s) {
            return;
        }
        (process.session, process.attempt) = (None, None);
        // What was told meanwhile is in order again with the next session.
        self.try_later(pid, self.now);
    }

    /// Does what the coordinator says.
    pub fn take_down(&mut self, pid: Pid, s: usize, message: Down) {
        match message {
            Down::Welcome => {
                if self.processes[pid].attempt != Some(s) {
                    return;
                }
                self.sessions[s].open_at_worker = true;
                let process = &mut self.processes[pid];
                (process.attempt, process.session) = (None, Some(s));
                process.pause_ms = FIRST_PAUSE_MS;
                if let Some(member) = &mut process.member {
                    member.spool.rewind();
                }
                if process.leaving {
                    self.send_up(s, Up::Leaves { at_once: false });
                }
                self.beat(pid, s);
                self.send_results(pid);
            }
            Down::Refused => self.down_closed(s),
            Down::Directive(directive) if self.processes[pid].session == Some(s) => {
                self.follow(pid, directive);
                self.send_results(pid);
            }
            Down::Directive(_) => {}
        }
    }

    pub fn beat(&mut self, pid: Pid, s: usize) {
        if self.processes[pid].session != Some(s) {
            return;
        }
        let idle = || Progress {
            fence: support::fence("", 0),
            step: 0,
            phase: "idle".into(),
            times: StepTimes::default(),
        };
        let progress = self.processes[pid].member.as_ref().map_or_else(idle, Member::progress);
        self.send_up(s, Up::Beat(progress));
        self.schedule(self.now + HEARTBEAT_MS, Ev::Beat { pid, s });
    }

    /// SIGTERM.
    pub fn terminate(&mut self, pid: Pid) {
        if std::mem::replace(&mut self.processes[pid].leaving, true) {
            return;
        }
        self.schedule(self.now + LEAVE_GRACE_MS, Ev::GraceOver { pid });
        match self.processes[pid].session {
            Some(s) => self.send_up(s, Up::Leaves { at_once: false }),
            // Without a session there is nobody to ask.
            None => self.exit(pid),
        }
    }

    pub fn grace_over(&mut self, pid: Pid) {
        if let Some(s) = self.processes[pid].session {
            self.send_up(s, Up::Leaves { at_once: true });
        }
        self.exit(pid);
    }

    pub fn exit(&mut self, pid: Pid) {
        self.drop_member(pid);
        self.kill(pid);
    }

    /// The process is gone, and its sockets with it.
    pub fn kill(&mut self, pid: Pid) {
        if !std::mem::replace(&mut self.processes[pid].alive, false) {
            return;
        }
        self.break_rings_of(pid);
        let process = &mut self.processes[pid];
        process.member = None;
        process.held.clear();
        for s in [process.session.take(), process.attempt.take()].into_iter().flatten() {
            self.hang_up(s);
        }
    }
}
