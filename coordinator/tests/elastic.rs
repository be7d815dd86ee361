//! Workers come and go while a run trains.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, soon, training};
use takuma_coordinator::Options;
use takuma_proto::v1;
use takuma_proto::v1::prepare::{State, When};
use takuma_proto::v1::run_ended::Outcome;
use takuma_proto::v1::run_failed::Kind;
use takuma_proto::v1::worker_directive::Directive;
use tonic::Code;

const RUN: &str = "calm-otter-3";

#[tokio::test]
async fn a_survivor_goes_on_at_once_when_its_peer_s_session_dies() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.die();
    a.failed(&prepares[0], Kind::PeerLost, "rank 1 closed the connection").await;
    let next = a.regrouped(When::Now).await;
    assert!(next.generation > prepares[0].generation);
    assert_eq!((next.members.len(), next.members[0].slot_count, next.rank), (1, 64, 0));
    assert_eq!(next.run_id, prepares[0].run_id);
    a.formed(&next, 2).await;
    a.report(&prepares[0], 3).await; // Of the former group: it comes again.
    a.report(&next, 3).await;
    let (view, events) = server.until(RUN, |view| view.step == 3).await;
    assert_eq!((view.status(), view.workers, view.generation), (v1::RunStatus::Running, 1, next.generation));
    let lost = events.iter().find(|event| event.kind == "worker_lost").unwrap();
    assert!(lost.message.starts_with("b (host testhost, pid 4242) was lost: its connection "), "{lost:?}");
    let formed = events.iter().rfind(|event| event.kind == "formed").unwrap();
    assert_eq!(formed.message, "1 worker goes on from step 2 after 0.05 s");
    server.stop().await;
}

#[tokio::test]
async fn a_session_that_dies_alone_is_waited_for_a_moment() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.die();
    let mut b = server.returning("b", &prepares[1]).await;
    b.asked_to_resend().await;
    a.report(&prepares[0], 3).await;
    server.until(RUN, |view| view.step == 3).await;
    // It does not come back: nobody misses it before its time is up.
    b.die();
    let next = a.regrouped(When::Now).await;
    assert_eq!(next.members.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_silent_worker_is_lost_and_the_others_go_on() {
    let place = Place::new().await;
    let options = Options { heartbeat_timeout_ms: 400, ..Options::default() };
    let mut server = Server::start_with(&place, options).await;
    let (mut a, b, _) = training(&mut server, &place).await;
    b.fall_silent();
    a.regrouped(When::Now).await;
    let event = server.until_event(RUN, "worker_lost").await;
    assert_eq!(event.message, "b (host testhost, pid 4242) was lost: it sent no heartbeat for 0.4 s");
    let seen = server.workers().await;
    assert_eq!(seen, [("a".to_owned(), "training".to_owned()), ("b".to_owned(), "lost".to_owned())]);
    server.stop().await;
}

#[tokio::test]
async fn a_joiner_is_taken_in_between_two_steps() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    let mut c = server.worker("c").await;
    let next = [
        a.regrouped(When::NextStep).await,
        b.regrouped(When::NextStep).await,
        c.regrouped(When::NextStep).await,
    ];
    assert_eq!(next.each_ref().map(|prepare| prepare.rank), [0, 1, 2]);
    assert_eq!(next[2].members.iter().map(|member| member.slot_count).collect::<Vec<_>>(), [22, 21, 21]);
    a.prepared(&next[0]).await;
    c.prepared(&next[2]).await;
    // Members train on while one of them is not prepared.
    a.report(&prepares[0], 3).await;
    server.until(RUN, |view| view.step == 3).await;
    assert!(server.workers().await.contains(&("c".to_owned(), "joining".to_owned())));
    b.prepared(&next[1]).await;
    for worker in [&mut a, &mut b, &mut c] {
        assert_eq!(worker.start().await.generation, next[0].generation);
    }
    // The old group may still end a step; the first message of the new one says that it has taken over.
    a.report(&prepares[0], 4).await;
    let (view, _) = server.until(RUN, |view| view.step == 4).await;
    assert_eq!((view.generation, view.workers), (prepares[0].generation, 2));
    a.formed(&next[0], 4).await;
    a.report(&next[0], 5).await;
    let (view, events) = server.until(RUN, |view| view.step == 5).await;
    assert_eq!((view.generation, view.workers), (next[0].generation, 3));
    assert!(
        events
            .iter()
            .any(|event| event.message == "c joined: a (22 slots), b (21 slots), c (21 slots) train")
    );
    server.stop().await;
}

