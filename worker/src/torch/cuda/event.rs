//! [`Event`]: a place in the stream that the host can ask for.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use tch::Device;

use crate::torch::{TorchError, check, ffi};

/// Between two looks at an event: far below a step's time, far above a look's.
const POLL_INTERVAL: Duration = Duration::from_micros(20);

/// A place in a stream. On a processor, where work is done when the call returns, it is reached at once.
#[derive(Debug)]
pub struct Event {
    /// The shim's; none on a processor.
    handle: Option<*mut c_void>,
}

// SAFETY: CUDA's events may be used on any thread; `&mut` keeps it to one at a time.
unsafe impl Send for Event {}

impl Event {
    /// An event of `device`, which must be the calling thread's current one. It counts as reached until it is
    /// recorded.
    ///
    /// # Errors
    /// CUDA's.
    pub fn new(device: Device) -> Result<Self, TorchError> {
        if !device.is_cuda() {
            return Ok(Self { handle: None });
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written during the call and freed by drop alone.
        unsafe { check("event_new", ffi::takuma_cuda_event_new(&mut handle))? };
        Ok(Self { handle: Some(handle) })
    }

    /// Places it behind all work that the calling thread's stream has been given. Not inside of a graph.
    ///
    /// # Errors
    /// CUDA's.
    pub fn record(&mut self) -> Result<(), TorchError> {
        match self.handle {
            // SAFETY: a live event.
            Some(handle) => unsafe { check("event_record", ffi::takuma_cuda_event_record(handle)) },
            None => Ok(()),
        }
    }

    /// Whether the stream has passed it.
    ///
    /// # Errors
    /// CUDA's, also what failed in the stream before it.
    pub fn query(&mut self) -> Result<bool, TorchError> {
        let Some(handle) = self.handle else { return Ok(true) };
        let mut reached = 0;
        // SAFETY: a live event; `reached` is written during the call.
        unsafe { check("event_query", ffi::takuma_cuda_event_query(handle, &mut reached))? };
        Ok(reached != 0)
    }

    /// Waits until the stream has passed it (`true`) or the deadline has (`false`). Other than CUDA's own
    /// wait it always returns: a collective whose peer is gone may never end.
    ///
    /// # Errors
    /// As [`Event::query`].
    pub fn wait(&mut self, deadline: Instant) -> Result<bool, TorchError> {
        while !self.query()? {
            let now = Instant::now();
            if now >= deadline {
                return Ok(false);
            }
            std::thread::sleep(POLL_INTERVAL.min(deadline - now));
        }
        Ok(true)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(handle) = self.handle {
            // SAFETY: a live event, freed once.
            unsafe { ffi::takuma_cuda_event_free(handle) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_on_a_processor_is_reached_at_once() {
        let mut event = Event::new(Device::Cpu).unwrap();
        event.record().unwrap();
        assert!(event.query().unwrap());
        assert!(event.wait(Instant::now()).unwrap());
    }
}
