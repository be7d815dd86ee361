//! Random schedules of events, well-meant and hostile, against the invariants that hold after every event.

#![allow(clippy::unwrap_used)] // A test's helpers are tests too.

mod calm;
mod checks;
#[path = "../support/mod.rs"]
mod support;
mod world;

use proptest::prelude::*;
use world::{World, deed};

/// Random schedules to try: `make sim SEEDS=...` tries more.
fn seeds() -> u32 {
    std::env::var("TAKUMA_SIM_SEEDS").map_or(600, |text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: seeds(), ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_every_event(deeds in prop::collection::vec(deed(), 1..250)) {
        let mut world = World::new();
        for deed in &deeds {
            world.act(deed)?;
        }
        world.calm_down()?;
        // When the store has answered everything, so has the cluster.
        prop_assert_eq!(world.answered.len() as u64, world.asked, "a request was never answered");
    }

    #[test]
    fn equal_schedules_lead_to_equal_actions(deeds in prop::collection::vec(deed(), 1..120)) {
        let transcript = || -> Result<Vec<String>, TestCaseError> {
            let mut world = World::new();
            for deed in &deeds {
                world.act(deed)?;
            }
            Ok(world.told)
        };
        prop_assert_eq!(transcript()?, transcript()?);
    }
}

#[test]
fn random_schedules_reach_training() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut starts, mut successes) = (0, 0);
    for _ in 0..400 {
        let deeds = prop::collection::vec(deed(), 250).new_tree(&mut runner).unwrap().current();
        let mut world = World::new();
        for deed in &deeds {
            world.act(deed).unwrap();
        }
        starts += world.starts;
        successes += world.succeeded.len();
    }
    // If not, the properties above would hold of nothing.
    assert!(starts > 400 && successes >= 10, "{starts} starts, {successes} successes");
}
