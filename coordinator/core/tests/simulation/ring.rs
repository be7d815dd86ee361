//! Rings: what the members of a generation exchange. An exchange needs all members; it comes to its end at each of
//! them in its own time, so a break may find some that have applied a phase and some that have not.

use std::rc::Rc;

use takuma_core::event::Prepare;

use crate::net::Cut;
use crate::spool::Report;
use crate::state::State;
use crate::world::{Ev, Pid, World};

/// Run and generation.
pub type Key = (String, u64);

/// Peers miss signs of life after so long.
const SILENCE_MS: u64 = 1_000;

/// A ring of one generation.
#[derive(Debug)]
pub struct Ring {
    /// By rank.
    pub seats: Vec<Pid>,
    /// Which exchange is under way; the first one agrees on the state.
    exchange: u64,
    offers: Vec<Option<Offer>>,
    here: usize,
    broken: bool,
    /// Members that went in peace.
    left: usize,
}

/// What a member brings into an exchange.
#[derive(Debug, Clone)]
pub struct Offer {
    pub state: Option<State>,
    pub reports: Rc<Vec<Report>>,
    pub fed: u64,
    pub stop: bool,
    pub ready: u64,
}

/// What an exchange gives to all.
#[derive(Debug)]
pub struct Sums {
    pub exchange: u64,
    /// The furthest state, whose it is, and its reports.
    pub state: Option<State>,
    pub source: u32,
    pub reports: Rc<Vec<Report>>,
    pub restored: u32,
    /// Who had state before.
    pub holders: Vec<Pid>,
    pub fed: u64,
    pub stops: u64,
    pub ready: u64,
}

impl World {
    /// Enters an exchange; what it gives comes as an event, or the news that the ring broke.
    pub fn offer(&mut self, seat: &Prepare, exchange: u64, offer: Offer) {
        let key = (seat.fence.run.clone(), seat.fence.generation.0);
        if !self.rings.contains_key(&key) {
            let seats: Vec<Pid> = seat.members.iter().map(|peer| self.pids[&peer.process_id]).collect();
            let offers = vec![None; seats.len()];
            let ring = Ring { seats, exchange: 0, offers, here: 0, broken: false, left: 0 };
            self.rings.insert(key.clone(), ring);
        }
        let Some(ring) = self.rings.get_mut(&key) else { return };
        let rank = seat.rank as usize;
        if ring.broken || ring.exchange != exchange {
            let (pid, at) = (ring.seats[rank], self.now + 5);
            return self.schedule(at, Ev::Broken { pid, key, suspect: None, stale: false });
        }
        ring.here += usize::from(ring.offers[rank].is_none());
        ring.offers[rank] = Some(offer);
        if ring.here == ring.seats.len() {
            self.try_complete(&key);
        }
    }

    /// Whether two neighbours cannot hear each other, or one of them is stopped.
    fn stands_still(&self, ring: &Ring) -> bool {
        let world = ring.seats.len();
        (0..world).any(|rank| {
            let (a, b) = (ring.seats[rank], ring.seats[(rank + 1) % world]);
            self.processes[a].stopped || !self.processes[a].alive || (world > 1 && self.is_link_cut(a, b))
        })
    }

    fn try_complete(&mut self, key: &Key) {
        let Some(ring) = self.rings.get(key) else { return };
        if ring.broken || ring.here < ring.seats.len() || self.stands_still(ring) {
            return;
        }
        let Some(ring) = self.rings.get_mut(key) else { return };
        let offers: Vec<Offer> = ring.offers.iter_mut().filter_map(Option::take).collect();
        (ring.here, ring.exchange) = (0, ring.exchange + 1);
        let (exchange, seats) = (ring.exchange - 1, ring.seats.clone());
        let place = |offer: &Offer| offer.state.map(|state| state.phases());
        let furthest = offers.iter().map(place).max().flatten();
        let source = offers.iter().position(|offer| place(offer) == furthest).unwrap_or(0);
        let has_state = |(&pid, offer): (&Pid, &Offer)| offer.state.map(|_| pid);
        let holders = seats.iter().zip(&offers).filter_map(has_state).collect();
        let sums = Rc::new(Sums {
            holders,
            exchange,
            state: offers[source].state,
            source: source as u32,
            reports: Rc::clone(&offers[source].reports),
            restored: offers.iter().filter(|offer| place(offer) != furthest).count() as u32,
            fed: offers.iter().fold(0, |sum, offer| sum.wrapping_add(offer.fed)),
            stops: offers.iter().map(|offer| u64::from(offer.stop)).sum(),
            ready: offers.iter().map(|offer| offer.ready).sum(),
        });
        self.note_exchange(key, &seats, &sums);
        for pid in seats {
            let at = self.now + self.rng.within(1, 8 + self.plan.latency_ms);
            self.schedule(at, Ev::Exchanged { pid, key: key.clone(), sums: Rc::clone(&sums) });
        }
    }

