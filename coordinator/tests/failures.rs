//! What goes wrong, and how it is told.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, Worker, soon, training};
use takuma_proto::v1::run_failed::Kind;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::v1::worker_message::Message;
use takuma_proto::{PROTOCOL_VERSION, v1};
use tonic::Code;

const REMEDY: &str = "; continue from the checkpoint of step 1 with 'takuma run resume calm-otter-3'";

#[tokio::test]
async fn what_nobody_can_do_fails_the_run_in_the_worker_s_words() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.failed(&prepares[1], Kind::Run, "the loss is not finite").await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    let told = "b (host testhost, pid 4242) failed at step 2 (g1): the loss is not finite";
    assert_eq!(view.error, format!("{told}{REMEDY}"));
    assert!(matches!(a.next().await, Directive::Abort(_)));
    let request = v1::ResumeRunRequest { run: "calm".into() };
    soon("the answer", server.control.resume_run(request)).await.unwrap();
    let again = a.told_to_prepare().await;
    assert_eq!((again.state(), again.start_step), (v1::prepare::State::Checkpoint, 1));
    server.stop().await;
}

#[tokio::test]
async fn a_worker_that_fails_alone_ends_the_run_in_its_words() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let mut a = server.worker("a").await;
    server.submit(&place.config(10), "calm-otter-3").await;
    let prepare = a.prepare().await;
    a.start().await;
    a.failed(&prepare, Kind::Local, "shard-00003.safetensors cannot be read").await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    let told = "a (host testhost, pid 4242) failed at step 2 (g1): shard-00003.safetensors cannot be read";
    assert!(view.error.starts_with(told), "{}", view.error);
    server.stop().await;
}

#[tokio::test]
async fn a_checkpoint_with_a_missing_part_is_not_committed_and_fails_the_run() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, _b, prepares) = training(&mut server, &place).await;
    a.upload(&prepares[0], 1).await;
    a.committed(1).await;
    let parts = v1::CheckpointUploaded {
        run: prepares[0].run.clone(),
        generation: prepares[0].generation,
        step: 2,
        parts: takuma_core::checkpoint::CHECKPOINT_PARTS
            .map(|part| {
                let name = format!("g{}/{part}", prepares[0].generation);
                v1::ObjectPart { name, size_bytes: 7, sha256: String::new() }
            })
            .to_vec(),
        weights_sha256: String::new(),
    };
    a.send(Message::CheckpointUploaded(parts)).await;
    let (view, _) = server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    assert!(view.error.contains("generator.safetensors is not there, but 7 bytes are due"), "{}", view.error);
    assert_eq!(view.checkpoint_step, 1);
    server.stop().await;
}

#[tokio::test]
async fn another_protocol_version_is_refused_in_words() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let refused = Worker::join(server.address, "old", PROTOCOL_VERSION + 1).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let newer = format!("the worker speaks protocol {}; use the same takuma version", PROTOCOL_VERSION + 1);
    assert!(refused.message().contains(&newer), "{refused}");
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
    let (_a, b, prepares) = training(&mut server, &place).await;
    b.failed(&prepares[1], Kind::Run, "the loss is not finite").await;
    server.until_status("calm-otter-3", v1::RunStatus::Failed).await;
    place.write_dataset("another").await;
    let request = v1::ResumeRunRequest { run: "calm".into() };
    let refused = soon("the answer", server.control.resume_run(request)).await.unwrap_err();
    assert!(refused.message().contains("is not the one that run calm-otter-3 began with"), "{refused}");
    server.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_told_with_the_remedy() {
    let (_listener, address) = takuma_coordinator::bind("127.0.0.1:0").await.unwrap();
    let message = takuma_coordinator::bind(&address.to_string()).await.unwrap_err().to_string();
    assert!(message.contains("perhaps another coordinator") && message.contains("--listen"), "{message}");
}
