//! Sums of memory that lies on a GPU, in the order of a stream.

use std::{
    any::Any,
    ffi::c_void,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use super::CollectiveError;

/// What the values of a device sum are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// The upper half of a single.
    Bf16,
}

impl DeviceKind {
    /// Bytes of one value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
        })
    }
}

/// Values in device memory, without gaps. They are an address: whoever reads or writes there answers for it.
#[derive(Debug, Clone, Copy)]
pub struct DeviceValues {
    /// The first value.
    pub ptr: *mut c_void,
    /// How many values.
    pub len: usize,
    /// What they are.
    pub kind: DeviceKind,
}

// SAFETY: an address and a length; nothing is done with them here.
unsafe impl Send for DeviceValues {}
// SAFETY: as above.
unsafe impl Sync for DeviceValues {}

/// A word that host and devices read: 0 until its group is over, set before any sum is ended by that.
#[derive(Clone)]
pub struct EndedWord {
    word: *const AtomicU32,
    /// Keeps the word where it is.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an atomic that lives as long as its owner.
unsafe impl Send for EndedWord {}
// SAFETY: as above.
unsafe impl Sync for EndedWord {}

impl EndedWord {
    /// The word at `word`.
    ///
    /// # Safety
    /// It is 0, aligned, and lives as long as `owner`.
    pub(super) unsafe fn new(word: *const AtomicU32, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { word, _owner: owner }
    }

    /// Its address, the same for the host and the group's device, until the last clone is dropped.
    #[must_use]
    pub fn as_ptr(&self) -> *const u32 {
        self.word.cast()
    }

    /// Says that the group is over.
    pub(super) fn set(&self) {
        // SAFETY: it lives, as `new` demands. What ends the sums comes behind it.
        unsafe { &*self.word }.store(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for EndedWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EndedWord")
    }
}

/// A stream over the host's memory, in tests: what computes is the host, which waits where a GPU's stream would.
pub trait HostStream: Send + Sync + fmt::Debug {
    /// What [`DeviceCollective::all_reduce_on_device`] takes for it.
    fn stream(&self) -> *mut c_void;

    /// Waits until it has done all that it was given. Tells nothing of how that went, as a GPU's does not.
    fn wait(&self);
}

/// What the ranks of one group do together in device memory.
///
/// All ranks enqueue the same sums (length and kind) in the same order. They may be mixed with the
/// operations of [`super::Collective`] in any way, also in a different one on each rank.
///
/// A sum is the same on all ranks, and repeats to the bit on the same machines; in which order it is taken is
/// the library's choice, and another one than that of the host's sums.
///
/// When a group ends, its sums end too, with values that mean nothing, and the stream goes on. That holds for the sums
/// of ranks that have not heard of it yet as well: NCCL's kernels, told to end, tell their peers that they are done
/// with parts that they never sent (`waitPeer`, `postPeer` in its `prims_simple.h`).
///
/// Three duties of the caller:
/// * Nothing that depends on a sum may become lasting before its ranks have told each other, behind it, that none of
///   them has ended the group: on the host, by [`DeviceCollective::settle`] and then an operation of
///   [`super::Collective`] that all must take part in; or on the devices, in the order of their streams, by a last sum
///   of stamps that each rank makes of [`DeviceCollective::ended`] ([`crate::torch::Vouch`]).
/// * A sum is not enqueued while its stream is being captured into a graph.
/// * A graph that holds sums of this group all the same must be destroyed before the group is: the end of a
///   communicator waits for its graphs for ever. [`super::NcclConfig::before_abort`] is the place to do so.
pub trait DeviceCollective: Send + Sync + fmt::Debug {
    /// Enqueues on `stream` (a `cudaStream_t`) that `values` are replaced by their sum over all ranks, and
    /// returns. The first sum of a group may wait for the others to connect, within the group's deadline.
    ///
    /// # Errors
    /// What ended the group, if it is over; any [`CollectiveError`] otherwise. Nothing was enqueued, or it is
    /// void.
    ///
    /// # Safety
    /// `values` are `len` values of `kind` in memory of the calling thread's current device. They and
    /// `stream` live, and nobody touches the values outside of the stream's order, until
    /// [`DeviceCollective::settle`] has returned.
    unsafe fn all_reduce_on_device(
        &self,
        values: DeviceValues,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError>;

    /// The word that tells this rank's device that the group is over; it is set before this rank ends its sums.
    fn ended(&self) -> EndedWord;

    /// The stream to use where the group's devices are the hosts themselves: in tests.
    fn on_host(&self) -> Option<&dyn HostStream> {
        None
    }

    /// Which part of the last second this rank's stream spent in sums, waiting for the others included: 0 to 1, seen by
    /// looking a hundred times a second.
    fn summing_share(&self) -> f64 {
        0.0
    }

    /// Waits until all sums that were enqueued so far are done, and tells whether they may be believed. When
    /// it returns, with whatever result, none of them touches its values any more.
    ///
    /// # Errors
    /// What ended the group. The values are then unspecified.
    fn settle(&self) -> Result<(), CollectiveError>;
}
