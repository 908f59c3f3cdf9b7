//! Incremental checksum arithmetic, RFC 1624 (eqn. 3), in words as wide as the machine's.

/// Sum to add to `!checksum` when the words `old` become `new` (both as on the wire, native order).
/// Sums may be added to each other, dozens of them, before [`apply`] folds them.
#[must_use]
#[inline(always)]
pub const fn delta(old: u64, new: u64) -> u64 {
    halves(!old) + halves(new)
}

const fn halves(word: u64) -> u64 {
    (word & 0xffff_ffff) + (word >> 32)
}

/// Folds a sum to 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = halves(sum);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum field (as read from the wire, native order) after a change of `delta`.
#[must_use]
#[inline(always)]
pub const fn apply(checksum: u16, delta: u64) -> u16 {
    !fold(!checksum as u64 + delta)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])));
        !fold(words.sum())
    }

    #[test]
    fn an_update_is_the_sum_from_scratch() {
        let mut bytes = *b"An even number of bytes, but not the same!";
        for (seed, at) in [(0, 0), (7, 8), (0xffff, 16), (u64::MAX, 24), (0x0123_4567_89ab_cdef, 32)] {
            let before = sum(&bytes);
            let old: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
            let new = u64::from_ne_bytes(old).wrapping_mul(seed).wrapping_add(seed);
            bytes[at..at + 8].copy_from_slice(&new.to_ne_bytes());
            assert_eq!(apply(before, delta(u64::from_ne_bytes(old), new)), sum(&bytes));
        }
    }
}
