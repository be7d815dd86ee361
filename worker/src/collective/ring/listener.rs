//! Where a worker's neighbours come in: one listening socket and one thread for the life of the process.
//!
//! The thread reads greetings and parks whoever greeted well until [`super::Ring::connect`] asks for it,
//! since a neighbour may hear of a new generation first. It never waits for anybody: a mute or slow
//! connection costs one place among [`GREETING_MAX`] until [`GREETING_DEADLINE`], and the oldest one
//! yields when they run out. It believes no length and allocates nothing that a stranger could choose.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use socket2::Socket;
use takuma_core::ids::{Generation, Rank};

use super::{
    greeting::{Answer, BadGreeting, GREETING_BYTES, Greeting, is_foreign, run_hash},
    nearby,
};
use crate::collective::CollectiveError;

/// A greeting fits one packet; whoever needs longer is lost or means no good.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);
/// Most connections that may be greeting at once.
pub(super) const GREETING_MAX: usize = 128;
/// Greeted connections wait this long for their generation: longer than any formation of a group takes.
const PARKED_EXPIRY: Duration = Duration::from_secs(120);
/// Most connections that may wait for their generation: several groups of the largest kind.
pub(super) const PARKED_MAX: usize = 256;
/// Runs whose newest generation is remembered.
const RUNS_MAX: usize = 64;
/// Pause after the system refused a connection, for want of descriptors say.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// The socket on which a worker's neighbours reach it. Keep it for the life of the process and give it
/// to every [`super::Ring::connect`].
#[derive(Debug)]
pub struct RingListener {
    hall: Arc<Hall>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

/// What the listening thread and the rings share.
#[derive(Debug)]
struct Hall {
    guests: Mutex<Guests>,
    changed: Condvar,
    is_stopping: AtomicBool,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Guests {
    parked: BTreeMap<Place, Parked>,
    /// Newest generation of each run, oldest run first.
    newest: VecDeque<(u64, Generation)>,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    run: u64,
    generation: Generation,
    from: Rank,
    to: Rank,
    channel: u16,
}

#[derive(Debug)]
struct Parked {
    stream: Socket,
    greeting: Greeting,
    since: Instant,
}

/// Where connections come in.
struct Doors {
    listener: TcpListener,
    /// For workers on this machine.
    local: Option<UnixListener>,
}

/// A connection that has not finished its greeting.
struct Newcomer {
    stream: Socket,
    bytes: [u8; GREETING_BYTES],
    filled: usize,
    since: Instant,
}

impl Guests {
    fn newest(&self, run: u64) -> Option<Generation> {
        self.newest.iter().find(|(known, _)| *known == run).map(|&(_, generation)| generation)
    }

