//! What keeps coordinators from undoing each other's work, on an S3 server whose conditional writes hold under races.

// The helpers of a test fail like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use support::{KEYS, Served, WRITERS};
use takuma_coordinator::lease::{Holder, Lease, LeaseError};
use takuma_coordinator::{Coordinator, Options};
use takuma_core::config::{Recipe, RunConfig};
use takuma_core::record::{RUN_FORMAT, RunRecord, RunStatus, writer_of};
use takuma_store::{Created, Store};
use tokio_util::sync::CancellationToken;

const TERM: Duration = Duration::from_millis(900);
const RECORD: &str = "runs/r/run.json";

fn holder(id: usize) -> Holder {
    Holder { host: format!("host-{id}"), ..Holder::here("0.0.0.0:7070".to_owned()).unwrap() }
}

/// How many of some coordinators that start at once get the lease. Whoever has it keeps it until all others gave up.
async fn takers_that_won(store: &Store) -> usize {
    const TAKERS: usize = 8;
    let all_told = CancellationToken::new();
    let refused = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let takers = (0..TAKERS).map(|id| {
        let (store, all_told, refused) = (store.clone(), all_told.clone(), Arc::clone(&refused));
        tokio::spawn(async move {
            match Lease::acquire(&store, holder(id), TERM, false).await {
                Ok(mut lease) => {
                    tokio::select! {
                        () = lease.keep() => false,
                        () = all_told.cancelled() => true,
                    }
                }
                Err(LeaseError::Held { .. }) => {
                    if refused.fetch_add(1, Ordering::SeqCst) + 2 == TAKERS {
                        all_told.cancel();
                    }
                    false
                }
                Err(error) => panic!("{error}"),
            }
        })
    });
    let all = tokio::time::timeout(Duration::from_secs(60), join_all(takers)).await.unwrap();
    all.into_iter().map(|won| usize::from(won.unwrap())).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_that_write_a_manifest_one_wins_and_its_content_stays() {
    let served = Served::start().await;
    for key in 0..KEYS {
        let object = format!("runs/r/checkpoints/step-{key:06}/manifest.json");
        let writers = (0..WRITERS).map(|writer| {
            let (store, object) = (served.store(), object.clone());
            tokio::spawn(async move {
                let created = store.create(&object, format!("{{\"writer\": {writer}}}")).await.unwrap();
                (created == Created::New).then_some(writer)
            })
        });
        let won: Vec<usize> =
            join_all(writers).await.into_iter().filter_map(|writer| writer.unwrap()).collect();
        assert_eq!(won.len(), 1, "{object}: {won:?}");
        assert_eq!(served.store().get(&object).await.unwrap(), format!("{{\"writer\": {}}}", won[0]));
    }
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_that_take_the_lease_one_wins() {
    let served = Served::start().await;
    assert_eq!(takers_that_won(&served.store()).await, 1, "a free store");
    // Its last holder has not given it back: it counts as dead.
    assert_eq!(takers_that_won(&served.store()).await, 1, "after a death");
    served.stop().await;
}

fn running() -> RunRecord {
    let config = RunConfig::new(Recipe::DcganTiny, "file:///faces").to_json();
    let json = format!(
        r#"{{
            "format": {RUN_FORMAT}, "name": "r", "id": "0123", "config": {config},
            "dataset": {{"digest": "d", "images": 128, "steps_per_epoch": 2}},
            "created": 1, "queued": 1, "status": "running", "generation": 7, "step": 41, "target_steps": 100,
            "elapsed_ms": 12345, "workers": 2, "pace_s": 0.5, "checkpoint": null, "weights_sha256": "", "error": ""
        }}"#
    );
    RunRecord::from_json(json.as_bytes()).unwrap()
}

#[tokio::test]
async fn what_a_stopped_coordinator_has_under_way_is_refused_after_the_take_over() {
    let served = Served::start().await;
    let store = served.store();
    let stale = Lease::acquire(&store, holder(1), TERM, false).await.unwrap();
    let written = store.create_versioned(RECORD, running().to_sealed_json("stale-1")).await.unwrap().unwrap();
    // It is stopped here, as by SIGSTOP, with a write of run.json and one of a manifest on their way.
    let next = Lease::acquire(&store, holder(2), TERM, true).await.unwrap();
    let coordinator = Coordinator::open(next.guard(), Options::default()).await.unwrap();
    let manifest = "runs/r/checkpoints/step-000042/manifest.json";
    assert_eq!(next.guard().create(manifest, "new").await.unwrap(), Created::New);
    // It goes on: its packets arrive.
    let late = RunRecord { status: RunStatus::Failed, ..running() }.to_sealed_json("stale-2");
    assert_eq!(store.replace_versioned(RECORD, late, &written).await.unwrap(), None);
    assert_eq!(store.create(manifest, "stale").await.unwrap(), Created::Exists);
    let present = store.get(RECORD).await.unwrap();
    assert_eq!(RunRecord::from_json(&present).unwrap().status, RunStatus::Running);
    assert!(!writer_of(&present).unwrap().starts_with("stale"));
    assert_eq!(store.get(manifest).await.unwrap(), "new");
    // And what it begins now waits for a lease that it will not get.
    let guarded = stale.guard();
    assert!(tokio::time::timeout(TERM, guarded.put("x", "stale")).await.is_err());
    drop(coordinator);
    served.stop().await;
}

#[tokio::test]
async fn an_equal_content_is_an_equal_version_so_records_carry_their_writer() {
    let served = Served::start().await;
    let store = served.store();
    let first = store.create_versioned("x", "same").await.unwrap().unwrap();
    let second = store.replace_versioned("x", "same", &first).await.unwrap().unwrap();
    assert_eq!(first, second, "S3 derives versions from contents");
    assert!(store.replace_versioned("x", "late", &first).await.unwrap().is_some());
    served.stop().await;
}

/// While it is told to, does writes and answers that it did not.
#[derive(Debug)]
struct Unheard {
    inner: Arc<dyn ObjectStore>,
    now: Arc<AtomicBool>,
}

impl std::fmt::Display for Unheard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unheard({})", self.inner)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Unheard {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let result = self.inner.put_opts(path, payload, options).await;
        if self.now.load(Ordering::SeqCst) {
            return Err(Error::Generic { store: "unheard", source: "the connection was reset".into() });
        }
        result
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(path, options).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn renewals_that_land_unheard_are_read_back_and_count() {
    let served = Served::start().await;
    let now = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&now);
    let store = served.store().with_objects(|inner| Arc::new(Unheard { inner, now: told }));
    let mut lease = Lease::acquire(&store, holder(1), TERM, false).await.unwrap();
    now.store(true, Ordering::SeqCst);
    let (guarded, clear) = (lease.guard(), served.store());
    // Another one watches it for more than a term, and is told that the holder lives.
    tokio::select! {
        () = lease.keep() => panic!("the lease was lost"),
        refused = Lease::acquire(&clear, holder(2), TERM, false) => {
            assert!(matches!(refused, Err(LeaseError::Held { .. })), "{refused:?}");
        }
    }
    now.store(false, Ordering::SeqCst);
    let written = tokio::time::timeout(TERM, guarded.put("x", "mine")).await;
    written.expect("the lease is valid").unwrap();
    served.stop().await;
}
