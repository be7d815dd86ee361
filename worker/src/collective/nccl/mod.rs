//! Sums of GPU memory by NCCL, for a group that is a ring as well.
//!
//! The [`Ring`] does everything that is not in GPU memory, and it is the group's conscience: its links notice
//! who died, its generation fences, its first error is the group's (`docs/decisions/0006`). Beside it lies one
//! NCCL communicator, whose id goes over the ring.
//!
//! Which functions are NCCL's is `library.rs`, one communicator `communicator.rs`, where a stream has come to
//! `events.rs`, how a stream hears that its group is over `ended.rs`, what the threads share `shared.rs`, and how a group ends `watchdog.rs`. The tests run against a
//! libnccl of our own over host memory (`worker/tests/fake_nccl`).

mod communicator;
mod config;
#[cfg(test)]
mod device_contract;
mod ended;
mod events;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod faults;
mod library;
mod shared;
mod watchdog;

use std::{ffi::c_void, sync::Arc, thread::JoinHandle, time::Duration};

use takuma_core::ids::{Generation, Rank};

use self::{
    communicator::{Communicator, ID_BYTES},
    shared::Shared,
};
pub use self::{
    config::NcclConfig,
    library::{CudaRuntime, NcclLibrary},
};
use super::{
    AbortHandle, Collective, CollectiveError, DeviceCollective, DeviceValues, EndedWord, HostStream,
    PendingReduce, Ring,
};

const FORMING: &str = "forming the NCCL group";

/// A ring whose members also sum memory of their GPUs, one each.
#[derive(Debug)]
pub struct Nccl {
    group: Group,
    ended: EndedWord,
}

#[derive(Debug)]
enum Group {
    /// Every sum is already there.
    Alone(Ring),
    Many {
        shared: Arc<Shared>,
        /// Taken when the group is dropped.
        watchdog: Option<JoinHandle<()>>,
    },
}

impl Nccl {
    /// Adds a communicator to `ring`, on the calling thread's current device, and returns when every rank has. All
    /// ranks of the ring must call this first of all.
    ///
    /// # Errors
    /// What kept it from forming within the limits, naming the rank where that is known. The ring is over then, so all
    /// ranks hear of it.
    pub fn form(ring: Ring, config: &NcclConfig) -> Result<Self, CollectiveError> {
        let ended = ended::new_word(&config.cuda).map_err(|error| ring.fail(error).during(FORMING))?;
        if ring.world() == 1 {
            return Ok(Self { group: Group::Alone(ring), ended });
        }
        let id = match agree_on_id(&ring, config) {
            Ok(id) => id,
            Err(error) => return Err(ring.fail(error).during(FORMING)),
        };
        let comm = match Communicator::begin(&config.library, &id, ring.rank().0, ring.world()) {
            Ok(comm) => comm,
            Err(fault) => return Err(ring.fail_unless_told(fault.to_error(FORMING)).during(FORMING)),
        };
        let shared = Arc::new(Shared::new(ring, comm, config, ended.clone()));
        let formed = shared.until_ready(FORMING, config.init_timeout);
        // Nobody starts before everybody has joined, so that the blame for a missing rank goes around.
        let formed = formed.and_then(|()| shared.ring.barrier().map_err(|error| error.during(FORMING)));
        let watchdog = formed.and_then(|()| {
            let watched = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("nccl-watchdog".into());
            thread.spawn(move || watchdog::watch(&watched)).map_err(|error| {
                shared.ring.fail(CollectiveError::local(FORMING, "this machine is out of threads", error))
            })
        });
        match watchdog {
            Ok(watchdog) => Ok(Self { group: Group::Many { shared, watchdog: Some(watchdog) }, ended }),
            Err(error) => {
                shared.abort();
                Err(error)
            }
        }
    }

    fn ring(&self) -> &Ring {
        match &self.group {
            Group::Alone(ring) => ring,
            Group::Many { shared, .. } => &shared.ring,
        }
    }
}

