//! A store that is away for minutes, or does a third of what it is asked: training does not feel it, and afterwards
//! everything is in its place. Time is paused.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod support;

use std::time::Duration;

use support::Place;
use support::cluster::{Cluster, in_paused_time};
use takuma_core::config::RunConfig;
use tokio::time::sleep;

/// Twenty steps a second: what a strong processor reaches with the small recipe.
const FAST: Duration = Duration::from_millis(50);
const OUTAGE: Duration = Duration::from_secs(600);

fn config(place: &Place, steps: u64, sample_every: u64, checkpoint_every: u64) -> RunConfig {
    RunConfig { sample_every, checkpoint_every, ..place.config(steps) }
}

#[test]
fn ten_minutes_without_a_store_are_not_felt_and_nothing_is_lost() {
    in_paused_time(async {
        let (place, cluster) = (Place::new().await, Cluster::default());
        let config = config(&place, 13_000, 250, 1_000);
        cluster.start(FAST);
        let outage = async {
            while cluster.view().await.is_none_or(|run| run.step < 100) {
                sleep(Duration::from_secs(1)).await;
            }
            let before = cluster.view().await.unwrap().step;
            let stored = cluster.faults.calls().len();
            cluster.faults.outage(OUTAGE);
            sleep(OUTAGE - Duration::from_secs(5)).await;
            let run = cluster.view().await.unwrap();
            let due = before + (OUTAGE.as_secs() - 5) * 20;
            assert!(run.step.abs_diff(due) <= 20, "step {} instead of about {due}", run.step);
            assert_eq!(run.error, "");
            // It asks now and then whether the store is back, and no more.
            let asked = cluster.faults.calls().len() - stored;
            assert!(asked < 200, "{asked} calls of a store that is away");
        };
        let (run, ()) = tokio::join!(cluster.train(&config), outage);
        assert_eq!(run.error, "");
        cluster.check(&config).await.unwrap();
    });
}

#[test]
fn a_store_that_fails_a_third_of_all_calls_loses_nothing() {
    for seed in 0..20 {
        in_paused_time(async {
            let (place, cluster) = (Place::new().await, Cluster::default());
            let config = config(&place, 60, 7, 20);
            cluster.faults.by_chance(seed, 30);
            cluster.start(Duration::from_millis(500));
            let run = cluster.train(&config).await;
            assert_eq!(run.error, "", "seed {seed}");
            let whole = cluster.check(&config).await;
            assert_eq!(whole, Ok(()), "seed {seed}");
        });
    }
}
