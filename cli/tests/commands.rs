//! The program `takuma` against a coordinator that only pretends.

#![allow(clippy::unwrap_used)] // The helpers are a test's too.

mod support;

use std::time::Duration;

use support::{Fake, Script, checkpoint, run_view, takuma, takuma_in, updates};
use takuma_cli::attach::Watch;
use takuma_cli::client::Client;
use takuma_cli::context::Address;
use takuma_cli::error::CliError;
use takuma_cli::progress::Screen;
use takuma_proto::v1::{RunStatus, RunUpdate, SampleView, WorkerView};

use RunStatus::{Failed, Preparing, Queued, Running, Stopped, Stopping, Succeeded};

const SUBMIT: [&str; 5] = ["run", "submit", "dcgan-tiny", "--data", "file:///d"];

fn submit<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SUBMIT.iter().chain(more).copied().collect()
}

fn script(status: RunStatus, step: u64) -> Script {
    Script { run: run_view(status, step), ..Script::default() }
}

fn watched(states: &[(RunStatus, u64)]) -> Script {
    Script { watches: vec![updates(states)], ..script(Queued, 0) }
}

#[tokio::test]
async fn submit_and_wait_exits_0_when_the_run_succeeds() {
    let fake = Fake::start(watched(&[(Queued, 0), (Preparing, 0), (Running, 5), (Succeeded, 10)])).await;
    let ran = fake.takuma(&submit(&["--steps", "10", "--wait", "-y"])).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    for part in [
        "32 + 32 a worker",
        "step 5/10 50%",
        "succeeded: 10 steps in 5s",
        "takuma sample download calm-otter-3",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let submitted = &fake.script.lock().unwrap().submitted;
    let dry: Vec<_> = submitted.iter().map(|request| request.dry_run).collect();
    assert_eq!(dry, [true, false], "the plan is asked for before the run is made");
    assert!(submitted[1].config_json.contains(r#""steps":10"#), "{}", submitted[1].config_json);
}

#[tokio::test]
async fn failed_and_stopped_runs_exit_1_and_say_why() {
    let mut failed = run_view(Failed, 7);
    failed.error = "worker-2 was lost; resume with 'takuma run resume calm-otter-3'".into();
    let watches = vec![vec![RunUpdate { run: Some(failed), events: Vec::new() }]];
    let fake = Fake::start(Script { watches, ..script(Queued, 0) }).await;
    let ran = fake.takuma(&submit(&["--wait", "-y"])).await;
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("error: run calm-otter-3 failed at step 7 of 10: worker-2 was lost"),
        "{}",
        ran.stderr
    );

    let fake = Fake::start(watched(&[(Stopped, 3)])).await;
    let ran = fake.takuma(&["run", "wait", "calm"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("was stopped at step 3 of 10"), "{}", ran.stderr);
}

#[tokio::test]
async fn detached_submit_prints_only_the_name() {
    let fake = Fake::start(script(Queued, 0)).await;
    let ran = fake.takuma(&submit(&["-d", "-y"])).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "calm-otter-3\n"));
    assert!(ran.stderr.contains("takuma run watch calm-otter-3"), "{}", ran.stderr);
}

#[tokio::test]
async fn submit_without_terminal_and_without_yes_starts_nothing() {
    let fake = Fake::start(script(Queued, 0)).await;
    let ran = fake.takuma(&SUBMIT).await;
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("add -y"), "{}", ran.stderr);
    assert!(fake.script.lock().unwrap().submitted.is_empty());
}

#[tokio::test]
async fn dry_run_prints_settings_and_plan_and_changes_nothing() {
    let fake = Fake::start(script(Queued, 0)).await;
    let variables = [("TAKUMA_RUN_SEED", "9")];
    let ran = takuma_in(&submit(&["--dry-run"]), Some(fake.address), &variables).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.contains("seed = 9\n") && ran.stdout.contains("# workers     2"), "{}", ran.stdout);
    let table: toml::Table = ran.stdout.parse().expect("the output can be kept as --config FILE");
    assert_eq!(table["recipe"].as_str(), Some("dcgan-tiny"));
    assert!(fake.script.lock().unwrap().submitted.iter().all(|request| request.dry_run));

    let ran = fake.takuma(&submit(&["--dry-run", "-o", "json"])).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&json["config"]["data"], &json["plan"]["workers"]), (&"file:///d".into(), &2.into()));
}

