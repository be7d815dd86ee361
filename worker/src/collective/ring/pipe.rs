//! Moves one operation's blocks over a pair of sockets: from the previous rank, to the next.
//!
//! One loop sends and receives at once, so no rank can wait for another that waits for it, and a frame
//! goes on to the next rank as soon as it has been added. Each wait ends after `timeout` without a byte.

use std::{
    io::{ErrorKind, IoSlice, IoSliceMut, Read, Write},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use super::{
    flow::{Flow, Hops},
    frame::{FRAME_PAYLOAD_BYTES, HEADER_BYTES, Header, Kind, Operation, describe_mismatch},
    group::{Group, Side},
};
use crate::collective::CollectiveError;

/// How soon a wait under way heeds a timeout that was changed meanwhile.
const TIMEOUT_SLICE: Duration = Duration::from_millis(250);

/// One channel of the ring, used by one thread at a time.
#[derive(Debug)]
pub(super) struct Pipe {
    from_previous: Arc<Socket>,
    to_next: Arc<Socket>,
    pub group: Arc<Group>,
    /// Operations started on this channel.
    sequence: u64,
}

/// Whether a direction got further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Moved,
    /// The socket must be waited for.
    Blocked,
    /// Nothing to do, or nothing until the other direction got further.
    Idle,
}

/// How far one direction is.
struct Cursor {
    hop: usize,
    hops: usize,
    /// Bytes of the current block before the current frame.
    offset: usize,
    frame: Option<Frame>,
}

/// A frame under way.
struct Frame {
    span: Range<usize>,
    header: Header,
    wire: [u8; HEADER_BYTES],
    /// Bytes moved, header included.
    moved: usize,
    /// When its first bytes came. A sender has all of a frame before it begins, so what passes until the last byte is
    /// the link's own time.
    begun: Option<Instant>,
}

impl Cursor {
    fn new(hops: usize) -> Self {
        Self { hop: 0, hops, offset: 0, frame: None }
    }

    fn is_done(&self) -> bool {
        self.hop == self.hops
    }

    /// Where the next frame of a block of `block_bytes` lies. An empty block has one empty frame.
    fn next_span(&self, block_bytes: usize) -> Range<usize> {
        self.offset..block_bytes.min(self.offset + FRAME_PAYLOAD_BYTES)
    }

    /// The current frame is through.
    fn advance(&mut self, span: &Range<usize>, block_bytes: usize) {
        self.frame = None;
        self.offset = span.end;
        if self.offset >= block_bytes {
            self.hop += 1;
            self.offset = 0;
        }
    }

    /// True if the whole of `span` of block `hop` is through.
    fn has(&self, hop: usize, span: &Range<usize>) -> bool {
        self.hop > hop || (self.hop == hop && !span.is_empty() && self.offset >= span.end)
    }
}

impl Pipe {
    pub(super) fn new(from_previous: Arc<Socket>, to_next: Arc<Socket>, group: Arc<Group>) -> Self {
        Self { from_previous, to_next, group, sequence: 0 }
    }

    /// Runs one operation to its end.
    ///
    /// # Errors
    /// What ended the group; the first failure ends it.
    pub(super) fn run(
        &mut self,
        kind: Kind,
        total: u64,
        flow: &mut impl Flow,
    ) -> Result<Operation, CollectiveError> {
        self.sequence += 1;
        let operation = Operation { kind, sequence: self.sequence, total };
        if let Some(failure) = self.group.failure() {
            return Err(failure.during(&operation.to_string()));
        }
        let hops = flow.hops();
        let (mut sent, mut received) = (Cursor::new(hops.send), Cursor::new(hops.receive));
        let mut progress_at = Instant::now();
        while !(sent.is_done() && received.is_done()) {
            let out = self.send(operation, hops, &mut sent, &received, flow)?;
            let into = self.receive(operation, &mut received, flow)?;
            if out == Step::Moved || into == Step::Moved {
                progress_at = Instant::now();
            } else {
                self.wait(operation, out, into, progress_at)?;
            }
        }
        Ok(operation)
    }

    fn header(&self, operation: Operation, hop: usize, span: &Range<usize>) -> Header {
        Header {
            operation,
            generation: self.group.generation,
            // Lossless: the world is at most MAX_WORLD and a block at most MAX_BLOCK_BYTES.
            hop: hop as u16,
            offset: span.start as u32,
            length: span.len() as u32,
        }
    }

