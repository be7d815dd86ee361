//! Batch normalisation over all workers, and what becomes of its statistics.

use std::ffi::c_void;
use std::sync::Arc;

use tch::Tensor;

use super::{TorchError, caught, check, drop_boxed, ffi, raw};

/// Sums vectors over all workers, in place; `false` means that it failed and the pass must end.
pub trait SumReducer: Send + Sync + 'static {
    /// Sums `values` over all workers.
    fn sum(&self, values: &mut [f64]) -> bool;

    /// Writes into `sums` the sum of `rows`, those of this worker's lanes one after the other, over all lanes of all
    /// workers. Unless a reducer knows better, lane after lane here, and then over the workers.
    ///
    /// # Shapes
    /// `rows` `[lanes * len]`, one lane or more; `sums` `[len]`.
    fn sum_lanes(&self, rows: &[f64], sums: &mut [f64]) -> bool {
        let (first, rest) = rows.split_at(sums.len());
        sums.copy_from_slice(first);
        // An empty row has no chunks, and then there are no values either.
        for row in rest.chunks_exact(sums.len().max(1)) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
        self.sum(sums)
    }

    /// The same for values on the GPU, if there is a way that spares them the trip over the host. Must give
    /// the same answer for the reducer's whole life.
    fn on_device(&self) -> Option<&dyn DeviceSumReducer> {
        None
    }
}

/// Sums vectors in the GPU's memory over all workers.
pub trait DeviceSumReducer: Send + Sync {
    /// Enqueues the sum of the `len` f64 at the device address `values`, in place, on the CUDA stream
    /// `stream`. Must not wait for the stream. While a step is recorded the stream is being captured: the sum must then
    /// go between two graphs ([`super::cuda::Recording`]) and not into one. `false`: it failed and the pass must end.
    ///
    /// # Safety
    /// `values` are `len` f64 on the device of `stream`, and stay until the work that the stream then holds is done.
    unsafe fn sum_on_device(&self, values: *mut f64, len: usize, stream: *mut c_void) -> bool;
}

/// Options of [`batch_norm`].
#[derive(Clone)]
pub struct BatchNormOptions {
    /// Each lane is cut into so many equal parts, each with statistics of its own.
    pub groups: i64,
    /// Images per group over all lanes and workers; times height and width this is the divisor.
    pub images_per_group: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Activation behind it: 1 none, 0 ReLU, else LeakyReLU's negative slope.
    pub slope: f64,
    /// Sums statistics over workers; none = this worker's own batch.
    pub reducer: Option<Arc<dyn SumReducer>>,
}

/// A part of the batch that is computed by itself, and the trained tensors in whose gradients its share comes out.
#[derive(Debug, Clone, Copy)]
pub struct NormLane<'a> {
    /// `[N, C, H, W]`.
    pub x: &'a Tensor,
    /// `[C]`.
    pub weight: &'a Tensor,
    /// `[C]`.
    pub bias: &'a Tensor,
}

/// [`batch_norm_lanes`] of a single lane.
///
/// # Shapes
/// Returns y, as `x`, and the statistics.
///
/// # Errors
/// As there.
pub fn batch_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    options: &BatchNormOptions,
) -> Result<(Tensor, Tensor), TorchError> {
    let (mut y, stats) = batch_norm_lanes(&[NormLane { x, weight, bias }], options)?;
    Ok((y.swap_remove(0), stats))
}

