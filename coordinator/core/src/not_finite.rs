//! A loss or gradient that is not finite: what the run's [`OnNan`] makes of it.
//!
//! Nothing of such an update is applied anywhere. With `skip`, members go on by themselves; here it only comes when that
//! is not wanted, or has been done too often.

use crate::cluster::Cluster;
use crate::config::OnNan;
use crate::event::{Action, MemberFailure, SessionId};
use crate::ids::Step;
use crate::record::RunStatus;
use crate::run::{Group, Run};

/// Steps that a run may pass over after returns to a checkpoint; one that needs more does not converge.
const MAX_PASSED_OVER: usize = 20;

impl Cluster {
    /// All members see it in the same phase, and the first one's word is enough. The state that it is told of is this
    /// past's, whatever group was formed meanwhile: who tells has given up and will not be in that one.
    pub(crate) fn on_not_finite(&mut self, session: SessionId, failure: &MemberFailure) {
        let fence = &failure.fence;
        let valid = self.runs.get(&fence.run).is_some_and(|run| {
            let newest = run.change.as_ref().map_or(run.record.generation, |change| change.generation);
            let trains = run.reunion.is_some() || run.group.as_ref().is_some_and(Group::has_state);
            trains && (run.record.lineage..=newest).contains(&fence.generation)
        });
        let who = self.members.get(session).map(|worker| worker.introduction());
        let Some((who, run)) = who.zip(self.runs.get_mut(&fence.run)).filter(|_| valid) else {
            return self.out.push(Action::RefuseStale { session, what: "RunFailed", fence: fence.clone() });
        };
        let cause = format!("{who} failed at step {} ({}): {}", failure.step, failure.phase, failure.message);
        let remedy = other_settings(run);
        let record = &mut run.record;
        let step = failure.step + 1;
        let many = record.passed_over.len();
        let limit = match record.config.on_nan {
            OnNan::Rollback if record.status == RunStatus::Stopping => String::new(),
            OnNan::Rollback if many < MAX_PASSED_OVER && record.passed_over.insert(step) => {
                return self.roll_back(&fence.run, step, &cause);
            }
            OnNan::Rollback => format!("; steps passed over before: {many}"),
            OnNan::Skip => "; ten steps in a row made no update".to_owned(),
            OnNan::Stop => String::new(),
        };
        self.fail_for(&fence.run, &format!("{cause}{limit}"), &remedy);
    }

    /// The run goes back to its newest checkpoint and passes over the step when it comes to it again.
    fn roll_back(&mut self, name: &str, step: Step, cause: &str) {
        let Some(from) = self.put_back(name, cause) else { return };
        if let Some(run) = self.runs.get_mut(name) {
            // The past ends here: who was away and still has its state must not bring it back.
            run.record.lineage = run.record.generation.next();
        }
        let message = format!("{cause}; the run goes on {from}, and will make no update in step {step}");
        self.record(name, "rolled_back", "", message);
        self.save(name, false);
    }
}

/// What helps: the same images and settings would lead to the same number.
fn other_settings(run: &Run) -> String {
    let name = &run.record.name;
    let skip = if run.record.config.on_nan == OnNan::Stop { "on_nan=skip, or " } else { "" };
    match &run.record.checkpoint {
        Some(mark) => format!(
            "go on with other settings, by 'takuma run fork {name}@{}' and --set {skip}a smaller learning_rate",
            mark.step
        ),
        None => format!("submit the run again with other settings, --set {skip}a smaller learning_rate"),
    }
}
