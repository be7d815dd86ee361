//! The group of one: every sum is already there.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use takuma_core::ids::{Generation, Rank};

use super::{
    AbortHandle, Collective, CollectiveError, PendingReduce,
    lanes::{check_bucket, check_row},
    sum::chain,
};

/// A group with a single rank. Copies nothing and waits for nobody. Takes any number of lanes.
#[derive(Debug)]
pub struct Loopback {
    generation: Generation,
    aborted: Arc<Mutex<Option<String>>>,
}

impl Loopback {
    /// A group of one under `generation`.
    #[must_use]
    pub fn new(generation: Generation) -> Self {
        Self { generation, aborted: Arc::default() }
    }

    /// Fails once the group is over.
    pub(super) fn check(&self, operation: &str) -> Result<(), CollectiveError> {
        match &*self.aborted.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(reason) => {
                Err(CollectiveError::Aborted { operation: operation.into(), reason: reason.clone() })
            }
        }
    }
}

impl Collective for Loopback {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn world(&self) -> u32 {
        1
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn all_reduce(&self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        self.check("all_reduce")
    }

    fn all_reduce_f64(&self, _values: &mut [f64]) -> Result<(), CollectiveError> {
        self.check("all_reduce")
    }

    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        self.check("all_reduce of a bucket")?;
        Ok(PendingReduce::ready(vec![bucket]))
    }

    fn start_chain_reduce(&self, mut lanes: Vec<Vec<f32>>) -> Result<PendingReduce, CollectiveError> {
        const OPERATION: &str = "chain_reduce of a bucket";
        self.check(OPERATION)?;
        check_bucket(OPERATION, &lanes, None)?;
        let len = lanes[0].len();
        chain(&mut lanes, 0..len);
        Ok(PendingReduce::ready(lanes))
    }

    fn chain_reduce_f64(&self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError> {
        const OPERATION: &str = "chain_reduce";
        self.check(OPERATION)?;
        check_row(OPERATION, lanes.len(), out.len(), None)?;
        let (first, rest) = lanes.split_at(out.len());
        out.copy_from_slice(first);
        // An empty lane has no chunks, and then there are no values either.
        for lane in rest.chunks_exact(out.len().max(1)) {
            for (sum, value) in out.iter_mut().zip(lane) {
                *sum += value;
            }
        }
        Ok(())
    }

    fn broadcast(&self, root: Rank, _bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.check("broadcast")?;
        if root != Rank(0) {
            return Err(CollectiveError::Local {
                operation: "broadcast".into(),
                detail: format!("rank {root} is not in a group of 1"),
                source: None,
            });
        }
        Ok(())
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.check("all_gather")?;
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.check("barrier")
    }

    fn set_timeout(&self, _timeout: Duration) {}

    fn abort_handle(&self) -> AbortHandle {
        let aborted = Arc::clone(&self.aborted);
        AbortHandle::new(move |reason| {
            aborted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        })
    }
}
