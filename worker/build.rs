//! Compiles the C++ shim (`torch/`) against libtorch's headers and tells the linker where libtorch is.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
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

    let common = |build: &mut cc::Build| {
        build.cpp(true).std("c++17").opt_level(3).warnings(false).define("_GLIBCXX_USE_CXX11_ABI", "1");
        // at::parallel_for is a template: without this flag its loops run on one thread.
        build.flag("-fopenmp");
    };
    let mut shim = cc::Build::new();
    common(&mut shim);
    shim.include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("torch/autograd.cpp")
        .file("torch/batch_norm.cpp")
        .file("torch/finite.cpp")
        .compile("takuma_shim");

    kernels(&common, "baseline", &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        kernels(&common, "avx2", &["-mavx2", "-mfma"]);
    } else {
        kernels(&common, "avx2", &[]);
    }
    link(&libtorch.join("lib"));
}

/// One build of the batch-norm loops for one instruction set.
fn kernels(common: &dyn Fn(&mut cc::Build), isa: &str, flags: &[&str]) {
    let mut build = cc::Build::new();
    common(&mut build);
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
