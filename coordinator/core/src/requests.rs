//! What clients ask for: submit, stop, resume; and what a restart finds in the store.

use crate::cluster::Cluster;
use std::collections::BTreeSet;

use crate::config::{OnNan, RunConfig};
use crate::dataset::DatasetManifest;
use crate::event::{Action, Directive, OriginCheckpoint, Refusal, RequestId, Submission};
use crate::ids::{Generation, Step};
use crate::names;
use crate::record::{DatasetFacts, RUN_FORMAT, RunRecord, RunStatus};
use crate::run::Run;
use crate::time::Timestamp;

/// Runs that may wait; more is a script gone wild.
const MAX_QUEUE: usize = 1_000;

impl Cluster {
    /// Checks a run against its dataset and returns what the dataset means for it.
    ///
    /// # Errors
    /// The broken rule in words.
    pub fn facts(config: &RunConfig, dataset: &DatasetManifest) -> Result<DatasetFacts, Refusal> {
        let refused = |error: crate::config::ConfigError| Refusal::Invalid(error.to_string());
        config.validate().map_err(refused)?;
        let slots = config.slot_map(dataset).map_err(refused)?;
        let (digest, images) = (dataset.digest.clone(), dataset.images);
        Ok(DatasetFacts { digest, images, steps_per_epoch: slots.steps_per_epoch() })
    }

    /// The name that a submission would get.
    ///
    /// # Errors
    /// Malformed or taken.
    pub fn name_for(&self, submission: &Submission) -> Result<String, Refusal> {
        let taken = |name: &str| self.runs.contains_key(name) || self.reserved.contains(name);
        let Some(name) = &submission.name else { return Ok(names::memorable(submission.random[0], taken)) };
        names::check("run name", name).map_err(|error| Refusal::Invalid(error.to_string()))?;
        if taken(name) {
            let message = format!("there is already a run named '{name}'; give another with --name");
            return Err(Refusal::Precondition(message));
        }
        Ok(name.clone())
    }

    /// The record that a submission would get.
    ///
    /// # Errors
    /// A bad name, or a configuration that does not go with the dataset.
    pub fn record_for(&self, submission: &Submission) -> Result<RunRecord, Refusal> {
        let dataset = Self::facts(&submission.config, &submission.dataset)?;
        if let Some(origin) = &submission.origin {
            check_origin(origin, &submission.config, &dataset)?;
        }
        let [high, low] = submission.random;
        Ok(RunRecord {
            format: RUN_FORMAT,
            name: self.name_for(submission)?,
            id: format!("{high:016x}{low:016x}"),
            target_steps: submission.config.target_steps(dataset.steps_per_epoch),
            config: submission.config.clone(),
            dataset,
            created: self.now,
            queued: self.end_of_queue(),
            status: RunStatus::Queued,
            generation: Generation(0),
            generations_reserved: Generation(0),
            lineage: Generation(0),
            passed_over: self.passed_over_by(submission),
            step: submission.origin.as_ref().map_or(0, |origin| origin.mark.step),
            origin: submission.origin.as_ref().map(|given| given.mark.clone()),
            elapsed_ms: 0,
            workers: 0,
            pace_s: None,
            checkpoint: None,
            weights_sha256: String::new(),
            error: String::new(),
        })
    }

    /// A fork that would roll back before a number that is none passes over what its origin did: it would only come to
    /// the same number once more.
    fn passed_over_by(&self, submission: &Submission) -> BTreeSet<Step> {
        let rolls_back = submission.config.on_nan == OnNan::Rollback;
        let Some(mark) = submission.origin.as_ref().map(|origin| &origin.mark).filter(|_| rolls_back) else {
            return BTreeSet::new();
        };
        let origin = self.runs.get(&mark.run);
        origin.map_or_else(BTreeSet::new, |origin| {
            origin.record.passed_over.range(mark.step + 1..).copied().collect()
        })
    }

