//! What goes wrong, and how it is told.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, Worker, soon};
use takuma_coordinator::Options;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::{PROTOCOL_VERSION, v1};
use tonic::Code;

/// Two workers at a run that has a checkpoint of step 1 and has finished step 2.
async fn training(server: &mut Server, place: &Place) -> (Worker, Worker, [v1::Prepare; 2]) {
    let (mut a, mut b) = (server.worker("a").await, server.worker("b").await);
    server.submit(&place.config(10), "calm-otter-3").await;
    let prepares = [a.prepare().await, b.prepare().await];
    a.start().await;
    b.start().await;
    a.report(&prepares[0], 1).await;
    a.checkpoint(&prepares[0], 1).await;
    b.committed(1).await;
    a.report(&prepares[0], 2).await;
    server.until("calm-otter-3", |view| view.step == 2).await;
    (a, b, prepares)
}

const REMEDY: &str = "; continue from the checkpoint of step 1 with 'takuma run resume calm-otter-3'";

#[tokio::test]
async fn a_worker_that_dies_ends_the_run_by_name_and_the_run_resumes_with_the_other() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.die();
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    assert!(
        view.error.starts_with("b (host testhost, pid 4242) was lost at step 2: its connection "),
        "{}",
        view.error
    );
    assert!(view.error.ends_with(REMEDY), "{}", view.error);
    let Directive::Abort(abort) = a.next().await else { panic!("no Abort came") };
    assert_eq!(abort.generation, prepares[0].generation);
    let request = v1::ResumeRunRequest { run: "calm".into() };
    soon("the answer", server.control.resume_run(request)).await.unwrap();
    let again = a.prepare().await;
    assert_eq!((again.start_step, again.resume, again.members.len()), (1, true, 1));
    // The line of step 2 is gone; it comes again.
    a.start().await;
    a.report(&again, 2).await;
    server.until("calm", |view| view.step == 2).await;
    server.stop().await;
}

#[tokio::test]
async fn a_silent_worker_is_lost_after_its_timeout() {
    let place = Place::new().await;
    let options = Options { heartbeat_timeout_ms: 400, ..Options::default() };
    let mut server = Server::start_with(&place, options).await;
    let (mut a, b, _) = training(&mut server, &place).await;
    b.fall_silent();
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    let expected = "b (host testhost, pid 4242) was lost at step 2: it sent no heartbeat for 0.4 s";
    assert_eq!(view.error, format!("{expected}{REMEDY}"));
    assert!(matches!(a.next().await, Directive::Abort(_)));
    let workers =
        soon("workers", server.control.list_workers(v1::ListWorkersRequest {})).await.unwrap().into_inner();
    let seen: Vec<_> =
        workers.workers.iter().map(|worker| (worker.name.as_str(), worker.status.as_str())).collect();
    assert_eq!(seen, [("a", "idle"), ("b", "lost")]);
    server.stop().await;
}

fn failed(prepare: &v1::Prepare, kind: v1::run_failed::Kind, message: &str) -> Message {
    Message::RunFailed(v1::RunFailed {
        run: prepare.run.clone(),
        generation: prepare.generation,
        step: 2,
        phase: "g1".into(),
        kind: kind.into(),
        message: message.into(),
        suspect_rank: 1,
    })
}

#[tokio::test]
async fn a_survivor_s_report_does_not_hide_the_culprit() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (a, b, prepares) = training(&mut server, &place).await;
    a.send(failed(&prepares[0], v1::run_failed::Kind::PeerLost, "rank 1 closed the connection")).await;
    server.until_event("calm", "link_lost").await;
    b.die();
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    assert!(view.error.starts_with("b (host testhost, pid 4242) was lost at step 2"), "{}", view.error);
    server.stop().await;
}

#[tokio::test]
async fn a_link_that_breaks_between_living_workers_is_blamed_itself() {
    let place = Place::new().await;
    let options = Options { peer_lost_grace_ms: 50, ..Options::default() };
    let mut server = Server::start_with(&place, options).await;
    let (a, _b, prepares) = training(&mut server, &place).await;
    a.send(failed(&prepares[0], v1::run_failed::Kind::PeerLost, "rank 1 did not answer for 60 s")).await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    let told = "the link between a (host testhost, pid 4242) and b (host testhost, pid 4242) broke at step 2";
    assert!(view.error.starts_with(told), "{}", view.error);
    server.stop().await;
}

#[tokio::test]
async fn a_worker_s_own_failure_is_told_in_its_words() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (_a, b, prepares) = training(&mut server, &place).await;
    b.send(failed(&prepares[1], v1::run_failed::Kind::Local, "shard-00003.safetensors cannot be read")).await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    let told = "b (host testhost, pid 4242) failed at step 2 (g1): shard-00003.safetensors cannot be read";
    assert_eq!(view.error, format!("{told}{REMEDY}"));
    server.stop().await;
}

