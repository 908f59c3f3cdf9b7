//! The fuzzer's bytes as decisions, with the interface of the seeded chance that the laws' own models use.

/// Bytes that are used up one after the other, then a seeded generator.
#[derive(Debug)]
pub struct Chance {
    bytes: Vec<u8>,
    used: usize,
    seed: u64,
}

impl Chance {
    /// A digit stands for its value, so that a corpus can be written by hand.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), used: 0, seed: 1 }
    }

    /// Everything was used.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used >= self.bytes.len()
    }

    /// The next byte.
    pub fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.used)?;
        self.used += 1;
        Some(byte)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        let n = n.max(1);
        let Some(first) = self.byte() else { return self.generated() % n };
        let digit = u64::from(first.wrapping_sub(b'0'));
        // What no byte can say alone takes two.
        let more = if n > 256 { u64::from(self.byte().unwrap_or(b'0').wrapping_sub(b'0')) } else { 0 };
        (digit | more << 8) % n
    }

    /// True so many times in a thousand.
    pub fn permille(&mut self, p: u64) -> bool {
        match self.byte() {
            Some(byte) => u64::from(byte.wrapping_sub(b'0')) * 1000 < p * 256,
            None => self.generated() % 1000 < p,
        }
    }

    /// One of them.
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        from.get(self.below(from.len() as u64) as usize).cloned()
    }

    /// Another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// splitmix64
    fn generated(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
