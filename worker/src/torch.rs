//! Safe face of the C++ shim (`worker/torch/`): what takuma needs of libtorch and tch lacks.
//!
//! The only file with `unsafe` calls into the shim. Everything here runs on the trainer's thread
//! or on the threads of its lanes, no tensor on two of them at once.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use tch::Tensor;

/// libtorch refused an operation.
#[derive(Debug, Clone, thiserror::Error)]
#[error("libtorch failed in {operation}: {message}")]
pub struct TorchError {
    /// The shim's function.
    pub operation: &'static str,
    /// libtorch's words.
    pub message: String,
}

/// Sums vectors over all workers, in place; `false` means that it failed and the pass must end.
pub trait SumReducer: Send + Sync + 'static {
    /// Sums `values` over all workers.
    fn sum(&self, values: &mut [f64]) -> bool;
}

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

/// Options of [`batch_norm`].
#[derive(Clone)]
pub struct BatchNormOptions {
    /// The batch is cut into so many equal parts, each with its own statistics.
    pub groups: i64,
    /// Images per group over all workers; times height and width this is the divisor.
    pub images_per_group: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Activation behind it: 1 none, 0 ReLU, else LeakyReLU's negative slope.
    pub slope: f64,
    /// Sums statistics over workers; none = this worker's own batch.
    pub reducer: Option<Arc<dyn SumReducer>>,
}

/// Batch normalisation in training, fused with the activation behind it.
///
/// # Shapes
/// `x` `[N, C, H, W]` with N divisible by `groups`; `weight`, `bias` `[C]`. Returns y (as x,
/// channels_last) and the statistics, f64 `[groups, 2, C]`: mean and biased variance.
///
/// # Errors
/// Shapes that do not fit, or a failed exchange.
///
/// # Source
/// Ioffe and Szegedy 2015, section 3; `torch.nn.SyncBatchNorm`.
pub fn batch_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    options: &BatchNormOptions,
) -> Result<(Tensor, Tensor), TorchError> {
    let size = x.size();
    let pixels: i64 = size.iter().skip(2).product();
    let reducer = options.reducer.as_ref().map(|reducer| ffi::Reducer {
        context: Box::into_raw(Box::new(Arc::clone(reducer))).cast(),
        call: call_reducer,
        drop: drop_boxed::<dyn SumReducer>,
    });
    let inner = ffi::BatchNormOptions {
        groups: options.groups,
        count: options.images_per_group * pixels,
        eps: options.eps,
        slope: options.slope,
        reducer: reducer.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
    };
    let (mut y, mut stats) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the tensors are borrowed for the call; `inner` and its reducer are read during it and
    // the reducer's context is owned by the graph from here on (freed by drop_boxed); y and stats
    // are given to us when the call succeeds.
    unsafe {
        check(
            "batch_norm",
            ffi::takuma_batch_norm(raw(x), raw(weight), raw(bias), &inner, &mut y, &mut stats),
        )?;
        Ok((Tensor::from_ptr(y.cast()), Tensor::from_ptr(stats.cast())))
    }
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
    let inputs: Vec<_> = inputs.iter().map(|tensor| raw(tensor)).collect();
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
    let params: Vec<_> = params.iter().map(|tensor| raw(tensor)).collect();
    // SAFETY: borrowed tensors, borrowed for the call.
    unsafe { check("clear_gradients", ffi::takuma_clear_gradients(params.as_ptr(), params.len())) }
}

/// The first of `tensors` with a value that is infinite or not a number. Dense f32 or f64 tensors, read
/// once, in the order of memory.
///
/// # Errors
/// libtorch's, for other tensors.
pub fn first_not_finite(tensors: &[&Tensor]) -> Result<Option<usize>, TorchError> {
    let tensors: Vec<_> = tensors.iter().map(|tensor| raw(tensor)).collect();
    let mut found = tensors.len();
    // SAFETY: borrowed tensors, borrowed for the call; `found` is written during it.
    unsafe {
        check("first_not_finite", ffi::takuma_first_not_finite(tensors.as_ptr(), tensors.len(), &mut found))?;
    }
    Ok((found < tensors.len()).then_some(found))
}

/// The tensors that one Adam step reads and writes, all of equal length and order.
pub struct AdamTensors<'a> {
    /// Updated.
    pub params: &'a [&'a Tensor],
    /// Read.
    pub grads: &'a [&'a Tensor],
    /// First moments, updated.
    pub exp_avgs: &'a [&'a Tensor],
    /// Second moments, updated.
    pub exp_avg_sqs: &'a [&'a Tensor],
    /// Scalars f32: counted up by one.
    pub steps: &'a [&'a Tensor],
}

