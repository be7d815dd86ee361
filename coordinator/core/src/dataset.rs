//! [`DatasetManifest`]: what a prepared dataset's `manifest.json` says.

use serde::{Deserialize, Serialize};

/// Version of the manifest's format; readers refuse others.
pub const DATASET_FORMAT: u32 = 1;

/// `manifest.json` of a prepared dataset. It is written last: a dataset exists when it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetManifest {
    /// [`DATASET_FORMAT`].
    pub format: u32,
    /// Last part of the dataset's URL.
    pub name: String,
    /// Usable images over all shards.
    pub images: u64,
    /// Pixels.
    pub height: u32,
    /// Pixels.
    pub width: u32,
    /// 3 for RGB, 1 for grey.
    pub channels: u32,
    /// Images refused and listed in `quarantine.jsonl`.
    pub quarantined: u64,
    /// Side of the central square cut out before resizing, in pixels; 0 = the largest that fits.
    pub crop: u32,
    /// Seed of the one shuffle over all images.
    pub seed: u64,
    /// What the images came from, as given.
    pub source: String,
    /// SHA-256 over the shards' digests in order, lower-case hex: the dataset's identity.
    pub digest: String,
    /// In order; shuffled image `i` lies in shard `i % shards.len()`, so sizes differ by one at most.
    pub shards: Vec<ShardEntry>,
}

/// One shard: a safetensors file with one tensor `images`, uint8 `[images, height, width, channels]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Object name inside the dataset's folder, `shard-00000.safetensors`.
    pub file: String,
    /// Images in it.
    pub images: u64,
    /// Size of the object.
    pub size_bytes: u64,
    /// SHA-256 of the object, lower-case hex.
    pub sha256: String,
}
