//! Forming a ring: dialling the next rank while the previous one comes in.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::net::sockopt;
use socket2::{Domain, Socket};
use takuma_core::ids::Rank;

use super::{
    RingConfig, RingListener,
    greeting::{ANSWER_BYTES, Answer, Greeting, run_hash},
    nearby,
    notice::{Notice, Verdict},
};
use crate::collective::CollectiveError;

const FORMING: &str = "forming the ring";

/// First pause after a refused connection. It doubles up to [`RETRY_PAUSE_MAX`].
const RETRY_PAUSE: Duration = Duration::from_millis(5);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(200);
/// How often a wait for an answer looks whether the other half of the formation has failed.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest try of one address.
const DIAL_MAX: Duration = Duration::from_secs(2);

/// Connections to both neighbours, by channel.
pub(super) struct Neighbours {
    pub from_previous: Vec<Socket>,
    pub to_next: Vec<Socket>,
}

/// One formation. The first failure, of either half, ends both.
struct Formation<'a> {
    listener: &'a RingListener,
    config: &'a RingConfig,
    run: u64,
    world: u32,
    deadline: Instant,
    failure: Mutex<Option<CollectiveError>>,
}

/// Connects to both neighbours.
///
/// # Errors
/// What kept the ring from forming, with the rank that did not answer. The neighbours that were reached
/// are told.
pub(super) fn meet(listener: &RingListener, config: &RingConfig) -> Result<Neighbours, CollectiveError> {
    let run = run_hash(&config.run);
    if let Some(current) = listener.newer(run, config.generation) {
        return Err(CollectiveError::StaleGeneration {
            own: config.generation,
            current,
            detail: "this worker has heard of a newer one".into(),
        });
    }
    listener.fence(&config.run, config.generation);
    let formation = Formation {
        listener,
        config,
        run,
        world: config.world(),
        deadline: Instant::now() + config.connect_timeout,
        failure: Mutex::default(),
    };
    let (mut from_previous, mut to_next) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| formation.note(formation.dial(&mut to_next)));
        formation.note(formation.collect(&mut from_previous));
    });
    let failure = formation.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failure =
        failure.or_else(|| from_previous.iter().chain(&to_next).find_map(|s| prepare(s, config).err()));
    match failure {
        None => Ok(Neighbours { from_previous, to_next }),
        Some(failure) => {
            for streams in [&from_previous, &to_next] {
                tell(streams.first(), &failure, config);
            }
            Err(failure)
        }
    }
}

