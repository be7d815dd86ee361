//! Simulated members: what a worker is told of a run, and what it tells; after worker/src/control/member.rs.

use std::rc::Rc;

use takuma_core::event::*;
use takuma_core::ids::{Generation, Step};

use crate::net::Up;
use crate::ring::Key;
use crate::spool::Spool;
use crate::state::State;
use crate::support;
use crate::trainer::{At, Command, Note, Trainer};
use crate::world::{Ev, Pid, World};

/// A worker's part in one run, through however many groups and sessions.
#[derive(Debug)]
pub struct Member {
    /// Tells it from the worker's other memberships.
    pub token: u64,
    pub present: Rc<Prepare>,
    next: Option<Next>,
    pub stage: Stage,
    pub spool: Spool,
    pub stop: bool,
    pub step: Step,
    pub stateful: bool,
    pub phase: &'static str,
    parked: bool,
    pub failed: Option<(FailureKind, &'static str)>,
}

#[derive(Debug)]
struct Next {
    prepare: Rc<Prepare>,
    started: bool,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a worker")]
pub enum Stage {
    Loading,
    Ready(Option<State>),
    Training(Trainer),
    Over,
}

impl Member {
    pub fn claim(&self) -> Option<Claim> {
        if !matches!(self.stage, Stage::Training(_)) || !self.stateful {
            return None;
        }
        let next = self.next.as_ref().filter(|next| next.started);
        Some(Claim {
            position: Position { step: self.step, phase: 0 },
            changes_to: next.map(|next| next.prepare.fence.generation),
            ..support::claim(&self.present, self.parked)
        })
    }

    pub fn progress(&self) -> Progress {
        let times = StepTimes::default();
        Progress { fence: self.present.fence.clone(), step: self.step, phase: self.phase.into(), times }
    }

    fn goes_on_with(&self, prepare: &Prepare) -> bool {
        self.present.run_id == prepare.run_id
            && prepare.state == StateSource::Peers
            && matches!(self.stage, Stage::Training(_))
    }

    fn enter(&mut self, prepare: Rc<Prepare>) {
        self.spool.enter(prepare.fence.generation, prepare.rank);
        self.present = prepare;
        self.parked = false;
    }

    fn fence(&self, generation: Generation) -> Fence {
        Fence { generation, ..self.present.fence.clone() }
    }

    fn say_failed(&mut self, generation: Generation, kind: FailureKind, message: &'static str) {
        let fence = self.fence(generation);
        let (step, phase) = (self.step, self.phase.to_owned());
        self.spool.news(Up::Failed(MemberFailure { fence, step, phase, kind, message: message.into() }));
    }

    fn fail(&mut self, kind: FailureKind, message: &'static str) {
        self.failed = Some((kind, message));
        self.say_failed(self.present.fence.generation, kind, message);
    }

    /// Takes in what the trainer found out.
    fn noted(&mut self, generation: u64, note: Note) {
        if let Some(next) = self.next.take_if(|next| next.prepare.fence.generation.0 == generation) {
            self.enter(next.prepare);
        }
        let generation = Generation(generation);
        if generation != self.present.fence.generation && !matches!(note, Note::Failed(..)) {
            return;
        }
        let fence = self.present.fence.clone();
        match note {
            Note::Formed { position, stalled_s, restored } => {
                if self.present.rank == 0 {
                    self.spool.news(Up::Formed(Formed { fence, position, stalled_s, restored }));
                }
            }
            Note::Broken { stale: true, .. } => self.parked = true,
            Note::Broken { suspect, .. } => {
                self.parked = true;
                self.say_failed(generation, FailureKind::PeerLost { suspect }, "a link broke");
            }
            Note::Ended { outcome, step, hash } => {
                let weights_sha256 = hash.map_or(String::new(), |hash| format!("{hash:016x}"));
                self.spool.news(Up::Ended(MemberEnd { fence, outcome, step, weights_sha256 }));
            }
            Note::Failed(kind, message) => self.fail(kind, message),
        }
    }
}

impl World {
    /// Sends what was not sent yet in this session.
    pub fn send_results(&mut self, pid: Pid) {
        let Some(s) = self.processes[pid].session else { return };
        let Some(member) = &mut self.processes[pid].member else { return };
        let mut messages = Vec::new();
        while member.spool.has_unsent() {
            messages.extend(member.spool.take_unsent());
        }
        let is_over = member.failed.is_some();
        for message in messages {
            self.send_up(s, message);
        }
        if is_over {
            self.drop_member(pid);
        }
    }

