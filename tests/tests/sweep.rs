//! Exact mode under fire: one digest whatever workers there are, and whatever happens to them at any phase of a
//! step. Real processes.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use serde_json::Value;
use takuma_tests::{Cluster, wait_for};

/// Faults of a sweep: twenty steps' three phases each.
const FAULTS: usize = 60;

/// Submits dcgan-tiny in exact mode.
fn submit(cluster: &Cluster, name: &str, steps: u64, workers: Option<u32>) {
    let data = cluster.dataset(256);
    let steps = steps.to_string();
    let exact = cluster.path("exact.toml");
    std::fs::write(&exact, "exact = true\n").unwrap();
    let exact = exact.to_str().unwrap().to_owned();
    let workers = workers.map(|workers| workers.to_string());
    let mut arguments =
        vec!["run", "submit", "dcgan-tiny", "--config", &exact, "--data", &data, "--steps", &steps];
    arguments.extend(["--sample-every", "50", "--name", name, "-y", "-d"]);
    if let Some(workers) = &workers {
        arguments.extend(["--workers", workers.as_str()]);
    }
    let _printed = cluster.ok(&arguments);
}

fn view(cluster: &Cluster, name: &str) -> Value {
    cluster.json(&["run", "show", name, "-o", "json"])
}

/// Waits for the run's end; the digest of its weights.
fn digest(cluster: &Cluster, name: &str) -> String {
    let _printed = cluster.ok(&["run", "wait", name]);
    view(cluster, name)["weights_sha256"].as_str().unwrap().to_owned()
}

#[test]
fn one_digest_for_1_2_3_4_and_8_workers() {
    let mut cluster = Cluster::start(1);
    let mut digests = Vec::new();
    for world in [1, 2, 3, 4, 8] {
        for number in cluster.worker_count() + 1..=world {
            cluster.add_worker(&format!("worker-{number}"));
        }
        let name = format!("by-{world}");
        submit(&cluster, &name, 6, Some(world as u32));
        digests.push(digest(&cluster, &name));
        assert_eq!(view(&cluster, &name)["workers"], world);
    }
    assert_eq!(digests[0].len(), 64);
    assert!(digests.iter().all(|other| *other == digests[0]), "{digests:?}");
}

/// A run in whose group one worker after the other strikes itself with `fault` two steps after it joined, in
/// the phase whose turn it is; the digest at its end, and how many struck.
fn swept(fault: &str, steps: u64) -> (String, usize, Cluster) {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "swept", steps, None);
    cluster.wait_for_step("swept", 3);
    let mut struck = 0;
    for strike in 0..FAULTS {
        let name = format!("doomed-{strike}");
        let phase = ["d", "g1", "g2"][strike % 3];
        cluster.add_doomed_worker(&name, &format!("{fault}@+2.{phase}"));
        let done = wait_for("a worker to join and strike", || {
            if view(&cluster, "swept")["status"] == "succeeded" {
                return Some(true);
            }
            let worker = cluster.worker(&name);
            (worker.has_ended() || worker.is_stopped()).then_some(false)
        });
        if fault == "stop" && !done {
            // It is only dead once the others have gone on without it.
            wait_for("the group to notice", || {
                let noticed =
                    cluster.events("swept").iter().filter(|event| event["kind"] == "regrouping").count();
                (noticed > struck).then_some(())
            });
        }
        cluster.worker(&name).kill();
        if done {
            break;
        }
        struck += 1;
    }
    (digest(&cluster, "swept"), struck, cluster)
}

/// The digest of the same run with nothing in its way.
fn undisturbed(cluster: &Cluster, steps: u64) -> String {
    submit(cluster, "calm", steps, None);
    digest(cluster, "calm")
}

fn survives(fault: &str, steps: u64) {
    let (disturbed, struck, cluster) = swept(fault, steps);
    assert_eq!(struck, FAULTS, "the run ended before all had struck: make it longer");
    assert_eq!(disturbed, undisturbed(&cluster, steps), "the same bits after {struck} faults");
    let _printed = cluster.ok(&["run", "audit", "swept"]);
    let lost = cluster.events("swept").iter().filter(|event| event["kind"] == "regrouping").count();
    assert!(lost >= FAULTS, "{lost} losses were noticed");
}

#[test]
fn workers_killed_in_every_phase_change_no_bit() {
    survives("kill", 700);
}

#[test]
fn workers_stopped_in_every_phase_change_no_bit() {
    survives("stop", 900);
}
