//! What a coordinator does with its store before it listens: tries it, and reads the runs that it holds.

use takuma_core::event::{Event, Stored};
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
                let active = record.status.is_active();
                let stored = if active { stored(&folder).await? } else { Stored::default() };
                events.push(Event::RunRecovered { record: Box::new(record), checkpoint: mark, stored });
            }
            Err(reason) => {
                tracing::warn!(run, reason, "skipped a run: {url}/{} cannot be read", layout::RUN_FILE);
                events.push(Event::NameReserved { run });
            }
        }
    }
    Ok(events)
}

/// What of a run's results lies in its folder.
async fn stored(run: &Store) -> Result<Stored, StoreError> {
    let samples = run.list(layout::SAMPLES_FOLDER).await?;
    let names = || samples.iter().map(|entry| entry.name.as_str());
    let grids = names().filter_map(|name| layout::step_of_name(name.rsplit('/').next()?)).collect();
    let reals = names().any(|name| name == layout::REALS_FILE);
    let metrics = run.get_if_exists(layout::METRICS_FILE).await?.unwrap_or_default();
    Ok(Stored { step: last_step(&metrics), grids, reals })
}

/// Step of the last line that is whole. Lines after an unreadable one do not count: the writer drops them.
fn last_step(metrics: &[u8]) -> u64 {
    #[derive(serde::Deserialize)]
    struct Line {
        step: u64,
    }
    let whole = metrics.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let lines = metrics[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let steps = lines.map_while(|line| serde_json::from_slice::<Line>(line).ok());
    steps.last().map_or(0, |line| line.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_is_that_of_the_last_whole_line() {
        assert_eq!(last_step(b""), 0);
        assert_eq!(last_step(b"{\"step\":1}\n{\"step\":2}\n{\"step\":3"), 2);
        assert_eq!(last_step(b"{\"step\":1}\ngarbage\n{\"step\":3}\n"), 1);
    }
}
