//! [`Graph`]: work that is enqueued once and run many times.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::torch::{TorchError, check, ffi};

/// Captured work that runs again on the same memory. The caller keeps to fixed buffers: inputs are copied into
/// them before a replay, and results are read from them after it.
#[derive(Debug)]
pub struct Graph(Handle);

/// The shim's graph, captured or being captured.
#[derive(Debug)]
struct Handle(*mut c_void);

// SAFETY: a captured graph may be replayed and freed on any thread; `&mut` keeps it to one at a time. While it is
// being captured the handle does not leave `capture`.
unsafe impl Send for Handle {}

impl Graph {
    /// Runs `body` on the calling thread's stream, which must be one of [`super::select`]'s, and keeps what it
    /// enqueues instead of running it. Tensors made in the body belong to the graph's memory: each replay writes
    /// them again, and they must not be read after the graph is gone.
    ///
    /// Run the same body a few times without a graph first: cuDNN measures its algorithms then, and kernels are
    /// compiled. The body must not read a value back, nor wait for the stream.
    ///
    /// # Errors
    /// The body's, or CUDA's. The stream is then as before, and computes on.
    ///
    /// # Panics
    /// If the body does, after the capture has been ended.
    ///
    /// # Source
    /// `torch.cuda.graph(capture_error_mode="thread_local")`.
    pub fn capture(body: impl FnOnce() -> Result<(), TorchError>) -> Result<Self, TorchError> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: `graph` is written during the call.
        unsafe { check("graph_begin", ffi::takuma_cuda_graph_begin(&mut graph))? };
        // Dropped, it ends a capture that has not been ended.
        let handle = Handle(graph);
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(result) => result?,
            Err(panic) => {
                drop(handle);
                resume_unwind(panic);
            }
        }
        // SAFETY: a graph that this thread is capturing.
        unsafe { check("graph_end", ffi::takuma_cuda_graph_end(handle.0))? };
        Ok(Self(handle))
    }

    /// Enqueues the work once more, on the calling thread's stream.
    ///
    /// # Errors
    /// CUDA's.
    pub fn replay(&mut self) -> Result<(), TorchError> {
        // SAFETY: a graph whose capture has ended.
        unsafe { check("graph_replay", ffi::takuma_cuda_graph_replay(self.0.0)) }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: freed once, by its owner.
        unsafe { ffi::takuma_cuda_graph_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_without_cuda_is_an_error_and_does_not_run_the_body() {
        let error = Graph::capture(|| panic!("must not run")).unwrap_err();
        assert!(error.message.contains("not loaded"), "{error}");
    }
}
