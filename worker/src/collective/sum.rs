//! Adding what came in, and seeing numbers as the bytes that travel.
//!
//! The wire is little-endian and so is every machine that takuma runs on; buckets travel as they lie in
//! memory.

use std::ops::Range;

#[cfg(target_endian = "big")]
compile_error!("the ring sends numbers as they lie in memory, which must be little-endian");

/// Adds `addend` to `sum`, position by position: `sum[i] = sum[i] + addend[i]`.
pub(super) fn add(sum: &mut [f32], addend: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor was just seen to have AVX2.
        unsafe { add_avx2(sum, addend) };
        return;
    }
    add_portable(sum, addend);
}

/// [`add_portable`] compiled for 256-bit registers. Lane-wise addition rounds as single additions do, so
/// the bits do not depend on which of the two ran.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_avx2(sum: &mut [f32], addend: &[f32]) {
    add_portable(sum, addend);
}

#[inline(always)]
fn add_portable(sum: &mut [f32], addend: &[f32]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += *addend;
    }
}

/// Values of a lane that are added at once: they stay in the second-level cache from lane to lane.
const CHAIN_BLOCK_VALUES: usize = 32 * 1024;

/// Leaves the chain over `lanes` at `span` in the first of them: `((l0 + l1) + l2) + ...`, each addition
/// rounded to f32. All lanes must reach to the end of `span`.
pub(super) fn chain(lanes: &mut [Vec<f32>], span: Range<usize>) {
    let Some((sum, rest)) = lanes.split_first_mut() else { return };
    for start in span.clone().step_by(CHAIN_BLOCK_VALUES) {
        let block = start..span.end.min(start + CHAIN_BLOCK_VALUES);
        for lane in &*rest {
            add(&mut sum[block.clone()], &lane[block.clone()]);
        }
    }
}

/// The bytes of `values`.
pub(super) fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: the memory of an f32 slice is initialised, lives as long as the slice, has no padding, and
    // u8 has no demands on alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to be written.
pub(super) fn bytes_of_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; the borrow is exclusive and every bit pattern is a valid f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// A number that can be summed in rank order.
pub(super) trait Value: Copy {
    /// Bytes on the wire.
    const BYTES: usize;

    /// Appends the little-endian bytes of `self`.
    fn put(self, bytes: &mut Vec<u8>);

    /// The sum of `self` and the number in `bytes`, which are [`Value::BYTES`] long.
    fn plus(self, bytes: &[u8]) -> Self;

    /// The number in `bytes`, which are [`Value::BYTES`] long.
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! value {
    ($type:ty, $bytes:literal) => {
        impl Value for $type {
            const BYTES: usize = $bytes;

            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }

            fn plus(self, bytes: &[u8]) -> Self {
                self + Self::get(bytes)
            }

            fn get(bytes: &[u8]) -> Self {
                let mut array = [0; $bytes];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }
        }
    };
}
value!(f32, 4);
value!(f64, 8);

/// Writes into `values` the sum of the equally long blocks in `blocks`, in the order in which they lie.
pub(super) fn sum_blocks<T: Value>(values: &mut [T], blocks: &[u8]) {
    let block_bytes = values.len() * T::BYTES;
    if block_bytes == 0 {
        return;
    }
    for (place, block) in blocks.chunks_exact(block_bytes).enumerate() {
        for (value, bytes) in values.iter_mut().zip(block.chunks_exact(T::BYTES)) {
            *value = if place == 0 { T::get(bytes) } else { value.plus(bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_and_portable_addition_give_the_same_bits() {
        let left: Vec<f32> = (0..1003).map(|i| (i as f32).sin() * 10f32.powi(i % 60 - 30)).collect();
        let right: Vec<f32> = (0..1003).map(|i| (i as f32).cos() * 10f32.powi(i % 37 - 20)).collect();
        let (mut chosen, mut portable) = (left.clone(), left.clone());
        add(&mut chosen, &right);
        add_portable(&mut portable, &right);
        assert_eq!(bytes_of(&chosen), bytes_of(&portable));
        assert_eq!(chosen[17], left[17] + right[17]);
    }

    #[test]
    fn chain_adds_lane_after_lane_within_the_span_alone() {
        let len = 2 * CHAIN_BLOCK_VALUES + 9;
        let mut lanes: Vec<Vec<f32>> = [1e8, 1.0, -1e8, 0.25].map(|value| vec![value; len]).into();
        chain(&mut lanes, 3..len - 1);
        let expected = ((1e8f32 + 1.0) + -1e8) + 0.25;
        assert_eq!(lanes[0][..3], [1e8; 3]);
        assert!(lanes[0][3..len - 1].iter().all(|&value| value == expected));
        assert_eq!(lanes[0][len - 1], 1e8);
        assert_eq!(lanes[1][len - 1], 1.0);
    }

    #[test]
    fn blocks_are_summed_in_their_order() {
        let mut blocks = Vec::new();
        for value in [1e8f32, 1.0, -1e8] {
            value.put(&mut blocks);
        }
        let mut values = [0f32];
        sum_blocks(&mut values, &blocks);
        assert_eq!(values[0], (1e8f32 + 1.0) + -1e8);
    }
}
