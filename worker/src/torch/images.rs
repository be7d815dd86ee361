//! Images from where they are kept to where they are computed with.

use tch::Tensor;

use super::{TorchError, check, ffi, raw};

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
