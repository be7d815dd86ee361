//! An update of a network: are the gradients numbers, and Adam.

use tch::{Device, Kind, Tensor};

use super::{TorchError, check, ffi, pointers, raw};

/// The first of `tensors` with a value that is infinite or not a number. Dense f32, f64 or bf16 tensors, all
/// on one device, read once, in the order of memory. On a GPU it waits for the stream: see [`guard`].
///
/// # Errors
/// libtorch's, for other tensors.
pub fn first_not_finite(tensors: &[&Tensor]) -> Result<Option<usize>, TorchError> {
    let tensors = pointers(tensors);
    let mut found = tensors.len();
    // SAFETY: borrowed tensors, borrowed for the call; `found` is written during it.
    unsafe {
        check("first_not_finite", ffi::takuma_first_not_finite(tensors.as_ptr(), tensors.len(), &mut found))?;
    }
    Ok((found < tensors.len()).then_some(found))
}

/// Where [`guard`] reads and writes: scalars on the gradients' device, in memory that stays the same.
#[derive(Debug)]
pub struct Guard {
    /// f32: 1 if the update must not be applied, else 0.
    pub found: Tensor,
    /// f32: 0, or why every update is refused from now on: [`FROZEN_NOT_FINITE`] or [`FROZEN_ENDED`].
    pub frozen: Tensor,
    /// i64: the first gradient that was infinite or not a number, or their count.
    pub index: Tensor,
}

impl Guard {
    /// A guard that has refused nothing.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self {
            found: Tensor::zeros([], (Kind::Float, device)),
            frozen: Tensor::zeros([], (Kind::Float, device)),
            index: Tensor::zeros([], (Kind::Int64, device)),
        }
    }
}

/// In [`Guard::frozen`]: an update was not finite, and the run does not skip such updates.
pub const FROZEN_NOT_FINITE: f64 = 1.0;
/// In [`Guard::frozen`]: a group ended, so its sums mean nothing.
pub const FROZEN_ENDED: f64 = 2.0;

/// How the ranks of a group tell each other on their devices that the sums of a phase are whole. Each adds a stamp
/// that no earlier sum had, or 0 once its group has ended; so the stamps' sum is right only if nobody's group had
/// ended before that rank came to its stamp, after all other sums of the phase.
#[derive(Debug)]
pub struct Vouch {
    /// f64 `[2]`: this rank's stamp, to be summed over the ranks; what the sum must be.
    pub pair: Tensor,
    /// Not 0 once the group has ended.
    ended: *const u32,
}

// SAFETY: the word may be read from any thread, as its maker promised.
unsafe impl Send for Vouch {}

/// What a stamp is made of: `number * phases + phase`, another for each phase of a group.
#[derive(Debug, Clone, Copy)]
pub struct Stamp<'a> {
    /// f64 scalar on the device: the step.
    pub number: &'a Tensor,
    /// Phases of a step.
    pub phases: u32,
    /// Which of them.
    pub phase: u32,
    /// Ranks of the group.
    pub ranks: u32,
}

impl Vouch {
    /// For the group whose end `ended` tells.
    ///
    /// # Safety
    /// `ended` can be read by `device` and by the host until the device has done all work that it was given with this.
    #[must_use]
    pub unsafe fn new(device: Device, ended: *const u32) -> Self {
        Self { pair: Tensor::zeros([2], (Kind::Double, device)), ended }
    }

    /// Writes this rank's stamp, or 0 if the group has ended by then. Enqueued only, on a GPU. `pair[0]` is to be
    /// summed over the ranks next, as the last sum before [`guard`].
    ///
    /// # Errors
    /// libtorch's.
    pub fn sign(&self, stamp: &Stamp<'_>) -> Result<(), TorchError> {
        let [phases, phase, ranks] = [stamp.phases, stamp.phase, stamp.ranks].map(f64::from);
        // SAFETY: tensors, borrowed for the call; the word as `new` demands.
        unsafe {
            check(
                "vouch",
                ffi::takuma_vouch(self.ended, raw(stamp.number), phases, phase, ranks, raw(&self.pair)),
            )
        }
    }
}

/// Judges an update on the device. With `vouch`, `guard.frozen` becomes [`FROZEN_ENDED`] if the group has ended or the
/// ranks' stamps do not make their sum. Then `guard.found` becomes 1 if `loss` or any gradient is infinite or not a
/// number, or if `guard.frozen` is set, else 0; `guard.index` becomes the first such gradient's index, or
/// their count if it is the loss or `frozen` alone. If `sticky`, an update that is found so sets `guard.frozen`.
/// Enqueued only, on a GPU.
///
/// # Shapes
/// Dense gradients, f32, f64 or bf16; `loss` a scalar of those types; all on the guard's device.
///
/// # Errors
/// Other tensors.
pub fn guard(
    gradients: &[&Tensor],
    loss: &Tensor,
    vouch: Option<&Vouch>,
    guard: &Guard,
    sticky: bool,
) -> Result<(), TorchError> {
    let gradients = pointers(gradients);
    let (ended, pair) = match vouch {
        Some(vouch) => (vouch.ended, raw(&vouch.pair)),
        None => (std::ptr::null(), std::ptr::null_mut()),
    };
    // SAFETY: tensors, borrowed for the call.
    unsafe {
        check(
            "guard",
            ffi::takuma_guard(
                gradients.as_ptr(),
                gradients.len(),
                raw(loss),
                ended,
                pair,
                raw(&guard.frozen),
                i32::from(sticky),
                raw(&guard.found),
                raw(&guard.index),
            ),
        )
    }
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
    /// Scalars f32 on the parameters' device: counted up by one.
    pub steps: &'a [&'a Tensor],
    /// A scalar f32: where it is 1, nothing is updated and nothing counted. See [`Guard::found`].
    pub found_inf: Option<&'a Tensor>,
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

/// One Adam step over all parameters in one call. Enqueued only, on a GPU.
///
/// # Errors
/// libtorch's, for tensors that do not fit together.
///
/// # Source
/// Kingma and Ba 2015, algorithm 1; `torch.optim.Adam(fused=True)`.
pub fn fused_adam(tensors: &AdamTensors<'_>, options: AdamOptions) -> Result<(), TorchError> {
    let lists =
        [tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps].map(pointers);
    let n = lists[0].len();
    assert!(lists.iter().all(|list| list.len() == n), "Adam's lists have one entry per parameter");
    let [params, grads, exp_avgs, exp_avg_sqs, steps] = lists;
    // SAFETY: five lists of n borrowed tensors each; NULL where `found_inf` is none.
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
                tensors.found_inf.map_or(std::ptr::null_mut(), raw),
                options.learning_rate,
                options.beta1,
                options.beta2,
                options.eps,
            ),
        )
    }
}
