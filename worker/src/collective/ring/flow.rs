//! What each operation sends and receives, block by block. The sockets are `pipe.rs`'s business.
//!
//! A rank's stream to the next rank is a row of blocks. The first [`Hops::lead`] blocks are its own; block
//! `lead + j` is what the previous rank sent as block `j`, passed on (after adding to it, for a sum).

use std::ops::Range;

use crate::collective::sum::{add, bytes_of, bytes_of_mut, chain};

/// How many blocks an operation moves through one rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hops {
    /// Blocks sent to the next rank.
    pub send: usize,
    /// Blocks received from the previous rank.
    pub receive: usize,
    /// Blocks that can be sent before any was received.
    pub lead: usize,
}

/// Memory behind the blocks of one operation on one rank.
pub(super) trait Flow {
    fn hops(&self) -> Hops;

    /// Bytes of the block sent as number `hop`.
    fn send_bytes(&self, hop: usize) -> usize;

    /// Bytes of the block received as number `hop`.
    fn receive_bytes(&self, hop: usize) -> usize;

    /// Bytes `span` of block `hop`, a whole frame, are about to be sent: the last moment to compute them.
    /// Called once a frame.
    fn departing(&mut self, _hop: usize, _span: Range<usize>) {}

    /// What to send for bytes `span` of block `hop`.
    fn outgoing(&self, hop: usize, span: Range<usize>) -> &[u8];

    /// Where to put bytes `span` of block `hop`, a whole frame.
    fn incoming(&mut self, hop: usize, span: Range<usize>) -> &mut [u8];

    /// The frame asked for by [`Flow::incoming`] is there.
    fn arrived(&mut self, hop: usize, span: Range<usize>);
}

/// Place in the ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat {
    pub rank: usize,
    pub world: usize,
}

impl Seat {
    /// The rank `steps` before `rank`, `steps <= world`.
    fn back(self, steps: usize) -> usize {
        (self.rank + self.world - steps) % self.world
    }
}

/// Sum of a bucket: reduce-scatter, then all-gather, as one stream.
///
/// The bucket is cut into one segment a rank. Block `j` sent is segment `rank - j`: its own segment first,
/// then partial sums (each rank adds its own values), and from block `world - 1` on finished segments.
/// Segment `s` is summed over the ranks `s, s + 1, ...` in this order, and by one rank for all of them.
pub(super) struct SumFlow<'a> {
    pub seat: Seat,
    /// f32 `[len]`, summed in place.
    pub bucket: &'a mut [f32],
    /// f32 `[FRAME_PAYLOAD_BYTES / 4]`: a frame to be added.
    pub scratch: &'a mut [f32],
}

const VALUE_BYTES: usize = size_of::<f32>();

impl SumFlow<'_> {
    fn segment(&self, index: usize) -> Range<usize> {
        let cut = |index: usize| {
            // In u128, because values times ranks may pass 64 bits only in theory, but then silently.
            (self.bucket.len() as u128 * index as u128 / self.seat.world as u128) as usize
        };
        cut(index)..cut(index + 1)
    }

    /// Values of the bucket that bytes `span` of segment `index` are.
    fn values(&self, index: usize, span: &Range<usize>) -> Range<usize> {
        let start = self.segment(index).start;
        start + span.start / VALUE_BYTES..start + span.end / VALUE_BYTES
    }

    fn is_partial(&self, hop: usize) -> bool {
        hop < self.seat.world - 1
    }
}

impl Flow for SumFlow<'_> {
    fn hops(&self) -> Hops {
        let blocks = 2 * (self.seat.world - 1);
        Hops { send: blocks, receive: blocks, lead: 1 }
    }

    fn send_bytes(&self, hop: usize) -> usize {
        self.segment(self.seat.back(hop % self.seat.world)).len() * VALUE_BYTES
    }

    fn receive_bytes(&self, hop: usize) -> usize {
        self.segment(self.seat.back(hop % self.seat.world + 1)).len() * VALUE_BYTES
    }

    fn outgoing(&self, hop: usize, span: Range<usize>) -> &[u8] {
        let values = self.values(self.seat.back(hop % self.seat.world), &span);
        bytes_of(&self.bucket[values])
    }

    fn incoming(&mut self, hop: usize, span: Range<usize>) -> &mut [u8] {
        if self.is_partial(hop) {
            bytes_of_mut(&mut self.scratch[..span.len() / VALUE_BYTES])
        } else {
            let values = self.values(self.seat.back(hop % self.seat.world + 1), &span);
            bytes_of_mut(&mut self.bucket[values])
        }
    }

    fn arrived(&mut self, hop: usize, span: Range<usize>) {
        if self.is_partial(hop) {
            let values = self.values(self.seat.back(hop % self.seat.world + 1), &span);
            let received = &self.scratch[..values.len()];
            add(&mut self.bucket[values], received);
        }
    }
}

/// Sum of a bucket over lanes in their global order, whatever ranks hold them.
///
/// The bucket is one block, and passes the ring twice. From rank 0 to the last one it is the chain so
/// far, to which each rank adds its lanes, frame by frame; from the last rank on, over rank 0, to the one
/// before the last, it is the sum. So the last rank, which ends the first round, sends what it has just
/// finished, and rank 0, which begins it, is the only one to send unasked.
///
/// Chain and sum share the first lane's memory: a frame of the sum comes only after that frame of the
/// chain has left, since it was made from it.
pub(super) struct ChainFlow<'a> {
    pub seat: Seat,
    /// f32 `[lanes][len]`, at least one; the sum ends up in the first.
    pub lanes: &'a mut [Vec<f32>],
    /// f32 `[FRAME_PAYLOAD_BYTES / 4]`: a frame to which the lanes are added.
    pub scratch: &'a mut [f32],
}

