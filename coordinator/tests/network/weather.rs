//! [`Weather`]: what goes wrong with the network and its hosts, drawn from a seed.

use std::collections::{BTreeMap, BTreeSet};

use turmoil::Sim;

use crate::ring::Shared;
use crate::wire::COORDINATOR;

/// The host of the person who submits.
pub const PERSON: &str = "person";

/// After this everything is healed.
pub const HEALED_MS: u64 = 30_000;
const FIRST_MS: u64 = 500;

/// What can be done to a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// A worker and the coordinator do not hear each other; what is sent is lost.
    Cut(usize),
    /// The coordinator does not hear the worker.
    CutUp(usize),
    /// The worker does not hear the coordinator.
    CutDown(usize),
    /// What is sent between a worker and the coordinator waits.
    Hold(usize),
    /// Two workers do not hear each other.
    CutPeers(usize, usize),
    /// A worker's host crashes, and comes back.
    CrashWorker(usize),
    /// The coordinator's host crashes, and comes back.
    CrashCoordinator,
}

impl Fault {
    /// The worker whose link to the coordinator it is about.
    fn link(self) -> Option<usize> {
        match self {
            Self::Cut(worker) | Self::CutUp(worker) | Self::CutDown(worker) | Self::Hold(worker) => {
                Some(worker)
            }
            Self::CutPeers(..) | Self::CrashWorker(_) | Self::CrashCoordinator => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Cut(_) => "cut",
            Self::CutUp(_) => "cut upwards",
            Self::CutDown(_) => "cut downwards",
            Self::Hold(_) => "hold",
            Self::CutPeers(..) => "cut between workers",
            Self::CrashWorker(_) => "worker crash",
            Self::CrashCoordinator => "coordinator crash",
        }
    }
}

/// A schedule of faults and of their ends.
pub struct Weather {
    /// Latest first.
    plan: Vec<(u64, Fault, bool)>,
    /// Faults that began, by kind.
    pub counts: BTreeMap<&'static str, u64>,
    down: BTreeSet<String>,
    /// What is wrong with the links to the coordinator, by worker.
    links: BTreeMap<usize, Fault>,
    healed: bool,
    workers: usize,
}

impl Weather {
    /// The weather of a seed.
    pub fn new(rng: &mut fastrand::Rng, workers: usize) -> Self {
        let mut weather = Self {
            plan: Vec::new(),
            counts: BTreeMap::new(),
            down: BTreeSet::new(),
            links: BTreeMap::new(),
            healed: false,
            workers,
        };
        // From calm to rough.
        let mean_pause_ms = [600, 1_500, 4_000][rng.usize(0..3)];
        let mut at = FIRST_MS;
        while at < HEALED_MS {
            weather.draw(rng, at);
            at += rng.u64(1..2 * mean_pause_ms);
        }
        weather.plan.sort_by(|a, b| b.cmp(a));
        weather
    }

    fn draw(&mut self, rng: &mut fastrand::Rng, at: u64) {
        let worker = rng.usize(0..self.workers);
        let other = (worker + rng.usize(1..self.workers)) % self.workers;
        let fault = match rng.u32(0..16) {
            0..2 => Fault::Cut(worker),
            2..4 => Fault::CutUp(worker),
            4..6 => Fault::CutDown(worker),
            6..8 => Fault::Hold(worker),
            8..10 => Fault::CutPeers(worker, other),
            10..13 => Fault::CrashWorker(worker),
            13 => Fault::CrashCoordinator,
            14 => return self.flap(rng, at, Fault::Cut(worker)),
            _ => return self.flap(rng, at, Fault::CutPeers(worker, other)),
        };
        // Some shorter than any timeout, some longer than most.
        let lasts = if rng.bool() { rng.u64(50..2_000) } else { rng.u64(2_000..15_000) };
        self.plan.extend([(at, fault, true), (at + lasts, fault, false)]);
    }

    /// A link that comes and goes.
    fn flap(&mut self, rng: &mut fastrand::Rng, mut at: u64, fault: Fault) {
        *self.counts.entry("flapping link").or_default() += 1;
        for _ in 0..rng.u32(3..10) {
            let lasts = rng.u64(50..800);
            self.plan.extend([(at, fault, true), (at + lasts, fault, false)]);
            at += lasts + rng.u64(50..800);
        }
    }

