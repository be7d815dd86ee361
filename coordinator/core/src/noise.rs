//! The counter-based generator behind everything random: equal keys give equal numbers, on any
//! machine, in any order, however many workers there are.
//!
//! ChaCha8 (Bernstein 2008) with the key as seed: `rand_chacha` promises the same stream on every
//! platform and in every later version.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream of numbers is for. The discriminants are part of every run's identity: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Order of a stream's images; keyed by epoch and stream.
    DataOrder = 1,
    /// Generator input; keyed by step and slot.
    Noise = 2,
    /// Generator input of the fixed sample grid; keyed by cell.
    GridNoise = 3,
    /// Initial weights; keyed by the parameter's index in its model and the model's number.
    Weights = 4,
    /// The one shuffle of `dataset prepare`.
    DatasetShuffle = 5,
    /// Drawn faces of `dataset synth`; keyed by image.
    SynthImage = 6,
    /// Entries of the ledger; keyed by step (as seed), slot and image.
    Ledger = 7,
}

/// A stream of numbers that is a pure function of its key.
#[derive(Debug, Clone)]
pub struct CounterRng(ChaCha8Rng);

impl CounterRng {
    /// The stream for (`seed`, `purpose`, `a`, `b`).
    #[must_use]
    pub fn new(seed: u64, purpose: Purpose, a: u64, b: u64) -> Self {
        let mut key = [0u8; 32];
        for (place, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, a, b]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Uniform in `[0, 1)`, 24 bits: every value is exact in f32.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `0..bound`, without bias (Lemire 2019, "Fast random integer generation in an interval").
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "no number lies below 0");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.0.next_u32()) * u64::from(bound);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// Fills `out` with standard normal numbers (Box and Muller 1958, computed in f64).
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for pair in out.chunks_mut(2) {
            // In (0, 1], so that the logarithm is finite.
            let u = (f64::from(self.0.next_u32()) + 1.0) / 4_294_967_296.0;
            let v = f64::from(self.0.next_u32()) / 4_294_967_296.0;
            let radius = (-2.0 * u.ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
            pair[0] = (radius * cos) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * sin) as f32;
            }
        }
    }

    /// A permutation of `0..len` (Fisher and Yates).
    ///
    /// # Panics
    /// If `len` does not fit 32 bits.
    #[must_use]
    pub fn permutation(&mut self, len: u64) -> Vec<u32> {
        let len = u32::try_from(len).expect("a stream holds fewer than 2^32 images");
        let mut order: Vec<u32> = (0..len).collect();
        for last in (1..len).rev() {
            order.swap(last as usize, self.below(last + 1) as usize);
        }
        order
    }
}

/// Generator input for one slot at one step: uniform in `[-1, 1)`, f32.
///
/// # Shapes
/// `out`: `[noise_len]`.
pub fn fill_slot_noise(seed: u64, step: u64, slot: u32, out: &mut [f32]) {
    fill_uniform(CounterRng::new(seed, Purpose::Noise, step, u64::from(slot)), out);
}

/// Generator input for one cell of the fixed sample grid: uniform in `[-1, 1)`, f32.
///
/// # Shapes
/// `out`: `[noise_len]`.
pub fn fill_grid_noise(seed: u64, cell: u32, out: &mut [f32]) {
    fill_uniform(CounterRng::new(seed, Purpose::GridNoise, u64::from(cell), 0), out);
}

fn fill_uniform(mut rng: CounterRng, out: &mut [f32]) {
    for value in out {
        *value = rng.uniform_f32() * 2.0 - 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_never_changes_between_versions() {
        // Written down once. If this fails, every stored run would continue with other numbers.
        let mut rng = CounterRng::new(1, Purpose::Noise, 2, 3);
        let first: Vec<u32> = (0..4).map(|_| rng.next_u32()).collect();
        assert_eq!(first, STREAM_OF_1_NOISE_2_3);
    }
    const STREAM_OF_1_NOISE_2_3: [u32; 4] = [1_188_757_468, 1_797_758_378, 378_545_875, 933_703_055];

    #[test]
    fn normals_have_mean_zero_and_deviation_one() {
        let mut values = vec![0.0f32; 200_001];
        CounterRng::new(7, Purpose::Weights, 0, 0).fill_normal(&mut values);
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
    }

    #[test]
    fn permutation_holds_each_number_once() {
        let mut order = CounterRng::new(3, Purpose::DataOrder, 0, 0).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn noise_differs_between_slots_and_steps() {
        let noise = |step, slot| {
            let mut out = [0.0f32; 8];
            fill_slot_noise(9, step, slot, &mut out);
            assert!(out.iter().all(|x| (-1.0..1.0).contains(x)));
            out
        };
        assert_eq!(noise(4, 5), noise(4, 5));
        assert_ne!(noise(4, 5), noise(5, 4));
        assert_ne!(noise(4, 5), noise(4, 6));
    }
}
