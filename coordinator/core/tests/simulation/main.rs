//! A whole cluster in simulated time: honest workers, a network, a store and the real core, under storms of faults.
//!
//! Every world comes from a seed. A failure prints it, and `TAKUMA_SIM_SEED=n` runs that one alone;
//! `TAKUMA_SIM_TRACE=1` tells everything that happens in it. `make sim SEEDS=n` runs the long form.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test's helpers are tests too.

mod checks;
mod coordinator;
mod faults;
mod member;
mod net;
mod person;
mod plan;
mod process;
mod report;
mod ring;
mod rng;
mod scale;
mod spool;
mod state;
mod store;
#[path = "../support/mod.rs"]
mod support;
mod trainer;
mod watch;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use plan::Plan;
use report::Stats;
use world::World;

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: '{text}'")))
}

/// Runs the world of a seed to its end.
fn simulate(seed: u64) -> Stats {
    let world = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(Plan::new(seed));
        world.run();
        world
    }));
    let Ok(mut world) = world else {
        panic!(
            "seed {seed} failed, see above; alone: TAKUMA_SIM_SEED={seed} cargo test --release -p takuma-core \
             --test simulation"
        );
    };
    world.stats.seeds = 1;
    world.stats.checks = world.checks.count;
    world.stats.simulated_ms = world.now;
    world.stats
}

/// The seeds to run: one that was asked for, or the first so many.
fn seeds() -> std::ops::Range<u64> {
    match number("TAKUMA_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TAKUMA_SIM_WORLDS").unwrap_or(1_500),
    }
}

#[test]
fn runs_end_with_the_undisturbed_result_whatever_happens() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let seeds = seeds();
    // One failure is enough for all threads.
    let failed = AtomicBool::new(false);
    let part = |first: u64| {
        let mut stats = Stats::default();
        for seed in (seeds.start + first..seeds.end).step_by(threads as usize) {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            match catch_unwind(|| simulate(seed)) {
                Ok(more) => stats.add(&more),
                Err(panic) => {
                    failed.store(true, Ordering::Relaxed);
                    std::panic::resume_unwind(panic);
                }
            }
        }
        stats
    };
    let mut stats = Stats::default();
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|first| {
                scope.spawn({
                    let part = &part;
                    move || part(first)
                })
            })
            .collect();
        for part in parts {
            stats.add(&part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    println!("simulated clusters:\n{}", stats.table());
}

#[test]
fn the_same_seed_has_the_same_history() {
    let digest = |seed| {
        let mut world = World::new(Plan::new(seed)).traced();
        world.run();
        (world.digest(), world.now)
    };
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let first = digest(seed);
        assert_eq!(first, digest(seed), "seed {seed} has two histories");
        seen.insert(first);
    }
    assert_eq!(seen.len(), 20, "other seeds have other histories");
}
