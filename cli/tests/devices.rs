//! `takuma doctor`, and `takuma up` on machines with and without GPUs, with programs that only pretend.

#![allow(clippy::unwrap_used)] // The helpers are a test's too.

mod support;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use support::{Fake, Ran, Script, run_view, takuma_in};
use takuma_proto::v1::{RunStatus, WorkerView};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The programs that pretend.
const BIN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/bin");

const CPU: &str = r#"{"libtorch":"2.11.0","cuda":{"libraries":"missing","driver":null,"runtime":null,"error":null},
    "devices":[{"name":"cpu","description":"AMD EPYC","threads":2,"usable":true,"reason":null}]}"#;

/// A machine with two GPUs, of which the second one is usable or not.
fn two_gpus(second_is_usable: bool) -> String {
    let reason = if second_is_usable { "null" } else { r#""its memory is full; end what uses it""# };
    format!(
        r#"{{"libtorch":"2.11.0+cu130","cuda":{{"libraries":"found","driver":"580.65","runtime":"13.0","error":null}},
        "devices":[{{"name":"cpu","description":"AMD EPYC","threads":16,"usable":true,"reason":null}},
        {{"name":"cuda:0","description":"NVIDIA H100 80GB HBM3","capability":"9.0","memory_bytes":85000000000,"usable":true,"reason":null}},
        {{"name":"cuda:1","description":"NVIDIA H100 80GB HBM3","capability":"9.0","memory_bytes":85000000000,"usable":{second_is_usable},"reason":{reason}}}]}}"#
    )
}

async fn doctor(arguments: &[&str], at: Option<SocketAddr>, variables: &[(&str, &str)]) -> Ran {
    let own = [("TAKUMA_BIN_DIR", BIN), ("FAKE_VERSION", env!("CARGO_PKG_VERSION")), ("FAKE_DEVICES", CPU)];
    let all = [&own, variables].concat();
    takuma_in(&[&["doctor"], arguments].concat(), at, &all).await
}

/// The line of a check.
fn line<'a>(ran: &'a Ran, check: &str) -> &'a str {
    let mut lines = ran.stdout.lines();
    lines
        .find(|line| line.split_whitespace().nth(1) == Some(check))
        .unwrap_or_else(|| panic!("{check}: {ran:?}"))
}

fn worker(name: &str) -> WorkerView {
    WorkerView { name: name.into(), device: "cpu".into(), status: "idle".into(), ..WorkerView::default() }
}

