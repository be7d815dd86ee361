//! How long a step takes. Prints; only a step that is absurdly slow fails.

use std::time::{Duration, Instant};

use takuma_core::config::{Precision, Recipe, RunConfig};
use takuma_core::slots::SlotRange;
use takuma_worker::checkpoint::Snapshot;
use takuma_worker::recipe::{Dcgan, Images};
use takuma_worker::torch::cuda::{self, synchronize};
use takuma_worker::trainer::{Exchange, Feed};
use tch::Device;

use super::support::{faces, feed, iterate, net_on};
use super::{gpu, row};

const ALL: SlotRange = SlotRange { first: 0, count: 64 };
const WARM_UP: u64 = 20;
const STEPS: u64 = 200;
const ROUNDS: u64 = 5;

fn ms(duration: Duration, steps: u64) -> f64 {
    duration.as_secs_f64() * 1e3 / steps as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds a step that is waited for phase by phase.
fn by_phase(net: &mut Dcgan, feed: &mut Feed) -> f64 {
    let batch = feed.batch(0).unwrap();
    for _ in 0..5 {
        iterate(net, &batch);
    }
    let begin = Instant::now();
    for _ in 0..STEPS / 4 {
        iterate(net, &batch);
    }
    ms(begin.elapsed(), STEPS / 4)
}

/// Milliseconds a whole step, two under way, images and noise brought each time.
fn whole(net: &mut Dcgan, feed: &mut Feed) -> f64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !matches!(feed.input(0).unwrap().0.images, Images::Rows { .. }) {
        assert!(Instant::now() < deadline, "the images come to the GPU");
    }
    let mut run = |first: u64, steps: u64| {
        let begin = Instant::now();
        let mut before = None;
        for step in first..first + steps {
            let ticket = net.enqueue(feed.input(step).unwrap().0).unwrap();
            if let Some(before) = before.replace(ticket) {
                net.settle(before).unwrap();
            }
        }
        before.map(|last| net.settle(last).unwrap());
        ms(begin.elapsed(), steps)
    };
    run(0, WARM_UP);
    median((0..ROUNDS).map(|round| run(WARM_UP + round * STEPS, STEPS)).collect())
}

/// Milliseconds a replay with nothing in between: what the GPU is busy for.
fn busy(net: &mut Dcgan) -> f64 {
    let replays = |net: &mut Dcgan| {
        let begin = Instant::now();
        for _ in 0..STEPS {
            net.replay().unwrap();
        }
        synchronize().unwrap();
        ms(begin.elapsed(), STEPS)
    };
    median((0..ROUNDS).map(|_| replays(net)).collect())
}

#[test]
fn milliseconds_a_step() {
    for (name, wanted, selected) in [
        ("f32", Precision::F32, cuda::Precision::F32),
        ("tf32", Precision::Tf32, cuda::Precision::Tf32),
        ("bf16", Precision::Bf16, cuda::Precision::Bf16),
    ] {
        let Some((device, _turn)) = gpu("milliseconds a step", selected, false) else { return };
        let config = RunConfig { precision: wanted, ..RunConfig::new(Recipe::DcganCeleba, "file:///none") };
        let faces = faces();
        let mut net = net_on(&config, &Exchange::new(), device);
        let mut feed = feed(&faces, ALL).on(device);
        let phases = by_phase(&mut net, &mut feed);
        let step = whole(&mut net, &mut feed);
        let busy = busy(&mut net);
        // An iteration without wasted work is 5.18 GFLOP an image.
        let teraflops = 5.18 * 64.0 / step;
        row(&format!("dcgan-celeba, batch 64, {name}: ms a step, phase by phase"), &format!("{phases:.3}"));
        row(
            &format!("dcgan-celeba, batch 64, {name}: ms a step, whole steps"),
            &format!("{step:.3} ({teraflops:.0} TFLOP/s)"),
        );
        row(
            &format!("dcgan-celeba, batch 64, {name}: GPU idle"),
            &format!("{:.0}%", 100.0 * (1.0 - busy / step).max(0.0)),
        );
        assert!(step < 1000.0);
    }
}

#[test]
fn milliseconds_that_a_checkpoint_holds_up() {
    let Some((device, _turn)) = gpu("checkpoint", cuda::Precision::F32, false) else { return };
    let config = RunConfig::new(Recipe::DcganCeleba, "file:///none");
    let net = net_on(&config, &Exchange::new(), device);
    let taken = (0..7).map(|_| {
        synchronize().unwrap();
        let begin = Instant::now();
        let snapshot = Snapshot::take(&net, 1).unwrap();
        synchronize().unwrap();
        let stall = begin.elapsed();
        assert_eq!(snapshot.serialize().unwrap().len(), 3);
        ms(stall, 1)
    });
    row("dcgan-celeba: ms that a checkpoint holds up training", &format!("{:.3}", median(taken.collect())));
}

#[test]
fn images_come_to_the_gpu_and_noise_is_drawn_fast_enough() {
    let Some((device, _turn)) = gpu("input", cuda::Precision::F32, false) else { return };
    let faces = faces();
    let mut feed = feed(&faces, ALL).on(device);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !matches!(feed.input(0).unwrap().0.images, Images::Rows { .. }) {
        assert!(Instant::now() < deadline, "the images come to the GPU");
    }
    let begin = Instant::now();
    (0..STEPS).for_each(|step| drop(feed.input(step).unwrap()));
    row("ms of the host for a step's input", &format!("{:.3}", ms(begin.elapsed(), STEPS)));
    assert!(device != Device::Cpu);
}
