//! [`DeviceBuckets`]: gradients that are summed where they are, in a GPU's memory.
//!
//! The same buckets in the same order as on the host, each in one piece of device memory that stays. Nothing is
//! waited for until the pass is finished.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::buckets::Place;
use super::exchange::{Exchange, stream_of};
use crate::collective::{Collective, CollectiveError, DeviceKind, DeviceValues};
use crate::torch::TorchError;

/// One network's buckets on a GPU.
#[derive(Debug)]
pub(super) struct DeviceBuckets {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// By bucket, f32 `[length]`.
    memory: Vec<Tensor>,
    pass: Option<Pass>,
}

/// A backward pass.
#[derive(Debug)]
struct Pass {
    exchange: Arc<Exchange>,
    collective: Arc<dyn Collective>,
    /// By bucket: gradients that it still waits for.
    missing: Vec<usize>,
    /// Buckets whose sums are under way.
    started: usize,
}

/// What became of a gradient.
pub(super) enum Given {
    /// No pass on the device is under way.
    NotWanted,
    /// It is in its bucket.
    Taken,
    /// libtorch failed.
    Torch(TorchError),
    /// The sum of a bucket could not be started.
    Exchange(CollectiveError),
}

impl DeviceBuckets {
    /// Buckets of these lengths on `device`.
    pub(super) fn new(lengths: &[usize], device: Device) -> Self {
        let memory = lengths.iter().map(|&length| Tensor::empty([length as i64], (Kind::Float, device)));
        Self { inner: Mutex::new(Inner { memory: memory.collect(), pass: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets ready for a backward pass in the group of the moment, whose `collective` sums on devices.
    pub(super) fn begin(&self, exchange: &Arc<Exchange>, collective: Arc<dyn Collective>, places: &[Place]) {
        let mut inner = self.lock();
        let mut missing = vec![0; inner.memory.len()];
        for place in places {
            missing[place.bucket] += 1;
        }
        inner.pass = Some(Pass { exchange: Arc::clone(exchange), collective, missing, started: 0 });
    }

    /// Puts a gradient into its bucket and starts what is full by that. Called where the gradient was made: on its
    /// stream.
    pub(super) fn give(&self, place: &Place, gradient: &Tensor) -> Given {
        let Inner { memory, pass } = &mut *self.lock();
        let Some(pass) = pass.as_mut() else { return Given::NotWanted };
        if let Err(error) = view(memory, place).f_copy_(gradient) {
            return Given::Torch(TorchError { operation: "filling a bucket", message: error.to_string() });
        }
        pass.missing[place.bucket] -= 1;
        while pass.missing.get(pass.started) == Some(&0) {
            if let Err(error) = pass.start(&memory[pass.started]) {
                return Given::Exchange(error);
            }
            pass.started += 1;
        }
        Given::Taken
    }

    /// The sums of the pass, if one is under way on the device, by parameter. They are there when the stream has come to
    /// this place, and mean something only if the group has not ended by then.
    pub(super) fn finish(&self, places: &[Place]) -> Option<Vec<Tensor>> {
        let Inner { memory, pass } = &mut *self.lock();
        let pass = pass.take()?;
        assert_eq!(pass.started, memory.len(), "backward reached every parameter");
        Some(places.iter().map(|place| view(memory, place)).collect())
    }

    /// Forgets the pass. Sums that are under way end before their group does.
    pub(super) fn end(&self) {
        if let Some(pass) = self.lock().pass.take()
            && let Some(Err(error)) = pass.collective.on_device().map(|device| device.settle())
        {
            tracing::debug!(%error, "sums that nobody waits for ended with their group");
        }
    }
}

/// A gradient inside of its bucket, strided like its parameter.
fn view(memory: &[Tensor], place: &Place) -> Tensor {
    memory[place.bucket].as_strided(&place.size, &place.strides, place.offset as i64)
}

impl Pass {
    fn start(&self, bucket: &Tensor) -> Result<(), CollectiveError> {
        let Some(device) = self.collective.on_device() else {
            unreachable!("a pass on the device begins in a group that sums there")
        };
        let values = DeviceValues { ptr: bucket.data_ptr(), len: bucket.numel(), kind: DeviceKind::F32 };
        let stream = stream_of(device)?;
        // SAFETY: the bucket is dense f32 on this thread's device and lives as long as the buckets do, which outlive
        // every program over them; it is filled again in the order of the stream, and only there.
        unsafe { self.exchange.enqueue(values, stream) }
    }
}

impl Drop for DeviceBuckets {
    fn drop(&mut self) {
        self.end();
    }
}
