//! The shim's C functions, as in `worker/torch/shim.h`.

use std::ffi::{c_char, c_void};

pub type RawTensor = *mut c_void;

pub const GRADIENT_LEFT: i32 = 0;
pub const GRADIENT_TAKEN: i32 = 1;
pub const GRADIENT_FAILED: i32 = 2;

pub type CallOnDevice = unsafe extern "C" fn(*mut c_void, *mut f64, usize, *mut c_void) -> i32;

#[repr(C)]
pub struct Reducer {
    pub context: *mut c_void,
    pub call: unsafe extern "C" fn(*mut c_void, *mut f64, usize) -> i32,
    pub call_lanes: unsafe extern "C" fn(*mut c_void, *const f64, usize, *mut f64, usize) -> i32,
    pub call_on_device: Option<CallOnDevice>,
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

#[repr(C)]
pub struct CudaDevice {
    pub name: [c_char; 256],
    pub memory_bytes: u64,
    pub capability: [i32; 2],
    pub uuid: [u8; 16],
}

unsafe extern "C" {
    pub fn takuma_free_error(message: *mut c_char);
    pub fn takuma_flush_denormals();
    pub fn takuma_compute_on_this_thread_alone();
    pub fn takuma_backward(loss: RawTensor, inputs: *const RawTensor, n: usize) -> *mut c_char;
    pub fn takuma_set_gradient_hook(parameter: RawTensor, index: usize, sink: GradientSink) -> *mut c_char;
    pub fn takuma_clear_gradients(params: *const RawTensor, n: usize) -> *mut c_char;
    pub fn takuma_first_not_finite(tensors: *const RawTensor, n: usize, found: *mut usize) -> *mut c_char;
    pub fn takuma_vouch(
        ended: *const u32,
        stamp: RawTensor,
        phases: f64,
        phase: f64,
        ranks: f64,
        pair: RawTensor,
    ) -> *mut c_char;
    pub fn takuma_guard(
        gradients: *const RawTensor,
        n: usize,
        loss: RawTensor,
        ended: *const u32,
        pair: RawTensor,
        frozen: RawTensor,
        sticky: i32,
        found: RawTensor,
        index: RawTensor,
    ) -> *mut c_char;
    pub fn takuma_batch_norm(
        x: *const RawTensor,
        weight: *const RawTensor,
        bias: *const RawTensor,
        lanes: usize,
        options: *const BatchNormOptions,
        y: *mut RawTensor,
        stats: *mut RawTensor,
    ) -> *mut c_char;
    pub fn takuma_commit_statistics(
        means: *const RawTensor,
        variances: *const RawTensor,
        batches: *const RawTensor,
        elements: *const f64,
        n: usize,
        momentum: f64,
        found: RawTensor,
    ) -> *mut c_char;
    pub fn takuma_leaky_relu(x: RawTensor, slope: f64, y: *mut RawTensor) -> *mut c_char;
    pub fn takuma_fused_adam(
        params: *const RawTensor,
        grads: *const RawTensor,
        exp_avgs: *const RawTensor,
        exp_avg_sqs: *const RawTensor,
        steps: *const RawTensor,
        n: usize,
        found_inf: RawTensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
    ) -> *mut c_char;
    pub fn takuma_copy_async(target: RawTensor, source: RawTensor) -> *mut c_char;
    pub fn takuma_copy_all(targets: *const RawTensor, sources: *const RawTensor, n: usize) -> *mut c_char;
    pub fn takuma_host_like(like: RawTensor, is_pinned: i32, host: *mut RawTensor) -> *mut c_char;
    pub fn takuma_gather_images(images: RawTensor, rows: RawTensor, target: RawTensor) -> *mut c_char;

    pub fn takuma_cuda_install(table: *const c_void) -> *mut c_char;
    pub fn takuma_cuda_device_count(count: *mut i32) -> *mut c_char;
    pub fn takuma_cuda_device(index: i32, device: *mut CudaDevice) -> *mut c_char;
    pub fn takuma_cuda_runtime_version(version: *mut i32) -> *mut c_char;
    pub fn takuma_cuda_select(index: i32, tf32: i32, deterministic: i32) -> *mut c_char;
    pub fn takuma_cuda_stream(stream: *mut *mut c_void) -> *mut c_char;
    pub fn takuma_cuda_synchronize() -> *mut c_char;
    pub fn takuma_cuda_event_new(event: *mut *mut c_void) -> *mut c_char;
    pub fn takuma_cuda_event_record(event: *mut c_void) -> *mut c_char;
    pub fn takuma_cuda_event_query(event: *mut c_void, reached: *mut i32) -> *mut c_char;
    pub fn takuma_cuda_event_free(event: *mut c_void);
    pub fn takuma_cuda_graph_begin(
        former: *mut c_void,
        across_threads: i32,
        graph: *mut *mut c_void,
    ) -> *mut c_char;
    pub fn takuma_cuda_graph_is_empty(graph: *mut c_void, empty: *mut i32) -> *mut c_char;
    pub fn takuma_cuda_graph_end(graph: *mut c_void) -> *mut c_char;
    pub fn takuma_cuda_graph_replay(graph: *mut c_void) -> *mut c_char;
    pub fn takuma_cuda_graph_free(graph: *mut c_void);
}
