//! Simulated trainers, after worker/src/trainer/{thread,agree,samples}.rs: groups, phases, votes, grids, checkpoints.

use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use takuma_core::event::*;
use takuma_core::ids::Step;

use crate::ring::{Key, Offer, Sums};
use crate::spool::Report;
use crate::state::{State, fed};
use crate::support;
use crate::world::{Ev, Pid, World};

/// Grids whose generator is kept until they are stored.
const MAX_KEPT: usize = 4;

/// What the trainer is told.
#[derive(Debug)]
pub enum Command {
    Form(Rc<Prepare>),
    Next(Rc<Prepare>),
    Leave(u64),
}

/// What it finds out.
#[derive(Debug)]
pub enum Note {
    Formed { position: Position, stalled_s: f64, restored: u32 },
    Broken { suspect: Option<u32>, stale: bool },
    Ended { outcome: Outcome, step: Step, hash: Option<u64> },
    Failed(FailureKind, &'static str),
}

/// Where a trainer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    Parked,
    /// In a ring; waiting for an exchange, or computing what it brings into it. A ring that broke meanwhile is
    /// noticed at the exchange.
    Ring {
        key: Key,
        exchange: u64,
        waits: bool,
        broken: Option<Option<u32>>,
    },
    /// Writes the last checkpoint.
    Writing,
}

/// A worker's part of a run.
#[derive(Debug)]
pub struct Trainer {
    pub commands: VecDeque<Command>,
    now: Option<Rc<Prepare>>,
    next: Option<Rc<Prepare>>,
    leaves: Option<u64>,
    pub state: Option<State>,
    pub at: At,
    seat: Option<Rc<Prepare>>,
    broken_since: Option<u64>,
    checkpoint_overdue: bool,
    was_rank_0: bool,
    grids: BTreeSet<Step>,
    pub uploading: u32,
}

impl Trainer {
    pub fn new(state: Option<State>) -> Self {
        Self {
            commands: VecDeque::new(),
            now: None,
            next: None,
            leaves: None,
            state,
            at: At::Parked,
            seat: None,
            broken_since: None,
            checkpoint_overdue: false,
            was_rank_0: true,
            grids: BTreeSet::new(),
            uploading: 0,
        }
    }

    /// Takes in what was told meanwhile. A group that is to be formed now makes earlier plans void.
    fn listen(&mut self) {
        while let Some(command) = self.commands.pop_front() {
            match command {
                Command::Form(seat) => {
                    (self.next, self.leaves) = (None, None);
                    self.now = Some(seat);
                }
                Command::Next(seat) => self.next = Some(seat),
                Command::Leave(generation) => self.leaves = Some(generation),
            }
        }
    }

    fn ready_for(&self) -> u64 {
        self.next.as_ref().map(|seat| seat.fence.generation.0).or(self.leaves).unwrap_or(0)
    }
}

