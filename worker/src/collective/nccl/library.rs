//! NCCL and the CUDA runtime, found while the worker runs.
//!
//! cudarc has NCCL's types, and they are used here, but not its loader: that looks for `libnccl.so` and
//! numbers that are CUDA's, never for `libnccl.so.2`, which is what libtorch loads; and it panics when a
//! library or a function is missing. So the functions are looked up here, once, by the library's own name.
//! The dynamic loader answers with the copy that libtorch_cuda has loaded, if it has: two copies of NCCL in
//! one process would not know of each other.

use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void},
    fmt,
    sync::Arc,
};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::collective::CollectiveError;

/// The name by which libtorch_cuda asks for NCCL.
pub(super) const NCCL_NAME: &str = "libnccl.so.2";
/// The CUDA runtime that libtorch is linked with.
pub(super) const CUDART_NAME: &str = "libcudart.so.13";

/// The oldest NCCL whose declarations are those used here, as `ncclGetVersion` counts.
const OLDEST_VERSION: c_int = 22_800;
/// The first one that may have changed them.
const NEXT_MAJOR_VERSION: c_int = 30_000;

const LOADING: &str = "loading NCCL";
const LOADING_CUDA: &str = "loading the CUDA runtime";
const NCCL_REMEDY: &str = "it comes with the package nvidia-nccl-cu13 (2.28.9 goes with this libtorch); install that, and put the \
                           folder of libnccl.so.2 into LD_LIBRARY_PATH";
const CUDA_REMEDY: &str = "it comes with the package nvidia-cuda-runtime (13.0 goes with this libtorch); install that, and put the \
                           folder of libcudart.so.13 into LD_LIBRARY_PATH";

/// A result code as it comes over the wall. Not cudarc's enum: a number that a newer library adds would be
/// none of its values, and that is undefined.
pub(super) type Code = c_uint;

/// NCCL's functions. The names are NCCL's without the prefix.
pub struct NcclLibrary {
    version: c_int,
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    pub(super) comm_init_rank_config:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code,
    pub(super) comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut Code) -> Code,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> Code,
    pub(super) comm_finalize: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub(super) comm_destroy: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub(super) comm_abort: unsafe extern "C" fn(ncclComm_t) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    get_last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    /// Keeps the functions where they are.
    _library: Library,
}

/// The functions of the CUDA runtime that tell where a stream has come to, and a stream that its group is over.
pub struct CudaRuntime {
    pub(super) event_create_with_flags: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Code,
    pub(super) event_record: unsafe extern "C" fn(*mut c_void, cudaStream_t) -> Code,
    pub(super) event_query: unsafe extern "C" fn(*mut c_void) -> Code,
    pub(super) event_destroy: unsafe extern "C" fn(*mut c_void) -> Code,
    pub(super) get_last_error: unsafe extern "C" fn() -> Code,
    pub(super) thread_exchange_stream_capture_mode: unsafe extern "C" fn(*mut c_uint) -> Code,
    pub(super) host_alloc: unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> Code,
    /// Words of groups that are over, to be used again; see `ended.rs`.
    pub(super) spare_words: super::ended::SpareWords,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    /// Keeps the functions where they are.
    _library: Library,
}

impl NcclLibrary {
    /// The NCCL of this process: libtorch_cuda's, which should be loaded before, or else the one that the
    /// dynamic loader finds.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] with what to install, if there is none or it does not fit.
    pub fn open() -> Result<Arc<Self>, CollectiveError> {
        Self::open_at(NCCL_NAME.as_ref())
    }

