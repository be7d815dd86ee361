//! A ring over TCP: each rank sends to the next and receives from the previous one.
//!
//! Between two neighbours lie several connections (channels): one that only carries signs of life and
//! blame (`warden.rs`), one for short blocking operations, and the rest for buckets of gradients, each
//! with a thread of its own, so that a short sum never waits behind a bucket.
//!
//! Every frame carries the generation, the operation and its number, so ranks that have gone different
//! ways find out at the first frame (`frame.rs`). What is sent in which order is `flow.rs`, how it gets
//! through the sockets `pipe.rs`, and how the end of a group reaches every rank `group.rs`.

mod config;
mod connect;
#[cfg(test)]
mod faults;
mod flow;
mod frame;
mod greeting;
mod group;
mod listener;
mod nearby;
mod notice;
mod pipe;
mod sum;
mod warden;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use socket2::Socket;
use takuma_core::ids::{Generation, Rank};

pub use self::{config::RingConfig, listener::RingListener};
use self::{
    flow::{BroadcastFlow, GatherFlow, Seat, SumFlow},
    frame::{FRAME_PAYLOAD_BYTES, Kind},
    group::{Group, Parts},
    pipe::Pipe,
    sum::{Value, sum_blocks},
};
use super::{AbortHandle, Collective, CollectiveError, PendingReduce};

/// Most bytes of one rank's part of a gather or broadcast: well above the state of any recipe, well
/// below what would hurt when a rank has gone mad.
const BLOCK_MAX_BYTES: usize = 1 << 30;
/// Buckets that may wait on one channel before starting another one blocks.
const QUEUE_MAX: usize = 128;
/// Short sums are gathered and summed by everybody, which takes half the hops; above this many received
/// bytes the ring's reduce-scatter moves so much less that it wins.
const GATHERED_SUM_MAX_BYTES: usize = 256 * 1024;

/// A group of workers connected in a ring.
#[derive(Debug)]
pub struct Ring {
    rank: Rank,
    world: u32,
    generation: Generation,
    /// Nothing in a group of one.
    links: Option<Links>,
    loopback: super::Loopback,
}

#[derive(Debug)]
struct Links {
    group: Arc<Group>,
    short: Mutex<Short>,
    /// Queues of the bucket channels, dealt in turn.
    queues: Vec<SyncSender<Job>>,
    dealt: Mutex<usize>,
    threads: Vec<JoinHandle<()>>,
}

/// The channel of the blocking operations, with memory that is used again.
#[derive(Debug)]
struct Short {
    pipe: Pipe,
    blocks: Vec<u8>,
    scratch: Vec<f32>,
}

/// A bucket to be summed and where the sum goes.
#[derive(Debug)]
struct Job {
    bucket: Vec<f32>,
    deliver: SyncSender<Result<Vec<f32>, CollectiveError>>,
}

impl Ring {
    /// Forms the ring with the other members, and returns when every rank has. Older generations of the
    /// run are refused from now on.
    ///
    /// # Errors
    /// What kept it from forming within `connect_timeout`, naming the rank;
    /// [`CollectiveError::StaleGeneration`] if the run has gone on.
    pub fn connect(listener: &RingListener, config: RingConfig) -> Result<Self, CollectiveError> {
        config.check()?;
        let links = match config.world() {
            1 => None,
            _ => Some(Links::new(connect::meet(listener, &config)?, &config)?),
        };
        let ring = Self {
            rank: config.rank,
            world: config.world(),
            generation: config.generation,
            links,
            loopback: super::Loopback::new(config.generation),
        };
        // Nobody starts before everybody has met, so that the blame for a missing rank goes around.
        ring.barrier().map_err(|error| error.during("forming the ring"))?;
        Ok(ring)
    }

    /// Breaks all connections without a word, as if the process were killed.
    #[cfg(test)]
    pub(crate) fn vanish(self) {
        if let Some(links) = &self.links {
            links.group.vanish();
        }
    }

    /// Gives no more signs of life, as if the process were stopped.
    #[cfg(test)]
    pub(crate) fn freeze(&self) {
        if let Some(links) = &self.links {
            links.group.is_frozen.store(true, Ordering::Release);
        }
    }
}