#[tokio::test]
async fn precision_reaches_the_coordinator_from_flag_and_environment() {
    let fake = Fake::start(script(Queued, 0)).await;
    assert_eq!(fake.takuma(&submit(&["-d", "-y", "--precision", "bf16"])).await.code, 0);
    let variables = [("TAKUMA_RUN_PRECISION", "tf32")];
    assert_eq!(takuma_in(&submit(&["-d", "-y"]), Some(fake.address), &variables).await.code, 0);
    let sent: Vec<_> = {
        let script = fake.script.lock().unwrap();
        script.submitted.iter().map(|request| request.config_json.clone()).collect()
    };
    for (config, precision) in sent.iter().zip(["bf16", "bf16", "tf32", "tf32"]) {
        assert!(config.contains(&format!(r#""precision":"{precision}""#)), "{config}");
    }
    assert_eq!(sent.len(), 4, "each run is planned, then made");
    assert_eq!(fake.takuma(&submit(&["-y", "--precision", "fp16"])).await.code, 2);
}

#[tokio::test]
async fn coordinator_refusal_is_printed_as_it_is() {
    let fake = Fake::start(script(Queued, 0)).await;
    let ran = fake.takuma(&["run", "submit", "dcgan-tiny", "--data", "file:///missing", "-y"]).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (2, "error: there is no dataset at file:///missing; prepare one\n")
    );
    let ran = fake.takuma(&["run", "show", "nobody"]).await;
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (1, "error: there is no run 'nobody'; 'takuma run ls' lists them\n")
    );
}

#[tokio::test]
async fn wrong_recipe_and_wrong_flags_are_wrong_usage() {
    let ran = takuma(&["run", "submit", "dcgan-celebs", "--data", "file:///d", "-y"], None).await;
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("did you mean 'dcgan-celeba'?"), "{}", ran.stderr);
    assert_eq!(takuma(&["run", "submit", "--steps", "x"], None).await.code, 2);
    assert_eq!(takuma(&["frobnicate"], None).await.code, 2);
    assert_eq!(takuma(&[], None).await.code, 2);
}

#[tokio::test]
async fn unreachable_coordinator_exits_3_with_the_remedy() {
    // Bound and dropped: a port where nobody listens.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for arguments in [&["run", "ls"][..], &["worker", "ls"], &submit(&["-y"])] {
        let ran = takuma(arguments, Some(free)).await;
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(
            ran.stderr
                .starts_with(&format!("error: the coordinator at http://{free} (from TAKUMA_COORDINATOR)"))
        );
        assert!(ran.stderr.contains("connection refused; start one with 'takuma up'"), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    }
}

#[tokio::test]
async fn coordinator_of_another_protocol_is_refused_in_words() {
    let fake = Fake::start(Script { protocol_version: Some(99), ..script(Queued, 0) }).await;
    let ran = fake.takuma(&["run", "ls"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("speaks protocol 99"), "{}", ran.stderr);
}

#[tokio::test]
async fn show_as_json_has_exactly_the_documented_keys() {
    let fake = Fake::start(script(Running, 5)).await;
    let ran = fake.takuma(&["run", "show", "calm", "-o", "json"]).await;
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&ran.stdout).unwrap();
    let mut expected = [
        "name",
        "id",
        "recipe",
        "status",
        "step",
        "steps",
        "epoch",
        "workers",
        "generation",
        "seed",
        "exact",
        "global_batch",
        "images_per_s",
        "eta_s",
        "elapsed_s",
        "d_loss",
        "g_loss",
        "d_acc",
        "weights_sha256",
        "data",
        "store",
        "error",
        "waiting_for",
        "origin",
    ];
    expected.sort_unstable();
    let mut keys: Vec<_> = json.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!((&json["status"], &json["exact"]), (&"running".into(), &false.into()));
    for unknown in ["eta_s", "d_loss", "weights_sha256", "error", "waiting_for", "origin"] {
        assert!(json[unknown].is_null(), "{unknown}");
    }
    let ran = fake.takuma(&["run", "ls", "-o", "json"]).await;
    let list: Vec<serde_json::Map<String, serde_json::Value>> = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(list, [json]);
}

#[tokio::test]
async fn noun_alone_lists() {
    let fake = Fake::start(script(Running, 5)).await;
    let alone = fake.takuma(&["run"]).await;
    assert_eq!(
        alone.stdout.lines().next(),
        Some("NAME          STATUS   PROGRESS  ETA  WORKERS  IT/S  AGE"),
        "{alone:?}"
    );
    let ran = fake.takuma(&["worker"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""));
    assert!(ran.stderr.contains("no workers; connect one"), "{}", ran.stderr);
    assert_eq!(takuma(&["dataset"], None).await.code, 2);
}

