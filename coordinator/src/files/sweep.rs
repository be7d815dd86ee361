//! [`Sweeper`]: removes checkpoints that are kept no longer, and parts that no manifest lists.

use std::collections::{BTreeMap, BTreeSet};

use takuma_core::checkpoint::{CheckpointManifest, Retention};
use takuma_core::ids::Step;
use takuma_core::layout;
use takuma_store::{Store, StoreError};

/// What it has seen of a run's checkpoints.
#[derive(Debug, Default)]
pub struct Sweeper {
    /// Steps in whose folders nothing lies but what the manifest lists.
    clean: BTreeSet<Step>,
}

impl Sweeper {
    /// Removes what the commit of `manifest` makes superfluous. A store that does not do it is warned of; the next
    /// commit tries again.
    pub async fn after_commit(&mut self, run: &Store, manifest: &CheckpointManifest, retention: &Retention) {
        if let Err(error) = self.sweep(run, manifest, retention).await {
            tracing::warn!(%error, "old checkpoints were not removed; the next one tries again");
        }
    }

    /// Steps after the committed one are left alone: their parts may be on their way.
    async fn sweep(
        &mut self,
        run: &Store,
        manifest: &CheckpointManifest,
        retention: &Retention,
    ) -> Result<(), StoreError> {
        let mut folders: BTreeMap<Step, Vec<String>> = BTreeMap::new();
        for entry in run.list(layout::CHECKPOINTS_FOLDER).await? {
            let mut names = entry.name.splitn(3, '/').skip(1);
            let Some((folder, file)) = names.next().zip(names.next()) else { continue };
            if let Some(step) = layout::step_of_name(folder).filter(|&step| step <= manifest.step) {
                folders.entry(step).or_default().push(file.to_owned());
            }
        }
        let has_manifest = |files: &Vec<String>| files.iter().any(|file| file == layout::MANIFEST_FILE);
        let committed: Vec<Step> =
            folders.iter().filter(|(_, files)| has_manifest(files)).map(|(&step, _)| step).collect();
        let most = retention.keep.map_or(committed.len(), |keep| keep as usize);
        let oldest = committed.get(committed.len().saturating_sub(most.max(1))).copied().unwrap_or(0);
        for (step, files) in folders {
            let stays = has_manifest(&files) && (step >= oldest || retention.pinned.contains(&step));
            if !stays {
                self.remove(run, step, &files).await?;
            } else if step == manifest.step {
                self.tidy(run, manifest, &files).await?;
            } else if !self.clean.contains(&step) {
                let object = layout::checkpoint_object(step, layout::MANIFEST_FILE);
                let json = run.get_if_exists(&object).await?.unwrap_or_default();
                // An unreadable one is not ours to judge.
                if let Ok(present) = serde_json::from_slice::<CheckpointManifest>(&json) {
                    self.tidy(run, &present, &files).await?;
                }
            }
        }
        Ok(())
    }

    /// Removes a folder, the manifest first: a checkpoint is whole or absent.
    async fn remove(&mut self, run: &Store, step: Step, files: &[String]) -> Result<(), StoreError> {
        self.clean.remove(&step);
        let (manifests, parts): (Vec<&String>, Vec<&String>) =
            files.iter().partition(|file| *file == layout::MANIFEST_FILE);
        for file in manifests.into_iter().chain(parts) {
            run.delete(&layout::checkpoint_object(step, file)).await?;
        }
        run.forget_folder(&layout::checkpoint_folder(step)).await;
        Ok(())
    }

