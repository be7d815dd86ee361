//! The long form of the recovery tests: `make soak`. A run in whose group somebody dies every so often, beside the
//! same run left alone; prints what was kept of the speed and how long each loss stalled the others.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]
#![allow(clippy::print_stdout, reason = "the table is what it is run for")]

use std::collections::VecDeque;
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

/// What is done to a cluster every so often.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    Kill,
    Stop,
    KillCoordinator,
}

/// A cluster whose oldest worker goes when another one is due.
struct Soak {
    cluster: Cluster,
    oldest_first: VecDeque<String>,
    newest: u32,
    seconds: u64,
    every: u64,
}

/// What a storm came to.
struct Outcome {
    strikes: usize,
    steps_per_s: f64,
    stalls: Vec<f64>,
}

impl Soak {
    fn strike(&mut self, trouble: Trouble) {
        if trouble == Trouble::KillCoordinator {
            return self.cluster.restart_coordinator(Duration::ZERO);
        }
        let oldest = self.oldest_first.pop_front().unwrap();
        if trouble == Trouble::Stop {
            self.cluster.worker(&oldest).signal("STOP");
        } else {
            self.cluster.worker(&oldest).kill();
        }
        self.newest += 1;
        let name = format!("worker-{}", self.newest);
        self.cluster.add_doomed_worker(&name, "kill@+100000000.d");
        self.oldest_first.push_back(name);
    }

    /// A run that is left alone, or struck every so often; then it is stopped.
    fn run(&mut self, name: &str, trouble: Option<Trouble>) -> Outcome {
        submit(&self.cluster, name);
        self.cluster.wait_for_step(name, 50);
        let first = view(&self.cluster, name)["step"].as_u64().unwrap();
        let begin = Instant::now();
        let mut strikes = 0;
        while begin.elapsed() < Duration::from_secs(self.seconds) {
            std::thread::park_timeout(Duration::from_millis(200));
            let due = Duration::from_secs(self.every * (strikes as u64 + 1));
            if let Some(trouble) = trouble.filter(|_| begin.elapsed() >= due) {
                self.strike(trouble);
                strikes += 1;
            }
        }
        let steps = view(&self.cluster, name)["step"].as_u64().unwrap() - first;
        let steps_per_s = steps as f64 / begin.elapsed().as_secs_f64();
        wait_for("the last newcomer", || (view(&self.cluster, name)["workers"] == WORKERS).then_some(()));
        let _printed = self.cluster.ok(&["run", "stop", name]);
        let _waited = self.cluster.takuma(&["run", "wait", name]);
        let _printed = self.cluster.ok(&["run", "audit", name]);
        Outcome { strikes, steps_per_s, stalls: stalls(&self.cluster.events(name)) }
    }
}

#[test]
#[ignore = "takes minutes; run by make soak"]
fn endurance() {
    let (seconds, every) = (setting("SOAK_S", 150), setting("SOAK_EVERY_S", 15));
    let cluster = Cluster::start(WORKERS);
    let oldest_first = (1..=WORKERS).map(|number| format!("worker-{number}")).collect();
    let mut soak = Soak { cluster, oldest_first, newest: WORKERS, seconds, every };
    let calm = soak.run("calm", None);
    let coordinator = soak.cluster.coordinator().pid();
    let before = (resident_mb(coordinator), descriptors(coordinator));
    println!("{WORKERS} workers, {seconds} s each, something every {every} s");
    println!("undisturbed: {:.2} steps/s", calm.steps_per_s);
    println!(
        "what                        times  steps/s  kept  until the next group stood: p50    p99    max"
    );
    let troubles = [
        ("SIGKILL of a worker", Trouble::Kill, 1.0),
        ("SIGSTOP of a worker", Trouble::Stop, 2.5),
        ("SIGKILL of the coordinator", Trouble::KillCoordinator, 0.0),
    ];
    println!("(from when the loss was noticed: a stopped worker is missed after 1.5 s of silence)");
    for (number, (what, trouble, longest_s)) in troubles.into_iter().enumerate() {
        let outcome = soak.run(&format!("storm-{number}"), Some(trouble));
        let stall = |share: f64| {
            let at = (outcome.stalls.len().max(1) - 1) as f64 * share;
            outcome.stalls.get(at.round() as usize).copied().unwrap_or(0.0)
        };
        println!(
            "{what:<27} {:>5} {:>8.2} {:>4.0}% {:>32.2} s {:>4.2} s {:>4.2} s",
            outcome.strikes,
            outcome.steps_per_s,
            100.0 * outcome.steps_per_s / calm.steps_per_s,
            stall(0.5),
            stall(0.99),
            stall(1.0),
        );
        if trouble == Trouble::Kill {
            let after = (resident_mb(coordinator), descriptors(coordinator));
            println!(
                "  coordinator: {:.0} MB and {} descriptors before, {:.0} MB and {} after",
                before.0, before.1, after.0, after.1
            );
        }
        let expected = if trouble == Trouble::KillCoordinator { 0 } else { outcome.strikes };
        assert!(outcome.stalls.len() >= expected, "every loss led to a new group");
        assert!(stall(1.0) <= longest_s + 1.5, "a group stood still for {} s", stall(1.0));
    }
}
