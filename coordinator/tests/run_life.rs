//! A run's life over the wire: submitted, prepared, trained, checkpointed, stopped, resumed, ended.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use support::{Place, Server, Worker, soon};
use takuma_proto::v1::prepare::State;
use takuma_proto::v1::run_ended::Outcome;
use takuma_proto::v1::sample_tile::Kind;
use takuma_proto::v1::worker_directive::Directive;
use takuma_proto::{PROTOCOL_VERSION, v1};

/// What every picture begins with.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// Trains `from..=to` as a group does: steps, grids every 2 steps, no checkpoint.
async fn train(workers: &[&Worker], prepares: &[v1::Prepare], from: u64, to: u64) {
    for step in from..=to {
        workers[0].report(&prepares[0], step).await;
        if step % 2 == 0 {
            for (worker, prepare) in workers.iter().zip(prepares) {
                worker.tile(prepare, Kind::Generated, step).await;
            }
        }
    }
}

#[tokio::test]
async fn two_workers_take_a_run_to_success_and_every_file_is_there() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let (mut a, mut b) = (server.worker("").await, server.worker("second").await);
    assert_eq!((a.name.as_str(), b.name.as_str()), ("worker-1", "second"));
    let run = server.submit(&place.config(4), "").await;
    let prepares = [a.prepare().await, b.prepare().await];
    assert_eq!(prepares[1].members.len(), 2);
    assert_eq!(
        (prepares[1].rank, prepares[1].members[1].first_slot, prepares[1].members[1].slot_count),
        (1, 32, 32)
    );
    assert_eq!((prepares[0].state(), prepares[0].start_step, prepares[0].target_steps), (State::Fresh, 0, 4));
    assert_eq!(prepares[0].run_id, run.id);
    a.start().await;
    b.start().await;
    for (worker, prepare) in [&a, &b].into_iter().zip(&prepares) {
        worker.tile(prepare, Kind::Reals, 0).await;
        worker.tile(prepare, Kind::Generated, 0).await;
    }
    train(&[&a, &b], &prepares, 1, 4).await;
    a.checkpoint(&prepares[0], 4).await;
    b.committed(4).await;
    a.end(&prepares[0], Outcome::Completed, 4).await;
    b.end(&prepares[1], Outcome::Completed, 4).await;
    let (view, events) = server.until_status(&run.name, v1::RunStatus::Succeeded).await;
    assert_eq!((view.step, view.steps, view.checkpoint_step, view.workers), (4, 4, 4, 2));
    assert_eq!(view.weights_sha256, format!("{:064}", 4));
    assert_eq!((view.d_loss, view.g_loss), (Some(0.25), Some(4.0)));
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds[..3], ["submitted", "preparing", "started"]);
    assert_eq!(kinds.last(), Some(&"succeeded"));
    files_are_whole(&place, &mut server, &run.name).await;
    // The record's last write may be under way until then.
    server.stop().await;
    let record = place.store.get(&format!("runs/{}/run.json", run.name)).await.unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&record).unwrap()["status"], "succeeded");
}

