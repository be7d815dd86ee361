//! Workers that come and go, exact runs and forks, as the program shows them; against a pretended coordinator.

#![allow(clippy::unwrap_used)] // The helpers are a test's too.

mod support;

use support::{Fake, Script, checkpoint, run_view, takuma};
use takuma_core::config::{Recipe, RunConfig};
use takuma_proto::v1::{RunEvent, RunStatus, RunUpdate, WorkerView};

fn script(status: RunStatus) -> Script {
    Script { run: run_view(status, 7), ..Script::default() }
}

fn worker(status: &str, run: &str) -> WorkerView {
    WorkerView {
        name: "worker-2".into(),
        status: status.into(),
        run: run.into(),
        rank: 1,
        ..WorkerView::default()
    }
}

#[tokio::test]
async fn exact_is_a_flag_and_lanes_a_setting() {
    let fake = Fake::start(script(RunStatus::Queued)).await;
    let arguments =
        ["run", "submit", "dcgan-tiny", "--data", "file:///d", "--exact", "--set", "lanes=4", "-d", "-y"];
    let ran = fake.takuma(&arguments).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.stderr.contains("4 lanes: the same bits whatever workers train, 4 workers at most"),
        "{}",
        ran.stderr
    );
    let json = fake.script.lock().unwrap().submitted[1].config_json.clone();
    assert!(json.contains(r#""exact":true,"lanes":4"#), "{json}");

    let arguments = ["run", "submit", "dcgan-tiny", "--data", "file:///d", "--set", "exact=yes", "-y"];
    let ran = takuma(&arguments, None).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (2, "error: exact is 'yes' in --set, but must be true or false\n")
    );
    let arguments =
        ["run", "submit", "dcgan-tiny", "--data", "file:///d", "--exact", "--set", "lanes=3", "-y"];
    let ran = takuma(&arguments, None).await;
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("lanes is 3, but must be a divisor of the global batch"), "{}", ran.stderr);
}

