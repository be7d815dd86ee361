//! A ring over TCP: each rank sends to the next and receives from the previous one.
//!
//! Between two neighbours lie several connections (channels): one that only carries signs of life and
//! blame (`warden.rs`), one for short blocking operations, and the rest for buckets of gradients, each
//! with a thread of its own, so that a short sum never waits behind a bucket.
//!
//! Every frame carries the generation, the operation and its number, so ranks that have gone different
//! ways find out at the first frame (`frame.rs`). What is sent in which order is `flow.rs`, how it gets
//! through the sockets `pipe.rs`, which threads do it `links.rs` and `short.rs`, and how the end of a group
//! reaches every rank `group.rs`. What a second way to sum, beside the ring, needs of it is `beside.rs`.

mod beside;
mod config;
mod connect;
#[cfg(test)]
mod faults;
mod flow;
mod frame;
mod greeting;
mod group;
mod links;
mod listener;
mod nearby;
mod notice;
mod pipe;
mod short;
mod warden;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use takuma_core::ids::{Generation, Rank};

pub use self::{config::RingConfig, listener::RingListener};
use self::{frame::Kind, links::Links};
use super::{
    AbortHandle, Collective, CollectiveError, PendingReduce,
    lanes::{check_bucket, check_row},
};

/// A group of workers connected in a ring.
#[derive(Debug)]
pub struct Ring {
    rank: Rank,
    world: u32,
    generation: Generation,
    /// How many lanes of chain operations this rank holds.
    lanes: u32,
    /// Nothing in a group of one.
    links: Option<Links>,
    loopback: super::Loopback,
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
            lanes: config.lanes_by_rank[config.rank.0 as usize],
            links,
            loopback: super::Loopback::new(config.generation),
        };
        // Nobody starts before everybody has met, so that the blame for a missing rank goes around.
        ring.barrier().map_err(|error| error.during("forming the ring"))?;
        if let Some(links) = &ring.links {
            links.group.is_formed.store(true, Ordering::Release);
        }
        Ok(ring)
    }

    /// Breaks all connections without a word, as if the process were killed.
    #[cfg(test)]
    pub(crate) fn vanish(&self) {
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
        links.short(|short| short.sum_f32(values))
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        let Some(links) = &self.links else { return self.loopback.all_reduce_f64(values) };
        links.short(|short| short.sum(Kind::SumF64, values))
    }

    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        match &self.links {
            None => self.loopback.start_all_reduce(bucket),
            Some(links) => links.start(Kind::Bucket, vec![bucket]),
        }
    }

    fn start_chain_reduce(&self, lanes: Vec<Vec<f32>>) -> Result<PendingReduce, CollectiveError> {
        check_bucket(Kind::Chain.name(), &lanes, Some(self.lanes))?;
        match &self.links {
            None => self.loopback.start_chain_reduce(lanes),
            Some(links) => links.start(Kind::Chain, lanes),
        }
    }

    fn chain_reduce_f64(&self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError> {
        check_row(Kind::ChainF64.name(), lanes.len(), out.len(), Some(self.lanes))?;
        match &self.links {
            None => self.loopback.chain_reduce_f64(lanes, out),
            Some(links) => links.short(|short| short.chain(lanes, out)),
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

    fn take_receiving(&self) -> Duration {
        self.links.as_ref().map_or(Duration::ZERO, |links| links.group.take_receiving())
    }

    fn set_timeout(&self, timeout: Duration) {
        if let Some(links) = &self.links {
            links.group.set_timeout(timeout);
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