async fn files_are_whole(place: &Place, server: &mut Server, run: &str) {
    let metrics = String::from_utf8(server.read(run, "metrics.jsonl").await.unwrap()).unwrap();
    let lines: Vec<serde_json::Value> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((&lines[1]["images_per_s"], &lines[1]["workers"]), (&128.0.into(), &2.into()));
    let grid = image::load_from_memory(&server.read(run, "samples/step-000004.png").await.unwrap()).unwrap();
    assert_eq!((grid.width(), grid.height()), (530, 530));
    assert_eq!(grid.to_rgb8().get_pixel(2 + 66 * 7, 2 + 66 * 7).0, [189; 3]);
    let plot = image::load_from_memory(&server.read(run, "cost_vs_iteration.png").await.unwrap()).unwrap();
    assert_eq!((plot.width(), plot.height()), (1200, 720));
    let request = v1::ListSamplesRequest { run: run.into() };
    let samples = soon("samples", server.control.list_samples(request)).await.unwrap().into_inner();
    let names: Vec<&str> = samples.samples.iter().map(|sample| sample.name.as_str()).collect();
    assert_eq!(names, ["reals.png", "step-000000.png", "step-000002.png", "step-000004.png"]);
    assert!(samples.has_plot);
    let request = v1::ListCheckpointsRequest { run: run.into() };
    let checkpoints =
        soon("checkpoints", server.control.list_checkpoints(request)).await.unwrap().into_inner();
    assert_eq!(checkpoints.checkpoints.iter().map(|one| one.step).collect::<Vec<_>>(), [4]);
    let entries = place.store.list(&format!("runs/{run}/tensorboard")).await.unwrap();
    let mut images = 0;
    for entry in &entries {
        let file = place.store.get(&entry.name).await.unwrap();
        images += file.windows(PNG.len()).filter(|bytes| *bytes == PNG).count();
    }
    assert_eq!(images, 4, "every grid, in whatever file: {entries:?}");
    let escape = server.read(run, "../../datasets/faces/manifest.json").await.unwrap_err();
    assert_eq!(escape.code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn stop_and_resume_continue_from_the_checkpoint_with_one_worker() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let mut a = server.worker("a").await;
    server.submit(&place.config(6), "calm-otter-1").await;
    let first = [a.prepare().await];
    a.start().await;
    train(&[&a], &first, 1, 3).await;
    server.until("calm", |view| view.step == 3).await;
    let request = v1::StopRunRequest { run: "calm".into() };
    let view = soon("the answer", server.control.stop_run(request)).await.unwrap().into_inner();
    assert_eq!(view.status(), v1::RunStatus::Stopping);
    assert!(matches!(a.next().await, Directive::StopRun(_)));
    a.checkpoint(&first[0], 3).await;
    a.end(&first[0], Outcome::Stopped, 3).await;
    assert!(matches!(a.next().await, Directive::Release(_)));
    server.until_status("calm", v1::RunStatus::Stopped).await;

    let request = v1::ResumeRunRequest { run: "calm".into() };
    soon("the answer", server.control.resume_run(request)).await.unwrap();
    let second = [a.prepare().await];
    assert_eq!((second[0].state(), second[0].start_step), (State::Checkpoint, 3));
    assert!(second[0].generation > first[0].generation);
    a.start().await;
    a.report(&first[0], 4).await; // Of the old generation: refused.
    train(&[&a], &second, 4, 6).await;
    a.checkpoint(&second[0], 6).await;
    a.end(&second[0], Outcome::Completed, 6).await;
    server.until_status("calm", v1::RunStatus::Succeeded).await;
    let metrics = String::from_utf8(server.read("calm", "metrics.jsonl").await.unwrap()).unwrap();
    assert_eq!(metrics.lines().count(), 6);

    let request = v1::ResumeRunRequest { run: "calm".into() };
    let refused = soon("the answer", server.control.resume_run(request)).await.unwrap_err();
    assert_eq!(refused.message(), "run calm-otter-1 has succeeded: all its 6 steps are done");
    server.stop().await;
}

#[tokio::test]
async fn a_second_run_waits_and_says_for_what() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let mut config = place.config(1);
    config.workers = Some(1);
    let first = server.submit(&config, "first").await;
    assert_eq!((first.queue_position, first.waiting_for.as_str()), (1, "1 worker (none is connected)"));
    let mut a = server.worker("a").await;
    let prepare = a.prepare().await;
    let second = server.submit(&config, "second").await;
    assert_eq!((second.queue_position, second.waiting_for.as_str()), (1, "run first to end"));
    a.start().await;
    a.report(&prepare, 1).await;
    a.checkpoint(&prepare, 1).await;
    a.end(&prepare, Outcome::Completed, 1).await;
    assert!(matches!(a.next().await, Directive::Release(_)));
    assert_eq!(a.prepare().await.run, "second");
    server.stop().await;
}

#[tokio::test]
async fn a_dry_run_plans_and_changes_nothing() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let _workers = [server.worker("a").await, server.worker("b").await, server.worker("c").await];
    let request = v1::SubmitRunRequest {
        protocol_version: PROTOCOL_VERSION,
        config_json: place.config(10).to_json(),
        name: String::new(),
        dry_run: true,
        ..v1::SubmitRunRequest::default()
    };
    let reply = soon("the plan", server.control.submit_run(request)).await.unwrap().into_inner();
    let plan = reply.plan.unwrap();
    assert_eq!((plan.workers, plan.slots_per_worker), (3, vec![22, 21, 21]));
    assert_eq!((plan.steps, plan.steps_per_epoch, plan.images, plan.eta_s), (10, 2, 128, None));
    assert_eq!(reply.run.unwrap().id, "");
    let runs = soon("runs", server.control.list_runs(v1::ListRunsRequest {})).await.unwrap().into_inner();
    assert!(runs.runs.is_empty());
    assert!(place.store.list("runs").await.unwrap().is_empty());
    server.stop().await;
}

#[tokio::test]
async fn log_lines_of_workers_reach_a_reader_with_their_worker() {
    let place = Place::new().await;
    let mut server = Server::start(&place).await;
    let mut a = server.worker("a").await;
    let run = server.submit(&place.config(2), "").await;
    let prepare = a.prepare().await;
    a.start().await;
    let line = |level: &str, message: &str| v1::LogLine {
        level: level.into(),
        run: run.name.clone(),
        message: message.into(),
        ..v1::LogLine::default()
    };
    a.send(v1::worker_message::Message::LogLine(line("DEBUG", "unseen"))).await;
    a.send(v1::worker_message::Message::LogLine(line("WARN", "seen"))).await;
    a.report(&prepare, 1).await;
    server.until(&run.name, |view| view.step == 1).await;
    let request =
        v1::ReadLogsRequest { run: run.name.clone(), rank: Some(0), ..v1::ReadLogsRequest::default() };
    let mut lines = soon("lines", server.control.read_logs(request)).await.unwrap().into_inner();
    let seen = soon("a line", lines.message()).await.unwrap().unwrap();
    assert_eq!((seen.message.as_str(), seen.worker.as_str()), ("seen", "a"));
    assert_eq!(soon("the end", lines.message()).await.unwrap(), None);
    server.stop().await;
}
