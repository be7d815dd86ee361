//! Exact mode under fire: one digest whatever workers there are, and whatever happens to them at any phase of a
//! step. Real processes.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;
use takuma_tests::{Cluster, Proxy, Throttle, wait_for};

/// Faults of a sweep: twenty steps' three phases each.
const FAULTS: usize = 60;

/// Submits dcgan-tiny in exact mode.
fn submit(cluster: &Cluster, name: &str, steps: u64, workers: Option<u32>, rest: &[&str]) {
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
    arguments.extend(rest);
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
        submit(&cluster, &name, 6, Some(world as u32), &[]);
        digests.push(digest(&cluster, &name));
        assert_eq!(view(&cluster, &name)["workers"], world);
    }
    assert_eq!(digests[0].len(), 64);
    assert!(digests.iter().all(|other| *other == digests[0]), "{digests:?}");
}

/// What a worker on a GPU does in exact mode, done on a processor.
#[test]
fn lanes_in_one_graph_have_the_digest_of_lanes_apart() {
    let mut cluster = Cluster::start(1);
    submit(&cluster, "apart", 6, Some(1), &[]);
    let apart = digest(&cluster, "apart");
    cluster.worker("worker-1").kill();
    let together = |cluster: &mut Cluster, number: u32| {
        cluster.add_worker_with(&format!("together-{number}"), "TAKUMA_LANES_TOGETHER", "1");
    };
    together(&mut cluster, 1);
    submit(&cluster, "by-1", 6, Some(1), &[]);
    assert_eq!(digest(&cluster, "by-1"), apart);
    together(&mut cluster, 2);
    submit(&cluster, "by-2", 6, Some(2), &[]);
    assert_eq!(digest(&cluster, "by-2"), apart);
    cluster.add_worker("worker-2");
    submit(&cluster, "mixed", 6, Some(3), &[]);
    assert_eq!(digest(&cluster, "mixed"), apart);
    assert_eq!(view(&cluster, "mixed")["workers"], 3);
    for (name, is_together) in [("together-1", true), ("together-2", true), ("worker-2", false)] {
        assert_eq!(cluster.worker(name).log().contains("all lanes in one graph"), is_together, "{name}");
    }
}

/// Steps of a run that is stopped when it has borne what it is there for.
const ENDLESS: u64 = 100_000;

/// How often the events of a run tell of something.
fn count(cluster: &Cluster, name: &str, kind: &str) -> usize {
    cluster.events(name).iter().filter(|event| event["kind"] == kind).count()
}

/// Stops the run that bore the faults and holds it against one of as many steps with nothing in its way.
fn is_as_if_undisturbed(cluster: &Cluster) {
    let _printed = cluster.ok(&["run", "stop", "swept"]);
    let _waited = cluster.takuma(&["run", "wait", "swept"]);
    let swept = view(cluster, "swept");
    assert_eq!(swept["status"], "stopped", "{swept}");
    let steps = swept["step"].as_u64().unwrap();
    let counted: Vec<u64> =
        cluster.metrics("swept").iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(counted, (1..=steps).collect::<Vec<_>>(), "every step once, in order");
    let _printed = cluster.ok(&["run", "audit", "swept"]);
    submit(cluster, "calm", steps, None, &[]);
    assert_eq!(swept["weights_sha256"], digest(cluster, "calm"), "the same bits after {steps} steps");
}

/// A group of three in which one worker after the other strikes itself with `fault` two steps after it joined, in
/// the phase whose turn it is.
fn survives(fault: &str) {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "swept", ENDLESS, Some(3), &[]);
    // Some are started ahead: each takes the place of the one before at once.
    let mut doomed: VecDeque<String> = VecDeque::new();
    let mut started = 0;
    for _ in 0..FAULTS {
        while started < FAULTS && doomed.len() < 3 {
            let name = format!("doomed-{started}");
            let phase = ["d", "g1", "g2"][started % 3];
            cluster.add_doomed_worker(&name, &format!("{fault}@+2.{phase}"));
            doomed.push_back(name);
            started += 1;
        }
        let at = wait_for("a worker to strike", || {
            doomed.iter().position(|name| {
                let worker = cluster.worker(name);
                worker.has_ended() || worker.is_stopped()
            })
        });
        // A stopped one is only dead once the others have gone on without it: a ring stands still with it.
        let step = view(&cluster, "swept")["step"].as_u64().unwrap();
        cluster.wait_for_step("swept", step + 4);
        let name = doomed.remove(at).unwrap();
        cluster.worker(&name).kill();
    }
    is_as_if_undisturbed(&cluster);
    let events = cluster.events("swept");
    for name in (0..FAULTS).map(|number| format!("doomed-{number} ")) {
        let told = |event: &Value| {
            event["kind"] == "worker_lost" && event["message"].as_str().unwrap().contains(&name)
        };
        assert!(events.iter().any(told), "the loss of {name}is told");
    }
}