impl World {
    /// Takes up what a parked trainer was told.
    pub fn poke(&mut self, pid: Pid) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        if trainer.at != At::Parked {
            return;
        }
        trainer.listen();
        if let Some(seat) = trainer.now.take() {
            self.take_part(pid, seat);
        }
    }

    fn take_part(&mut self, pid: Pid, seat: Rc<Prepare>) {
        let generation = seat.fence.generation.0;
        let world = seat.members.len();
        let neighbours = [world - 1, 0, 1].map(|step| {
            let rank = (seat.rank as usize + step) % world;
            self.pids[&seat.members[rank].process_id]
        });
        let newer = |other: &Pid| {
            let process = &self.processes[*other];
            let reached =
                *other == pid || (process.alive && !process.stopped && !self.is_link_cut(pid, *other));
            reached && process.fenced.get(&seat.fence.run).is_some_and(|&newest| newest > generation)
        };
        let is_stale = neighbours.iter().any(newer);
        let key = (seat.fence.run.clone(), generation);
        let Some(member) = &mut self.processes[pid].member else { return };
        member.phase = "forming";
        let reports: Vec<Report> = member.spool.reports.values().copied().collect();
        let Some(trainer) = self.processes[pid].trainer() else { return };
        trainer.seat = Some(Rc::clone(&seat));
        trainer.at = At::Ring { key: key.clone(), exchange: 0, waits: true, broken: None };
        let state = trainer.state;
        if is_stale {
            return self.broken(pid, &key, None, true);
        }
        let at = self.now + seat.config.exchange_timeout_ms;
        self.schedule(at, Ev::FormingDue { pid, key });
        self.offer(&seat, 0, Offer { state, reports: Rc::new(reports), fed: 0, stop: false, ready: 0 });
    }

    /// The news of a broken ring reaches a member.
    pub fn broken(&mut self, pid: Pid, key: &Key, suspect: Option<u32>, stale: bool) {
        let now = self.now;
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let At::Ring { key: own, waits, broken, .. } = &mut trainer.at else { return };
        if own != key {
            return;
        }
        if !*waits {
            *broken = Some(suspect);
            return;
        }
        trainer.at = At::Parked;
        trainer.broken_since.get_or_insert(now);
        trainer.checkpoint_overdue = true;
        let seat = trainer.seat.clone();
        let Some(seat) = seat else { return };
        // Nobody blames itself, but the neighbour on the other end.
        let world = seat.members.len() as u32;
        let suspect = suspect.map(|rank| if rank == seat.rank { (rank + 1) % world } else { rank });
        if let Some(member) = &mut self.processes[pid].member {
            member.phase = "parked";
        }
        self.note(pid, key.1, Note::Broken { suspect, stale });
        self.poke(pid);
    }

    /// An exchange has come to its end at a member.
    pub fn exchanged(&mut self, pid: Pid, key: &Key, sums: &Sums) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let At::Ring { key: own, exchange, waits: true, .. } = &trainer.at else { return };
        if own != key || *exchange != sums.exchange {
            return;
        }
        match sums.exchange {
            0 => self.agreed(pid, key, sums),
            _ => self.applied(pid, key, sums),
        }
    }

    fn agreed(&mut self, pid: Pid, key: &Key, sums: &Sums) {
        let now = self.now;
        let furthest = self.furthest(key, sums);
        let Some(member) = &mut self.processes[pid].member else { return };
        let rank = member.present.rank;
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let rank = trainer.seat.as_ref().map_or(rank, |seat| seat.rank);
        let receives = trainer.state.map(|state| state.at) != Some(furthest.at);
        if receives {
            trainer.state = Some(furthest);
        }
        let stalled_s = trainer.broken_since.take().map_or(0.0, |since| (now - since) as f64 / 1000.0);
        trainer.checkpoint_overdue |= rank == 0 && !trainer.was_rank_0;
        trainer.was_rank_0 = rank == 0;
        let Some(member) = &mut self.processes[pid].member else { return };
        if receives {
            sums.reports.iter().for_each(|&report| member.spool.report(report));
            member.spool.given = true;
        }
        member.step = furthest.at.step;
        member.stateful = true;
        self.check_state(pid, key, &furthest);
        self.note_formed(key);
        let note = Note::Formed { position: furthest.at, stalled_s, restored: sums.restored };
        self.note(pid, key.1, note);
        if rank == sums.source {
            self.render_missing(pid);
        }
        if furthest.at == Position::default() {
            self.render(pid, GridKind::Reals, 0);
            self.render(pid, GridKind::Generated, 0);
        }
        self.next_step(pid);
    }

    /// The top of the training loop: between two steps, or within the one that a group goes on with.
    fn next_step(&mut self, pid: Pid) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let (Some(seat), Some(state)) = (trainer.seat.clone(), trainer.state) else { return };
        if state.at.step >= seat.target_steps {
            return self.finish(pid, Outcome::Completed);
        }
        trainer.listen();
        if trainer.now.is_some() {
            trainer.at = At::Parked;
            let key = (seat.fence.run.clone(), seat.fence.generation.0);
            self.break_ring(&key, None);
            self.note(pid, key.1, Note::Broken { suspect: None, stale: false });
            return self.poke(pid);
        }
        self.compute(pid);
    }

    fn compute(&mut self, pid: Pid) {
        let slow = self.rng.one_in(50);
        let takes = if slow { 10 * self.plan.phase_ms } else { self.plan.phase_ms };
        let at = self.now + self.rng.within(takes / 2, takes + 2);
        let Some(member) = &mut self.processes[pid].member else { return };
        member.phase = "d";
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let At::Ring { key, exchange, waits, .. } = &mut trainer.at else { return };
        (*waits, *exchange) = (false, *exchange + 1);
        let (key, exchange) = (key.clone(), *exchange);
        self.schedule(at, Ev::Computed { pid, key, exchange });
    }

    /// A member has computed its part of a phase.
    pub fn computed(&mut self, pid: Pid, key: &Key, exchange: u64) {
        let Some(member) = &self.processes[pid].member else { return };
        let stop = member.stop;
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let ready = trainer.ready_for();
        let At::Ring { key: own, exchange: at, waits, broken } = &mut trainer.at else { return };
        if own != key || *at != exchange || *waits {
            return;
        }
        *waits = true;
        if let Some(suspect) = *broken {
            return self.broken(pid, key, suspect, false);
        }
        let (Some(seat), Some(state)) = (trainer.seat.clone(), trainer.state) else { return };
        let fed = fed(state.at.step, seat.members[seat.rank as usize].slots);
        let offer = Offer { state: None, reports: Rc::default(), fed, stop, ready };
        self.offer(&seat, exchange, offer);
    }

    fn applied(&mut self, pid: Pid, key: &Key, sums: &Sums) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let (Some(seat), Some(state)) = (trainer.seat.clone(), &mut trainer.state) else { return };
        state.apply(sums.fed);
        let state = *state;
        self.check_state(pid, key, &state);
        if state.at.phase > 0 {
            return self.compute(pid);
        }
        self.finish_step(pid, &seat, state, sums.fed);
        if state.at.step >= seat.target_steps {
            return self.next_step(pid);
        }
        if sums.stops > 0 {
            return self.finish(pid, Outcome::Stopped);
        }
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let ready = trainer.ready_for();
        if ready == 0 || sums.ready != ready * seat.members.len() as u64 {
            return self.next_step(pid);
        }
        trainer.at = At::Parked;
        trainer.leaves = None;
        let next = trainer.next.take();
        self.leave_ring(key);
        match next {
            Some(next) => self.take_part(pid, next),
            None => self.poke(pid),
        }
    }

    fn finish_step(&mut self, pid: Pid, seat: &Prepare, state: State, fed: u64) {
        let step = state.at.step;
        let Some(member) = &mut self.processes[pid].member else { return };
        member.step = step;
        member.spool.report(Report { step, fed, hash: state.hash });
        let last = step == seat.target_steps;
        if step.is_multiple_of(seat.config.sample_every) || last {
            self.render(pid, GridKind::Generated, step);
        }
        if !last && seat.rank == 0 {
            self.offer_checkpoint(pid, seat, state);
        }
        self.send_results(pid);
    }

    fn offer_checkpoint(&mut self, pid: Pid, seat: &Prepare, state: State) {
        let step = state.at.step;
        let every = seat.config.checkpoint_every;
        let Some(member) = &mut self.processes[pid].member else { return };
        let (committed, token) = (member.spool.committed, member.token);
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let missed = trainer.checkpoint_overdue && committed < step / every * every;
        if !(step.is_multiple_of(every) || missed) || trainer.uploading >= 2 {
            return;
        }
        trainer.checkpoint_overdue = false;
        trainer.uploading += 1;
        let at = self.now + self.rng.within(5, 400);
        self.schedule(at, Ev::Uploaded { pid, token, state, end: None });
    }

    fn finish(&mut self, pid: Pid, outcome: Outcome) {
        let Some(member) = &mut self.processes[pid].member else { return };
        let token = member.token;
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let (Some(seat), Some(state)) = (trainer.seat.clone(), trainer.state) else { return };
        trainer.at = At::Writing;
        let is_writer = seat.rank == 0;
        let at = self.now + if is_writer { self.rng.within(5, 400) } else { 0 };
        let end = Some((outcome, seat.fence.generation.0, is_writer));
        self.schedule(at, Ev::Uploaded { pid, token, state, end });
    }

    /// A checkpoint's parts lie in the store; with `end`, the trainer is through.
    pub fn uploaded(&mut self, pid: Pid, token: u64, state: State, end: Option<(Outcome, u64, bool)>) {
        let writes = end.is_none_or(|(_, _, writes)| writes);
        if writes && self.store_is_down() {
            return self.schedule(self.now + 1_000, Ev::Uploaded { pid, token, state, end });
        }
        let Some(member) = self.processes[pid].member.as_mut().filter(|member| member.token == token) else {
            return;
        };
        if writes {
            member.spool.upload(state.at.step, state.hash);
        }
        let Some((outcome, generation, _)) = end else {
            if let Some(trainer) = self.processes[pid].trainer() {
                trainer.uploading -= 1;
            }
            return self.send_results(pid);
        };
        member.phase = "ended";
        let hash = writes.then_some(state.hash);
        self.note(pid, generation, Note::Ended { outcome, step: state.at.step, hash });
        if let Some(trainer) = self.processes[pid].trainer() {
            trainer.at = At::Parked;
        }
        self.poke(pid);
    }

    fn render(&mut self, pid: Pid, kind: GridKind, step: Step) {
        let Some(member) = &mut self.processes[pid].member else { return };
        let known = if kind == GridKind::Reals {
            member.spool.kept.reals
        } else {
            member.spool.kept.grids.contains(&step)
        };
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let Some(seat) = trainer.seat.clone() else { return };
        if known {
            return;
        }
        if kind == GridKind::Generated {
            trainer.grids.insert(step);
            if trainer.grids.len() > MAX_KEPT {
                trainer.grids.pop_first();
            }
        }
        let share = seat.members[seat.rank as usize].slots;
        self.spool_tile(pid, &seat, kind, step, (share.first, share.count));
    }

    /// Renders whole every grid that is not known to be stored.
    fn render_missing(&mut self, pid: Pid) {
        let Some(member) = &mut self.processes[pid].member else { return };
        let known = member.spool.kept.grids.clone();
        let Some(trainer) = self.processes[pid].trainer() else { return };
        trainer.grids.retain(|step| !known.contains(step));
        let (grids, Some(seat)) = (trainer.grids.clone(), trainer.seat.clone()) else { return };
        for step in grids {
            self.spool_tile(pid, &seat, GridKind::Generated, step, (0, seat.config.global_batch));
        }
    }

    fn spool_tile(&mut self, pid: Pid, seat: &Prepare, kind: GridKind, step: Step, cells: (u32, u32)) {
        let (first, count) = cells;
        let Some(member) = self.processes[pid].member.as_mut().filter(|_| count > 0) else { return };
        let cells_total = seat.config.global_batch;
        let tile = support::tile(seat.fence.clone(), step, first, count);
        member.spool.tile(Tile { kind, cells_total, ..tile });
        self.send_results(pid);
    }

    /// Something is wrong with a worker itself, in the middle of its work.
    pub fn fail_locally(&mut self, pid: Pid) {
        let Some(trainer) = self.processes[pid].trainer() else { return };
        let At::Ring { key, .. } = std::mem::replace(&mut trainer.at, At::Parked) else { return };
        self.break_ring(&key, None);
        if let Some(member) = &mut self.processes[pid].member {
            member.stage = crate::member::Stage::Over;
        }
        self.note(pid, key.1, Note::Failed(FailureKind::Local, "out of memory"));
    }
}
