//! [`Member`]: what a worker is told of a run, and what it does; after worker/src/control/member.rs and
//! worker/src/trainer. It computes nothing.

use std::collections::BTreeSet;

use takuma_core::checkpoint::CHECKPOINT_PARTS;
use takuma_core::config::RunConfig;
use takuma_core::ids::Generation;
use takuma_core::layout;
use takuma_proto::v1;
use takuma_proto::v1::prepare::{State, When};
use takuma_proto::v1::run_failed::Kind;
use takuma_proto::v1::worker_message::Message;
use takuma_store::Store;

use crate::ring::{Entry, Shared, Standing, Turn};
use crate::spool::Spool;
use crate::support::membership;

/// A step takes so long.
const PACE_MS: u64 = 200;
/// Grids that are kept until they are stored.
const MAX_KEPT: usize = 4;
/// The side of a grid's cell: small, since thousands of grids are made.
const SIDE: u32 = 4;

/// A worker's part in a run, through however many groups and sessions.
pub struct Member {
    process: String,
    rings: Shared,
    store: Store,
    config: RunConfig,
    present: v1::Prepare,
    next: Option<Next>,
    /// It leaves when its group changes over to this generation.
    leaves: u64,
    place: Place,
    pub spool: Spool,
    step: u64,
    has_state: bool,
    parked: bool,
    broken_since: Option<u64>,
    checkpoint_overdue: bool,
    was_rank_0: bool,
    grids: BTreeSet<u64>,
}

/// The group that it will change over to.
struct Next {
    prepare: v1::Prepare,
    started: bool,
}

/// Where it is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Ready,
    Parked,
    Forming,
    Computing { until_ms: u64, exchange: u64 },
    Exchanging { exchange: u64 },
    Through { told: bool },
}

impl Member {
    /// Prepares for a group without state of its own.
    pub fn begin(process: &str, rings: Shared, store: Store, prepare: v1::Prepare) -> Self {
        let mut member = Self {
            process: process.to_owned(),
            rings,
            store,
            config: RunConfig::from_json(&prepare.config_json).unwrap(),
            next: None,
            leaves: 0,
            place: Place::Ready,
            spool: Spool::new(prepare.start_step),
            step: prepare.start_step,
            has_state: prepare.state() != State::Peers,
            parked: false,
            broken_since: None,
            checkpoint_overdue: false,
            was_rank_0: true,
            grids: BTreeSet::new(),
            present: prepare.clone(),
        };
        member.spool.enter(&prepare);
        member.answer(&prepare);
        member
    }

    pub fn run(&self) -> &str {
        &self.present.run
    }

    pub fn is(&self, run: &str, generation: u64) -> bool {
        self.present.run == run && self.present.generation == generation
    }

    pub fn claim(&self) -> Option<v1::Membership> {
        if self.place == Place::Ready || !self.has_state {
            return None;
        }
        let next = self.next.as_ref().filter(|next| next.started);
        Some(v1::Membership {
            position: Some(v1::Position { step: self.step, phase: 0 }),
            parked: self.parked,
            changes_to: next.map_or(0, |next| next.prepare.generation),
            ..membership(&self.present)
        })
    }

    pub fn heartbeat(&self) -> v1::Heartbeat {
        let phase = if self.parked { "parked" } else { "d" };
        let (run, generation) = (self.present.run.clone(), self.present.generation);
        v1::Heartbeat { run, generation, step: self.step, phase: phase.into(), ..v1::Heartbeat::default() }
    }

    /// Whether the group of `prepare` can be joined with the state that is here.
    pub fn goes_on_with(&self, prepare: &v1::Prepare) -> bool {
        let same = self.present.run_id == prepare.run_id;
        same && prepare.state() == State::Peers && self.place != Place::Ready
    }

    pub fn go_on(&mut self, prepare: v1::Prepare) {
        if prepare.when() == When::NextStep {
            if let Some(before) = self.next.take_if(|next| next.started) {
                self.enter(before.prepare);
            }
            if self.answer(&prepare) {
                self.next = Some(Next { prepare, started: false });
            }
            return;
        }
        self.next = None;
        self.leaves = 0;
        self.leave_ring();
        self.enter(prepare);
        self.form();
    }

    pub fn start(&mut self, generation: u64) {
        let present = self.present.generation;
        match &mut self.next {
            Some(next) if next.prepare.generation == generation => next.started = true,
            _ if generation > present => self.leaves = generation,
            _ if generation == present && self.place == Place::Ready => self.form(),
            _ => {}
        }
    }

