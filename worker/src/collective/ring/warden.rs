//! The thread that watches a ring's control connections, whatever the trainer is doing.
//!
//! It sends signs of life, hears those of the neighbours, and passes on at once that the group is over.
//! It ends by itself within [`LINGER`] after the group failed or closed.

use std::{
    io::{ErrorKind, Read},
    net::Shutdown,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    group::{Group, Side},
    notice::{NOTICE_BYTES, Notice},
};
use crate::collective::CollectiveError;

/// How long the control connections stay open after the last notice was sent. Closing a socket that
/// holds unread data resets the connection and may destroy the last notice on its way.
const LINGER: Duration = Duration::from_millis(250);

/// One control connection as the warden sees it.
struct Ear {
    side: Side,
    heard_at: Instant,
    buffer: [u8; NOTICE_BYTES],
    filled: usize,
    is_open: bool,
}

/// Watches until the group is over.
pub(super) fn watch(group: &Arc<Group>) {
    let now = Instant::now();
    let mut ears = Side::BOTH.map(|side| Ear {
        side,
        heard_at: now,
        buffer: [0; NOTICE_BYTES],
        filled: 0,
        is_open: true,
    });
    // Often enough that what a neighbour last said is fresh when a wait for it runs out.
    let beat = (group.silence / 5).min(group.timeout / 5);
    let beat = beat.clamp(Duration::from_millis(2), Duration::from_millis(500));
    let mut beat_at = now;
    while !group.is_over() {
        #[cfg(test)]
        if group.is_frozen.load(std::sync::atomic::Ordering::Acquire) {
            std::thread::park_timeout(beat);
            continue;
        }
        if Instant::now() >= beat_at {
            let notice = Notice::Alive { waiting: group.is_waiting() };
            for ear in ears.iter().filter(|ear| ear.is_open) {
                group.tell(ear.side, &notice);
            }
            beat_at = Instant::now() + beat;
        }
        wait(group, &ears, beat_at.saturating_duration_since(Instant::now()), true);
        for ear in &mut ears {
            listen(group, ear);
        }
        // Only after listening: what a process that was stopped itself finds in its buffers counts.
        if let Some(ear) = ears.iter().find(|ear| ear.is_open && ear.heard_at.elapsed() > group.silence) {
            let waited = ear.heard_at.elapsed();
            group.fail(silence(group.peer(ear.side), waited));
        }
    }
    linger(group, &mut ears);
}

fn silence(rank: takuma_core::ids::Rank, waited: Duration) -> CollectiveError {
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

/// Reads all that is there.
fn listen(group: &Group, ear: &mut Ear) {
    while ear.is_open {
        match group.control(ear.side).read(&mut ear.buffer[ear.filled..]) {
            Ok(0) => return hang_up(group, ear, "its connection was closed"),
            Ok(count) => ear.filled += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return hang_up(group, ear, &format!("its connection broke ({error})")),
        }
        if ear.filled == NOTICE_BYTES {
            ear.filled = 0;
            ear.heard_at = Instant::now();
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
