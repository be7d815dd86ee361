//! [`RunRecord`]: what outlives the coordinator, as `run.json` in the run's folder.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::ids::{Generation, Step};
use crate::time::Timestamp;

/// Version of the document's format; readers refuse others.
pub const RUN_FORMAT: u32 = 1;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Waits for its turn or for workers.
    Queued,
    /// Members load shards and state.
    Preparing,
    /// Trains.
    Running,
    /// Was asked to stop; the members bring the step to its end and write a checkpoint.
    Stopping,
    /// Stopped as asked; can be resumed.
    Stopped,
    /// All steps are done and everything is stored.
    Succeeded,
    /// Ended by a failure; can be resumed.
    Failed,
    /// Lost its last worker; goes on by itself when one comes.
    Waiting,
}

impl RunStatus {
    /// Whether workers are busy with it.
    #[must_use]
    pub fn is_active(self) -> bool {
        matches!(self, Self::Preparing | Self::Running | Self::Stopping)
    }

    /// Whether nothing more happens by itself.
    #[must_use]
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Stopped | Self::Succeeded | Self::Failed)
    }
}

/// What of the dataset matters for a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetFacts {
    /// The dataset's identity.
    pub digest: String,
    /// Usable images.
    pub images: u64,
    /// Full global batches in one pass.
    pub steps_per_epoch: u64,
}

/// A committed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointMark {
    /// Finished steps.
    pub step: Step,
    /// Over generator then discriminator.
    pub weights_sha256: String,
}

/// A checkpoint of another run, where a run starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Name of the run.
    pub run: String,
    /// Finished steps.
    pub step: Step,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.run, self.step)
    }
}

/// `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRecord {
    /// [`RUN_FORMAT`].
    pub format: u32,
    /// Unique among the store's runs.
    pub name: String,
    /// Random, unique everywhere.
    pub id: String,
    /// What is run.
    pub config: RunConfig,
    /// On what.
    pub dataset: DatasetFacts,
    /// When it was submitted.
    pub created: Timestamp,
    /// When it entered the queue last: the queue's order.
    pub queued: Timestamp,
    /// Where it stands.
    pub status: RunStatus,
    /// The one in force, rising with every member list.
    pub generation: Generation,
    /// Generations up to this one may have been given out: a restarted coordinator goes on above it.
    #[serde(default)]
    pub generations_reserved: Generation,
    /// The generation that went on from the seed or a checkpoint last: older ones are of another past.
    #[serde(default)]
    pub lineage: Generation,
    /// Steps that make no update, because a number in them was not finite: see [`crate::config::OnNan::Rollback`].
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub passed_over: BTreeSet<Step>,
    /// The checkpoint of another run that it started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Finished steps.
    pub step: Step,
    /// Steps of the whole run.
    pub target_steps: Step,
    /// Training time, all groups together.
    pub elapsed_ms: u64,
    /// Members of the last group.
    pub workers: u32,
    /// Recent seconds from step to step with that many workers.
    pub pace_s: Option<f64>,
    /// Newest committed checkpoint.
    pub checkpoint: Option<CheckpointMark>,
    /// Of the final weights; empty until the run has ended.
    pub weights_sha256: String,
    /// Why it failed, with the remedy; empty = it did not.
    pub error: String,
}

impl RunRecord {
    /// The JSON form.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a RunRecord has only string keys and finite numbers")
    }

    /// Reads the JSON form.
    ///
    /// # Errors
    /// In words: not JSON, unknown fields, another format version.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if record.format != RUN_FORMAT {
            return Err(format!(
                "it has format {}, but this takuma reads format {RUN_FORMAT}",
                record.format
            ));
        }
        Ok(record)
    }
}
