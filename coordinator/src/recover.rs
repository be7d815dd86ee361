//! What a coordinator does with its store before it listens: tries it, and reads the runs that it holds.

use takuma_core::event::{Event, Stored};
use takuma_core::layout;
use takuma_core::record::{CheckpointMark, RunRecord};
use takuma_store::{Store, StoreError};

use crate::files::{Records, kept_lines, lines};
use crate::objects::read_checkpoints;

/// Writes and removes an object, so that an unusable store is told now and not by the first run.
///
/// # Errors
/// The store's answer.
pub async fn probe(store: &Store) -> Result<(), StoreError> {
    let object = format!(".takuma-probe-{}", std::process::id());
    store.put(&object, "takuma was here").await?;
    store.delete(&object).await
}

/// The events that bring the store's runs into a new cluster, in the order of their names. From here on the records
/// are this coordinator's.
///
/// # Errors
/// The store does not answer.
pub async fn recover(store: &Store, records: &Records) -> Result<Vec<Event>, StoreError> {
    let mut events = Vec::new();
    for run in store.list_folders(layout::RUNS_FOLDER).await? {
        let folder = store.at(&layout::run_folder(&run));
        match records.take_over(&run).await? {
            Ok(record) => {
                let newest = read_checkpoints(&folder).await?.pop();
                let mark = newest.map(|manifest| CheckpointMark {
                    step: manifest.step,
                    weights_sha256: manifest.weights_sha256,
                });
                let active = record.status.is_active();
                let stored = if active { stored(&folder, &record).await? } else { Stored::default() };
                events.push(Event::RunRecovered { record: Box::new(record), checkpoint: mark, stored });
            }
            Err(reason) => {
                let url = folder.url();
                tracing::error!(
                    "run '{run}' is left out: {url}/{} cannot be used ({reason}); put a copy of that file back and start \
                     the coordinator again, or move {url} away to free the name",
                    layout::RUN_FILE
                );
                events.push(Event::NameReserved { run });
            }
        }
    }
    Ok(events)
}

/// What of a run's results lies in its folder.
async fn stored(run: &Store, record: &RunRecord) -> Result<Stored, StoreError> {
    let samples = run.list(layout::SAMPLES_FOLDER).await?;
    let names = || samples.iter().map(|entry| entry.name.as_str());
    let grids = names().filter_map(|name| layout::step_of_name(name.rsplit('/').next()?)).collect();
    let reals = names().any(|name| name == layout::REALS_FILE);
    let metrics = run.get_if_exists(layout::METRICS_FILE).await?.unwrap_or_default();
    // Lines that the writer will drop do not count.
    let began = record.origin.as_ref().map_or(0, |origin| origin.step);
    let step = kept_lines(lines(&metrics), began).last().map_or(0, |line| line.step);
    Ok(Stored { step, grids, reals })
}

#[cfg(test)]
mod tests {
    use takuma_core::config::{Recipe, RunConfig};
    use takuma_core::record::{RUN_FORMAT, RunStatus};

    use super::*;

    fn record(name: &str) -> RunRecord {
        let json = serde_json::json!({
            "format": RUN_FORMAT,
            "name": name,
            "id": "0123",
            "config": RunConfig::new(Recipe::DcganTiny, "file:///faces"),
            "dataset": {"digest": "d", "images": 128, "steps_per_epoch": 2},
            "created": 1,
            "queued": 1,
            "status": "stopped",
            "generation": 7,
            "step": 41,
            "target_steps": 100,
            "elapsed_ms": 12_345,
            "workers": 2,
            "pace_s": 0.5,
            "checkpoint": null,
            "weights_sha256": "",
            "error": "",
        });
        serde_json::from_value(json).unwrap()
    }

    async fn recovered(store: &Store) -> Vec<String> {
        let events = recover(store, &Records::new(store, "next".to_owned())).await.unwrap();
        let told = |event: Event| match event {
            Event::RunRecovered { record, .. } => format!("{} at step {}", record.name, record.step),
            Event::NameReserved { run } => format!("{run} is reserved"),
            other => panic!("{other:?}"),
        };
        events.into_iter().map(told).collect()
    }

    #[tokio::test]
    async fn whatever_byte_of_a_record_is_damaged_the_run_is_left_out_and_the_others_are_not() {
        let store = Store::memory();
        let whole = record("a").to_sealed_json("before-1").into_bytes();
        store.put("runs/b/run.json", record("b").to_json()).await.unwrap();
        store.put("runs/a/run.json", whole.clone()).await.unwrap();
        assert_eq!(recovered(&store).await, ["a at step 41", "b at step 41"]);
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            for damaged in [flipped, whole[..at].to_vec()] {
                store.put("runs/a/run.json", damaged).await.unwrap();
                assert_eq!(recovered(&store).await, ["a is reserved", "b at step 41"], "byte {at}");
            }
        }
    }

    #[tokio::test]
    async fn taking_over_makes_another_version_even_where_versions_follow_from_contents() {
        let store = Store::memory();
        let running = RunRecord { status: RunStatus::Waiting, ..record("a") };
        store.put("runs/a/run.json", running.to_sealed_json("before-1")).await.unwrap();
        let before = store.get("runs/a/run.json").await.unwrap();
        recovered(&store).await;
        let after = store.get("runs/a/run.json").await.unwrap();
        assert_ne!(before, after);
        assert_eq!(RunRecord::from_json(&after).unwrap(), running);
    }
}
