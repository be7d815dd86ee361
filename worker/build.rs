//! Compiles the C++ shim (`torch/`) against libtorch's headers and tells the linker where libtorch is. Where the CUDA
//! headers are too, it makes the shim's CUDA library, which the binary carries and opens at run time.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The shim's CUDA library (`torch/cuda/`).
const CUDA_SOURCES: [&str; 7] = [
    "torch/cuda/device.cpp",
    "torch/cuda/graph.cpp",
    "torch/cuda/library.cpp",
    "torch/cuda/modules.cpp",
    "torch/cuda/nvrtc.cpp",
    "torch/cuda/plan.cpp",
    "torch/cuda/tensors.cpp",
];

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=TAKUMA_CUDA_INCLUDE");
    println!("cargo:rerun-if-changed=torch");
    let Some(libtorch) = env::var_os("LIBTORCH").map(PathBuf::from) else {
        panic!("LIBTORCH is not set; run `make build`, which fetches libtorch and sets it");
    };
    let include = libtorch.join("include");
    assert!(
        include.is_dir(),
        "there is no libtorch in {}; run `make build`, which fetches it",
        libtorch.display()
    );

    let mut shim = common();
    // at::parallel_for is a template: without this flag its loops run on one thread.
    shim.flag("-fopenmp")
        // A product and a sum are two roundings wherever the same number is computed elsewhere too.
        .flag("-ffp-contract=off")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("torch/autograd.cpp")
        .file("torch/batch_norm.cpp")
        .file("torch/cuda.cpp")
        .file("torch/images.cpp")
        .file("torch/statistics.cpp")
        .file("torch/update.cpp")
        .compile("takuma_shim");

    kernels("baseline", &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        kernels("avx2", &["-mavx2", "-mfma"]);
    } else {
        kernels("avx2", &[]);
    }
    cuda_library(&libtorch, &include);
    link(&libtorch.join("lib"));
}

/// What all C++ here is compiled with.
fn common() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).warnings(false).define("_GLIBCXX_USE_CXX11_ABI", "1");
    build
}

/// One build of the batch-norm loops for one instruction set.
fn kernels(isa: &str, flags: &[&str]) {
    let mut build = common();
    build.flag("-fopenmp");
    for flag in flags {
        build.flag(flag);
    }
    build
        // Nobody reads the floating-point exception flags, and keeping them exact forbids blends.
        .flag("-fno-trapping-math")
        .define("TAKUMA_ISA", isa)
        .file("torch/batch_norm_kernels.cpp")
        .compile(&format!("takuma_kernels_{isa}"));
}

/// Leaves `libtakuma_cuda.so` in the output folder: empty where the CUDA headers are not.
fn cuda_library(libtorch: &Path, include: &Path) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libtakuma_cuda.so");
    let headers =
        env::var_os("TAKUMA_CUDA_INCLUDE").map_or_else(|| libtorch.join("cuda-include"), PathBuf::from);
    println!("cargo:rerun-if-changed={}", headers.display());
    println!("cargo:rustc-env=TAKUMA_BUILT_CUDA_LIBRARIES={}", libtorch.join("cuda").display());
    if !headers.join("cuda_runtime_api.h").is_file() {
        println!(
            "cargo:warning=no CUDA headers in {}: the worker is built for the processor alone",
            headers.display()
        );
        fs::write(&library, b"").expect("the output folder can be written");
        return;
    }
    let mut build = common();
    build
        .pic(true)
        // Its one exported function says so; nothing else in it may meet a name of libtorch's.
        .flag("-fvisibility=hidden")
        .include(include)
        .include(headers)
        .files(CUDA_SOURCES)
        .file(kernel_source(&out));
    let objects = build.compile_intermediates();
    // Names of libtorch and CUDA stay open: the libraries that have them are there when it is opened.
    let mut link = build.get_compiler().to_command();
    link.args(["-shared", "-s", "-o"]).arg(&library).args(&objects);
    run(&mut link);
}

/// What the kernels are made of, in this order.
const KERNEL_SOURCES: [&str; 5] = [
    "torch/cuda/kernel_types.h",
    "torch/cuda/numbers.cu",
    "torch/cuda/batch_norm.cu",
    "torch/cuda/images.cu",
    "torch/cuda/update.cu",
];

/// The text of the kernels as a C++ file, for the compiler that runs where the GPU is.
fn kernel_source(out: &Path) -> PathBuf {
    let text: String = KERNEL_SOURCES
        .map(|path| fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}")))
        .concat();
    let file = out.join("kernel_source.cpp");
    let code = format!(
        "extern const char takuma_kernel_source[];\nconst char takuma_kernel_source[] = R\"takuma({text})takuma\";\n"
    );
    fs::write(&file, code).expect("the output folder can be written");
    file
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// The binary finds libtorch where it was built, and beside itself where it was copied to.
fn link(lib: &Path) {
    println!("cargo:rustc-link-search=native={}", lib.display());
    // libtorch's own OpenMP runtime; a second one in the process would fight it for cores.
    println!("cargo:rustc-link-lib=dylib=gomp");
    for rpath in ["$ORIGIN/../lib/takuma", "$ORIGIN"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{rpath}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