#[tokio::test]
async fn a_checkpoint_with_a_missing_part_is_not_committed_and_fails_the_run() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, _b, prepares) = training(&mut server, &place).await;
    a.upload(&prepares[0], 2).await;
    a.committed(2).await;
    let parts = v1::CheckpointUploaded {
        run: prepares[0].run.clone(),
        generation: prepares[0].generation,
        step: 2,
        parts: takuma_core::checkpoint::CHECKPOINT_PARTS
            .map(|name| v1::ObjectPart { name: name.into(), size_bytes: 7, sha256: String::new() })
            .to_vec(),
        weights_sha256: String::new(),
    };
    a.send(Message::CheckpointUploaded(parts)).await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    assert!(view.error.contains("generator.safetensors has 9 bytes, but 7 bytes are due"), "{}", view.error);
    assert_eq!(view.checkpoint_step, 2);
    server.stop().await;
}

#[tokio::test]
async fn another_protocol_version_is_refused_in_words() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let refused = Worker::join(server.address, "old", PROTOCOL_VERSION + 1).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("the worker speaks protocol 2; use the same takuma version"),
        "{refused}"
    );
    let request = v1::GetClusterRequest { protocol_version: 0 };
    let refused = soon("the answer", server.control.get_cluster(request)).await.unwrap_err();
    assert!(refused.message().contains("the client speaks protocol 0"), "{refused}");
    server.stop().await;
}

#[tokio::test]
async fn wrong_requests_are_told_apart() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let mut config = place.config(1);
    server.submit(&config, "one").await;
    let taken = server.try_submit(&config, "one").await.unwrap_err();
    assert_eq!(
        (taken.code(), taken.message()),
        (Code::FailedPrecondition, "there is already a run named 'one'; give another with --name")
    );
    let bad = server.try_submit(&config, "One!").await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    config.data.push_str("-missing");
    let missing = server.try_submit(&config, "").await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    assert!(missing.message().contains("prepare one with 'takuma dataset prepare SRC file://"), "{missing}");
    config.global_batch = 48;
    config.data = place.config(1).data;
    let batch = server.try_submit(&config, "").await.unwrap_err();
    assert!(batch.message().contains("a global batch of 48 does not go with 64 shards"), "{batch}");
    let request = v1::GetRunRequest { run: "nobody".into() };
    let unknown = soon("the answer", server.control.get_run(request)).await.unwrap_err();
    assert_eq!(
        (unknown.code(), unknown.message()),
        (Code::NotFound, "there is no run 'nobody'; 'takuma run ls' lists the runs")
    );
    server.stop().await;
}

#[tokio::test]
async fn resuming_on_another_dataset_is_refused() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (_a, b, _) = training(&mut server, &place).await;
    b.die();
    server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    place.write_dataset("another").await;
    let request = v1::ResumeRunRequest { run: "calm".into() };
    let refused = soon("the answer", server.control.resume_run(request)).await.unwrap_err();
    assert!(refused.message().contains("is not the one that run calm-otter-3 began with"), "{refused}");
    server.stop().await;
}

#[tokio::test]
async fn a_killed_coordinator_s_runs_are_found_again() {
    let place = Place::new().await;
    let (mut server, mut process) = Server::spawn(&place).await;
    let (a, b, _) = training(&mut server, &place).await;
    let mut waiting = place.config(1);
    waiting.workers = Some(2);
    server.submit(&waiting, "waiting").await;
    place.store.put("runs/torn/run.json", "{").await.unwrap();
    soon("its death", process.kill()).await.unwrap();
    drop((a, b));
    let mut server = Server::start(&place).await;
    let view = server.run("calm-otter-3").await;
    assert_eq!(view.status(), v1::RunStatus::Failed);
    assert_eq!(view.error, format!("the coordinator was restarted while the run was at work{REMEDY}"));
    assert_eq!(server.run("waiting").await.waiting_for, "2 workers (none is connected)");
    let taken = server.try_submit(&waiting, "torn").await.unwrap_err();
    assert_eq!(taken.code(), Code::FailedPrecondition);
    server.stop().await;
}

#[tokio::test]
async fn shutdown_ends_sessions_and_keeps_the_state() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, _b, _) = training(&mut server, &place).await;
    server.stop().await;
    assert!(matches!(a.next().await, Directive::Abort(_)));
    assert_eq!(soon("the session's end", a.directives.message()).await.unwrap(), None);
    let mut server = Server::start(&place).await;
    let view = server.run("calm-otter-3").await;
    assert_eq!(view.error, format!("the coordinator was shut down at step 2{REMEDY}"));
    let metrics = server.read("calm", "metrics.jsonl").await.unwrap();
    assert_eq!(metrics.iter().filter(|&&byte| byte == b'\n').count(), 2);
    server.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_told_with_the_remedy() {
    let (_listener, address) = takuma_coordinator::bind("127.0.0.1:0").await.unwrap();
    let message = takuma_coordinator::bind(&address.to_string()).await.unwrap_err().to_string();
    assert!(message.contains("perhaps another coordinator") && message.contains("--listen"), "{message}");
}
