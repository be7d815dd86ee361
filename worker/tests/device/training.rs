//! Whole training steps on the GPU beside the CPU, and beside each other. Two workers on one card need a process each,
//! since libtorch has one backward thread a device: see `bench/gpu_suite.py`.

use takuma_core::config::{Precision, RunConfig};
use takuma_core::slots::SlotRange;
use takuma_worker::checkpoint::network_tensors;
use takuma_worker::recipe::{Dcgan, Outcome};
use takuma_worker::torch::cuda;
use takuma_worker::trainer::Exchange;

use super::kernels::off;
use super::support::{bytes, config, faces, feed, iterate, net, net_on};
use super::{gpu, row};

const ALL: SlotRange = SlotRange { first: 0, count: 64 };

fn in_precision(precision: Precision) -> RunConfig {
    RunConfig { precision, ..config() }
}

/// Largest relative difference of any trained tensor or running statistic.
fn networks_off(one: &Dcgan, other: &Dcgan) -> f64 {
    let tensors =
        |net: &Dcgan| [network_tensors(&net.state().generator), network_tensors(&net.state().discriminator)];
    let pairs = tensors(one).into_iter().zip(tensors(other));
    pairs
        .flat_map(|(one, other)| one.into_iter().zip(other))
        .map(|((_, a), (_, b))| off(&a, &b))
        .fold(0.0, f64::max)
}

#[test]
fn gpu_and_processor_train_the_same_in_f32() {
    let Some((device, _turn)) = gpu("f32 beside the CPU", cuda::Precision::F32, true) else { return };
    let (faces, config) = (faces(), config());
    let (mut here, mut there) = (net(&config, &Exchange::new()), net_on(&config, &Exchange::new(), device));
    assert!(networks_off(&there, &here) == 0.0, "the same initial weights");
    let (mut fed, mut fed_there) = (feed(&faces, ALL), feed(&faces, ALL).on(device));
    // The first step's losses differ by rounding alone; what Adam makes of that grows, see docs/status.md.
    for (step, tolerance) in [(0, 2e-5), (1, 2e-3), (2, 2e-3)] {
        let sums = iterate(&mut here, &fed.batch(step).unwrap());
        let found = iterate(&mut there, &fed_there.batch(step).unwrap());
        let worst =
            sums.iter().zip(found).map(|(a, b)| (a.loss - b.loss).abs() / a.loss.abs()).fold(0.0, f64::max);
        assert!(worst < tolerance, "step {step}: {found:?}, not {sums:?}");
        row(&format!("losses of step {}, GPU beside CPU, f32", step + 1), &format!("{worst:.1e} relative"));
    }
}

#[test]
fn tf32_and_bf16_stay_within_their_rounding() {
    for (name, wanted, selected, tolerance) in [
        ("tf32", Precision::Tf32, cuda::Precision::Tf32, 5e-3),
        ("bf16", Precision::Bf16, cuda::Precision::Bf16, 2e-2),
    ] {
        let Some((device, _turn)) = gpu(name, selected, false) else { return };
        let (faces, config) = (faces(), in_precision(wanted));
        let batch = feed(&faces, ALL).batch(0).unwrap();
        let expected = iterate(&mut net(&in_precision(Precision::F32), &Exchange::new()), &batch);
        let mut there = net_on(&config, &Exchange::new(), device);
        let found = iterate(&mut there, &feed(&faces, ALL).on(device).batch(0).unwrap());
        let worst = expected
            .iter()
            .zip(found)
            .map(|(a, b)| (a.loss - b.loss).abs() / a.loss.abs())
            .fold(0.0, f64::max);
        assert!(worst < tolerance, "{found:?}, not {expected:?}");
        row(
            &format!("losses of the first step, {name} on the GPU beside f32 on the CPU"),
            &format!("{worst:.1e} relative"),
        );
    }
}

#[test]
fn captured_steps_give_the_bits_of_phases_that_are_waited_for() {
    for (name, wanted, selected) in
        [("f32", Precision::F32, cuda::Precision::F32), ("bf16", Precision::Bf16, cuda::Precision::Bf16)]
    {
        let Some((device, _turn)) = gpu("captured steps", selected, true) else { return };
        let (faces, config) = (faces(), in_precision(wanted));
        let (mut one, mut whole) =
            (net_on(&config, &Exchange::new(), device), net_on(&config, &Exchange::new(), device));
        let (mut fed, mut ahead) = (feed(&faces, ALL).on(device), feed(&faces, ALL).on(device));
        // The first steps are warm-up, the others replay the graph.
        for step in 0..8 {
            let expected = iterate(&mut one, &fed.batch(step).unwrap()).map(Outcome::Applied);
            let ticket = whole.enqueue(ahead.input(step).unwrap().0).unwrap();
            assert_eq!(whole.settle(ticket).unwrap().unwrap().outcomes, expected, "{name}, step {step}");
        }
        assert!(whole.is_captured(), "the steps ran as a graph");
        assert!(bytes(&one) == bytes(&whole), "{name}");
        row(&format!("CUDA graph beside kernel by kernel, {name}, 8 steps"), "the same bits");
    }
}
