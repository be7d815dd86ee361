//! [`Exchange`]: the trainer's side of the collective, with the time that computing waited for it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use takuma_core::ids::Generation;
use tch::Tensor;

use crate::collective::{Collective, CollectiveError, DeviceCollective, DeviceKind, DeviceValues, Loopback};
use crate::torch::cuda::{self, Capture, Program, Recording};
use crate::torch::{DeviceSumReducer, SumReducer, TorchError};

/// The collective of the group that this worker is in at the moment, plus what the step loop wants to
/// know of it: time lost waiting, and the first error, which cannot travel through libtorch's backward
/// pass. Lives as long as the networks, whose gradient hooks hold it; groups come and go.
pub struct Exchange {
    current: Mutex<Current>,
    waited_ns: AtomicU64,
    /// While a step is recorded: where its sums go instead.
    recording: Mutex<Option<Arc<dyn Recording<DeviceSum>>>>,
}

#[derive(Debug)]
struct Current {
    collective: Arc<dyn Collective>,
    groups: u64,
    error: Option<CollectiveError>,
}

/// A sum of device memory that is enqueued in every step.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSum {
    values: DeviceValues,
    /// A `cudaStream_t`.
    stream: *mut c_void,
}

// SAFETY: addresses; whoever enqueues the sum answers for them.
unsafe impl Send for DeviceSum {}

impl Exchange {
    /// An exchange with nobody, until [`Exchange::enter`].
    #[must_use]
    pub fn new() -> Arc<Self> {
        let collective = Arc::new(Loopback::new(Generation(0)));
        Arc::new(Self {
            current: Mutex::new(Current { collective, groups: 0, error: None }),
            waited_ns: AtomicU64::new(0),
            recording: Mutex::default(),
        })
    }

    /// Goes over to the next group: its collective takes the place of the old one, whose error and waited
    /// time are forgotten. To be called between two phases.
    pub fn enter(&self, collective: Box<dyn Collective>) {
        let collective: Arc<dyn Collective> = collective.into();
        let old = {
            let mut current = self.lock();
            let groups = current.groups + 1;
            std::mem::replace(&mut *current, Current { collective, groups, error: None })
        };
        self.waited_ns.store(0, Ordering::Relaxed);
        // Outside of the lock: closing the old group's connections joins threads.
        drop(old);
    }

    /// The group's collective.
    #[must_use]
    pub fn collective(&self) -> Arc<dyn Collective> {
        Arc::clone(&self.lock().collective)
    }

    /// How many groups were entered: tells what was made in this group from what is older.
    #[must_use]
    pub fn groups(&self) -> u64 {
        self.lock().groups
    }