    /// [`NcclLibrary::open`] for the library `name`: a path, or a name that the dynamic loader finds.
    ///
    /// # Errors
    /// As [`NcclLibrary::open`].
    pub fn open_at(name: &OsStr) -> Result<Arc<Self>, CollectiveError> {
        let shelf = Shelf::open(name, LOADING, NCCL_REMEDY)?;
        // SAFETY: the types are those of NCCL's header, with an int for its enum of results.
        unsafe {
            let get_version: unsafe extern "C" fn(*mut c_int) -> Code = shelf.function("ncclGetVersion")?;
            let mut version = 0;
            let code = get_version(&raw mut version);
            if code != 0 || !(OLDEST_VERSION..NEXT_MAJOR_VERSION).contains(&version) {
                let found = if code == 0 { words_of(version) } else { format!("unknown (error {code})") };
                return Err(shelf.unfit(&format!(
                    "its version is {found}, and takuma speaks {} up to the next major one",
                    words_of(OLDEST_VERSION)
                )));
            }
            Ok(Arc::new(Self {
                version,
                get_unique_id: shelf.function("ncclGetUniqueId")?,
                comm_init_rank_config: shelf.function("ncclCommInitRankConfig")?,
                comm_get_async_error: shelf.function("ncclCommGetAsyncError")?,
                all_reduce: shelf.function("ncclAllReduce")?,
                comm_finalize: shelf.function("ncclCommFinalize")?,
                comm_destroy: shelf.function("ncclCommDestroy")?,
                comm_abort: shelf.function("ncclCommAbort")?,
                get_error_string: shelf.function("ncclGetErrorString")?,
                get_last_error: shelf.function("ncclGetLastError")?,
                _library: shelf.library,
            }))
        }
    }

    /// The version as `ncclGetVersion` counts: 22809 is 2.28.9.
    #[must_use]
    pub fn version(&self) -> i32 {
        self.version
    }

    /// What `code` means, and what NCCL has to say of its last error on `comm` (or null).
    pub(super) fn words(&self, code: Code, comm: ncclComm_t) -> String {
        // SAFETY: both return strings that live as long as the library, or null.
        let (what, last) = unsafe {
            (text((self.get_error_string)(code)), text((self.get_last_error)(comm)).trim().to_owned())
        };
        if last.is_empty() {
            format!("{what} (NCCL {code})")
        } else {
            format!("{what} (NCCL {code}): {last}")
        }
    }
}

impl fmt::Debug for NcclLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {}", words_of(self.version))
    }
}

impl CudaRuntime {
    /// The CUDA runtime of this process, which libtorch is linked with.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] with what to install, if there is none or it does not fit.
    pub fn open() -> Result<Arc<Self>, CollectiveError> {
        Self::open_at(CUDART_NAME.as_ref())
    }

    /// [`CudaRuntime::open`] for the library `name`: a path, or a name that the dynamic loader finds.
    ///
    /// # Errors
    /// As [`CudaRuntime::open`].
    pub fn open_at(name: &OsStr) -> Result<Arc<Self>, CollectiveError> {
        let shelf = Shelf::open(name, LOADING_CUDA, CUDA_REMEDY)?;
        // SAFETY: the types are those of the runtime's header, with ints for its enums.
        unsafe {
            Ok(Arc::new(Self {
                event_create_with_flags: shelf.function("cudaEventCreateWithFlags")?,
                event_record: shelf.function("cudaEventRecord")?,
                event_query: shelf.function("cudaEventQuery")?,
                event_destroy: shelf.function("cudaEventDestroy")?,
                get_last_error: shelf.function("cudaGetLastError")?,
                thread_exchange_stream_capture_mode: shelf.function("cudaThreadExchangeStreamCaptureMode")?,
                host_alloc: shelf.function("cudaHostAlloc")?,
                spare_words: super::ended::SpareWords::default(),
                get_error_string: shelf.function("cudaGetErrorString")?,
                _library: shelf.library,
            }))
        }
    }

    /// What `code` means.
    pub(super) fn words(&self, code: Code) -> String {
        // SAFETY: returns a string that lives as long as the library, or null.
        let what = unsafe { text((self.get_error_string)(code)) };
        format!("{what} (CUDA {code})")
    }
}

