//! What this machine has: takuma's programs, libtorch, devices, processors, memory.

use std::path::Path;

use super::Check;
use crate::devices::{self, Answer, DeviceReport, DeviceView};
use crate::local::find;
use crate::output;

/// The version that the worker is built for: another one's functions have other shapes.
const LIBTORCH_VERSION: &str = "2.11.0";
/// What a worker of dcgan-celeba holds on a processor, with the operating system's part.
const MEMORY_MIN_BYTES: u64 = 2 << 30;
/// NCCL's buffers between the GPUs of one machine, with room to spare; Docker's default of 64 MB is too little.
const SHM_MIN_BYTES: u64 = 512 << 20;

/// Checks the programs, and what the worker says of libtorch and of the devices.
pub(super) async fn programs() -> Vec<Check> {
    let mut checks = vec![coordinator_program()];
    let path = match find("takuma-worker") {
        Ok(path) => path,
        Err(error) => {
            checks.push(Check::failed("worker", &error.to_string()));
            return checks;
        }
    };
    let (worker, runs) = worker_program(&path).await;
    checks.push(worker);
    if runs {
        match devices::query(&path).await {
            Ok(Answer::Devices(report)) => checks.extend(report_checks(&report)),
            Ok(Answer::Unknown) => {
                let message = format!("{} cannot be asked for its devices", path.display());
                checks.push(Check::error("devices", message, "build takuma and takuma-worker together"));
            }
            Err(error) => checks.push(Check::failed("devices", &error.to_string())),
        }
    }
    checks
}

/// Needed where the coordinator is to run, which may be elsewhere.
fn coordinator_program() -> Check {
    match find("takuma-coordinator") {
        Ok(path) => Check::ok("coordinator", path.display().to_string()),
        Err(_) => Check::warning(
            "coordinator",
            "there is no takuma-coordinator beside takuma",
            "'takuma up' needs it; a machine that only joins a cluster does not",
        ),
    }
}