#[test]
fn a_slow_worker_is_named_and_its_smaller_share_changes_no_bit() {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "swept", ENDLESS, None, &["--balance"]);
    let throttle = Throttle::start(cluster.worker("worker-2").pid());
    let slots_of = |message: &str, name: &str| -> Option<u64> {
        let (_, share) = message.split_once(&format!("{name} ("))?;
        share.split(' ').next()?.parse().ok()
    };
    wait_for("shares by speed", || {
        let events = cluster.events("swept");
        let told = events.iter().rfind(|event| event["kind"] == "regrouped")?["message"].as_str()?;
        (slots_of(told, "worker-2")? < slots_of(told, "worker-1")?).then_some(())
    });
    drop(throttle);
    let events = cluster.events("swept");
    let named = events.iter().find(|event| event["kind"] == "straggler").unwrap();
    let told = named["message"].as_str().unwrap();
    assert!(told.starts_with("worker-2") && told.ends_with("it computes slowly"), "{told}");
    is_as_if_undisturbed(&cluster);
}

#[test]
fn workers_killed_in_every_phase_change_no_bit() {
    survives("kill");
}

#[test]
fn workers_stopped_in_every_phase_change_no_bit() {
    survives("stop");
}

#[test]
fn links_cut_in_every_phase_change_no_bit() {
    let mut cluster = Cluster::start(1);
    let proxy = Proxy::start();
    // At every second step the worker stops at the door of one more phase, and its link is cut there.
    let places = (0..FAULTS).map(|cut| format!("stop@+{}.{}", 2 + 2 * cut, ["d", "g1", "g2"][cut % 3]));
    let faults = places.collect::<Vec<_>>().join(",");
    cluster.add_worker_behind("worker-2", &proxy, Some(&faults));
    submit(&cluster, "swept", ENDLESS, Some(2), &[]);
    for _ in 0..FAULTS {
        wait_for("the worker to stop at its phase", || cluster.worker("worker-2").is_stopped().then_some(()));
        proxy.cut();
        proxy.heal();
        cluster.worker("worker-2").signal("CONT");
    }
    wait_for("the last cut to be noticed", || {
        (count(&cluster, "swept", "regrouping") >= FAULTS).then_some(())
    });
    is_as_if_undisturbed(&cluster);
}

#[test]
fn coordinators_killed_at_any_time_change_no_bit() {
    const CRASHES: u64 = 20;
    let mut cluster = Cluster::start(2);
    submit(&cluster, "swept", ENDLESS, None, &[]);
    for crash in 0..CRASHES {
        // Every other one dies in the middle of something: a worker that joins, or is lost.
        let name = format!("doomed-{crash}");
        if crash % 2 == 0 {
            cluster.add_doomed_worker(&name, &format!("kill@+3.{}", ["d", "g1", "g2"][crash as usize % 3]));
        }
        // From the worker's greeting to its death takes about a second: so all of it is hit.
        std::thread::sleep(Duration::from_millis(60 * crash));
        cluster.restart_coordinator(Duration::from_millis(50 * (crash % 5)));
        wait_for("the run to go on", || {
            let at = view(&cluster, "swept");
            assert_ne!(at["status"], "failed", "{at}");
            (at["status"] == "running").then_some(())
        });
        if crash % 2 == 0 {
            cluster.worker(&name).kill();
        }
    }
    is_as_if_undisturbed(&cluster);
}
