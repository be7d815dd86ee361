//! Safe face of the C++ shim (`worker/torch/`): what takuma needs of libtorch and tch lacks.
//!
//! The only folder with `unsafe` calls into the shim. Everything here runs on the trainer's thread
//! or on the threads of its lanes, no tensor on two of them at once.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use tch::Tensor;

pub use autograd::{Gradient, GradientSink, backward, clear_gradients, leaky_relu, set_gradient_hook};
pub use images::{copies, copy_async, gather_images, host_like};
pub use norm::{
    BatchNormOptions, DeviceSumReducer, NormLane, RunningStatistics, SumReducer, batch_norm,
    batch_norm_lanes, commit_statistics,
};
pub use update::{
    AdamOptions, AdamTensors, FROZEN_ENDED, FROZEN_NOT_FINITE, Guard, Stamp, Vouch, first_not_finite,
    fused_adam, guard,
};

mod autograd;
pub mod cuda;
mod ffi;
mod images;
mod norm;
mod update;

/// libtorch refused an operation.
#[derive(Debug, Clone, thiserror::Error)]
#[error("libtorch failed in {operation}: {message}")]
pub struct TorchError {
    /// The shim's function.
    pub operation: &'static str,
    /// libtorch's words.
    pub message: String,
}

impl TorchError {
    /// Whether memory ran out, on the processor or on the GPU.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        // libtorch's allocators and the CUDA runtime put it in these words; they give no code.
        ["out of memory", "can't allocate memory"].iter().any(|words| self.message.contains(words))
    }
}

/// Sets up libtorch for this process: compute threads, one operator at a time, denormals as zero.
pub fn configure(threads: u32) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    tch::set_num_interop_threads(1);
    // SAFETY: sets a flag of libtorch's context.
    unsafe { ffi::takuma_flush_denormals() };
}

/// Libtorch's compute threads, as set for the calling thread.
#[must_use]
pub fn compute_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// From here on libtorch computes on the calling thread alone what this thread asks for: one order of
/// every sum, whatever the process' number of threads. Other threads are not touched.
pub fn compute_on_this_thread_alone() {
    // SAFETY: sets the calling thread's own limits.
    unsafe { ffi::takuma_compute_on_this_thread_alone() }
}

fn raw(tensor: &Tensor) -> ffi::RawTensor {
    tensor.as_ptr().cast_mut().cast()
}

/// What a list of tensors is to the shim; good for as long as the tensors are borrowed.
fn pointers(tensors: &[&Tensor]) -> Vec<ffi::RawTensor> {
    tensors.iter().map(|tensor| raw(tensor)).collect()
}

/// # Safety
/// `message` is NULL or a message from the shim that nobody has freed.
unsafe fn check(operation: &'static str, message: *mut c_char) -> Result<(), TorchError> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a NUL-terminated string of the shim's, freed once, right here.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        ffi::takuma_free_error(message);
        text
    };
    Err(TorchError { operation, message: text })
}

/// Runs a callback; no panic may cross into C++.
fn caught<T>(on_panic: T, body: impl FnOnce() -> T) -> T {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(on_panic)
}

unsafe extern "C" fn drop_boxed<T: ?Sized>(context: *mut c_void) {
    // SAFETY: called once, by the last holder of a boxed Arc<T> that this file gave away.
    drop(unsafe { Box::from_raw(context.cast::<Arc<T>>()) });
}
