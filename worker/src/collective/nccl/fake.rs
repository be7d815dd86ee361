//! The tests' libnccl over host memory (`worker/tests/fake_nccl`), built when the first test needs it.

use std::{
    ffi::{c_int, c_uint, c_void},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use libloading::Library;

use super::{CudaRuntime, Nccl, NcclConfig, NcclLibrary};
use crate::{
    collective::{
        CollectiveError, DeviceCollective, DeviceKind, DeviceValues, HostStream, RingConfig,
        contract::{form as form_rings, together},
    },
    supervise,
};

const SOURCE: &str = include_str!("../../../tests/fake_nccl/fake_nccl.cpp");
/// Tells child processes where the parent has built it.
pub(super) const PATH_VARIABLE: &str = "TAKUMA_TEST_FAKE_NCCL";

/// Kinds of fault, as in the C++.
pub(crate) const HANG_INIT: c_uint = 1;
pub(super) const HANG_SUMS: c_uint = 2;
pub(super) const HANG_ABORT: c_uint = 4;
pub(super) const HANG_FINALIZE: c_uint = 8;

/// Compiles `source` into the library `path`.
pub(in crate::collective) fn compile(language: &str, source: &str, path: &Path) {
    let mut compiler = Command::new("c++")
        .args(["-O1", "-shared", "-fPIC", "-pthread", "-x", language, "-", "-o"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    compiler.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    assert!(compiler.wait().unwrap().success());
}

/// The library's path. Its folder stays until the system cleans up: processes may still load from it.
pub(super) fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os(PATH_VARIABLE) {
            return path.into();
        }
        let path = tempfile::tempdir().unwrap().keep().join("libfake_nccl.so");
        compile("c++", SOURCE, &path);
        path
    })
}

/// The usual configuration over the fake.
pub(crate) fn config() -> NcclConfig {
    let path = path().as_os_str();
    NcclConfig::new(NcclLibrary::open_at(path).unwrap(), CudaRuntime::open_at(path).unwrap())
}

/// Calls a function of the fake that takes `arguments` of these types.
macro_rules! call {
    ($name:literal ($($argument:expr => $type:ty),*) $(-> $result:ty)?) => {{
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        // SAFETY: the fake, whose functions have these types.
        unsafe {
            let library = LIBRARY.get_or_init(|| Library::new(path()).unwrap());
            library.get::<unsafe extern "C" fn($($type),*) $(-> $result)?>($name).unwrap()($($argument),*)
        }
    }};
}

/// The next communicator that this thread begins has these faults.
pub(crate) fn next_comm(faults: c_uint) {
    call!(b"fake_next_comm"(faults => c_uint));
}

impl Nccl {
    /// Gives the communicator these faults.
    pub(super) fn set_faults(&self, faults: c_uint) {
        call!(b"fake_set_faults"(self.shared().comm.handle() => *mut c_void, faults => c_uint));
    }

    /// The communicator finds an error of this number by itself.
    pub(super) fn set_error(&self, error: c_int) {
        call!(b"fake_set_error"(self.shared().comm.handle() => *mut c_void, error => c_int));
    }

    /// From its sum number `sum` on, from 1, this rank takes part in none: its GPU hangs.
    pub(crate) fn hang_at(&self, sum: u64) {
        call!(b"fake_hang_at"(self.shared().comm.handle() => *mut c_void, sum => u64));
    }

    /// Ends the sums of all ranks at once with values that mean nothing, as a rank's may be whose peer was told to end.
    pub(crate) fn rush(&self) {
        call!(b"fake_rush"(self.shared().comm.handle() => *mut c_void));
    }

    /// Tells this rank's device that the group is over, as the watchdog does before it ends the communicator.
    pub(crate) fn tell_device(&self) {
        self.shared().ended.set();
    }

    /// Sums of this rank so far.
    pub(crate) fn begun(&self) -> u64 {
        self.shared().begun()
    }

    /// Cuts this rank off from its group, as if its process were killed.
    pub(crate) fn vanish(&self) {
        self.shared().ring.vanish();
    }

    pub(super) fn shared(&self) -> &Arc<super::Shared> {
        match &self.group {
            super::Group::Many { shared, .. } => shared,
            super::Group::Alone(_) => panic!("a group of one has no communicator"),
        }
    }
}

/// A stream of the fake.
#[derive(Debug)]
pub(in crate::collective) struct Stream(*mut c_void);

// SAFETY: the fake's streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(in crate::collective) fn new() -> Self {
        Self(call!(b"fake_stream_create"() -> *mut c_void))
    }

    /// While it is blocked it does nothing, as if a kernel did not end.
    pub(super) fn block(&self, is_blocked: bool) {
        call!(b"fake_stream_block"(self.0 => *mut c_void, c_int::from(is_blocked) => c_int));
    }

    /// Enqueues the sum of `values`, which are `bytes` long each.
    pub(super) fn sum<T>(
        &self,
        group: &Nccl,
        values: &mut [T],
        kind: DeviceKind,
    ) -> Result<(), CollectiveError> {
        assert_eq!(size_of::<T>(), kind.bytes());
        let values = DeviceValues { ptr: values.as_mut_ptr().cast(), len: values.len(), kind };
        // SAFETY: the tests settle before they touch the values again.
        unsafe { group.all_reduce_on_device(values, self.0) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        call!(b"fake_stream_destroy"(self.0 => *mut c_void));
    }
}

impl HostStream for Stream {
    fn stream(&self) -> *mut c_void {
        self.0
    }

    fn wait(&self) {
        call!(b"fake_stream_wait"(self.0 => *mut c_void));
    }
}

/// Groups of `world` ranks over the fake whose GPUs are the processors that compute.
pub(crate) fn form_on_hosts(world: usize, timeout: Duration) -> Vec<Nccl> {
    let config = NcclConfig { host_stream: Some(|| Box::new(Stream::new())), ..config() };
    form_with(&config, world, |config| config.timeout = timeout)
}

/// Groups of `world` ranks over the fake.
pub(in crate::collective) fn form(world: usize, adjust: impl Fn(&mut RingConfig) + Sync) -> Vec<Nccl> {
    form_with(&config(), world, adjust)
}

pub(super) fn form_with(
    config: &NcclConfig,
    world: usize,
    adjust: impl Fn(&mut RingConfig) + Sync,
) -> Vec<Nccl> {
    together(form_rings(world, adjust), |ring| Nccl::form(ring, config).unwrap())
}

/// One test of this program, which is ignored otherwise, in a process of its own that has the fake.
pub(super) fn child(test: &str) -> Command {
    let mut command = supervise::tests::program(test);
    command.env(PATH_VARIABLE, path());
    command
}
