//! What this machine reaches: coordinator, workers, store, dataset.

use takuma_proto::v1::{ClusterView, ListWorkersRequest, WorkerView};
use takuma_store::Store;

use super::Check;
use crate::client::Client;
use crate::context::{COORDINATOR_VARIABLE, CoordinatorArgs};
use crate::error::CliError;
use crate::output::{self, count};
use crate::settings::VARIABLE_PREFIX;

/// Written, read and removed again in a store that is looked over.
const PROBE: &str = "takuma-doctor.probe";
/// A run of dcgan-celeba with all its checkpoints and grids, several times over.
const DISK_MIN_BYTES: u64 = 5 << 30;

/// Checks the coordinator and who is connected to it.
pub(super) async fn coordinator(at: &CoordinatorArgs) -> Vec<Check> {
    let address = match at.address() {
        Ok(address) => address,
        Err(error) => return vec![Check::failed("cluster", &error.to_string())],
    };
    match Client::connect(address).await {
        Ok((client, cluster)) => vec![greeted(&client, &cluster), workers(&client).await],
        // Nothing is wrong with a machine on which nobody has started anything yet.
        Err(CliError::Unreachable { message, .. }) if !is_named(at) => {
            let (message, remedy) =
                message.split_once("; ").unwrap_or((&message, "start one with 'takuma up'"));
            vec![Check::warning("cluster", message, remedy)]
        }
        Err(error) => vec![Check::failed("cluster", &error.to_string())],
    }
}

/// Whether the person said which coordinator is meant.
fn is_named(at: &CoordinatorArgs) -> bool {
    at.coordinator.is_some() || std::env::var_os(COORDINATOR_VARIABLE).is_some_and(|given| !given.is_empty())
}

fn greeted(client: &Client, cluster: &ClusterView) -> Check {
    let address = client.address();
    let own = env!("CARGO_PKG_VERSION");
    let found = format!(
        "takuma {} at {} ({}), store {}",
        cluster.software_version, address.url, address.origin, cluster.store
    );
    if cluster.software_version == own {
        return Check::ok("cluster", found);
    }
    Check::warning("cluster", found, format!("this takuma is {own}; use one version everywhere"))
}

async fn workers(client: &Client) -> Check {
    match client.call(client.control().list_workers(ListWorkersRequest {})).await {
        Ok(reply) => connected(&reply.workers, &client.address().url),
        Err(error) => Check::failed("workers", &error.to_string()),
    }
}

fn connected(workers: &[WorkerView], address: &str) -> Check {
    let (lost, here): (Vec<_>, Vec<_>) = workers.iter().partition(|worker| worker.status == "lost");
    if here.is_empty() {
        let remedy = format!("connect one with 'takuma-worker --coordinator {address}'");
        return Check::warning("workers", "none is connected, so no run can start", remedy);
    }
    let names: Vec<_> = here.iter().map(|worker| format!("{} on {}", worker.name, worker.device)).collect();
    let found = format!("{} connected: {}", here.len(), names.join(", "));
    if lost.is_empty() {
        return Check::ok("workers", found);
    }
    let names: Vec<_> = lost.iter().map(|worker| format!("{} of {}", worker.name, worker.host)).collect();
    let found = format!("{found}; {} lost: {}", lost.len(), names.join(", "));
    Check::warning("workers", found, "see whether their processes run, and their logs")
}

/// Checks that a store can be written, read and cleaned. Without `given`: the one of `takuma up`, if it exists.
pub(super) async fn store(given: Option<&str>) -> Option<Check> {
    let url = match given {
        Some(url) => url.to_owned(),
        None => {
            let folder = directories::ProjectDirs::from("", "", "takuma")?.data_dir().join("store");
            if !folder.is_dir() {
                return None;
            }
            folder.display().to_string()
        }
    };
    Some(match probe(&url).await {
        Ok(store) => written(&store),
        Err(error) => Check::failed("store", &error.to_string()),
    })
}

async fn probe(url: &str) -> Result<Store, CliError> {
    let store = Store::open(url)?;
    let content = format!("{} {}", std::process::id(), output::now_unix_s());
    store.put(PROBE, content.clone()).await?;
    let back = store.get(PROBE).await?;
    store.delete(PROBE).await?;
    if back != content {
        let message = format!("{} gives back other bytes than were written; use another store", store.url());
        return Err(CliError::failed(message));
    }
    Ok(store)
}

fn written(store: &Store) -> Check {
    let free = store.local_path().and_then(|path| rustix::fs::statvfs(&path).ok());
    let Some(free) = free.map(|found| found.f_bavail * found.f_frsize) else {
        return Check::ok("store", format!("{} can be written and read", store.url()));
    };
    let found = format!("{} can be written and read, {} free", store.url(), output::bytes(free));
    if free >= DISK_MIN_BYTES {
        return Check::ok("store", found);
    }
    Check::warning("store", found, "free some space, or keep fewer checkpoints with --keep")
}

/// Checks that a dataset is there; its shards are not read. Without `given`: that of the environment, if it names one.
pub(super) async fn data(given: Option<&str>) -> Option<Check> {
    let variable = std::env::var(format!("{VARIABLE_PREFIX}DATA")).ok().filter(|url| !url.is_empty());
    let url = given.map(str::to_owned).or(variable)?;
    let inspected = match Store::open(&url) {
        Ok(store) => takuma_data::inspect(&store).await.map_err(CliError::from),
        Err(error) => Err(error.into()),
    };
    Some(match inspected {
        Ok(found) => {
            let images = count(found.manifest.images, "image");
            let shards = count(found.manifest.shards.len() as u64, "shard");
            Check::ok("data", format!("{url}: {images} in {shards}, {}", output::bytes(found.size_bytes)))
        }
        Err(error) => Check::failed("data", &error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn lost_workers_are_named_with_their_machine() {
        let worker = |name: &str, status: &str| WorkerView {
            name: name.into(),
            host: "host-b".into(),
            device: "cuda:0".into(),
            status: status.into(),
            ..WorkerView::default()
        };
        let check = connected(&[worker("worker-1", "idle"), worker("worker-2", "lost")], "http://h:1");
        assert_eq!(check.status, Status::Warning);
        assert_eq!(check.message, "1 connected: worker-1 on cuda:0; 1 lost: worker-2 of host-b");
        assert_eq!(connected(&[], "http://h:1").status, Status::Warning);
    }

    #[tokio::test]
    async fn store_that_works_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let check = store(Some(folder.path().to_str().unwrap())).await.unwrap();
        assert_ne!(check.status, Status::Error, "{check:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