    /// Drops a group that did not start; whether the whole membership is over.
    pub fn abort(&mut self, run: &str, generation: u64) -> bool {
        let is_next = |next: &mut Next| next.prepare.generation == generation && !next.started;
        self.next.take_if(is_next).is_none() && self.is(run, generation)
    }

    /// Says that it is prepared, unless its neighbour in the ring cannot be reached.
    fn answer(&mut self, prepare: &v1::Prepare) -> bool {
        let rank = (prepare.rank + 1) % prepare.members.len() as u32;
        let neighbour = &prepare.members[rank as usize].process_id;
        if self.rings.borrow().reaches(&self.process, neighbour) {
            let (run, generation) = (prepare.run.clone(), prepare.generation);
            self.spool.news(Message::Prepared(v1::Prepared { run, generation }));
            return true;
        }
        self.say_lost(prepare.generation, Some(rank), "a neighbour cannot be reached");
        false
    }

    fn say_lost(&mut self, generation: u64, suspect: Option<u32>, message: &str) {
        self.rings.borrow_mut().note(&self.process, &format!("lost g{generation} {suspect:?}"));
        self.spool.news(Message::RunFailed(v1::RunFailed {
            run: self.present.run.clone(),
            generation,
            step: self.step,
            phase: "d".into(),
            kind: Kind::PeerLost.into(),
            message: message.into(),
            suspect_rank: suspect.map_or(-1, |rank| rank as i32),
        }));
    }

    fn enter(&mut self, prepare: v1::Prepare) {
        self.spool.enter(&prepare);
        self.present = prepare;
        self.parked = false;
    }

    fn form(&mut self) {
        let step = self.has_state.then_some(self.step);
        let entry = Entry { step, reports: self.spool.reports.clone() };
        self.rings.borrow_mut().enter(&self.present, entry);
        self.place = Place::Forming;
    }

    /// Peers see its sockets close.
    fn leave_ring(&mut self) {
        if matches!(self.place, Place::Forming | Place::Computing { .. } | Place::Exchanging { .. }) {
            let now_ms = self.rings.borrow().now_ms;
            self.broken_since.get_or_insert(now_ms);
            self.checkpoint_overdue = true;
            self.rings.borrow_mut().break_ring(self.present.generation);
        }
    }

    /// Goes on as far as it can at this moment.
    pub async fn advance(&mut self) {
        let now_ms = self.rings.borrow().now_ms;
        match self.place {
            Place::Ready | Place::Parked => {}
            Place::Forming => {
                let turn = self.rings.borrow_mut().formed(&self.present);
                match turn {
                    Turn::Wait => {}
                    Turn::Done(standing) => self.agreed(&standing).await,
                    Turn::Broken(suspect) => self.broken(suspect),
                }
            }
            Place::Computing { until_ms, exchange } if until_ms <= now_ms => {
                let next = self.next.as_ref().filter(|next| next.started);
                let vote = next.map_or(self.leaves, |next| next.prepare.generation);
                self.rings.borrow_mut().offer(&self.present, exchange, vote);
                self.place = Place::Exchanging { exchange };
            }
            Place::Computing { .. } => {}
            Place::Exchanging { exchange } => {
                let turn = self.rings.borrow_mut().exchanged(&self.present, exchange);
                match turn {
                    Turn::Wait => {}
                    Turn::Done(change) => self.applied(exchange, change).await,
                    Turn::Broken(suspect) => self.broken(suspect),
                }
            }
            Place::Through { told } => self.tell_end(told),
        }
    }

    fn broken(&mut self, suspect: Option<u32>) {
        let now_ms = self.rings.borrow().now_ms;
        self.place = Place::Parked;
        self.parked = true;
        self.broken_since.get_or_insert(now_ms);
        self.checkpoint_overdue = true;
        // Nobody blames itself, but the neighbour on the other end.
        let (own, world) = (self.present.rank, self.present.members.len() as u32);
        let suspect = suspect.map(|rank| if rank == own { (rank + 1) % world } else { rank });
        self.say_lost(self.present.generation, suspect, "a link broke");
    }

    async fn agreed(&mut self, standing: &Standing) {
        let (rank, generation) = (self.present.rank, self.present.generation);
        if !self.has_state || self.step != standing.step {
            (self.has_state, self.step) = (true, standing.step);
            self.spool.reports.extend(standing.reports.clone());
        }
        self.rings.borrow_mut().note(&self.process, &format!("formed g{generation} at {}", self.step));
        self.parked = false;
        self.checkpoint_overdue |= rank == 0 && !self.was_rank_0;
        self.was_rank_0 = rank == 0;
        let now_ms = self.rings.borrow().now_ms;
        let stalled_s = self.broken_since.take().map_or(0.0, |since| (now_ms - since) as f64 / 1_000.0);
        if rank == 0 {
            self.spool.news(Message::Formed(v1::Formed {
                run: self.present.run.clone(),
                generation,
                position: Some(v1::Position { step: self.step, phase: 0 }),
                stalled_s,
                restored: standing.restored,
            }));
        }
        if rank == standing.source {
            self.grids.retain(|step| !self.spool.grids.contains(step));
            for step in self.grids.clone() {
                self.render(v1::sample_tile::Kind::Generated, step, (0, self.config.global_batch));
            }
        }
        if self.step == 0 {
            self.render(v1::sample_tile::Kind::Reals, 0, self.share());
            self.render(v1::sample_tile::Kind::Generated, 0, self.share());
        }
        self.compute(1).await;
    }

