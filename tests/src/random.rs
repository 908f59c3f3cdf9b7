//! Chances that can be repeated.

/// xorshift64 (Marsaglia): the same numbers again from the same seed, which must not be zero.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next one, below that limit.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) % limit
    }
}