    /// When a run that is queued now counts as queued: after all others, also if the clock of the coordinator before
    /// was ahead of this one's. A restart finds the order by it.
    fn end_of_queue(&self) -> Timestamp {
        let waits = |run: &&Run| matches!(run.record.status, RunStatus::Queued | RunStatus::Waiting);
        let last = self.runs.values().filter(waits).map(|run| run.record.queued).max();
        last.map_or(self.now, |last| self.now.max(last.plus_ms(1)))
    }

    pub(crate) fn on_submitted(&mut self, request: RequestId, submission: Submission) {
        if self.queue.len() >= MAX_QUEUE {
            let refusal =
                Refusal::Exhausted(format!("{MAX_QUEUE} runs wait already; wait for some or stop them"));
            return self.answer(request, Err(refusal));
        }
        let record = match self.record_for(&submission) {
            Ok(record) => record,
            Err(refusal) => return self.answer(request, Err(refusal)),
        };
        let name = record.name.clone();
        self.out.push(Action::SaveRun { record: Box::new(record.clone()), first: true, acknowledge: true });
        self.runs.insert(name, Run::new(record, Some(request)));
    }

    /// The run is safe in the store, so it counts; or it never was.
    pub(crate) fn on_submission_saved(
        &mut self,
        name: &str,
        request: RequestId,
        outcome: Result<(), String>,
    ) {
        if let Err(error) = outcome {
            self.runs.remove(name);
            self.out.push(Action::CloseRun { run: name.to_owned() });
            return self.answer(request, Err(Refusal::Unavailable(error)));
        }
        self.queue.push_back(name.to_owned());
        let steps = self.runs.get(name).map_or(0, |run| run.record.target_steps);
        let message = match steps {
            1 => "1 step is to be trained".to_owned(),
            steps => format!("{steps} steps are to be trained"),
        };
        self.record(name, "submitted", "", message);
        self.answer(request, Ok(name.to_owned()));
        self.queue_changed();
    }

    pub(crate) fn on_stop(&mut self, request: RequestId, prefix: &str) {
        let name = match self.resolve(prefix) {
            Ok(name) => name,
            Err(refusal) => return self.answer(request, Err(refusal)),
        };
        let result = self.stop(&name).map(|()| name);
        self.answer(request, result);
    }

    fn stop(&mut self, name: &str) -> Result<(), Refusal> {
        let Some(run) = self.runs.get_mut(name) else { return Ok(()) };
        match run.record.status {
            RunStatus::Queued if run.submitter.is_some() => {
                Err(Refusal::Precondition(format!("run {name} is just being submitted; try again")))
            }
            RunStatus::Queued => {
                self.queue.retain(|queued| queued != name);
                self.end_untrained(name, "stopped while it waited in the queue");
                Ok(())
            }
            RunStatus::Preparing => {
                self.release_members(name, Some("the run was stopped"));
                self.end_untrained(name, "stopped before it started");
                Ok(())
            }
            RunStatus::Waiting => {
                self.queue.retain(|queued| queued != name);
                self.end_untrained(name, "stopped while it waited for workers");
                Ok(())
            }
            RunStatus::Running => {
                run.record.status = RunStatus::Stopping;
                let fence = run.fence();
                let members = run.group.iter().flat_map(|group| &group.members);
                let sessions: Vec<_> =
                    members.filter(|member| member.ended.is_none()).map(|member| member.session).collect();
                for session in sessions {
                    self.direct(session, Directive::Stop(fence.clone()));
                }
                self.record(
                    name,
                    "stopping",
                    "",
                    "the members end the step and write a checkpoint".to_owned(),
                );
                self.save(name, false);
                Ok(())
            }
            RunStatus::Stopping | RunStatus::Stopped => Ok(()),
            RunStatus::Succeeded => Err(Refusal::Precondition(format!("run {name} has already succeeded"))),
            RunStatus::Failed => Err(Refusal::Precondition(format!("run {name} has already failed"))),
        }
    }

