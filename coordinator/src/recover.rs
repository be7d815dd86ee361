//! What a coordinator does with its store before it listens: tries it, and reads the runs that it holds.

use takuma_core::event::Event;
use takuma_core::layout;
use takuma_core::record::{CheckpointMark, RunRecord};
use takuma_store::{Store, StoreError};

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

/// The events that bring the store's runs into a new cluster, in the order of their names.
///
/// # Errors
/// The store does not answer.
pub async fn recover(store: &Store) -> Result<Vec<Event>, StoreError> {
    let mut events = Vec::new();
    for run in store.list_folders("runs").await? {
        let folder = store.at(&layout::run_folder(&run));
        let url = folder.url().to_owned();
        let record = match folder.get_if_exists(layout::RUN_FILE).await? {
            Some(json) => RunRecord::from_json(&json),
            None => Err("there is none".to_owned()),
        };
        let record = record.and_then(|record| {
            if record.name == run {
                Ok(record)
            } else {
                Err(format!("it is the one of run '{}'", record.name))
            }
        });
        match record {
            Ok(record) => {
                let newest = read_checkpoints(&folder).await?.pop();
                let mark = newest.map(|manifest| CheckpointMark {
                    step: manifest.step,
                    weights_sha256: manifest.weights_sha256,
                });
                events.push(Event::RunRecovered { record: Box::new(record), checkpoint: mark });
            }
            Err(reason) => {
                tracing::warn!(run, reason, "skipped a run: {url}/{} cannot be read", layout::RUN_FILE);
                events.push(Event::NameReserved { run });
            }
        }
    }
    Ok(events)
}
