//! Gradients leave bucket by bucket while backward still runs.
//!
//! Parameters are dealt to buckets from last to first, the order in which backward finishes them.
//! A bucket starts when it and every bucket before it are full, so all ranks start them in one order.

use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::exchange::Exchange;
use crate::collective::PendingReduce;
use crate::torch::{self, GradientSink, TorchError};

/// The exchange of one network's gradients.
pub struct GradientBuckets {
    sink: Arc<Sink>,
}

/// Summed gradients, by parameter. The tensors look into the buckets and must not outlive them.
pub struct SummedGradients {
    tensors: Vec<Tensor>,
    buckets: Vec<Vec<f32>>,
}

/// Where a parameter's gradient lies.
#[derive(Debug, Clone)]
struct Place {
    bucket: usize,
    offset: usize,
    elements: usize,
    size: Vec<i64>,
    strides: Vec<i64>,
}

struct Sink {
    exchange: Arc<Exchange>,
    places: Vec<Place>,
    lengths: Vec<usize>,
    state: Mutex<State>,
}

struct State {
    /// Per bucket: the buffer while it fills, and how many parameters it still waits for.
    filling: Vec<Option<Vec<f32>>>,
    missing: Vec<usize>,
    pending: Vec<PendingReduce>,
}

impl GradientBuckets {
    /// Cuts `params` into buckets of about `bucket_bytes` and hooks their gradients.
    ///
    /// # Errors
    /// libtorch's, for a tensor that takes no gradient.
    ///
    /// # Panics
    /// If a parameter is not f32: only that goes over the wire.
    pub fn new(exchange: &Arc<Exchange>, params: &[&Tensor], bucket_bytes: u64) -> Result<Self, TorchError> {
        assert!(params.iter().all(|param| param.kind() == Kind::Float), "gradients are exchanged as f32");
        let sizes: Vec<usize> = params.iter().map(|param| param.numel()).collect();
        let (dealt, lengths) = deal(&sizes, (bucket_bytes / 4) as usize);
        let places = params
            .iter()
            .zip(dealt)
            .map(|(param, (bucket, offset))| Place {
                bucket,
                offset,
                elements: param.numel(),
                size: param.size(),
                strides: param.stride(),
            })
            .collect();
        let state = State { filling: Vec::new(), missing: Vec::new(), pending: Vec::new() };
        let sink =
            Arc::new(Sink { exchange: Arc::clone(exchange), places, lengths, state: Mutex::new(state) });
        sink.reset(vec![None; sink.lengths.len()]);
        for (index, param) in params.iter().enumerate() {
            torch::set_gradient_hook(param, index, Arc::clone(&sink) as Arc<dyn GradientSink>)?;
        }
        Ok(Self { sink })
    }

    /// Waits for the sums of the backward pass that just ended.
    ///
    /// # Errors
    /// The first exchange that failed.
    pub fn finish(&self) -> Result<SummedGradients, crate::collective::CollectiveError> {
        let pending = std::mem::take(&mut self.sink.lock().pending);
        assert_eq!(pending.len(), self.sink.lengths.len(), "backward reached every parameter");
        let buckets = self
            .sink
            .exchange
            .wait(|_| pending.into_iter().map(PendingReduce::wait).collect::<Result<Vec<_>, _>>())?;
        let tensors = self.sink.places.iter().map(|place| place.view(&buckets[place.bucket])).collect();
        Ok(SummedGradients { tensors, buckets })
    }

    /// Takes the buffers back for the next pass.
    pub fn recycle(&self, gradients: SummedGradients) {
        drop(gradients.tensors);
        self.sink.reset(gradients.buckets.into_iter().map(Some).collect());
    }

    /// Forgets a pass that failed half-way.
    pub fn discard(&self) {
        self.sink.reset(vec![None; self.sink.lengths.len()]);
    }
}

impl SummedGradients {
    /// The gradients in the order of the parameters.
    #[must_use]
    pub fn tensors(&self) -> Vec<&Tensor> {
        self.tensors.iter().collect()
    }
}

impl Place {
    /// The gradient inside its bucket, strided like the parameter.
    fn view(&self, bucket: &[f32]) -> Tensor {
        let data = bucket[self.offset..self.offset + self.elements].as_ptr().cast();
        // SAFETY: the place lies inside the bucket, and SummedGradients keeps tensor and bucket together.
        unsafe { Tensor::from_blob(data, &self.size, &self.strides, Kind::Float, Device::Cpu) }
    }
}

impl Sink {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset(&self, buffers: Vec<Option<Vec<f32>>>) {
        let filling = buffers
            .into_iter()
            .zip(&self.lengths)
            .map(|(buffer, &length)| Some(buffer.unwrap_or_else(|| vec![0.0; length])))
            .collect();
        let mut missing = vec![0; self.lengths.len()];
        for place in &self.places {
            missing[place.bucket] += 1;
        }
        *self.lock() = State { filling, missing, pending: Vec::new() };
    }
}

impl GradientSink for Sink {
    fn gradient_ready(&self, index: usize, gradient: &Tensor) -> bool {
        let place = &self.places[index];
        let mut state = self.lock();
        let state = &mut *state;
        let Some(buffer) = state.filling[place.bucket].as_mut() else { return false };
        if place.view(buffer).f_copy_(gradient).is_err() {
            return false;
        }
        state.missing[place.bucket] -= 1;
        while let Some(next) = state.filling.get_mut(state.pending.len())
            && state.missing[state.pending.len()] == 0
        {
            let Some(full) = next.take() else { return false };
            match self.exchange.collective().start_all_reduce(full) {
                Ok(pending) => state.pending.push(pending),
                Err(error) => {
                    self.exchange.fail(error);
                    return false;
                }
            }
        }
        true
    }
}

/// Deals parameters to buckets from last to first: (bucket, offset) by parameter, and the buckets'
/// lengths. A bucket is closed once it holds `bucket_elements`.
fn deal(sizes: &[usize], bucket_elements: usize) -> (Vec<(usize, usize)>, Vec<usize>) {
    let mut places = vec![(0, 0); sizes.len()];
    let mut lengths: Vec<usize> = Vec::new();
    for (index, &size) in sizes.iter().enumerate().rev() {
        if lengths.last().is_none_or(|&length| length >= bucket_elements) {
            lengths.push(0);
        }
        let bucket = lengths.len() - 1;
        places[index] = (bucket, lengths[bucket]);
        lengths[bucket] += size;
    }
    (places, lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_parameters_leave_first_and_buckets_close_when_full() {
        let (places, lengths) = deal(&[10, 5, 4, 3], 6);
        assert_eq!(lengths, [7, 15]);
        assert_eq!(places, [(1, 5), (1, 0), (0, 3), (0, 0)]);
    }
}
