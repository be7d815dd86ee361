//! Whole steps of a group over the ring give the bits of phases that are waited for, and end between two of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use takuma_core::ids::Rank;
use takuma_data::Dataset;
use takuma_worker::recipe::{Dcgan, Outcome, Phase, PhaseError, Settled};
use takuma_worker::trainer::{Exchange, Feed};

use super::exact::{Kill, Mortal};
use super::support::{bytes, config, faces, feed, group, group_over, iterate, net, share};

const STEPS: u64 = 3;

fn settled(net: &mut Dcgan, feed: &mut Feed, step: u64, own: f64) -> Settled {
    let mut input = feed.input(step).unwrap().0;
    (input.votes.stop, input.votes.ready_for) = (own, 4.0);
    let ticket = net.enqueue(input).unwrap();
    net.settle(ticket).unwrap().expect("a processor is never stuck")
}

/// The state before each phase of step index 1, and behind the last one, in a group that waits for each phase.
fn states(faces: &Dataset, world: u32) -> Vec<[Vec<u8>; 3]> {
    let mut all = group(world, |rank, exchange| {
        let (mut net, mut feed) = (net(&config(), exchange), feed(faces, share(rank, world)));
        iterate(&mut net, &feed.batch(0).unwrap());
        let batch = feed.batch(1).unwrap();
        let mut states = vec![bytes(&net)];
        for phase in Phase::ALL {
            net.phase(&batch, phase, &mut []).unwrap();
            states.push(bytes(&net));
        }
        states
    });
    all.swap_remove(0)
}

#[test]
fn whole_steps_of_a_group_give_the_bits_of_their_phases() {
    let faces = faces();
    for world in [2, 3] {
        let run = |is_whole: bool| {
            group(world, |rank, exchange| {
                let (mut net, mut feed) = (net(&config(), exchange), feed(&faces, share(rank, world)));
                let step = |step| {
                    if is_whole {
                        let settled = settled(&mut net, &mut feed, step, f64::from(rank));
                        let votes = settled.votes;
                        return (settled.outcomes, [votes.stop, votes.ready_for, votes.fed]);
                    }
                    let batch = feed.batch(step).unwrap();
                    let mut votes = [0.0; 3];
                    let outcomes = Phase::ALL.map(|phase| {
                        votes = [f64::from(rank), 4.0, batch.fed as f64];
                        Outcome::Applied(net.phase(&batch, phase, &mut votes).unwrap())
                    });
                    (outcomes.to_vec(), votes)
                };
                let numbers: Vec<_> = (0..STEPS).map(step).collect();
                (numbers, bytes(&net))
            })
        };
        assert!(run(true) == run(false), "{world} workers");
    }
}

/// Rank 1 dies at its exchange number `operation` of the second step: what became of that step, and the state.
fn killed_at(faces: &Dataset, operation: i64) -> Option<Vec<(Settled, [Vec<u8>; 3])>> {
    let kill = Kill::new(1, 0, operation);
    let mortal = |ring: takuma_worker::collective::Ring| -> Box<dyn takuma_worker::collective::Collective> {
        if takuma_worker::collective::Collective::rank(&ring) == Rank(1) {
            return Box::new(Mortal::new(ring, Arc::clone(&kill)));
        }
        Box::new(ring)
    };
    let both = group_over(2, mortal, |rank, exchange: &Arc<Exchange>| {
        let (mut net, mut feed) = (net(&config(), exchange), feed(faces, share(rank, 2)));
        let first = settled(&mut net, &mut feed, 0, 0.0);
        assert!(first.failed.is_none(), "{first:?}");
        // Both are through with it before one of them dies.
        exchange.collective().barrier().unwrap();
        if rank == 1 {
            kill.is_armed.store(true, Ordering::Relaxed);
        }
        let second = settled(&mut net, &mut feed, 1, 0.0);
        (second, bytes(&net))
    });
    kill.has_struck().then_some(both)
}

#[test]
fn group_that_breaks_inside_a_step_leaves_the_state_between_two_phases() {
    let faces = faces();
    let states = states(&faces, 2);
    let mut seen = [false; 4];
    for operation in (0..).step_by(5) {
        let Some(both) = killed_at(&faces, operation) else { break };
        for (rank, (settled, bytes)) in both.into_iter().enumerate() {
            let applied =
                settled.outcomes.iter().take_while(|one| matches!(one, Outcome::Applied(_))).count();
            assert!(bytes == states[applied], "operation {operation}, rank {rank}: {settled:?}");
            assert!(settled.outcomes[applied..].iter().all(|outcome| *outcome == Outcome::Ended));
            assert!(matches!(settled.failed, Some(PhaseError::Exchange(_))), "{settled:?}");
            seen[applied] = true;
        }
    }
    assert_eq!(seen, [true, true, true, false], "it broke in each phase");
}
