//! Sums of memory that lies on a GPU, in the order of a stream.

use std::{ffi::c_void, fmt};

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

/// Values in device memory, without gaps.
#[derive(Debug, Clone, Copy)]
pub struct DeviceValues {
    /// The first value.
    pub ptr: *mut c_void,
    /// How many values.
    pub len: usize,
    /// What they are.
    pub kind: DeviceKind,
}

/// What the ranks of one group do together in device memory.
///
/// All ranks enqueue the same sums (length and kind) in the same order. They may be mixed with the
/// operations of [`super::Collective`] in any way, also in a different one on each rank.
///
/// A sum is the same on all ranks, and repeats to the bit on the same machines; in which order it is taken is
/// the library's choice, and another one than that of the host's sums.
///
/// Three duties of the caller:
/// * Nothing that depends on a sum may become lasting before [`DeviceCollective::settle`] has returned well:
///   when a group ends, its sums end too, with values that mean nothing, and the stream goes on.
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

    /// Waits until all sums that were enqueued so far are done, and tells whether they may be believed. When
    /// it returns, with whatever result, none of them touches its values any more.
    ///
    /// # Errors
    /// What ended the group. The values are then unspecified.
    fn settle(&self) -> Result<(), CollectiveError>;
}
