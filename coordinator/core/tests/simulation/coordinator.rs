//! The coordinator's shell around the core: actions are carried out in their order, deadlines are kept, and it dies.

use std::collections::BTreeMap;

use takuma_core::cluster::{Cluster, Options};
use takuma_core::event::*;
use takuma_core::time::Timestamp;

use crate::net::Down;
use crate::store::{Job, Writer};
use crate::world::{Ev, World};

/// One life after the other.
#[derive(Debug)]
pub struct Coordinator {
    pub life: u32,
    pub up: bool,
    /// Its process is stopped, or its machine suspended.
    pub stopped: bool,
    /// What came while it was stopped.
    pub held: Vec<Ev>,
    pub cluster: Cluster,
    /// What its clock shows at the world's beginning; another in each life.
    pub clock: u64,
    /// When the next look at the deadlines is planned.
    ticks_at: Option<u64>,
    pub writers: BTreeMap<String, Writer>,
}

pub fn options() -> Options {
    Options::new("file:///s", "0")
}

impl Coordinator {
    pub fn new(clock: u64) -> Self {
        Self {
            life: 1,
            up: true,
            stopped: false,
            held: Vec::new(),
            cluster: Cluster::new(options()),
            clock,
            ticks_at: None,
            writers: BTreeMap::new(),
        }
    }
}

impl World {
    pub fn core_time(&self) -> Timestamp {
        Timestamp(self.coordinator.clock + self.now)
    }

    /// Lets the core know, and does what it says.
    pub fn apply(&mut self, event: Event) {
        if !self.coordinator.up {
            return;
        }
        self.stats.events += 1;
        let before = self.before(&event);
        let now = self.core_time();
        self.trace(|| format!("{} core {event:?}", now.0));
        let begin = std::time::Instant::now();
        let actions = self.coordinator.cluster.apply(now, event);
        self.stats.core_s += begin.elapsed().as_secs_f64();
        self.check_actions(&before, &actions);
        for action in actions {
            if !matches!(action, Action::PublishRun { .. }) {
                self.trace(|| format!("    {}", crate::support::tell(&action)));
            }
            self.perform(action);
        }
        self.check_cluster();
        self.plan_tick();
    }

    fn plan_tick(&mut self) {
        let Some(deadline) = self.coordinator.cluster.next_deadline() else { return };
        let at = deadline.0.saturating_sub(self.coordinator.clock).max(self.now);
        if self.coordinator.ticks_at.is_none_or(|planned| planned > at) {
            self.coordinator.ticks_at = Some(at);
            let life = self.coordinator.life;
            self.schedule(at, Ev::Tick { life, at });
        }
    }

    /// A look at the deadlines; they may have moved.
    pub fn tick(&mut self, life: u32, at: u64) {
        if life != self.coordinator.life || self.coordinator.ticks_at != Some(at) {
            return;
        }
        self.coordinator.ticks_at = None;
        let due = self.coordinator.cluster.next_deadline().is_some_and(|at| at <= self.core_time());
        if due {
            return self.apply(Event::Ticked);
        }
        self.plan_tick();
    }

    pub fn hello(&mut self, s: usize, hello: Hello) {
        let session = &mut self.sessions[s];
        if session.life != self.coordinator.life || !self.coordinator.up {
            // The port is closed: the worker hears of it at once.
            let at = self.now + 5;
            return self.schedule(at, Ev::DownClosed { s });
        }
        session.open_at_core = true;
        self.apply(Event::WorkerConnected { session: SessionId(s as u64), hello });
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::WelcomeWorker { session, .. } => self.send_down(session.0 as usize, Down::Welcome),
            Action::RefuseWorker { session, .. } => {
                self.send_down(session.0 as usize, Down::Refused);
                self.sessions[session.0 as usize].open_at_core = false;
                self.sessions[session.0 as usize].ended = true;
            }
            Action::CloseSession { session, .. } => {
                self.sessions[session.0 as usize].ended = true;
                self.close_core_end(session.0 as usize);
            }
            Action::Direct { session, directive } => {
                self.send_down(session.0 as usize, Down::Directive(directive));
            }
            Action::Answer { request, result } => self.answered(request, result),
            Action::SaveRun { record, first, acknowledge } => {
                let run = record.name.clone();
                self.write(&run, Job::Save { record, first, acknowledge });
            }
            Action::RecordMetrics { run, line } => self.write(&run, Job::Metrics(Box::new(line))),
            Action::RewindMetrics { run, step, lineage } => self.write(&run, Job::Rewind { step, lineage }),
            Action::StoreGrid { grid } => {
                let Grid { fence, kind, step, .. } = grid;
                self.write(&fence.run.clone(), Job::Grid { fence, kind, step });
            }
            Action::CommitCheckpoint { manifest, .. } => {
                self.write(&manifest.run.clone(), Job::Commit(manifest));
            }
            Action::FlushRun { fence } => self.write(&fence.run.clone(), Job::Flush(fence)),
            Action::CloseRun { run } => self.write(&run, Job::Close),
            Action::RecordEvent { run, event } => self.note_event(&run, &event),
            Action::RefuseStale { .. } => self.stats.refusals += 1,
            // The simulated store has no parts.
            Action::SweepCheckpoints { .. } | Action::PublishRun { .. } => {}
        }
    }

    /// The coordinator dies; all sessions break, and what was not stored is forgotten.
    pub fn crash_coordinator(&mut self, only_acknowledged: bool) {
        self.abandon_writers(only_acknowledged);
        self.coordinator.up = false;
        self.coordinator.stopped = false;
        self.coordinator.held.clear();
        self.coordinator.life += 1;
        self.coordinator.ticks_at = None;
        self.forget_life();
        for s in 0..self.sessions.len() {
            if self.sessions[s].open_at_core || self.sessions[s].open_at_worker {
                self.break_session(s);
                self.sessions[s].open_at_core = false;
            }
        }
    }

    /// Another one starts, with another clock, and reads the store before anybody can connect.
    pub fn restart_coordinator(&mut self) {
        if self.coordinator.up {
            return;
        }
        self.coordinator.up = true;
        self.coordinator.cluster = Cluster::new(options());
        let skew_ms = self.plan.skew_ms;
        self.coordinator.clock = self.coordinator.clock + self.rng.within(0, 2 * skew_ms + 1) - skew_ms;
        for event in self.found_in_store() {
            self.apply(event);
        }
        self.ask_again();
    }
}
