//! Members and coordinators that die, stop, lose their links or leave: the run goes on, every step counts once,
//! every grid is there. Real processes.
#![allow(clippy::unwrap_used, reason = "what fails in a helper fails the test")]

use std::time::Duration;

use serde_json::Value;
use takuma_tests::{Cluster, Proxy, wait_for};
use tempfile::TempDir;

fn submit(cluster: &Cluster, name: &str, steps: u64, rest: &[&str]) {
    let data = cluster.dataset(256);
    let steps = steps.to_string();
    let mut arguments = vec!["run", "submit", "dcgan-tiny", "--data", &data, "--steps", &steps];
    arguments.extend(["--sample-every", "20", "--checkpoint-every", "20", "--name", name, "-y", "-d"]);
    arguments.extend(rest);
    let _printed = cluster.ok(&arguments);
}

/// Every step once and in order, every grid, and the run's last state.
fn is_whole(cluster: &Cluster, name: &str, steps: u64) -> Value {
    let _printed = cluster.ok(&["run", "wait", name]);
    let counted: Vec<u64> = cluster.metrics(name).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(counted, (1..=steps).collect::<Vec<_>>(), "every step once, in order");
    for step in (0..=steps).step_by(20) {
        let grid = cluster.path(&format!("store/runs/{name}/samples/step-{step:06}.png"));
        assert!(grid.is_file(), "the grid of step {step} is missing");
    }
    let view = cluster.json(&["run", "show", name, "-o", "json"]);
    assert_eq!(view["status"], "succeeded");
    view
}

fn has_event(cluster: &Cluster, name: &str, kind: &str) -> bool {
    cluster.events(name).iter().any(|event| event["kind"] == kind)
}

#[test]
fn survivors_go_on_and_a_newcomer_joins_them() {
    let mut cluster = Cluster::start(3);
    submit(&cluster, "lossy", 120, &[]);
    cluster.wait_for_step("lossy", 10);
    cluster.worker("worker-1").kill();
    cluster.wait_for_step("lossy", 25);
    assert_eq!(cluster.json(&["run", "show", "lossy", "-o", "json"])["workers"], 2);
    cluster.add_doomed_worker("worker-4", "kill@+1000.d");
    wait_for("the newcomer", || {
        let view = cluster.json(&["run", "show", "lossy", "-o", "json"]);
        assert_ne!(view["status"], "succeeded", "the run ended before anybody joined");
        (view["workers"] == 3).then_some(())
    });
    let view = is_whole(&cluster, "lossy", 120);
    assert_eq!(view["workers"], 3);
    assert!(has_event(&cluster, "lossy", "worker_lost"));
}

#[test]
fn a_stopped_worker_is_left_behind_and_comes_back() {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "stopped", 100, &[]);
    cluster.wait_for_step("stopped", 10);
    cluster.worker("worker-2").signal("STOP");
    wait_for("the group to go on alone", || {
        (cluster.json(&["run", "show", "stopped", "-o", "json"])["workers"] == 1).then_some(())
    });
    cluster.worker("worker-2").signal("CONT");
    wait_for("the stopped worker's return", || {
        let view = cluster.json(&["run", "show", "stopped", "-o", "json"]);
        assert_ne!(view["status"], "succeeded", "the run ended before it came back");
        (view["workers"] == 2).then_some(())
    });
    is_whole(&cluster, "stopped", 100);
}

#[test]
fn a_cut_link_and_a_silent_one_are_survived() {
    let mut cluster = Cluster::start(1);
    let proxy = Proxy::start();
    cluster.add_worker_behind("worker-2", &proxy, None);
    wait_for("both workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 2).then_some(())
    });
    submit(&cluster, "linked", 120, &["--workers", "2"]);
    cluster.wait_for_step("linked", 10);
    let noticed = |cluster: &Cluster, times: usize| {
        wait_for("the broken link to be noticed", || {
            let events = cluster.events("linked");
            (events.iter().filter(|event| event["kind"] == "regrouping").count() >= times).then_some(())
        });
    };
    proxy.cut();
    proxy.heal();
    noticed(&cluster, 1);
    let step = cluster.json(&["run", "show", "linked", "-o", "json"])["step"].as_u64().unwrap();
    cluster.wait_for_step("linked", step + 5);
    proxy.swallow();
    noticed(&cluster, 2);
    proxy.heal();
    is_whole(&cluster, "linked", 120);
}

