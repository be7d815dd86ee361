//! Finds and opens the driver, libtorch's CUDA libraries, and takuma's own.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use super::CudaError;
use crate::torch::{check, ffi};

/// The CUDA that libtorch was built with; a driver of the same major number or newer runs it.
const NEEDED_CUDA: (u32, u32) = (13, 0);
/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: i32 = 100;
/// takuma's own library: kernels, and what needs CUDA's headers. Empty in a build without them.
static OWN_LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libtakuma_cuda.so"));

/// The driver's version, once everything is loaded.
static LOADED: OnceLock<(u32, u32)> = OnceLock::new();

/// Loads CUDA into this process: the driver, libtorch's CUDA libraries from LD_LIBRARY_PATH or the first folder
/// that has them of `folders`, `../lib/takuma` beside the program, the program's own and the build's, and
/// takuma's kernels. Again, it does nothing.
///
/// Call it before anything else asks libtorch about CUDA, in a program that wants CUDA and in no other.
///
/// # Errors
/// Whatever is missing or does not fit, with its remedy.
pub fn load(folders: &[PathBuf]) -> Result<(), CudaError> {
    static LOADING: Mutex<()> = Mutex::new(());
    let _guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if LOADED.get().is_some() {
        return Ok(());
    }
    if OWN_LIBRARY.is_empty() {
        return Err(CudaError::NotBuilt);
    }
    let driver = start_driver()?;
    open_libraries(folders)?;
    LOADED.get_or_init(|| driver);
    Ok(())
}

/// Whether [`load`] succeeded.
#[must_use]
pub fn is_loaded() -> bool {
    LOADED.get().is_some()
}

/// The driver's version.
pub(super) fn required() -> Result<(u32, u32), CudaError> {
    LOADED.get().copied().ok_or(CudaError::NotLoaded)
}

/// CUDA's way to write a version: 1000 times the major plus 10 times the minor number.
pub(super) fn version_of(number: i32) -> (u32, u32) {
    let number = number.unsigned_abs();
    (number / 1000, number % 1000 / 10)
}

/// Opens the driver and has it look for devices; returns its version.
fn start_driver() -> Result<(u32, u32), CudaError> {
    let driver = open(OsStr::new("libcuda.so.1")).map_err(|reason| CudaError::DriverMissing { reason })?;
    let missing = |reason| CudaError::DriverMissing { reason };
    let version: unsafe extern "C" fn(*mut i32) -> i32 =
        // SAFETY: `CUresult cuDriverGetVersion(int *)`.
        unsafe { std::mem::transmute(symbol(driver, c"cuDriverGetVersion").map_err(missing)?) };
    let start: unsafe extern "C" fn(u32) -> i32 =
        // SAFETY: `CUresult cuInit(unsigned)`.
        unsafe { std::mem::transmute(symbol(driver, c"cuInit").map_err(missing)?) };
    let mut number = 0;
    // SAFETY: `number` is written during the call, which needs no cuInit.
    let code = unsafe { version(&mut number) };
    if code != 0 {
        return Err(CudaError::DriverFailed { code });
    }
    let found = version_of(number);
    if found < NEEDED_CUDA {
        return Err(CudaError::DriverTooOld { found, needed: NEEDED_CUDA });
    }
    // SAFETY: its argument must be 0.
    match unsafe { start(0) } {
        0 => Ok(found),
        NO_DEVICE => Err(CudaError::NoDevice),
        code => Err(CudaError::DriverFailed { code }),
    }
}

/// Opens libtorch's CUDA libraries and takuma's own, without asking for a driver or a GPU. For the test that they
/// fit to each other on a machine without; programs call [`load`].
///
/// # Errors
/// As [`load`].
pub fn open_libraries(folders: &[PathBuf]) -> Result<(), CudaError> {
    if OWN_LIBRARY.is_empty() {
        return Err(CudaError::NotBuilt);
    }
    let candidates = candidates(folders);
    open_libtorch(&candidates)?;
    open_own()
}

/// Where the libraries may be besides LD_LIBRARY_PATH, first choice first.
fn candidates(folders: &[PathBuf]) -> Vec<PathBuf> {
    let program = std::env::current_exe().ok();
    let beside = program.as_deref().and_then(Path::parent);
    let own = beside.into_iter().flat_map(|folder| [folder.join("../lib/takuma"), folder.to_owned()]);
    let build = option_env!("TAKUMA_BUILT_CUDA_LIBRARIES").map(PathBuf::from);
    folders.iter().cloned().chain(own).chain(build).collect()
}