impl fmt::Debug for CudaRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CudaRuntime")
    }
}

/// A library whose functions are being looked up.
struct Shelf<'a> {
    library: Library,
    name: &'a OsStr,
    operation: &'static str,
    remedy: &'static str,
}

impl<'a> Shelf<'a> {
    fn open(name: &'a OsStr, operation: &'static str, remedy: &'static str) -> Result<Self, CollectiveError> {
        // Local: other libraries name what they need of it themselves.
        // SAFETY: these libraries may be loaded at any time; they start nothing by themselves.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => Ok(Self { library, name, operation, remedy }),
            Err(error) => Err(CollectiveError::Local {
                operation: operation.into(),
                detail: format!("{} cannot be loaded ({error}); {remedy}", name.to_string_lossy()),
                source: None,
            }),
        }
    }

    fn unfit(&self, detail: &str) -> CollectiveError {
        CollectiveError::Local {
            operation: self.operation.into(),
            detail: format!("{} does not fit: {detail}; {}", self.name.to_string_lossy(), self.remedy),
            source: None,
        }
    }

    /// The function `name`.
    ///
    /// # Safety
    /// `F` is its type, and is not called after the library was dropped.
    unsafe fn function<F: Copy>(&self, name: &str) -> Result<F, CollectiveError> {
        // SAFETY: the caller answers for the type.
        match unsafe { self.library.get::<F>(name.as_bytes()) } {
            Ok(function) => Ok(*function),
            Err(_) => Err(self.unfit(&format!("it has no function {name}"))),
        }
    }
}

/// `22809` as `2.28.9`.
pub(super) fn words_of(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// # Safety
/// `text` is null or a C string that lives.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, so it is a string, as the caller promises.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::nccl::fake;

    /// A library of one line.
    fn library(name: &str, source: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fake::compile("c", source, &path);
        folder
    }

    fn refusal(folder: &tempfile::TempDir) -> String {
        let error = NcclLibrary::open_at(folder.path().join(NCCL_NAME).as_os_str()).unwrap_err();
        assert!(matches!(error, CollectiveError::Local { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn missing_library_is_told_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = refusal(&folder);
        assert!(refusal.contains("cannot be loaded") && refusal.contains("nvidia-nccl-cu13"), "{refusal}");
    }

    #[test]
    fn missing_function_is_told_by_name() {
        let folder = library(NCCL_NAME, "int ncclGetVersion(int *v) { *v = 22809; return 0; }");
        let refusal = refusal(&folder);
        assert!(refusal.contains("it has no function ncclGetUniqueId"), "{refusal}");
        assert!(refusal.contains("nvidia-nccl-cu13"), "{refusal}");
    }

    #[test]
    fn version_that_does_not_fit_is_told() {
        for (version, words) in [(21_602, "2.16.2"), (30_000, "3.0.0")] {
            let source = format!("int ncclGetVersion(int *v) {{ *v = {version}; return 0; }}");
            let refusal = refusal(&library(NCCL_NAME, &source));
            assert!(refusal.contains(&format!("its version is {words}")), "{refusal}");
        }
    }

    /// `TAKUMA_NCCL_WHEEL` names the folder of a real libnccl.so.2.
    #[test]
    #[ignore = "needs a real NCCL, named by TAKUMA_NCCL_WHEEL"]
    fn real_library_is_found() {
        let folder = std::env::var_os("TAKUMA_NCCL_WHEEL").unwrap();
        let by_path =
            NcclLibrary::open_at(std::path::Path::new(&folder).join(NCCL_NAME).as_os_str()).unwrap();
        // Loaded by path before, it is found by name: one copy.
        let by_name = NcclLibrary::open().unwrap();
        assert_eq!(by_path.version(), by_name.version());
        assert!(std::ptr::fn_addr_eq(by_path.all_reduce, by_name.all_reduce));
        println!("{by_name:?}");
    }
}
