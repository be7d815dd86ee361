//! [`Staging`]: gradients of a GPU on their way to buckets on the host and back, where no library sums them on the GPU.
//!
//! Gradients are gathered in the GPU's memory, a full bucket goes over in one copy to page-locked memory behind
//! backward's back, and its sum comes back in one. A copy to memory that is not page-locked would make backward wait.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::buckets::Place;
use crate::torch::cuda::Event;
use crate::torch::{self, TorchError};

/// One network's buckets on their way.
#[derive(Debug)]
pub(super) struct Staging {
    device: Device,
    /// Values in each bucket.
    lengths: Vec<usize>,
    buckets: Mutex<Vec<Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    /// By lane, f32 `[length]`: on the GPU, and in page-locked memory.
    there: Vec<Tensor>,
    here: Vec<Tensor>,
    /// When `here` is what `there` was.
    arrived: Event,
}

impl Staging {
    /// For buckets of these lengths of gradients on `device`.
    pub(super) fn new(lengths: &[usize], device: Device) -> Self {
        Self { device, lengths: lengths.to_vec(), buckets: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Bucket>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes memory for `lanes` lanes, if there is not enough of it yet.
    ///
    /// # Errors
    /// libtorch's, out of memory.
    pub(super) fn begin(&self, lanes: usize) -> Result<(), TorchError> {
        let failed = |error: tch::TchError| TorchError { operation: "staging", message: error.to_string() };
        let mut buckets = self.lock();
        for (number, &length) in self.lengths.iter().enumerate() {
            if buckets.len() == number {
                buckets.push(Bucket {
                    there: Vec::new(),
                    here: Vec::new(),
                    arrived: Event::new(self.device)?,
                });
            }
            while buckets[number].there.len() < lanes {
                let there = Tensor::f_empty([length as i64], (Kind::Float, self.device)).map_err(failed)?;
                buckets[number].here.push(torch::host_like(&there, self.device)?);
                buckets[number].there.push(there);
            }
        }
        Ok(())
    }

    /// Puts a gradient into its place.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn give(&self, place: &Place, lane: usize, gradient: &Tensor) -> Result<(), TorchError> {
        torch::copy_async(&place.view_in(&self.lock()[place.bucket].there[lane]), gradient)
    }

    /// Sends a full bucket of `lanes` lanes on its way to the host.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn send(&self, bucket: usize, lanes: usize) -> Result<(), TorchError> {
        let bucket = &mut self.lock()[bucket];
        for (here, there) in bucket.here.iter().zip(&bucket.there).take(lanes) {
            torch::copy_async(here, there)?;
        }
        bucket.arrived.record()
    }

    /// Whether a bucket that was sent is there.
    ///
    /// # Errors
    /// CUDA's.
    pub(super) fn has_arrived(&self, bucket: usize) -> Result<bool, TorchError> {
        self.lock()[bucket].arrived.query()
    }

    /// Waits for a bucket that was sent; `false` if it does not come by then.
    ///
    /// # Errors
    /// CUDA's.
    pub(super) fn wait(&self, bucket: usize, deadline: Instant) -> Result<bool, TorchError> {
        self.lock()[bucket].arrived.wait(deadline)
    }

    /// Copies a bucket that has arrived into the buffers of its lanes.
    pub(super) fn unload(&self, bucket: usize, lanes: &mut [Vec<f32>]) {
        for (buffer, here) in lanes.iter_mut().zip(&self.lock()[bucket].here) {
            let length = buffer.len();
            here.copy_data(buffer, length);
        }
    }

    /// Sends a bucket's sum back. It lies on the GPU, f32 `[length]`, for what the stream is given from now on, until the
    /// next pass.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn send_back(&self, bucket: usize, sum: &[f32]) -> Result<Tensor, TorchError> {
        let bucket = &self.lock()[bucket];
        // The copy before it has arrived, and with it whatever read this memory before.
        torch::copy_async(&bucket.here[0], &Tensor::from_slice(sum))?;
        torch::copy_async(&bucket.there[0], &bucket.here[0])?;
        Ok(bucket.there[0].shallow_clone())
    }
}
