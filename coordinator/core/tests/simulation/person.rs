//! The person who submits the runs, and who resumes what failed or was stopped.

use std::collections::BTreeMap;

use takuma_core::event::*;
use takuma_core::record::RunStatus;

use crate::support;
use crate::world::{Ev, World};

/// Between two looks at the runs.
const LOOKS_EVERY_MS: u64 = 700;

#[derive(Debug, Default)]
pub struct Person {
    requests: u64,
    /// Without an answer yet, and the run that they submit.
    open: BTreeMap<RequestId, Option<String>>,
}

impl World {
    pub fn can_ask(&self) -> bool {
        self.coordinator.up && !self.coordinator.stopped
    }

    pub fn request(&mut self, submits: Option<String>) -> RequestId {
        self.person.requests += 1;
        let request = RequestId(self.person.requests);
        self.person.open.insert(request, submits);
        request
    }

    /// Submits the runs that are due, and resumes those that ended too early.
    pub fn look_after_runs(&mut self) {
        self.schedule(self.now + LOOKS_EVERY_MS, Ev::Person);
        if !self.can_ask() {
            return;
        }
        let due: Vec<_> = self.plan.runs.iter().filter(|run| run.from_ms <= self.now).cloned().collect();
        for wanted in due {
            let view = self.coordinator.cluster.run_view(&wanted.name);
            match view.map(|view| view.record.status) {
                None => self.submit(&wanted.name),
                Some(RunStatus::Stopped | RunStatus::Failed) if self.is_calm || self.rng.one_in(3) => {
                    let request = self.request(None);
                    self.note_enqueued(&wanted.name);
                    let dataset = support::dataset_of(self.plan.global_batch);
                    self.apply(Event::ResumeRequested { request, run: wanted.name, dataset });
                }
                _ => {}
            }
        }
    }

    fn submit(&mut self, name: &str) {
        if self.person.open.values().any(|submits| submits.as_deref() == Some(name)) {
            return;
        }
        let Some(wanted) = self.plan.runs.iter().find(|run| run.name == name).cloned() else { return };
        let request = self.request(Some(wanted.name.clone()));
        let mut submission = support::submission(&wanted.name, wanted.steps, wanted.workers);
        submission.config.global_batch = self.plan.global_batch;
        submission.config.sample_every = self.plan.sample_every;
        submission.config.checkpoint_every = self.plan.checkpoint_every;
        submission.config.exchange_timeout_ms = 5_000;
        submission.config.seed = self.plan.seed;
        submission.dataset = support::dataset_of(self.plan.global_batch);
        submission.random = [self.rng.next(), self.rng.next()];
        self.note_submitted(&wanted);
        self.apply(Event::RunSubmitted { request, submission });
    }

    pub fn answered(&mut self, request: RequestId, result: Result<String, Refusal>) {
        match self.person.open.remove(&request) {
            None => self.violated(&format!("{request:?} was answered twice")),
            Some(Some(run)) if result.is_ok() => self.note_accepted(&run),
            Some(_) => {}
        }
    }

    /// A coordinator that dies owes no answers.
    pub fn forget_life(&mut self) {
        self.person.open.clear();
        self.checks.forget_life();
    }

    /// The next one is asked for what the store does not know.
    pub fn ask_again(&mut self) {
        let known: Vec<String> =
            self.coordinator.cluster.run_views().iter().map(|view| view.record.name.clone()).collect();
        known.iter().for_each(|run| self.note_accepted(run));
    }

    pub fn stop_some_run(&mut self) -> bool {
        if !self.can_ask() {
            return false;
        }
        let Some(run) = self.coordinator.cluster.active().map(str::to_owned) else { return false };
        let request = self.request(None);
        self.apply(Event::StopRequested { request, run });
        true
    }

    pub fn all_succeeded(&mut self) -> bool {
        let is_done = |name: &String| {
            let view = self.coordinator.cluster.run_view(name);
            view.is_some_and(|view| view.record.status == RunStatus::Succeeded)
        };
        self.coordinator.up
            && self.person.open.is_empty()
            && self.coordinator.cluster.active().is_none()
            && self.plan.runs.iter().all(|run| is_done(&run.name))
    }
}
