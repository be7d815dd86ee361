//! The long form of the recovery tests: `make soak`. A run in whose group somebody dies every so often, beside the
//! same run left alone; prints what was kept of the speed and how long each loss stalled the others.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]
#![allow(clippy::print_stdout, reason = "the table is what it is run for")]

use std::time::{Duration, Instant};

use serde_json::Value;
use takuma_tests::{Cluster, wait_for};

const WORKERS: u32 = 3;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn submit(cluster: &Cluster, name: &str) {
    let data = cluster.dataset(640);
    let arguments = ["run", "submit", "dcgan-tiny", "--data", &data, "--steps", "1000000", "--name", name];
    let _printed = cluster.ok(&[&arguments[..], &["--checkpoint-every", "200", "-y", "-d"]].concat());
}

fn view(cluster: &Cluster, name: &str) -> Value {
    cluster.json(&["run", "show", name, "-o", "json"])
}

/// Steps a second of a run between now and `seconds` from now, with `trouble` called meanwhile.
fn pace(
    cluster: &mut Cluster,
    name: &str,
    seconds: u64,
    mut trouble: impl FnMut(&mut Cluster, Duration),
) -> f64 {
    let first = view(cluster, name)["step"].as_u64().unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(seconds) {
        trouble(cluster, begin.elapsed());
        std::thread::park_timeout(Duration::from_millis(200));
    }
    (view(cluster, name)["step"].as_u64().unwrap() - first) as f64 / begin.elapsed().as_secs_f64()
}

/// Seconds that each group stood still which came after a loss, by the events: "... after 0.12 s".
fn stalls(events: &[Value]) -> Vec<f64> {
    let mut lost = false;
    let mut stalls = Vec::new();
    for event in events {
        lost |= event["kind"] == "regrouping";
        if event["kind"] == "formed" && std::mem::take(&mut lost) {
            let message = event["message"].as_str().unwrap();
            let seconds = message.split(" after ").nth(1).and_then(|rest| rest.split(' ').next());
            stalls.push(seconds.unwrap().parse().unwrap());
        }
    }
    stalls.sort_by(f64::total_cmp);
    stalls
}

fn resident_mb(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).map_or(0.0, |kb| kb.parse::<f64>().unwrap() / 1024.0)
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

#[test]
#[ignore = "takes minutes; run by make soak"]
fn endurance() {
    let (seconds, every) = (setting("SOAK_S", 180), setting("SOAK_EVERY_S", 15));
    let mut cluster = Cluster::start(WORKERS);
    submit(&cluster, "calm");
    cluster.wait_for_step("calm", 50);
    let calm = pace(&mut cluster, "calm", seconds, |_, _| {});
    let _printed = cluster.ok(&["run", "stop", "calm"]);

    submit(&cluster, "stormy");
    cluster.wait_for_step("stormy", 50);
    let coordinator = cluster.coordinator().pid();
    let before = (resident_mb(coordinator), descriptors(coordinator));
    let (mut kills, mut next, mut newest) = (0u64, every, WORKERS);
    let stormy = pace(&mut cluster, "stormy", seconds, |cluster, elapsed| {
        if elapsed.as_secs() < next {
            return;
        }
        next += every;
        kills += 1;
        // The oldest dies, and another comes in its place.
        cluster.worker(&format!("worker-{}", newest - WORKERS + 1)).kill();
        newest += 1;
        cluster.add_doomed_worker(&format!("worker-{newest}"), "kill@+100000000.d");
    });
    let after = (resident_mb(coordinator), descriptors(coordinator));
    wait_for("the last newcomer", || (view(&cluster, "stormy")["workers"] == WORKERS).then_some(()));
    let _printed = cluster.ok(&["run", "stop", "stormy"]);
    let stalls = stalls(&cluster.events("stormy"));
    let at = |share: f64| stalls[((stalls.len() - 1) as f64 * share).round() as usize];
    println!("workers {WORKERS}, {seconds} s, a SIGKILL every {every} s: {kills} kills");
    println!("steps/s undisturbed {calm:.2}, with kills {stormy:.2}: {:.0}% kept", 100.0 * stormy / calm);
    println!("stall of the survivors p50 {:.3} s, p99 {:.3} s, max {:.3} s", at(0.5), at(0.99), at(1.0));
    println!(
        "coordinator: {:.0} MB and {} descriptors before, {:.0} MB and {} after",
        before.0, before.1, after.0, after.1
    );
    assert!(stalls.len() as u64 >= kills, "every loss led to a new group");
    assert!(at(1.0) < 5.0, "a group stood still for {} s", at(1.0));
}
