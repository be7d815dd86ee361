//! Gradients: selective backward and hooks.

use std::ffi::c_void;
use std::sync::Arc;

use tch::Tensor;

use super::{TorchError, caught, check, drop_boxed, ffi, pointers, raw};

/// What became of a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradient {
    /// It stays with its parameter.
    Left,
    /// It was copied, and its memory may be used again.
    Taken,
    /// It could not be passed on: the backward pass must end.
    Failed,
}

/// Receives each parameter's gradient when it is complete.
pub trait GradientSink: Send + Sync + 'static {
    /// Called on the thread that runs backward, in the order in which gradients are ready.
    fn gradient_ready(&self, index: usize, gradient: &Tensor) -> Gradient;
}

/// `x` where it is positive, else `slope * x`.
///
/// # Shapes
/// Any, to the same.
///
/// # Errors
/// libtorch's.
///
/// # Source
/// `torch.nn.functional.leaky_relu`.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor, TorchError> {
    let mut y = std::ptr::null_mut();
    // SAFETY: a borrowed tensor; y is given to us when the call succeeds.
    unsafe {
        check("leaky_relu", ffi::takuma_leaky_relu(raw(x), slope, &mut y))?;
        Ok(Tensor::from_ptr(y.cast()))
    }
}

/// Accumulates the gradient of `loss` into `inputs[i].grad`, and computes no other.
///
/// # Errors
/// libtorch's, or a hook or exchange that failed.
///
/// # Source
/// `torch.autograd.backward(loss, inputs=inputs)`.
pub fn backward(loss: &Tensor, inputs: &[&Tensor]) -> Result<(), TorchError> {
    let inputs = pointers(inputs);
    // SAFETY: borrowed tensors, borrowed for the call.
    unsafe { check("backward", ffi::takuma_backward(raw(loss), inputs.as_ptr(), inputs.len())) }
}

/// Tells `sink` about `parameter`'s gradient whenever it has been accumulated. Once per tensor; the
/// hook holds the sink until the tensor is gone.
///
/// # Errors
/// libtorch's, for a tensor that has no gradient.
///
/// # Source
/// `torch.Tensor.register_post_accumulate_grad_hook`.
pub fn set_gradient_hook(
    parameter: &Tensor,
    index: usize,
    sink: Arc<dyn GradientSink>,
) -> Result<(), TorchError> {
    let sink = ffi::GradientSink {
        context: Box::into_raw(Box::new(sink)).cast(),
        call: call_sink,
        drop: drop_boxed::<dyn GradientSink>,
    };
    // SAFETY: a borrowed tensor; the sink's context is the shim's from here on, freed by drop_boxed.
    unsafe { check("set_gradient_hook", ffi::takuma_set_gradient_hook(raw(parameter), index, sink)) }
}

/// Frees the gradients, so that the next backward hands its buffers over instead of adding to them.
///
/// # Errors
/// libtorch's, for a tensor that takes no gradient.
///
/// # Source
/// `torch.optim.Optimizer.zero_grad(set_to_none=True)`.
pub fn clear_gradients(params: &[&Tensor]) -> Result<(), TorchError> {
    let params = pointers(params);
    // SAFETY: borrowed tensors, borrowed for the call.
    unsafe { check("clear_gradients", ffi::takuma_clear_gradients(params.as_ptr(), params.len())) }
}

unsafe extern "C" fn call_sink(context: *mut c_void, index: usize, gradient: *mut c_void) -> i32 {
    // SAFETY: context is the boxed Arc that set_gradient_hook gave away; gradient is a tensor that
    // lives through the call, of which we take a reference of our own.
    let (sink, gradient) =
        unsafe { (&*context.cast::<Arc<dyn GradientSink>>(), Tensor::clone_from_ptr(gradient.cast())) };
    match caught(Gradient::Failed, || sink.gradient_ready(index, &gradient)) {
        Gradient::Left => ffi::GRADIENT_LEFT,
        Gradient::Taken => ffi::GRADIENT_TAKEN,
        Gradient::Failed => ffi::GRADIENT_FAILED,
    }
}
