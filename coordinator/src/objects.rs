//! What clients read of a run's folder: grids, checkpoints, and single objects in chunks.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::event::Refusal;
use takuma_core::layout;
use takuma_proto::v1;
use takuma_store::Store;
use tonic::Status;

use crate::status::refusal_of_store;

/// Well below gRPC's default limit of 4 MiB a message.
const CHUNK_BYTES: usize = 256 << 10;
/// Manifests that are read at once.
const READS_AT_ONCE: usize = 8;

/// An object's bytes in order.
pub type Chunks = stream::BoxStream<'static, Result<v1::ObjectChunk, Status>>;

/// The grids by step, `reals.png` first.
///
/// # Errors
/// The store does not answer.
pub async fn list_samples(run: &Store) -> Result<v1::ListSamplesReply, Refusal> {
    let entries = run.list(layout::SAMPLES_FOLDER).await.map_err(|error| refusal_of_store(&error))?;
    let sample = |entry: takuma_store::Entry| {
        let name = entry.name.rsplit('/').next()?.to_owned();
        let step = if entry.name == layout::REALS_FILE { Some(0) } else { layout::step_of_name(&name) }?;
        let url = format!("{}/{}", run.url(), entry.name);
        Some(v1::SampleView { name, step, size_bytes: entry.size_bytes, url })
    };
    let mut samples: Vec<_> = entries.into_iter().filter_map(sample).collect();
    samples.sort_by_key(|sample| (sample.step, sample.name.starts_with("step-")));
    let plot = run.size_bytes(layout::PLOT_FILE).await.map_err(|error| refusal_of_store(&error))?;
    Ok(v1::ListSamplesReply { samples, has_plot: plot.is_some() })
}

/// The checkpoints that exist, by step: those with a readable manifest.
///
/// # Errors
/// The store does not answer.
pub async fn list_checkpoints(run: &Store) -> Result<Vec<v1::CheckpointView>, Refusal> {
    let manifests = read_checkpoints(run).await.map_err(|error| refusal_of_store(&error))?;
    let view = |manifest: CheckpointManifest| v1::CheckpointView {
        step: manifest.step,
        size_bytes: manifest.parts.iter().map(|part| part.size_bytes).sum(),
        created_unix_s: manifest.created_unix_s,
        url: format!("{}/{}", run.url(), layout::checkpoint_folder(manifest.step)),
        weights_sha256: manifest.weights_sha256,
    };
    Ok(manifests.into_iter().map(view).collect())
}

/// The manifests of a run's checkpoints, by step. An unreadable one is no checkpoint, and is warned of.
///
/// # Errors
/// The store does not answer.
pub async fn read_checkpoints(run: &Store) -> Result<Vec<CheckpointManifest>, takuma_store::StoreError> {
    let folders = run.list_folders(layout::CHECKPOINTS_FOLDER).await?;
    let read = |folder: String| async move {
        let object = format!("{}/{folder}/{}", layout::CHECKPOINTS_FOLDER, layout::MANIFEST_FILE);
        let Some(json) = run.get_if_exists(&object).await? else { return Ok(None) };
        match serde_json::from_slice::<CheckpointManifest>(&json) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) => {
                tracing::warn!(url = format!("{}/{object}", run.url()), %error, "unreadable checkpoint manifest");
                Ok(None)
            }
        }
    };
    let found = stream::iter(folders).map(read).buffered(READS_AT_ONCE);
    let mut manifests: Vec<CheckpointManifest> =
        found.try_filter_map(|found| async { Ok(found) }).try_collect().await?;
    manifests.sort_by_key(|manifest| manifest.step);
    Ok(manifests)
}

/// The manifest of one step's checkpoint, if there is one.
///
/// # Errors
/// An unreadable manifest, a store that does not answer.
pub async fn read_checkpoint(run: &Store, step: u64) -> Result<Option<CheckpointManifest>, Refusal> {
    let object = layout::checkpoint_object(step, layout::MANIFEST_FILE);
    let found = run.get_if_exists(&object).await.map_err(|error| refusal_of_store(&error))?;
    let Some(json) = found else { return Ok(None) };
    serde_json::from_slice(&json).map(Some).map_err(|error| {
        let url = run.url();
        Refusal::Precondition(format!("{url}/{object} cannot be read: {error}; choose another checkpoint"))
    })
}

/// One object of the run in chunks.
///
/// # Errors
/// A name that leaves the run's folder, no such object, a store that does not answer.
pub async fn read(run: &Store, object: &str) -> Result<Chunks, Refusal> {
    let inside =
        object.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0']));
    if !inside {
        return Err(Refusal::Invalid(format!("'{object}' is no object of a run")));
    }
    let content: Bytes = run.get(object).await.map_err(|error| refusal_of_store(&error))?;
    let chunks: Vec<Bytes> = (0..content.len())
        .step_by(CHUNK_BYTES)
        .map(|at| content.slice(at..content.len().min(at + CHUNK_BYTES)))
        .collect();
    Ok(stream::iter(chunks).map(|data| Ok(v1::ObjectChunk { data: data.to_vec() })).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn samples_come_by_step_with_the_real_images_first() {
        let store = Store::memory();
        for name in ["step-000100.png", "step-000000.png", "reals.png", "step-000050.png", "notes.txt"] {
            store.put(&format!("samples/{name}"), "x").await.unwrap();
        }
        let names: Vec<_> = list_samples(&store).await.unwrap().samples.into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["reals.png", "step-000000.png", "step-000050.png", "step-000100.png"]);
    }

    #[tokio::test]
    async fn large_objects_come_in_chunks_and_whole() {
        let store = Store::memory();
        let content: Vec<u8> = (0..600_000u32).map(|x| x as u8).collect();
        store.put("metrics.jsonl", content.clone()).await.unwrap();
        let chunks: Vec<_> = read(&store, "metrics.jsonl").await.unwrap().try_collect().await.unwrap();
        assert_eq!(chunks.len(), 3);
        assert_eq!(chunks.into_iter().flat_map(|chunk| chunk.data).collect::<Vec<_>>(), content);
    }

    #[tokio::test]
    async fn names_that_leave_the_folder_are_refused() {
        let store = Store::memory();
        for object in ["../other/run.json", "samples/../../x", "/etc/passwd", "", "a//b", "..\\x"] {
            assert!(matches!(read(&store, object).await, Err(Refusal::Invalid(_))), "{object}");
        }
        assert!(matches!(read(&store, "none.png").await, Err(Refusal::NotFound(_))));
    }
}
