//! Numbers from where they are kept to where they are computed with: images, and copies of a state.

use tch::{Device, Tensor};

use super::{TorchError, check, ffi, pointers, raw};

/// Copies `source` into `target`'s memory. Between host and GPU it is enqueued only, if the host's tensor is in
/// pinned memory ([`Tensor::pin_memory`]): leave both tensors alone until an event behind it is reached.
///
/// # Shapes
/// `source` of the target's shape; another type is converted.
///
/// # Errors
/// libtorch's, for tensors that do not fit together.
///
/// # Source
/// `torch.Tensor.copy_(non_blocking=True)`.
pub fn copy_async(target: &Tensor, source: &Tensor) -> Result<(), TorchError> {
    // SAFETY: tensors, borrowed for the call.
    unsafe { check("copy_async", ffi::takuma_copy_async(raw(target), raw(source))) }
}

/// Copies of `tensors` on their device, all in as few launches as can be. Enqueued only, on a GPU.
///
/// # Errors
/// libtorch's, out of memory.
///
/// # Source
/// `torch._foreach_copy_`.
pub fn copies(tensors: &[&Tensor]) -> Result<Vec<Tensor>, TorchError> {
    let failed = |error: tch::TchError| TorchError { operation: "copies", message: error.to_string() };
    let made: Vec<Tensor> = tensors
        .iter()
        .map(|tensor| tensor.detach().f_empty_like())
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    let (targets, sources) = (pointers(&made.iter().collect::<Vec<_>>()), pointers(tensors));
    // SAFETY: two lists of as many tensors, borrowed for the call.
    unsafe { check("copies", ffi::takuma_copy_all(targets.as_ptr(), sources.as_ptr(), made.len()))? };
    Ok(made)
}

/// Uninitialised memory on the host like `tensor`, page-locked if `device`, which its numbers go to or
/// come from, is a GPU.
///
/// # Errors
/// libtorch's, out of memory that can be locked.
///
/// # Source
/// `torch.empty_strided(pin_memory=True)`.
pub fn host_like(tensor: &Tensor, device: Device) -> Result<Tensor, TorchError> {
    let mut host = std::ptr::null_mut();
    // SAFETY: a tensor, borrowed for the call; `host` is given to us when it succeeds.
    unsafe {
        check("host_like", ffi::takuma_host_like(raw(tensor), i32::from(device.is_cuda()), &mut host))?;
        Ok(Tensor::from_ptr(host.cast()))
    }
}

/// Writes the images numbered `rows` into `target`, each pixel `p` as `p / 127.5 - 1` in f32, rounded to the
/// target's type. Enqueued only, on a GPU; a row that is no image's number is clamped there (the host cannot see
/// it), and an error elsewhere.
///
/// # Shapes
/// `images` uint8 `[R, H, W, 3]`, dense; `rows` i64 `[N]`; `target` `[N, 3, H, W]`, channels_last, f32, f64 or
/// bf16; all on one device.
///
/// # Errors
/// Tensors that do not fit together.
pub fn gather_images(images: &Tensor, rows: &Tensor, target: &Tensor) -> Result<(), TorchError> {
    // SAFETY: tensors, borrowed for the call.
    unsafe { check("gather_images", ffi::takuma_gather_images(raw(images), raw(rows), raw(target))) }
}
