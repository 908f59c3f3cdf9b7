//! Incremental checksum arithmetic, RFC 1624 (eqn. 3).

/// Folds a 32-bit sum of one's complement words to 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Sum to add to `!checksum` when `old` becomes `new` (both as on the wire, even length, N <= 32).
#[must_use]
#[inline(always)]
pub fn delta<const N: usize>(old: [u8; N], new: [u8; N]) -> u32 {
    let mut sum = 0u32;
    let mut i = 0;
    while i + 1 < N {
        sum += u32::from(!u16::from_ne_bytes([old[i], old[i + 1]]));
        sum += u32::from(u16::from_ne_bytes([new[i], new[i + 1]]));
        i += 2;
    }
    sum
}

/// The checksum field (as read from the wire, native order) after a change of `delta`.
#[must_use]
#[inline(always)]
pub const fn apply(checksum: u16, delta: u32) -> u16 {
    !fold(!checksum as u32 + fold(delta) as u32)
}
