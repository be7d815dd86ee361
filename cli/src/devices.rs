//! What this machine computes on, as its `takuma-worker` sees it, and which worker gets what of it.
//!
//! Only the worker links libtorch, so only it can say whether a GPU is usable.

use std::fmt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::error::CliError;
use crate::output::{self, Tone, visible};

/// Loading libtorch with CUDA takes half a minute from a cold disk, and each GPU is asked for once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// How the worker's own command line says that it does not know the question.
const UNKNOWN_COMMAND: i32 = 2;

/// What a worker computes on: `--device`, the same on every command that starts workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The worker decides: a GPU where there is one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU: the one of that number, or any.
    Cuda(Option<u32>),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Ok(Self::Cuda(Some(number))),
                _ => Err("give auto, cpu, cuda, or cuda:N".to_owned()),
            },
        }
    }
}

/// How many workers to start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WorkerCount {
    /// One a usable GPU; the command's own number where there is none.
    #[default]
    Auto,
    /// So many.
    Given(u32),
}

impl WorkerCount {
    /// More on one machine than anybody means.
    const MAX: u32 = 256;
}

impl fmt::Display for WorkerCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Given(number) => number.fmt(f),
        }
    }
}

impl FromStr for WorkerCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(number)) if (1..=Self::MAX).contains(&number) => Ok(Self::Given(number)),
            _ => Err(format!("give auto, or a number between 1 and {}", Self::MAX)),
        }
    }
}

/// The answer of `takuma-worker devices --json`. What a newer worker adds to it is passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeviceReport {
    /// Version of libtorch.
    pub libtorch: String,
    /// What there is of CUDA.
    pub cuda: CudaReport,
    /// The processor, then every GPU.
    pub devices: Vec<DeviceView>,
}

/// CUDA on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CudaReport {
    /// libtorch's CUDA libraries: `found` or `missing`.
    pub libraries: String,
    /// Version of the driver; none = there is no driver.
    pub driver: Option<String>,
    /// Version of the CUDA runtime.
    pub runtime: Option<String>,
    /// Why GPUs cannot be used, with the remedy.
    pub error: Option<String>,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeviceView {
    /// `cpu`, `cuda:0`.
    pub name: String,
    /// Its maker's words.
    pub description: String,
    /// Of a processor: its threads.
    pub threads: Option<u32>,
    /// Of a GPU: its compute capability.
    pub capability: Option<String>,
    /// Of a GPU: its memory.
    pub memory_bytes: Option<u64>,
    /// Whether a worker can train on it.
    pub usable: bool,
    /// Why not, with the remedy.
    pub reason: Option<String>,
}

impl DeviceView {
    /// A GPU's number.
    #[must_use]
    pub fn gpu(&self) -> Option<u32> {
        self.name.strip_prefix("cuda:")?.parse().ok()
    }

    fn why_not(&self) -> String {
        let reason = self.reason.as_deref().unwrap_or("the worker does not say why");
        format!("{} cannot be used: {}", visible(&self.name), visible(reason))
    }
}

impl DeviceReport {
    /// Numbers of the GPUs that a worker can train on.
    fn usable_gpus(&self) -> Vec<u32> {
        self.devices.iter().filter(|device| device.usable).filter_map(DeviceView::gpu).collect()
    }

    /// What is wrong with GPUs that are here, one sentence each. A machine without any has nothing wrong.
    #[must_use]
    pub fn gpu_troubles(&self) -> Vec<String> {
        let gpus = || self.devices.iter().filter(|device| device.gpu().is_some());
        let present = self.cuda.driver.is_some() || gpus().next().is_some();
        let general = self.cuda.error.as_deref().filter(|_| present).map(visible);
        general.into_iter().chain(gpus().filter(|gpu| !gpu.usable).map(DeviceView::why_not)).collect()
    }
}

/// How asking a worker's program went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The devices.
    Devices(DeviceReport),
    /// The program is of a version that cannot be asked, and knows no GPUs either.
    Unknown,
}

/// Runs the worker's program at `path` with some arguments, to its end.
///
/// # Errors
/// It cannot be started, or does not end in time.
pub async fn ask(path: &Path, arguments: &[&str]) -> Result<Output, CliError> {
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1").kill_on_drop(true);
    let output = tokio::time::timeout(ANSWER_TIMEOUT, command.output()).await.map_err(|_| {
        let within = ANSWER_TIMEOUT.as_secs();
        CliError::failed(format!(
            "{} {} gives no answer within {within} s",
            path.display(),
            arguments.join(" ")
        ))
    })?;
    output.map_err(|error| CliError::io(format_args!("start {}", path.display()), error))
}

