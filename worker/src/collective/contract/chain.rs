//! The chain operations: sums whose bits are those of one rank alone, however the lanes are split.

use std::sync::mpsc::channel;

use super::*;

/// Who holds how many of 8 lanes, for groups of 1 to 8.
const SPLITS: [&[u32]; 15] = [
    &[8],
    &[4, 4],
    &[5, 3],
    &[1, 7],
    &[7, 1],
    &[3, 3, 2],
    &[1, 6, 1],
    &[2, 2, 2, 2],
    &[1, 3, 3, 1],
    &[2, 2, 2, 1, 1],
    &[1, 1, 1, 1, 4],
    &[2, 2, 1, 1, 1, 1],
    &[2, 1, 1, 1, 1, 1, 1],
    &[1, 1, 1, 1, 1, 1, 2],
    &[1; 8],
];

/// A group whose ranks hold `split` of the lanes.
type SplitFactory = fn(&[u32]) -> Members;

fn loopback(split: &[u32]) -> Members {
    super::loopback(split.len())
}

fn ring(split: &[u32]) -> Members {
    rings(split, 2)
}

fn ring_over_tcp(split: &[u32]) -> Members {
    boxed(form(split.len(), |config| {
        config.use_local_sockets = false;
        config.lanes_by_rank = split.to_vec();
    }))
}

fn nccl(split: &[u32]) -> Members {
    boxed(crate::collective::nccl::fake::form(split.len(), |config| config.lanes_by_rank = split.to_vec()))
}

fn rings(split: &[u32], channels: usize) -> Members {
    boxed(form(split.len(), |config| {
        config.channels = channels;
        config.lanes_by_rank = split.to_vec();
    }))
}

/// Finite numbers with exponents all over f32's range, with zeros of both signs and subnormal ones, whose
/// sums stay finite.
fn wild(seed: usize, len: usize) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (sign, fraction) = ((state >> 63) as u32, (state >> 40) as u32 & 0x7f_ffff);
            let exponent = match state >> 59 & 0xf {
                // Subnormal, or nearly always so.
                0 => 0,
                // A zero.
                1 => return f32::from_bits(sign << 31),
                // Near 1, so that many lanes round against each other.
                2..=9 => 120 + (state >> 32) as u32 % 16,
                _ => 1 + (state >> 32) as u32 % 240,
            };
            f32::from_bits(sign << 31 | exponent << 23 | fraction)
        })
        .collect()
}

/// All lanes of bucket `bucket`, by their global number.
fn lanes_of(bucket: usize, count: usize, len: usize) -> Vec<Vec<f32>> {
    (0..count).map(|lane| wild(bucket * 1000 + lane, len)).collect()
}

/// The definition: one lane after the other, from the first on.
fn fold<T: Copy + std::ops::Add<Output = T>>(lanes: &[Vec<T>]) -> Vec<T> {
    (0..lanes[0].len())
        .map(|place| lanes[1..].iter().fold(lanes[0][place], |sum, lane| sum + lane[place]))
        .collect()
}

/// The lanes in `all` that `rank` of a group with `split` holds.
fn share<'a, T>(all: &'a [T], split: &[u32], rank: Rank) -> &'a [T] {
    let before: u32 = split[..rank.0 as usize].iter().sum();
    &all[before as usize..][..split[rank.0 as usize] as usize]
}

fn doubles(lanes: &[Vec<f32>]) -> Vec<Vec<f64>> {
    // The division leaves no low bits of the 53 at zero.
    lanes.iter().map(|lane| lane.iter().map(|&value| f64::from(value) / 3.0).collect()).collect()
}

fn buckets_are_the_fold_over_lanes(factory: SplitFactory, splits: &[&[u32]]) {
    let lens = [0, 1, 3, 1000, 32_768, 32_769, 200_003];
    let cases: Vec<_> = (0..).zip(lens).map(|(bucket, len)| lanes_of(bucket, 8, len)).collect();
    for &split in splits {
        let members = factory(split);
        let ranks = together(members.iter().collect(), |member| {
            let start = |lanes: &Vec<Vec<f32>>| {
                member.start_chain_reduce(share(lanes, split, member.rank()).to_vec()).unwrap()
            };
            let pending: Vec<_> = cases.iter().map(start).collect();
            pending.into_iter().map(|pending| pending.wait().unwrap()).collect::<Vec<_>>()
        });
        for sums in ranks {
            for (lanes, sum) in cases.iter().zip(&sums) {
                assert!(bits(sum) == bits(&fold(lanes)), "{split:?}, {} values", sum.len());
            }
        }
    }
}

