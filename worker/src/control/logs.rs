//! Log lines on their way to the coordinator, where `takuma run logs` reads them.

use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use takuma_proto::v1::LogLine;
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::trainer::Progress;

/// Lines that wait for the session; later ones are dropped while it is full, never waited for.
const QUEUE_LINES: usize = 512;

/// A tracing layer that copies INFO and above, stamped with the run that the worker is in.
#[derive(Debug, Clone)]
pub struct LogForwarder {
    lines: mpsc::Sender<LogLine>,
    place: Arc<Mutex<Option<Place>>>,
}

/// Where in which run the worker is.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub run: String,
    pub rank: u32,
    pub generation: u64,
    pub progress: Arc<Progress>,
}

impl LogForwarder {
    /// The layer and the queue that it fills.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<LogLine>) {
        let (lines, queue) = mpsc::channel(QUEUE_LINES);
        (Self { lines, place: Arc::default() }, queue)
    }

    pub(super) fn enter(&self, place: Option<Place>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }
}

impl<S: Subscriber> Layer<S> for LogForwarder {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        if *meta.level() > Level::INFO || !meta.target().starts_with("takuma") {
            return;
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let at_unix_s = SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64());
        let line = LogLine {
            at_unix_s,
            level: meta.level().to_string(),
            run: place.as_ref().map(|place| place.run.clone()).unwrap_or_default(),
            rank: place.as_ref().map_or(-1, |place| place.rank as i32),
            generation: place.as_ref().map_or(0, |place| place.generation),
            step: place.as_ref().map_or(0, |place| place.progress.step()),
            message: text.0,
            worker: String::new(),
        };
        // A full queue means that nobody reads: the line is on this worker's own log all the same.
        drop(self.lines.try_send(line));
    }
}

/// The message, then the other fields as `key=value`.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = if field.name() == "message" {
            let rest = std::mem::take(&mut self.0);
            write!(self.0, "{value:?}{rest}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
        debug_assert!(written.is_ok(), "writing to a String succeeds");
    }
}
