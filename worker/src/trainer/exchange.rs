//! [`Exchange`]: the trainer's side of the collective, with the time that computing waited for it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use takuma_core::ids::Generation;

use crate::collective::{Collective, CollectiveError, DeviceKind, DeviceValues, Loopback};
use crate::torch::{DeviceSumReducer, SumReducer};

/// The collective of the group that this worker is in at the moment, plus what the step loop wants to
/// know of it: time lost waiting, and the first error, which cannot travel through libtorch's backward
/// pass. Lives as long as the networks, whose gradient hooks hold it; groups come and go.
#[derive(Debug)]
pub struct Exchange {
    current: Mutex<Current>,
    waited_ns: AtomicU64,
}

#[derive(Debug)]
struct Current {
    collective: Arc<dyn Collective>,
    groups: u64,
    error: Option<CollectiveError>,
}

impl Exchange {
    /// An exchange with nobody, until [`Exchange::enter`].
    #[must_use]
    pub fn new() -> Arc<Self> {
        let collective = Arc::new(Loopback::new(Generation(0)));
        Arc::new(Self {
            current: Mutex::new(Current { collective, groups: 0, error: None }),
            waited_ns: AtomicU64::new(0),
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

    /// Time waited since the last call.
    #[must_use]
    pub fn take_waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.swap(0, Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.went_well(self.wait(|collective| collective.all_reduce_f64(values)))
    }

    fn on_device(&self) -> Option<&dyn DeviceSumReducer> {
        self.collective().on_device().is_some().then_some(self as &dyn DeviceSumReducer)
    }
}

impl DeviceSumReducer for Exchange {
    unsafe fn sum_on_device(&self, values: *mut f64, len: usize, stream: *mut c_void) -> bool {
        let collective = self.collective();
        let Some(device) = collective.on_device() else {
            unreachable!("a pass does not outlive its group, which sums on the device")
        };
        let values = DeviceValues { ptr: values.cast(), len, kind: DeviceKind::F64 };
        // SAFETY: as the caller promises; the phase is settled before anything of it is applied.
        self.went_well(unsafe { device.all_reduce_on_device(values, stream) })
    }
}