    /// Whether there is nobody to exchange with.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.lock().collective.world() == 1
    }

    /// Runs a blocking exchange and counts its time as waited.
    ///
    /// # Errors
    /// The exchange's own.
    pub fn wait<T>(
        &self,
        exchange: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let collective = self.collective();
        let begin = Instant::now();
        let result = exchange(&*collective);
        self.waited_ns.fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// Keeps an error that happened inside a pass; the first one stays.
    pub fn fail(&self, error: CollectiveError) {
        self.lock().error.get_or_insert(error);
    }

    /// The error that ended a pass, if the exchange was the reason.
    #[must_use]
    pub fn take_error(&self) -> Option<CollectiveError> {
        self.lock().error.take()
    }

    /// How many of the last `step_s` seconds, since the last call, computing waited for exchanges: as counted, or, where
    /// they were only enqueued on a device, as the group's watchdog saw it.
    #[must_use]
    pub fn take_waited(&self, step_s: f64) -> f64 {
        let counted = Duration::from_nanos(self.waited_ns.swap(0, Ordering::Relaxed)).as_secs_f64();
        if counted > 0.0 {
            return counted.min(step_s);
        }
        self.collective().on_device().map_or(0.0, |device| device.summing_share() * step_s)
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recording(&self) -> MutexGuard<'_, Option<Arc<dyn Recording<DeviceSum>>>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sums of the memory of what computes, in the order of its work.
impl Exchange {
    /// Enqueues on `stream` that `values` are replaced by their sum over all workers, or keeps that for the program
    /// that is being recorded. The group must be one that sums on devices.
    ///
    /// # Errors
    /// What ended the group, or that it cannot be recorded. The pass must end.
    ///
    /// # Safety
    /// As [`DeviceCollective::all_reduce_on_device`]; if it is recorded, for as long as the program is.
    pub unsafe fn enqueue(&self, values: DeviceValues, stream: *mut c_void) -> Result<(), CollectiveError> {
        let sum = DeviceSum { values, stream };
        let recording = self.recording().clone();
        match recording {
            Some(recording) => recording.sum(sum).map_err(|error| CollectiveError::Local {
                operation: "recording a step".to_owned(),
                detail: error.to_string(),
                source: None,
            }),
            // SAFETY: as the caller promises.
            None => unsafe { sum.enqueue(&*self.collective()) },
        }
    }

    /// Sums f64 `values`, dense, over all workers, in place: enqueued only where the group sums on devices.
    ///
    /// # Errors
    /// What ended the group.
    pub fn sum_tensor(&self, values: &Tensor) -> Result<(), CollectiveError> {
        let collective = self.collective();
        let (ptr, len) = (values.data_ptr(), values.numel());
        if collective.world() == 1 {
            return Ok(());
        }
        let Some(device) = collective.on_device() else {
            // SAFETY: dense doubles of the host's, which nobody else touches during the call.
            let values = unsafe { std::slice::from_raw_parts_mut(ptr.cast::<f64>(), len) };
            return self.wait(|collective| collective.all_reduce_f64(values));
        };
        let stream = stream_of(device)?;
        // SAFETY: the caller keeps the tensor's memory until the device has done the step, or, if it is recorded, in
        // the program's pool.
        unsafe { self.enqueue(DeviceValues { ptr, len, kind: DeviceKind::F64 }, stream) }
    }

    /// Records what `body` gives the device, with the sums of it between the graphs.
    ///
    /// # Errors
    /// The body's or the recording's: nothing of it was run.
    pub fn record<C, E>(
        &self,
        capture: C,
        body: impl FnOnce() -> Result<(), E>,
    ) -> Result<Program<C::Graph, DeviceSum>, E>
    where
        C: Capture + 'static,
        C::Graph: Send + 'static,
        E: From<TorchError>,
    {
        /// Ends the recording, whatever becomes of the body.
        struct Open<'a>(&'a Exchange);
        impl Drop for Open<'_> {
            fn drop(&mut self) {
                *self.0.recording() = None;
            }
        }
        cuda::record(capture, |recording| {
            let _open = Open(self);
            *self.recording() = Some(recording);
            body()
        })
    }

    /// Gives the device a recorded step once more.
    ///
    /// # Errors
    /// The first graph or sum that failed; nothing behind it was given to the device.
    pub fn replay<G, E>(
        &self,
        program: &mut Program<G, DeviceSum>,
        launch: impl FnMut(&mut G) -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<CollectiveError>,
    {
        let collective = self.collective();
        // SAFETY: recorded by `enqueue`, whose callers keep the memory for as long as the program.
        program.replay(launch, |sum| Ok(unsafe { sum.enqueue(&*collective) }?))
    }
}

impl DeviceSum {
    /// # Safety
    /// As [`Exchange::enqueue`].
    unsafe fn enqueue(&self, collective: &dyn Collective) -> Result<(), CollectiveError> {
        let Some(device) = collective.on_device() else {
            unreachable!("a pass does not outlive its group, which sums on the device")
        };
        // SAFETY: as the caller promises.
        let enqueued = unsafe { device.all_reduce_on_device(self.values, self.stream) };
        // Whatever came of it: one that is void may be under way, and the values are let go behind this.
        if let Some(host) = device.on_host() {
            host.wait();
        }
        enqueued
    }
}

/// Where sums of the calling thread's work go.
pub(super) fn stream_of(device: &dyn DeviceCollective) -> Result<*mut c_void, CollectiveError> {
    match device.on_host() {
        Some(host) => Ok(host.stream()),
        None => cuda::stream().map_err(|error| CollectiveError::Local {
            operation: "a sum on the GPU".to_owned(),
            detail: error.to_string(),
            source: None,
        }),
    }
}

impl Exchange {
    /// Whether an exchange inside of a pass went well; keeps its error.
    fn went_well(&self, result: Result<(), CollectiveError>) -> bool {
        result.map_err(|error| self.fail(error)).is_ok()
    }
}

impl SumReducer for Exchange {
    fn sum(&self, values: &mut [f64]) -> bool {
        let collective = self.collective();
        let Some(host) = collective.on_device().and_then(DeviceCollective::on_host) else {
            return self.went_well(self.wait(|collective| collective.all_reduce_f64(values)));
        };
        let given =
            DeviceValues { ptr: values.as_mut_ptr().cast(), len: values.len(), kind: DeviceKind::F64 };
        // SAFETY: the host's stream is waited for, so the values are let go when this returns.
        self.went_well(unsafe { self.enqueue(given, host.stream()) })
    }

    fn on_device(&self) -> Option<&dyn DeviceSumReducer> {
        self.collective().on_device().is_some().then_some(self as &dyn DeviceSumReducer)
    }
}

impl DeviceSumReducer for Exchange {
    unsafe fn sum_on_device(&self, values: *mut f64, len: usize, stream: *mut c_void) -> bool {
        let values = DeviceValues { ptr: values.cast(), len, kind: DeviceKind::F64 };
        // SAFETY: as the caller promises; nothing of the phase is applied before its sums are known to be whole.
        self.went_well(unsafe { self.enqueue(values, stream) })
    }
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange").field("current", &self.current).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Nccl;
    use crate::collective::nccl::fake::form_on_hosts;
    use crate::recipe::PhaseError;

    /// Keeps nothing: what computes here is the test.
    struct Nothing;

    impl Capture for Nothing {
        type Graph = ();

        fn begin(&mut self) -> Result<(), TorchError> {
            Ok(())
        }
        fn is_empty(&mut self) -> Result<bool, TorchError> {
            Ok(false)
        }
        fn end(&mut self) -> Result<(), TorchError> {
            Ok(())
        }
        fn abandon(&mut self) {}
    }

    #[test]
    fn recorded_sums_are_made_when_they_are_replayed_until_their_group_ends() {
        let rank = |member: Nccl| {
            let abort = member.abort_handle();
            let exchange = Exchange::new();
            exchange.enter(Box::new(member));
            let values = Tensor::from_slice(&[1.0, 3.0]);
            let second = values.narrow(0, 1, 1);
            let recorded = exchange.record(Nothing, || {
                exchange.sum_tensor(&values)?;
                Ok::<(), PhaseError>(exchange.sum_tensor(&second)?)
            });
            let mut program = recorded.unwrap();
            assert_eq!(program.counts(), (3, 2));
            assert_eq!(values, Tensor::from_slice(&[1.0, 3.0]), "nothing was summed yet");
            exchange.sum_tensor(&values).unwrap();
            assert_eq!(values, Tensor::from_slice(&[2.0, 6.0]), "the recording is over");
            let mut replay = || exchange.replay(&mut program, |()| Ok::<(), PhaseError>(()));
            replay().unwrap();
            assert_eq!(values, Tensor::from_slice(&[4.0, 24.0]), "the second value twice");
            exchange.collective().barrier().unwrap();
            abort.abort("of the test");
            assert!(matches!(replay().unwrap_err(), PhaseError::Exchange(CollectiveError::Aborted { .. })));
        };
        std::thread::scope(|scope| {
            for member in form_on_hosts(2, Duration::from_secs(60)) {
                scope.spawn(move || rank(member));
            }
        });
    }
}
