//! [`Rings`]: what the members of a generation exchange, in memory that all simulated hosts share.
//!
//! Members ask again and again, each in its own time, so a break may find some that have applied a step and some that
//! have not.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use takuma_proto::v1;

/// All rings of a simulation.
pub type Shared = Rc<RefCell<Rings>>;

/// Peers miss signs of life after so long.
const SILENCE_MS: u64 = 1_000;
/// A ring that does not stand after so long is given up.
const FORMING_MS: u64 = 4_000;

/// Rings by generation, which processes live, and which hosts do not hear each other.
#[derive(Default)]
pub struct Rings {
    /// Simulated time, set before every tick.
    pub now_ms: u64,
    /// What happened, for comparing two simulations of one seed.
    pub trace: Vec<String>,
    /// Rings that stood.
    pub stood: u64,
    rings: BTreeMap<u64, Ring>,
    alive: BTreeSet<String>,
    cuts: BTreeMap<(String, String), u64>,
    processes: u64,
}

struct Ring {
    /// Processes by rank.
    seats: Vec<String>,
    entries: Vec<Option<Entry>>,
    entered_ms: Vec<u64>,
    standing: Option<Rc<Standing>>,
    /// The exchange that each rank has brought its part to.
    offers: Vec<u64>,
    votes: Vec<u64>,
    done: u64,
    /// The generation that all voted to change over to in the exchange `done`.
    change: Option<u64>,
    broken: Option<Option<u32>>,
}

/// What a member brings into a new ring.
pub struct Entry {
    /// Finished steps; none without state.
    pub step: Option<u64>,
    /// Reports that may not be stored yet.
    pub reports: BTreeMap<u64, v1::StepReport>,
}

/// What all members of a ring that stands know.
pub struct Standing {
    /// From where it goes on.
    pub step: u64,
    /// Who was there already.
    pub source: u32,
    /// How many were not.
    pub restored: u32,
    /// The source's.
    pub reports: BTreeMap<u64, v1::StepReport>,
}

/// How a wait in a ring goes on.
pub enum Turn<T> {
    /// Not yet.
    Wait,
    /// It came to its end.
    Done(T),
    /// The ring is broken, and who is suspect.
    Broken(Option<u32>),
}

impl Rings {
    /// Adds a line to the trace.
    pub fn note(&mut self, who: &str, what: &str) {
        let line = format!("{} {who} {what}", self.now_ms);
        self.trace.push(line);
    }

    /// A new process on a host; returns its id.
    pub fn start(&mut self, host: &str) -> String {
        self.processes += 1;
        let process = format!("{host}#{}", self.processes);
        self.alive.insert(process.clone());
        self.note(&process, "starts");
        process
    }

    /// The process is gone, and its sockets with it.
    pub fn end(&mut self, process: &str) {
        self.alive.remove(process);
        self.note(process, "ends");
        for ring in self.rings.values_mut() {
            let rank = ring.seats.iter().position(|seat| seat == process);
            // Who waits for a ring that does not stand yet tries on.
            if let Some(rank) = rank.filter(|_| ring.standing.is_some()) {
                ring.broken.get_or_insert(Some(rank as u32));
            }
        }
    }

    /// Two hosts do not hear each other from now on.
    pub fn cut(&mut self, a: &str, b: &str) {
        self.cuts.entry(pair(a, b)).or_insert(self.now_ms);
    }

    /// They do again.
    pub fn mend(&mut self, a: &str, b: &str) {
        self.cuts.remove(&pair(a, b));
    }

    /// Peers notice silence.
    pub fn watch(&mut self) {
        let (cuts, now_ms) = (&self.cuts, self.now_ms);
        for ring in self.rings.values_mut().filter(|ring| ring.standing.is_some() && ring.broken.is_none()) {
            let silent = |a: &str, b: &str| {
                let cut = cuts.get(&pair(host(a), host(b)));
                cut.is_some_and(|since| since + SILENCE_MS <= now_ms)
            };
            let suspect = (0..ring.seats.len()).find(|&rank| silent(&ring.seats[rank], ring.next(rank)));
            if let Some(rank) = suspect {
                ring.broken = Some(Some(rank as u32));
            }
        }
    }

    /// Whether `process` is there and `from` can hear it.
    pub fn reaches(&self, from: &str, process: &str) -> bool {
        self.alive.contains(process) && !self.cuts.contains_key(&pair(host(from), host(process)))
    }

