//! Two GPUs: what groups do on them. With one GPU each test says that it was skipped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use takuma_core::config::{Precision, Recipe, RunConfig};
use takuma_worker::collective::{Nccl, NcclConfig, Ring};
use takuma_worker::recipe::{Dcgan, Outcome, Ticket};
use takuma_worker::torch::cuda::{self, devices, select};
use takuma_worker::trainer::{Exchange, Feed};
use tch::Device;

use super::support::{bytes, config, faces, feed, group_over, iterate, net_on, share};
use super::{gpu, row};

const WORLD: u32 = 2;
const WARM_UP: u64 = 20;
const STEPS: u64 = 100;

/// Runs `worker(rank, exchange, device)` on two GPUs, whose group sums through NCCL; what they return, by rank. Nothing,
/// and a row about it, if there are not two.
fn on_two<T: Send>(
    test: &str,
    precision: cuda::Precision,
    deterministic: bool,
    worker: impl Fn(u32, &Arc<Exchange>, Device) -> T + Sync,
) -> Option<Vec<T>> {
    let (_, _turn) = gpu(test, precision, deterministic)?;
    let count = devices().unwrap().len();
    if count < WORLD as usize {
        row(test, &format!("skipped: it needs two GPUs, and here is {count}"));
        return None;
    }
    let nccl = NcclConfig::load().unwrap();
    let form = |ring: Ring| -> Box<dyn takuma_worker::collective::Collective> {
        let rank = takuma_worker::collective::Collective::rank(&ring).0;
        select(rank, precision, deterministic).unwrap();
        Box::new(Nccl::form(ring, &nccl).unwrap())
    };
    Some(group_over(WORLD, form, |rank, exchange| worker(rank, exchange, Device::Cuda(rank as usize))))
}

fn settled(net: &Dcgan, ticket: Ticket) -> Vec<Outcome> {
    let settled = net.settle(ticket).unwrap().expect("the GPU is not stuck");
    assert!(settled.failed.is_none(), "{settled:?}");
    settled.outcomes
}

#[test]
fn whole_steps_of_two_gpus_have_the_bits_of_phases_that_are_waited_for() {
    let name = "whole steps of two GPUs beside phases, f32, 8 steps";
    let (faces, config) = (faces(), config());
    let run = |is_whole: bool| {
        on_two(name, cuda::Precision::F32, true, |rank, exchange, device| {
            let mut net = net_on(&config, exchange, device);
            let mut feed = feed(&faces, share(rank, WORLD)).on(device);
            for step in 0..8 {
                if is_whole {
                    let ticket = net.enqueue(feed.input(step).unwrap().0).unwrap();
                    let outcomes = settled(&net, ticket);
                    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_))));
                } else {
                    iterate(&mut net, &feed.batch(step).unwrap());
                }
            }
            assert_eq!(net.is_captured(), is_whole);
            bytes(&net)
        })
    };
    let Some(whole) = run(true) else { return };
    assert!(whole[0] == whole[1], "both have one state");
    assert!(run(false).is_some_and(|waited| waited == whole), "and it is that of phases");
    row(name, "the same bits");
}

/// Milliseconds a step: phase by phase, or whole with two under way.
fn milliseconds(net: &mut Dcgan, feed: &mut Feed, is_whole: bool) -> f64 {
    let mut run = |first: u64, steps: u64| {
        let begin = Instant::now();
        let mut before = None;
        for step in first..first + steps {
            if !is_whole {
                let batch = feed.batch(step).unwrap();
                iterate(net, &batch);
                continue;
            }
            let ticket = net.enqueue(feed.input(step).unwrap().0).unwrap();
            if let Some(before) = before.replace(ticket) {
                settled(net, before);
            }
        }
        before.map(|last| settled(net, last));
        begin.elapsed()
    };
    run(0, WARM_UP);
    let taken: Duration = run(WARM_UP, STEPS);
    taken.as_secs_f64() * 1e3 / STEPS as f64
}

#[test]
fn milliseconds_a_step_of_two_gpus() {
    let faces = faces();
    for (name, wanted, selected) in
        [("f32", Precision::F32, cuda::Precision::F32), ("bf16", Precision::Bf16, cuda::Precision::Bf16)]
    {
        let config = RunConfig { precision: wanted, ..RunConfig::new(Recipe::DcganCeleba, "file:///none") };
        for (how, is_whole, records) in [
            ("phase by phase", false, false),
            ("whole steps, kernel by kernel", true, false),
            ("whole steps, graphs between sums", true, true),
        ] {
            let title = format!("dcgan-celeba, batch 64 on two GPUs, {name}: ms a step, {how}");
            let taken = on_two(&title, selected, false, |rank, exchange, device| {
                let mut net = net_on(&config, exchange, device);
                if !records {
                    net.without_recording();
                }
                let mut feed = feed(&faces, share(rank, WORLD)).on(device);
                let taken = milliseconds(&mut net, &mut feed, is_whole);
                assert_eq!(net.is_captured(), records);
                taken
            });
            let Some(taken) = taken else { return };
            row(&title, &format!("{:.3}", taken[0].max(taken[1])));
        }
    }
}