impl Links {
    fn new(neighbours: connect::Neighbours, config: &RingConfig) -> Result<Self, CollectiveError> {
        let failed = |error| {
            CollectiveError::local("forming the ring", "this machine is out of threads or files", error)
        };
        let mut from_previous = neighbours.from_previous.into_iter();
        let mut to_next = neighbours.to_next.into_iter();
        let (Some(control_previous), Some(control_next)) = (from_previous.next(), to_next.next()) else {
            // `meet` returns all channels; without them there is no ring.
            return Err(failed(std::io::ErrorKind::NotConnected.into()));
        };
        let pairs: Vec<(Arc<Socket>, Arc<Socket>)> =
            from_previous.map(Arc::new).zip(to_next.map(Arc::new)).collect();
        let data = pairs.iter().flat_map(|(from, to)| [Arc::clone(from), Arc::clone(to)]).collect();
        let group = Group::new(Parts {
            rank: config.rank,
            world: config.world(),
            generation: config.generation,
            timeout: config.timeout,
            silence: config.silence,
            control: [control_previous, control_next],
            data,
        });
        let group = Arc::new(group.map_err(failed)?);
        let mut pipes = pairs.into_iter().map(|(from, to)| Pipe::new(from, to, Arc::clone(&group)));
        let Some(short) = pipes.next() else {
            return Err(failed(std::io::ErrorKind::NotConnected.into()));
        };
        let short = Short { pipe: short, blocks: Vec::new(), scratch: vec![0.0; FRAME_PAYLOAD_BYTES / 4] };
        let mut links = Self {
            group: Arc::clone(&group),
            short: Mutex::new(short),
            queues: Vec::new(),
            dealt: Mutex::new(0),
            threads: Vec::new(),
        };
        // From here on a failure drops `links`, which ends what was started.
        for pipe in pipes {
            let (queue, jobs) = sync_channel(QUEUE_MAX);
            links.queues.push(queue);
            let thread = std::thread::Builder::new().name(format!("ring-{}", links.queues.len()));
            links.threads.push(thread.spawn(move || sum_buckets(pipe, &jobs)).map_err(failed)?);
        }
        // Not joined: it ends by itself soon after the group does.
        let warden = std::thread::Builder::new().name("ring-warden".into());
        warden.spawn(move || warden::watch(&group)).map_err(failed)?;
        Ok(links)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        if self.group.in_flight.load(Ordering::Acquire) > 0 {
            self.group.fail(CollectiveError::Aborted {
                operation: "the exchange".into(),
                reason: "the group was dropped with buckets under way".into(),
            });
        }
        self.group.close();
        self.queues.clear();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(rank = self.group.rank.0, "a bucket thread of the ring panicked");
            }
        }
    }
}

/// One bucket channel's thread: until its queue is dropped. After the group has ended it hands out the
/// error, so nobody who waits is forgotten.
fn sum_buckets(mut pipe: Pipe, jobs: &Receiver<Job>) {
    let mut scratch = vec![0.0; FRAME_PAYLOAD_BYTES / 4];
    for Job { bucket, deliver } in jobs {
        let outcome = sum_bucket(&mut pipe, bucket, &mut scratch);
        pipe.group.in_flight.fetch_sub(1, Ordering::Release);
        if deliver.send(outcome).is_err() {
            tracing::trace!("nobody waited for a bucket");
        }
    }
}

fn sum_bucket(
    pipe: &mut Pipe,
    mut bucket: Vec<f32>,
    scratch: &mut [f32],
) -> Result<Vec<f32>, CollectiveError> {
    sum_in_ring(pipe, Kind::Bucket, &mut bucket, scratch)?;
    Ok(bucket)
}

fn seat(group: &Group) -> Seat {
    Seat { rank: group.rank.0 as usize, world: group.world as usize }
}

fn sum_in_ring(
    pipe: &mut Pipe,
    kind: Kind,
    bucket: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), CollectiveError> {
    let total = bucket.len() as u64;
    let seat = seat(&pipe.group);
    pipe.run(kind, total, &mut SumFlow { seat, bucket, scratch })?;
    Ok(())
}

impl Short {
    /// Gathers equally long blocks of all ranks into `self.blocks`, by rank. `put` appends this rank's.
    fn gather_equal(
        &mut self,
        kind: Kind,
        total: u64,
        block_bytes: usize,
        put: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), CollectiveError> {
        let seat = seat(&self.pipe.group);
        let cuts: Vec<usize> = (0..=seat.world).map(|rank| rank * block_bytes).collect();
        self.blocks.clear();
        self.blocks.resize(cuts[seat.rank], 0);
        put(&mut self.blocks);
        self.blocks.resize(cuts[seat.world], 0);
        let mut flow = GatherFlow { seat, blocks: &mut self.blocks, cuts: &cuts };
        self.pipe.run(kind, total, &mut flow)?;
        Ok(())
    }

    fn sum<T: Value>(&mut self, kind: Kind, values: &mut [T]) -> Result<(), CollectiveError> {
        let block_bytes = values.len() * T::BYTES;
        self.gather_equal(kind, values.len() as u64, block_bytes, |bytes| {
            for value in values.iter() {
                value.put(bytes);
            }
        })?;
        sum_blocks(values, &self.blocks);
        Ok(())
    }

