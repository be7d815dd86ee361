//! Every call that a coordinator makes of its store fails once, in every way that a store fails, and every run comes to
//! its end with everything in its place.
//!
//! An undisturbed run is made first and its calls are counted; then it is made again for each call and each fault.
//! Time is paused, so what takes minutes here takes milliseconds outside.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.
#![allow(clippy::print_stdout)] // The number of runs is part of what is shown.

mod support;

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::Place;
use support::cluster::{Cluster, in_paused_time};
use support::faults::{Call, Fault};
use takuma_core::config::RunConfig;

const PACE: Duration = Duration::from_millis(500);
const STEPS: u64 = 4;

fn config(place: &Place) -> RunConfig {
    let mut config = place.config(STEPS);
    config.sample_every = 3;
    config.checkpoint_every = 2;
    config
}

/// A run in which these calls fail. Returns all its calls, or what is wrong afterwards.
fn run(faults: Vec<(usize, Fault)>) -> Result<Vec<Call>, String> {
    let scenario = || {
        in_paused_time(async {
            let (place, cluster) = (Place::new().await, Cluster::default());
            let config = config(&place);
            cluster.faults.at(faults);
            cluster.start(PACE);
            let run = cluster.train(&config).await;
            if !run.error.is_empty() {
                return Err(run.error);
            }
            cluster.check(&config).await?;
            Ok(cluster.faults.calls())
        })
    };
    std::panic::catch_unwind(AssertUnwindSafe(scenario)).unwrap_or_else(|_| Err("it panicked".to_owned()))
}

/// Panics of tasks, which nobody else would tell.
fn count_panics() -> &'static AtomicUsize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(panic);
        }));
    });
    &PANICS
}

/// Makes a run again for each of its calls from `first` on and each fault, after those that it had already. Prints the
/// number of runs, and panics if one did not end well.
fn disturb_each_call(name: &str, before: &[(usize, Fault)], first: usize) {
    let panics = count_panics();
    let calls = run(before.to_vec()).unwrap();
    let cells: Vec<(usize, Fault)> = calls
        .iter()
        .enumerate()
        .skip(first)
        .flat_map(|(number, call)| {
            let faults = if call.writes { &Fault::OF_WRITES[..] } else { &Fault::OF_READS[..] };
            faults.iter().map(move |&fault| (number, fault))
        })
        .collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(number, fault)) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(reason) = run([before, &[(number, fault)]].concat()) {
                        let what = &calls[number].what;
                        failures
                            .lock()
                            .unwrap()
                            .push(format!("{fault:?} at call {number}, {what}: {reason}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{name}: {} calls, {} cells, {} failed", calls.len() - first, cells.len(), failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(panics.load(Ordering::Relaxed), 0, "a task panicked");
}

#[test]
fn whatever_call_fails_the_run_ends_well() {
    disturb_each_call("one life", &[], 0);
}

#[test]
fn whatever_call_fails_after_a_crash_the_run_ends_well() {
    // Around the first commit: the run trains, and has metrics, grids and a checkpoint to find again.
    let calls = run(Vec::new()).unwrap();
    let commit =
        calls.iter().position(|call| call.what.starts_with("create") && call.what.contains("manifest"));
    let commit = commit.expect("a checkpoint is committed");
    for crash in [Fault::CrashBefore, Fault::CrashAfter] {
        disturb_each_call(&format!("{crash:?} at a commit"), &[(commit, crash)], commit + 1);
    }
}
