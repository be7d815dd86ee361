//! Reading a checkpoint back: nothing is trusted before its size and digest fit the manifest.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use takuma_core::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointManifest};
use takuma_core::layout::{MANIFEST_FILE, checkpoint_folder};
use takuma_store::{Store, StoreError};

/// Why a checkpoint cannot be continued from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The store does not give it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The manifest is not one that this version reads.
    #[error("{url} is not a checkpoint that this takuma reads: {reason}")]
    Manifest {
        /// The checkpoint's folder.
        url: String,
        /// In words.
        reason: String,
    },
    /// A part is not what the manifest says.
    #[error(
        "{url}/{part} is damaged: its {what} is not that of the manifest; resume from another checkpoint"
    )]
    Damaged {
        /// The checkpoint's folder.
        url: String,
        /// The object.
        part: &'static str,
        /// "size" or "SHA-256".
        what: &'static str,
    },
    /// A snapshot cannot be brought from the GPU.
    #[error("the state cannot be read from the GPU: {0}")]
    Device(String),
    /// A snapshot cannot be written down.
    #[error("the state makes no safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// A part does not hold this recipe's tensors.
    #[error("{part} does not fit this recipe: {reason}")]
    Unreadable {
        /// The object.
        part: &'static str,
        /// In words.
        reason: String,
    },
}

/// A checkpoint in memory, its digests checked.
#[derive(Debug)]
pub struct Loaded {
    /// What it says about itself.
    pub manifest: CheckpointManifest,
    /// In the order of [`CHECKPOINT_PARTS`].
    pub parts: [Bytes; 3],
}

/// Reads the checkpoint of `step` in a run's folder.
///
/// # Errors
/// It is not there, damaged, or of another format.
pub async fn load(run: &Store, step: u64) -> Result<Loaded, CheckpointError> {
    let folder = run.at(&checkpoint_folder(step));
    let url = folder.url().to_owned();
    let bytes = folder.get(MANIFEST_FILE).await?;
    let manifest: CheckpointManifest = serde_json::from_slice(&bytes)
        .map_err(|error| CheckpointError::Manifest { url: url.clone(), reason: error.to_string() })?;
    if manifest.format != CHECKPOINT_FORMAT {
        let reason = format!("it has format {} and this takuma reads {CHECKPOINT_FORMAT}", manifest.format);
        return Err(CheckpointError::Manifest { url, reason });
    }
    let [g, d, o] = CHECKPOINT_PARTS.map(|part| read(&folder, &manifest, part));
    let (g, d, o) = futures::try_join!(g, d, o)?;
    Ok(Loaded { manifest, parts: [g, d, o] })
}

async fn read(
    folder: &Store,
    manifest: &CheckpointManifest,
    part: &'static str,
) -> Result<Bytes, CheckpointError> {
    let url = folder.url().to_owned();
    let Some(entry) = manifest.part(part) else {
        return Err(CheckpointError::Manifest { url, reason: format!("it lists no {part}") });
    };
    let bytes = folder.get(&entry.file).await?;
    if bytes.len() as u64 != entry.size_bytes {
        return Err(CheckpointError::Damaged { url, part, what: "size" });
    }
    if hex_sha256(&[&bytes]) != entry.sha256 {
        return Err(CheckpointError::Damaged { url, part, what: "SHA-256" });
    }
    Ok(bytes)
}

/// SHA-256 over the pieces one after another, lower-case hex.
pub(super) fn hex_sha256(pieces: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for piece in pieces {
        hasher.update(piece);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
