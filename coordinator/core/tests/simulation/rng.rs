//! [`Rng`]: the one source of chance in a simulated world. SplitMix64 (Steele, Lea and Flood 2014), from a seed.

/// Numbers that depend on the seed and on how many were drawn before.
#[derive(Debug, Clone)]
pub struct Rng(u64);

/// Spreads the bits of a number over all 64.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// In `low..high`.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// One of them, if there is any.
    pub fn pick<T: Copy>(&mut self, among: &[T]) -> Option<T> {
        let place = self.next() as usize % among.len().max(1);
        among.get(place).copied()
    }
}
