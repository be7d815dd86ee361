//! Exact mode with all lanes in one graph, as on a GPU, done on a processor: the bits of lanes apart.

use takuma_core::config::{Recipe, RunConfig};
use takuma_core::slots::SlotRange;
use takuma_worker::collective::CollectiveError;
use takuma_worker::recipe::LaneForm::{Apart, Together};
use takuma_worker::recipe::{LaneForm, Phase, PhaseError};
use takuma_worker::trainer::Exchange;
use tch::Device;

use super::exact::{Kill, Member, PHASES, alone, batches, run};
use super::processes::{in_processes, member};
use super::support::{self, bytes, faces, feed, iterate, net_in, trained_together};

fn members(threads: i32, forms: &[LaneForm]) -> Vec<Member> {
    forms.iter().map(|&form| Member::in_form(threads, form)).collect()
}

#[test]
fn lanes_together_give_the_bits_of_lanes_apart_after_every_phase() {
    let batches = batches();
    let (mut apart, mut together) = (members(1, &[Apart]), members(1, &[Together]));
    for (generation, until) in (1..).zip(1..=PHASES) {
        run(&mut apart, &batches, generation, until, None);
        run(&mut together, &batches, generation, until, None);
        assert_eq!(together[0].sums, apart[0].sums, "phase {until}");
        // Adam's moments are in it: after its first update, the gradients.
        assert!(bytes(&together[0].net) == bytes(&apart[0].net), "phase {until}");
    }
}

#[test]
fn groups_of_either_form_give_the_same_bits_with_8_4_2_and_1_lanes_a_worker() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    for (threads, forms) in [
        (2, vec![Together]),
        (1, vec![Together; 2]),
        (1, vec![Together, Apart]),
        (1, vec![Apart, Together, Together]),
        (2, vec![Together; 4]),
        (1, vec![Together; 8]),
    ] {
        let mut members = members(threads, &forms);
        run(&mut members, &batches, 1, PHASES, None);
        for (rank, member) in members.iter().enumerate() {
            assert_eq!(member.sums, sums, "losses of rank {rank} of {forms:?}, {threads} threads");
            assert!(bytes(&member.net) == state, "state of rank {rank} of {forms:?}, {threads} threads");
        }
    }
}

#[test]
fn worker_killed_in_any_phase_leaves_no_trace_in_lanes_together() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    // Before anything was exchanged, in the forward pass, in the backward pass with gradients under way.
    for (phase, operation) in [(3, 9), (4, 0), (4, 9), (5, 4)] {
        let kill = Kill::new(phase % 3, phase, operation);
        let mut members = members(1, &[Together; 3]);
        run(&mut members, &batches, 1, PHASES, Some(&kill));
        assert!(kill.has_struck(), "phase {phase} has no operation {operation}");
        let dead = members.remove(kill.rank);
        assert_eq!(dead.applied, phase, "the phase did not go through");
        run(&mut members, &batches, 2, PHASES, None);
        for member in &members {
            assert_eq!(member.sums, sums, "killed in phase {phase} at operation {operation}");
            assert!(bytes(&member.net) == state, "killed in phase {phase} at operation {operation}");
        }
    }
}

#[test]
fn lanes_together_come_and_go_between_phases() {
    let batches = batches();
    let (sums, state) = alone(&batches);
    let mut members = members(1, &[Together]);
    // 8, 4, 3 or 2, 1 and 8 lanes again.
    for (generation, (until, world)) in (1..).zip([(1, 1), (3, 2), (5, 3), (6, 8), (8, 1), (PHASES, 2)]) {
        members.truncate(world);
        members.resize_with(world, || Member::in_form(1, Together));
        run(&mut members, &batches, generation, until, None);
    }
    for member in &members {
        assert_eq!(member.sums, sums);
        assert!(bytes(&member.net) == state);
    }
}

#[test]
fn failing_exchange_applies_nothing_of_lanes_together_and_leaves_them_usable() {
    let batches = batches();
    let (_, state) = alone(&batches);
    let mut one = Member::in_form(1, Together);
    let before = bytes(&one.net);
    one.exchange.collective().abort_handle().abort("of the test");
    for phase in Phase::ALL {
        let error = one.net.phase(&batches[0], phase, &mut []).unwrap_err();
        assert!(matches!(error, PhaseError::Exchange(CollectiveError::Aborted { .. })), "{error}");
        assert!(bytes(&one.net) == before);
    }
    let mut members = [one];
    run(&mut members, &batches, 2, PHASES, None);
    assert!(bytes(&members[0].net) == state);
}

#[test]
fn number_that_is_none_in_one_lane_is_named_and_nothing_applied() {
    let batches = batches();
    let mut one = Member::in_form(1, Together);
    let before = bytes(&one.net);
    let spoilt = batches[0].reals_nchw.copy();
    drop(spoilt.get(19).fill_(f64::NAN));
    let batch = takuma_worker::recipe::Batch {
        reals_nchw: spoilt,
        noise_nz: batches[0].noise_nz.shallow_clone(),
        fed: 0,
    };
    let message = one.net.phase(&batch, Phase::D, &mut []).unwrap_err().to_string();
    assert!(message.starts_with("the loss and the gradient of conv1.weight became infinite"), "{message}");
    assert!(bytes(&one.net) == before);
}

/// How the device suite has two workers on one GPU, done on a processor.
#[test]
fn two_processes_train_the_bits_of_one() {
    let config = super::exact::config();
    let exchange = Exchange::new();
    if let Some(member) = member() {
        let (slots, ring) = member.join(&config);
        exchange.enter(Box::new(ring));
        return member.hand_in(&trained_together(&config, &exchange, slots, Device::Cpu));
    }
    let all = SlotRange { first: 0, count: config.global_batch };
    let alone = trained_together(&config, &exchange, all, Device::Cpu);
    let made = in_processes("together::two_processes_train_the_bits_of_one", 2);
    assert!(made.iter().all(|made| *made == alone));
}

#[test]
fn dcgan_celeba_has_the_same_bits_in_both_forms() {
    let config = RunConfig {
        recipe: Recipe::DcganCeleba,
        exact: true,
        lanes: 4,
        global_batch: 16,
        ..support::config()
    };
    let batch = feed(&faces(), SlotRange { first: 0, count: 16 }).batch(0).unwrap();
    let [apart, together] = [Apart, Together].map(|form| {
        let mut net = net_in(&config, &Exchange::new(), Device::Cpu, form);
        let sums = iterate(&mut net, &batch);
        (sums, bytes(&net))
    });
    assert_eq!(together.0, apart.0);
    assert!(together.1 == apart.1);
}
