//! [`DeviceChoice`]: what this worker computes on, and the list of what there is.

use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use takuma_core::config::{self, RunConfig};
use tch::Device;

use crate::torch::cuda::{self, CudaError, DeviceInfo};

/// The driver's devices: they are there wherever a GPU is, in containers too. The last is that of Windows' Linux.
const GPU_FILES: [&str; 3] = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"];

/// What a person wants this worker to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// This GPU, or the first one.
    Cuda(Option<u32>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(None)),
            Some(("cuda", number)) if let Ok(number) = number.parse() => Ok(Self::Cuda(Some(number))),
            _ => Err("give auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

impl DeviceChoice {
    /// Whether this may come to a GPU.
    #[must_use]
    pub fn may_be_gpu(self) -> bool {
        match self {
            Self::Auto => has_gpu(),
            Self::Cpu => false,
            Self::Cuda(_) => true,
        }
    }

    /// Makes ready what was chosen. Must be called before anything else asks libtorch about CUDA.
    ///
    /// # Errors
    /// A GPU that is there, or was asked for, and cannot be used: nobody should wait a week for a processor
    /// because a driver is old.
    pub fn open(self) -> Result<Device, CudaError> {
        let index = match self {
            Self::Cpu => return Ok(Device::Cpu),
            Self::Auto if !has_gpu() => return Ok(Device::Cpu),
            Self::Auto | Self::Cuda(None) => 0,
            Self::Cuda(Some(index)) => index,
        };
        cuda::load(&[])?;
        // Tried here, so that a GPU that is no use is told of before the coordinator counts on it.
        cuda::select(index, cuda::Precision::F32, false)
    }
}

/// Makes `device` the calling thread's for a run. In exact mode a GPU takes only algorithms whose results repeat, and
/// measures none: a measurement may choose otherwise in each process.
///
/// # Errors
/// CUDA's.
pub fn enter(device: Device, config: &RunConfig) -> Result<(), CudaError> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let precision = match config.precision {
        config::Precision::F32 => cuda::Precision::F32,
        config::Precision::Tf32 => cuda::Precision::Tf32,
        config::Precision::Bf16 => cuda::Precision::Bf16,
    };
    cuda::select(index as u32, precision, config.exact).map(drop)
}

/// What two devices have in common that compute the same bits: a GPU's product name. All processors are one here; what
/// tells them apart is in docs/exact.md.
///
/// # Errors
/// CUDA's.
pub fn model(device: Device) -> Result<String, CudaError> {
    let Device::Cuda(index) = device else { return Ok("a processor".to_owned()) };
    let found = cuda::devices()?;
    let missing = CudaError::NoSuchDevice { index: index as u32, count: found.len() };
    found.into_iter().nth(index).map(|gpu| gpu.name).ok_or(missing)
}

/// "cpu" or "cuda:0".
#[must_use]
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// Whether this machine has an NVIDIA GPU, usable or not.
fn has_gpu() -> bool {
    GPU_FILES.iter().any(|file| Path::new(file).exists())
}

/// What a worker on this machine can compute on, as `takuma-worker devices --json` prints it.
#[derive(Debug, Serialize)]
pub struct Inventory {
    libtorch: &'static str,
    cuda: Cuda,
    devices: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Cuda {
    /// "found" or "missing".
    libraries: &'static str,
    driver: Option<String>,
    runtime: Option<String>,
    /// Why there is no usable GPU although one is there, with the remedy.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    description: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capability: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    usable: bool,
    reason: Option<String>,
}

impl Inventory {
    /// Looks at everything, and tries each GPU.
    #[must_use]
    pub fn take() -> Self {
        let mut devices = vec![processor()];
        let looked = cuda::load(&[]).and_then(|()| Ok((cuda::versions()?, cuda::devices()?)));
        let cuda = match looked {
            Ok((versions, found)) => {
                devices.extend(found.iter().map(gpu));
                Cuda {
                    libraries: "found",
                    driver: Some(dotted(versions.driver)),
                    runtime: Some(dotted(versions.runtime)),
                    error: None,
                }
            }
            Err(error) => Cuda {
                libraries: if cuda::is_loaded() { "found" } else { "missing" },
                driver: None,
                runtime: None,
                error: has_gpu().then(|| error.to_string()),
            },
        };
        Self { libtorch: crate::LIBTORCH_VERSION, cuda, devices }
    }

    /// For people, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let line = |entry: &Entry| match &entry.reason {
            None => format!("{}  {}", entry.name, entry.description),
            Some(reason) => format!("{}  {}: not usable: {reason}", entry.name, entry.description),
        };
        let failed = self.cuda.error.iter().map(|error| format!("cuda  not usable: {error}"));
        self.devices.iter().map(line).chain(failed).collect()
    }
}

fn processor() -> Entry {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    Entry {
        name: "cpu".to_owned(),
        description: model.unwrap_or("processor").to_owned(),
        threads: std::thread::available_parallelism().ok().map(usize::from),
        capability: None,
        memory_bytes: None,
        usable: true,
        reason: None,
    }
}

fn gpu(info: &DeviceInfo) -> Entry {
    let tried = cuda::select(info.index, cuda::Precision::F32, false);
    Entry {
        name: format!("cuda:{}", info.index),
        description: info.name.clone(),
        threads: None,
        capability: Some(dotted(info.capability)),
        memory_bytes: Some(info.memory_bytes),
        usable: tried.is_ok(),
        reason: tried.err().map(|error| error.to_string()),
    }
}

fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_nonsense_is_refused() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(None)),
            ("cuda:3", DeviceChoice::Cuda(Some(3))),
        ] {
            assert_eq!(text.parse(), Ok(choice), "{text}");
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn processor_is_always_listed_and_usable() {
        let inventory = serde_json::to_value(Inventory::take()).unwrap();
        assert_eq!(inventory["devices"][0]["name"], "cpu");
        assert_eq!(inventory["devices"][0]["usable"], true);
        assert_eq!(inventory["libtorch"], crate::LIBTORCH_VERSION);
    }
}
