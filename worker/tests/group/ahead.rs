//! Whole steps handed to the device give the bits of phases that are waited for, on a CPU too.

use std::time::{Duration, Instant};

use takuma_core::config::{OnNan, Precision, RunConfig};
use takuma_core::slots::SlotRange;
use takuma_worker::recipe::{Dcgan, Images, Outcome, Phase, PhaseError, StepInput, Ticket};
use takuma_worker::trainer::{Exchange, Feed};

use super::support::{bytes, config, faces, feed, iterate, net};

const ALL: SlotRange = SlotRange { first: 0, count: 64 };

fn run(on_nan: OnNan) -> RunConfig {
    RunConfig { on_nan, ..config() }
}

fn enqueued(net: &mut Dcgan, input: StepInput) -> Vec<Outcome> {
    let ticket = net.enqueue(input).unwrap();
    settled(net, ticket)
}

fn settled(net: &Dcgan, ticket: Ticket) -> Vec<Outcome> {
    let settled = net.settle(ticket).unwrap().expect("a processor is never stuck");
    assert!(settled.failed.is_none(), "{settled:?}");
    settled.outcomes
}

/// Asks for step 0 until its images are named by row.
fn until_resident(feed: &mut Feed) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !matches!(feed.input(0).unwrap().0.images, Images::Rows { .. }) {
        assert!(Instant::now() < deadline, "all shards come");
        std::thread::yield_now();
    }
}

#[test]
fn whole_steps_give_the_bits_of_their_phases() {
    let faces = faces();
    let (mut one, mut whole) = (net(&config(), &Exchange::new()), net(&config(), &Exchange::new()));
    let (mut fed, mut ahead) = (feed(&faces, ALL), feed(&faces, ALL));
    for step in 0..6 {
        if step == 2 {
            until_resident(&mut ahead);
        }
        let batch = fed.batch(step).unwrap();
        let (input, entry) = ahead.input(step).unwrap();
        assert_eq!(entry, batch.fed, "the ledger's entry of step {step}");
        let expected = iterate(&mut one, &batch).map(Outcome::Applied);
        assert_eq!(enqueued(&mut whole, input), expected, "step {step}");
        assert!(bytes(&one) == bytes(&whole), "weights, moments and statistics after step {step}");
    }
    // And back: a phase that is waited for goes on from there.
    let batch = fed.batch(6).unwrap();
    assert_eq!(iterate(&mut one, &batch), iterate(&mut whole, &batch));
    assert!(bytes(&one) == bytes(&whole));
}

#[test]
fn several_steps_may_be_under_way() {
    let faces = faces();
    let (mut one, mut whole) = (net(&config(), &Exchange::new()), net(&config(), &Exchange::new()));
    let (mut fed, mut ahead) = (feed(&faces, ALL), feed(&faces, ALL));
    let tickets: Vec<_> = (0..3).map(|step| whole.enqueue(ahead.input(step).unwrap().0).unwrap()).collect();
    for (step, ticket) in (0..).zip(tickets) {
        let expected = iterate(&mut one, &fed.batch(step).unwrap()).map(Outcome::Applied);
        assert_eq!(settled(&whole, ticket), expected, "step {step}");
    }
}

/// Step `step` with an image that is no number.
fn spoilt(feed: &mut Feed, step: u64) -> StepInput {
    let mut input = feed.input(step).unwrap().0;
    if let Images::Ready(images) = &mut input.images {
        drop(images.get(3).fill_(f64::NAN));
        return input;
    }
    let images = feed.batch(step).unwrap().reals_nchw;
    drop(images.get(3).fill_(f64::NAN));
    StepInput { images: Images::Ready(images), ..input }
}

#[test]
fn update_that_is_not_finite_stops_all_that_are_under_way() {
    let mut net = net(&run(OnNan::Stop), &Exchange::new());
    let mut feed = feed(&faces(), ALL);
    enqueued(&mut net, feed.input(0).unwrap().0);
    let before = bytes(&net);
    let bad = net.enqueue(spoilt(&mut feed, 1)).unwrap();
    let behind = net.enqueue(feed.input(2).unwrap().0).unwrap();
    let blamed = Outcome::NotFinite("the loss and the gradient of conv1.weight".to_owned());
    assert_eq!(settled(&net, bad), [blamed, Outcome::Frozen, Outcome::Frozen]);
    assert!(!settled(&net, behind).iter().any(|outcome| matches!(outcome, Outcome::Applied(_))));
    assert!(bytes(&net) == before, "nothing was applied from the bad update on");
}

#[test]
fn update_that_is_skipped_leaves_what_leaving_it_out_leaves() {
    let faces = faces();
    let (mut one, mut whole) =
        (net(&run(OnNan::Skip), &Exchange::new()), net(&run(OnNan::Skip), &Exchange::new()));
    let mut ahead = feed(&faces, ALL);
    let batch = feed(&faces, ALL).batch(0).unwrap();
    drop(batch.reals_nchw.get(3).fill_(f64::NAN));
    let expected = Phase::ALL.map(|phase| match one.phase(&batch, phase, &mut []) {
        Ok(sums) => Outcome::Applied(sums),
        Err(PhaseError::NotFinite { what, .. }) => Outcome::NotFinite(what),
        Err(other) => panic!("{other}"),
    });
    assert!(matches!(expected[0], Outcome::NotFinite(_)) && matches!(expected[1], Outcome::Applied(_)));
    assert_eq!(enqueued(&mut whole, spoilt(&mut ahead, 0)), expected);
    assert!(bytes(&one) == bytes(&whole));
}

/// bf16 has 8 bits of mantissa, so a loss that is a mean over 64 logits may be off by some thousandths. Weights
/// and statistics stay f32.
#[test]
fn bf16_trains_like_f32_with_weights_in_f32() {
    let faces = faces();
    let bf16 = RunConfig { precision: Precision::Bf16, ..config() };
    let (mut full, mut half) = (net(&config(), &Exchange::new()), net(&bf16, &Exchange::new()));
    let mut fed = feed(&faces, ALL);
    for (step, tolerance) in [(0, 0.01), (1, 0.05), (2, 0.1)] {
        let batch = fed.batch(step).unwrap();
        let (full, half) = (iterate(&mut full, &batch), iterate(&mut half, &batch));
        for (full, half) in full.iter().zip(half) {
            let off = (full.loss - half.loss).abs() / full.loss.abs();
            assert!(off > 0.0 && off < tolerance, "step {step}: {half:?} beside {full:?}");
        }
    }
    // The same files, so a run may go on in the other precision.
    let [g, d, o] = bytes(&half);
    takuma_worker::checkpoint::restore_into(&mut full, &[g, d, o]).unwrap();
    assert!(bytes(&full) == bytes(&half));
}
