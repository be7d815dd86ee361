//! Gradients leave bucket by bucket while backward still runs.
//!
//! Parameters are dealt to buckets from last to first, the order in which backward finishes them.
//! A bucket starts when it and every bucket before it are full, so all ranks start them in one order.
//!
//! A worker computes in one or more lanes, each with gradients of its own and on a thread of its own. A
//! bucket is full when all lanes have filled their part of it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::device_buckets::{DeviceBuckets, Given};
use super::exchange::Exchange;
use super::staging::Staging;
use crate::collective::{Collective, CollectiveError, PendingReduce};
use crate::torch::{self, Gradient, GradientSink, TorchError};

/// A GPU that has not copied a bucket by then is stuck: a backward pass takes far less.
const COPY_TIMEOUT: Duration = Duration::from_secs(120);

/// In which order gradients are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SumOrder {
    /// As fast as can be: one lane a worker, another order for each number of workers.
    Workers,
    /// Lane after lane, whatever workers hold them.
    Lanes,
}

/// The exchange of one network's gradients. Its hooks stay for the life of the lanes and look up the group
/// at each pass; a worker that is alone pays nothing for them, unless it has lanes to sum.
pub struct GradientBuckets {
    sink: Arc<Sink>,
}

/// Summed gradients, by parameter. The tensors may look into the buckets and must not outlive them.
pub struct SummedGradients {
    tensors: Vec<Tensor>,
    /// By bucket, the sum first; none if the gradients never left their tensors.
    buckets: Vec<LaneBuffers>,
}

/// One bucket in all lanes.
type LaneBuffers = Vec<Vec<f32>>;

/// A bucket that is full in all lanes, and who sums it.
type FullBucket = (Arc<dyn Collective>, LaneBuffers);

/// Where a parameter's gradient lies.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) bucket: usize,
    pub(super) offset: usize,
    elements: usize,
    pub(super) size: Vec<i64>,
    pub(super) strides: Vec<i64>,
}

struct Sink {
    exchange: Arc<Exchange>,
    order: SumOrder,
    kind: Kind,
    device: Device,
    places: Vec<Place>,
    /// Values in each bucket.
    lengths: Vec<usize>,
    /// None: gradients stay where backward leaves them.
    pass: Mutex<Option<Pass>>,
    /// Sums under way. Locked while a bucket starts, so that buckets start in their order; `pass` is not,
    /// so that other lanes go on filling theirs. Locked before `pass` where both are.
    started: Mutex<Vec<PendingReduce>>,
    /// Buffers of the last pass, by bucket, to be filled again.
    spare: Mutex<Vec<LaneBuffers>>,
    /// For groups that sum on the device; made when the first of them is there.
    on_device: OnceLock<DeviceBuckets>,
    /// Between a GPU and buckets on the host.
    staging: Option<Staging>,
}

/// A backward pass in all lanes.
struct Pass {
    collective: Arc<dyn Collective>,
    /// By bucket and lane; nothing while a lane writes to it.
    filling: Vec<Vec<Option<Vec<f32>>>>,
    /// By bucket: gradients that it still waits for, over all lanes.
    missing: Vec<usize>,
}

impl GradientBuckets {
    /// Cuts parameters like `params` into buckets of about `bucket_bytes`. No lane has them yet.
    ///
    /// # Panics
    /// If there are no parameters.
    #[must_use]
    pub fn new(exchange: &Arc<Exchange>, order: SumOrder, params: &[&Tensor], bucket_bytes: u64) -> Self {
        let is_staged = params[0].device().is_cuda();
        Self::with_staging(exchange, order, params, bucket_bytes, is_staged)
    }

    fn with_staging(
        exchange: &Arc<Exchange>,
        order: SumOrder,
        params: &[&Tensor],
        bucket_bytes: u64,
        is_staged: bool,
    ) -> Self {
        let sizes: Vec<usize> = params.iter().map(|param| param.numel()).collect();
        let (dealt, lengths) = deal(&sizes, (bucket_bytes / 4) as usize);
        let places = params.iter().zip(dealt).map(|(param, (bucket, offset))| Place {
            bucket,
            offset,
            elements: param.numel(),
            size: param.size(),
            strides: param.stride(),
        });
        let sink = Sink {
            exchange: Arc::clone(exchange),
            order,
            kind: params[0].kind(),
            device: params[0].device(),
            places: places.collect(),
            staging: is_staged.then(|| Staging::new(&lengths, params[0].device())),
            lengths,
            pass: Mutex::default(),
            started: Mutex::default(),
            spare: Mutex::default(),
            on_device: OnceLock::new(),
        };
        Self { sink: Arc::new(sink) }
    }

