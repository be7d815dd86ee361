//! [`Snapshot`]: everything that decides the rest of a run, copied between two steps.
//!
//! Three parts. `generator` and `discriminator` hold PyTorch's `state_dict` under its own names;
//! `optimizer` holds, for each of their parameters, `NETWORK.PARAMETER.exp_avg`, `.exp_avg_sq` and
//! `.step`. Tensors are contiguous in PyTorch's default layout.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use takuma_core::checkpoint::CHECKPOINT_PARTS;
use tch::{Device, Kind, Tensor};

use super::restore::CheckpointError;
use crate::model::Network;
use crate::recipe::Dcgan;
use crate::torch::TorchError;
use crate::torch::cuda::Event;

/// A GPU that has not copied its state by then is stuck: it takes less than a millisecond.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);

/// A tensor's bytes outside of libtorch.
struct Copied {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A tensor as it was at one moment.
enum Taken {
    OnHost(Copied),
    /// A copy on the GPU, in its own time: training goes on behind it.
    OnDevice(Tensor),
}

/// A copy of networks and optimizers after `step` finished steps.
pub struct Snapshot {
    /// Finished steps.
    pub step: u64,
    parts: [BTreeMap<String, Taken>; 3],
    /// When the copies on a GPU are made.
    ready: Event,
}

impl Snapshot {
    /// Copies `net` as it stands after `step` finished steps.
    ///
    /// # Errors
    /// libtorch's, on a GPU that fails.
    pub fn take(net: &Dcgan, step: u64) -> Result<Self, TorchError> {
        let [g, d, o] = parts_of(net).map(take);
        let parts = [g?, d?, o?];
        let mut ready = Event::new(net.state().generator.arithmetic().device)?;
        ready.record()?;
        Ok(Self { step, parts, ready })
    }