    pub fn follow(&mut self, pid: Pid, directive: Directive) {
        self.note_directive(pid, &directive);
        if let Directive::Prepare(prepare) = directive {
            return self.told_prepare(pid, Rc::new(*prepare));
        }
        if matches!(directive, Directive::Farewell) {
            return self.exit(pid);
        }
        let Some(member) = &mut self.processes[pid].member else { return };
        let present = member.present.fence.clone();
        match directive {
            Directive::Start(fence) if fence.run == present.run => self.told_start(pid, fence.generation),
            Directive::Stop(fence) if fence == present => member.stop = true,
            Directive::Abort { fence, .. } => {
                let is_next = |next: &mut Next| next.prepare.fence == fence && !next.started;
                if member.next.take_if(is_next).is_none() && fence == present {
                    self.drop_member(pid);
                }
            }
            Directive::Release(fence) if fence == present => self.drop_member(pid),
            Directive::CheckpointCommitted { run, step } if run == present.run => member.spool.commit(step),
            Directive::Kept { run, step, grids, reals, resend } if run == present.run => {
                member.spool.keep(Stored { step, grids: grids.into_iter().collect(), reals }, resend);
            }
            _ => {}
        }
    }

    fn told_prepare(&mut self, pid: Pid, prepare: Rc<Prepare>) {
        match &self.processes[pid].member {
            Some(member) if member.goes_on_with(&prepare) => self.go_on(pid, prepare),
            _ => {
                self.drop_member(pid);
                self.begin(pid, prepare);
            }
        }
    }

    fn begin(&mut self, pid: Pid, prepare: Rc<Prepare>) {
        self.fence_off(pid, &prepare);
        let token = self.fresh();
        let spool = Spool::new(&prepare.fence, prepare.rank);
        let step = if let StateSource::Checkpoint(step) = prepare.state { step } else { 0 };
        self.processes[pid].member = Some(Member {
            token,
            present: prepare,
            next: None,
            stage: Stage::Loading,
            spool,
            stop: false,
            step,
            stateful: false,
            phase: "loading",
            parked: false,
            failed: None,
        });
        let at = self.now + self.rng.within(20, 500);
        self.schedule(at, Ev::Loaded { pid, token });
    }

    fn fence_off(&mut self, pid: Pid, prepare: &Prepare) {
        let newest = self.processes[pid].fenced.entry(prepare.fence.run.clone()).or_default();
        *newest = (*newest).max(prepare.fence.generation.0);
    }

    /// Whether the next neighbour in the ring can be reached, and who it is.
    fn probe(&self, pid: Pid, prepare: &Prepare) -> Result<(), u32> {
        let rank = (prepare.rank + 1) % prepare.members.len() as u32;
        let neighbour = self.pids[&prepare.members[rank as usize].process_id];
        let reached =
            neighbour == pid || (self.processes[neighbour].alive && !self.is_link_cut(pid, neighbour));
        if reached { Ok(()) } else { Err(rank) }
    }

    pub fn loaded(&mut self, pid: Pid, token: u64) {
        let Some(member) = self.processes[pid].member.as_ref().filter(|member| member.token == token) else {
            return;
        };
        let prepare = Rc::clone(&member.present);
        let result = match prepare.state {
            StateSource::Fresh => Ok(Some(State::fresh(prepare.config.seed, prepare.fence.generation.0))),
            StateSource::Checkpoint(step) => {
                Ok(Some(self.read_checkpoint(&prepare.fence.run, step, prepare.fence.generation.0)))
            }
            StateSource::Peers => self.probe(pid, &prepare).map(|()| None),
        };
        let Some(member) = &mut self.processes[pid].member else { return };
        match result {
            Ok(state) => {
                member.stage = Stage::Ready(state);
                member.spool.news(Up::Prepared(prepare.fence.clone()));
            }
            Err(rank) => {
                member.stage = Stage::Over;
                member.fail(FailureKind::PeerLost { suspect: Some(rank) }, "a neighbour cannot be reached");
            }
        }
        self.send_results(pid);
    }