fn open_libtorch(candidates: &[PathBuf]) -> Result<(), CudaError> {
    let missing = |reason| CudaError::LibrariesMissing { reason, folders: candidates.to_vec() };
    let folder = candidates.iter().find(|folder| folder.join("libtorch_cuda.so").is_file());
    let by_name = open(OsStr::new("libtorch_cuda.so"));
    match (by_name, folder) {
        (Ok(_), _) => Ok(()),
        (Err(reason), None) => Err(missing(reason)),
        (Err(_), Some(folder)) => {
            preload(folder);
            open(folder.join("libtorch_cuda.so").as_os_str()).map_err(missing)?;
            Ok(())
        }
    }
}

/// Opens what libtorch_cuda.so needs from its own folder, where that has it: a library that is already open is
/// not looked for, wherever the wheel says that it is. A failure shows when libtorch_cuda.so is opened.
fn preload(folder: &Path) {
    // Each behind the ones that it needs.
    const NEEDED: [&str; 17] = [
        "libcudart.so.13",
        "libnvJitLink.so.13",
        "libnvrtc.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcusparse.so.12",
        "libcusolver.so.12",
        "libcufft.so.12",
        "libcurand.so.10",
        "libcusparseLt.so.0",
        "libcufile.so.0",
        "libcudnn.so.9",
        "libnccl.so.2",
        "libnvshmem_host.so.3",
        "libc10_cuda.so",
        "libtorch_nvshmem.so",
        "libcaffe2_nvrtc.so",
    ];
    for name in NEEDED {
        let path = folder.join(name);
        if path.is_file()
            && let Err(reason) = open(path.as_os_str())
        {
            tracing::debug!(library = name, reason, "not opened ahead");
        }
    }
}

/// Opens takuma's own library, from memory, and gives its functions to the shim.
fn open_own() -> Result<(), CudaError> {
    static OPENED: OnceLock<Own> = OnceLock::new();
    if OPENED.get().is_some() {
        return Ok(());
    }
    let mismatch = |reason: String| CudaError::Mismatch { reason };
    let file = memory_file(OWN_LIBRARY).map_err(|error| mismatch(error.to_string()))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let library = open(OsStr::new(&path)).map_err(mismatch)?;
    let table: unsafe extern "C" fn() -> *const c_void =
        // SAFETY: the library's one function, built with this file.
        unsafe { std::mem::transmute(symbol(library, c"takuma_cuda_table").map_err(mismatch)?) };
    // SAFETY: a table that lives as long as the library, which is never closed; the shim checks its version.
    unsafe { check("cuda_install", ffi::takuma_cuda_install(table())) }
        .map_err(|error| mismatch(error.message))?;
    OPENED.get_or_init(|| Own { _file: file });
    Ok(())
}

/// Keeps the library's file: debuggers and profilers open it by its path.
struct Own {
    _file: OwnedFd,
}

fn memory_file(bytes: &[u8]) -> rustix::io::Result<OwnedFd> {
    let file = memfd_create("libtakuma_cuda.so", MemfdFlags::CLOEXEC)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = &rest[written..];
    }
    Ok(file)
}

/// Opens a library for all that are opened later; it stays open. The loader's words if it cannot.
fn open(name: &OsStr) -> Result<*mut c_void, String> {
    let name = CString::new(name.as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a NUL-terminated name; initialisers of NVIDIA's and libtorch's libraries run.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() { Err(reason()) } else { Ok(library) }
}

fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: a library that `open` returned, and a NUL-terminated name.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(reason()) } else { Ok(found) }
}

/// The loader's words about what just failed on this thread.
fn reason() -> String {
    // SAFETY: NULL or a string that stays until the thread's next call to the loader.
    unsafe {
        let message = libc::dlerror();
        if message.is_null() {
            "the loader gives no reason".to_owned()
        } else {
            CStr::from_ptr(message).to_string_lossy().into_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_numbers_its_versions_by_thousands_and_tens() {
        assert_eq!(version_of(13_000), (13, 0));
        assert_eq!(version_of(12_080), (12, 8));
    }

    #[test]
    fn folder_without_libraries_is_named_with_a_remedy() {
        if OWN_LIBRARY.is_empty() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let candidates = [folder.path().to_owned()];
        let Err(error) = open_libtorch(&candidates) else {
            panic!("LD_LIBRARY_PATH holds libtorch_cuda.so; run this test without");
        };
        let message = error.to_string();
        assert!(message.contains("setup-libtorch.sh"), "{message}");
        assert!(message.contains(&candidates[0].display().to_string()), "{message}");
    }
}