/// The last line that a program wrote to its stderr.
#[must_use]
pub fn last_words(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or_else(|| "without a word".to_owned(), |line| visible(line.trim()))
}

/// Asks the worker's program at `path` for this machine's devices.
///
/// # Errors
/// It cannot be started, fails (with its last words), or answers what is no list of devices.
pub async fn query(path: &Path) -> Result<Answer, CliError> {
    let output = ask(path, &["devices", "--json"]).await?;
    if output.status.code() == Some(UNKNOWN_COMMAND) {
        return Ok(Answer::Unknown);
    }
    if !output.status.success() {
        return Err(CliError::failed(format!(
            "{} cannot tell this machine's devices: {}",
            path.display(),
            last_words(&output)
        )));
    }
    serde_json::from_slice(&output.stdout).map(Answer::Devices).map_err(|error| {
        CliError::failed(format!(
            "what {} says of this machine's devices cannot be read ({error}); build takuma and takuma-worker together",
            path.display()
        ))
    })
}

/// The device of each worker to start, and what to tell of GPUs that are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assignment {
    /// One a worker.
    pub devices: Vec<Device>,
    /// Sentences for the person.
    pub warnings: Vec<String>,
}

/// Asks what this machine has, where the answer matters, and returns the device of each worker. GPUs that are left out
/// are told to the person.
///
/// # Errors
/// As [`query`] and [`assign`].
pub async fn assign_here(wanted: Device, count: WorkerCount, usual: u32) -> Result<Vec<Device>, CliError> {
    let report = match wanted {
        Device::Cpu => DeviceReport::default(),
        _ => match query(&crate::local::find("takuma-worker")?).await? {
            Answer::Devices(report) => report,
            Answer::Unknown if wanted == Device::Auto => DeviceReport::default(),
            Answer::Unknown => {
                return Err(CliError::failed(
                    "this takuma-worker cannot be asked for its GPUs; build takuma and takuma-worker together",
                ));
            }
        },
    };
    let assigned = assign(&report, wanted, count, usual)?;
    for warning in &assigned.warnings {
        output::message(&format!("{} {warning}", Tone::Warning.stderr("warning:")));
    }
    Ok(assigned.devices)
}

/// " on cuda:0, cuda:1"; nothing where the workers decide.
#[must_use]
pub fn on_devices(devices: &[Device]) -> String {
    let mut names: Vec<_> =
        devices.iter().filter(|device| **device != Device::Auto).map(Device::to_string).collect();
    names.dedup();
    if names.is_empty() { String::new() } else { format!(" on {}", names.join(", ")) }
}

/// Gives each worker its device: every usable GPU in turn. Without `count`, one worker a GPU, or `usual` without GPUs.
///
/// # Errors
/// GPUs are here or asked for, but none is usable. Training on the processor instead must be asked for.
pub fn assign(
    report: &DeviceReport,
    wanted: Device,
    count: WorkerCount,
    usual: u32,
) -> Result<Assignment, CliError> {
    let troubles = report.gpu_troubles();
    let usable = report.usable_gpus();
    let number = |auto: usize| match count {
        WorkerCount::Auto => auto,
        WorkerCount::Given(number) => number as usize,
    };
    let same =
        |device: Device| Assignment { devices: vec![device; number(usual as usize)], warnings: Vec::new() };
    match wanted {
        Device::Cpu => return Ok(same(Device::Cpu)),
        Device::Auto if usable.is_empty() && troubles.is_empty() => return Ok(same(Device::Auto)),
        Device::Cuda(Some(gpu)) if !usable.contains(&gpu) => return Err(unusable(report, gpu)),
        Device::Cuda(Some(_)) => {
            return Ok(Assignment { devices: vec![wanted; number(1)], warnings: Vec::new() });
        }
        Device::Auto | Device::Cuda(None) => {}
    }
    if usable.is_empty() {
        let why = if troubles.is_empty() { "there is none".to_owned() } else { troubles.join("; ") };
        return Err(CliError::failed(format!(
            "no GPU of this machine can be used: {why}; 'takuma doctor' tells more, and --device cpu trains on the processor"
        )));
    }
    let devices = usable.iter().cycle().take(number(usable.len()));
    Ok(Assignment { devices: devices.map(|&gpu| Device::Cuda(Some(gpu))).collect(), warnings: troubles })
}

