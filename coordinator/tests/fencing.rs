//! Two coordinators on one store, which the lease would prevent: the older one ends, and what the newer one wrote stays.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, soon, training};
use takuma_coordinator::ServerError;
use takuma_core::record::{RunRecord, RunStatus, writer_of};

const RUN: &str = "calm-otter-3";
const RECORD: &str = "runs/calm-otter-3/run.json";

#[tokio::test]
async fn a_coordinator_that_finds_another_s_record_ends_and_leaves_it() {
    let place = Place::new().await;
    let mut stale = Server::start(&place).await;
    let (a, _b, prepares) = training(&mut stale, &place).await;
    let mut newer = Server::start(&place).await;
    assert_eq!(newer.run(RUN).await.status(), takuma_proto::v1::RunStatus::Running);
    let theirs = |json: &[u8]| writer_of(json).unwrap().rsplit_once('-').unwrap().0.to_owned();
    let before = theirs(&place.store.get(RECORD).await.unwrap());
    a.report(&prepares[0], 3).await;
    a.upload(&prepares[0], 3).await;
    let ended = soon("its end", stale.task).await.unwrap();
    let Err(error @ ServerError::StoreLost { .. }) = ended else { panic!("{ended:?}") };
    let message = error.to_string();
    assert!(message.contains("another coordinator has taken over the store"), "{message}");
    assert!(message.contains(RECORD), "{message}");
    newer.stop().await;
    let after = place.store.get(RECORD).await.unwrap();
    assert_eq!(theirs(&after), before);
    // The run did not fail: the newer one goes on with it.
    assert_eq!(RunRecord::from_json(&after).unwrap().status, RunStatus::Running);
}

#[tokio::test]
async fn a_stale_coordinator_that_is_told_to_stop_writes_no_record_either() {
    let place = Place::new().await;
    let mut stale = Server::start(&place).await;
    let (_a, _b, _) = training(&mut stale, &place).await;
    let newer = Server::start(&place).await;
    newer.stop().await;
    let before = place.store.get(RECORD).await.unwrap();
    stale.stop.cancel();
    let ended = soon("its end", stale.task).await.unwrap();
    assert!(matches!(ended, Err(ServerError::StoreLost { .. })), "{ended:?}");
    assert_eq!(place.store.get(RECORD).await.unwrap(), before);
}

#[tokio::test]
async fn a_record_that_was_removed_is_written_again() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, _b, prepares) = training(&mut server, &place).await;
    place.store.delete(RECORD).await.unwrap();
    a.report(&prepares[0], 3).await;
    a.checkpoint(&prepares[0], 3).await;
    server.stop().await;
    let record = RunRecord::from_json(&place.store.get(RECORD).await.unwrap()).unwrap();
    assert_eq!((record.name.as_str(), record.step), (RUN, 3));
}
