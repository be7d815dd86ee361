//! CUDA: found and loaded at run time, so that one binary serves hosts with and without a GPU.
//!
//! Order of calls, all on the thread that computes: [`load`], once, before anything asks libtorch about CUDA
//! (libtorch decides at the first question whether it has CUDA, and keeps to that); [`devices`]; [`select`].
//! Nothing of it is touched where CUDA is not wanted.
//!
//! [`Event`] exists without a GPU too, so that what is built on it runs on a processor.

use std::ffi::{CStr, c_void};
use std::sync::Mutex;

use tch::Device;

pub use error::CudaError;
pub use event::Event;
pub use graph::{Graph, StreamCapture};
pub use load::{is_loaded, load, open_libraries};
pub use record::{Capture, Program, Recording, record};

use super::{TorchError, check, ffi};

mod error;
mod event;
mod graph;
mod load;
mod record;

/// The first architecture that the wheel's kernels are built for: Turing.
const OLDEST_CAPABILITY: (u32, u32) = (7, 5);

/// A GPU that CUDA shows to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number; `CUDA_VISIBLE_DEVICES` counts.
    pub index: u32,
    /// The product's name.
    pub name: String,
    /// Major and minor number of its architecture.
    pub capability: (u32, u32),
    /// All of its memory.
    pub memory_bytes: u64,
    /// Its identity, whatever number it has in this process.
    pub uuid: [u8; 16],
}

/// Versions as (major, minor).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The newest CUDA that the driver can run.
    pub driver: (u32, u32),
    /// The CUDA that libtorch was built with.
    pub runtime: (u32, u32),
}

/// What convolutions and matrix products compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// f32, factors rounded to TF32 (10 bits of mantissa), sums in f32.
    Tf32,
    /// As [`Precision::Tf32`] for what stays f32; the model casts the rest to bf16.
    Bf16,
}

/// The GPUs that CUDA shows to this process.
///
/// # Errors
/// If CUDA is not loaded, or cannot be asked.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    load::required()?;
    let mut count = 0;
    // SAFETY: `count` is written during the call.
    unsafe { check("device_count", ffi::takuma_cuda_device_count(&mut count)) }.map_err(CudaError::from)?;
    (0..count).map(device).collect()
}

fn device(index: i32) -> Result<DeviceInfo, CudaError> {
    let mut found = ffi::CudaDevice { name: [0; 256], memory_bytes: 0, capability: [0; 2], uuid: [0; 16] };
    // SAFETY: `found` is written during the call; the shim ends the name with a NUL.
    let name = unsafe {
        check("device", ffi::takuma_cuda_device(index, &mut found)).map_err(CudaError::from)?;
        CStr::from_ptr(found.name.as_ptr()).to_string_lossy().into_owned()
    };
    Ok(DeviceInfo {
        index: index.unsigned_abs(),
        name,
        capability: (found.capability[0].unsigned_abs(), found.capability[1].unsigned_abs()),
        memory_bytes: found.memory_bytes,
        uuid: found.uuid,
    })
}

/// Versions of driver and runtime.
///
/// # Errors
/// If CUDA is not loaded.
pub fn versions() -> Result<Versions, CudaError> {
    let driver = load::required()?;
    let mut runtime = 0;
    // SAFETY: `runtime` is written during the call.
    unsafe { check("runtime_version", ffi::takuma_cuda_runtime_version(&mut runtime)) }?;
    Ok(Versions { driver, runtime: load::version_of(runtime) })
}

/// Makes GPU `index` the calling thread's, with a stream of its own, and sets how the process computes on it:
/// `precision`; in `deterministic` only algorithms of cuDNN's whose results repeat, else whichever it measures
/// to be fastest. takuma's own kernels always repeat.
///
/// The stream is the calling thread's alone; backward, which runs on a thread of libtorch's, follows the stream
/// that each operation's forward used. A graph can be captured on no other stream than such a one.
///
/// # Errors
/// If there is no such GPU, or libtorch's kernels do not run on it.
pub fn select(index: u32, precision: Precision, deterministic: bool) -> Result<Device, CudaError> {
    /// Two threads must not set the process' switches at once.
    static SELECTING: Mutex<()> = Mutex::new(());
    let _guard = SELECTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found = devices()?;
    let Some(info) = found.get(index as usize) else {
        return Err(CudaError::NoSuchDevice { index, count: found.len() });
    };
    let too_old = |source| CudaError::Capability {
        name: info.name.clone(),
        major: info.capability.0,
        minor: info.capability.1,
        source,
    };
    if info.capability < OLDEST_CAPABILITY {
        return Err(too_old(None));
    }
    let tf32 = i32::from(precision != Precision::F32);
    let number = i32::try_from(index).unwrap_or(i32::MAX);
    // SAFETY: numbers only.
    match unsafe { check("select", ffi::takuma_cuda_select(number, tf32, i32::from(deterministic))) } {
        Ok(()) => Ok(Device::Cuda(index as usize)),
        Err(error) if error.message.contains("no kernel image") => Err(too_old(Some(error))),
        Err(error) => Err(error.into()),
    }
}

/// The calling thread's stream on its current GPU, a `cudaStream_t`, for NCCL.
///
/// # Errors
/// If CUDA is not loaded.
pub fn stream() -> Result<*mut c_void, TorchError> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: `stream` is written during the call.
    unsafe { check("stream", ffi::takuma_cuda_stream(&mut stream))? };
    Ok(stream)
}

/// Waits until the calling thread's stream has done all that it was given. Reports what failed in between.
///
/// # Errors
/// CUDA's.
pub fn synchronize() -> Result<(), TorchError> {
    // SAFETY: no argument.
    unsafe { check("synchronize", ffi::takuma_cuda_synchronize()) }
}
