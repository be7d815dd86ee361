//! What goes wrong, and to whom.

use takuma_core::event::Event;

use crate::net::Cut;
use crate::world::{Ev, Pid, World};

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    Kill,
    Stop,
    CutSession,
    CutLink,
    BreakSession,
    CrashCoordinator,
    StopCoordinator,
    StoreOutage,
    StoreFailure,
    Drain,
    Terminate,
    Join,
    FailLocally,
    StopRun,
}

impl Fault {
    pub const ALL: [Self; 14] = [
        Self::Kill,
        Self::Stop,
        Self::CutSession,
        Self::CutLink,
        Self::BreakSession,
        Self::CrashCoordinator,
        Self::StopCoordinator,
        Self::StoreOutage,
        Self::StoreFailure,
        Self::Drain,
        Self::Terminate,
        Self::Join,
        Self::FailLocally,
        Self::StopRun,
    ];

    /// As the table names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kills",
            Self::Stop => "stops",
            Self::CutSession => "partitions from the coordinator",
            Self::CutLink => "partitions of ring neighbours",
            Self::BreakSession => "session breaks",
            Self::CrashCoordinator => "coordinator crashes",
            Self::StopCoordinator => "coordinator stops",
            Self::StoreOutage => "store outages",
            Self::StoreFailure => "store failures",
            Self::Drain => "drains",
            Self::Terminate => "SIGTERMs",
            Self::Join => "joins",
            Self::FailLocally => "workers out of memory",
            Self::StopRun => "runs stopped by a person",
        }
    }
}

impl World {
    /// One more fault, and the plan for the one after it.
    pub fn next_fault(&mut self) {
        if self.is_calm {
            return;
        }
        if let Some(fault) = self.rng.pick(&self.plan.faults.clone()) {
            self.strike(fault);
        }
        // Several at once are the hard cases.
        let every = self.plan.fault_every_ms;
        let pause = if self.rng.one_in(6) { self.rng.within(0, 20) } else { self.rng.within(1, 2 * every) };
        self.schedule(self.now + pause, Ev::Fault);
    }

    fn some_process(&mut self) -> Option<Pid> {
        let living: Vec<Pid> = (0..self.processes.len()).filter(|&pid| self.processes[pid].alive).collect();
        // Members are more interesting.
        let members: Vec<Pid> =
            living.iter().copied().filter(|&pid| self.processes[pid].member.is_some()).collect();
        if members.is_empty() || self.rng.one_in(5) {
            self.rng.pick(&living)
        } else {
            self.rng.pick(&members)
        }
    }

    fn duration(&mut self) -> u64 {
        match self.rng.next() % 4 {
            0 => self.rng.within(1, 300),
            1 => self.rng.within(300, 2_500),
            2 => self.rng.within(2_500, 8_000),
            _ => self.rng.within(8_000, 25_000),
        }
    }

    pub fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Join => {
                let living = self.processes.iter().filter(|process| process.alive).count() as u64;
                if living < self.plan.workers + 2 {
                    let name = format!("w{}", self.processes.len());
                    self.start_process(&name);
                    self.fault_done(fault);
                }
            }
            Fault::CrashCoordinator | Fault::StopCoordinator => self.strike_coordinator(fault),
            Fault::StoreOutage => {
                self.store.down_until = self.now + self.duration();
                self.checks.taint();
                self.fault_done(fault);
            }
            Fault::StoreFailure => {
                self.store.failing += 1;
                self.fault_done(fault);
            }
            Fault::StopRun => {
                if self.stop_some_run() {
                    self.fault_done(fault);
                }
            }
            _ => {
                if let Some(pid) = self.some_process() {
                    self.strike_worker(fault, pid);
                }
            }
        }
    }

    fn strike_coordinator(&mut self, fault: Fault) {
        if !self.coordinator.up || self.coordinator.stopped {
            return;
        }
        self.checks.taint();
        let at = self.now + self.duration();
        if fault == Fault::CrashCoordinator {
            let only_acknowledged = self.rng.one_in(2);
            self.crash_coordinator(only_acknowledged);
            self.schedule(at, Ev::CoordinatorUp);
        } else {
            self.coordinator.stopped = true;
            self.schedule(at, Ev::CoordinatorResumes);
        }
        self.fault_done(fault);
    }

    fn strike_worker(&mut self, fault: Fault, pid: Pid) {
        if self.processes[pid].stopped && fault != Fault::Kill {
            return;
        }
        self.note_fault(pid, fault);
        let until = self.now + self.duration();
        match fault {
            Fault::Kill => self.kill(pid),
            Fault::Stop => {
                self.processes[pid].stopped = true;
                self.watch_rings(pid, pid);
                self.schedule(until, Ev::Resume { pid });
            }
            Fault::CutSession => {
                let (up, down) = match self.rng.next() % 4 {
                    0 => (true, false),
                    1 => (false, true),
                    _ => (true, true),
                };
                let cut = Cut::Session { pid, up, down };
                self.cut(cut);
                self.schedule(until, Ev::Heal { cut });
            }
            Fault::CutLink => {
                let Some(cut) = self.some_link() else { return };
                self.cut(cut);
                self.schedule(until, Ev::Heal { cut });
            }
            Fault::BreakSession => {
                let Some(s) = self.processes[pid].session else { return };
                self.break_session(s);
            }
            Fault::Drain => {
                let worker = self.processes[pid].name.clone();
                if !self.can_ask() {
                    return;
                }
                let request = self.request(None);
                self.apply(Event::DrainRequested { request, worker });
            }
            Fault::Terminate => self.terminate(pid),
            Fault::FailLocally => self.fail_locally(pid),
            _ => return,
        }
        self.fault_done(fault);
    }
}