#[tokio::test]
async fn drain_returns_when_the_worker_is_out_of_its_run() {
    let before = vec![vec![worker("leaving", "calm-otter-3")], vec![worker("leaving", "calm-otter-3")]];
    let workers = vec![worker("drained", "")];
    let fake = Fake::start(Script { workers_before: before, workers, ..script(RunStatus::Running) }).await;
    let ran = fake.takuma(&["worker", "drain", "worker-2"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    let said: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(
        said,
        [
            "worker worker-2 leaves run calm-otter-3 after a step; waiting for that",
            "worker worker-2 is drained; run calm-otter-3 goes on without it",
        ]
    );
    assert_eq!(fake.script.lock().unwrap().drained, ["worker-2"]);
}

#[tokio::test]
async fn drain_tells_of_idle_gone_and_slow_workers() {
    let fake =
        Fake::start(Script { workers: vec![worker("drained", "")], ..script(RunStatus::Running) }).await;
    let ran = fake.takuma(&["worker", "drain", "worker-2"]).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (0, "worker worker-2 is drained\n"));
    let ran = fake.takuma(&["worker", "drain", "nobody"]).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (1, "error: there is no worker 'nobody'; 'takuma worker ls' lists them\n")
    );

    let fake =
        Fake::start(Script { workers: vec![worker("lost", "calm")], ..script(RunStatus::Running) }).await;
    let ran = fake.takuma(&["worker", "drain", "worker-2"]).await;
    assert_eq!((ran.code, ran.stderr.as_str()), (0, "worker worker-2 is gone\n"));

    let fake =
        Fake::start(Script { workers: vec![worker("leaving", "calm")], ..script(RunStatus::Running) }).await;
    let ran = fake.takuma(&["worker", "drain", "worker-2", "--timeout", "300ms"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("is still part of run calm after 300ms"), "{}", ran.stderr);
    let ran = fake.takuma(&["worker", "drain", "worker-2", "--no-wait"]).await;
    assert_eq!(ran.code, 0);
    assert!(ran.stderr.contains("was asked to finish"), "{}", ran.stderr);
}

#[tokio::test]
async fn waiting_runs_say_for_whom() {
    let mut run = run_view(RunStatus::Waiting, 7);
    (run.waiting_for, run.queue_position) = ("1 worker (none is connected)".into(), 1);
    (run.has_checkpoint, run.checkpoint_step) = (true, 5);
    let fake = Fake::start(Script { run, ..Script::default() }).await;
    let ran = fake.takuma(&["run", "ls", "-o", "wide"]).await;
    assert!(
        ran.stdout.contains("waiting") && ran.stdout.contains("1 worker (none is connected)"),
        "{}",
        ran.stdout
    );
    let ran = fake.takuma(&["run", "show", "calm"]).await;
    let told = "waiting for 1 worker (none is connected); then goes on from the checkpoint of step 5";
    assert!(ran.stdout.contains(told), "{}", ran.stdout);
    let ran = fake.takuma(&["run", "show", "calm", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&json["status"], &json["waiting_for"]),
        (&"waiting".into(), &"1 worker (none is connected)".into())
    );
}

#[tokio::test]
async fn changes_of_the_workers_are_one_line_each() {
    let event = |kind: &str, message: &str| RunEvent {
        kind: kind.into(),
        message: message.into(),
        ..RunEvent::default()
    };
    let mut waiting = run_view(RunStatus::Waiting, 7);
    waiting.waiting_for = "1 worker (none is connected)".into();
    let update = |status, events| RunUpdate { run: Some(run_view(status, 7)), events };
    let loss = vec![
        event("link_lost", "rank 1 closed the connection"),
        event("worker_lost", "worker-2 was lost: its connection closed"),
        event("regrouping", "worker-1 (64 slots) go on"),
        event("formed", "1 worker goes on from step 7 after 0.12 s"),
    ];
    let join = vec![
        event("changing", "the next group is prepared: worker-1, worker-3"),
        event("regrouped", "worker-3 joined: worker-1 (32 slots), worker-3 (32 slots) train"),
        event("formed", "2 workers go on from step 8 after 0.00 s"),
    ];
    let watches = vec![vec![
        update(RunStatus::Running, Vec::new()),
        update(RunStatus::Running, loss),
        RunUpdate {
            run: Some(waiting),
            events: vec![event("waiting", "worker-1 was lost; no worker is left")],
        },
        update(RunStatus::Running, join),
        update(RunStatus::Succeeded, Vec::new()),
    ]];
    let fake = Fake::start(Script { watches, ..script(RunStatus::Running) }).await;
    let ran = fake.takuma(&["run", "watch", "calm"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let changes: Vec<&str> = ran.stderr.lines().filter_map(|line| line.strip_prefix("00:00:00Z ")).collect();
    assert_eq!(
        changes,
        [
            "worker-2 was lost: its connection closed",
            "1 worker goes on from step 7 after 0.12 s",
            "worker-1 was lost; no worker is left",
            "worker-3 joined: worker-1 (32 slots), worker-3 (32 slots) train",
        ]
    );
    assert!(ran.stderr.contains("calm-otter-3  waiting for 1 worker (none is connected)"), "{}", ran.stderr);
}

fn forkable() -> Script {
    let mut run = run_view(RunStatus::Succeeded, 10);
    let mut config = RunConfig::new(Recipe::DcganTiny, "file:///d");
    (config.steps, config.seed) = (Some(10), 7);
    run.config_json = config.to_json();
    Script { run, checkpoints: vec![checkpoint(5), checkpoint(10)], ..Script::default() }
}

#[tokio::test]
async fn fork_keeps_the_settings_of_its_origin_but_for_those_that_are_set() {
    let fake = Fake::start(forkable()).await;
    let set = ["--set", "steps=20", "--set", "learning_rate=0.0001", "--name", "slower"];
    let arguments: Vec<&str> = ["run", "fork", "calm@5", "-d", "-y"].into_iter().chain(set).collect();
    let ran = fake.takuma(&arguments).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "calm-otter-3\n"), "{ran:?}");
    assert!(ran.stderr.contains("from        the checkpoint calm-otter-3@5"), "{}", ran.stderr);
    {
        let submitted = &fake.script.lock().unwrap().submitted;
        assert_eq!(submitted.iter().map(|request| request.dry_run).collect::<Vec<_>>(), [true, false]);
        let request = &submitted[1];
        let asked = (request.origin_run.as_str(), request.origin_step, request.name.as_str());
        assert_eq!(asked, ("calm-otter-3", 5, "slower"));
        let config = RunConfig::from_json(&request.config_json).unwrap();
        assert_eq!((config.steps, config.seed, config.learning_rate), (Some(20), 7, 1e-4));
    }
    let ran = fake.takuma(&["run", "fork", "calm", "--set", "steps=20", "-d", "-y"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(fake.script.lock().unwrap().submitted[3].origin_step, 10, "the newest checkpoint");
    let ran = fake.takuma(&["run", "fork", "calm@five", "-y"]).await;
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("'five' is no step; write RUN@STEP"), "{}", ran.stderr);
    let ran = fake.takuma(&["run", "fork", "calm", "--set", "sede=3", "-y"]).await;
    assert_eq!((ran.code, ran.stderr.contains("did you mean 'seed'?")), (2, true), "{}", ran.stderr);
    let fake = Fake::start(Script { checkpoints: Vec::new(), ..forkable() }).await;
    let ran = fake.takuma(&["run", "fork", "calm", "-y"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("has no checkpoint yet to start from"), "{}", ran.stderr);
}

#[tokio::test]
async fn coordinator_is_named_before_or_after_the_noun() {
    let fake = Fake::start(script(RunStatus::Running)).await;
    let address = fake.address.to_string();
    for arguments in [
        &["--coordinator", &address, "run", "ls"][..],
        &["run", "--coordinator", &address, "ls"],
        &["run", "ls", "--coordinator", &address],
        &["--coordinator", &address, "worker"],
        &["checkpoint", "ls", "calm", "--coordinator", &address],
        &["sample", "ls", "calm", "--coordinator", &address],
    ] {
        let ran = takuma(arguments, None).await;
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
    }
    let ran = takuma(&["run", "-o", "json", "ls", "--coordinator", &address], None).await;
    assert_eq!((ran.code, ran.stderr.contains("-o belongs behind the verb")), (2, true), "{ran:?}");
    let ran = takuma(&["--coordinator", &address, "dataset", "inspect", "./d"], None).await;
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("'takuma dataset' talks to no coordinator"), "{}", ran.stderr);
}