#[test]
fn a_link_that_stays_cut_costs_one_of_its_ends_until_it_is_mended() {
    let mut cluster = Cluster::start(2);
    let proxy = Proxy::start();
    cluster.add_worker_behind("worker-3", &proxy, None);
    wait_for("all workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 3).then_some(())
    });
    submit(&cluster, "parted", 1_000_000, &["--workers", "3"]);
    cluster.wait_for_step("parted", 10);
    let workers =
        |cluster: &Cluster| cluster.json(&["run", "show", "parted", "-o", "json"])["workers"].clone();
    proxy.cut();
    wait_for("two to go on", || (workers(&cluster) == 2).then_some(()));
    let step = cluster.json(&["run", "show", "parted", "-o", "json"])["step"].as_u64().unwrap();
    cluster.wait_for_step("parted", step + 5);
    proxy.heal();
    wait_for("the third to come back", || (workers(&cluster) == 3).then_some(()));
    let _printed = cluster.ok(&["run", "stop", "parted"]);
    let _waited = cluster.takuma(&["run", "wait", "parted"]);
    let _printed = cluster.ok(&["run", "audit", "parted"]);
}

#[test]
fn a_slow_link_is_named() {
    let mut cluster = Cluster::start(1);
    let proxy = Proxy::start();
    cluster.add_worker_behind("worker-2", &proxy, None);
    wait_for("both workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 2).then_some(())
    });
    // A second or so for the gradients of a step.
    proxy.limit(2_000_000);
    submit(&cluster, "slow", 1_000_000, &["--workers", "2"]);
    let told = wait_for("the slow link to be named", || {
        let events = cluster.events("slow");
        let named = events.iter().find(|event| event["kind"] == "straggler")?;
        Some(named["message"].as_str().unwrap().to_owned())
    });
    assert!(
        told.starts_with("worker-2") && told.ends_with("the network between worker-1 and it is slow"),
        "{told}"
    );
    let _printed = cluster.ok(&["run", "stop", "slow"]);
}

#[test]
fn a_coordinator_that_dies_is_not_missed() {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "headless", 160, &[]);
    cluster.wait_for_step("headless", 10);
    cluster.restart_coordinator(Duration::from_secs(1));
    wait_for("the workers' return", || has_event(&cluster, "headless", "reunited").then_some(()));
    let view = is_whole(&cluster, "headless", 160);
    assert_eq!(view["generation"], 1, "the group never noticed");
}

#[test]
fn a_worker_lost_while_the_coordinator_is_away_is_left_behind() {
    let mut cluster = Cluster::start(3);
    submit(&cluster, "both", 100, &[]);
    cluster.wait_for_step("both", 10);
    cluster.coordinator().kill();
    cluster.worker("worker-2").kill();
    cluster.restart_coordinator(Duration::from_millis(200));
    let view = is_whole(&cluster, "both", 100);
    assert_eq!(view["workers"], 2);
}

#[test]
fn workers_that_are_told_to_stop_hand_over_and_the_last_one_leaves_a_checkpoint() {
    let mut cluster = Cluster::start(2);
    submit(&cluster, "handed", 100, &[]);
    cluster.wait_for_step("handed", 10);
    for name in ["worker-1", "worker-2"] {
        cluster.worker(name).signal("TERM");
        wait_for("a worker's end", || cluster.worker(name).has_ended().then_some(()));
    }
    let view = cluster.json(&["run", "show", "handed", "-o", "json"]);
    assert_eq!(view["status"], "waiting");
    let step = view["step"].as_u64().unwrap();
    let checkpoints = cluster.json(&["checkpoint", "ls", "handed", "-o", "json"]);
    assert_eq!(checkpoints.as_array().unwrap().last().unwrap()["step"], step, "nothing is lost");
    assert!(!has_event(&cluster, "handed", "link_lost"), "no exchange broke");
    cluster.add_doomed_worker("worker-3", "kill@+1000.d");
    is_whole(&cluster, "handed", 100);
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_before_it_is_applied() {
    let mut cluster = Cluster::start(1);
    cluster.add_doomed_worker("worker-2", "nan@+4.d");
    wait_for("both workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 2).then_some(())
    });
    submit(&cluster, "poisoned", 60, &["--workers", "2"]);
    let waited = cluster.takuma(&["run", "wait", "poisoned"]);
    assert_eq!(waited.status.code(), Some(1));
    let view = cluster.json(&["run", "show", "poisoned", "-o", "json"]);
    let error = view["error"].as_str().unwrap();
    assert!(error.contains("step 5") && error.contains("not finite"), "{error}");
    assert_eq!(view["step"], 4, "the steps before it count");
}

