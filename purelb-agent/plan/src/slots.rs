//! The history of slots: the law is that a flow whose endpoint is alive never moves.
//!
//! `prev` is the endpoint that owned the slot when it was last settled; further changes leave it alone;
//! when it is gone it becomes `cur`. See 4.2 of the design and `purelb_common::decide`.
//!
//! A service settles in two looks, so that no packet between two writes can make a pin that is then void:
//! first its epoch grows (pins and marks made from now on tell themselves apart), and when every program
//! has seen that, and nobody has gone elsewhere meanwhile, the slots forget `prev` and older pins end.

use purelb_common::table::{DROP, FIRST_ENDPOINT, Service, Slot};

use crate::observed::Action;

/// The agent's half of one slot after a change to `want`.
///
/// `alive` says whether an endpoint id may still be answered.
#[must_use]
pub fn next(old: Slot, want: u16, alive: impl Fn(u16) -> bool) -> u32 {
    let (mut prev, mut unsettled) = (old.prev(), old.agent_unsettled());
    if want != old.cur() {
        if unsettled {
            // Only the settled owner is remembered.
        } else if old.cur() == DROP {
            // Nobody had the slot, so there is no flow to keep.
            prev = want;
        } else {
            (prev, unsettled) = (old.cur(), true);
        }
    }
    if prev >= FIRST_ENDPOINT && !alive(prev) {
        prev = want;
    }
    Slot::half(want, prev, unsettled)
}

/// One write from the first half that differs to the last; what lies between is written again as it is,
/// which nobody notices: only the agent writes that half.
#[must_use]
pub fn writes(base: u32, old: &[Slot], halves: &[u32]) -> Option<Action> {
    let differs = |i: &usize| old.get(*i).map(|slot| slot.0 as u32) != halves.get(*i).copied();
    let first = (0..halves.len()).find(differs)?;
    let last = (0..halves.len()).rfind(differs)?;
    Some(Action::WriteSlots { base: base + first as u32, halves: halves.get(first..=last)?.to_vec() })
}

/// What the passing of time does to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Stay,
    /// The epoch grows.
    Begin,
    /// `prev` becomes `cur`, pins and marks of older epochs end.
    Settle,
}

/// Whether the block may settle: something is unsettled, and neither the last change nor the last
/// packet to anything but `cur` is younger than `settle` ticks.
#[must_use]
pub fn step(slots: &[Slot], service: &Service, now: u32, settle: u32) -> Step {
    if now.wrapping_sub(service.changed) <= settle {
        return Step::Stay;
    }
    let begun = service.span() != 0;
    let (mut unsettled, mut since) = (false, false);
    for slot in slots.iter().filter(|s| s.unsettled(service)) {
        unsettled = true;
        // Stamps have 24 bits; an age beyond half of that is a stamp from before the slot's life.
        let age = now.wrapping_sub(slot.stamp()) & 0x00ff_ffff;
        if slot.program_unsettled(service) && age <= settle {
            return Step::Stay;
        }
        since |= slot.marked_now(service);
    }
    match (begun, unsettled) {
        (true, _) if !since => Step::Settle,
        (_, true) => Step::Begin,
        _ => Step::Stay,
    }
}
