//! The history of slots: the law is that a flow whose endpoint is alive never moves.
//!
//! `prev` is the endpoint that owned the slot when it was last settled; further changes leave it alone;
//! when it is gone it becomes `cur`. See 4.2 of the design and `purelb_common::decide`.

use purelb_common::table::{FIRST_ENDPOINT, Slot};

use crate::observed::Action;

/// The agent's half of one slot after a change to `want`.
///
/// `alive` says whether an endpoint id may still be answered.
#[must_use]
pub fn next(old: Slot, want: u16, epoch: u32, alive: impl Fn(u16) -> bool) -> u32 {
    let (mut prev, mut unsettled) = (old.prev(), old.agent_unsettled());
    if want != old.cur() {
        if !old.unsettled(epoch) {
            prev = old.cur();
        }
        unsettled = true;
    }
    if prev >= FIRST_ENDPOINT && !alive(prev) {
        prev = want;
    }
    Slot::half(want, prev, unsettled)
}

/// Writes for the halves that differ, in runs.
#[must_use]
pub fn writes(base: u32, old: &[Slot], halves: &[u32]) -> Vec<Action> {
    let mut out: Vec<Action> = Vec::new();
    let mut open = false;
    for (i, (slot, half)) in old.iter().zip(halves).enumerate() {
        if slot.0 as u32 == *half {
            open = false;
            continue;
        }
        match out.last_mut() {
            Some(Action::WriteSlots { halves, .. }) if open => halves.push(*half),
            _ => out.push(Action::WriteSlots { base: base + i as u32, halves: vec![*half] }),
        }
        open = true;
    }
    out
}

/// Whether the block may settle: something is unsettled, and neither the last change nor the last
/// packet to anything but `cur` is younger than `settle` ticks.
#[must_use]
pub fn may_settle(slots: &[Slot], epoch: u32, changed: u32, now: u32, settle: u32) -> bool {
    if now.wrapping_sub(changed) <= settle {
        return false;
    }
    let mut any = false;
    for slot in slots.iter().filter(|s| s.unsettled(epoch)) {
        any = true;
        // Stamps have 24 bits; an age beyond half of that is a stamp from before the slot's life.
        let age = now.wrapping_sub(slot.stamp()) & 0x00ff_ffff;
        if slot.program_unsettled(epoch) && age <= settle {
            return false;
        }
    }
    any
}
