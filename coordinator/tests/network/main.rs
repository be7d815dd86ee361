//! The coordinator behind real gRPC, with workers that compute nothing, on a simulated network in simulated time:
//! links break in one direction or both, hold what is sent, or flap; hosts crash and come back. Whatever the
//! weather was, the run comes to its good end once it is over. Every seed is simulated twice, and must take the same way.
//!
//! `TAKUMA_NET_SEEDS=n` tries more seeds, `TAKUMA_NET_SEED=k` one; `TAKUMA_NET_TRACE=1` prints what happened.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.
#![allow(clippy::print_stdout)] // The number of simulations is part of what is shown.

mod member;
mod process;
mod ring;
mod spool;
#[path = "../support/mod.rs"]
mod support;
mod weather;
mod wire;
mod world;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use takuma_core::config::{Recipe, RunConfig};
use world::{Outcome, simulate};

/// What CI has time for.
const SEEDS: u64 = 50;
const STEPS: u64 = 60;

/// Panics of tasks, which nobody else would tell.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().expect("a number"))
}

fn config() -> RunConfig {
    let mut config = RunConfig::new(Recipe::DcganTiny, world::DATASET);
    config.steps = Some(STEPS);
    config.sample_every = 7;
    config.checkpoint_every = 10;
    config
}

/// A simulation, or what is wrong with it.
fn try_seed(seed: u64, config: &RunConfig) -> Result<Outcome, String> {
    let panics = PANICS.load(Ordering::Relaxed);
    let simulated = std::panic::catch_unwind(AssertUnwindSafe(|| simulate(seed, config)));
    let outcome = simulated.unwrap_or_else(|_| Err("the simulation panicked".to_owned()))?;
    // Of this or of another that ran at the same time; the panic's own words tell.
    let panicked = PANICS.load(Ordering::Relaxed) - panics;
    if panicked == 0 { Ok(outcome) } else { Err(format!("{panicked} tasks panicked")) }
}

/// Simulates a seed twice.
fn try_twice(seed: u64, config: &RunConfig) -> Result<Outcome, String> {
    let (first, second) = (try_seed(seed, config)?, try_seed(seed, config)?);
    if first.trace == second.trace {
        return Ok(first);
    }
    let at = first.lines.iter().zip(&second.lines).position(|(a, b)| a != b);
    let at = at.unwrap_or(first.lines.len().min(second.lines.len()));
    let [first, second] = [&first, &second].map(|outcome| outcome.lines.get(at).cloned().unwrap_or_default());
    Err(format!("two simulations differ from line {at} on: '{first}' and '{second}'"))
}

#[test]
fn whatever_the_network_does_the_run_ends_well() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        before(panic);
    }));
    let seeds: Vec<u64> = match number("TAKUMA_NET_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("TAKUMA_NET_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let (config, begin) = (config(), Instant::now());
    let (next, results) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let result = try_twice(seed, &config);
                    results.lock().unwrap().push((seed, result));
                }
            });
        }
    });
    report(results.into_inner().unwrap(), begin);
}

fn report(results: Vec<(u64, Result<Outcome, String>)>, begin: Instant) {
    let (mut faults, mut seconds, mut groups, mut failures) = (BTreeMap::new(), 0, 0, Vec::new());
    let seeds = results.len();
    for (seed, result) in results {
        match result {
            Ok(outcome) => {
                seconds += outcome.seconds;
                groups += outcome.groups;
                for (fault, count) in outcome.faults {
                    *faults.entry(fault).or_insert(0) += count;
                }
            }
            Err(reason) => failures.push(format!(
                "seed {seed}: {reason}; alone: TAKUMA_NET_SEED={seed} cargo test --release -p takuma-coordinator \
                 --test network"
            )),
        }
    }
    println!(
        "{seeds} seeds twice each, {seconds} simulated seconds in {:.1}, {groups} groups, {} failed",
        begin.elapsed().as_secs_f64(),
        failures.len()
    );
    println!("faults: {faults:?}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