fn doubles_are_the_fold_over_lanes(factory: SplitFactory, splits: &[&[u32]]) {
    let cases: Vec<_> = [0, 1, 2, 513, 40_000].map(|len| doubles(&lanes_of(len, 8, len))).into();
    for &split in splits {
        let members = factory(split);
        let ranks = together(members.iter().collect(), |member| {
            let sum = |lanes: &Vec<Vec<f64>>| {
                let mut out = vec![f64::NAN; lanes[0].len()];
                let own = share(lanes, split, member.rank()).concat();
                member.chain_reduce_f64(&own, &mut out).unwrap();
                out
            };
            cases.iter().map(sum).collect::<Vec<_>>()
        });
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for sums in ranks {
            for (lanes, sum) in cases.iter().zip(&sums) {
                assert!(bits(sum) == bits(&fold(lanes)), "{split:?}, {} values", sum.len());
            }
        }
    }
}

fn chains_overlap_with_other_operations(factory: SplitFactory, splits: &[&[u32]]) {
    for &split in splits {
        let members = factory(split);
        together(members.iter().collect(), |member| {
            let world = member.world() as f32;
            let mut pending = Vec::new();
            for turn in 0..20 {
                let lanes = lanes_of(turn, 8, 700 + turn * 977);
                let own = share(&lanes, split, member.rank());
                let chain = member.start_chain_reduce(own.to_vec()).unwrap();
                let plain = member.start_all_reduce(vec![1.0; 300 + turn * 501]).unwrap();
                let mut sum = [0.0];
                let ones = vec![1.0; own.len()];
                member.chain_reduce_f64(&ones, &mut sum).unwrap();
                assert_eq!(sum, [8.0]);
                pending.push((lanes, chain, plain));
            }
            for (lanes, chain, plain) in pending {
                assert!(bits(&chain.wait().unwrap()) == bits(&fold(&lanes)));
                assert!(plain.wait().unwrap().iter().all(|&value| value == world));
            }
        });
    }
}

fn given_buffers_come_back(factory: SplitFactory, splits: &[&[u32]]) {
    for &split in splits {
        let members = factory(split);
        together(members.iter().collect(), |member| {
            let lanes = vec![vec![1.0f32; 40_000]; split[member.rank().0 as usize] as usize];
            let memory = |lanes: &[Vec<f32>]| lanes.iter().map(|lane| lane.as_ptr()).collect::<Vec<_>>();
            let given = memory(&lanes);
            let back = member.start_chain_reduce(lanes).unwrap().wait_lanes().unwrap();
            assert_eq!(memory(&back), given);
            assert_eq!(back[0][39_999], 8.0);
            let sum = member.start_chain_reduce(back).unwrap().wait().unwrap();
            assert_eq!(sum.as_ptr(), given[0]);
        });
    }
}

fn wrong_lanes_are_refused_and_harm_nobody(factory: SplitFactory, splits: &[&[u32]]) {
    for &split in splits {
        let members = factory(split);
        together(members.iter().collect(), |member| {
            let count = split[member.rank().0 as usize] as usize;
            let mut uneven = vec![vec![1.0; 5]; count.max(2)];
            uneven[1].pop();
            for lanes in [Vec::new(), uneven] {
                assert_is_local(&member.start_chain_reduce(lanes).unwrap_err());
            }
            assert_is_local(&member.chain_reduce_f64(&[], &mut [0.0]).unwrap_err());
            assert_is_local(&member.chain_reduce_f64(&vec![1.0; count], &mut []).unwrap_err());
            assert_is_local(&member.chain_reduce_f64(&vec![1.0; count * 2 + 1], &mut [0.0; 2]).unwrap_err());
            member.barrier().unwrap();
        });
    }
}

fn assert_is_local(error: &CollectiveError) {
    assert!(matches!(error, CollectiveError::Local { .. }), "{error}");
    assert!(error.to_string().starts_with("chain_reduce"), "{error}");
}