    fn send(
        &self,
        operation: Operation,
        hops: Hops,
        sent: &mut Cursor,
        received: &Cursor,
        flow: &mut impl Flow,
    ) -> Result<Step, CollectiveError> {
        if sent.is_done() {
            return Ok(Step::Idle);
        }
        let block_bytes = flow.send_bytes(sent.hop);
        let mut frame = match sent.frame.take() {
            Some(frame) => frame,
            None => {
                let span = sent.next_span(block_bytes);
                if sent.hop >= hops.lead && !received.has(sent.hop - hops.lead, &span) {
                    return Ok(Step::Idle);
                }
                let header = self.header(operation, sent.hop, &span);
                flow.departing(sent.hop, span.clone());
                Frame { wire: header.encode(), header, span, moved: 0, begun: None }
            }
        };
        let payload = flow.outgoing(sent.hop, frame.span.clone());
        let head = &frame.wire[frame.moved.min(HEADER_BYTES)..];
        let body = &payload[frame.moved.saturating_sub(HEADER_BYTES)..];
        let outcome = (&*self.to_next).write_vectored(&[IoSlice::new(head), IoSlice::new(body)]);
        let step = match outcome {
            Ok(0) => return Err(self.group.lost(Side::Next, operation, None)),
            Ok(bytes) => {
                frame.moved += bytes;
                Step::Moved
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Step::Blocked,
            Err(error) if error.kind() == ErrorKind::Interrupted => Step::Moved,
            Err(error) => return Err(self.group.lost(Side::Next, operation, Some(error))),
        };
        if frame.moved == HEADER_BYTES + frame.span.len() {
            sent.advance(&frame.span, block_bytes);
        } else {
            sent.frame = Some(frame);
        }
        Ok(step)
    }

    fn receive(
        &self,
        operation: Operation,
        received: &mut Cursor,
        flow: &mut impl Flow,
    ) -> Result<Step, CollectiveError> {
        if received.is_done() {
            return Ok(Step::Idle);
        }
        let block_bytes = flow.receive_bytes(received.hop);
        let mut frame = match received.frame.take() {
            Some(frame) => frame,
            None => {
                let span = received.next_span(block_bytes);
                let header = self.header(operation, received.hop, &span);
                Frame { wire: [0; HEADER_BYTES], header, span, moved: 0, begun: None }
            }
        };
        let payload = flow.incoming(received.hop, frame.span.clone());
        let head = &mut frame.wire[frame.moved.min(HEADER_BYTES)..];
        let body = &mut payload[frame.moved.saturating_sub(HEADER_BYTES)..];
        let outcome =
            (&*self.from_previous).read_vectored(&mut [IoSliceMut::new(head), IoSliceMut::new(body)]);
        let step = match outcome {
            Ok(0) => return Err(self.group.lost(Side::Previous, operation, None)),
            Ok(bytes) => {
                frame.begun.get_or_insert_with(Instant::now);
                self.check(operation, &mut frame, bytes)?;
                Step::Moved
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Step::Blocked,
            Err(error) if error.kind() == ErrorKind::Interrupted => Step::Moved,
            Err(error) => return Err(self.group.lost(Side::Previous, operation, Some(error))),
        };
        if frame.moved == HEADER_BYTES + frame.span.len() {
            self.group.note_received(frame.begun.map_or(Duration::ZERO, |begun| begun.elapsed()));
            flow.arrived(received.hop, frame.span.clone());
            received.advance(&frame.span, block_bytes);
        } else {
            received.frame = Some(frame);
        }
        Ok(step)
    }

    /// Counts `bytes` more of `frame`, and compares its header as soon as it is there.
    fn check(&self, operation: Operation, frame: &mut Frame, bytes: usize) -> Result<(), CollectiveError> {
        let had_header = frame.moved >= HEADER_BYTES;
        frame.moved += bytes;
        if had_header || frame.moved < HEADER_BYTES || frame.wire == frame.header.encode() {
            return Ok(());
        }
        Err(self.group.fail(CollectiveError::Protocol {
            rank: self.group.peer(Side::Previous),
            operation: operation.to_string(),
            detail: describe_mismatch(&frame.header, &frame.wire),
        }))
    }

    /// Waits until a blocked direction can go on.
    fn wait(
        &self,
        operation: Operation,
        out: Step,
        into: Step,
        progress_at: Instant,
    ) -> Result<(), CollectiveError> {
        let mut fds = Vec::with_capacity(2);
        let mut sides = Vec::with_capacity(2);
        if into == Step::Blocked {
            fds.push(PollFd::new(&*self.from_previous, PollFlags::IN));
            sides.push(Side::Previous);
        }
        if out == Step::Blocked {
            fds.push(PollFd::new(&*self.to_next, PollFlags::OUT));
            sides.push(Side::Next);
        }
        let waiting = self.group.note_waiting();
        let (mut timeout, mut since) = (self.group.timeout(), progress_at);
        let ready = loop {
            let now_valid = self.group.timeout();
            if now_valid < timeout {
                // A shorter limit counts from now on: the neighbours' signs of life, which tell whom to
                // blame, keep pace with it from now on only.
                since = Instant::now();
            }
            timeout = now_valid;
            let left = timeout.saturating_sub(since.elapsed());
            let slice = left.min(TIMEOUT_SLICE);
            let slice = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
            match poll(&mut fds, Some(&slice)) {
                Ok(0) if since.elapsed() < timeout => {}
                ready => break ready,
            }
        };
        drop(waiting);
        match ready {
            Ok(0) => Err(self.group.overdue(&sides, operation, progress_at.elapsed())),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(self.group.fail(CollectiveError::local(
                &operation.to_string(),
                "waiting for sockets failed; look at the limits of this process",
                errno.into(),
            ))),
        }
    }
}
