//! [`Program`]: graphs with sums over the workers between them, and [`record`], which makes one.
//!
//! A sum of a group belongs into no graph: a communicator that is ended waits for the graphs that hold its sums, for
//! ever. So while a step is captured, each sum ends the running capture and begins the next one, and is kept as an
//! entry of its own between both. It comes from whatever thread has come to it: forward passes run on the thread
//! that records, backward passes on one of libtorch's.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::torch::TorchError;

/// Keeps what a device is given instead of running it. [`super::StreamCapture`] on a GPU.
pub trait Capture: Send {
    /// What was kept.
    type Graph;

    /// Keeps all that the device is given from now on.
    ///
    /// # Errors
    /// The device runs what it is given, as before.
    fn begin(&mut self) -> Result<(), TorchError>;

    /// Whether nothing was kept since [`Capture::begin`].
    ///
    /// # Errors
    /// The capture is lost.
    fn is_empty(&mut self) -> Result<bool, TorchError>;

    /// Ends what [`Capture::begin`] began.
    ///
    /// # Errors
    /// The capture is lost, and the device runs again what it is given.
    fn end(&mut self) -> Result<Self::Graph, TorchError>;

    /// Ends a capture that is no use, if one is running: the device runs again what it is given.
    fn abandon(&mut self);
}

/// What a device does in one step, in order: graphs `G`, and sums over the workers, each described by an `S`.
#[derive(Debug)]
pub struct Program<G, S> {
    /// Dropped from last to first, so that the memory that all graphs share goes with the first one.
    entries: Vec<Entry<G, S>>,
}

#[derive(Debug)]
enum Entry<G, S> {
    Graph(G),
    Sum(S),
}

impl<G, S> Program<G, S> {
    /// Gives the device everything once more: `launch` a graph, `sum` over the workers.
    ///
    /// # Errors
    /// The first that failed; what comes behind it was not given to the device.
    pub fn replay<E>(
        &mut self,
        mut launch: impl FnMut(&mut G) -> Result<(), E>,
        mut sum: impl FnMut(&S) -> Result<(), E>,
    ) -> Result<(), E> {
        self.entries.iter_mut().try_for_each(|entry| match entry {
            Entry::Graph(graph) => launch(graph),
            Entry::Sum(what) => sum(what),
        })
    }

    /// Graphs and sums.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let graphs = self.entries.iter().filter(|entry| matches!(entry, Entry::Graph(_))).count();
        (graphs, self.entries.len() - graphs)
    }
}

impl<G, S> Drop for Program<G, S> {
    fn drop(&mut self) {
        while self.entries.pop().is_some() {}
    }
}

/// Where sums go while a step is recorded.
pub trait Recording<S>: Send + Sync {
    /// Keeps `sum` behind all that was captured, and captures what follows it.
    ///
    /// # Errors
    /// The recording has failed, now or before: nothing more will be kept, and the step must end.
    fn sum(&self, sum: S) -> Result<(), TorchError>;
}

/// A recording under way.
struct Recorder<C: Capture, S> {
    state: Mutex<State<C, S>>,
}

struct State<C: Capture, S> {
    /// Behind the entries, and so dropped behind them: the next capture shares the memory of the last graph.
    entries: Vec<Entry<C::Graph, S>>,
    capture: C,
    /// Why the recording is void.
    failed: Option<TorchError>,
    is_over: bool,
}

/// Runs `body` with the device's work captured, and with sums kept between; nothing of it is run.
///
/// Run the same body a few times without this first: cuDNN measures its algorithms then, and kernels are compiled. The
/// body must not read a value back, nor wait for the device.
///
/// # Errors
/// The body's, or the capture's. The device is then as before, and runs what it is given.
///
/// # Panics
/// If the body does, after the capture has been ended.
pub fn record<C, S, E>(
    mut capture: C,
    body: impl FnOnce(Arc<dyn Recording<S>>) -> Result<(), E>,
) -> Result<Program<C::Graph, S>, E>
where
    C: Capture + 'static,
    C::Graph: Send + 'static,
    S: Send + 'static,
    E: From<TorchError>,
{
    capture.begin()?;
    let state = State { entries: Vec::new(), capture, failed: None, is_over: false };
    let recorder = Arc::new(Recorder { state: Mutex::new(state) });
    let recording = Arc::clone(&recorder) as Arc<dyn Recording<S>>;
    let outcome = catch_unwind(AssertUnwindSafe(|| body(recording)));
    // Whatever follows, the device runs again what it is given.
    let recorded = recorder.lock().finish(matches!(outcome, Ok(Ok(()))));
    match outcome {
        Ok(body) => body.and_then(|()| Ok(recorded?)),
        Err(panic) => resume_unwind(panic),
    }
}

impl<C: Capture, S> Recorder<C, S> {
    fn lock(&self) -> MutexGuard<'_, State<C, S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C, S> Recording<S> for Recorder<C, S>
where
    C: Capture,
    C::Graph: Send,
    S: Send,
{
    fn sum(&self, sum: S) -> Result<(), TorchError> {
        let mut state = self.lock();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        if state.is_over {
            let message = "it has ended, so nothing more can be kept".to_owned();
            return Err(TorchError { operation: "a recording", message });
        }
        state.sum(sum).inspect_err(|error| state.failed = Some(error.clone()))
    }
}

impl<C: Capture, S> State<C, S> {
    fn sum(&mut self, sum: S) -> Result<(), TorchError> {
        // Sums that follow each other have nothing between them, and an empty graph costs a launch.
        if self.capture.is_empty()? {
            self.entries.push(Entry::Sum(sum));
            return Ok(());
        }
        self.keep_graph()?;
        self.entries.push(Entry::Sum(sum));
        self.capture.begin()
    }

    fn keep_graph(&mut self) -> Result<(), TorchError> {
        let graph = self.capture.end()?;
        self.entries.push(Entry::Graph(graph));
        Ok(())
    }

    /// Ends the recording; the program, if `is_wanted`.
    fn finish(&mut self, is_wanted: bool) -> Result<Program<C::Graph, S>, TorchError> {
        self.is_over = true;
        let ended = match self.failed.take() {
            Some(failed) => Err(failed),
            None if is_wanted => self.keep_graph(),
            None => Ok(()),
        };
        self.capture.abandon();
        let program = Program { entries: std::mem::take(&mut self.entries) };
        ended.map(|()| program)
    }
}

impl<C: Capture, S> fmt::Debug for Recorder<C, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

#[cfg(test)]
mod tests;