    /// Does what is due; at last everything is healed.
    pub fn pass(&mut self, sim: &mut Sim<'_>, rings: &Shared) {
        let now_ms = rings.borrow().now_ms;
        if now_ms >= HEALED_MS {
            if !std::mem::replace(&mut self.healed, true) {
                self.heal(sim, rings);
            }
            return;
        }
        while let Some((_, fault, begins)) = self.plan.pop_if(|(at, ..)| *at <= now_ms) {
            let what = if begins { "begins" } else { "ends" };
            rings.borrow_mut().note("weather", &format!("{fault:?} {what}"));
            if begins {
                *self.counts.entry(fault.name()).or_default() += 1;
                if let Some(worker) = fault.link() {
                    self.links.insert(worker, fault);
                }
                self.begin(sim, rings, fault);
            } else {
                self.end(sim, rings, fault);
            }
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, rings: &Shared, fault: Fault) {
        match fault {
            Fault::Cut(worker) => sim.partition(host(worker), COORDINATOR),
            Fault::CutUp(worker) => sim.partition_oneway(host(worker), COORDINATOR),
            Fault::CutDown(worker) => sim.partition_oneway(COORDINATOR, host(worker)),
            Fault::Hold(worker) => sim.hold(host(worker), COORDINATOR),
            Fault::CutPeers(a, b) => {
                sim.partition(host(a), host(b));
                rings.borrow_mut().cut(&host(a), &host(b));
            }
            Fault::CrashWorker(worker) => self.crash(sim, rings, host(worker)),
            Fault::CrashCoordinator => self.crash(sim, rings, COORDINATOR.to_owned()),
        }
    }

    fn end(&mut self, sim: &mut Sim<'_>, rings: &Shared, fault: Fault) {
        match fault {
            Fault::Cut(worker) | Fault::CutUp(worker) | Fault::CutDown(worker) => {
                self.links.remove(&worker);
                sim.repair(host(worker), COORDINATOR);
            }
            Fault::Hold(worker) => {
                self.links.remove(&worker);
                sim.release(host(worker), COORDINATOR);
            }
            Fault::CutPeers(a, b) => {
                sim.repair(host(a), host(b));
                rings.borrow_mut().mend(&host(a), &host(b));
            }
            Fault::CrashWorker(worker) => self.bounce(sim, host(worker)),
            Fault::CrashCoordinator => self.bounce(sim, COORDINATOR.to_owned()),
        }
    }

    /// A host's sockets close in an order that no seed repeats, since tokio drops tasks by numbers that all simulations
    /// share. So what they say waits until all are closed.
    fn crash(&mut self, sim: &mut Sim<'_>, rings: &Shared, name: String) {
        if !self.down.insert(name.clone()) {
            return;
        }
        let others: Vec<String> = (0..self.workers).map(host).chain([PERSON.to_owned()]).collect();
        others.iter().for_each(|other| sim.hold(other.as_str(), COORDINATOR));
        sim.crash(name);
        others.iter().for_each(|other| sim.release(other.as_str(), COORDINATOR));
        for fault in self.links.values().copied().collect::<Vec<_>>() {
            self.begin(sim, rings, fault);
        }
    }

    fn bounce(&mut self, sim: &mut Sim<'_>, name: String) {
        if self.down.remove(&name) {
            sim.bounce(name);
        }
    }

    fn heal(&mut self, sim: &mut Sim<'_>, rings: &Shared) {
        rings.borrow_mut().note("weather", "all is healed");
        for worker in 0..self.workers {
            self.end(sim, rings, Fault::Hold(worker));
            self.end(sim, rings, Fault::Cut(worker));
            self.end(sim, rings, Fault::CrashWorker(worker));
            (0..worker).for_each(|other| self.end(sim, rings, Fault::CutPeers(worker, other)));
        }
        self.end(sim, rings, Fault::CrashCoordinator);
    }
}

/// The host of a worker.
pub fn host(worker: usize) -> String {
    format!("worker-{}", worker + 1)
}
