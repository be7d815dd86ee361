//! Exchange between the workers of one group: sums, broadcasts, barriers.
//!
//! Owns the [`Collective`] trait and its implementations: [`Loopback`] for a group of one,
//! [`ring::Ring`] over TCP for CPU tensors, and [`nccl::Nccl`], a ring whose members sum GPU memory through NCCL
//! ([`DeviceCollective`]). `contract.rs` is the one suite that all of them pass.
//! Knows nothing of tensors, recipes or the coordinator: values come as slices or addresses, members as addresses.
//!
//! Every rank of a group must call the same operations in the same order. Whatever goes wrong is one
//! [`CollectiveError`]; after the first one the group is over and each later call returns it again, so
//! the caller re-forms under the next [`Generation`].

#[cfg(test)]
mod contract;
mod device;
mod error;
mod lanes;
mod loopback;
pub mod nccl;
mod pending;
pub mod ring;
mod sum;

use std::{fmt, sync::Arc, time::Duration};

pub use device::{DeviceCollective, DeviceKind, DeviceValues, EndedWord, HostStream};
pub use error::CollectiveError;
pub use loopback::Loopback;
pub use nccl::{Nccl, NcclConfig};
pub use pending::PendingReduce;
pub use ring::{Ring, RingConfig, RingListener};
use takuma_core::ids::{Generation, Rank};

/// What the ranks of one group do together.
///
/// Sums are taken in an order fixed by rank and position only: every rank gets the same bits, and the
/// same inputs give the same bits on every run.
///
/// The chain operations go further: their bits do not depend on the number of ranks either. The work is
/// cut into lanes whose number and order are fixed for the run; each rank holds one or more lanes that
/// follow each other, rank 0 the first ones. The sum is `((l0 + l1) + l2) + ...` over all lanes, every
/// addition rounded, as one rank alone would take it. Only which NaN a NaN is may differ.
pub trait Collective: Send + Sync + fmt::Debug {
    /// This worker's place in the group.
    fn rank(&self) -> Rank;

    /// Number of ranks in the group, at least 1.
    fn world(&self) -> u32;

    /// The membership that this group was formed under.
    fn generation(&self) -> Generation;

    /// Replaces `values` by their sum over all ranks. Blocking; made for short vectors (statistics of
    /// batch normalisation, metrics) and not held up by buckets under way.
    ///
    /// # Errors
    /// Any [`CollectiveError`]; `values` are then unspecified.
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// [`Collective::all_reduce`] for double precision.
    ///
    /// # Errors
    /// Any [`CollectiveError`]; `values` are then unspecified.
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError>;

    /// Starts to sum a bucket of gradients over all ranks and returns; the bucket comes back from
    /// [`PendingReduce::wait`]. All ranks start the same buckets in the same order. Blocks only when
    /// some hundred buckets are already waiting.
    ///
    /// # Errors
    /// What ended the group, if it is over.
    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError>;

    /// Starts to sum a bucket of gradients over the lanes of all ranks, lane after lane, and returns; the
    /// sum comes back from [`PendingReduce::wait`]. Shares its channels and its rules with
    /// [`Collective::start_all_reduce`].
    ///
    /// # Shapes
    /// `lanes`: f32 `[this rank's lanes][len]`, in their order; `len` is the same on all ranks. The sum
    /// is taken in the first lane's memory.
    ///
    /// # Errors
    /// What ended the group, if it is over; [`CollectiveError::Local`], and the group lives on, if there
    /// are no lanes, other than the group was formed with, or of different lengths.
    fn start_chain_reduce(&self, lanes: Vec<Vec<f32>>) -> Result<PendingReduce, CollectiveError>;

    /// Writes into `out` the sum over the lanes of all ranks, lane after lane. Blocking; made for short
    /// vectors, as [`Collective::all_reduce_f64`] is.
    ///
    /// # Shapes
    /// `lanes`: f64 `[this rank's lanes * len]`, one lane after the other; `out`: f64 `[len]`, the same
    /// on all ranks.
    ///
    /// # Errors
    /// Any [`CollectiveError`]; `out` is then unspecified. [`CollectiveError::Local`], and the group lives
    /// on, if `lanes` are not the lanes that the group was formed with.
    fn chain_reduce_f64(&self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError>;

    /// Gives every rank the bytes that `root` holds. The other ranks' `bytes` are replaced.
    ///
    /// # Errors
    /// Any [`CollectiveError`]; `bytes` are then unspecified.
    fn broadcast(&self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// Every rank's `bytes`, by rank. Lengths may differ.
    ///
    /// # Errors
    /// Any [`CollectiveError`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// Any [`CollectiveError`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// Sets the longest wait in an operation without a byte from the neighbours, for waits to come and,
    /// within a quarter of a second, for those under way. It covers the neighbours' computing, so it must
    /// be above the longest step. Without neighbours nothing waits, and nothing changes.
    fn set_timeout(&self, timeout: Duration);

    /// How long data from the previous rank was on the link since the last call, as far as that can be told from
    /// waiting for the peers: large where the link is slow. Zero where there is no link.
    fn take_receiving(&self) -> Duration {
        Duration::ZERO
    }

    /// The same group's sums of device memory, where it has them.
    fn on_device(&self) -> Option<&dyn DeviceCollective> {
        None
    }

    /// A handle that ends this group from any thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// Ends a group from any thread: every wait, present and future, returns [`CollectiveError::Aborted`].
#[derive(Clone)]
pub struct AbortHandle {
    abort: Arc<dyn Fn(&str) + Send + Sync>,
}

impl AbortHandle {
    /// A handle that calls `abort` with the reason.
    pub(crate) fn new(abort: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { abort: Arc::new(abort) }
    }

    /// Ends the group. `reason` completes the sentence "stopped because ...". The first reason stays.
    pub fn abort(&self, reason: &str) {
        (self.abort)(reason);
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AbortHandle")
    }
}
