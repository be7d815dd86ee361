//! [`DeviceBuckets`]: gradients that are summed where they are, in a GPU's memory.
//!
//! The buckets that leave one by one on the host lie in one piece of device memory here, and are one sum: in the order of a
//! stream nothing runs beside a sum, so several would only be launched more often. Nothing is waited for.

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
    /// All buckets, f32.
    memory: Tensor,
    /// Where each begins.
    starts: Vec<i64>,
    pass: Option<Pass>,
}

/// A backward pass.
#[derive(Debug)]
struct Pass {
    exchange: Arc<Exchange>,
    collective: Arc<dyn Collective>,
    /// Gradients that it still waits for.
    missing: usize,
}

/// What became of a gradient.
pub(super) enum Given {
    /// No pass on the device is under way.
    NotWanted,
    /// It is in its bucket.
    Taken,
    /// libtorch failed.
    Torch(TorchError),
    /// Their sum could not be started.
    Exchange(CollectiveError),
}

impl DeviceBuckets {
    /// Buckets of these lengths on `device`.
    pub(super) fn new(lengths: &[usize], device: Device) -> Self {
        let mut total = 0;
        let mut start = |&length: &usize| {
            let start = total;
            total += length as i64;
            start
        };
        let starts = lengths.iter().map(&mut start).collect();
        let memory = Tensor::empty([total], (Kind::Float, device));
        Self { inner: Mutex::new(Inner { memory, starts, pass: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets ready for a backward pass in the group of the moment, whose `collective` sums on devices.
    pub(super) fn begin(&self, exchange: &Arc<Exchange>, collective: Arc<dyn Collective>, places: &[Place]) {
        let missing = places.len();
        self.lock().pass = Some(Pass { exchange: Arc::clone(exchange), collective, missing });
    }

    /// Puts a gradient into its bucket, and starts the sum of all with the last one. Called where the gradient was made:
    /// on its stream.
    pub(super) fn give(&self, place: &Place, gradient: &Tensor) -> Given {
        let inner = &mut *self.lock();
        if inner.pass.is_none() {
            return Given::NotWanted;
        }
        if let Err(error) = inner.view(place).f_copy_(gradient) {
            return Given::Torch(TorchError { operation: "filling a bucket", message: error.to_string() });
        }
        let Some(pass) = &mut inner.pass else { return Given::NotWanted };
        pass.missing -= 1;
        if pass.missing == 0
            && let Err(error) = pass.start(&inner.memory)
        {
            return Given::Exchange(error);
        }
        Given::Taken
    }

    /// The sums of the pass, if one is under way on the device, by parameter. They are there when the stream has come to
    /// this place, and mean something only if the group has not ended by then.
    pub(super) fn finish(&self, places: &[Place]) -> Option<Vec<Tensor>> {
        let inner = &mut *self.lock();
        let pass = inner.pass.take()?;
        assert_eq!(pass.missing, 0, "backward reached every parameter");
        Some(places.iter().map(|place| inner.view(place)).collect())
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

impl Inner {
    /// A gradient inside of its bucket, strided like its parameter.
    fn view(&self, place: &Place) -> Tensor {
        let offset = self.starts[place.bucket] + place.offset as i64;
        self.memory.as_strided(&place.size, &place.strides, offset)
    }
}

impl Pass {
    fn start(&self, buckets: &Tensor) -> Result<(), CollectiveError> {
        let Some(device) = self.collective.on_device() else {
            unreachable!("a pass on the device begins in a group that sums there")
        };
        let values = DeviceValues { ptr: buckets.data_ptr(), len: buckets.numel(), kind: DeviceKind::F32 };
        let stream = stream_of(device)?;
        // SAFETY: dense f32 on this thread's device, which lives as long as the networks' hooks and so outlives every
        // program over it; it is filled again in the order of the stream, and only there.
        unsafe { self.exchange.enqueue(values, stream) }
    }
}

impl Drop for DeviceBuckets {
    fn drop(&mut self) {
        self.end();
    }
}