    fn gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let own = (bytes.len() as u64).to_le_bytes();
        self.gather_equal(Kind::Lengths, 0, own.len(), |block| block.extend_from_slice(&own))?;
        let mut cuts = vec![0];
        let mut end = 0;
        for (rank, length) in self.blocks.chunks_exact(own.len()).enumerate() {
            // Lossless: fewer than WORLD_MAX ranks.
            end += self.checked_length(Rank(rank as u32), frame::u64_at(length, 0), "all_gather")?;
            cuts.push(end);
        }
        let seat = seat(&self.pipe.group);
        let mut blocks = vec![0; end];
        blocks[cuts[seat.rank]..cuts[seat.rank + 1]].copy_from_slice(bytes);
        let mut flow = GatherFlow { seat, blocks: &mut blocks, cuts: &cuts };
        self.pipe.run(Kind::Gather, end as u64, &mut flow)?;
        Ok(cuts.windows(2).map(|cut| blocks[cut[0]..cut[1]].to_vec()).collect())
    }

    fn broadcast(&mut self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let (seat, root_index) = (seat(&self.pipe.group), root.0 as usize);
        // Everybody hears everybody's length, so ranks that mean different roots find out here.
        let own = (bytes.len() as u64).to_le_bytes();
        let total = u64::from(root.0);
        self.gather_equal(Kind::BroadcastLength, total, own.len(), |block| block.extend_from_slice(&own))?;
        let length = frame::u64_at(&self.blocks, root_index * own.len());
        let length = self.checked_length(root, length, "broadcast")?;
        bytes.resize(length, 0);
        let mut flow = BroadcastFlow { seat, root: root_index, bytes };
        self.pipe.run(Kind::Broadcast, length as u64, &mut flow)?;
        Ok(())
    }

    fn checked_length(&self, rank: Rank, length: u64, operation: &str) -> Result<usize, CollectiveError> {
        usize::try_from(length).ok().filter(|&length| length <= BLOCK_MAX_BYTES).ok_or_else(|| {
            self.pipe.group.fail(CollectiveError::Protocol {
                rank,
                operation: operation.into(),
                detail: format!("it announced {length} bytes; at most {BLOCK_MAX_BYTES} go at once"),
            })
        })
    }
}

impl Links {
    fn short<T>(
        &self,
        work: impl FnOnce(&mut Short) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        work(&mut self.short.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn start(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        const OPERATION: &str = "all_reduce of a bucket";
        if let Some(failure) = self.group.failure() {
            return Err(failure.during(OPERATION));
        }
        let (deliver, pending) = PendingReduce::waiting();
        let mut dealt = self.dealt.lock().unwrap_or_else(PoisonError::into_inner);
        self.group.in_flight.fetch_add(1, Ordering::AcqRel);
        let queue = &self.queues[*dealt % self.queues.len()];
        *dealt = dealt.wrapping_add(1);
        if queue.send(Job { bucket, deliver }).is_err() {
            self.group.in_flight.fetch_sub(1, Ordering::AcqRel);
            return Err(CollectiveError::Local {
                operation: OPERATION.into(),
                detail: "the thread of its channel has ended; the log tells why".into(),
                source: None,
            });
        }
        Ok(pending)
    }
}

impl Collective for Ring {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let Some(links) = &self.links else { return self.loopback.all_reduce(values) };
        let gathered_bytes = size_of_val(values).saturating_mul(self.world as usize - 1);
        links.short(|short| {
            if gathered_bytes <= GATHERED_SUM_MAX_BYTES {
                short.sum(Kind::Sum, values)
            } else {
                sum_in_ring(&mut short.pipe, Kind::Sum, values, &mut short.scratch)
            }
        })
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        let Some(links) = &self.links else { return self.loopback.all_reduce_f64(values) };
        links.short(|short| short.sum(Kind::SumF64, values))
    }

    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        match &self.links {
            None => self.loopback.start_all_reduce(bucket),
            Some(links) => links.start(bucket),
        }
    }

    fn broadcast(&self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let Some(links) = &self.links else { return self.loopback.broadcast(root, bytes) };
        if root.0 >= self.world {
            return Err(CollectiveError::Local {
                operation: "broadcast".into(),
                detail: format!("rank {root} is not in a group of {}", self.world),
                source: None,
            });
        }
        links.short(|short| short.broadcast(root, bytes))
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        match &self.links {
            None => self.loopback.all_gather(bytes),
            Some(links) => links.short(|short| short.gather(bytes)),
        }
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        match &self.links {
            None => self.loopback.barrier(),
            Some(links) => links.short(|short| short.gather_equal(Kind::Barrier, 0, 0, |_| {})),
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        let Some(links) = &self.links else { return self.loopback.abort_handle() };
        // Weak, so that a handle that outlives the ring holds no sockets.
        let group = Arc::downgrade(&links.group);
        AbortHandle::new(move |reason| {
            if let Some(group) = group.upgrade() {
                group.fail(CollectiveError::Aborted {
                    operation: "the exchange".into(),
                    reason: reason.into(),
                });
            }
        })
    }
}
