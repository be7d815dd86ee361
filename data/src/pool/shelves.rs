//! [`Shelves`]: which shards are wanted, which are here, which are damaged. State alone; reads nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use super::PoolStatus;
use crate::Shard;

/// An image that was read alone: its place in the shard and the CRC32C of its pixels.
pub(super) type Sum = (u32, u32);

/// The state of a pool.
#[derive(Debug, Default)]
pub(super) struct Shelves {
    closed: bool,
    shelves: BTreeMap<u32, Shelf>,
    /// What is wrong with wanted shards, in words.
    faults: BTreeMap<u32, String>,
}

/// The place of one wanted shard.
#[derive(Debug)]
pub(super) struct Shelf {
    content: Content,
    /// Stays until the shelf is cleared, which ends the loading wherever it is.
    _loading: AbortOnDropHandle<()>,
}

#[derive(Debug)]
enum Content {
    /// On its way. The sums of images that were read alone meanwhile wait for the shard to be held against it.
    Loading(HashSet<Sum>),
    Resident(Shard),
}

/// What a shelf can do for a reader.
#[derive(Debug)]
pub(super) enum Look {
    Resident(Shard),
    Loading,
    /// The shard is not wanted (any more).
    Unwanted,
    /// This shard or another one is damaged: nobody should go on with any.
    Damaged(Vec<String>),
    Closed,
}

impl Shelves {
    /// Clears shelves that are not in `wanted` and makes those that are missing, with `load` in the
    /// background. Returns what was on the cleared shelves, to be dropped without the lock.
    pub(super) fn want(
        &mut self,
        wanted: &BTreeSet<u32>,
        mut load: impl FnMut(u32) -> AbortOnDropHandle<()>,
    ) -> Vec<Shelf> {
        if self.closed {
            return Vec::new();
        }
        let cleared = self.shelves.extract_if(.., |shard, _| !wanted.contains(shard));
        let cleared = cleared.map(|(_, shelf)| shelf).collect();
        self.faults.retain(|shard, _| wanted.contains(shard));
        for &shard in wanted {
            self.shelves.entry(shard).or_insert_with(|| Shelf {
                content: Content::Loading(HashSet::new()),
                _loading: load(shard),
            });
        }
        cleared
    }

    /// Clears all shelves for good; what was on them is to be dropped without the lock.
    pub(super) fn close(&mut self) -> BTreeMap<u32, Shelf> {
        self.closed = true;
        std::mem::take(&mut self.shelves)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn look(&self, shard: u32) -> Look {
        if self.closed {
            return Look::Closed;
        }
        if !self.faults.is_empty() {
            return Look::Damaged(self.faults());
        }
        match self.shelves.get(&shard).map(|shelf| &shelf.content) {
            Some(Content::Resident(shard)) => Look::Resident(shard.clone()),
            Some(Content::Loading(_)) => Look::Loading,
            None => Look::Unwanted,
        }
    }

    /// Everything that is wrong with wanted shards.
    pub(super) fn faults(&self) -> Vec<String> {
        self.faults.values().cloned().collect()
    }

    pub(super) fn status(&self) -> PoolStatus {
        let resident = |shelf: &&Shelf| matches!(shelf.content, Content::Resident(_));
        PoolStatus { resident: self.shelves.values().filter(resident).count(), wanted: self.shelves.len() }
    }

    /// The wanted shards, if all of them are here and none is damaged.
    pub(super) fn resident(&self) -> Option<Vec<(u32, Shard)>> {
        if self.closed || !self.faults.is_empty() {
            return None;
        }
        let resident = |(&number, shelf): (&u32, &Shelf)| match &shelf.content {
            Content::Resident(shard) => Some((number, shard.clone())),
            Content::Loading(_) => None,
        };
        self.shelves.iter().map(resident).collect()
    }

    /// Takes note of an image that was read alone. Returns the shard's own pixels if it came meanwhile.
    pub(super) fn read_alone(&mut self, shard: u32, sum: Sum) -> Option<Bytes> {
        match &mut self.shelves.get_mut(&shard)?.content {
            Content::Loading(sums) => {
                sums.insert(sum);
                None
            }
            Content::Resident(shard) => Some(shard.image_slice(sum.0)),
        }
    }

    /// The notes since the last call.
    pub(super) fn take_sums(&mut self, shard: u32) -> HashSet<Sum> {
        match self.shelves.get_mut(&shard).map(|shelf| &mut shelf.content) {
            Some(Content::Loading(sums)) => std::mem::take(sums),
            _ => HashSet::new(),
        }
    }

    /// Puts a whole shard on its shelf, unless that is gone or an image that was read alone had other
    /// pixels. Few notes should be left: the lock is held.
    pub(super) fn put(&mut self, number: u32, shard: Shard) {
        if let Some(index) = differing(&shard, &self.take_sums(number)) {
            self.condemn(number, other_pixels(number, index));
        } else if let Some(shelf) = self.shelves.get_mut(&number) {
            shelf.content = Content::Resident(shard);
        }
    }

    /// Takes note that a wanted shard is damaged.
    pub(super) fn condemn(&mut self, number: u32, fault: String) {
        if self.shelves.contains_key(&number) {
            self.faults.insert(number, fault);
        }
    }
}

/// The first image that was other pixels when it was read alone than it is in the verified shard.
pub(super) fn differing(shard: &Shard, sums: &HashSet<Sum>) -> Option<u32> {
    let differs = |&&(index, sum): &&Sum| crc32c::crc32c(shard.image(index)) != sum;
    sums.iter().filter(differs).map(|&(index, _)| index).min()
}

/// The fault for [`differing`], in words.
pub(super) fn other_pixels(shard: u32, index: u32) -> String {
    format!("image {index} of shard {shard} was read alone with other bytes than the whole shard holds")
}
