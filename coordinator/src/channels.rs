//! [`RunChannels`]: what clients watch of a run: its view, its events, its log lines.
//!
//! A slow client never holds anybody up: of views it gets the latest, of events and lines as many as a
//! bounded buffer holds. Log lines are kept in memory only.

use std::collections::VecDeque;

use takuma_core::record::RunStatus;
use takuma_proto::v1;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

/// Events that a client gets when it begins to watch.
const EVENTS_KEPT: usize = 100;
/// Log lines kept per run.
const LINES_KEPT: usize = 10_000;
/// What a slow client may lag behind by.
const LAG: usize = 1_024;

/// The latest view of a run and the way to the next ones.
#[derive(Debug)]
pub struct Subscription {
    /// Latest wins.
    pub view: watch::Receiver<v1::RunView>,
    /// From now on.
    pub events: broadcast::Receiver<v1::RunEvent>,
    /// The last ones before.
    pub past_events: Vec<v1::RunEvent>,
}

/// Log lines of a run and the way to the next ones.
#[derive(Debug)]
pub struct LogSubscription {
    /// To see the run's end.
    pub view: watch::Receiver<v1::RunView>,
    /// From now on.
    pub lines: broadcast::Receiver<v1::LogLine>,
    /// Those that are kept.
    pub past_lines: Vec<v1::LogLine>,
}

/// The sending ends, held by the owner of the state.
#[derive(Debug)]
pub struct RunChannels {
    view: watch::Sender<v1::RunView>,
    shown: Option<(RunStatus, Instant)>,
    events: broadcast::Sender<v1::RunEvent>,
    past_events: VecDeque<v1::RunEvent>,
    lines: broadcast::Sender<v1::LogLine>,
    past_lines: VecDeque<v1::LogLine>,
}

impl RunChannels {
    /// Channels that show `view` first.
    #[must_use]
    pub fn new(view: v1::RunView) -> Self {
        Self {
            view: watch::Sender::new(view),
            shown: None,
            events: broadcast::Sender::new(LAG),
            past_events: VecDeque::new(),
            lines: broadcast::Sender::new(LAG),
            past_lines: VecDeque::new(),
        }
    }

    /// Shows a new view; the events of the change come before it.
    pub fn publish(&mut self, view: v1::RunView, status: RunStatus) {
        self.shown = Some((status, Instant::now()));
        self.view.send_replace(view);
    }

    /// When the last view was shown, if that was one of this status.
    #[must_use]
    pub fn shown(&self, status: RunStatus) -> Option<Instant> {
        self.shown.filter(|(shown, _)| *shown == status).map(|(_, at)| at)
    }

    /// Adds an event. Nobody watching is no fault.
    pub fn event(&mut self, event: v1::RunEvent) {
        push_bounded(&mut self.past_events, event.clone(), EVENTS_KEPT);
        if self.events.receiver_count() > 0 && self.events.send(event).is_err() {
            tracing::trace!("the last watcher left");
        }
    }

    /// Adds a log line.
    pub fn line(&mut self, line: v1::LogLine) {
        push_bounded(&mut self.past_lines, line.clone(), LINES_KEPT);
        if self.lines.receiver_count() > 0 && self.lines.send(line).is_err() {
            tracing::trace!("the last reader left");
        }
    }

    /// For a client that begins to watch.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            view: self.view.subscribe(),
            events: self.events.subscribe(),
            past_events: self.past_events.iter().cloned().collect(),
        }
    }

    /// For a client that begins to read logs.
    #[must_use]
    pub fn subscribe_logs(&self) -> LogSubscription {
        LogSubscription {
            view: self.view.subscribe(),
            lines: self.lines.subscribe(),
            past_lines: self.past_lines.iter().cloned().collect(),
        }
    }
}

fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, most: usize) {
    if queue.len() >= most {
        queue.pop_front();
    }
    queue.push_back(item);
}
