//! Streams to clients. A slow client gets the latest view and is told how many events it missed; it never
//! makes anybody wait.

use std::time::Duration;

use takuma_core::event::Refusal;
use takuma_proto::v1;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::channels::{LogSubscription, Subscription};

/// A client gets a new state so often at most: a screen shows ten a second. Every step is in `metrics.jsonl`.
const UPDATE_PERIOD: Duration = Duration::from_millis(100);
/// Updates on their way to a client; after these it gets the latest state instead of every one.
const MAX_UPDATES: usize = 4;
const MAX_LINES: usize = 64;

/// The present state at once with the last events, then every change, until the run has ended.
#[must_use]
pub fn watch(subscription: Subscription) -> ReceiverStream<Result<v1::RunUpdate, Status>> {
    let (updates, stream) = mpsc::channel(MAX_UPDATES);
    // Named: watcher. Ends with the run, the client or the coordinator; holds nothing that others need.
    tokio::spawn(async move {
        let Subscription { mut view, mut events, past_events } = subscription;
        let mut pending = past_events;
        loop {
            let run = view.borrow_and_update().clone();
            drain(&mut events, &mut pending);
            let ended = has_ended(&run);
            let update = v1::RunUpdate { run: Some(run), events: std::mem::take(&mut pending) };
            let next = Instant::now() + UPDATE_PERIOD;
            if updates.send(Ok(update)).await.is_err() || ended || view.changed().await.is_err() {
                return;
            }
            tokio::select! {
                biased;
                // The end is told at once, and so is that of the coordinator.
                _ = async { view.wait_for(has_ended).await.is_ok() } => {}
                () = tokio::time::sleep_until(next) => {}
            }
        }
    });
    ReceiverStream::new(stream)
}

fn drain(events: &mut broadcast::Receiver<v1::RunEvent>, pending: &mut Vec<v1::RunEvent>) {
    loop {
        match events.try_recv() {
            Ok(event) => pending.push(event),
            Err(TryRecvError::Lagged(missed)) => {
                let message =
                    format!("{missed} events were too many for this connection; events.jsonl has them");
                pending.push(v1::RunEvent { kind: "missed".to_owned(), message, ..v1::RunEvent::default() });
            }
            Err(TryRecvError::Empty | TryRecvError::Closed) => return,
        }
    }
}

fn has_ended(run: &v1::RunView) -> bool {
    matches!(run.status(), v1::RunStatus::Stopped | v1::RunStatus::Succeeded | v1::RunStatus::Failed)
}

/// Which lines a client wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter {
    least: u8,
    rank: Option<i32>,
    tail: usize,
    follow: bool,
}

fn severity(level: &str) -> Option<u8> {
    ["error", "warn", "info", "debug", "trace"]
        .iter()
        .position(|name| level.eq_ignore_ascii_case(name))
        .map(|place| place as u8)
}

impl LogFilter {
    /// The filter that a request asks for.
    ///
    /// # Errors
    /// An unknown level.
    pub fn new(request: &v1::ReadLogsRequest) -> Result<Self, Refusal> {
        let level = if request.level.is_empty() { "info" } else { &request.level };
        let least = severity(level).ok_or_else(|| {
            Refusal::Invalid(format!("'{level}' is no level; levels are error, warn, info, debug"))
        })?;
        let tail = if request.tail == 0 { usize::MAX } else { request.tail as usize };
        Ok(Self { least, rank: request.rank, tail, follow: request.follow })
    }

    fn wants(&self, line: &v1::LogLine) -> bool {
        let severe = severity(&line.level).unwrap_or(0) <= self.least;
        severe && self.rank.is_none_or(|rank| rank == line.rank)
    }
}

/// The kept lines, and with `follow` the later ones until the run has ended.
#[must_use]
pub fn logs(subscription: LogSubscription, filter: LogFilter) -> ReceiverStream<Result<v1::LogLine, Status>> {
    let (lines, stream) = mpsc::channel(MAX_LINES);
    // Named: log reader. Ends with the run, the client or the coordinator.
    tokio::spawn(async move {
        let LogSubscription { view, lines: later, past_lines } = subscription;
        let past: Vec<_> = past_lines.into_iter().filter(|line| filter.wants(line)).collect();
        for line in past.iter().skip(past.len().saturating_sub(filter.tail)) {
            if lines.send(Ok(line.clone())).await.is_err() {
                return;
            }
        }
        if filter.follow {
            follow(view, later, &filter, &lines).await;
        }
    });
    ReceiverStream::new(stream)
}

async fn follow(
    mut view: watch::Receiver<v1::RunView>,
    mut later: broadcast::Receiver<v1::LogLine>,
    filter: &LogFilter,
    lines: &mpsc::Sender<Result<v1::LogLine, Status>>,
) {
    loop {
        let ended = has_ended(&view.borrow_and_update());
        let line = tokio::select! {
            biased;
            line = later.recv() => line,
            // The lines that came before the end are all in `later`, which is asked first.
            () = std::future::ready(()), if ended => return,
            changed = view.changed() => if changed.is_ok() { continue } else { return },
        };
        let line = match line {
            Ok(line) if filter.wants(&line) => line,
            Ok(_) => continue,
            Err(RecvError::Lagged(missed)) => v1::LogLine {
                level: "WARN".to_owned(),
                rank: -1,
                message: format!("{missed} lines were too many for this connection and are left out"),
                worker: "coordinator".to_owned(),
                ..v1::LogLine::default()
            },
            Err(RecvError::Closed) => return,
        };
        if lines.send(Ok(line)).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_and_rank_choose_lines() {
        let request =
            v1::ReadLogsRequest { level: "warn".into(), rank: Some(1), ..v1::ReadLogsRequest::default() };
        let filter = LogFilter::new(&request).unwrap();
        let line = |level: &str, rank| v1::LogLine { level: level.into(), rank, ..v1::LogLine::default() };
        assert!(filter.wants(&line("ERROR", 1)) && filter.wants(&line("WARN", 1)));
        assert!(!filter.wants(&line("INFO", 1)) && !filter.wants(&line("ERROR", 0)));
    }

    #[test]
    fn unknown_level_is_refused() {
        let request = v1::ReadLogsRequest { level: "loud".into(), ..v1::ReadLogsRequest::default() };
        assert!(matches!(LogFilter::new(&request), Err(Refusal::Invalid(text)) if text.contains("'loud'")));
    }
}
