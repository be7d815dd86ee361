//! What those see who watch a run: its newest state, some times a second, and its log.

use std::time::Duration;

use takuma_core::event::{Refusal, SessionId};
use takuma_proto::v1;
use tokio::time::Instant;

use super::State;
use crate::channels::RunChannels;
use crate::convert;

/// Whoever watches a run is shown a new state of it so often at most, unless its status changes: screens show ten a
/// second.
const SHOW_PERIOD: Duration = Duration::from_millis(50);

impl State {
    /// Shows a run's new state, now or a little later.
    pub(super) fn publish(&mut self, run: &str) {
        let status = self.cluster.run_status(run);
        let shown = self.channels.get(run).zip(status).and_then(|(channels, status)| channels.shown(status));
        let due = shown.map_or_else(Instant::now, |at| at + SHOW_PERIOD);
        if due <= Instant::now() {
            self.show(run);
        } else {
            self.unshown.entry(run.to_owned()).or_insert(due);
        }
    }

    pub(super) fn show_due(&mut self) {
        if self.unshown.is_empty() {
            return;
        }
        let now = Instant::now();
        let due: Vec<String> =
            self.unshown.iter().filter(|&(_, &at)| at <= now).map(|(run, _)| run.clone()).collect();
        due.iter().for_each(|run| self.show(run));
    }

    pub(super) fn show_all(&mut self) {
        let unshown: Vec<String> = self.unshown.keys().cloned().collect();
        unshown.iter().for_each(|run| self.show(run));
    }

    fn show(&mut self, run: &str) {
        self.unshown.remove(run);
        let Some((view, status)) = self.cluster.run_view(run).zip(self.cluster.run_status(run)) else {
            self.channels.remove(run);
            return;
        };
        let view = convert::run_view(&view, self.store.url());
        if let Some(channels) = self.channels_by_name(run) {
            channels.publish(view, status);
        }
    }

    pub(super) fn log(&mut self, session: SessionId, mut line: v1::LogLine) {
        let workers = self.cluster.worker_name(session);
        let Some(worker) = workers else { return };
        line.worker = worker;
        let (run, rank, step, worker) = (&line.run, line.rank, line.step, &line.worker);
        tracing::debug!(run, rank, step, generation = line.generation, worker, "{}", line.message);
        let run = line.run.clone();
        if let Some(channels) = self.channels_by_name(&run) {
            channels.line(line);
        }
    }

    pub(super) fn channels_of(&mut self, prefix: &str) -> Result<&mut RunChannels, Refusal> {
        let name = self.cluster.resolve(prefix)?;
        self.channels_by_name(&name).ok_or_else(|| Refusal::NotFound(format!("there is no run '{prefix}'")))
    }

    pub(super) fn channels_by_name(&mut self, run: &str) -> Option<&mut RunChannels> {
        if !self.channels.contains_key(run) {
            let view = convert::run_view(&self.cluster.run_view(run)?, self.store.url());
            self.channels.insert(run.to_owned(), RunChannels::new(view));
        }
        self.channels.get_mut(run)
    }
}