    pub(crate) fn end_untrained(&mut self, name: &str, message: &str) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.group = None;
        run.reunion = None;
        run.record.status = RunStatus::Stopped;
        self.close(name, "stopped", message.to_owned());
    }

    pub(crate) fn on_resume(&mut self, request: RequestId, prefix: &str, dataset: &DatasetManifest) {
        let result = self.resolve(prefix).and_then(|name| self.resume(&name, dataset).map(|()| name));
        self.answer(request, result);
    }

    fn resume(&mut self, name: &str, dataset: &DatasetManifest) -> Result<(), Refusal> {
        let queued = self.end_of_queue();
        let Some(run) = self.runs.get_mut(name) else { return Ok(()) };
        let refused = |message: String| Err(Refusal::Precondition(message));
        match run.record.status {
            RunStatus::Stopped | RunStatus::Failed => {}
            RunStatus::Succeeded => {
                let steps = run.record.target_steps;
                return refused(format!("run {name} has succeeded: all its {steps} steps are done"));
            }
            RunStatus::Queued => return refused(format!("run {name} is in the queue already")),
            RunStatus::Waiting => {
                return refused(format!(
                    "run {name} waits for workers, and goes on by itself when one comes"
                ));
            }
            _ => return refused(format!("run {name} is running")),
        }
        if dataset.digest != run.record.dataset.digest {
            return refused(format!(
                "the dataset at {} is not the one that run {name} began with; submit a new run",
                run.record.config.data
            ));
        }
        run.record.status = RunStatus::Queued;
        run.record.queued = queued;
        run.record.error.clear();
        run.record.weights_sha256.clear();
        run.unfit.clear();
        run.pausing = false;
        run.last_cut = None;
        run.record.step = run.beginning().0;
        let message = format!("goes on from step {}", run.record.step);
        self.queue.push_back(name.to_owned());
        self.record(name, "resumed", "", message);
        self.save(name, false);
        self.queue_changed();
        Ok(())
    }

    /// The full name behind a prefix.
    ///
    /// # Errors
    /// None or several runs have it.
    pub fn resolve(&self, prefix: &str) -> Result<String, Refusal> {
        match names::resolve(&self.runs, prefix) {
            Ok(name) => Ok(name.to_owned()),
            Err(error @ names::NameError::Unknown { .. }) => Err(Refusal::NotFound(error.to_string())),
            Err(error) => Err(Refusal::Invalid(error.to_string())),
        }
    }

    pub(crate) fn answer(&mut self, request: RequestId, result: Result<String, Refusal>) {
        self.out.push(Action::Answer { request, result });
    }
}

/// A fork goes on with the images and the noise of its origin, so what decides them stays as it is.
fn check_origin(
    origin: &OriginCheckpoint,
    config: &RunConfig,
    dataset: &DatasetFacts,
) -> Result<(), Refusal> {
    let OriginCheckpoint { mark, config: before, dataset_digest } = origin;
    let pairs = [
        ("recipe", before.recipe.to_string(), config.recipe.to_string()),
        ("global_batch", before.global_batch.to_string(), config.global_batch.to_string()),
        ("seed", before.seed.to_string(), config.seed.to_string()),
    ];
    if let Some((key, was, is)) = pairs.iter().find(|(_, was, is)| was != is) {
        return Err(Refusal::Invalid(format!(
            "{key} is {is}, but the checkpoint {mark} was trained with {was}: a fork keeps recipe, data, global_batch and \
             seed; leave {key} as it is, or submit a new run"
        )));
    }
    if *dataset_digest != dataset.digest {
        return Err(Refusal::Invalid(format!(
            "the dataset at {} is not the one that the checkpoint {mark} was trained on; leave data as it is, or submit \
             a new run",
            config.data
        )));
    }
    let target = config.target_steps(dataset.steps_per_epoch);
    if target <= mark.step {
        return Err(Refusal::Invalid(format!(
            "the run would end at step {target}, but the checkpoint {mark} is at step {} already; set steps to more",
            mark.step
        )));
    }
    Ok(())
}
