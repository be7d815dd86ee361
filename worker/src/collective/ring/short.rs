//! The channel of the blocking operations: short, and not held up by buckets under way.

use takuma_core::ids::Rank;

use super::{
    flow::{BroadcastFlow, GatherFlow, SumFlow},
    frame::{self, FRAME_PAYLOAD_BYTES, Kind},
    links::seat,
    pipe::Pipe,
};
use crate::collective::{
    CollectiveError,
    sum::{Value, sum_blocks},
};

/// Most bytes of one rank's part of a gather or broadcast: well above the state of any recipe, well
/// below what would hurt when a rank has gone mad.
const BLOCK_MAX_BYTES: usize = 1 << 30;
/// Short sums are gathered and summed by everybody, which takes half the hops; above this many received
/// bytes the ring's reduce-scatter moves so much less that it wins.
const GATHERED_SUM_MAX_BYTES: usize = 256 * 1024;

/// The channel, with memory that is used again.
#[derive(Debug)]
pub(super) struct Short {
    pipe: Pipe,
    blocks: Vec<u8>,
    scratch: Vec<f32>,
    /// How many lanes each rank holds.
    lanes_by_rank: Vec<u32>,
}

impl Short {
    pub(super) fn new(pipe: Pipe, lanes_by_rank: Vec<u32>) -> Self {
        Self { pipe, blocks: Vec::new(), scratch: vec![0.0; FRAME_PAYLOAD_BYTES / 4], lanes_by_rank }
    }

    /// Gathers equally long blocks of all ranks into `self.blocks`, by rank. `put` appends this rank's.
    pub(super) fn gather_equal(
        &mut self,
        kind: Kind,
        total: u64,
        block_bytes: usize,
        put: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), CollectiveError> {
        let world = seat(&self.pipe.group).world;
        let cuts: Vec<usize> = (0..=world).map(|rank| rank * block_bytes).collect();
        self.gather_cut(kind, total, &cuts, put)
    }

    /// Gathers the blocks of all ranks into `self.blocks`, cut at `cuts`. `put` appends this rank's.
    fn gather_cut(
        &mut self,
        kind: Kind,
        total: u64,
        cuts: &[usize],
        put: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), CollectiveError> {
        let seat = seat(&self.pipe.group);
        self.blocks.clear();
        self.blocks.resize(cuts[seat.rank], 0);
        put(&mut self.blocks);
        self.blocks.resize(cuts[seat.world], 0);
        self.pipe.run(kind, total, &mut GatherFlow { seat, blocks: &mut self.blocks, cuts })?;
        Ok(())
    }

    /// The sum over all ranks, in f32.
    pub(super) fn sum_f32(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let seat = seat(&self.pipe.group);
        if size_of_val(values).saturating_mul(seat.world - 1) <= GATHERED_SUM_MAX_BYTES {
            return self.sum(Kind::Sum, values);
        }
        let total = values.len() as u64;
        let mut flow = SumFlow { seat, bucket: values, scratch: &mut self.scratch };
        self.pipe.run(Kind::Sum, total, &mut flow)?;
        Ok(())
    }

    /// The sum over all ranks in their order. Every rank gets all values, so they should be few.
    pub(super) fn sum<T: Value>(&mut self, kind: Kind, values: &mut [T]) -> Result<(), CollectiveError> {
        let block_bytes = values.len() * T::BYTES;
        self.gather_equal(kind, values.len() as u64, block_bytes, |bytes| {
            for value in values.iter() {
                value.put(bytes);
            }
        })?;
        sum_blocks(values, &self.blocks);
        Ok(())
    }

    /// The sum over all ranks' lanes in their order, into `out`. `lanes` are this rank's, each as long as
    /// `out`; how many the others hold is known, so one gather does it.
    pub(super) fn chain(&mut self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError> {
        let lane_bytes = size_of_val(out);
        let mut cuts = vec![0];
        let mut end = 0;
        for &count in &self.lanes_by_rank {
            end += count as usize * lane_bytes;
            cuts.push(end);
        }
        self.gather_cut(Kind::ChainF64, out.len() as u64, &cuts, |bytes| {
            for value in lanes {
                value.put(bytes);
            }
        })?;
        sum_blocks(out, &self.blocks);
        Ok(())
    }

    /// Every rank's `bytes`, by rank.
    pub(super) fn gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
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

    /// The root's `bytes` to every rank.
    pub(super) fn broadcast(&mut self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
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
