//! Exact mode on one GPU: one worker and two have the same bits.

use takuma_core::config::{Precision, RunConfig};
use takuma_core::slots::SlotRange;
use takuma_worker::torch::cuda;
use takuma_worker::trainer::Exchange;

use super::processes::{in_processes, member};
use super::support::{config, trained_together};
use super::{gpu, row};

/// Trains as one worker in this process, and as two in processes of their own, which run the test of this name again.
fn one_and_two_workers(test: &str, wanted: Precision, selected: cuda::Precision) {
    let Some((device, _turn)) = gpu("exact mode", selected, true) else { return };
    let config = RunConfig { exact: true, precision: wanted, ..config() };
    let exchange = Exchange::new();
    if let Some(member) = member() {
        let (slots, ring) = member.join(&config);
        exchange.enter(Box::new(ring));
        return member.hand_in(&trained_together(&config, &exchange, slots, device));
    }
    let all = SlotRange { first: 0, count: config.global_batch };
    let alone = trained_together(&config, &exchange, all, device);
    for (rank, made) in in_processes(test, 2).iter().enumerate() {
        assert!(*made == alone, "rank {rank} of two has other bits than one worker in {wanted:?}");
    }
    row(
        &format!("exact mode, {wanted:?}: one worker and two on one GPU, 3 steps"),
        "the same bits of losses and state",
    );
}

#[test]
fn one_and_two_workers_on_one_gpu_have_the_same_bits_in_f32() {
    let test = "exact::one_and_two_workers_on_one_gpu_have_the_same_bits_in_f32";
    one_and_two_workers(test, Precision::F32, cuda::Precision::F32);
}

#[test]
fn one_and_two_workers_on_one_gpu_have_the_same_bits_in_bf16() {
    let test = "exact::one_and_two_workers_on_one_gpu_have_the_same_bits_in_bf16";
    one_and_two_workers(test, Precision::Bf16, cuda::Precision::Bf16);
}