#[tokio::test]
async fn doctor_finds_nothing_wrong_with_a_machine_without_gpus_and_its_cluster() {
    let fake = Fake::start(Script { workers: vec![worker("worker-1")], ..Script::default() }).await;
    let ran = doctor(&[], Some(fake.address), &[]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    for check in ["coordinator", "worker", "libtorch", "cuda", "cpu", "processors", "cluster", "workers"] {
        assert!(line(&ran, check).starts_with("ok "), "{check}: {ran:?}");
    }
    assert!(line(&ran, "cpu").contains("AMD EPYC, 2 threads"), "{ran:?}");
    assert!(line(&ran, "workers").contains("worker-1 on cpu"), "{ran:?}");
}

#[tokio::test]
async fn doctor_without_a_cluster_only_warns_unless_one_was_named() {
    let ran = doctor(&[], None, &[]).await;
    // The default address: on a machine where somebody listens there, the line is another one.
    if line(&ran, "cluster").contains("cannot be reached") {
        assert!(line(&ran, "cluster").starts_with("warning") && ran.code == 0, "{ran:?}");
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ran = doctor(&[], Some(free), &[]).await;
    assert!(line(&ran, "cluster").starts_with("error") && ran.code == 1, "{ran:?}");
    assert!(line(&ran, "cluster").contains("; start one with 'takuma up'"), "{ran:?}");
}

#[tokio::test]
async fn doctor_tells_each_gpu_and_fails_for_one_that_cannot_be_used() {
    let devices = two_gpus(false);
    let ran = doctor(&["--json"], None, &[("FAKE_DEVICES", &devices)]).await;
    assert_eq!(ran.code, 1, "{ran:?}");
    let checks: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
    let check = |name: &str| checks.iter().find(|check| check["check"] == name).unwrap();
    assert_eq!(check("cuda:0")["status"], "ok");
    let found = "NVIDIA H100 80GB HBM3, compute capability 9.0, 85.0 GB";
    assert_eq!(
        (check("cuda:0")["message"].as_str(), &check("cuda:0")["remedy"]),
        (Some(found), &Value::Null)
    );
    assert_eq!(
        (check("cuda:1")["status"].as_str(), check("cuda:1")["remedy"].as_str()),
        (Some("error"), Some("end what uses it"))
    );
    assert_eq!(check("libtorch")["status"], "ok", "what it was built for stands behind a plus");
}

#[tokio::test]
async fn doctor_names_what_is_wrong_with_the_worker() {
    let ran = doctor(&[], None, &[("FAKE_BROKEN", "libtorch_cpu.so: cannot open shared object file")]).await;
    assert!(line(&ran, "worker").starts_with("error") && ran.code == 1, "{ran:?}");
    assert!(
        line(&ran, "worker").contains("libtorch_cpu.so: cannot open shared object file; build"),
        "{ran:?}"
    );

    let ran = doctor(&[], None, &[("FAKE_VERSION", "0.0.1")]).await;
    assert!(line(&ran, "worker").contains("is version '0.0.1'") && ran.code == 1, "{ran:?}");

    let ran = doctor(&[], None, &[("FAKE_DEVICES", "")]).await;
    assert!(line(&ran, "devices").contains("cannot be asked") && ran.code == 1, "{ran:?}");

    let ran = doctor(&[], None, &[("FAKE_DEVICES", "{")]).await;
    assert!(line(&ran, "devices").contains("cannot be read") && ran.code == 1, "{ran:?}");

    let nowhere = tempfile::tempdir().unwrap();
    let ran = doctor(&[], None, &[("TAKUMA_BIN_DIR", nowhere.path().to_str().unwrap())]).await;
    assert!(line(&ran, "worker").contains("there is no takuma-worker in") && ran.code == 1, "{ran:?}");
}

#[tokio::test]
async fn doctor_looks_over_the_store_and_the_dataset_that_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let ran = doctor(&["--store", path], None, &[("TAKUMA_RUN_DATA", path)]).await;
    assert!(line(&ran, "store").contains("can be written and read"), "{ran:?}");
    assert!(line(&ran, "data").starts_with("error") && ran.code == 1, "{ran:?}");
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let ran = doctor(&["--store", file.to_str().unwrap()], None, &[]).await;
    assert!(line(&ran, "store").starts_with("error") && ran.code == 1, "{ran:?}");
}

#[tokio::test]
async fn up_never_takes_the_processor_in_place_of_a_gpu_that_cannot_be_used() {
    let devices =
        two_gpus(true).replace(r#""usable":true,"reason":null}]"#, r#""usable":false,"reason":"too old"}]"#);
    let devices = devices.replace(r#"85000000000,"usable":true"#, r#"85000000000,"usable":false"#);
    let variables = [("TAKUMA_BIN_DIR", BIN), ("FAKE_DEVICES", devices.as_str())];
    let ran = takuma_in(&["up", "--listen", "127.0.0.1:0"], None, &variables).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("cuda:1 cannot be used: too old"), "{}", ran.stderr);
    assert!(ran.stderr.contains("--device cpu trains on the processor"), "{}", ran.stderr);
}

/// What the workers of `takuma up ARGUMENTS` were started with, by name, after `up` was told to end.
async fn started_by_up(arguments: &[&str], devices: &str, workers: usize) -> Vec<String> {
    let names = ["worker-1", "worker-2"].map(worker);
    let script = Script {
        workers: names[..workers].to_vec(),
        run: run_view(RunStatus::Succeeded, 10),
        ..Script::default()
    };
    let fake = Fake::start(script).await;
    let home = tempfile::tempdir().unwrap();
    let started = home.path().join("started");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_takuma"));
    command.args(["up", "--listen", "127.0.0.1:0"]).args(arguments).env_clear().env("HOME", home.path());
    command.env("TAKUMA_BIN_DIR", BIN).env("FAKE_ADDRESS", fake.address.to_string());
    command.env("FAKE_STARTED", &started).env("FAKE_DEVICES", devices);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut up = command.spawn().unwrap();
    let mut lines = BufReader::new(up.stdout.take().unwrap()).lines();
    let all = async {
        while lines.next_line().await.unwrap().is_some_and(|line| !line.starts_with("logs")) {}
        let read = || std::fs::read_to_string(&started).unwrap_or_default();
        while read().lines().count() < workers {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut found: Vec<_> = read().lines().map(str::to_owned).collect();
        found.sort_by_key(|line| line.split("worker-").nth(1).map(str::to_owned));
        let pid = rustix::process::Pid::from_raw(up.id().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(up.wait().await.unwrap().success());
        found
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap()
}

#[tokio::test]
async fn up_starts_a_worker_on_each_gpu() {
    let started = started_by_up(&[], &two_gpus(true), 2).await;
    for (line, device) in started.iter().zip(["cuda:0", "cuda:1"]) {
        assert!(line.contains(&format!("--device {device} ")), "{started:?}");
    }
    let started = started_by_up(&["--device", "cuda:1"], &two_gpus(true), 1).await;
    assert!(started[0].contains("--device cuda:1 "), "{started:?}");
}

#[tokio::test]
async fn up_without_gpus_starts_one_worker_and_leaves_the_device_to_it() {
    let started = started_by_up(&[], CPU, 1).await;
    assert!(!started[0].contains("--device"), "{started:?}");
    let started = started_by_up(&["--workers", "2", "--device", "cpu"], &two_gpus(true), 2).await;
    assert!(started.iter().all(|line| line.contains("--device cpu ")), "{started:?}");
}