/// Batch normalisation in training, fused with the activation behind it. On a GPU it is enqueued only, unless
/// a reducer without [`SumReducer::on_device`], or several lanes, have to see the sums on the host.
///
/// Statistics are over all lanes and workers. All else is computed lane by lane, each as if it were the only one, so that
/// a lane's bits do not depend on how many there are. One backward pass reaches all of them.
///
/// # Shapes
/// By lane: `x` `[N, C, H, W]` with N divisible by `groups`, f32, f64 or bf16; `weight`, `bias` `[C]`, of x's type,
/// f32 for bf16. Several lanes have one shape, aliases of the same weights, and a reducer. Returns each lane's
/// y (as x, channels_last) and the statistics on x's device, f64 `[groups, 2, C]`: mean and biased variance.
///
/// # Errors
/// Shapes that do not fit, or a failed exchange.
///
/// # Source
/// Ioffe and Szegedy 2015, section 3; `torch.nn.SyncBatchNorm`.
pub fn batch_norm_lanes(
    lanes: &[NormLane<'_>],
    options: &BatchNormOptions,
) -> Result<(Vec<Tensor>, Tensor), TorchError> {
    let size = lanes.first().map(|lane| lane.x.size()).unwrap_or_default();
    let pixels: i64 = size.iter().skip(2).product();
    let reducer = options.reducer.as_ref().map(|reducer| ffi::Reducer {
        context: Box::into_raw(Box::new(Arc::clone(reducer))).cast(),
        call: call_reducer,
        call_lanes: call_lanes_reducer,
        call_on_device: reducer.on_device().map(|_| call_device_reducer as ffi::CallOnDevice),
        drop: drop_boxed::<dyn SumReducer>,
    });
    let inner = ffi::BatchNormOptions {
        groups: options.groups,
        count: options.images_per_group * pixels,
        eps: options.eps,
        slope: options.slope,
        reducer: reducer.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
    };
    let list = |of: fn(&NormLane<'_>) -> ffi::RawTensor| lanes.iter().map(of).collect::<Vec<_>>();
    let (x, weight, bias) =
        (list(|lane| raw(lane.x)), list(|lane| raw(lane.weight)), list(|lane| raw(lane.bias)));
    let (mut y, mut stats) = (vec![std::ptr::null_mut(); lanes.len()], std::ptr::null_mut());
    // SAFETY: four lists of one entry a lane; the tensors are borrowed for the call; `inner` and its reducer are read
    // during it and the reducer's context is owned by the graph from here on (freed by drop_boxed); the
    // entries of y and stats are given to us when the call succeeds.
    unsafe {
        check(
            "batch_norm",
            ffi::takuma_batch_norm(
                x.as_ptr(),
                weight.as_ptr(),
                bias.as_ptr(),
                lanes.len(),
                &inner,
                y.as_mut_ptr(),
                &mut stats,
            ),
        )?;
        let y = y.into_iter().map(|y| Tensor::from_ptr(y.cast())).collect();
        Ok((y, Tensor::from_ptr(stats.cast())))
    }
}

unsafe extern "C" fn call_reducer(context: *mut c_void, values: *mut f64, len: usize) -> i32 {
    // SAFETY: context is the boxed Arc that batch_norm gave away; values has len doubles.
    let (reducer, values) =
        unsafe { (&*context.cast::<Arc<dyn SumReducer>>(), std::slice::from_raw_parts_mut(values, len)) };
    i32::from(!caught(false, || reducer.sum(values)))
}

unsafe extern "C" fn call_lanes_reducer(
    context: *mut c_void,
    rows: *const f64,
    lanes: usize,
    sums: *mut f64,
    len: usize,
) -> i32 {
    // SAFETY: context is the boxed Arc that batch_norm gave away; there are `lanes` rows of len doubles each, and
    // room for len sums elsewhere.
    let (reducer, rows, sums) = unsafe {
        (
            &*context.cast::<Arc<dyn SumReducer>>(),
            std::slice::from_raw_parts(rows, lanes * len),
            std::slice::from_raw_parts_mut(sums, len),
        )
    };
    i32::from(!caught(false, || reducer.sum_lanes(rows, sums)))
}

unsafe extern "C" fn call_device_reducer(
    context: *mut c_void,
    values: *mut f64,
    len: usize,
    stream: *mut c_void,
) -> i32 {
    // SAFETY: context is the boxed Arc that batch_norm gave away; the values are not touched here.
    let reducer = unsafe { &*context.cast::<Arc<dyn SumReducer>>() };
    // SAFETY: the shim's own scratch of len doubles, which it frees in the order of the stream.
    let sum = |device: &dyn DeviceSumReducer| unsafe { device.sum_on_device(values, len, stream) };
    let sum = || reducer.on_device().is_some_and(sum);
    i32::from(!caught(false, sum))
}

/// What [`commit_statistics`] changes and reads of one layer.
#[derive(Debug, Clone, Copy)]
pub struct RunningStatistics<'a> {
    /// `[C]`, f32 or f64: updated.
    pub mean: &'a Tensor,
    /// `[C]`, of the mean's type: updated.
    pub variance: &'a Tensor,
    /// f64 `[groups, 2, C]`, as [`batch_norm`] returned them.
    pub batch: &'a Tensor,
    /// Values per channel and group over all workers.
    pub elements: f64,
}

/// Mixes batch statistics into the running ones of all layers, group after group, in place. The running
/// variance is the unbiased one. `momentum` is the newest batch's weight. All in f64, rounded to the
/// running type after each group. Nothing changes where the f32 scalar `found` is 1. Enqueued only, on a GPU.
///
/// # Errors
/// Shapes, types or devices that do not fit.
///
/// # Source
/// `torch.nn.BatchNorm2d`.
pub fn commit_statistics(
    layers: &[RunningStatistics<'_>],
    momentum: f64,
    found: Option<&Tensor>,
) -> Result<(), TorchError> {
    let list = |of: fn(&RunningStatistics<'_>) -> ffi::RawTensor| layers.iter().map(of).collect::<Vec<_>>();
    let means = list(|layer| raw(layer.mean));
    let variances = list(|layer| raw(layer.variance));
    let batches = list(|layer| raw(layer.batch));
    let elements: Vec<f64> = layers.iter().map(|layer| layer.elements).collect();
    // SAFETY: four lists of one entry a layer; borrowed tensors, NULL where `found` is none.
    unsafe {
        check(
            "commit_statistics",
            ffi::takuma_commit_statistics(
                means.as_ptr(),
                variances.as_ptr(),
                batches.as_ptr(),
                elements.as_ptr(),
                layers.len(),
                momentum,
                found.map_or(std::ptr::null_mut(), raw),
            ),
        )
    }
}
