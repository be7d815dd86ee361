//! The device suite: what only a GPU can show. Without one each test says that it was skipped; where a GPU must
//! be there, TAKUMA_DEVICE_SUITE=required makes that a failure. `.ci/gpu.sh` runs it on a GPU machine.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what fails in a helper fails the test; it prints a table"
)]

mod exact;
mod group;
mod kernels;
#[path = "../common/processes.rs"]
mod processes;
mod speed;
#[path = "../common/training.rs"]
mod support;
mod training;

use std::io::Write;
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};

use takuma_worker::device::DeviceChoice;
use takuma_worker::torch::cuda::{Precision, select};
use tch::Device;

/// One test at a time: they measure, and share one card and the process' switches.
static TURN: Mutex<()> = Mutex::new(());

/// The GPU, made ready for the calling thread; nothing, and a word about it, if there is none.
fn gpu(test: &str, precision: Precision, deterministic: bool) -> Option<(Device, MutexGuard<'static, ()>)> {
    static OPENED: OnceLock<Result<Device, String>> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = OPENED.get_or_init(|| DeviceChoice::Cuda(None).open().map_err(|error| error.to_string()));
    match opened {
        Ok(Device::Cuda(index)) => Some((select(*index as u32, precision, deterministic).unwrap(), turn)),
        Ok(_) => unreachable!("a GPU was asked for"),
        Err(reason) => {
            let required = std::env::var("TAKUMA_DEVICE_SUITE").is_ok_and(|value| value == "required");
            assert!(!required, "{test}: {reason}");
            // Past the test harness, which shows nothing of a test that passes.
            static TOLD: Once = Once::new();
            let mut out = std::io::stderr();
            TOLD.call_once(|| drop(writeln!(out, "\nthe device suite needs a GPU: {reason}")));
            drop(writeln!(out, "skipped: {test}"));
            None
        }
    }
}

/// A line of the suite's table.
fn row(check: &str, figure: &str) {
    // The harness has begun a line.
    println!("\n| {check} | {figure} |");
}