    fn go_on(&mut self, pid: Pid, prepare: Rc<Prepare>) {
        let generation = prepare.fence.generation;
        let Some(member) = &mut self.processes[pid].member else { return };
        if let Some((kind, message)) = member.failed {
            member.enter(prepare);
            return member.say_failed(generation, kind, message);
        }
        if prepare.when == When::NextStep {
            if let Some(before) = member.next.take_if(|next| next.started) {
                member.enter(before.prepare);
            }
            member.next = Some(Next { prepare, started: false });
            let at = self.now + self.rng.within(1, 200);
            return self.schedule(at, Ev::Probed { pid, generation: generation.0 });
        }
        member.next = None;
        member.enter(Rc::clone(&prepare));
        self.fence_off(pid, &prepare);
        self.end_ring_below(pid, generation.0);
        self.command(pid, Command::Form(prepare));
    }

    pub fn probed(&mut self, pid: Pid, generation: u64) {
        let Some(member) = &self.processes[pid].member else { return };
        let next = member.next.as_ref().filter(|next| next.prepare.fence.generation.0 == generation);
        let Some(prepare) = next.map(|next| Rc::clone(&next.prepare)) else { return };
        let result = self.probe(pid, &prepare);
        let Some(member) = &mut self.processes[pid].member else { return };
        let generation = Generation(generation);
        match result {
            Ok(()) => {
                let fence = member.fence(generation);
                member.spool.news(Up::Prepared(fence));
            }
            Err(rank) => {
                member.next = None;
                let kind = FailureKind::PeerLost { suspect: Some(rank) };
                member.say_failed(generation, kind, "a neighbour cannot be reached");
            }
        }
        self.send_results(pid);
    }

    fn told_start(&mut self, pid: Pid, generation: Generation) {
        let Some(member) = &mut self.processes[pid].member else { return };
        if let Some(next) = member.next.as_mut().filter(|next| next.prepare.fence.generation == generation) {
            next.started = true;
            let seat = Rc::clone(&next.prepare);
            return self.command(pid, Command::Next(seat));
        }
        if generation > member.present.fence.generation {
            return self.command(pid, Command::Leave(generation.0));
        }
        if generation != member.present.fence.generation {
            return;
        }
        match std::mem::replace(&mut member.stage, Stage::Over) {
            Stage::Ready(state) => {
                member.stateful = state.is_some();
                member.stage = Stage::Training(Trainer::new(state));
                let seat = Rc::clone(&member.present);
                self.command(pid, Command::Form(seat));
            }
            other => member.stage = other,
        }
    }

    fn command(&mut self, pid: Pid, command: Command) {
        if let Some(trainer) = self.processes[pid].trainer() {
            trainer.commands.push_back(command);
            self.poke(pid);
        }
    }

    /// What the trainer found out reaches the coordinator as soon as there is a session.
    pub fn note(&mut self, pid: Pid, generation: u64, note: Note) {
        let Some(member) = &mut self.processes[pid].member else { return };
        member.noted(generation, note);
        self.send_results(pid);
    }

    /// Ends the membership at once; peers see its sockets close.
    pub fn drop_member(&mut self, pid: Pid) {
        let at = self.processes[pid].trainer().map(|trainer| std::mem::replace(&mut trainer.at, At::Parked));
        self.processes[pid].member = None;
        if let Some(At::Ring { key, .. }) = at {
            self.break_ring(&key, None);
        }
    }

    /// A newer group takes the place of the one that the trainer is in.
    fn end_ring_below(&mut self, pid: Pid, generation: u64) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let old = match &trainer.at {
            At::Ring { key, .. } if key.1 < generation => Some(key.clone()),
            _ => None,
        };
        if let Some(key) = old {
            let key: Key = key;
            self.break_ring(&key, None);
            self.schedule(self.now, Ev::Broken { pid, key, suspect: None, stale: false });
        }
    }
}