impl ChainFlow<'_> {
    fn is_first(&self) -> bool {
        self.seat.rank == 0
    }

    fn is_last(&self) -> bool {
        self.seat.rank + 1 == self.seat.world
    }

    /// True if what is received as block `hop` is the chain so far, false if it is the sum.
    fn is_partial(&self, hop: usize) -> bool {
        hop == 0 && !self.is_first()
    }

    fn block_bytes(&self) -> usize {
        self.lanes[0].len() * VALUE_BYTES
    }
}

fn values_of(span: &Range<usize>) -> Range<usize> {
    span.start / VALUE_BYTES..span.end / VALUE_BYTES
}

impl Flow for ChainFlow<'_> {
    fn hops(&self) -> Hops {
        // The rank before the last one is where the sum's way ends.
        let passes_sum_on = self.seat.rank + 2 != self.seat.world;
        Hops {
            send: usize::from(!self.is_last()) + usize::from(passes_sum_on),
            receive: usize::from(!self.is_first()) + usize::from(!self.is_last()),
            lead: usize::from(self.is_first()),
        }
    }

    fn send_bytes(&self, _hop: usize) -> usize {
        self.block_bytes()
    }

    fn receive_bytes(&self, _hop: usize) -> usize {
        self.block_bytes()
    }

    fn departing(&mut self, hop: usize, span: Range<usize>) {
        if self.is_first() && hop == 0 {
            chain(self.lanes, values_of(&span));
        }
    }

    fn outgoing(&self, _hop: usize, span: Range<usize>) -> &[u8] {
        bytes_of(&self.lanes[0][values_of(&span)])
    }

    fn incoming(&mut self, hop: usize, span: Range<usize>) -> &mut [u8] {
        if self.is_partial(hop) {
            bytes_of_mut(&mut self.scratch[..span.len() / VALUE_BYTES])
        } else {
            bytes_of_mut(&mut self.lanes[0][values_of(&span)])
        }
    }

    fn arrived(&mut self, hop: usize, span: Range<usize>) {
        if self.is_partial(hop) {
            let values = values_of(&span);
            // The first lane plus the chain is the chain plus the first lane, to the bit.
            add(&mut self.lanes[0][values.clone()], &self.scratch[..values.len()]);
            chain(self.lanes, values);
        }
    }
}

/// Every rank's block to every rank.
pub(super) struct GatherFlow<'a> {
    pub seat: Seat,
    /// All blocks, by rank, one after the other.
    pub blocks: &'a mut [u8],
    /// Where each rank's block lies in `blocks`; `world + 1` cuts.
    pub cuts: &'a [usize],
}

impl GatherFlow<'_> {
    fn block(&self, rank: usize) -> Range<usize> {
        self.cuts[rank]..self.cuts[rank + 1]
    }

    fn place(&self, rank: usize, span: &Range<usize>) -> Range<usize> {
        self.cuts[rank] + span.start..self.cuts[rank] + span.end
    }
}

impl Flow for GatherFlow<'_> {
    fn hops(&self) -> Hops {
        Hops { send: self.seat.world - 1, receive: self.seat.world - 1, lead: 1 }
    }

    fn send_bytes(&self, hop: usize) -> usize {
        self.block(self.seat.back(hop)).len()
    }

    fn receive_bytes(&self, hop: usize) -> usize {
        self.block(self.seat.back(hop + 1)).len()
    }

    fn outgoing(&self, hop: usize, span: Range<usize>) -> &[u8] {
        &self.blocks[self.place(self.seat.back(hop), &span)]
    }

    fn incoming(&mut self, hop: usize, span: Range<usize>) -> &mut [u8] {
        let place = self.place(self.seat.back(hop + 1), &span);
        &mut self.blocks[place]
    }

    fn arrived(&mut self, _hop: usize, _span: Range<usize>) {}
}

/// One rank's bytes passed on from rank to rank, until the rank before the root has them.
pub(super) struct BroadcastFlow<'a> {
    pub seat: Seat,
    pub root: usize,
    /// The root's bytes, or room for them.
    pub bytes: &'a mut [u8],
}

impl Flow for BroadcastFlow<'_> {
    fn hops(&self) -> Hops {
        let is_root = self.seat.rank == self.root;
        let is_last = (self.seat.rank + 1) % self.seat.world == self.root;
        Hops { send: usize::from(!is_last), receive: usize::from(!is_root), lead: usize::from(is_root) }
    }

    fn send_bytes(&self, _hop: usize) -> usize {
        self.bytes.len()
    }

    fn receive_bytes(&self, _hop: usize) -> usize {
        self.bytes.len()
    }

    fn outgoing(&self, _hop: usize, span: Range<usize>) -> &[u8] {
        &self.bytes[span]
    }

    fn incoming(&mut self, _hop: usize, span: Range<usize>) -> &mut [u8] {
        &mut self.bytes[span]
    }

    fn arrived(&mut self, _hop: usize, _span: Range<usize>) {}
}