    /// Ends a ring for all of its members.
    pub fn break_ring(&mut self, key: &Key, suspect: Option<u32>) {
        let Some(ring) = self.rings.get_mut(key).filter(|ring| !ring.broken) else { return };
        ring.broken = true;
        for pid in ring.seats.clone() {
            let slow = self.rng.one_in(10);
            let at = self.now + if slow { self.rng.within(80, SILENCE_MS) } else { self.rng.within(2, 60) };
            self.schedule(at, Ev::Broken { pid, key: key.clone(), suspect, stale: false });
        }
    }

    /// A member goes in peace: it owes nothing.
    pub fn leave_ring(&mut self, key: &Key) {
        let Some(ring) = self.rings.get_mut(key) else { return };
        ring.left += 1;
        if ring.left == ring.seats.len() {
            self.rings.remove(key);
        }
    }

    fn rings_of(&self, pid: Pid) -> Vec<(Key, u32)> {
        let rank = |ring: &Ring| ring.seats.iter().position(|&seat| seat == pid);
        let rings = self.rings.iter().filter(|(_, ring)| !ring.broken);
        rings.filter_map(|(key, ring)| Some((key.clone(), rank(ring)? as u32))).collect()
    }

    /// A process has died: its sockets say so at once.
    pub fn break_rings_of(&mut self, pid: Pid) {
        for (key, rank) in self.rings_of(pid) {
            // Who waits for a ring that does not stand yet tries on.
            if self.rings[&key].exchange > 0 {
                self.break_ring(&key, Some(rank));
            }
        }
    }

    /// Two workers do not hear each other (or one of them, given twice, is stopped): peers notice the silence.
    pub fn watch_rings(&mut self, a: Pid, b: Pid) {
        for (key, _) in self.rings_of(a) {
            let at = self.now + self.rng.within(SILENCE_MS, SILENCE_MS * 3 / 2);
            self.schedule(at, Ev::Silence { key, a, b });
        }
    }

    pub fn silence(&mut self, key: &Key, a: Pid, b: Pid) {
        let Some(ring) = self.rings.get(key).filter(|ring| !ring.broken && ring.exchange > 0) else { return };
        let rank = |pid: Pid| ring.seats.iter().position(|&seat| seat == pid).map(|rank| rank as u32);
        let (Some(rank_a), Some(rank_b)) = (rank(a), rank(b)) else { return };
        let world = ring.seats.len() as u32;
        let neighbours = a == b || (rank_a + 1) % world == rank_b || (rank_b + 1) % world == rank_a;
        let still = if a == b { self.processes[a].stopped } else { self.is_link_cut(a, b) };
        if world > 1 && neighbours && still {
            let suspect = if self.rng.one_in(2) { rank_a } else { rank_b };
            self.break_ring(key, Some(suspect));
        }
    }

    /// A worker has waited in vain for its ring to stand.
    pub fn forming_due(&mut self, pid: Pid, key: &Key) {
        let Some(ring) = self.rings.get(key).filter(|ring| !ring.broken && ring.exchange == 0) else {
            return;
        };
        let Some(rank) = ring.seats.iter().position(|&seat| seat == pid) else { return };
        if ring.offers[rank].is_none() {
            return;
        }
        let world = ring.seats.len();
        let (before, after) = ((rank + world - 1) % world, (rank + 1) % world);
        let lacks = |other: usize| ring.offers[other].is_none() || self.is_link_cut(pid, ring.seats[other]);
        let suspect = if lacks(before) { Some(before) } else { lacks(after).then_some(after) };
        // Whose neighbours are both there cannot tell who is missing.
        self.break_ring(key, suspect.map(|rank| rank as u32));
    }

    /// Something that held rings up is over.
    pub fn try_rings(&mut self) {
        let keys: Vec<Key> = self.rings.keys().cloned().collect();
        keys.iter().for_each(|key| self.try_complete(key));
    }

    /// A pair of neighbours in a ring that trains.
    pub fn some_link(&mut self) -> Option<Cut> {
        let pairs: Vec<(Pid, Pid)> = self
            .rings
            .values()
            .filter(|ring| !ring.broken && ring.seats.len() > 1)
            .flat_map(|ring| {
                (0..ring.seats.len()).map(|at| (ring.seats[at], ring.seats[(at + 1) % ring.seats.len()]))
            })
            .collect();
        self.rng.pick(&pairs).map(|(a, b)| Cut::Link(a, b))
    }
}