fn abort_ends_chains_now_and_later(factory: SplitFactory, splits: &[&[u32]]) {
    for &split in splits {
        let members = factory(split);
        let own = vec![vec![1.0; 100_000]; split[0] as usize];
        // The others never join in, so with more than one rank this waits.
        let pending = members[0].start_chain_reduce(own.clone()).unwrap();
        let handle = members[0].abort_handle();
        std::thread::scope(|scope| {
            let (tell, told) = channel();
            scope.spawn(move || tell.send(pending.wait()).unwrap());
            handle.abort("the operator said so");
            match told.recv_timeout(Duration::from_secs(2)).unwrap() {
                Ok(_) => assert_eq!(split.len(), 1),
                Err(error) => assert_is_abort(&error),
            }
        });
        assert_is_abort(&members[0].start_chain_reduce(own).unwrap_err());
        assert_is_abort(&members[0].chain_reduce_f64(&vec![1.0; split[0] as usize], &mut [0.0]).unwrap_err());
    }
}

fn timeout_can_be_set(factory: SplitFactory, splits: &[&[u32]]) {
    for &split in splits {
        let members = factory(split);
        together(members.iter().collect(), |member| {
            for seconds in [20, 5, 3600] {
                member.set_timeout(Duration::from_secs(seconds));
                member.barrier().unwrap();
            }
        });
    }
}

macro_rules! chain_contract {
    ($implementation:ident, $splits:expr; $($behaviour:ident)*) => {
        mod $implementation {
            $(#[test]
            fn $behaviour() {
                super::$behaviour(super::$implementation, &$splits);
            })*
        }
    };
    ($implementation:ident, $splits:expr) => {
        chain_contract! { $implementation, $splits;
            buckets_are_the_fold_over_lanes
            doubles_are_the_fold_over_lanes
            chains_overlap_with_other_operations
            given_buffers_come_back
            wrong_lanes_are_refused_and_harm_nobody
            abort_ends_chains_now_and_later
            timeout_can_be_set
        }
    };
}
chain_contract!(loopback, [&[8]]);
chain_contract!(ring, super::SPLITS);
chain_contract!(ring_over_tcp, [&[5, 3], &[3, 3, 2], &[1; 8]]);
chain_contract!(nccl, [&[8], &[3, 3, 2]]);

#[test]
fn other_number_of_lanes_than_agreed_is_refused() {
    for split in [&[8][..], &[5, 3]] {
        together(ring(split).iter().collect(), |member| {
            assert_is_local(&member.start_chain_reduce(vec![vec![1.0]; 4]).unwrap_err());
            assert_is_local(&member.chain_reduce_f64(&[1.0; 4], &mut [0.0]).unwrap_err());
            member.barrier().unwrap();
        });
    }
}

/// What makes the chain necessary, and shows that the numbers of this suite could tell.
#[test]
fn plain_sums_depend_on_the_split() {
    let lanes = lanes_of(0, 8, 10_000);
    let expected = bits(&fold(&lanes));
    let mut agreeing: Vec<&[u32]> = Vec::new();
    for split in SPLITS {
        let sums = together(ring(split).iter().collect(), |member| {
            let own = fold(share(&lanes, split, member.rank()));
            member.start_all_reduce(own).unwrap().wait().unwrap()
        });
        if bits(&sums[0]) == expected {
            agreeing.push(split);
        }
    }
    // One rank alone sums lane after lane, too, and a last lane may as well be added from the left.
    assert_eq!(agreeing, [&[8][..], &[7, 1]]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_split_channels_and_lengths_give_the_fold(
        split in prop::collection::vec(1u32..=3, 1..=6),
        channels in 1usize..=4,
        lens in prop::collection::vec(0usize..90_000, 1..5),
    ) {
        let count = split.iter().sum::<u32>() as usize;
        let cases: Vec<_> = (0..).zip(&lens).map(|(bucket, &len)| lanes_of(bucket, count, len)).collect();
        let members = rings(&split, channels);
        let ranks = together(members.iter().collect(), |member| {
            let start = |lanes: &Vec<Vec<f32>>| {
                member.start_chain_reduce(share(lanes, &split, member.rank()).to_vec()).unwrap()
            };
            let pending: Vec<_> = cases.iter().map(start).collect();
            pending.into_iter().map(|pending| pending.wait().unwrap()).collect::<Vec<_>>()
        });
        for sums in ranks {
            for (lanes, sum) in cases.iter().zip(&sums) {
                prop_assert!(bits(sum) == bits(&fold(lanes)));
            }
        }
    }
}
