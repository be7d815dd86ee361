//! [`Painter`]: renders grids beside the training, on a thread and a stream of its own.
//!
//! A grid takes a GPU as long as some steps, and the way back to the host makes whoever asks for it wait. So the
//! trainer only copies the generator, within the GPU's memory, and goes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use takuma_core::config::RunConfig;
use takuma_core::slots::SlotRange;
use tch::{Device, Kind, Tensor};

use super::messages::panic_words;
use super::samples::render;
use crate::checkpoint::restore_network;
use crate::device;
use crate::model::{Arithmetic, Generator};
use crate::recipe::DcganState;
use crate::torch::TorchError;
use crate::torch::cuda::Event;

/// Grids that wait. Each holds a copy of the generator, 20 MB.
const MAX_WAITING: usize = 2;
/// A grid takes milliseconds, the first one some seconds more: cuDNN is loaded for the new thread.
const LONGEST: Duration = Duration::from_secs(120);

/// So long the end of the painter waits for a grid that is under way.
const LONGEST_AT_END: Duration = Duration::from_secs(10);

/// A grid to render.
pub(super) struct Painting {
    /// Finished steps.
    pub(super) step: u64,
    /// The part of the grid.
    pub(super) cells: SlotRange,
    /// The generator's tensors by name, as they were then.
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// When they are.
    pub(super) ready: Event,
}

/// The thread and what waits for it.
pub(super) struct Painter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Painting>,
    is_painting: bool,
    is_closed: bool,
    /// What ended the thread.
    error: Option<TorchError>,
}

impl Painter {
    /// Starts the thread. `deliver` takes each grid's step, cells and pixels (see [`render`]).
    ///
    /// # Errors
    /// The machine is out of threads.
    pub(super) fn start(
        config: &RunConfig,
        device: Device,
        deliver: impl Fn(u64, SlotRange, Vec<u8>) + Send + 'static,
    ) -> Result<Self, TorchError> {
        let shared = Arc::<Shared>::default();
        let (config, own) = (config.clone(), Arc::clone(&shared));
        let body = move || {
            let painted = || work(&own, &config, device, deliver);
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(painted));
            let error = match ended {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                // tch's operators panic with libtorch's words.
                Err(panic) => failed(panic_words(&*panic)),
            };
            own.change(|queue| {
                queue.is_painting = false;
                queue.waiting.clear();
                queue.error = Some(error);
            });
        };
        let thread = std::thread::Builder::new().name("painter".to_owned()).spawn(body);
        Ok(Self { shared, thread: Some(thread.map_err(|error| failed(error.to_string()))?) })
    }

    /// Hands a grid over; waits while others do.
    ///
    /// # Errors
    /// What ended the thread, or that it does not get on.
    pub(super) fn hand_over(&self, painting: Painting) -> Result<(), TorchError> {
        let mut queue = self.wait(|queue| queue.waiting.len() < MAX_WAITING)?;
        queue.waiting.push_back(painting);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until every grid that was handed over has been delivered.
    ///
    /// # Errors
    /// As [`Painter::hand_over`].
    pub(super) fn settle(&self) -> Result<(), TorchError> {
        self.wait(|queue| queue.waiting.is_empty() && !queue.is_painting).map(drop)
    }

    fn wait(&self, is_wanted: impl Fn(&Queue) -> bool) -> Result<MutexGuard<'_, Queue>, TorchError> {
        let waits = |queue: &mut Queue| queue.error.is_none() && !is_wanted(queue);
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), LONGEST, waits);
        let (queue, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        match &queue.error {
            Some(error) => Err(error.clone()),
            None if waited.timed_out() => Err(failed(format!("no grid within {} s", LONGEST.as_secs()))),
            None => Ok(queue),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// The next grid; `None` when there will be none.
    fn next(&self) -> Option<Painting> {
        self.change(|queue| queue.is_painting = false);
        let waits = |queue: &mut Queue| queue.waiting.is_empty() && !queue.is_closed;
        let queue = self.changed.wait_while(self.lock(), waits);
        let mut queue = queue.unwrap_or_else(PoisonError::into_inner);
        let painting = queue.waiting.pop_front().filter(|_| !queue.is_closed);
        queue.is_painting = painting.is_some();
        drop(queue);
        self.changed.notify_all();
        painting
    }
}

impl Drop for Painter {
    fn drop(&mut self) {
        self.shared.change(|queue| queue.is_closed = true);
        // A GPU that hangs must not keep whoever has to say so.
        let is_painting = |queue: &mut Queue| queue.is_painting;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), LONGEST_AT_END, is_painting);
        let (queue, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(queue);
        if waited.timed_out() {
            tracing::error!("a grid under way is left behind: it does not come to its end");
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the painter panicked at its end");
        }
    }
}

/// The thread: one grid after the other.
fn work(
    shared: &Shared,
    config: &RunConfig,
    device: Device,
    deliver: impl Fn(u64, SlotRange, Vec<u8>),
) -> Result<(), TorchError> {
    device::enter(device, config).map_err(|error| failed(error.to_string()))?;
    let mut generator: Option<Generator> = None;
    while let Some(mut painting) = shared.next() {
        let generator = generator.get_or_insert_with(|| {
            let arithmetic = Arithmetic { device, kind: Kind::Float, compute: Kind::Float };
            DcganState::new(config.recipe, config.seed, arithmetic).generator
        });
        if !painting.ready.wait(Instant::now() + LONGEST)? {
            return Err(failed(format!("the GPU has not come to its copy within {} s", LONGEST.as_secs())));
        }
        tch::no_grad(|| restore_network(generator, &painting.tensors))
            .map_err(|error| failed(error.to_string()))?;
        deliver(painting.step, painting.cells, render(generator, config.seed, painting.cells));
    }
    Ok(())
}

fn failed(message: String) -> TorchError {
    TorchError { operation: "rendering a grid", message }
}
