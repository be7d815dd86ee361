//! Loading CUDA, in a process of its own: libtorch decides once whether it has it.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]
#![allow(clippy::print_stderr, reason = "what is skipped is said")]

use std::path::PathBuf;

use takuma_worker::torch::cuda::{self, CudaError};

/// Where libtorch's CUDA libraries are, if they were fetched.
fn libraries() -> Option<PathBuf> {
    let folders = [
        std::env::var_os("TAKUMA_CUDA_LIBRARIES").map(PathBuf::from),
        std::env::var_os("LIBTORCH").map(|libtorch| PathBuf::from(libtorch).join("cuda")),
    ];
    folders.into_iter().flatten().find(|folder| folder.join("libtorch_cuda.so").is_file())
}

#[test]
fn cuda_is_loaded_where_it_is_and_its_absence_named() {
    assert!(matches!(cuda::devices(), Err(CudaError::NotLoaded)));
    match cuda::load(&libraries().into_iter().collect::<Vec<_>>()) {
        Ok(()) => {
            let devices = cuda::devices().unwrap();
            assert!(!devices.is_empty());
            assert!(cuda::versions().unwrap().runtime.0 == 13);
            cuda::select(0, cuda::Precision::Tf32, false).unwrap();
            cuda::synchronize().unwrap();
        }
        Err(CudaError::NotBuilt) => eprintln!("SKIPPED: built without the CUDA headers"),
        Err(error @ (CudaError::DriverMissing { .. } | CudaError::NoDevice)) => {
            assert!(!cuda::is_loaded());
            let message = error.to_string();
            assert!(message.contains("--device cpu"), "{message}");
            fit_without_a_driver();
        }
        Err(error) => panic!("{error}"),
    }
}

/// The libraries fit to each other, also where there is no GPU to use them with.
fn fit_without_a_driver() {
    let Some(folder) = libraries() else {
        eprintln!("SKIPPED: libtorch's CUDA libraries were not fetched; nothing was loaded");
        return;
    };
    cuda::open_libraries(&[folder]).unwrap();
    // The table is in place: the runtime answers, with its own word for the missing driver.
    let error = cuda::stream().unwrap_err();
    assert!(error.message.contains("driver"), "{error}");
}
