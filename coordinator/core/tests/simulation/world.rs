//! [`World`]: simulated time, what is going to happen, and everybody that it happens to.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use takuma_core::event::{Hello, Outcome};

use crate::checks::Checks;
use crate::coordinator::Coordinator;
use crate::faults::Fault;
use crate::net::{Cut, Down, Session, Up};
use crate::person::Person;
use crate::plan::Plan;
use crate::process::Process;
use crate::report::Stats;
use crate::ring::{Key, Ring, Sums};
use crate::rng::Rng;
use crate::state::State;
use crate::store::Store;

/// A process, by its place in [`World::processes`].
pub type Pid = usize;

/// What happens at its time.
#[derive(Debug, Clone)]
pub enum Ev {
    // At the coordinator.
    Up { s: usize, message: Up },
    Hello { s: usize, hello: Box<Hello> },
    UpClosed { s: usize },
    Tick { life: u32, at: u64 },
    Stored { life: u32, run: String },
    LinesDue { life: u32, run: String },
    // At a worker.
    Down { s: usize, message: Down },
    DownClosed { s: usize },
    Connect { pid: Pid },
    WelcomeDue { pid: Pid, s: usize },
    Beat { pid: Pid, s: usize },
    Loaded { pid: Pid, token: u64 },
    Probed { pid: Pid, generation: u64 },
    Computed { pid: Pid, key: Key, exchange: u64 },
    Exchanged { pid: Pid, key: Key, sums: Rc<Sums> },
    Broken { pid: Pid, key: Key, suspect: Option<u32>, stale: bool },
    FormingDue { pid: Pid, key: Key },
    Uploaded { pid: Pid, token: u64, state: State, end: Option<(Outcome, u64, bool)> },
    GraceOver { pid: Pid },
    // In the world.
    Silence { key: Key, a: Pid, b: Pid },
    Keepalive { s: usize },
    Heal { cut: Cut },
    Resume { pid: Pid },
    CoordinatorUp,
    CoordinatorResumes,
    Fault,
    CrashCoordinator { away_ms: u64 },
    Person,
    Calm,
}

