//! [`CheckpointManifest`]: the document whose presence makes a checkpoint exist.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::ids::{Generation, Step};

/// Version of the manifest's format; readers refuse others.
pub const CHECKPOINT_FORMAT: u32 = 1;

/// The parts of every checkpoint, in the order in which they are written.
pub const CHECKPOINT_PARTS: [&str; 3] =
    ["generator.safetensors", "discriminator.safetensors", "optimizer.safetensors"];

/// `manifest.json` of a checkpoint, written last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointManifest {
    /// [`CHECKPOINT_FORMAT`].
    pub format: u32,
    /// Name of the run.
    pub run: String,
    /// Finished steps; all phases of the last one are applied.
    pub step: Step,
    /// The configuration in force, seed included.
    pub config: RunConfig,
    /// Identity of the dataset.
    pub dataset_digest: String,
    /// The group that wrote it.
    pub generation: Generation,
    /// Name of the worker that wrote it.
    pub writer: String,
    /// Software version of the coordinator that committed it.
    pub version: String,
    /// Seconds since 1970.
    pub created_unix_s: f64,
    /// SHA-256 over generator.safetensors then discriminator.safetensors, lower-case hex.
    pub weights_sha256: String,
    /// Size and digest of every part.
    pub parts: Vec<CheckpointPart>,
}

impl CheckpointManifest {
    /// The part with this name, one of [`CHECKPOINT_PARTS`].
    #[must_use]
    pub fn part(&self, name: &str) -> Option<&CheckpointPart> {
        self.parts.iter().find(|part| part.name() == name)
    }

    /// Whether both describe the same bytes, wherever they lie.
    #[must_use]
    pub fn is_equal_to(&self, other: &Self) -> bool {
        let same = |part: &CheckpointPart| {
            other
                .part(part.name())
                .is_some_and(|theirs| (theirs.size_bytes, &theirs.sha256) == (part.size_bytes, &part.sha256))
        };
        self.weights_sha256 == other.weights_sha256
            && self.parts.len() == other.parts.len()
            && self.parts.iter().all(same)
    }
}

/// Which checkpoints of a run stay when a newer one is committed. That one always does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; `None` = all.
    pub keep: Option<u32>,
    /// These besides: other runs start from them.
    pub pinned: BTreeSet<Step>,
}

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPart {
    /// Object name inside the checkpoint's folder: [`crate::layout::part_file`] of one of [`CHECKPOINT_PARTS`].
    pub file: String,
    /// Size of the object.
    pub size_bytes: u64,
    /// SHA-256 of the object, lower-case hex.
    pub sha256: String,
}

impl CheckpointPart {
    /// Its name without the folder of the generation that wrote it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.file.rsplit('/').next().unwrap_or_default()
    }
}