    /// Hooks the gradients of lane number `lane`, whose parameters are `params`. Once per lane.
    ///
    /// # Errors
    /// libtorch's, for a tensor that takes no gradient.
    pub fn hook(&self, lane: usize, params: &[&Tensor]) -> Result<(), TorchError> {
        let lane = Arc::new(LaneSink { sink: Arc::clone(&self.sink), lane });
        for (index, param) in params.iter().enumerate() {
            torch::set_gradient_hook(param, index, Arc::clone(&lane) as Arc<dyn GradientSink>)?;
        }
        Ok(())
    }

    /// Gets ready for a backward pass of the first `lanes` lanes in the group of the moment.
    ///
    /// # Panics
    /// If gradients have to be exchanged and are not f32: only that goes over the wire. If there are
    /// several lanes and sums go by workers.
    pub fn begin(&self, lanes: usize) {
        let sink = &self.sink;
        let collective = sink.exchange.collective();
        assert!(lanes == 1 || sink.order == SumOrder::Lanes, "several lanes are summed lane after lane");
        if sink.order == SumOrder::Workers && collective.world() == 1 {
            lock(&sink.spare).clear();
            return;
        }
        assert_eq!(sink.kind, Kind::Float, "gradients are exchanged as f32");
        if sink.order == SumOrder::Workers && collective.on_device().is_some() {
            let buckets = sink.on_device.get_or_init(|| DeviceBuckets::new(&sink.lengths, sink.device));
            return buckets.begin(&sink.exchange, collective, &sink.places);
        }
        // Without buffers to fill, the backward pass fails.
        let is_ready = sink.staging.as_ref().is_none_or(|staging| match staging.begin(lanes) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "gradients cannot be exchanged");
                false
            }
        });
        let mut spare = std::mem::take(&mut *lock(&sink.spare)).into_iter();
        let filling = sink.lengths.iter().map(|&length| {
            let mut buffers = spare.next().unwrap_or_default();
            // Every value is written before a bucket leaves.
            buffers.resize_with(lanes, || vec![0.0; length]);
            buffers.into_iter().map(|buffer| is_ready.then_some(buffer)).collect()
        });
        let mut pass = Pass { collective, filling: filling.collect(), missing: vec![0; sink.lengths.len()] };
        for place in &sink.places {
            pass.missing[place.bucket] += lanes;
        }
        *lock(&sink.pass) = Some(pass);
    }

    /// The sums of the backward pass that just ended: waited for, or, in a group that sums on devices, enqueued. If
    /// gradients need no exchange, they are those of `params`, the only lane's parameters.
    ///
    /// # Errors
    /// The first exchange that failed.
    pub fn finish(&self, params: &[&Tensor]) -> Result<SummedGradients, CollectiveError> {
        let sink = &self.sink;
        if let Some(tensors) = sink.on_device.get().and_then(|buckets| buckets.finish(&sink.places)) {
            return Ok(SummedGradients { tensors, buckets: Vec::new() });
        }
        sink.start_rest()?;
        if lock(&sink.pass).take().is_none() {
            let tensors = params.iter().map(|param| param.grad()).collect();
            return Ok(SummedGradients { tensors, buckets: Vec::new() });
        }
        let pending = std::mem::take(&mut *lock(&sink.started));
        assert_eq!(pending.len(), sink.lengths.len(), "backward reached every parameter");
        let wait = || pending.into_iter().map(PendingReduce::wait_lanes).collect::<Result<Vec<_>, _>>();
        let buckets = sink.exchange.wait(|_| wait())?;
        let tensors = match &sink.staging {
            None => sink.places.iter().map(|place| place.view(&buckets[place.bucket][0])).collect(),
            Some(staging) => sink.send_back(staging, &buckets).map_err(staging_failed)?,
        };
        Ok(SummedGradients { tensors, buckets })
    }

    /// Takes the buffers back for the next pass.
    pub fn recycle(&self, gradients: SummedGradients) {
        drop(gradients.tensors);
        if !gradients.buckets.is_empty() {
            *lock(&self.sink.spare) = gradients.buckets;
        }
    }

    /// Forgets the pass, finished or failed half-way, and the group that it was in.
    pub fn end(&self) {
        *lock(&self.sink.pass) = None;
        lock(&self.sink.started).clear();
        if let Some(buckets) = self.sink.on_device.get() {
            buckets.end();
        }
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

    /// The gradient inside its bucket, f32 `[length]`, strided like the parameter.
    pub(super) fn view_in(&self, bucket: &Tensor) -> Tensor {
        bucket.as_strided(&self.size, &self.strides, self.offset as i64)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sink {
    /// Copies a gradient into its bucket; nothing if no buckets are wanted.
    fn fill(&self, lane: usize, place: &Place, gradient: &Tensor) -> Option<Filled> {
        let taken = lock(&self.pass).as_mut()?.filling[place.bucket].get_mut(lane).and_then(Option::take);
        // Lost buffer or unknown lane: the pass was ended or never begun for this lane.
        let Some(buffer) = taken else { return Some(Filled::Failed) };
        let given = match &self.staging {
            None => torch::copy_async(&place.view(&buffer), gradient),
            Some(staging) => staging.give(place, lane, gradient),
        };
        let mut pass = lock(&self.pass);
        let Some(pass) = pass.as_mut() else { return Some(Filled::Failed) };
        pass.filling[place.bucket][lane] = Some(buffer);
        let is_last = pass.missing[place.bucket] == 1;
        // Before anybody sees the bucket full.
        let sent = match &self.staging {
            Some(staging) if is_last => staging.send(place.bucket, pass.filling[place.bucket].len()),
            _ => Ok(()),
        };
        if let Err(error) = given.and(sent) {
            tracing::error!(%error, "a gradient cannot be exchanged");
            return Some(Filled::Failed);
        }
        pass.missing[place.bucket] -= 1;
        Some(if pass.missing[place.bucket] == 0 { Filled::Full } else { Filled::InPart })
    }

    /// Starts the buckets that are full and whose turn it is.
    fn start_full(&self) -> Result<(), CollectiveError> {
        let mut started = lock(&self.started);
        while let Some((collective, lanes)) = self.take_full(started.len()).map_err(staging_failed)? {
            started.push(match self.order {
                SumOrder::Lanes => collective.start_chain_reduce(lanes)?,
                SumOrder::Workers => {
                    collective.start_all_reduce(lanes.into_iter().next().unwrap_or_default())?
                }
            });
        }
        Ok(())
    }

    /// After backward: waits for the buckets that are on their way to the host, and starts them.
    fn start_rest(&self) -> Result<(), CollectiveError> {
        let Some(staging) = self.staging.as_ref().filter(|_| lock(&self.pass).is_some()) else {
            return Ok(());
        };
        let deadline = Instant::now() + COPY_TIMEOUT;
        loop {
            let next = lock(&self.started).len();
            let is_full = lock(&self.pass).as_ref().is_some_and(|pass| pass.missing.get(next) == Some(&0));
            if !is_full {
                return Ok(());
            }
            if !staging.wait(next, deadline).map_err(staging_failed)? {
                let message = format!("the GPU has not come to them within {} s", COPY_TIMEOUT.as_secs());
                return Err(staging_failed(TorchError { operation: "copying gradients", message }));
            }
            self.start_full()?;
        }
    }

    /// The lanes of bucket number `next`, if all of them are full, and on the host.
    fn take_full(&self, next: usize) -> Result<Option<FullBucket>, TorchError> {
        let mut pass = lock(&self.pass);
        let Some(pass) = pass.as_mut().filter(|pass| pass.missing.get(next) == Some(&0)) else {
            return Ok(None);
        };
        if let Some(staging) = &self.staging
            && !staging.has_arrived(next)?
        {
            return Ok(None);
        }
        let mut lanes: LaneBuffers = pass.filling[next].iter_mut().filter_map(Option::take).collect();
        if let Some(staging) = &self.staging {
            staging.unload(next, &mut lanes);
        }
        Ok(Some((Arc::clone(&pass.collective), lanes)))
    }

    /// Sums on their way back to the GPU, by parameter.
    fn send_back(&self, staging: &Staging, buckets: &[LaneBuffers]) -> Result<Vec<Tensor>, TorchError> {
        let back = |(number, lanes): (usize, &LaneBuffers)| staging.send_back(number, &lanes[0]);
        let there = buckets.iter().enumerate().map(back).collect::<Result<Vec<_>, _>>()?;
        Ok(self.places.iter().map(|place| place.view_in(&there[place.bucket])).collect())
    }
}

/// This worker's own fault.
fn staging_failed(error: TorchError) -> CollectiveError {
    CollectiveError::Local {
        operation: "the exchange of gradients".into(),
        detail: error.to_string(),
        source: None,
    }
}

/// A bucket after a gradient came.
enum Filled {
    InPart,
    Full,
    Failed,
}

/// One lane's way into the buckets.
struct LaneSink {
    sink: Arc<Sink>,
    lane: usize,
}

impl LaneSink {
    fn failed(&self, error: CollectiveError) -> Gradient {
        self.sink.exchange.fail(error);
        Gradient::Failed
    }
}

impl GradientSink for LaneSink {
    fn gradient_ready(&self, index: usize, gradient: &Tensor) -> Gradient {
        if let Some(buckets) = self.sink.on_device.get() {
            match buckets.give(&self.sink.places[index], gradient) {
                Given::NotWanted => {}
                Given::Taken => return Gradient::Taken,
                Given::Exchange(error) => return self.failed(error),
                Given::Torch(error) => {
                    tracing::error!(%error, "a gradient cannot be exchanged");
                    return Gradient::Failed;
                }
            }
        }
        match self.sink.fill(self.lane, &self.sink.places[index], gradient) {
            None => return Gradient::Left,
            Some(Filled::Failed) => return Gradient::Failed,
            Some(Filled::InPart) => return Gradient::Taken,
            Some(Filled::Full) => {}
        }
        match self.sink.start_full() {
            Ok(()) => Gradient::Taken,
            Err(error) => self.failed(error),
        }
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

    #[test]
    fn gradients_that_go_over_page_locked_memory_are_the_same() {
        let exchange = Exchange::new();
        let own = |size: &[i64], seed: i64| {
            let numbers = Tensor::arange(size.iter().product::<i64>(), (Kind::Float, Device::Cpu));
            ((numbers + seed) * 0.7).sin().view(size)
        };
        let weights = [own(&[4, 3, 5, 5], 1).permute([0, 2, 3, 1]), own(&[7], 2), own(&[6, 2], 3)];
        let sums = |is_staged| {
            let lanes: Vec<[Tensor; 3]> = (0..2)
                .map(|_| weights.each_ref().map(|tensor| tensor.detach().copy().set_requires_grad(true)))
                .collect();
            let order = SumOrder::Lanes;
            let buckets =
                GradientBuckets::with_staging(&exchange, order, &lanes[0].each_ref(), 40, is_staged);
            for (number, lane) in lanes.iter().enumerate() {
                buckets.hook(number, &lane.each_ref()).unwrap();
            }
            let mut found = Vec::new();
            // Memory that is used again holds other numbers.
            for pass in [1.0, 3.0] {
                buckets.begin(2);
                for (number, lane) in lanes.iter().enumerate() {
                    let factor = pass + number as f64;
                    let loss: Tensor =
                        lane.iter().map(|tensor| (tensor * factor).exp().sum(Kind::Float)).sum();
                    torch::backward(&loss, &lane.each_ref()).unwrap();
                }
                let summed = buckets.finish(&[]).unwrap();
                found.extend(summed.tensors().into_iter().map(Tensor::copy));
                buckets.recycle(summed);
                buckets.end();
            }
            assert!(buckets.sink.lengths.len() > 1);
            found
        };
        let (plain, staged) = (sums(false), sums(true));
        assert_eq!(plain.len(), 6);
        for (number, (plain, staged)) in plain.iter().zip(&staged).enumerate() {
            assert!(plain.equal(staged), "gradient {number}");
            assert_eq!(plain.stride(), staged.stride());
        }
        let expected = weights[1].exp() + (&weights[1] * 2.0).exp() * 2.0;
        assert!(plain[1].allclose(&expected, 1e-5, 1e-5, false));
    }
}