/// See the module.
pub struct World {
    pub plan: Plan,
    pub now: u64,
    pub rng: Rng,
    queue: BTreeMap<(u64, u64), Ev>,
    sequence: u64,
    pub coordinator: Coordinator,
    pub store: Store,
    pub processes: Vec<Process>,
    pub pids: BTreeMap<String, Pid>,
    pub sessions: Vec<Session>,
    pub rings: BTreeMap<Key, Ring>,
    pub cuts: Vec<Cut>,
    pub person: Person,
    pub checks: Checks,
    pub stats: Stats,
    /// The storm is over.
    pub is_calm: bool,
    /// Everything that happened, as one number; only when asked for.
    traces: bool,
    prints: bool,
    digest: DefaultHasher,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let clock = 1_700_000_000_000 + rng.within(0, 1_000_000_000);
        let mut world = Self {
            now: 0,
            rng,
            queue: BTreeMap::new(),
            sequence: 0,
            coordinator: Coordinator::new(clock),
            store: Store::default(),
            processes: Vec::new(),
            pids: BTreeMap::new(),
            sessions: Vec::new(),
            rings: BTreeMap::new(),
            cuts: Vec::new(),
            person: Person::default(),
            checks: Checks::default(),
            stats: Stats::default(),
            is_calm: false,
            traces: false,
            prints: std::env::var_os("TAKUMA_SIM_TRACE").is_some(),
            digest: DefaultHasher::new(),
            plan,
        };
        for number in 0..world.plan.workers {
            world.start_process(&format!("w{number}"));
        }
        world.schedule(1, Ev::Person);
        world.schedule(world.plan.storm_from_ms, Ev::Fault);
        world.schedule(world.plan.storm_until_ms, Ev::Calm);
        world
    }

    /// Keeps a digest of everything that happens.
    pub fn traced(mut self) -> Self {
        self.traces = true;
        self
    }

    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    pub fn trace(&mut self, line: impl FnOnce() -> String) {
        if self.traces || self.prints {
            let line = line();
            line.hash(&mut self.digest);
            if self.prints {
                println!("{line}");
            }
        }
    }

    pub fn violated(&self, what: &str) -> ! {
        panic!("after {} ms: {what}", self.now)
    }

    /// A number that is never given again.
    pub fn fresh(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    pub fn schedule(&mut self, at: u64, event: Ev) {
        let sequence = self.fresh();
        self.queue.insert((at.max(self.now), sequence), event);
    }

    /// The coordinator dies at this time, and is away for so long.
    pub fn crash_at(&mut self, at: u64, away_ms: u64) {
        self.schedule(at, Ev::CrashCoordinator { away_ms });
    }

    /// Runs until every run has succeeded.
    pub fn run(&mut self) {
        let bound = self.plan.storm_until_ms + self.plan.calm_ms;
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            if self.now > bound {
                let views = self.coordinator.cluster.run_views();
                let left = views.iter().filter(|view| {
                    view.record.step < view.record.target_steps || !view.record.status.is_ended()
                });
                let left: Vec<String> = left
                    .map(|view| {
                        format!(
                            "{} is {:?} at step {} ({})",
                            view.record.name, view.record.status, view.record.step, view.record.error
                        )
                    })
                    .collect();
                self.violated(&format!(
                    "the faults are over for {} s, but {}",
                    self.plan.calm_ms / 1000,
                    left.join(", ")
                ));
            }
            self.happen(event);
            if self.is_calm && self.all_succeeded() {
                self.check_end();
                return;
            }
        }
    }

    /// Whose process an event needs.
    fn place_of(&self, event: &Ev) -> Option<Pid> {
        match event {
            Ev::Down { s, .. } | Ev::DownClosed { s } | Ev::Keepalive { s } => Some(self.sessions[*s].pid),
            Ev::Connect { pid }
            | Ev::WelcomeDue { pid, .. }
            | Ev::Beat { pid, .. }
            | Ev::Loaded { pid, .. }
            | Ev::Probed { pid, .. }
            | Ev::Computed { pid, .. }
            | Ev::Exchanged { pid, .. }
            | Ev::Broken { pid, .. }
            | Ev::FormingDue { pid, .. }
            | Ev::Uploaded { pid, .. }
            | Ev::GraceOver { pid } => Some(*pid),
            _ => None,
        }
    }

    fn happen(&mut self, event: Ev) {
        if let Some(pid) = self.place_of(&event) {
            let process = &mut self.processes[pid];
            if !process.alive {
                return;
            }
            if process.stopped {
                return process.held.push(event);
            }
            let now = self.now;
            self.trace(|| format!("{now} w{pid} {event:?}"));
            return self.at_worker(event);
        }
        let needs_core = matches!(
            event,
            Ev::Up { .. }
                | Ev::Hello { .. }
                | Ev::UpClosed { .. }
                | Ev::Tick { .. }
                | Ev::Stored { .. }
                | Ev::LinesDue { .. }
        );
        if !needs_core {
            return self.in_the_world(event);
        }
        if self.coordinator.stopped {
            return self.coordinator.held.push(event);
        }
        match event {
            Ev::Up { s, message } => self.arrived_up(s, message),
            Ev::Hello { s, hello } => self.hello(s, *hello),
            Ev::UpClosed { s } => self.up_closed(s),
            Ev::Tick { life, at } => self.tick(life, at),
            Ev::Stored { life, run } => self.stored(life, &run),
            Ev::LinesDue { life, run } => self.lines_due(life, &run),
            _ => {}
        }
    }

    fn at_worker(&mut self, event: Ev) {
        match event {
            Ev::Down { s, message } => self.arrived_down(s, message),
            Ev::DownClosed { s } => self.down_closed(s),
            Ev::Keepalive { s } => self.keepalive(s),
            Ev::Connect { pid } => self.connect(pid),
            Ev::WelcomeDue { pid, s } => self.welcome_due(pid, s),
            Ev::Beat { pid, s } => self.beat(pid, s),
            Ev::Loaded { pid, token } => self.loaded(pid, token),
            Ev::Probed { pid, generation } => self.probed(pid, generation),
            Ev::Computed { pid, key, exchange } => self.computed(pid, &key, exchange),
            Ev::Exchanged { pid, key, sums } => self.exchanged(pid, &key, &sums),
            Ev::Broken { pid, key, suspect, stale } => self.broken(pid, &key, suspect, stale),
            Ev::FormingDue { pid, key } => self.forming_due(pid, &key),
            Ev::Uploaded { pid, token, state, end } => self.uploaded(pid, token, state, end),
            Ev::GraceOver { pid } => self.grace_over(pid),
            _ => {}
        }
    }

    fn in_the_world(&mut self, event: Ev) {
        match event {
            Ev::Silence { key, a, b } => self.silence(&key, a, b),
            Ev::Heal { cut } => self.heal(cut),
            Ev::Resume { pid } => self.resume(pid),
            Ev::CoordinatorUp => self.restart_coordinator(),
            Ev::CoordinatorResumes => self.resume_coordinator(),
            Ev::Fault => self.next_fault(),
            Ev::CrashCoordinator { away_ms } => {
                self.crash_coordinator(false);
                self.fault_done(Fault::CrashCoordinator);
                self.schedule(self.now + away_ms, Ev::CoordinatorUp);
            }
            Ev::Person => self.look_after_runs(),
            Ev::Calm => self.calm_down(),
            _ => {}
        }
    }

    /// A process goes on where it was stopped; what came meanwhile is there at once.
    pub fn resume(&mut self, pid: Pid) {
        let process = &mut self.processes[pid];
        if std::mem::take(&mut process.stopped) {
            let held = std::mem::take(&mut process.held);
            self.catch_up(held);
            self.try_rings();
        }
    }

    /// What was held happens now, in its order and before all that comes now: streams keep their order.
    fn catch_up(&mut self, held: Vec<Ev>) {
        let mut place = 0;
        for event in held {
            while self.queue.contains_key(&(self.now, place)) {
                place += 1;
            }
            self.queue.insert((self.now, place), event);
        }
    }

    pub fn resume_coordinator(&mut self) {
        if std::mem::take(&mut self.coordinator.stopped) {
            // Messages first: a heartbeat that has come in must count before its deadline does.
            let (ticks, rest): (Vec<Ev>, Vec<Ev>) = std::mem::take(&mut self.coordinator.held)
                .into_iter()
                .partition(|event| matches!(event, Ev::Tick { .. }));
            self.catch_up(rest.into_iter().chain(ticks).collect());
        }
    }

    fn calm_down(&mut self) {
        self.is_calm = true;
        self.store.down_until = self.now;
        // What is left of the runs is not what takes the time.
        self.plan.phase_ms = self.plan.phase_ms.min(5);
        self.store.failing = 0;
        for cut in self.cuts.clone() {
            self.heal(cut);
        }
        for pid in 0..self.processes.len() {
            self.resume(pid);
        }
        self.resume_coordinator();
        self.restart_coordinator();
        for number in 0..2 {
            self.start_process(&format!("fresh{number}"));
        }
    }

    /// Remembers what was done to whom.
    pub fn fault_done(&mut self, fault: Fault) {
        *self.stats.faults.entry(fault).or_default() += 1;
        let now = self.now;
        self.trace(|| format!("{now} fault {fault:?}"));
    }
}
