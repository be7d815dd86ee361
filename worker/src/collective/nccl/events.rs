//! Marks in a stream, and whether it has come to them.

use std::{
    ffi::{c_uint, c_void},
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use super::library::{Code, CudaRuntime};

/// `cudaErrorNotReady`.
const NOT_READY: Code = 600;
/// `cudaEventDisableTiming`: without it a mark costs the stream more.
const DISABLE_TIMING: c_uint = 2;
/// `cudaStreamCaptureModeRelaxed`.
const CAPTURE_MODE_RELAXED: c_uint = 2;

/// A place in a stream. Give it back with [`Events::take_back`].
#[derive(Debug)]
pub(super) struct Mark(*mut c_void);

// SAFETY: a CUDA event may be used from any thread.
unsafe impl Send for Mark {}

/// CUDA events that are used again and again.
#[derive(Debug)]
pub(super) struct Events {
    cuda: Arc<CudaRuntime>,
    spare: Mutex<Vec<Mark>>,
}

impl Events {
    pub(super) fn new(cuda: Arc<CudaRuntime>) -> Self {
        Self { cuda, spare: Mutex::default() }
    }

    /// Lets the calling thread go on while another one captures a graph: without this, a look at an event
    /// would end that capture.
    pub(super) fn tolerate_captures(&self) {
        let mut mode = CAPTURE_MODE_RELAXED;
        // SAFETY: reads and writes the one value.
        let code = unsafe { (self.cuda.thread_exchange_stream_capture_mode)(&raw mut mode) };
        if code != 0 {
            tracing::warn!("graphs cannot be captured beside this thread: {}", self.cuda.words(code));
        }
    }

    /// Marks where `stream` will be when it has done what is enqueued now.
    ///
    /// # Safety
    /// `stream` is a living stream of the calling thread's current device.
    pub(super) unsafe fn mark(&self, stream: *mut c_void) -> Result<Mark, String> {
        let spare = self.spare().pop();
        let mark = match spare {
            Some(mark) => mark,
            None => {
                let mut event = ptr::null_mut();
                // SAFETY: writes the new event's address.
                self.check(unsafe { (self.cuda.event_create_with_flags)(&raw mut event, DISABLE_TIMING) })?;
                Mark(event)
            }
        };
        // SAFETY: the event lives, the stream as the caller promises.
        match self.check(unsafe { (self.cuda.event_record)(mark.0, stream.cast()) }) {
            Ok(()) => Ok(mark),
            Err(words) => {
                self.take_back(mark);
                Err(words)
            }
        }
    }

    /// Whether the stream has come to `mark`.
    pub(super) fn is_reached(&self, mark: &Mark) -> Result<bool, String> {
        // SAFETY: the event lives until `self` is dropped.
        let code = unsafe { (self.cuda.event_query)(mark.0) };
        if code == NOT_READY {
            // It counts as this thread's last error, and whoever looks at that next means something else.
            // SAFETY: has no conditions.
            unsafe { (self.cuda.get_last_error)() };
            return Ok(false);
        }
        self.check(code).map(|()| true)
    }

    /// Keeps the mark for the next time.
    pub(super) fn take_back(&self, mark: Mark) {
        self.spare().push(mark);
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Vec<Mark>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, code: Code) -> Result<(), String> {
        if code == 0 { Ok(()) } else { Err(self.cuda.words(code)) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        for mark in self.spare().drain(..) {
            // SAFETY: created by `mark`, and nobody has it any more.
            let code = unsafe { (self.cuda.event_destroy)(mark.0) };
            if code != 0 {
                tracing::debug!("a CUDA event stays behind: {}", self.cuda.words(code));
            }
        }
    }
}