impl Formation<'_> {
    fn note(&self, outcome: Result<(), CollectiveError>) {
        if let Err(error) = outcome {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            self.listener.notify();
        }
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn rank_at(&self, distance: u32) -> Rank {
        Rank((self.config.rank.0 + distance) % self.world)
    }

    fn greeting(&self, from: Rank, to: Rank, channel: u16) -> Greeting {
        Greeting {
            run: self.run,
            generation: self.config.generation,
            from,
            to,
            world: self.world,
            channel,
            channels: self.config.sockets(),
            lanes: self.config.lanes_digest(),
        }
    }

    fn late(&self, rank: Rank, detail: String) -> CollectiveError {
        CollectiveError::Timeout {
            rank,
            waited: self.config.connect_timeout,
            operation: FORMING.into(),
            detail,
        }
    }

    fn collect(&self, streams: &mut Vec<Socket>) -> Result<(), CollectiveError> {
        let previous = self.rank_at(self.world - 1);
        let wanted = self.greeting(previous, self.config.rank, 0);
        let is_complete = self.listener.collect(&wanted, streams, self.deadline, || self.has_failed())?;
        if is_complete || self.has_failed() {
            return Ok(());
        }
        Err(self.late(previous, "it did not connect; can it reach this worker's address?".into()))
    }

    fn dial(&self, streams: &mut Vec<Socket>) -> Result<(), CollectiveError> {
        let next = self.rank_at(1);
        let address = &self.config.members[next.0 as usize];
        for channel in 0..self.config.sockets() {
            // Control stays with TCP, and tells whether there is a shorter way for the others.
            let control = streams.first().filter(|_| self.config.use_local_sockets);
            let stream = match control.and_then(nearby::dial) {
                Some(stream) => stream,
                None => match self.dial_once(next, address)? {
                    Some(stream) => stream,
                    None => return Ok(()),
                },
            };
            let greeting = self.greeting(self.config.rank, next, channel).encode();
            (&stream).write_all(&greeting).map_err(|error| lost(next, address, Some(error)))?;
            streams.push(stream);
        }
        for stream in streams.iter() {
            match self.answer(stream, next, address)? {
                None => return Ok(()),
                Some(Answer::Welcome) => {}
                Some(Answer::Stale(current)) => {
                    return Err(CollectiveError::StaleGeneration {
                        own: self.config.generation,
                        current,
                        detail: format!("rank {next} at {address} has heard of a newer one"),
                    });
                }
                Some(refusal) => {
                    return Err(CollectiveError::Protocol {
                        rank: next,
                        operation: FORMING.into(),
                        detail: match refusal {
                            Answer::Version => format!("{address} runs another version of takuma"),
                            _ => format!(
                                "{address} sees another group, with other members, channels or lanes; all workers need the same \
                                 settings"
                            ),
                        },
                    });
                }
            }
        }
        Ok(())
    }

    /// A connection to `address`, tried for a while. Nothing if the other half has failed.
    ///
    /// A member listens from the beginning, and its kernel takes connections whatever its trainer is doing. So one that
    /// cannot be connected to is unreachable, and waiting for it as for one that computes would hold up the group.
    fn dial_once(&self, next: Rank, address: &str) -> Result<Option<Socket>, CollectiveError> {
        let begin = Instant::now();
        let deadline = self.deadline.min(begin + self.config.reach_timeout);
        let mut pause = RETRY_PAUSE;
        loop {
            let error = match try_dial(address, deadline) {
                Ok(stream) => return Ok(Some(stream.into())),
                Err(error) => error,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Timeout {
                    rank: next,
                    waited: begin.elapsed(),
                    operation: FORMING.into(),
                    detail: format!("{address} does not take connections ({error})"),
                });
            }
            if self.has_failed() {
                return Ok(None);
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// What `next` says to a greeting. Nothing if the other half has failed.
    fn answer(
        &self,
        mut stream: &Socket,
        next: Rank,
        address: &str,
    ) -> Result<Option<Answer>, CollectiveError> {
        let broken = |error| lost(next, address, Some(error));
        stream.set_read_timeout(Some(LOOK_EVERY)).map_err(broken)?;
        let mut bytes = [0; ANSWER_BYTES];
        let mut filled = 0;
        while filled < ANSWER_BYTES {
            match stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err(lost(next, address, None)),
                Ok(count) => filled += count,
                Err(error) if is_pause(&error) => {
                    if self.has_failed() {
                        return Ok(None);
                    }
                    if Instant::now() >= self.deadline {
                        return Err(self.late(next, format!("{address} did not join the ring")));
                    }
                }
                Err(error) => return Err(broken(error)),
            }
        }
        match Answer::decode(&bytes) {
            Some(answer) => Ok(Some(answer)),
            None => Err(CollectiveError::Protocol {
                rank: next,
                operation: FORMING.into(),
                detail: format!("what listens at {address} is no ring of takuma"),
            }),
        }
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn lost(rank: Rank, address: &str, source: Option<io::Error>) -> CollectiveError {
    CollectiveError::PeerLost {
        rank,
        operation: FORMING.into(),
        detail: format!("{address} closed the connection"),
        source: source.map(std::sync::Arc::new),
    }
}

fn try_dial(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for resolved in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        // At least a millisecond, because zero is refused as an argument.
        let limit = left.clamp(Duration::from_millis(1), DIAL_MAX);
        match TcpStream::connect_timeout(&resolved, limit) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Sets what every socket of the ring needs. Buffer sizes are left to the kernel: it grows them as the
/// link needs, and setting them ends that.
fn prepare(stream: &Socket, config: &RingConfig) -> Result<(), CollectiveError> {
    let set = || -> io::Result<()> {
        stream.set_nonblocking(true)?;
        if stream.local_addr()?.domain() == Domain::UNIX {
            return Ok(());
        }
        sockopt::set_tcp_nodelay(stream, true)?;
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
        sockopt::set_tcp_keepcnt(stream, 3)?;
        set_unacknowledged(stream, config.timeout.max(config.silence))
    };
    set().map_err(|error| CollectiveError::local(FORMING, "a socket could not be set up", error))
}

/// Sets how long the kernel keeps a TCP connection whose peer acknowledges nothing or has no room: not
/// shorter than this side is ready to wait, or the kernel would take a busy peer for a lost one.
pub(super) fn set_unacknowledged(stream: &Socket, longest: Duration) -> io::Result<()> {
    if stream.local_addr()?.domain() == Domain::UNIX {
        return Ok(());
    }
    // Zero would be the system's own limit.
    let longest_ms = u32::try_from(longest.as_millis()).unwrap_or(u32::MAX).max(1);
    Ok(sockopt::set_tcp_user_timeout(stream, longest_ms)?)
}

/// Tells a neighbour over its control connection, if there is one, why there will be no ring.
fn tell(control: Option<&Socket>, failure: &CollectiveError, config: &RingConfig) {
    let Some(mut control) = control else { return };
    let notice = Notice::Over(Verdict::of(failure, config.rank)).encode(config.generation);
    if let Err(error) = control.write_all(&notice) {
        tracing::debug!(%error, "a neighbour could not be told that the ring did not form");
    }
}