/// A run of two workers, one of which makes the images of every fourth step of a group infinite.
fn poisoned(name: &str, steps: u64, rest: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(1);
    cluster.add_doomed_worker("worker-2", "nan@+4.d");
    wait_for("both workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 2).then_some(())
    });
    submit(&cluster, name, steps, &[&["--workers", "2"], rest].concat());
    cluster
}

/// The same of one worker that hands over whole steps, as on a GPU.
fn poisoned_whole(name: &str, steps: u64, rest: &[&str]) -> Cluster {
    let folder = TempDir::new().unwrap();
    let store = format!("file://{}/store", folder.path().display());
    let mut cluster = Cluster::over(folder, store, vec![("TAKUMA_WHOLE_STEPS", "1".to_owned())], 0);
    cluster.add_doomed_worker("worker-1", "nan@+4.d");
    wait_for("the worker", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 1).then_some(())
    });
    submit(&cluster, name, steps, rest);
    cluster
}

/// Steps whose line has no loss of D.
fn without_loss(cluster: &Cluster, name: &str) -> Vec<u64> {
    let lines = cluster.metrics(name);
    lines.iter().filter(|line| line["d_loss"].is_null()).map(|line| line["step"].as_u64().unwrap()).collect()
}

#[test]
fn whole_steps_leave_out_stop_at_and_roll_back_before_what_is_no_number() {
    let mut cluster = poisoned_whole("skipping", 20, &["--on-nan", "skip"]);
    is_whole(&cluster, "skipping", 20);
    assert_eq!(without_loss(&cluster, "skipping"), [5]);
    assert!(cluster.worker("worker-1").log().contains("whole steps"));
    let _printed = cluster.ok(&["run", "audit", "skipping"]);

    let cluster = poisoned_whole("poisoned", 20, &[]);
    assert_eq!(cluster.takuma(&["run", "wait", "poisoned"]).status.code(), Some(1));
    let view = cluster.json(&["run", "show", "poisoned", "-o", "json"]);
    let error = view["error"].as_str().unwrap();
    assert!(error.contains("step 5") && error.contains("conv1.weight is not finite"), "{error}");
    assert_eq!(view["step"], 4, "the steps before it count, and those behind it do not");

    let cluster = poisoned_whole("rolling", 20, &["--on-nan", "rollback", "--set", "checkpoint_every=4"]);
    is_whole(&cluster, "rolling", 20);
    assert!(has_event(&cluster, "rolling", "rolled_back"));
    assert_eq!(without_loss(&cluster, "rolling").first(), Some(&5));
    let _printed = cluster.ok(&["run", "audit", "rolling"]);
}

#[test]
fn an_update_that_is_no_number_is_left_out_when_that_is_wanted() {
    let cluster = poisoned("skipping", 20, &["--on-nan", "skip"]);
    is_whole(&cluster, "skipping", 20);
    assert_eq!(without_loss(&cluster, "skipping"), [5]);
    let events = cluster.events("skipping");
    let told = events.iter().find(|event| event["kind"] == "left_out").unwrap()["message"].as_str().unwrap();
    assert!(
        told.starts_with("step 5: no update in phase d: the loss and the gradient of conv1.weight"),
        "{told}"
    );
    let _printed = cluster.ok(&["run", "audit", "skipping"]);
    let _printed = cluster.ok(&["checkpoint", "verify", "skipping", "--all"]);
}