    /// Raises a run's newest generation and turns away who came for an older one.
    fn raise(&mut self, run: u64, generation: Generation) {
        match self.newest.iter_mut().find(|(known, _)| *known == run) {
            Some((_, newest)) => *newest = generation.max(*newest),
            None => {
                if self.newest.len() == RUNS_MAX {
                    self.newest.pop_front();
                }
                self.newest.push_back((run, generation));
            }
        }
        self.parked.retain(|place, parked| {
            let is_stale = place.run == run && place.generation < generation;
            if is_stale {
                answer(&parked.stream, Answer::Stale(generation));
            }
            !is_stale
        });
    }
}

impl RingListener {
    /// Listens on `address` ("host:port", port 0 = any) and starts the thread that hears greetings.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] if the address cannot be had.
    pub fn bind(address: &str) -> Result<Self, CollectiveError> {
        let failed = |error: io::Error| {
            let detail = format!("{address} cannot be had ({error}); is another worker using it?");
            CollectiveError::local("listening for neighbours", &detail, error)
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address_bound = listener.local_addr().map_err(failed)?;
        // Without the short way everything still works.
        let local = nearby::listen(address_bound)
            .inspect_err(|error| tracing::debug!(%error, "workers on this machine will use TCP"))
            .ok();
        let doors = Doors { listener, local };
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        let hall = Arc::new(Hall {
            guests: Mutex::default(),
            changed: Condvar::new(),
            is_stopping: AtomicBool::new(false),
            wake,
        });
        let thread = std::thread::Builder::new()
            .name("ring-listener".into())
            .spawn({
                let hall = Arc::clone(&hall);
                move || hall.receive(&doors)
            })
            .map_err(failed)?;
        Ok(Self { hall, address: address_bound, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Refuses from now on whatever belongs to a generation of `run` older than `generation`, and ends a
    /// [`super::Ring::connect`] that is under way for one. `run` must name one run for all time: its id.
    pub fn fence(&self, run: &str, generation: Generation) {
        self.hall.guests().raise(run_hash(run), generation);
        self.hall.changed.notify_all();
    }

    /// Wakes a [`RingListener::collect`] whose `is_over` has become true.
    pub(super) fn notify(&self) {
        // Under the lock, so that it cannot fall between a collector's look and its sleep.
        let guests = self.hall.guests();
        self.hall.changed.notify_all();
        drop(guests);
    }

    /// The newest generation of `run` if `generation` is older than that.
    pub(super) fn newer(&self, run: u64, generation: Generation) -> Option<Generation> {
        self.hall.guests().newest(run).filter(|&newest| newest > generation)
    }

    /// Waits for the connections of all channels that `wanted` describes (its `channel` is not looked at)
    /// and welcomes them, into `streams` by channel. False if `deadline` passed or `is_over` said so.
    ///
    /// # Errors
    /// [`CollectiveError::StaleGeneration`]; [`CollectiveError::Protocol`] if the neighbour sees another
    /// group.
    pub(super) fn collect(
        &self,
        wanted: &Greeting,
        streams: &mut Vec<Socket>,
        deadline: Instant,
        is_over: impl Fn() -> bool,
    ) -> Result<bool, CollectiveError> {
        let mut guests = self.hall.guests();
        loop {
            if let Some(current) = guests.newest(wanted.run).filter(|&newest| newest > wanted.generation) {
                return Err(CollectiveError::StaleGeneration {
                    own: wanted.generation,
                    current,
                    detail: "this worker has heard of a newer one".into(),
                });
            }
            while streams.len() < usize::from(wanted.channels) {
                // Lossless: below `channels`, which is a u16.
                let wanted = Greeting { channel: streams.len() as u16, ..*wanted };
                let Some(parked) = guests.parked.remove(&place_of(&wanted)) else { break };
                streams.push(welcome(parked, &wanted)?);
            }
            let now = Instant::now();
            if streams.len() == usize::from(wanted.channels) {
                return Ok(true);
            }
            if now >= deadline || is_over() {
                return Ok(false);
            }
            guests = self
                .hall
                .changed
                .wait_timeout(guests, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Connections that are greeting or wait for their generation.
    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        self.hall.guests().parked.len()
    }
}

impl Drop for RingListener {
    fn drop(&mut self) {
        self.hall.is_stopping.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.hall.wake, &1u64.to_ne_bytes()) {
            tracing::warn!(%error, "the ring listener could not be woken");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the ring listener panicked");
        }
    }
}

fn place_of(greeting: &Greeting) -> Place {
    let &Greeting { run, generation, from, to, channel, .. } = greeting;
    Place { run, generation, from, to, channel }
}

fn welcome(parked: Parked, wanted: &Greeting) -> Result<Socket, CollectiveError> {
    if parked.greeting == *wanted {
        answer(&parked.stream, Answer::Welcome);
        return Ok(parked.stream);
    }
    answer(&parked.stream, Answer::Mismatch);
    let came = parked.greeting;
    Err(CollectiveError::Protocol {
        rank: wanted.from,
        operation: "forming the ring".into(),
        detail: match (came.world, came.channels) == (wanted.world, wanted.channels) {
            true => "it has the lanes dealt otherwise; all workers need the same settings".into(),
            false => format!(
                "it sees a group of {} with {} channels, this rank one of {} with {}; all workers need the same settings",
                came.world, came.channels, wanted.world, wanted.channels
            ),
        },
    })
}

/// An answer fits the empty buffer of a fresh connection; if it does not go out, the dialler finds the
/// connection closed, which says enough.
fn answer(stream: &Socket, answer: Answer) {
    let mut stream = stream;
    if let Err(error) = stream.write_all(&answer.encode()) {
        tracing::debug!(%error, ?answer, "a greeting could not be answered");
    }
}

impl Hall {
    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: until the listener is dropped.
    fn receive(&self, doors: &Doors) {
        let mut newcomers: VecDeque<Newcomer> = VecDeque::new();
        let mut resume_at = None;
        while !self.is_stopping.load(Ordering::Acquire) {
            let is_paused = resume_at.is_some_and(|at| Instant::now() < at);
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(newcomers.iter().map(|newcomer| PollFd::new(&newcomer.stream, PollFlags::IN)));
            if !is_paused {
                fds.push(PollFd::new(&doors.listener, PollFlags::IN));
                fds.extend(doors.local.iter().map(|local| PollFd::new(local, PollFlags::IN)));
            }
            // Deadlines are kept to a tick; with nothing to expire it sleeps until somebody comes.
            let has_deadlines = is_paused || !newcomers.is_empty() || !self.guests().parked.is_empty();
            let tick = Timespec { tv_sec: 0, tv_nsec: REFUSED_PAUSE.as_nanos() as i64 };
            if let Err(errno) = poll(&mut fds, has_deadlines.then_some(&tick))
                && errno != rustix::io::Errno::INTR
            {
                tracing::error!(%errno, "the ring listener cannot wait for connections; no neighbour gets in");
                return;
            }
            drop(fds);
            for _ in 0..newcomers.len() {
                if let Some(newcomer) = newcomers.pop_front() {
                    newcomers.extend(self.hear(newcomer));
                }
            }
            if !is_paused {
                resume_at = doors.admit(&mut newcomers);
            }
            newcomers.retain(|newcomer| newcomer.since.elapsed() < GREETING_DEADLINE);
            self.guests().parked.retain(|_, parked| parked.since.elapsed() < PARKED_EXPIRY);
        }
    }

    /// Reads what a newcomer has sent. Gives it back if more must come.
    fn hear(&self, mut newcomer: Newcomer) -> Option<Newcomer> {
        while newcomer.filled < GREETING_BYTES {
            match newcomer.stream.read(&mut newcomer.bytes[newcomer.filled..]) {
                Ok(0) => return None,
                Ok(count) => newcomer.filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(newcomer),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
            if is_foreign(&newcomer.bytes[..newcomer.filled]) {
                tracing::debug!("a connection to the ring port did not greet as a rank; dropped");
                return None;
            }
        }
        match Greeting::decode(&newcomer.bytes) {
            Ok(greeting) => self.park(newcomer.stream, greeting),
            Err(BadGreeting::Version) => answer(&newcomer.stream, Answer::Version),
            Err(BadGreeting::Foreign) => {}
        }
        None
    }

    fn park(&self, stream: Socket, greeting: Greeting) {
        let mut guests = self.guests();
        if let Some(current) = guests.newest(greeting.run).filter(|&newest| newest > greeting.generation) {
            answer(&stream, Answer::Stale(current));
            return;
        }
        let place = place_of(&greeting);
        if guests.parked.len() >= PARKED_MAX && !guests.parked.contains_key(&place) {
            let oldest = guests.parked.iter().min_by_key(|(_, parked)| parked.since).map(|(&place, _)| place);
            if let Some(oldest) = oldest {
                guests.parked.remove(&oldest);
            }
        }
        // A second connection for the same place is the same rank trying again; the newest counts.
        guests.parked.insert(place, Parked { stream, greeting, since: Instant::now() });
        self.changed.notify_all();
    }
}

impl Doors {
    /// Takes in who has connected. Returns until when to pause if the system is short of something.
    fn admit(&self, newcomers: &mut VecDeque<Newcomer>) -> Option<Instant> {
        let tcp = admit(newcomers, || Ok(Some(self.listener.accept()?.0.into())));
        let local = self.local.as_ref().and_then(|local| {
            admit(newcomers, || {
                let (stream, _) = local.accept()?;
                Ok(nearby::is_same_user(&stream).then(|| OwnedFd::from(stream).into()))
            })
        });
        tcp.or(local)
    }
}

/// Takes in whom `accept` returns, until it would block. It returns nothing for who is turned away.
fn admit(
    newcomers: &mut VecDeque<Newcomer>,
    accept: impl Fn() -> io::Result<Option<Socket>>,
) -> Option<Instant> {
    loop {
        match accept() {
            Ok(None) => {}
            Ok(Some(stream)) => {
                if let Err(error) = stream.set_nonblocking(true) {
                    tracing::debug!(%error, "a connection to the ring port was dropped");
                    continue;
                }
                if newcomers.len() == GREETING_MAX
                    && let Some(oldest) = newcomers.pop_front()
                    && let Err(error) = oldest.stream.shutdown(Shutdown::Both)
                {
                    tracing::trace!(%error, "a mute connection was gone already");
                }
                let since = Instant::now();
                newcomers.push_back(Newcomer { stream, bytes: [0; GREETING_BYTES], filled: 0, since });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                tracing::warn!(%error, "the ring port cannot take a connection; raise the limit of open files");
                return Some(Instant::now() + REFUSED_PAUSE);
            }
        }
    }
}