/// The id of a new communicator, made by rank 0. It goes over the ring, so whoever gets it is of this generation.
fn agree_on_id(ring: &Ring, config: &NcclConfig) -> Result<[u8; ID_BYTES], CollectiveError> {
    let own = config.library.version();
    // NCCL itself would fail or hang on it, and not say why.
    for (rank, bytes) in (0..).map(Rank).zip(ring.all_gather(&own.to_le_bytes())?) {
        if bytes != own.to_le_bytes() {
            let theirs = bytes
                .try_into()
                .map_or_else(|_| "no version".into(), |b| library::words_of(i32::from_le_bytes(b)));
            return Err(CollectiveError::Protocol {
                rank,
                operation: FORMING.into(),
                detail: format!(
                    "it has NCCL {theirs}, this worker {}; all workers need the same version",
                    library::words_of(own)
                ),
            });
        }
    }
    let mut bytes = Vec::new();
    if ring.rank() == Rank(0) {
        let id = communicator::new_id(&config.library).map_err(|fault| fault.to_error(FORMING))?;
        bytes.extend_from_slice(&id);
    }
    ring.broadcast(Rank(0), &mut bytes)?;
    bytes.try_into().map_err(|bytes: Vec<u8>| CollectiveError::Protocol {
        rank: Rank(0),
        operation: FORMING.into(),
        detail: format!("it sent an id of {} bytes; one has {ID_BYTES}", bytes.len()),
    })
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let Group::Many { shared, watchdog } = &mut self.group else { return };
        shared.close();
        if watchdog.take().is_some_and(|watchdog| watchdog.join().is_err()) {
            tracing::error!(rank = shared.ring.rank().0, "the watchdog of an NCCL group panicked");
        }
    }
}

impl DeviceCollective for Nccl {
    unsafe fn all_reduce_on_device(
        &self,
        values: DeviceValues,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError> {
        match &self.group {
            // SAFETY: the caller's values and stream.
            Group::Many { shared, .. } if values.len > 0 => unsafe { shared.enqueue(values, stream) },
            // No values are summed on all ranks alike.
            _ => self.ring().failure().map_or(Ok(()), |failure| Err(failure.during("all_reduce on the GPU"))),
        }
    }

    fn ended(&self) -> EndedWord {
        self.ended.clone()
    }

    fn on_host(&self) -> Option<&dyn HostStream> {
        match &self.group {
            Group::Alone(_) => None,
            Group::Many { shared, .. } => shared.host.as_deref(),
        }
    }

    fn summing_share(&self) -> f64 {
        match &self.group {
            Group::Alone(_) => 0.0,
            Group::Many { shared, .. } => shared.summing_share(),
        }
    }

    fn settle(&self) -> Result<(), CollectiveError> {
        match &self.group {
            Group::Alone(ring) => ring.failure().map_or(Ok(()), Err),
            Group::Many { shared, .. } => shared.settle(),
        }
    }
}

/// Everything but sums of GPU memory is the ring's.
impl Collective for Nccl {
    fn rank(&self) -> Rank {
        self.ring().rank()
    }

    fn world(&self) -> u32 {
        self.ring().world()
    }

    fn generation(&self) -> Generation {
        self.ring().generation()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring().all_reduce(values)
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        self.ring().all_reduce_f64(values)
    }

    fn start_all_reduce(&self, bucket: Vec<f32>) -> Result<PendingReduce, CollectiveError> {
        self.ring().start_all_reduce(bucket)
    }

    fn start_chain_reduce(&self, lanes: Vec<Vec<f32>>) -> Result<PendingReduce, CollectiveError> {
        self.ring().start_chain_reduce(lanes)
    }

    fn chain_reduce_f64(&self, lanes: &[f64], out: &mut [f64]) -> Result<(), CollectiveError> {
        self.ring().chain_reduce_f64(lanes, out)
    }

    fn broadcast(&self, root: Rank, bytes: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.ring().broadcast(root, bytes)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.ring().all_gather(bytes)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.ring().barrier()
    }

    fn set_timeout(&self, timeout: Duration) {
        self.ring().set_timeout(timeout);
    }

    fn take_receiving(&self) -> Duration {
        self.ring().take_receiving()
    }

    fn on_device(&self) -> Option<&dyn DeviceCollective> {
        Some(self)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.ring().abort_handle()
    }
}