#[test]
fn a_run_rolls_back_before_a_number_that_is_none_and_passes_over_its_step() {
    let cluster =
        poisoned("rolling", 20, &["--on-nan", "rollback", "--set", "checkpoint_every=4", "--keep", "2"]);
    is_whole(&cluster, "rolling", 20);
    let events = cluster.events("rolling");
    let told: Vec<&str> = events
        .iter()
        .filter(|event| event["kind"] == "rolled_back")
        .map(|event| event["message"].as_str().unwrap())
        .collect();
    assert!(told[0].contains("will make no update in step 5"), "{told:?}");
    assert_eq!(without_loss(&cluster, "rolling").first(), Some(&5));
    let _printed = cluster.ok(&["run", "audit", "rolling"]);
    let kept = cluster.json(&["checkpoint", "ls", "rolling", "-o", "json"]);
    let kept: Vec<u64> = kept.as_array().unwrap().iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!((kept.len(), kept.last()), (2, Some(&20)));
    let folders = std::fs::read_dir(cluster.path("store/runs/rolling/checkpoints")).unwrap();
    assert_eq!(folders.count(), 2, "nothing else is left");
    let _printed = cluster.ok(&["checkpoint", "verify", "rolling", "--all"]);
}

/// What a worker on a GPU does while it is alone, done on a processor.
#[test]
fn worker_that_hands_over_whole_steps_trains_the_same_and_takes_others_in() {
    let folder = TempDir::new().unwrap();
    let store = format!("file://{}/store", folder.path().display());
    let environment = vec![("TAKUMA_WHOLE_STEPS", "1".to_owned())];
    let mut cluster = Cluster::over(folder, store, environment, 1);
    submit(&cluster, "ahead", 45, &[]);
    is_whole(&cluster, "ahead", 45);
    let digest = |cluster: &Cluster, run: &str| {
        cluster.json(&["run", "show", run, "-o", "json"])["weights_sha256"].clone()
    };
    let undisturbed = Cluster::start(1);
    submit(&undisturbed, "waited", 45, &[]);
    is_whole(&undisturbed, "waited", 45);
    assert_eq!(digest(&cluster, "ahead"), digest(&undisturbed, "waited"));
    let whole = |cluster: &mut Cluster| cluster.worker("worker-1").log().matches("whole steps").count();
    assert!(whole(&mut cluster) > 0, "it was alone and handed them over");

    submit(&cluster, "joined", 120, &["--workers", "2"]);
    cluster.add_worker_now("worker-2");
    cluster.wait_for_step("joined", 5);
    cluster.worker("worker-2").kill();
    wait_for("the first to go on alone", || {
        (cluster.json(&["run", "show", "joined", "-o", "json"])["workers"] == 1).then_some(())
    });
    let step = cluster.json(&["run", "show", "joined", "-o", "json"])["step"].as_u64().unwrap();
    cluster.wait_for_step("joined", step + 5);
    assert!(whole(&mut cluster) > 1, "it was alone again");
    cluster.add_worker_now("worker-3");
    wait_for("the third worker", || {
        let view = cluster.json(&["run", "show", "joined", "-o", "json"]);
        assert_ne!(view["status"], "succeeded", "the run ended before it came");
        (view["workers"] == 2).then_some(())
    });
    is_whole(&cluster, "joined", 120);
}

/// A cluster whose workers hand over whole steps, as on GPUs.
fn whole_steps(workers: u32) -> Cluster {
    let folder = TempDir::new().unwrap();
    let store = format!("file://{}/store", folder.path().display());
    Cluster::over(folder, store, vec![("TAKUMA_WHOLE_STEPS", "1".to_owned())], workers)
}

/// The parts of a checkpoint, with their digests.
fn parts(cluster: &Cluster, run: &str, step: u64) -> Value {
    let file = cluster.path(&format!("store/runs/{run}/checkpoints/step-{step:06}/manifest.json"));
    let manifest: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(manifest["parts"].as_array().unwrap().len(), 3);
    manifest["parts"].clone()
}

fn digest(cluster: &Cluster, run: &str) -> Value {
    cluster.json(&["run", "show", run, "-o", "json"])["weights_sha256"].clone()
}

