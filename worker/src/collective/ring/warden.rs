//! The thread that watches a ring's control connections, whatever the trainer is doing.
//!
//! It sends signs of life, hears those of the neighbours, and passes on at once that the group is over.
//! It ends by itself within [`LINGER`] after the group failed or closed.

use std::{
    io::{ErrorKind, Read},
    net::Shutdown,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use takuma_core::ids::Rank;

use super::{
    group::{Group, Side},
    notice::{NOTICE_BYTES, Notice},
};
use crate::collective::CollectiveError;

/// How long the control connections stay open after the last notice was sent. Closing a socket that
/// holds unread data resets the connection and may destroy the last notice on its way.
const LINGER: Duration = Duration::from_millis(250);

/// Signs of life in the longest time without one. One more than would do for five to fall into any such
/// time, since a round takes a little longer than its beat.
const BEATS_PER_SILENCE: u32 = 6;
/// Longest and shortest time between two signs of life.
const BEAT_MAX: Duration = Duration::from_millis(500);
const BEAT_MIN: Duration = Duration::from_millis(2);
/// Most reads from a neighbour in a row. What it sends is far less; one that has gone mad must not keep
/// the warden from giving signs of life itself.
const READS_PER_ROUND: usize = 64;

/// One control connection as the warden sees it.
struct Ear {
    side: Side,
    /// Time since the last sign of life.
    silent: Duration,
    buffer: [u8; NOTICE_BYTES],
    filled: usize,
    is_open: bool,
}

/// Watches until the group is over.
pub(super) fn watch(group: &Arc<Group>) {
    let mut ears = Side::BOTH.map(|side| Ear {
        side,
        silent: Duration::ZERO,
        buffer: [0; NOTICE_BYTES],
        filled: 0,
        is_open: true,
    });
    let mut round_at = Instant::now();
    let mut beaten_at: Option<Instant> = None;
    let mut was_formed = false;
    while !group.is_over() {
        let beat = beat(group.silence, group.timeout());
        #[cfg(test)]
        if group.is_frozen.load(Ordering::Acquire) {
            std::thread::park_timeout(beat);
            continue;
        }
        if beaten_at.is_none_or(|at| at.elapsed() >= beat) {
            let notice = Notice::Alive { waiting: group.is_waiting() };
            for ear in ears.iter().filter(|ear| ear.is_open) {
                group.tell(ear.side, &notice);
            }
            beaten_at = Some(Instant::now());
        }
        let left = beaten_at.map_or(beat, |at| beat.saturating_sub(at.elapsed()));
        wait(group, &ears, left, true);
        group.heed_wake();
        let round = counted(round_at.elapsed(), beat);
        round_at = Instant::now();
        // Until all have met, a neighbour may give no sign because it waits for its other one.
        let is_formed = group.is_formed.load(Ordering::Acquire);
        let limit = if is_formed { group.silence } else { group.forming + group.silence };
        for ear in &mut ears {
            ear.silent = if is_formed == was_formed { ear.silent + round } else { Duration::ZERO };
            listen(group, ear);
        }
        was_formed = is_formed;
        // Only after listening: what a process that was stopped itself finds in its buffers counts.
        if let Some(ear) = ears.iter().find(|ear| ear.is_open && ear.silent > limit) {
            group.fail(silence(group.peer(ear.side), ear.silent));
        }
    }
    linger(group, &mut ears);
}

/// Time between two signs of life: often enough for [`BEATS_PER_SILENCE`], and for what a neighbour last
/// said to be fresh when a wait for it runs out.
fn beat(silence: Duration, timeout: Duration) -> Duration {
    (silence / BEATS_PER_SILENCE).min(timeout / 5).clamp(BEAT_MIN, BEAT_MAX)
}

/// What a round that took `round` adds to a neighbour's silence. A round ends after a beat; if it took far
/// longer, then this thread did not run, because its machine was paused or out of processors, and then the
/// neighbour may not have run either, or its signs wait to be read.
fn counted(round: Duration, beat: Duration) -> Duration {
    round.min(beat * 2)
}

fn silence(rank: Rank, waited: Duration) -> CollectiveError {
    CollectiveError::Timeout {
        rank,
        waited,
        operation: "the exchange".into(),
        detail: "its process is stopped or its network is cut".into(),
    }
}

fn wait(group: &Group, ears: &[Ear; 2], limit: Duration, until_over: bool) {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    let mut fds = Vec::with_capacity(3);
    if until_over {
        fds.push(PollFd::new(group.wake(), PollFlags::IN));
    }
    for ear in ears.iter().filter(|ear| ear.is_open) {
        fds.push(PollFd::new(group.control(ear.side), PollFlags::IN));
    }
    if let Err(error) = poll(&mut fds, Some(&limit))
        && error != rustix::io::Errno::INTR
    {
        group.fail(CollectiveError::local(
            "watching the neighbours",
            "waiting for sockets failed",
            error.into(),
        ));
    }
}

/// Reads what is there.
fn listen(group: &Group, ear: &mut Ear) {
    for _ in 0..READS_PER_ROUND {
        if !ear.is_open {
            return;
        }
        match group.control(ear.side).read(&mut ear.buffer[ear.filled..]) {
            Ok(0) => return hang_up(group, ear, "its connection was closed"),
            Ok(count) => ear.filled += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return hang_up(group, ear, &format!("its connection broke ({error})")),
        }
        if ear.filled == NOTICE_BYTES {
            ear.filled = 0;
            ear.silent = Duration::ZERO;
            heed(group, ear);
        }
    }
}

fn heed(group: &Group, ear: &Ear) {
    match Notice::decode(&ear.buffer, group.generation) {
        Some(Notice::Alive { waiting }) => group.update_side(ear.side, |side| side.is_waiting = waiting),
        Some(Notice::Farewell) => group.update_side(ear.side, |side| side.has_left = true),
        Some(Notice::Over(verdict)) => group.fail_as_told(verdict),
        None => {
            group.fail(CollectiveError::Protocol {
                rank: group.peer(ear.side),
                operation: "the exchange".into(),
                detail: "it sent a notice that is none of this generation".into(),
            });
        }
    }
}

/// The connection is gone: that is a failure, unless the neighbour has said farewell.
fn hang_up(group: &Group, ear: &mut Ear, detail: &str) {
    ear.is_open = false;
    if !group.side(ear.side).has_left {
        group.fail(CollectiveError::PeerLost {
            rank: group.peer(ear.side),
            operation: "the exchange".into(),
            detail: detail.into(),
            source: None,
        });
    }
}

/// Hears the neighbours out, so that what was told them last arrives.
fn linger(group: &Group, ears: &mut [Ear; 2]) {
    let until = Instant::now() + LINGER;
    for side in Side::BOTH {
        group.shut(group.control(side), Shutdown::Write);
    }
    while ears.iter().any(|ear| ear.is_open) && Instant::now() < until {
        wait(group, ears, until.saturating_duration_since(Instant::now()), false);
        for ear in ears.iter_mut() {
            listen(group, ear);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::RingConfig;

    #[test]
    fn more_than_five_beats_fit_into_any_usual_silence() {
        let usual = RingConfig::new("run", Rank(0), takuma_core::ids::Generation(1), vec!["a:1".into()]);
        assert_eq!(usual.silence, Duration::from_millis(1500));
        for silence_ms in [12, 100, 500, 1500, 10_000] {
            let silence = Duration::from_millis(silence_ms);
            assert!(beat(silence, usual.timeout) * 5 < silence);
        }
        assert_eq!(beat(usual.silence, Duration::from_millis(100)), Duration::from_millis(20));
    }

    #[test]
    fn warden_that_did_not_run_takes_its_own_pause_for_nobodys_silence() {
        let limit = Duration::from_millis(1500);
        let beat = beat(limit, Duration::from_secs(60));
        assert!(counted(Duration::from_secs(3600), beat) < limit);
        // A little late is usual, and counts in full.
        assert_eq!(counted(beat + beat / 2, beat), beat + beat / 2);
    }
}
