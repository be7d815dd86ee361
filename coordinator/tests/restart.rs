//! A coordinator that dies, and the next one, which takes over what it finds: in the store, and at the workers.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, Worker, membership, soon, training};
use takuma_coordinator::Options;
use takuma_proto::v1;
use takuma_proto::v1::prepare::{State, When};
use takuma_proto::v1::run_ended::Outcome;
use takuma_proto::v1::run_failed::Kind;
use takuma_proto::v1::sample_tile::Kind as Grid;
use takuma_proto::v1::worker_directive::Directive;
use tonic::Code;

const RUN: &str = "calm-otter-3";

/// A real coordinator process with two workers at step 2, killed.
async fn killed(place: &Place) -> [v1::Prepare; 2] {
    let (mut server, mut process) = Server::spawn(place).await;
    let (a, b, prepares) = training(&mut server, place).await;
    soon("its death", process.kill()).await.unwrap();
    drop((a, b));
    prepares
}

#[tokio::test]
async fn workers_that_come_back_go_on_in_the_same_generation_and_nothing_is_lost_or_doubled() {
    let place = Place::new().await;
    let prepares = killed(&place).await;
    let mut server = Server::start(&place).await;
    let view = server.run(RUN).await;
    assert_eq!((view.status(), view.error.as_str()), (v1::RunStatus::Running, ""));
    let mut a = server.returning("a", &prepares[0]).await;
    // The first that is back has no group yet: what it sends now is asked for again.
    a.report(&prepares[0], 2).await;
    let mut b = server.returning("b", &prepares[1]).await;
    let kept = a.asked_to_resend().await;
    b.asked_to_resend().await;
    assert!(
        (1..=2).contains(&kept.step),
        "the checkpoint of step 1 was committed, so its metrics are stored"
    );
    let event = server.until_event(RUN, "reunited").await;
    assert_eq!(
        (event.message.as_str(), event.generation),
        ("2 of 2 workers are back", prepares[0].generation)
    );
    // Everything that was made meanwhile, some of it for the second time.
    for step in 1..=5 {
        a.report(&prepares[0], step).await;
    }
    for (worker, prepare) in [&a, &b].into_iter().zip(&prepares) {
        worker.tile(prepare, Grid::Generated, 4).await;
    }
    a.checkpoint(&prepares[0], 5).await;
    b.committed(5).await;
    let (view, _) = server.until(RUN, |view| view.checkpoint_step == 5).await;
    assert_eq!((view.generation, view.workers, view.step), (prepares[0].generation, 2, 5));
    assert_eq!(server.stored_steps(RUN).await, [1, 2, 3, 4, 5]);
    assert!(server.read(RUN, "samples/step-000004.png").await.is_ok());
    server.stop().await;
}

#[tokio::test]
async fn a_run_that_ended_meanwhile_is_taken_to_its_end() {
    let place = Place::new().await;
    let prepares = killed(&place).await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b) =
        (server.returning("a", &prepares[0]).await, server.returning("b", &prepares[1]).await);
    a.asked_to_resend().await;
    b.asked_to_resend().await;
    // The news come before the results, as workers send them.
    a.end(&prepares[0], Outcome::Completed, 10).await;
    b.end(&prepares[1], Outcome::Completed, 10).await;
    for step in 1..=10 {
        a.report(&prepares[0], step).await;
    }
    a.upload(&prepares[0], 10).await;
    let (view, _) = server.until_status(RUN, v1::RunStatus::Succeeded).await;
    assert_eq!((view.step, view.checkpoint_step), (10, 10));
    assert_eq!(server.stored_steps(RUN).await, (1..=10).collect::<Vec<_>>());
    assert!(matches!(a.next().await, Directive::CheckpointCommitted(_)));
    assert!(matches!(a.next().await, Directive::Release(_)));
    server.stop().await;
}

#[tokio::test]
async fn who_does_not_come_back_is_done_without_after_a_while() {
    let place = Place::new().await;
    let prepares = killed(&place).await;
    let options = Options { reunion_ms: 300, ..Options::default() };
    let mut server = Server::start_with(&place, options).await;
    let mut a = server.returning("a", &prepares[0]).await;
    let next = a.regrouped(When::Now).await;
    assert!(next.generation > prepares[0].generation + 1, "one that was given out before could be this");
    assert_eq!((next.members.len(), next.run_id.as_str()), (1, prepares[0].run_id.as_str()));
    a.formed(&next, 2).await;
    a.report(&next, 2).await;
    a.report(&next, 3).await;
    server.until(RUN, |view| view.step == 3).await;
    // It comes late, is out, and may join again.
    let mut b = server.returning("b", &prepares[1]).await;
    assert!(matches!(b.next().await, Directive::Abort(abort) if abort.generation == prepares[1].generation));
    assert_eq!(b.regrouped(When::NextStep).await.members.len(), 2);
    server.stop().await;
}

