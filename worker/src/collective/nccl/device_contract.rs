//! What every [`DeviceCollective`] must do, as far as it does not concern faults: those are in `faults.rs`.

use std::time::{Duration, Instant};

use super::{
    Nccl,
    fake::{Stream, form},
};
use crate::collective::{Collective, DeviceCollective, DeviceKind, contract::together};

const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];

/// The same on every rank of a fresh group of each size, each with a stream.
fn on_all<T: Send>(work: impl Fn(&Nccl, &Stream) -> T + Sync, check: impl Fn(Vec<T>)) {
    for world in WORLDS {
        let members = form(world, |_| {});
        check(together(members.iter().collect(), |member| work(member, &Stream::new())));
    }
}

/// Numbers whose sum depends on the order.
fn part(rank: u32, place: usize) -> f64 {
    let magnitude = [1e-3, 1.0, 1e3, 1e6][(rank as usize + place) % 4];
    f64::from((place as u32 * 7919 + rank * 104_729) % 1000) * magnitude
}

fn world_of(member: &Nccl) -> std::ops::Range<u32> {
    0..member.world()
}

#[test]
fn sums_of_any_length_are_right_and_equal() {
    for len in [0, 1, 3, 1000, 100_003] {
        let sum = |member: &Nccl, stream: &Stream| {
            let rank = member.rank().0;
            let mut values: Vec<f32> = (0..len).map(|place| part(rank, place) as f32).collect();
            stream.sum(member, &mut values, DeviceKind::F32).unwrap();
            member.settle().unwrap();
            for (place, &value) in values.iter().enumerate() {
                let parts = world_of(member).map(|rank| part(rank, place));
                let exact = parts.clone().sum::<f64>();
                let scale = parts.map(f64::abs).sum::<f64>();
                assert!(
                    (f64::from(value) - exact).abs() <= scale * 1e-6,
                    "{value} at {place}, exactly {exact}"
                );
            }
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        on_all(sum, |sums| assert!(sums.windows(2).all(|pair| pair[0] == pair[1]), "ranks differ"));
    }
}

#[test]
fn doubles_are_summed_in_double_precision() {
    let sum = |member: &Nccl, stream: &Stream| {
        let mut values = [f64::from(member.rank().0) + 2f64.powi(-40), 0.5];
        stream.sum(member, &mut values, DeviceKind::F64).unwrap();
        member.settle().unwrap();
        let world = f64::from(member.world());
        assert_eq!(values, [world * (world - 1.0) / 2.0 + world * 2f64.powi(-40), world / 2.0]);
    };
    on_all(sum, |_| {});
}

#[test]
fn halves_are_summed() {
    let bf16 = |value: f32| (value.to_bits() >> 16) as u16;
    let sum = |member: &Nccl, stream: &Stream| {
        let mut values = vec![bf16(1.5); 77];
        values[76] = bf16(-0.25);
        stream.sum(member, &mut values, DeviceKind::Bf16).unwrap();
        member.settle().unwrap();
        let world = member.world() as f32;
        assert!(values[..76].iter().all(|&value| value == bf16(1.5 * world)));
        assert_eq!(values[76], bf16(-0.25 * world));
    };
    on_all(sum, |_| {});
}

#[test]
fn sums_repeat_to_the_bit() {
    let sum = |member: &Nccl, stream: &Stream| {
        let run = || {
            let rank = member.rank().0;
            let mut values: Vec<f32> = (0..5003).map(|place| part(rank, place) as f32).collect();
            stream.sum(member, &mut values, DeviceKind::F32).unwrap();
            member.settle().unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    };
    on_all(sum, |_| {});
}

#[test]
fn sums_are_done_in_the_order_of_the_stream() {
    let sum = |member: &Nccl, stream: &Stream| {
        let world = member.world() as f32;
        let mut values = vec![1.0f32; 1000];
        stream.block(true);
        for _ in 0..3 {
            stream.sum(member, &mut values, DeviceKind::F32).unwrap();
        }
        stream.block(false);
        member.settle().unwrap();
        assert!(values.iter().all(|&value| value == world.powi(3)));
    };
    on_all(sum, |_| {});
}

#[test]
fn share_of_time_in_sums_is_that_of_who_waits() {
    let members = form(2, |_| {});
    let (slow, fast) = (Stream::new(), Stream::new());
    slow.block(true);
    let mut values = [[1.0f32; 10]; 2];
    let [late, early] = &mut values;
    slow.sum(&members[0], late, DeviceKind::F32).unwrap();
    fast.sum(&members[1], early, DeviceKind::F32).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while members[1].summing_share() < 0.5 {
        assert!(Instant::now() < deadline, "it is seen to wait");
        std::thread::yield_now();
    }
    assert!(members[0].summing_share() < 0.1, "who is waited for computes");
    slow.block(false);
    together(members.iter().collect(), |member| member.settle().unwrap());
}

#[test]
fn sums_mix_with_operations_of_the_host() {
    let sum = |member: &Nccl, stream: &Stream| {
        let world = member.world() as f32;
        let mut buckets: Vec<Vec<f32>> = (0..30).map(|turn| vec![turn as f32; 100 + turn * 31]).collect();
        let mut pending = Vec::new();
        for (turn, bucket) in buckets.iter_mut().enumerate() {
            // The order of the two is this rank's own affair.
            let is_even = member.rank().0.is_multiple_of(2);
            if is_even {
                stream.sum(member, bucket, DeviceKind::F32).unwrap();
            }
            let mut short = [f64::from(member.rank().0)];
            member.all_reduce_f64(&mut short).unwrap();
            assert_eq!(short[0], f64::from(member.world() * (member.world() - 1) / 2));
            pending.push(member.start_all_reduce(vec![turn as f32; 500]).unwrap());
            if !is_even {
                stream.sum(member, bucket, DeviceKind::F32).unwrap();
            }
        }
        member.settle().unwrap();
        for (turn, (bucket, pending)) in buckets.iter().zip(pending).enumerate() {
            assert!(bucket.iter().all(|&value| value == turn as f32 * world));
            assert!(pending.wait().unwrap().iter().all(|&value| value == turn as f32 * world));
        }
    };
    on_all(sum, |_| {});
}

#[test]
fn groups_follow_each_other_and_leave_nothing() {
    for _ in 0..3 {
        let members = form(3, |_| {});
        let shared: Vec<_> =
            members.iter().map(|member| std::sync::Arc::downgrade(member.shared())).collect();
        together(members, |member| {
            let stream = Stream::new();
            let mut values = [1.0f32; 10];
            stream.sum(&member, &mut values, DeviceKind::F32).unwrap();
            member.settle().unwrap();
            assert_eq!(values, [3.0; 10]);
        });
        assert!(shared.iter().all(|shared| shared.strong_count() == 0));
    }
}

#[test]
fn group_is_known_to_sum_on_devices() {
    let members = form(2, |_| {});
    for member in &members {
        let member: &dyn Collective = member;
        member.on_device().unwrap().settle().unwrap();
    }
    assert!(crate::collective::Loopback::new(takuma_core::ids::Generation(1)).on_device().is_none());
}
