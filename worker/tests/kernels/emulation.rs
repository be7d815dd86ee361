//! The emulation of `emulate.cpp`, and memory that shows who writes beside it.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tch::{Device, Kind, Tensor};

#[repr(C)]
pub struct EmulatedNorm {
    pub kind: i64,
    pub rows: i64,
    pub channels: i64,
    pub groups: i64,
    pub lanes: i64,
    pub count: f64,
    pub eps: f64,
    pub slope: f64,
    pub weight: *const c_void,
    pub bias: *const c_void,
    pub sum_factor: f64,
    pub stats: *mut c_void,
    pub x: *const *mut c_void,
    pub dy: *const *mut c_void,
    pub y: *const *mut c_void,
    pub dx: *const *mut c_void,
    pub dweight: *const *mut c_void,
    pub dbias: *const *mut c_void,
}

#[repr(C)]
pub struct EmulatedValues {
    pub data: *const c_void,
    pub elements: i64,
    pub kind: i64,
}

#[repr(C)]
pub struct EmulatedLayer {
    pub mean: *mut c_void,
    pub variance: *mut c_void,
    pub batch: *const c_void,
    pub unbiased: f64,
    pub channels: i64,
    pub groups: i64,
    pub kind: i64,
}

/// The emulation's functions. One caller at a time: a GPU's threads are globals there.
pub struct Emulation {
    pub norm: unsafe extern "C" fn(*const EmulatedNorm),
    pub vouch: unsafe extern "C" fn(*const u32, *const c_void, f64, f64, f64, *mut c_void),
    pub guard: unsafe extern "C" fn(
        *const EmulatedValues,
        i64,
        *const EmulatedValues,
        *const u32,
        *mut c_void,
        *mut c_void,
        i32,
        *mut c_void,
        *mut c_void,
    ),
    pub commit: unsafe extern "C" fn(*const EmulatedLayer, i64, f64, *const c_void),
    pub gather: unsafe extern "C" fn(*const c_void, i64, i64, *const c_void, i64, *mut c_void, i64),
    pub kernels: unsafe extern "C" fn() -> *const c_char,
    pub compiled: unsafe extern "C" fn(*const c_char, *const c_char, i32, *mut c_char, usize) -> i32,
}

pub fn emulation() -> MutexGuard<'static, Emulation> {
    static EMULATION: OnceLock<Mutex<Emulation>> = OnceLock::new();
    EMULATION.get_or_init(|| Mutex::new(Emulation::build())).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Emulation {
    #[allow(clippy::missing_transmute_annotations, reason = "the fields have the types")]
    fn build() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libemulation.so");
        let worker = Path::new(env!("CARGO_MANIFEST_DIR"));
        let status = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
            .args(["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-I"])
            .arg(worker.join("torch/cuda"))
            .arg(worker.join("tests/kernels/emulate.cpp"))
            .args(["plan.cpp", "nvrtc.cpp"].map(|file| worker.join("torch/cuda").join(file)))
            .arg("-o")
            .arg(&library)
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(status.success(), "the kernels do not compile as C++");
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: the library was just built from this repository; each name has the type it is given here.
        unsafe {
            let open = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!open.is_null(), "{:?}", CStr::from_ptr(libc::dlerror()));
            let symbol = |name: &CStr| {
                let found = libc::dlsym(open, name.as_ptr());
                assert!(!found.is_null(), "{name:?}");
                found
            };
            Self {
                norm: std::mem::transmute(symbol(c"emulated_norm")),
                vouch: std::mem::transmute(symbol(c"emulated_vouch")),
                guard: std::mem::transmute(symbol(c"emulated_guard")),
                commit: std::mem::transmute(symbol(c"emulated_commit")),
                gather: std::mem::transmute(symbol(c"emulated_gather")),
                kernels: std::mem::transmute(symbol(c"emulated_kernels")),
                compiled: std::mem::transmute(symbol(c"compiled")),
            }
        }
    }
}

/// As in `torch/cuda/kernel_types.h`.
pub fn number(kind: Kind) -> i64 {
    match kind {
        Kind::Float => 0,
        Kind::Double => 1,
        Kind::BFloat16 => 2,
        other => panic!("no kernel takes {other:?}"),
    }
}

/// Values that spread around 0, the same in each run.
pub fn values(shape: &[i64], seed: i64, kind: Kind) -> Tensor {
    let len: i64 = shape.iter().product();
    let at = Tensor::arange(len, (Kind::Double, Device::Cpu)) + (seed * 1013) as f64;
    ((&at * 12.9898).sin() + (&at * 0.711).cos()).to_kind(kind).view(shape)
}

/// A dense tensor `offset` elements into its memory and with some behind its end, all of that 77.
pub struct Fenced {
    pub memory: Tensor,
    pub offset: i64,
    pub shape: Vec<i64>,
}

impl Fenced {
    const FENCE: i64 = 64;

    pub fn new(shape: &[i64], offset: i64, kind: Kind) -> Self {
        let len: i64 = shape.iter().product();
        let memory = Tensor::full([offset + len + Self::FENCE], 77.0, (kind, Device::Cpu));
        Self { memory, offset, shape: shape.to_owned() }
    }

    pub fn of(values: &Tensor, offset: i64) -> Self {
        let fenced = Self::new(&values.size(), offset, values.kind());
        fenced.tensor().copy_(values);
        fenced
    }

    pub fn tensor(&self) -> Tensor {
        let len = self.shape.iter().product();
        self.memory.narrow(0, self.offset, len).view(self.shape.as_slice())
    }

    pub fn pointer(&self) -> *mut c_void {
        self.tensor().data_ptr()
    }

    pub fn check(&self, name: &str) {
        let len: i64 = self.shape.iter().product();
        for (first, count) in [(0, self.offset), (self.offset + len, Self::FENCE)] {
            let rest = self.memory.narrow(0, first, count);
            assert_eq!(rest.ne(77.0).sum(Kind::Int64).int64_value(&[]), 0, "{name} was left");
        }
    }
}