#[tokio::test]
async fn a_drained_worker_is_left_out_and_released() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    server.drain("b").await.unwrap();
    let next = a.regrouped(When::NextStep).await;
    assert_eq!(next.members.iter().map(|member| member.worker.as_str()).collect::<Vec<_>>(), ["a"]);
    a.prepared(&next).await;
    // Those who leave are started too: all leave the old ring after the same step.
    assert_eq!(a.start().await.generation, next.generation);
    assert_eq!(b.start().await.generation, next.generation);
    a.report(&prepares[0], 3).await;
    a.formed(&next, 3).await;
    let released = b.next().await;
    assert!(
        matches!(&released, Directive::Release(r) if r.generation == prepares[1].generation),
        "{released:?}"
    );
    assert!(server.workers().await.contains(&("b".to_owned(), "drained".to_owned())));
    let refused = server.drain("a").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().starts_with("a is the only worker that run calm-otter-3 can go on with"),
        "{refused}"
    );
    assert_eq!(server.drain("z").await.unwrap_err().code(), Code::NotFound);
    server.stop().await;
}

#[tokio::test]
async fn a_worker_that_wants_to_go_gets_its_farewell_after_the_change() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    b.goodbye(false).await;
    let next = a.regrouped(When::NextStep).await;
    a.prepared(&next).await;
    a.start().await;
    b.start().await;
    a.formed(&next, 2).await;
    assert!(matches!(b.next().await, Directive::Release(r) if r.generation == prepares[1].generation));
    assert!(matches!(b.next().await, Directive::Farewell(_)));
    // The last one writes a checkpoint first, and the run waits.
    a.goodbye(false).await;
    assert!(matches!(a.next().await, Directive::StopRun(stop) if stop.generation == next.generation));
    a.report(&next, 3).await;
    a.checkpoint(&next, 3).await;
    a.end(&next, Outcome::Stopped, 3).await;
    assert!(matches!(a.next().await, Directive::Abort(_)));
    assert!(matches!(a.next().await, Directive::Farewell(_)));
    let (view, _) = server.until_status(RUN, v1::RunStatus::Waiting).await;
    assert_eq!((view.checkpoint_step, view.waiting_for.as_str()), (3, "1 worker (2 are connected)"));
    // One that is idle may go at once.
    let mut c = server.worker("c").await;
    let prepare = c.told_to_prepare().await;
    assert_eq!((prepare.state(), prepare.start_step), (State::Checkpoint, 3));
    c.goodbye(false).await;
    assert!(matches!(c.next().await, Directive::Abort(_)));
    assert!(matches!(c.next().await, Directive::Farewell(_)));
    server.stop().await;
}

#[tokio::test]
async fn without_workers_a_run_waits_and_goes_on_with_the_next_one() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (a, b, prepares) = training(&mut server, &place).await;
    b.goodbye(true).await;
    a.goodbye(true).await;
    let (view, events) = server.until_status(RUN, v1::RunStatus::Waiting).await;
    assert_eq!((view.waiting_for.as_str(), view.error.as_str()), ("1 worker (none is connected)", ""));
    let waiting = events.iter().rfind(|event| event.kind == "waiting").unwrap();
    assert!(
        waiting.message.ends_with("goes on from the checkpoint of step 1 when a worker comes"),
        "{waiting:?}"
    );
    let mut c = server.worker("c").await;
    let prepare = c.prepare().await;
    assert_eq!((prepare.state(), prepare.when(), prepare.start_step), (State::Checkpoint, When::Now, 1));
    assert!(prepare.generation > prepares[0].generation);
    assert_eq!((prepare.members.len(), prepare.checkpoint_url.as_str()), (1, prepare.run_url.as_str()));
    c.start().await;
    c.formed(&prepare, 1).await;
    // The line of step 2 is gone with the workers; it comes again.
    c.report(&prepare, 2).await;
    c.checkpoint(&prepare, 2).await;
    assert_eq!(server.stored_steps(RUN).await, [1, 2]);
    server.stop().await;
}