#[test]
fn group_that_hands_over_whole_steps_trains_the_same_and_stops_and_resumes_alike() {
    // Checkpoints in the middle between two grids.
    let rest = ["--workers", "2", "--set", "checkpoint_every=7"];
    let waited = Cluster::start(2);
    submit(&waited, "waited", 40, &rest);
    is_whole(&waited, "waited", 40);
    let mut cluster = whole_steps(2);
    submit(&cluster, "whole", 40, &rest);
    is_whole(&cluster, "whole", 40);
    assert!(
        cluster
            .worker("worker-1")
            .log()
            .contains("whole steps are handed over from step 1 on, in a group of 2")
    );
    assert!(!waited.metrics("waited").is_empty());
    for step in [7, 35] {
        assert_eq!(parts(&cluster, "whole", step), parts(&waited, "waited", step), "step {step}");
    }
    assert_eq!(digest(&cluster, "whole"), digest(&waited, "waited"));

    submit(&cluster, "halved", 40, &rest);
    cluster.wait_for_step("halved", 3);
    let _printed = cluster.ok(&["run", "stop", "halved"]);
    let stopped = cluster.json(&["run", "show", "halved", "-o", "json"]);
    assert_eq!(stopped["status"], "stopped");
    assert!(stopped["step"].as_u64().unwrap() < 40, "it was stopped half-way: {stopped}");
    let _printed = cluster.ok(&["run", "resume", "halved", "-d"]);
    is_whole(&cluster, "halved", 40);
    assert_eq!(digest(&cluster, "halved"), digest(&waited, "waited"));
    let _printed = cluster.ok(&["run", "audit", "halved"]);
}

#[test]
fn group_that_hands_over_whole_steps_loses_members_and_takes_them_in() {
    let mut cluster = whole_steps(3);
    submit(&cluster, "lossy", 160, &[]);
    cluster.wait_for_step("lossy", 10);
    cluster.worker("worker-1").kill();
    cluster.wait_for_step("lossy", 25);
    let workers =
        |cluster: &Cluster| cluster.json(&["run", "show", "lossy", "-o", "json"])["workers"].clone();
    assert_eq!(workers(&cluster), 2);
    cluster.add_worker_now("worker-4");
    let until = |cluster: &Cluster, what: &str, count: u64| {
        wait_for(what, || {
            let view = cluster.json(&["run", "show", "lossy", "-o", "json"]);
            assert_ne!(view["status"], "succeeded", "the run ended before that");
            (view["workers"] == count).then_some(())
        });
    };
    until(&cluster, "the newcomer", 3);
    // One that is stopped is left behind: the group that it was in is ended, and let go of, when it wakes.
    cluster.worker("worker-2").signal("STOP");
    until(&cluster, "the others to go on", 2);
    cluster.worker("worker-2").signal("CONT");
    until(&cluster, "the stopped worker's return", 3);
    let _printed = cluster.ok(&["worker", "drain", "worker-3"]);
    until(&cluster, "one to leave", 2);
    is_whole(&cluster, "lossy", 160);
    let _printed = cluster.ok(&["run", "audit", "lossy"]);
    for (name, sizes) in [("worker-2", [3, 2].as_slice()), ("worker-4", [3, 2].as_slice())] {
        let log = cluster.worker(name).log();
        for size in sizes {
            assert!(log.contains(&format!("on, in a group of {size}")), "{name}, {size}: {log}");
        }
    }
}

#[test]
fn group_that_hands_over_whole_steps_stops_together_at_a_number_that_is_none() {
    let mut cluster = whole_steps(1);
    cluster.add_doomed_worker("worker-2", "nan@+4.d");
    wait_for("both workers", || {
        (cluster.json(&["worker", "ls", "-o", "json"]).as_array().unwrap().len() == 2).then_some(())
    });
    submit(&cluster, "skipping", 20, &["--workers", "2", "--on-nan", "skip"]);
    is_whole(&cluster, "skipping", 20);
    assert_eq!(without_loss(&cluster, "skipping"), [5]);
    assert!(cluster.worker("worker-2").log().contains("in a group of 2"));
    let _printed = cluster.ok(&["run", "audit", "skipping"]);
}