    /// Comes to the ring of a generation.
    pub fn enter(&mut self, seat: &v1::Prepare, entry: Entry) {
        let ring = self.rings.entry(seat.generation).or_insert_with(|| Ring::new(&seat.members));
        let rank = seat.rank as usize;
        ring.entries[rank] = Some(entry);
        ring.entered_ms[rank] = self.now_ms;
    }

    /// Whether the ring stands.
    pub fn formed(&mut self, seat: &v1::Prepare) -> Turn<Rc<Standing>> {
        let (rank, now_ms) = (seat.rank as usize, self.now_ms);
        let Some(ring) = self.rings.get(&seat.generation) else { return Turn::Broken(None) };
        if let Some(suspect) = ring.broken {
            return Turn::Broken(suspect);
        }
        if let Some(standing) = &ring.standing {
            return Turn::Done(Rc::clone(standing));
        }
        let connected = self.connected(ring) && ring.entries.iter().all(Option::is_some);
        let last = (rank + ring.seats.len() - 1) % ring.seats.len();
        let lacks = |other: &usize| {
            ring.entries[*other].is_none() || !self.reaches(&ring.seats[rank], &ring.seats[*other])
        };
        let missing = [last, (rank + 1) % ring.seats.len()].into_iter().find(lacks);
        let Some(ring) = self.rings.get_mut(&seat.generation) else { return Turn::Broken(None) };
        if connected {
            ring.stand();
            self.stood += 1;
        } else if ring.entered_ms[rank] + FORMING_MS <= now_ms {
            ring.broken = Some(missing.map(|rank| rank as u32));
        }
        Turn::Wait
    }

    fn connected(&self, ring: &Ring) -> bool {
        let reaches = |rank: usize| self.reaches(&ring.seats[rank], ring.next(rank));
        (0..ring.seats.len()).all(reaches)
    }

    /// Brings a member's part into an exchange, and its vote for a change.
    pub fn offer(&mut self, seat: &v1::Prepare, exchange: u64, vote: u64) {
        if let Some(ring) = self.rings.get_mut(&seat.generation) {
            ring.offers[seat.rank as usize] = exchange;
            ring.votes[seat.rank as usize] = vote;
        }
    }

    /// Whether the exchange is over; with the generation that all change over to.
    pub fn exchanged(&mut self, seat: &v1::Prepare, exchange: u64) -> Turn<Option<u64>> {
        let Some(ring) = self.rings.get(&seat.generation) else { return Turn::Broken(None) };
        if let Some(suspect) = ring.broken {
            return Turn::Broken(suspect);
        }
        let due = ring.offers.iter().all(|&offer| offer >= exchange) && self.connected(ring);
        let Some(ring) = self.rings.get_mut(&seat.generation) else { return Turn::Broken(None) };
        if ring.done < exchange && due {
            ring.done = exchange;
            let agreed = ring.votes.iter().all(|&vote| vote == ring.votes[0]);
            ring.change = (agreed && ring.votes[0] != 0).then_some(ring.votes[0]);
        }
        if ring.done >= exchange { Turn::Done(ring.change) } else { Turn::Wait }
    }

    /// Ends a ring for all of its members.
    pub fn break_ring(&mut self, generation: u64) {
        if let Some(ring) = self.rings.get_mut(&generation) {
            ring.broken.get_or_insert(None);
        }
    }
}

impl Ring {
    fn new(members: &[v1::Member]) -> Self {
        let world = members.len();
        Self {
            seats: members.iter().map(|member| member.process_id.clone()).collect(),
            entries: (0..world).map(|_| None).collect(),
            entered_ms: vec![0; world],
            standing: None,
            offers: vec![0; world],
            votes: vec![0; world],
            done: 0,
            change: None,
            broken: None,
        }
    }

    fn next(&self, rank: usize) -> &str {
        &self.seats[(rank + 1) % self.seats.len()]
    }

    /// All agree on the furthest state.
    fn stand(&mut self) {
        let steps: Vec<_> = self.entries.iter().flatten().map(|entry| entry.step).collect();
        let furthest = steps.iter().max().copied().flatten();
        let source = steps.iter().position(|&step| step == furthest).unwrap_or_default();
        let reports = self.entries[source].take().map(|entry| entry.reports).unwrap_or_default();
        self.standing = Some(Rc::new(Standing {
            step: furthest.unwrap_or_default(),
            source: source as u32,
            restored: steps.iter().filter(|&&step| step != furthest).count() as u32,
            reports,
        }));
    }
}

fn host(process: &str) -> &str {
    process.split_once('#').map_or(process, |(host, _)| host)
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.min(b).to_owned(), a.max(b).to_owned())
}
