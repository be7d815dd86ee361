//! Large clusters: a group of a thousand, and ten thousand connected workers of which few have work.

use crate::faults::Fault;
use crate::plan::{Plan, WantedRun};
use crate::world::World;

fn wanted(steps: u64, workers: Option<u32>) -> Vec<WantedRun> {
    vec![WantedRun { name: "ada".into(), steps, from_ms: 2_500, workers }]
}

/// A world without anything random but its times.
fn plan(workers: u64, runs: Vec<WantedRun>) -> Plan {
    Plan {
        seed: 1,
        workers,
        runs,
        global_batch: 1_024,
        sample_every: 10,
        checkpoint_every: 10,
        phase_ms: 200,
        latency_ms: 5,
        skew_ms: 0,
        faults: Vec::new(),
        fault_every_ms: 1_000,
        storm_from_ms: 6_000,
        storm_until_ms: 26_000,
        calm_ms: 240_000,
        views_every: 5_000,
    }
}

fn report(what: &str, world: &World, begin: std::time::Instant) {
    let (events, core_s) = (world.stats.events, world.stats.core_s);
    println!(
        "{what}: {events} events in {core_s:.2} s of the core, {:.0} events/s; {:.1} s in all for {:.0} simulated s; \
         {} groups formed anew, {} changes",
        events as f64 / core_s,
        begin.elapsed().as_secs_f64(),
        world.now as f64 / 1000.0,
        world.stats.kind("regrouping"),
        world.stats.kind("regrouped"),
    );
}

#[test]
fn a_thousand_workers_survive_kills_joins_and_a_crash_of_the_coordinator() {
    let begin = std::time::Instant::now();
    let faults = vec![Fault::Kill, Fault::Kill, Fault::Join];
    let plan = Plan { faults, ..plan(1_000, wanted(30, None)) };
    let mut world = World::new(plan);
    world.crash_at(12_000, 3_000);
    world.run();
    report("1,000 workers in one group", &world, begin);
    assert!(
        world.stats.kind("reunited") > 0 && world.stats.kind("regrouping") > 5,
        "{:?}",
        world.stats.kinds
    );
}

#[test]
fn ten_thousand_workers_come_and_go_while_a_few_train() {
    let begin = std::time::Instant::now();
    let faults = vec![Fault::Kill, Fault::Join, Fault::BreakSession, Fault::Drain];
    let plan = Plan { faults, fault_every_ms: 20, ..plan(10_000, wanted(30, Some(64))) };
    let mut world = World::new(plan);
    world.run();
    report("10,000 workers, 64 of them in a group", &world, begin);
    assert!(world.coordinator.cluster.worker_count() > 9_500);
}
