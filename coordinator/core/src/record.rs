//! [`RunRecord`]: what outlives the coordinator, as `run.json` in the run's folder.
//!
//! In the store the document is sealed: its last two keys say who wrote it and hold a checksum over all bytes before
//! that, so a byte that rots anywhere is found.

use std::borrow::Cow;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::ids::{Generation, Step};
use crate::time::Timestamp;

/// Version of the document's format; readers refuse others.
pub const RUN_FORMAT: u32 = 1;

/// What stands before the writer and before the checksum of a sealed document. No string of the record can hold it: JSON
/// writes their line ends otherwise.
const WRITER_KEY: &str = ",\n  \"written_by\": \"";
const CHECKSUM_KEY: &str = ",\n  \"crc32c\": \"";
/// What ends it.
const END: &str = "\"\n}";

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

    /// The form that lies in the store: the JSON form, `writer` (letters, digits and hyphens), and a checksum.
    #[must_use]
    pub fn to_sealed_json(&self, writer: &str) -> String {
        let json = self.to_json();
        let open = json.strip_suffix("\n}").expect("a pretty object ends on a line of its own");
        let body = format!("{open}{WRITER_KEY}{writer}\"");
        let sum = crc32c::crc32c(body.as_bytes());
        format!("{body}{CHECKSUM_KEY}{sum:08x}{END}")
    }

    /// Reads the JSON form, sealed or not: takuma wrote no seals before.
    ///
    /// # Errors
    /// In words: a checksum that does not hold, not JSON, unknown fields, another format version.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(&unsealed(json)?).map_err(|error| error.to_string())?;
        if record.format != RUN_FORMAT {
            return Err(format!(
                "it has format {}, but this takuma reads format {RUN_FORMAT}",
                record.format
            ));
        }
        Ok(record)
    }
}

/// Who wrote a sealed document, as given to [`RunRecord::to_sealed_json`]; the seal is not checked.
#[must_use]
pub fn writer_of(json: &[u8]) -> Option<&str> {
    let (_, rest) = split_last(json, WRITER_KEY)?;
    let end = rest.iter().position(|&byte| byte == b'"')?;
    std::str::from_utf8(&rest[..end]).ok()
}

/// The document without its seal, which must hold.
fn unsealed(json: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let Some((body, rest)) = split_last(json, CHECKSUM_KEY) else { return Ok(Cow::Borrowed(json)) };
    let sum = format!("{:08x}{END}", crc32c::crc32c(body));
    match split_last(body, WRITER_KEY) {
        Some((open, _)) if rest == sum.as_bytes() => Ok(Cow::Owned([open, b"\n}"].concat())),
        _ => Err("its checksum does not hold, so some of its bytes are not as they were written".to_owned()),
    }
}

/// What lies before and after the last place of `key`.
fn split_last<'a>(json: &'a [u8], key: &str) -> Option<(&'a [u8], &'a [u8])> {
    let at = json.windows(key.len()).rposition(|window| window == key.as_bytes())?;
    Some((&json[..at], &json[at + key.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    fn record() -> RunRecord {
        let json = serde_json::json!({
            "format": RUN_FORMAT,
            "name": "calm-otter-3",
            "id": "0123",
            "config": RunConfig::new(Recipe::DcganTiny, "file:///faces"),
            "dataset": {"digest": "d", "images": 128, "steps_per_epoch": 2},
            "created": 1_700_000_000_000_u64,
            "queued": 1_700_000_000_001_u64,
            "status": "running",
            "generation": 7,
            "generations_reserved": 1_007,
            "lineage": 1,
            "origin": {"run": "old", "step": 3},
            "step": 41,
            "target_steps": 100,
            "elapsed_ms": 12_345,
            "workers": 2,
            "pace_s": 0.5,
            "checkpoint": {"step": 40, "weights_sha256": "ab".repeat(32)},
            "weights_sha256": "",
            "error": "line one,\n  \"crc32c\": \"line two",
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_sealed_record_comes_back_with_its_writer() {
        let sealed = record().to_sealed_json("c0ffee-12");
        assert_eq!(RunRecord::from_json(sealed.as_bytes()).unwrap(), record());
        assert_eq!(writer_of(sealed.as_bytes()), Some("c0ffee-12"));
        serde_json::from_str::<serde_json::Value>(&sealed).expect("it is JSON to everybody");
    }

    #[test]
    fn a_record_without_a_seal_is_read() {
        assert_eq!(RunRecord::from_json(record().to_json().as_bytes()).unwrap(), record());
        assert_eq!(writer_of(record().to_json().as_bytes()), None);
    }

    #[test]
    fn every_flipped_bit_and_every_torn_end_is_found() {
        let sealed = record().to_sealed_json("c0ffee-12").into_bytes();
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut flipped = sealed.clone();
                flipped[at] ^= 1 << bit;
                assert!(RunRecord::from_json(&flipped).is_err(), "bit {bit} of byte {at}");
            }
            assert!(RunRecord::from_json(&sealed[..at]).is_err(), "cut to {at} bytes");
        }
    }

    #[test]
    fn every_byte_that_became_any_other_is_found() {
        let sealed = record().to_sealed_json("c0ffee-12").into_bytes();
        for at in 0..sealed.len() {
            for other in (0..=255).filter(|&other| other != sealed[at]) {
                let mut changed = sealed.clone();
                changed[at] = other;
                assert!(RunRecord::from_json(&changed).is_err(), "byte {at} became {other}");
            }
        }
    }
}
