//! Which part of the flat slot array belongs to which service: aligned power-of-two blocks.

use std::collections::BTreeMap;

/// Used blocks: base -> length. The first 1,024 slots are never given away, so base 0 means "none".
#[derive(Debug)]
pub struct Blocks {
    used: BTreeMap<u32, u32>,
    capacity: u32,
    /// Where the search for a length begins: nothing below is free for it.
    hints: BTreeMap<u32, u32>,
}

impl Blocks {
    /// From the blocks in use.
    #[must_use]
    pub fn new(capacity: u32, used: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let mut used: BTreeMap<u32, u32> = used.into_iter().collect();
        used.insert(0, purelb_common::table::MIN_BLOCK);
        Self { used, capacity, hints: BTreeMap::new() }
    }

    /// First free aligned block of `length` slots, or `None` when the array is full. Blocks given back
    /// in this plan are not reused by it: readers may still be in them.
    pub fn take(&mut self, length: u32) -> Option<u32> {
        let mut base = self.hints.get(&length).copied().unwrap_or(0);
        while base.checked_add(length)? <= self.capacity {
            let blocker = self.used.range(..base + length).next_back().filter(|(b, l)| *b + *l > base);
            match blocker {
                None => {
                    self.used.insert(base, length);
                    self.hints.insert(length, base + length);
                    return Some(base);
                }
                Some((b, l)) => base = (b + l).next_multiple_of(length).max(base + length),
            }
        }
        None
    }
}
