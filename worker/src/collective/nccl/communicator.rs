//! One NCCL communicator, without judgement: what to do about an error, and when, is decided elsewhere.

use std::{
    ffi::{c_int, c_uint, c_void},
    ptr,
    sync::Arc,
};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};

use super::library::{Code, NcclLibrary};
use crate::collective::{CollectiveError, DeviceKind, DeviceValues};

/// Bytes of the id by which the ranks of one communicator find each other.
pub(super) const ID_BYTES: usize = 128;

const SUCCESS: Code = ncclResult_t::ncclSuccess as Code;
const IN_PROGRESS: Code = ncclResult_t::ncclInProgress as Code;
const REMOTE_ERROR: Code = ncclResult_t::ncclRemoteError as Code;

/// `NCCL_CONFIG_UNDEF_INT`: the library's default.
const DEFAULT: c_int = c_int::MIN;
/// What marks a configuration that was initialised.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// The version whose fields the configuration has.
const CONFIG_VERSION: c_uint = 22_800;

/// What NCCL complains of.
#[derive(Debug)]
pub(super) struct Fault {
    code: Code,
    words: String,
}

impl Fault {
    /// The fault as an error during `operation`.
    pub(super) fn to_error(&self, operation: &str) -> CollectiveError {
        if self.code == REMOTE_ERROR {
            // Another rank's, and the ring does not know whose: nothing to mend on this machine.
            return CollectiveError::Aborted {
                operation: operation.into(),
                reason: format!("NCCL lost another rank and does not say which: {}", self.words),
            };
        }
        CollectiveError::Local { operation: operation.into(), detail: self.words.clone(), source: None }
    }
}

/// A communicator that does not block. Every function but [`Communicator::abort`] is called by one thread at a time,
/// and none after [`Communicator::destroy`] or [`Communicator::abort`].
#[derive(Debug)]
pub(super) struct Communicator {
    library: Arc<NcclLibrary>,
    handle: ncclComm_t,
}

// SAFETY: NCCL's communicators are not bound to a thread.
unsafe impl Send for Communicator {}
// SAFETY: whoever shares one keeps to one thread at a time, as the type demands.
unsafe impl Sync for Communicator {}

/// A new id for a communicator. Its maker must live until all ranks have joined.
pub(super) fn new_id(library: &NcclLibrary) -> Result<[u8; ID_BYTES], Fault> {
    let mut id = ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: writes the id.
    let code = unsafe { (library.get_unique_id)(&raw mut id) };
    if code == SUCCESS {
        Ok(id.internal.map(|byte| byte.cast_unsigned()))
    } else {
        Err(Fault { code, words: library.words(code, ptr::null_mut()) })
    }
}

impl Communicator {
    /// Begins to join the communicator `id` on the calling thread's current device.
    /// [`Communicator::is_ready`] tells when all have.
    pub(super) fn begin(
        library: &Arc<NcclLibrary>,
        id: &[u8; ID_BYTES],
        rank: u32,
        world: u32,
    ) -> Result<Self, Fault> {
        let id = ncclUniqueId { internal: id.map(u8::cast_signed) };
        let mut config = config();
        let mut handle = ptr::null_mut();
        // A ring has at most some thousand ranks, so they fit.
        let (rank, world) = (rank as c_int, world as c_int);
        // SAFETY: writes the handle, and reads the configuration during the call only.
        let code =
            unsafe { (library.comm_init_rank_config)(&raw mut handle, world, id, rank, &raw mut config) };
        let communicator = Self { library: Arc::clone(library), handle };
        match code {
            SUCCESS | IN_PROGRESS if !handle.is_null() => Ok(communicator),
            // NCCL has freed what it had begun.
            _ => Err(communicator.fault(code)),
        }
    }

    /// Whether nothing is under way. What was begun goes on in calls of this function, too.
    pub(super) fn is_ready(&self) -> Result<bool, Fault> {
        let mut state = SUCCESS;
        // SAFETY: the communicator lives; writes its state.
        let code = unsafe { (self.library.comm_get_async_error)(self.handle, &raw mut state) };
        match (code, state) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, state) => Err(self.fault(state)),
            (code, _) => Err(self.fault(code)),
        }
    }

    /// Enqueues a sum in place. False: the stream must not be used before [`Communicator::is_ready`].
    ///
    /// # Safety
    /// `values` and `stream` live until the sum is done, and belong to the communicator's device.
    pub(super) unsafe fn all_reduce(&self, values: DeviceValues, stream: *mut c_void) -> Result<bool, Fault> {
        let kind = match values.kind {
            DeviceKind::F32 => ncclDataType_t::ncclFloat32,
            DeviceKind::F64 => ncclDataType_t::ncclFloat64,
            DeviceKind::Bf16 => ncclDataType_t::ncclBfloat16,
        };
        // SAFETY: the communicator lives, values and stream as the caller promises.
        let code = unsafe {
            (self.library.all_reduce)(
                values.ptr,
                values.ptr,
                values.len,
                kind,
                ncclRedOp_t::ncclSum,
                self.handle,
                stream.cast(),
            )
        };
        self.begun(code)
    }

    /// Begins to end the communicator in peace. False: [`Communicator::is_ready`] tells when it is done.
    pub(super) fn finalize(&self) -> Result<bool, Fault> {
        // SAFETY: the communicator lives.
        self.begun(unsafe { (self.library.comm_finalize)(self.handle) })
    }

    /// Frees the communicator after [`Communicator::finalize`].
    pub(super) fn destroy(&self) {
        // SAFETY: the communicator lives, and its owner does not use it after this.
        let code = unsafe { (self.library.comm_destroy)(self.handle) };
        if !matches!(code, SUCCESS | IN_PROGRESS) {
            tracing::debug!(
                "a communicator was freed in part: {}",
                self.library.words(code, ptr::null_mut())
            );
        }
    }

    /// Ends whatever the communicator does, on the device too, and frees it. May take its time, or never return.
    pub(super) fn abort(&self) {
        // SAFETY: the communicator lives, and its owner does not use it after this.
        let code = unsafe { (self.library.comm_abort)(self.handle) };
        if !matches!(code, SUCCESS | IN_PROGRESS) {
            tracing::debug!(
                "a communicator was aborted in part: {}",
                self.library.words(code, ptr::null_mut())
            );
        }
    }

    #[cfg(test)]
    pub(super) fn handle(&self) -> *mut c_void {
        self.handle.cast()
    }

    fn begun(&self, code: Code) -> Result<bool, Fault> {
        match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.fault(code)),
        }
    }

    fn fault(&self, code: Code) -> Fault {
        Fault { code, words: self.library.words(code, self.handle) }
    }
}

/// All defaults, but that calls return at once.
fn config() -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: DEFAULT,
        minCTAs: DEFAULT,
        maxCTAs: DEFAULT,
        netName: ptr::null(),
        splitShare: DEFAULT,
        trafficClass: DEFAULT,
        commName: ptr::null(),
        collnetEnable: DEFAULT,
        CTAPolicy: DEFAULT,
        shrinkShare: DEFAULT,
        nvlsCTAs: DEFAULT,
        nChannelsPerNetPeer: DEFAULT,
        nvlinkCentricSched: DEFAULT,
    }
}
