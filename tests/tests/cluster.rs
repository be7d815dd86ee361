//! What a person does on a good day, and what they find afterwards; with real processes.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::path::Path;

use serde_json::Value;
use takuma_tests::{Cluster, Process};

fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn is_png(file: &Path) -> bool {
    std::fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG"))
}

#[test]
fn two_workers_leave_metrics_grids_checkpoints_and_plot() {
    let cluster = Cluster::start(2);
    let data = cluster.dataset(256);
    let submit = [
        "run",
        "submit",
        "dcgan-tiny",
        "--data",
        &data,
        "--steps",
        "12",
        "--sample-every",
        "5",
        "--checkpoint-every",
        "5",
        "--name",
        "first",
        "--wait",
        "-y",
    ];
    let _printed = cluster.ok(&submit);
    let run = cluster.path("store/runs/first");
    let steps: Vec<u64> = metrics(&run).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    // The last step has a grid too, though it is no multiple of 5.
    for name in ["reals", "step-000000", "step-000005", "step-000010", "step-000012"] {
        assert!(is_png(&run.join(format!("samples/{name}.png"))), "{name}");
    }
    assert!(is_png(&run.join("cost_vs_iteration.png")));
    for step in [5, 10, 12] {
        let folder = run.join(format!("checkpoints/step-{step:06}"));
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        for part in manifest["parts"].as_array().unwrap() {
            let size = std::fs::metadata(folder.join(part["file"].as_str().unwrap())).unwrap().len();
            assert_eq!(part["size_bytes"], size);
        }
    }
    let view = cluster.json(&["run", "show", "first", "-o", "json"]);
    assert_eq!(view["status"], "succeeded");
    assert_eq!(view["step"], 12);
    assert_eq!(view["workers"], 2);
    assert_eq!(view["weights_sha256"].as_str().unwrap().len(), 64);
    let downloads = cluster.path("downloads");
    let _printed = cluster.ok(&["sample", "download", "first", downloads.to_str().unwrap()]);
    assert!(is_png(&downloads.join("step-000010.png")) || is_png(&downloads.join("samples/step-000010.png")));
}

#[test]
fn stopped_and_resumed_run_ends_with_the_same_weights() {
    let cluster = Cluster::start(1);
    let data = cluster.dataset(256);
    let submit = |name: &str, rest: &[&str]| {
        let mut arguments =
            vec!["run", "submit", "dcgan-tiny", "--data", &data, "--steps", "40", "--name", name, "-y"];
        arguments.extend(rest);
        cluster.ok(&arguments)
    };
    let _printed = submit("whole", &["--wait"]);
    let _printed = submit("halved", &["-d"]);
    cluster.wait_for_step("halved", 3);
    let _printed = cluster.ok(&["run", "stop", "halved"]);
    let stopped = cluster.json(&["run", "show", "halved", "-o", "json"]);
    assert_eq!(stopped["status"], "stopped");
    assert!(stopped["step"].as_u64().unwrap() < 40, "it was stopped half-way: {stopped}");
    let _printed = cluster.ok(&["run", "resume", "halved", "-d"]);
    let _printed = cluster.ok(&["run", "wait", "halved"]);
    let digest = |name| cluster.json(&["run", "show", name, "-o", "json"])["weights_sha256"].clone();
    assert_eq!(digest("whole"), digest("halved"));
    let losses = |name: &str| -> Vec<(Value, Value)> {
        let lines = metrics(&cluster.path(&format!("store/runs/{name}")));
        lines.iter().map(|line| (line["d_loss"].clone(), line["g_loss"].clone())).collect()
    };
    assert_eq!(losses("whole"), losses("halved"));
}

#[test]
fn a_second_run_waits_for_the_first() {
    let cluster = Cluster::start(1);
    let data = cluster.dataset(256);
    for name in ["one", "two"] {
        let _printed = cluster.ok(&[
            "run",
            "submit",
            "dcgan-tiny",
            "--data",
            &data,
            "--steps",
            "6",
            "--name",
            name,
            "-y",
            "-d",
        ]);
    }
    for name in ["one", "two"] {
        let _printed = cluster.ok(&["run", "wait", name]);
    }
}

#[test]
fn wrong_input_is_told_in_one_sentence() {
    let cluster = Cluster::start(0);
    let told = |arguments: &[&str], words: &str| {
        let output = cluster.takuma(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(message.contains(words), "{arguments:?} said: {message}");
        assert!(!message.contains("panicked") && !message.contains("backtrace"), "{message}");
    };
    let nothing = format!("{}/datasets/nothing", cluster.store());
    told(&["run", "submit", "dcgan-huge", "--data", &nothing, "-y"], "dcgan-celeba");
    told(&["run", "submit", "dcgan-tiny", "--data", &nothing, "-y"], "takuma dataset prepare");
    told(&["run", "show", "nobody"], "nobody");
    let address = cluster.address().trim_start_matches("http://").to_owned();
    let arguments = ["--listen", address.as_str(), "--store", cluster.store()];
    let second = std::process::Command::new(takuma_tests::binary("takuma-coordinator"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains(&address), "{second:?}");
}

#[test]
fn an_s3_server_serves_as_well_as_a_folder() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("s3.address");
    let root = folder.path().join("s3");
    std::fs::create_dir(&root).unwrap();
    let arguments = [
        "--listen",
        "127.0.0.1:0",
        "--address-file",
        file.to_str().unwrap(),
        "--root",
        root.to_str().unwrap(),
        "--bucket",
        "takuma",
    ];
    let credentials = vec![
        ("AWS_ACCESS_KEY_ID", "takuma".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "takuma-secret".to_owned()),
    ];
    let mut server = Process::start("takuma-s3", &arguments, &credentials, folder.path().join("s3.log"));
    let endpoint = format!("http://{}", server.address(&file));
    let mut environment = credentials;
    environment.push(("AWS_ENDPOINT", endpoint));
    environment.push(("AWS_REGION", "us-east-1".to_owned()));
    let cluster = Cluster::over(folder, "s3://takuma/runs-here".to_owned(), environment, 2);
    let data = cluster.dataset(128);
    let _printed = cluster.ok(&[
        "run",
        "submit",
        "dcgan-tiny",
        "--data",
        &data,
        "--steps",
        "4",
        "--sample-every",
        "2",
        "--checkpoint-every",
        "2",
        "--name",
        "far",
        "--wait",
        "-y",
    ]);
    let checkpoints = cluster.json(&["checkpoint", "ls", "far", "-o", "json"]);
    let steps: Vec<u64> =
        checkpoints.as_array().unwrap().iter().map(|entry| entry["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [2, 4]);
    let samples = cluster.json(&["sample", "ls", "far", "-o", "json"]);
    assert!(samples.to_string().contains("step-000004.png"), "{samples}");
}