    /// The parts as safetensors files, in the order of [`CHECKPOINT_PARTS`]. Equal snapshots give
    /// equal bytes.
    ///
    /// # Errors
    /// A GPU's; what the safetensors crate refuses, which accepts every snapshot that was taken.
    pub fn serialize(mut self) -> Result<[Vec<u8>; 3], CheckpointError> {
        match self.ready.wait(Instant::now() + COPY_TIMEOUT) {
            Ok(true) => {}
            Ok(false) => return Err(CheckpointError::Device(format!("no copy within {COPY_TIMEOUT:?}"))),
            Err(error) => return Err(CheckpointError::Device(error.to_string())),
        }
        let host = |part: BTreeMap<String, Taken>| {
            file(&part.into_iter().map(|(name, taken)| (name, taken.on_host())).collect())
        };
        let [g, d, o] = self.parts.map(host);
        Ok([g?, d?, o?])
    }
}

/// Sets networks and optimizers to what the three safetensors files say.
///
/// # Errors
/// A file that is none, or lacks a tensor, or has it in another shape or type: nothing is changed then.
pub fn restore_into(net: &mut Dcgan, files: &[impl AsRef<[u8]>; 3]) -> Result<(), CheckpointError> {
    let mut found: Vec<BTreeMap<String, Tensor>> = Vec::new();
    for ((file, wanted), part) in files.iter().zip(parts_of(net)).zip(CHECKPOINT_PARTS) {
        let unreadable = |reason: String| CheckpointError::Unreadable { part, reason };
        let read = SafeTensors::deserialize(file.as_ref()).map_err(|error| unreadable(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in wanted {
            let view = read.tensor(&name).map_err(|_| unreadable(format!("it has no tensor '{name}'")))?;
            tensors.insert(
                name.clone(),
                like(&view, &tensor).ok_or_else(|| {
                    unreadable(format!(
                        "'{name}' is {:?} {:?}, not {:?}",
                        view.dtype(),
                        view.shape(),
                        tensor.size()
                    ))
                })?,
            );
        }
        found.push(tensors);
    }
    tch::no_grad(|| -> Result<(), tch::TchError> {
        let [g, d, o] = &found[..] else { unreachable!("three parts were read") };
        for (name, tensor) in parts_of(net)[2].iter() {
            tensor.shallow_clone().f_copy_(&o[name])?;
        }
        let state = net.state_mut();
        restore_network(&mut state.generator, g)?;
        restore_network(&mut state.discriminator, d)
    })
    .map_err(|error| CheckpointError::Unreadable { part: CHECKPOINT_PARTS[0], reason: error.to_string() })
}

/// Sets a network's tensors to those of [`network_tensors`]. Call it inside `no_grad`.
///
/// # Errors
/// libtorch's, for tensors of other shapes.
///
/// # Panics
/// If a tensor is missing.
pub fn restore_network(
    network: &mut impl Network,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(), tch::TchError> {
    for parameter in network.parameters() {
        parameter.tensor.shallow_clone().f_copy_(&tensors[&parameter.name])?;
    }
    for norm in network.norms_mut() {
        let buffers = norm.buffers().map(|(name, _)| tensors[&name].shallow_clone());
        norm.restore(&buffers)?;
    }
    Ok(())
}

/// Every tensor of the three parts, by name.
fn parts_of(net: &Dcgan) -> [BTreeMap<String, Tensor>; 3] {
    let state = net.state();
    let mut optimizer = BTreeMap::new();
    let networks: [(&str, &dyn Network); 2] =
        [("generator", &state.generator), ("discriminator", &state.discriminator)];
    for ((network_name, network), adam) in networks.into_iter().zip(net.optimizers()) {
        for (parameter, moments) in network.parameters().into_iter().zip(adam.state()) {
            for (what, tensor) in moments {
                optimizer.insert(format!("{network_name}.{}.{what}", parameter.name), tensor.shallow_clone());
            }
        }
    }
    [network_tensors(&state.generator), network_tensors(&state.discriminator), optimizer]
}

/// Every trained tensor and every running statistic by its PyTorch name. They share the network's memory.
pub fn network_tensors(network: &dyn Network) -> BTreeMap<String, Tensor> {
    let parameters = network.parameters().into_iter().map(|p| (p.name.clone(), p.tensor.shallow_clone()));
    let buffers = network.norms().into_iter().flat_map(|norm| norm.buffers());
    parameters.chain(buffers).collect()
}

impl Taken {
    fn on_host(self) -> Copied {
        match self {
            Self::OnHost(copied) => copied,
            Self::OnDevice(tensor) => copy(&tensor),
        }
    }
}

/// Every tensor of a part as it is now.
fn take(part: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Taken>, TorchError> {
    if !part.values().any(|tensor| tensor.device().is_cuda()) {
        return Ok(part.into_iter().map(|(name, tensor)| (name, Taken::OnHost(copy(&tensor)))).collect());
    }
    let copies = crate::torch::copies(&part.values().collect::<Vec<_>>())?;
    Ok(part.into_keys().zip(copies.into_iter().map(Taken::OnDevice)).collect())
}

fn copy(tensor: &Tensor) -> Copied {
    let dense = tensor.detach().to_device(Device::Cpu).contiguous();
    let dtype = dtype_of(dense.kind());
    let mut bytes = vec![0u8; dense.numel() * dense.kind().elt_size_in_bytes()];
    dense
        .view(-1)
        .view_dtype(Kind::Uint8)
        .copy_data(&mut bytes, dense.numel() * dense.kind().elt_size_in_bytes());
    let shape = tensor.size().into_iter().map(|side| side as usize).collect();
    Copied { dtype, shape, bytes }
}

fn file(part: &BTreeMap<String, Copied>) -> Result<Vec<u8>, CheckpointError> {
    let views = part
        .iter()
        .map(|(name, copied)| Ok((name, TensorView::new(copied.dtype, copied.shape.clone(), &copied.bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    Ok(safetensors::serialize(views, None)?)
}

/// The view as a tensor, if it has `wanted`'s shape and type.
fn like(view: &TensorView<'_>, wanted: &Tensor) -> Option<Tensor> {
    let shape: Vec<i64> = view.shape().iter().map(|&side| side as i64).collect();
    if shape != wanted.size() || view.dtype() != dtype_of(wanted.kind()) {
        return None;
    }
    let tensor = Tensor::f_from_data_size(view.data(), &shape, wanted.kind()).ok()?;
    Some(tensor.to_device(Device::Cpu))
}

fn dtype_of(kind: Kind) -> Dtype {
    match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        other => unreachable!("networks and optimizers hold no {other:?}"),
    }
}