/// Adam's numbers.
#[derive(Debug, Clone, Copy)]
pub struct AdamOptions {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One Adam step over all parameters in one call.
///
/// # Errors
/// libtorch's, for tensors that do not fit together.
///
/// # Source
/// Kingma and Ba 2015, algorithm 1; `torch.optim.Adam(fused=True)`.
pub fn fused_adam(tensors: &AdamTensors<'_>, options: AdamOptions) -> Result<(), TorchError> {
    let pointers = |list: &[&Tensor]| list.iter().map(|tensor| raw(tensor)).collect::<Vec<_>>();
    let lists =
        [tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps].map(pointers);
    let n = lists[0].len();
    assert!(lists.iter().all(|list| list.len() == n), "Adam's lists have one entry per parameter");
    let [params, grads, exp_avgs, exp_avg_sqs, steps] = lists;
    // SAFETY: five lists of n borrowed tensors each.
    unsafe {
        check(
            "fused_adam",
            ffi::takuma_fused_adam(
                params.as_ptr(),
                grads.as_ptr(),
                exp_avgs.as_ptr(),
                exp_avg_sqs.as_ptr(),
                steps.as_ptr(),
                n,
                options.learning_rate,
                options.beta1,
                options.beta2,
                options.eps,
            ),
        )
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

unsafe extern "C" fn call_reducer(context: *mut c_void, values: *mut f64, len: usize) -> i32 {
    // SAFETY: context is the boxed Arc that batch_norm gave away; values has len doubles.
    let (reducer, values) =
        unsafe { (&*context.cast::<Arc<dyn SumReducer>>(), std::slice::from_raw_parts_mut(values, len)) };
    i32::from(!caught(false, || reducer.sum(values)))
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

unsafe extern "C" fn drop_boxed<T: ?Sized>(context: *mut c_void) {
    // SAFETY: called once, by the last holder of a boxed Arc<T> that this file gave away.
    drop(unsafe { Box::from_raw(context.cast::<Arc<T>>()) });
}

mod ffi {
    use super::{c_char, c_void};

    pub type RawTensor = *mut c_void;

    pub const GRADIENT_LEFT: i32 = 0;
    pub const GRADIENT_TAKEN: i32 = 1;
    pub const GRADIENT_FAILED: i32 = 2;

    #[repr(C)]
    pub struct Reducer {
        pub context: *mut c_void,
        pub call: unsafe extern "C" fn(*mut c_void, *mut f64, usize) -> i32,
        pub drop: unsafe extern "C" fn(*mut c_void),
    }

    #[repr(C)]
    pub struct GradientSink {
        pub context: *mut c_void,
        pub call: unsafe extern "C" fn(*mut c_void, usize, *mut c_void) -> i32,
        pub drop: unsafe extern "C" fn(*mut c_void),
    }

    #[repr(C)]
    pub struct BatchNormOptions {
        pub groups: i64,
        pub count: i64,
        pub eps: f64,
        pub slope: f64,
        pub reducer: *const Reducer,
    }

    unsafe extern "C" {
        pub fn takuma_free_error(message: *mut c_char);
        pub fn takuma_flush_denormals();
        pub fn takuma_compute_on_this_thread_alone();
        pub fn takuma_backward(loss: RawTensor, inputs: *const RawTensor, n: usize) -> *mut c_char;
        pub fn takuma_set_gradient_hook(
            parameter: RawTensor,
            index: usize,
            sink: GradientSink,
        ) -> *mut c_char;
        pub fn takuma_clear_gradients(params: *const RawTensor, n: usize) -> *mut c_char;
        pub fn takuma_first_not_finite(tensors: *const RawTensor, n: usize, found: *mut usize)
        -> *mut c_char;
        pub fn takuma_batch_norm(
            x: RawTensor,
            weight: RawTensor,
            bias: RawTensor,
            options: *const BatchNormOptions,
            y: *mut RawTensor,
            stats: *mut RawTensor,
        ) -> *mut c_char;
        pub fn takuma_leaky_relu(x: RawTensor, slope: f64, y: *mut RawTensor) -> *mut c_char;
        pub fn takuma_fused_adam(
            params: *const RawTensor,
            grads: *const RawTensor,
            exp_avgs: *const RawTensor,
            exp_avg_sqs: *const RawTensor,
            steps: *const RawTensor,
            n: usize,
            lr: f64,
            beta1: f64,
            beta2: f64,
            eps: f64,
        ) -> *mut c_char;
    }
}
