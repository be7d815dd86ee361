//! The commit of a checkpoint: its parts are checked, then its manifest is written once.

use takuma_core::checkpoint::CheckpointManifest;
use takuma_core::layout;
use takuma_store::{Created, Store};

use super::persist::{Patience, persist};

/// Writers of one manifest are never more than two: the present coordinator and one that is over.
const ATTEMPTS: u32 = 5;

/// Commits a checkpoint whose parts lie in the store. Returns the manifest that lies there then.
///
/// The manifest is created by a conditional write, so of two writers one wins. If there is one already:
/// * of equal parts: the commit has happened. (Our own write may have landed although it was answered by an
///   error, or the run came to this step a second time with an equal result.) The present manifest stays,
///   and the parts that it lists are those that must stay too.
/// * of a newer generation: we are the stale writer, and are refused.
/// * of this or an older generation: the run came to this step again, from an earlier checkpoint. The manifest is
///   replaced, if it is still the one that was read; the parts of both lie side by side.
///
/// # Errors
/// In words: a part that is missing or has another size, a newer generation's manifest, the store's error.
pub async fn commit(
    run: &Store,
    patience: &Patience,
    manifest: CheckpointManifest,
) -> Result<CheckpointManifest, String> {
    let store = run.at(&layout::checkpoint_folder(manifest.step));
    for part in &manifest.parts {
        let found = persist(patience, || store.size_bytes(&part.file)).await?;
        if found != Some(part.size_bytes) {
            let found = found.map_or("is not there".to_owned(), |bytes| format!("has {bytes} bytes"));
            return Err(format!(
                "{}/{} {found}, but {} bytes are due",
                store.url(),
                part.file,
                part.size_bytes
            ));
        }
    }
    let json = serde_json::to_vec_pretty(&manifest).map_err(|error| error.to_string())?;
    let json = bytes::Bytes::from(json);
    if persist(patience, || store.create(layout::MANIFEST_FILE, json.clone())).await? == Created::New {
        return Ok(manifest);
    }
    for _ in 0..ATTEMPTS {
        let Some((present, version)) =
            persist(patience, || store.get_versioned(layout::MANIFEST_FILE)).await?
        else {
            if persist(patience, || store.create(layout::MANIFEST_FILE, json.clone())).await? == Created::New
            {
                return Ok(manifest);
            }
            continue;
        };
        match serde_json::from_slice::<CheckpointManifest>(&present) {
            Ok(present) if present.is_equal_to(&manifest) => return Ok(present),
            Ok(present) if present.generation > manifest.generation => {
                return Err(format!(
                    "{}/{} was written by the newer generation {}",
                    store.url(),
                    layout::MANIFEST_FILE,
                    present.generation
                ));
            }
            _ => {}
        }
        if persist(patience, || store.replace(layout::MANIFEST_FILE, json.clone(), &version)).await? {
            return Ok(manifest);
        }
    }
    Err(format!("{}/{} is being changed by somebody else", store.url(), layout::MANIFEST_FILE))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use takuma_core::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointPart};
    use takuma_core::config::{Recipe, RunConfig};
    use takuma_core::ids::Generation;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn patience() -> Patience {
        let first_pause = Duration::from_millis(1);
        Patience { outage: Duration::from_secs(1), first_pause, hurry: CancellationToken::new() }
    }

    fn manifest(generation: u64, weights: &str) -> CheckpointManifest {
        let part = |file: &str| CheckpointPart { file: file.into(), size_bytes: 3, sha256: weights.into() };
        CheckpointManifest {
            format: CHECKPOINT_FORMAT,
            run: "r".into(),
            step: 5,
            config: RunConfig::new(Recipe::DcganTiny, "file:///d"),
            dataset_digest: String::new(),
            generation: Generation(generation),
            writer: "worker-1".into(),
            version: "0".into(),
            created_unix_s: 0.0,
            weights_sha256: weights.into(),
            parts: CHECKPOINT_PARTS.map(part).to_vec(),
        }
    }

    async fn with_parts() -> Store {
        let store = Store::memory();
        for part in CHECKPOINT_PARTS {
            store.put(&format!("checkpoints/step-000005/{part}"), "abc").await.unwrap();
        }
        store
    }

    async fn committed_weights(store: &Store) -> String {
        let json = store.get("checkpoints/step-000005/manifest.json").await.unwrap();
        serde_json::from_slice::<CheckpointManifest>(&json).unwrap().weights_sha256
    }

    #[tokio::test]
    async fn a_part_of_another_size_is_refused_and_no_manifest_appears() {
        let store = with_parts().await;
        store.put("checkpoints/step-000005/optimizer.safetensors", "ab").await.unwrap();
        let message = commit(&store, &patience(), manifest(1, "w")).await.unwrap_err();
        assert!(message.ends_with("optimizer.safetensors has 2 bytes, but 3 bytes are due"), "{message}");
        assert_eq!(store.get_if_exists("checkpoints/step-000005/manifest.json").await.unwrap(), None);
    }

    #[tokio::test]
    async fn an_equal_checkpoint_is_committed_already() {
        let store = with_parts().await;
        commit(&store, &patience(), manifest(2, "w")).await.unwrap();
        commit(&store, &patience(), manifest(1, "w")).await.unwrap();
        let moved = |part: CheckpointPart| CheckpointPart { file: format!("g3/{}", part.file), ..part };
        let mut elsewhere = manifest(3, "w");
        elsewhere.parts = elsewhere.parts.into_iter().map(moved).collect();
        for part in CHECKPOINT_PARTS {
            store.put(&format!("checkpoints/step-000005/g3/{part}"), "abc").await.unwrap();
        }
        let stands = commit(&store, &patience(), elsewhere).await.unwrap();
        assert_eq!(stands, manifest(2, "w"), "its parts must stay");
        assert_eq!(committed_weights(&store).await, "w");
    }

    #[tokio::test]
    async fn a_stale_writer_is_refused_and_a_newer_one_replaces() {
        let store = with_parts().await;
        commit(&store, &patience(), manifest(2, "old")).await.unwrap();
        let message = commit(&store, &patience(), manifest(1, "stale")).await.unwrap_err();
        assert!(message.contains("newer generation 2"), "{message}");
        commit(&store, &patience(), manifest(3, "new")).await.unwrap();
        assert_eq!(committed_weights(&store).await, "new");
    }
}