/// The worker's program, and whether it runs at all.
async fn worker_program(path: &Path) -> (Check, bool) {
    let own = env!("CARGO_PKG_VERSION");
    let output = match devices::ask(path, &["--version"]).await {
        Ok(output) => output,
        Err(error) => return (Check::failed("worker", &error.to_string()), false),
    };
    if !output.status.success() {
        // Before its first statement the loader looks for libtorch, and says what it misses.
        let message = format!("{} does not run: {}", path.display(), devices::last_words(&output));
        let remedy =
            "build it here with 'make build', or put libtorch's libraries into ../lib/takuma beside it";
        return (Check::error("worker", message, remedy), false);
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_whitespace().last().unwrap_or_default();
    if version == own {
        return (Check::ok("worker", format!("{}, version {own}", path.display())), true);
    }
    let message = format!("{} is version '{version}', this takuma is {own}", path.display());
    (Check::error("worker", message, "build takuma and takuma-worker together"), true)
}

/// libtorch, CUDA, and one line a device.
fn report_checks(report: &DeviceReport) -> Vec<Check> {
    let mut checks = vec![libtorch(report), cuda(report)];
    checks.extend(report.devices.iter().map(device));
    let usable = report.devices.iter().filter(|device| device.usable && device.gpu().is_some()).count();
    if usable > 1 {
        checks.extend(shared_memory());
    }
    checks
}

fn libtorch(report: &DeviceReport) -> Check {
    // "2.11.0+cu130": behind the plus stands what it was built for.
    let version = report.libtorch.split('+').next().unwrap_or_default();
    if version == LIBTORCH_VERSION {
        return Check::ok("libtorch", report.libtorch.clone());
    }
    let message = format!("version '{}' is loaded, but {LIBTORCH_VERSION} is needed", report.libtorch);
    Check::error(
        "libtorch",
        message,
        "build with 'make build', and set no LD_LIBRARY_PATH to another libtorch",
    )
}

fn cuda(report: &DeviceReport) -> Check {
    let cuda = &report.cuda;
    let gpus = report.devices.iter().any(|device| device.gpu().is_some());
    match (&cuda.error, &cuda.driver) {
        (Some(error), driver) if gpus || driver.is_some() => Check::failed("cuda", error),
        (_, None) if !gpus => Check::ok("cuda", "no NVIDIA driver here, so workers compute on the processor"),
        _ => {
            let known = |version: &Option<String>| version.clone().unwrap_or_else(|| "unknown".to_owned());
            let (driver, runtime) = (known(&cuda.driver), known(&cuda.runtime));
            Check::ok("cuda", format!("driver {driver}, runtime {runtime}, libraries {}", cuda.libraries))
        }
    }
}

fn device(device: &DeviceView) -> Check {
    if !device.usable {
        let reason = device.reason.as_deref().unwrap_or("not usable, and the worker does not say why");
        return Check::failed(&device.name, &format!("{}: {reason}", device.description));
    }
    let threads = device.threads.map(|threads| output::count(threads.into(), "thread"));
    let capability = device.capability.as_ref().map(|capability| format!("compute capability {capability}"));
    let memory = device.memory_bytes.map(output::bytes);
    let parts = [Some(device.description.clone()), threads, capability, memory];
    Check::ok(&device.name, parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// Processors and memory.
pub(super) fn resources() -> Vec<Check> {
    let processors = match std::thread::available_parallelism() {
        Ok(count) => Check::ok("processors", format!("{count} for this process")),
        Err(error) => Check::failed("processors", &format!("cannot be counted: {error}")),
    };
    [Some(processors), memory()].into_iter().flatten().collect()
}

fn memory() -> Option<Check> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let (available, total) = (meminfo(&text, "MemAvailable:")?, meminfo(&text, "MemTotal:")?);
    let message = format!("{} of {} available", output::bytes(available), output::bytes(total));
    if available >= MEMORY_MIN_BYTES {
        return Some(Check::ok("memory", message));
    }
    let remedy = format!("a worker needs about {}; end other programs", output::bytes(MEMORY_MIN_BYTES));
    Some(Check::warning("memory", message, remedy))
}

/// A line of /proc/meminfo in bytes.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Where NCCL exchanges between the GPUs of one machine.
fn shared_memory() -> Option<Check> {
    let found = rustix::fs::statvfs("/dev/shm").ok()?;
    let free = found.f_bavail * found.f_frsize;
    let message = format!("{} free in /dev/shm", output::bytes(free));
    if free >= SHM_MIN_BYTES {
        return Some(Check::ok("shm", message));
    }
    let remedy = "NCCL needs more between several GPUs: start the container with --shm-size 1g or --ipc host";
    Some(Check::warning("shm", message, remedy))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn report(json: &str) -> DeviceReport {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn fields_of_a_newer_worker_are_passed_over_and_missing_ones_are_empty() {
        let report =
            report(r#"{"libtorch":"2.11.0+cu130","new":1,"devices":[{"name":"cpu","usable":true,"x":[]}]}"#);
        let checks = report_checks(&report);
        assert!(checks.iter().all(|check| check.status == Status::Ok), "{checks:?}");
    }

    #[test]
    fn another_libtorch_is_an_error() {
        let check = libtorch(&report(r#"{"libtorch":"2.10.1"}"#));
        assert_eq!(check.status, Status::Error);
        assert!(check.message.contains("'2.10.1'") && check.message.contains(LIBTORCH_VERSION), "{check:?}");
    }

    #[test]
    fn driver_without_libraries_is_an_error_and_no_driver_is_none() {
        let check = cuda(&report(
            r#"{"cuda":{"libraries":"missing","driver":"580.65","error":"CUDA's libraries are missing; build with TAKUMA_CUDA=1"}}"#,
        ));
        assert_eq!(
            (check.status, check.remedy.as_deref()),
            (Status::Error, Some("build with TAKUMA_CUDA=1"))
        );
        let check = cuda(&report(r#"{"cuda":{"libraries":"missing","driver":null,"error":"no driver"}}"#));
        assert_eq!(check.status, Status::Ok, "{check:?}");
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       16384 kB\nMemFree:            1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(meminfo(text, "Other:"), None);
    }
}