fn unusable(report: &DeviceReport, gpu: u32) -> CliError {
    let here = report.devices.iter().find(|device| device.gpu() == Some(gpu));
    let why = match (here, report.gpu_troubles().first()) {
        (Some(device), _) => device.why_not(),
        (None, Some(trouble)) => trouble.clone(),
        (None, None) => format!("this machine has no cuda:{gpu}"),
    };
    CliError::failed(format!("{why}; 'takuma doctor' lists this machine's devices"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(number: u32, usable: bool) -> DeviceView {
        let reason = (!usable).then(|| "its memory is full; end what uses it".to_owned());
        DeviceView { name: format!("cuda:{number}"), usable, reason, ..DeviceView::default() }
    }

    fn machine(gpus: &[DeviceView]) -> DeviceReport {
        let cpu = DeviceView { name: "cpu".into(), usable: true, ..DeviceView::default() };
        DeviceReport { devices: [&[cpu], gpus].concat(), ..DeviceReport::default() }
    }

    fn names(report: &DeviceReport, wanted: &str, count: &str) -> Result<String, String> {
        let (wanted, count) = (wanted.parse().unwrap(), count.parse().unwrap());
        let assigned = assign(report, wanted, count, 1).map_err(|error| error.to_string())?;
        Ok(assigned.devices.iter().map(Device::to_string).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn each_gpu_gets_a_worker_and_more_workers_share_them_in_turn() {
        let two = machine(&[gpu(0, true), gpu(1, true)]);
        assert_eq!(names(&two, "auto", "auto").unwrap(), "cuda:0 cuda:1");
        assert_eq!(names(&two, "cuda", "3").unwrap(), "cuda:0 cuda:1 cuda:0");
        assert_eq!(names(&two, "cuda:1", "auto").unwrap(), "cuda:1");
        assert_eq!(names(&two, "cpu", "auto").unwrap(), "cpu");
    }

    #[test]
    fn without_gpus_the_usual_number_of_workers_decides_by_itself() {
        assert_eq!(names(&machine(&[]), "auto", "auto").unwrap(), "auto");
        assert_eq!(names(&machine(&[]), "auto", "2").unwrap(), "auto auto");
        let message = names(&machine(&[]), "cuda", "auto").unwrap_err();
        assert!(message.starts_with("no GPU of this machine can be used: there is none"), "{message}");
    }

    #[test]
    fn gpu_that_is_present_and_unusable_never_becomes_the_processor() {
        let broken = machine(&[gpu(0, false)]);
        for wanted in ["auto", "cuda", "cuda:0"] {
            let message = names(&broken, wanted, "auto").unwrap_err();
            assert!(message.contains("cuda:0 cannot be used: its memory is full"), "{wanted}: {message}");
        }
        let mut without_libraries = machine(&[]);
        without_libraries.cuda.driver = Some("580.65".into());
        without_libraries.cuda.error = Some("CUDA's libraries are missing; build with TAKUMA_CUDA=1".into());
        assert!(names(&without_libraries, "auto", "1").unwrap_err().contains("TAKUMA_CUDA=1"));
        assert_eq!(names(&broken, "cpu", "1").unwrap(), "cpu");
    }

    #[test]
    fn unusable_gpu_beside_a_usable_one_is_left_out_loudly() {
        let half = machine(&[gpu(0, false), gpu(1, true)]);
        let assigned = assign(&half, Device::Auto, WorkerCount::Auto, 1).unwrap();
        assert_eq!(assigned.devices, [Device::Cuda(Some(1))]);
        assert!(assigned.warnings[0].contains("cuda:0 cannot be used"), "{:?}", assigned.warnings);
    }

    #[test]
    fn machine_without_driver_has_nothing_wrong_with_its_gpus() {
        let mut report = machine(&[]);
        report.cuda.error = Some("there is no driver".into());
        assert_eq!(report.gpu_troubles(), Vec::<String>::new());
        assert_eq!(names(&report, "auto", "auto").unwrap(), "auto");
    }

    #[test]
    fn devices_and_counts_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda", "cuda:7"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert_eq!("auto".parse(), Ok(WorkerCount::Auto));
        assert_eq!("256".parse(), Ok(WorkerCount::Given(256)));
        for text in ["0", "257", "-1", "all"] {
            assert!(text.parse::<WorkerCount>().is_err(), "{text}");
        }
    }
}