    /// Removes what a manifest does not list, but for what a newer generation is writing.
    async fn tidy(
        &mut self,
        run: &Store,
        manifest: &CheckpointManifest,
        files: &[String],
    ) -> Result<(), StoreError> {
        let listed = |file: &str| manifest.parts.iter().any(|part| part.file == file);
        let newer =
            |file: &str| layout::part_of_file(file).is_some_and(|(writer, _)| writer > manifest.generation);
        for file in files {
            if file == layout::MANIFEST_FILE || listed(file) || newer(file) {
                continue;
            }
            let object = layout::checkpoint_object(manifest.step, file);
            run.delete(&object).await?;
            if let Some((folder, _)) = object.rsplit_once('/') {
                run.forget_folder(folder).await;
            }
        }
        self.clean.insert(manifest.step);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use takuma_core::checkpoint::{CHECKPOINT_FORMAT, CHECKPOINT_PARTS, CheckpointPart};
    use takuma_core::config::{Recipe, RunConfig};
    use takuma_core::ids::Generation;
    use takuma_core::layout::part_file;

    use super::*;

    fn manifest(step: Step, generation: u64) -> CheckpointManifest {
        let part = |part: &str| CheckpointPart {
            file: part_file(Generation(generation), part),
            size_bytes: 3,
            sha256: String::new(),
        };
        CheckpointManifest {
            format: CHECKPOINT_FORMAT,
            run: "r".into(),
            step,
            config: RunConfig::new(Recipe::DcganTiny, "file:///d"),
            dataset_digest: String::new(),
            generation: Generation(generation),
            writer: "worker-1".into(),
            version: "0".into(),
            created_unix_s: 0.0,
            weights_sha256: String::new(),
            parts: CHECKPOINT_PARTS.map(part).to_vec(),
        }
    }

    async fn put_parts(store: &Store, manifest: &CheckpointManifest) {
        for part in &manifest.parts {
            store.put(&layout::checkpoint_object(manifest.step, &part.file), "abc").await.unwrap();
        }
    }

    async fn put(store: &Store, manifest: &CheckpointManifest) {
        put_parts(store, manifest).await;
        let object = layout::checkpoint_object(manifest.step, layout::MANIFEST_FILE);
        store.put(&object, serde_json::to_vec(manifest).unwrap()).await.unwrap();
    }

    /// "step/generation" of every part, and the steps of the manifests.
    async fn there(store: &Store) -> (BTreeSet<(Step, u64)>, Vec<Step>) {
        let (mut parts, mut manifests) = (BTreeSet::new(), Vec::new());
        for entry in store.list("checkpoints").await.unwrap() {
            let (folder, file) = entry.name.strip_prefix("checkpoints/").unwrap().split_once('/').unwrap();
            let step = layout::step_of_name(folder).unwrap();
            match layout::part_of_file(file) {
                Some((generation, _)) => drop(parts.insert((step, generation.0))),
                None => manifests.push(step),
            }
        }
        (parts, manifests)
    }

    #[tokio::test]
    async fn the_newest_stay_and_so_does_what_others_start_from() {
        let store = Store::memory();
        for step in 1..=6 {
            put(&store, &manifest(step, 1)).await;
        }
        let retention = Retention { keep: Some(2), pinned: BTreeSet::from([3]) };
        Sweeper::default().after_commit(&store, &manifest(6, 1), &retention).await;
        assert_eq!(there(&store).await.1, [3, 5, 6]);
        let all = Retention::default();
        Sweeper::default().after_commit(&store, &manifest(6, 1), &all).await;
        assert_eq!(there(&store).await.1, [3, 5, 6]);
    }

    #[tokio::test]
    async fn parts_that_no_manifest_lists_go_but_for_those_on_their_way() {
        let store = Store::memory();
        put(&store, &manifest(1, 2)).await;
        put_parts(&store, &manifest(1, 1)).await;
        put_parts(&store, &manifest(2, 2)).await;
        put(&store, &manifest(3, 4)).await;
        for generation in [1, 5] {
            put_parts(&store, &manifest(3, generation)).await;
        }
        put_parts(&store, &manifest(4, 4)).await;
        let mut sweeper = Sweeper::default();
        sweeper.after_commit(&store, &manifest(3, 4), &Retention::default()).await;
        let parts = BTreeSet::from([(1, 2), (3, 4), (3, 5), (4, 4)]);
        assert_eq!(there(&store).await, (parts, vec![1, 3]));
        assert_eq!(sweeper.clean, BTreeSet::from([1, 3]));
    }
}