    async fn compute(&mut self, exchange: u64) {
        if self.step >= self.present.target_steps {
            if self.present.rank == 0 {
                self.upload().await;
            }
            self.place = Place::Through { told: false };
            return;
        }
        let until_ms = self.rings.borrow().now_ms + PACE_MS;
        self.place = Place::Computing { until_ms, exchange };
    }

    async fn applied(&mut self, exchange: u64, change: Option<u64>) {
        self.step += 1;
        let (step, last) = (self.step, self.step == self.present.target_steps);
        self.rings.borrow_mut().note(&self.process, &format!("step {step}"));
        self.spool.reports.insert(step, report(step));
        if step.is_multiple_of(self.config.sample_every) || last {
            self.render(v1::sample_tile::Kind::Generated, step, self.share());
        }
        let every = self.config.checkpoint_every;
        let missed = self.checkpoint_overdue && self.spool.committed < step / every * every;
        if !last && self.present.rank == 0 && (step.is_multiple_of(every) || missed) {
            self.checkpoint_overdue = false;
            self.upload().await;
        }
        let Some(change) = change.filter(|_| !last) else { return self.compute(exchange + 1).await };
        match self.next.take_if(|next| next.prepare.generation == change) {
            Some(next) => {
                self.enter(next.prepare);
                self.form();
            }
            None => self.place = Place::Parked,
        }
    }

    /// The writer owes its last checkpoint first.
    fn tell_end(&mut self, told: bool) {
        let target = self.present.target_steps;
        let writes = self.present.rank == 0;
        if told || (writes && self.spool.committed < target) {
            return;
        }
        self.place = Place::Through { told: true };
        self.spool.news(Message::RunEnded(v1::RunEnded {
            run: self.present.run.clone(),
            generation: self.present.generation,
            outcome: v1::run_ended::Outcome::Completed.into(),
            step: target,
            weights_sha256: if writes { self.digest() } else { String::new() },
        }));
    }

    async fn upload(&mut self) {
        let step = self.step;
        let folder = self.store.at(&layout::run_folder(self.run())).at(&layout::checkpoint_folder(step));
        let content = format!("weights {step}");
        let mut parts = Vec::new();
        for part in CHECKPOINT_PARTS {
            let name = layout::part_file(Generation(self.present.generation), part);
            folder.put(&name, content.clone()).await.unwrap();
            let size_bytes = content.len() as u64;
            parts.push(v1::ObjectPart { name, size_bytes, sha256: self.digest() });
        }
        let weights_sha256 = self.digest();
        self.spool.upload(v1::CheckpointUploaded { step, parts, weights_sha256, ..Default::default() });
    }

    /// Of its weights: in exact mode every group has the same.
    fn digest(&self) -> String {
        let generation = if self.config.exact { 0 } else { self.present.generation };
        format!("{generation:032}{:032}", self.step)
    }

    fn share(&self) -> (u32, u32) {
        let own = &self.present.members[self.present.rank as usize];
        (own.first_slot, own.slot_count)
    }

    fn render(&mut self, kind: v1::sample_tile::Kind, step: u64, (first_cell, cells): (u32, u32)) {
        if kind == v1::sample_tile::Kind::Generated {
            self.grids.insert(step);
            if self.grids.len() > MAX_KEPT {
                self.grids.pop_first();
            }
        }
        self.spool.tile(v1::SampleTile {
            kind: kind.into(),
            step,
            first_cell,
            cells_total: self.config.global_batch,
            height: SIDE,
            width: SIDE,
            channels: 1,
            pixels: vec![step as u8; (cells * SIDE * SIDE) as usize],
            ..v1::SampleTile::default()
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave_ring();
    }
}

fn report(step: u64) -> v1::StepReport {
    let (d_loss, g_loss) = (1.0 / step as f64, step as f64);
    v1::StepReport { step, d_loss, g_loss, d_acc: 0.5, step_s: 0.2, fed: step, ..Default::default() }
}