#[tokio::test]
async fn worker_list_as_json_has_nulls_where_there_is_no_run() {
    let worker =
        WorkerView { name: "worker-1".into(), status: "idle".into(), rank: -1, ..WorkerView::default() };
    let fake = Fake::start(Script { workers: vec![worker], ..script(Queued, 0) }).await;
    let ran = fake.takuma(&["worker", "ls", "-o", "json"]).await;
    let list: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(list.as_array().map(Vec::len), Some(1));
    assert!(
        list[0]["run"].is_null() && list[0]["rank"].is_null() && list[0]["slot_count"].is_null(),
        "{list}"
    );
}

#[tokio::test]
async fn stop_returns_when_the_run_is_stopped() {
    let fake =
        Fake::start(Script { watches: vec![updates(&[(Stopping, 3), (Stopped, 4)])], ..script(Running, 3) })
            .await;
    let ran = fake.takuma(&["run", "stop", "calm"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.stderr.contains("is stopped at 4/10") && ran.stderr.contains("takuma run resume calm-otter-3")
    );
    assert_eq!(fake.takuma(&["run", "stop", "calm", "--no-wait"]).await.code, 0);
    assert_eq!(fake.script.lock().unwrap().stops, 2);
}

#[tokio::test]
async fn broken_watch_is_taken_up_again() {
    let watches = vec![updates(&[(Running, 3)]), updates(&[(Running, 4), (Succeeded, 10)])];
    let fake = Fake::start(Script { watches, ..script(Running, 3) }).await;
    let ran = fake.takuma(&["run", "watch", "calm"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        ran.stderr.contains("trying again") && ran.stderr.contains("the coordinator is back"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn watch_gives_up_as_unreachable_when_the_coordinator_stays_away() {
    let fake = Fake::start(watched(&[(Running, 3)])).await;
    let address = Address::parse(&fake.address.to_string(), "test").unwrap();
    let (client, _) = Client::connect(address).await.unwrap();
    let mut watch = Watch::new(&client, "calm-otter-3", Duration::from_millis(100));
    let screen = Screen::stderr();
    assert_eq!(watch.next(&screen).await.unwrap().run.unwrap().step, 3);
    let error = watch.next(&screen).await.unwrap_err();
    assert!(
        matches!(&error, CliError::Unreachable { message, .. } if message.contains("takuma run watch")),
        "{error}"
    );
}

#[tokio::test]
async fn wait_with_timeout_tells_the_present_state() {
    let fake = Fake::start(watched(&[(Running, 3)])).await;
    let ran = fake.takuma(&["run", "wait", "calm", "--timeout", "300ms"]).await;
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("has not ended within 300ms: it is running at step 3/10 30%"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn logs_are_data_and_pass_their_filters_on() {
    let fake = Fake::start(script(Running, 3)).await;
    let ran = fake.takuma(&["run", "logs", "calm", "--tail", "5", "--rank", "1", "--level", "warn"]).await;
    assert!(ran.stdout.ends_with("worker-1  tail 5 level warn rank Some(1)\n"), "{}", ran.stdout);
    let ran = fake.takuma(&["run", "logs", "calm", "-o", "json"]).await;
    let line: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(line["rank"].is_null() && line["worker"] == "worker-1", "{line}");
}

#[tokio::test]
async fn checkpoints_are_listed() {
    let fake = Fake::start(Script { checkpoints: vec![checkpoint(5)], ..script(Running, 5) }).await;
    let ran = fake.takuma(&["checkpoint", "ls", "calm", "-o", "json"]).await;
    let list: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&list[0]["step"], &list[0]["size_bytes"]), (&5.into(), &7.into()));
}

fn pictures(names: &[&str]) -> Script {
    let content = |name: &str| format!("picture {name}").into_bytes();
    let mut script = Script { has_plot: true, ..script(Succeeded, 10) };
    for name in names {
        let size_bytes = content(name).len() as u64;
        script.samples.push(SampleView { name: (*name).into(), size_bytes, ..SampleView::default() });
        script.objects.insert(format!("samples/{name}"), content(name));
    }
    script.objects.insert("cost_vs_iteration.png".into(), b"plot".to_vec());
    script
}

#[tokio::test]
async fn download_fetches_everything_once() {
    let fake = Fake::start(pictures(&["reals.png", "step-000000.png", "step-000050.png"])).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pics");
    let arguments = ["sample", "download", "calm", dir.to_str().unwrap()];
    let ran = fake.takuma(&arguments).await;
    assert_eq!((ran.code, ran.stdout.trim_end()), (0, dir.to_str().unwrap()), "{ran:?}");
    assert_eq!(std::fs::read(dir.join("step-000050.png")).unwrap(), b"picture step-000050.png");
    assert_eq!(std::fs::read(dir.join("cost_vs_iteration.png")).unwrap(), b"plot");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 4, "no partial files are left");

    fake.script.lock().unwrap().read.clear();
    std::fs::write(dir.join("reals.png"), "torn").unwrap();
    let ran = fake.takuma(&arguments).await;
    assert!(ran.stderr.contains("2 files written, 2 there already"), "{}", ran.stderr);
    let mut read = fake.script.lock().unwrap().read.clone();
    read.sort();
    assert_eq!(read, ["cost_vs_iteration.png", "samples/reals.png"]);
}

#[tokio::test]
async fn download_of_one_grid_prints_its_path() {
    let fake = Fake::start(pictures(&["reals.png", "step-000000.png", "step-000050.png"])).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let ran = fake.takuma(&["sample", "download", "calm", dir, "--latest"]).await;
    assert_eq!(ran.stdout.trim_end(), format!("{dir}/step-000050.png"));
    let ran = fake.takuma(&["sample", "download", "calm", dir, "--step", "7"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no grid of step 7"), "{}", ran.stderr);
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1);
}

#[tokio::test]
async fn server_cannot_make_download_write_outside_its_folder() {
    for name in ["../step-000001.png", "/tmp/takuma-escape.png", "a/../../x.png", ".hidden"] {
        let fake = Fake::start(pictures(&[name])).await;
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("pics");
        let ran = fake.takuma(&["sample", "download", "calm", dir.to_str().unwrap()]).await;
        assert_eq!(ran.code, 1, "{name}");
        assert!(ran.stderr.contains("not a plain file name"), "{}", ran.stderr);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{name}: nothing is written");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn link_in_the_folder_is_replaced_and_not_followed() {
    let fake = Fake::start(pictures(&["step-000050.png"])).await;
    let folder = tempfile::tempdir().unwrap();
    let (dir, outside) = (folder.path().join("pics"), folder.path().join("outside"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(&outside, "mine").unwrap();
    std::os::unix::fs::symlink(&outside, dir.join("step-000050.png")).unwrap();
    assert_eq!(fake.takuma(&["sample", "download", "calm", dir.to_str().unwrap()]).await.code, 0);
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "mine");
}

#[tokio::test]
async fn picture_of_another_size_than_told_is_refused() {
    let mut pictures = pictures(&["step-000050.png"]);
    pictures.samples[0].size_bytes = 4;
    let fake = Fake::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let ran = fake.takuma(&["sample", "download", "calm", folder.path().to_str().unwrap()]).await;
    assert_eq!(ran.code, 1);
    assert!(!folder.path().join("step-000050.png").exists());
}

#[tokio::test]
async fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = takuma(&["completions", shell], None).await;
        assert_eq!(ran.code, 0);
        assert!(ran.stdout.contains("checkpoint") && ran.stdout.contains("global-batch"), "{shell}");
    }
}

#[tokio::test]
async fn dataset_goes_from_faces_to_verified_shards() {
    let folder = tempfile::tempdir().unwrap();
    let dst = folder.path().join("faces");
    let url = format!("file://{}", dst.display());
    let dst = dst.to_str().unwrap();
    let ran = takuma(&["dataset", "synth", dst, "--count", "64", "-o", "json"], None).await;
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&report["images"], &report["shards"], &report["url"]), (&64.into(), &64.into(), &url.into()));
    assert_eq!(takuma(&["dataset", "verify", dst], None).await.code, 0);
    let ran = takuma(&["dataset", "inspect", dst, "-o", "json"], None).await;
    let inspected: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&inspected["digest"], &inspected["steps_per_epoch"]), (&report["digest"], &1.into()));
    let ran = takuma(&["dataset", "inspect", "nowhere"], None).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("there is no dataset at"), "{}", ran.stderr);
}

#[tokio::test]
async fn archive_of_faces_can_be_prepared() {
    let folder = tempfile::tempdir().unwrap();
    let (zip, dst) = (folder.path().join("faces.zip"), folder.path().join("faces"));
    let ran = takuma(&["dataset", "synth", zip.to_str().unwrap(), "--count", "8"], None).await;
    assert!(ran.code == 0 && zip.is_file(), "{ran:?}");
    let arguments = ["dataset", "prepare", zip.to_str().unwrap(), dst.to_str().unwrap(), "--shards", "4"];
    let ran = takuma(&arguments, None).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.starts_with("images       8\nshards       4\nquarantined  0\n"), "{}", ran.stdout);
}

#[tokio::test]
async fn up_without_its_programs_names_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let variables = [("TAKUMA_BIN_DIR", folder.path().to_str().unwrap())];
    let ran = takuma_in(&["up", "--listen", "127.0.0.1:0"], None, &variables).await;
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("there is no takuma-coordinator in") && ran.stderr.contains("make build"),
        "{}",
        ran.stderr
    );
}
