//! [`CudaError`]: why the GPU cannot be used, and what to do about it.

use std::path::PathBuf;

use crate::torch::TorchError;

/// The GPU cannot be used. Each message names the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver.
    #[error(
        "this machine has no NVIDIA driver (libcuda.so.1 is not there: {reason}); install driver 580 or newer, in \
         a container start it with `--gpus all`, or train on the processor with `--device cpu`"
    )]
    DriverMissing {
        /// The loader's words.
        reason: String,
    },
    /// A driver that cannot run libtorch's CUDA.
    #[error(
        "the NVIDIA driver is too old: it runs CUDA {}.{} at most, this libtorch needs {}.{}; install driver 580 \
         or newer", .found.0, .found.1, .needed.0, .needed.1
    )]
    DriverTooOld {
        /// The driver's newest CUDA.
        found: (u32, u32),
        /// libtorch's.
        needed: (u32, u32),
    },
    /// The driver is there but does not start.
    #[error(
        "the NVIDIA driver does not start (cuInit: error {code}); `nvidia-smi` says more; after an update of the \
         driver, restart the machine"
    )]
    DriverFailed {
        /// A `CUresult`.
        code: i32,
    },
    /// A driver without a device.
    #[error(
        "the NVIDIA driver shows no GPU to this process; look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or \
         train on the processor with `--device cpu`"
    )]
    NoDevice,
    /// A number that no device has.
    #[error("there is no GPU {index}: this process sees {count}, counted from 0")]
    NoSuchDevice {
        /// Asked for.
        index: u32,
        /// Devices that there are.
        count: usize,
    },
    /// libtorch has no kernels for the device.
    #[error(
        "libtorch 2.11.0 has no kernels for {name} (compute capability {major}.{minor}); it serves 7.5 to 12.0: \
         choose another GPU with `--device`, or the processor with `--device cpu`"
    )]
    Capability {
        /// The product.
        name: String,
        /// Of its architecture.
        major: u32,
        /// Of its architecture.
        minor: u32,
        /// What libtorch said when it was tried.
        #[source]
        source: Option<TorchError>,
    },
    /// libtorch's CUDA libraries, or NVIDIA's, are not there.
    #[error(
        "the CUDA libraries are missing ({reason}); fetch them with `TAKUMA_CUDA=1 scripts/setup-libtorch.sh`, or \
         put the folder that holds libtorch_cuda.so into LD_LIBRARY_PATH; looked in {}", list(.folders)
    )]
    LibrariesMissing {
        /// The loader's words.
        reason: String,
        /// Where was looked, besides LD_LIBRARY_PATH.
        folders: Vec<PathBuf>,
    },
    /// The binary was built without its CUDA part.
    #[error(
        "this takuma-worker was built without CUDA; build it where the CUDA headers are: \
         `scripts/setup-libtorch.sh`, then `make build`"
    )]
    NotBuilt,
    /// takuma's own library does not fit to libtorch's.
    #[error(
        "the CUDA libraries do not fit to this takuma-worker ({reason}); they must come from the wheel of torch \
         2.11.0 that it was built with"
    )]
    Mismatch {
        /// The loader's words.
        reason: String,
    },
    /// [`super::load`] was not called.
    #[error("CUDA is used before it is loaded")]
    NotLoaded,
    /// The GPU's memory is full.
    #[error(
        "the GPU's memory is full; end other programs on it (`nvidia-smi` lists them), or give this worker fewer \
         slots"
    )]
    OutOfMemory(#[source] TorchError),
    /// Anything else.
    #[error("CUDA failed")]
    Torch(#[source] TorchError),
}

impl From<TorchError> for CudaError {
    fn from(error: TorchError) -> Self {
        if error.is_out_of_memory() { Self::OutOfMemory(error) } else { Self::Torch(error) }
    }
}

fn list(folders: &[PathBuf]) -> String {
    let names: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    if names.is_empty() { "no folder".to_owned() } else { names.join(", ") }
}