#[tokio::test]
async fn without_any_worker_the_run_waits_and_goes_on_from_its_checkpoint() {
    let place = Place::new().await;
    let (mut server, mut process) = Server::spawn(&place).await;
    let (a, b, _) = training(&mut server, &place).await;
    let mut queued = place.config(1);
    queued.workers = Some(2);
    server.submit(&queued, "queued").await;
    place.store.put("runs/torn/run.json", "{").await.unwrap();
    soon("its death", process.kill()).await.unwrap();
    drop((a, b));
    let options = Options { reunion_ms: 100, ..Options::default() };
    let mut server = Server::start_with(&place, options).await;
    let (view, _) = server.until_status(RUN, v1::RunStatus::Waiting).await;
    assert_eq!((view.queue_position, view.checkpoint_step), (1, 1));
    assert_eq!(server.run("queued").await.waiting_for, "1 run ahead in the queue");
    let taken = server.try_submit(&queued, "torn").await.unwrap_err();
    assert_eq!(taken.code(), Code::FailedPrecondition);
    let mut c = server.worker("c").await;
    let prepare = c.told_to_prepare().await;
    assert_eq!((prepare.run.as_str(), prepare.state(), prepare.start_step), (RUN, State::Checkpoint, 1));
    server.stop().await;
}

#[tokio::test]
async fn a_broken_group_that_comes_back_is_formed_anew() {
    let place = Place::new().await;
    let prepares = killed(&place).await;
    let server = Server::start(&place).await;
    let parked = |prepare| v1::Membership { parked: true, ..membership(prepare) };
    let mut a = server.returning_as("a", parked(&prepares[0])).await;
    let mut b = server.returning_as("b", parked(&prepares[1])).await;
    let next = [a.regrouped(When::Now).await, b.regrouped(When::Now).await];
    assert_eq!(next[0].generation, next[1].generation);
    server.stop().await;
}

#[tokio::test]
async fn a_group_that_was_changing_is_formed_anew_with_all_who_have_its_state() {
    let place = Place::new().await;
    let (mut server, mut process) = Server::spawn(&place).await;
    let (mut a, mut b, prepares) = training(&mut server, &place).await;
    let mut c = server.worker("c").await;
    let next = [a.prepare().await, b.prepare().await, c.prepare().await];
    for worker in [&mut a, &mut b, &mut c] {
        worker.start().await;
    }
    soon("its death", process.kill()).await.unwrap();
    drop((a, b, c));
    let server = Server::start(&place).await;
    // One has changed over, one is about to, the joiner was started.
    let changing = v1::Membership { changes_to: next[1].generation, ..membership(&prepares[1]) };
    let mut a = server.returning("a", &next[0]).await;
    let mut b = server.returning_as("b", changing).await;
    let mut c = server.returning("c", &next[2]).await;
    let anew = [a.regrouped(When::Now).await, b.regrouped(When::Now).await, c.regrouped(When::Now).await];
    assert!(anew.iter().all(|prepare| prepare.generation > next[0].generation && prepare.members.len() == 3));
    server.stop().await;
}

#[tokio::test]
async fn shutdown_ends_sessions_and_leaves_the_run_to_the_next_coordinator() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, _b, prepares) = training(&mut server, &place).await;
    server.stop().await;
    assert_eq!(soon("the session's end", ended(&mut a)).await, 0, "nothing is aborted");
    let mut server = Server::start(&place).await;
    assert_eq!(server.stored_steps(RUN).await, [1, 2]);
    let mut a = server.returning("a", &prepares[0]).await;
    let mut b = server.returning("b", &prepares[1]).await;
    assert_eq!(a.asked_to_resend().await.step, 2);
    b.asked_to_resend().await;
    a.report(&prepares[0], 3).await;
    let (view, events) = server.until(RUN, |view| view.step == 3).await;
    assert_eq!(view.generation, prepares[0].generation);
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["coordinator_back", "reunited"]);
    server.stop().await;
}

/// Reads a session to its end and counts what came beside the news of what is kept.
async fn ended(worker: &mut Worker) -> usize {
    let mut others = 0;
    while let Ok(Some(message)) = worker.directives.message().await {
        others += usize::from(!matches!(message.directive, Some(Directive::Kept(_))));
    }
    others
}

#[tokio::test]
async fn a_worker_of_a_past_that_was_gone_back_from_is_turned_down() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, b, prepares) = training(&mut server, &place).await;
    b.failed(&prepares[1], Kind::Run, "the loss is not finite").await;
    server.until_status(RUN, v1::RunStatus::Failed).await;
    assert!(matches!(a.next().await, Directive::Abort(_)));
    b.die();
    let request = v1::ResumeRunRequest { run: RUN.into() };
    soon("the answer", server.control.resume_run(request)).await.unwrap();
    let again = a.prepare().await;
    if again.members.len() == 1 {
        a.start().await;
    }
    let mut late = server.returning("b", &prepares[1]).await;
    assert!(
        matches!(late.next().await, Directive::Abort(abort) if abort.generation == prepares[1].generation)
    );
    server.stop().await;
}
