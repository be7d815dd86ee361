//! [`Graph`]: work that is enqueued once and run many times, and [`StreamCapture`], which makes it.

use std::ffi::c_void;

use super::record::Capture;
use crate::torch::{TorchError, check, ffi};

/// Captured work that runs again on the same memory. The caller keeps to fixed buffers: inputs are copied into
/// them before a replay, and results are read from them after it.
#[derive(Debug)]
pub struct Graph(Handle);

/// The shim's graph, captured or being captured.
#[derive(Debug)]
struct Handle(*mut c_void);

// SAFETY: a captured graph may be replayed and freed on any thread; `&mut` keeps it to one at a time. One that is being
// captured across threads may be ended on any, and one that is not stays on its thread, as `StreamCapture` demands.
unsafe impl Send for Handle {}

impl Graph {
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

/// Captures what the calling thread's stream is given, which must be one of [`super::select`]'s. Tensors made
/// meanwhile belong to the graphs' memory, which all graphs of one capture share: each replay writes them again, and
/// they must not be read after the graphs are gone.
///
/// # Source
/// `torch.cuda.graph(capture_error_mode="thread_local")`, or `"relaxed"` across threads.
#[derive(Debug)]
pub struct StreamCapture {
    /// libtorch's backward thread ends captures that another began. Else only the thread that began one ends it.
    across_threads: bool,
    running: Option<Handle>,
    /// The shim's newest graph that was captured. It is alive: `Recorder` keeps the graphs until it is gone.
    former: *mut c_void,
}

// SAFETY: across threads anything of it may be called on any thread, one at a time, by `&mut`; otherwise its owner
// keeps to one thread.
unsafe impl Send for StreamCapture {}

impl StreamCapture {
    /// Nothing is captured yet. With `across_threads` it may be cut on another thread whose stream is the same.
    #[must_use]
    pub fn new(across_threads: bool) -> Self {
        Self { across_threads, running: None, former: std::ptr::null_mut() }
    }
}

impl Capture for StreamCapture {
    type Graph = Graph;

    fn begin(&mut self) -> Result<(), TorchError> {
        let mut graph = std::ptr::null_mut();
        let across_threads = i32::from(self.across_threads);
        // SAFETY: `graph` is written during the call; the former graph lives.
        unsafe {
            check("graph_begin", ffi::takuma_cuda_graph_begin(self.former, across_threads, &mut graph))?;
        }
        self.running = Some(Handle(graph));
        Ok(())
    }

    fn is_empty(&mut self) -> Result<bool, TorchError> {
        let Some(Handle(running)) = self.running else { return Ok(true) };
        let mut empty = 0;
        // SAFETY: a graph that is being captured; `empty` is written during the call.
        unsafe { check("graph_is_empty", ffi::takuma_cuda_graph_is_empty(running, &mut empty))? };
        Ok(empty != 0)
    }

    fn end(&mut self) -> Result<Graph, TorchError> {
        let Some(handle) = self.running.take() else {
            let message = "nothing is being captured".to_owned();
            return Err(TorchError { operation: "graph_end", message });
        };
        // SAFETY: a graph that is being captured. If it fails, the handle's drop ends the capture.
        unsafe { check("graph_end", ffi::takuma_cuda_graph_end(handle.0))? };
        self.former = handle.0;
        Ok(Graph(handle))
    }

    fn abandon(&mut self) {
        // Its drop ends the capture: the stream computes again.
        self.running = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::cuda::record::record;

    #[test]
    fn capture_without_cuda_is_an_error_and_does_not_run_the_body() {
        let recorded = record::<_, (), TorchError>(StreamCapture::new(false), |_| panic!("must not run"));
        let error = recorded.unwrap_err();
        assert!(error.message.contains("not loaded"), "{error}");
    }
}
