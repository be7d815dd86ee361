//! The channels of a ring of two ranks or more, and the threads that sum buckets on them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use socket2::Socket;

use super::{
    RingConfig, connect,
    flow::{ChainFlow, Seat, SumFlow},
    frame::{FRAME_PAYLOAD_BYTES, Kind},
    group::{Group, Parts},
    pipe::Pipe,
    short::Short,
    warden,
};
use crate::collective::{CollectiveError, PendingReduce, pending::Lanes};

/// Buckets that may wait on one channel before starting another one blocks.
const QUEUE_MAX: usize = 128;

#[derive(Debug)]
pub(super) struct Links {
    pub group: Arc<Group>,
    short: Mutex<Short>,
    /// Queues of the bucket channels, dealt in turn.
    queues: Vec<SyncSender<Job>>,
    dealt: Mutex<usize>,
    threads: Vec<JoinHandle<()>>,
}

/// A bucket to be summed and where the sum goes.
#[derive(Debug)]
struct Job {
    kind: Kind,
    /// One lane for [`Kind::Bucket`].
    lanes: Lanes,
    deliver: SyncSender<Result<Lanes, CollectiveError>>,
}

impl Links {
    /// The channels over connections to both neighbours.
    pub(super) fn new(neighbours: connect::Neighbours, config: &RingConfig) -> Result<Self, CollectiveError> {
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
            forming: config.connect_timeout,
            control: [control_previous, control_next],
            data,
        });
        let group = Arc::new(group.map_err(failed)?);
        let mut pipes = pairs.into_iter().map(|(from, to)| Pipe::new(from, to, Arc::clone(&group)));
        let Some(short) = pipes.next() else {
            return Err(failed(std::io::ErrorKind::NotConnected.into()));
        };
        let short = Short::new(short, config.lanes_by_rank.clone());
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

    /// Runs a blocking operation, one at a time.
    pub(super) fn short<T>(
        &self,
        work: impl FnOnce(&mut Short) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        work(&mut self.short.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts to sum `lanes` (at least one) on the next channel.
    pub(super) fn start(&self, kind: Kind, lanes: Lanes) -> Result<PendingReduce, CollectiveError> {
        if let Some(failure) = self.group.failure() {
            return Err(failure.during(kind.name()));
        }
        let (deliver, pending) = PendingReduce::waiting();
        let mut dealt = self.dealt.lock().unwrap_or_else(PoisonError::into_inner);
        self.group.in_flight.fetch_add(1, Ordering::AcqRel);
        let queue = &self.queues[*dealt % self.queues.len()];
        *dealt = dealt.wrapping_add(1);
        if queue.send(Job { kind, lanes, deliver }).is_err() {
            self.group.in_flight.fetch_sub(1, Ordering::AcqRel);
            return Err(CollectiveError::Local {
                operation: kind.name().into(),
                detail: "the thread of its channel has ended; the log tells why".into(),
                source: None,
            });
        }
        Ok(pending)
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
    for Job { kind, mut lanes, deliver } in jobs {
        let outcome = sum_bucket(&mut pipe, kind, &mut lanes, &mut scratch);
        pipe.group.in_flight.fetch_sub(1, Ordering::Release);
        if deliver.send(outcome.map(|()| lanes)).is_err() {
            tracing::trace!("nobody waited for a bucket");
        }
    }
}

/// Leaves the sum in the first of `lanes`.
fn sum_bucket(
    pipe: &mut Pipe,
    kind: Kind,
    lanes: &mut [Vec<f32>],
    scratch: &mut [f32],
) -> Result<(), CollectiveError> {
    let seat = seat(&pipe.group);
    let total = lanes[0].len() as u64;
    match kind {
        Kind::Chain => pipe.run(kind, total, &mut ChainFlow { seat, lanes, scratch })?,
        _ => pipe.run(kind, total, &mut SumFlow { seat, bucket: &mut lanes[0], scratch })?,
    };
    Ok(())
}

/// This rank's place.
pub(super) fn seat(group: &Group) -> Seat {
    Seat { rank: group.rank.0 as usize, world: group.world as usize }
}