#[tokio::test]
async fn a_worker_s_own_failure_is_told_and_the_others_go_on_without_it() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.failed(&prepares[1], Kind::Local, "out of memory").await;
    let next = a.regrouped(When::Now).await;
    assert_eq!(next.members.len(), 1);
    let event = server.until_event(RUN, "worker_lost").await;
    assert_eq!(event.message, "b (host testhost, pid 4242) failed at step 2 (g1): out of memory");
    a.formed(&next, 2).await;
    a.report(&next, 3).await;
    server.until(RUN, |view| view.step == 3).await;
    // It is not asked again for this run.
    assert!(server.workers().await.contains(&("b".to_owned(), "idle".to_owned())));
    assert_eq!(server.run(RUN).await.workers, 1);
    server.stop().await;
}

#[tokio::test]
async fn a_survivor_s_report_does_not_hide_the_culprit() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    a.failed(&prepares[0], Kind::PeerLost, "rank 1 closed the connection").await;
    server.until_event(RUN, "link_lost").await;
    b.die();
    let event = server.until_event(RUN, "worker_lost").await;
    a.regrouped(When::Now).await;
    // A loaded machine may be so slow that the link was blamed first.
    let blamed =
        ["b (host testhost, pid 4242) was lost", "the link between a (host testhost, pid 4242) and b"];
    assert!(blamed.iter().any(|told| event.message.starts_with(told)), "{event:?}");
    server.stop().await;
}

#[tokio::test]
async fn a_link_that_breaks_between_living_workers_is_tried_again() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    a.failed(&prepares[0], Kind::PeerLost, "rank 1 did not answer for 5 s").await;
    let next = [a.regrouped(When::Now).await, b.regrouped(When::Now).await];
    assert_eq!(next[1].members.len(), 2);
    let event = server.until_event(RUN, "worker_lost").await;
    let told =
        "the link between a (host testhost, pid 4242) and b (host testhost, pid 4242) broke: rank 1 did not";
    assert!(event.message.starts_with(told), "{event:?}");
    // The second time the suspect stays out, whichever end tells of it.
    b.failed(&next[1], Kind::PeerLost, "rank 0 did not answer for 5 s").await;
    assert!(matches!(a.next().await, Directive::Abort(abort) if abort.generation == next[0].generation));
    assert_eq!(b.regrouped(When::Now).await.members.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_fork_begins_with_the_other_run_s_checkpoint_and_keeps_its_own_folder() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    b.failed(&prepares[1], Kind::Run, "enough").await;
    server.until_status(RUN, v1::RunStatus::Failed).await;
    assert!(matches!(a.next().await, Directive::Abort(_)));
    let mut config = place.config(20);
    config.learning_rate = 1e-4;
    let submit = |config: &takuma_core::config::RunConfig, step| v1::SubmitRunRequest {
        protocol_version: takuma_proto::PROTOCOL_VERSION,
        config_json: config.to_json(),
        name: "fork".into(),
        origin_run: "calm".into(),
        origin_step: step,
        ..v1::SubmitRunRequest::default()
    };
    let missing = soon("the answer", server.control.submit_run(submit(&config, 2))).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    assert!(missing.message().starts_with("run calm-otter-3 has no checkpoint of step 2"), "{missing}");
    let other = takuma_core::config::RunConfig { seed: 7, ..config.clone() };
    let other = soon("the answer", server.control.submit_run(submit(&other, 1))).await.unwrap_err();
    assert!(
        other.message().starts_with("seed is 7, but the checkpoint calm-otter-3@1 was trained with 0"),
        "{other}"
    );
    let reply = soon("the answer", server.control.submit_run(submit(&config, 1))).await.unwrap().into_inner();
    let run = reply.run.unwrap();
    assert_eq!((run.origin.as_str(), run.step, run.steps), ("calm-otter-3@1", 1, 20));
    let prepare = a.prepare().await;
    assert_eq!((prepare.state(), prepare.start_step, prepare.run.as_str()), (State::Checkpoint, 1, "fork"));
    assert!(prepare.checkpoint_url.ends_with("/runs/calm-otter-3"), "{}", prepare.checkpoint_url);
    assert!(prepare.run_url.ends_with("/runs/fork"), "{}", prepare.run_url);
    assert!(matches!(b.next().await, Directive::Abort(_)));
    b.prepare().await;
    a.start().await;
    a.formed(&prepare, 1).await;
    a.report(&prepare, 2).await;
    a.checkpoint(&prepare, 2).await;
    assert_eq!(server.stored_steps("fork").await, [2]);
    assert!(
        place.store.get_if_exists("runs/fork/checkpoints/step-000002/manifest.json").await.unwrap().is_some()
    );
    server.stop().await;
}
