//! One VIP, port and protocol: its block of slots and its value, from what they are to what they should be.

use std::collections::BTreeSet;

use purelb_common::table::{self, PASS, SERVICE_RANGES, Slot};

use crate::desired::Front;
use crate::observed::{Action, Frontend, Slots};
use crate::plan::Settings;
use crate::slots::{self, Step};

/// What is known about it.
pub(crate) struct Job<'a> {
    pub(crate) frontend: &'a Frontend,
    pub(crate) front: &'a Front,
    /// What is new begins with kube-proxy as its settled owner.
    pub(crate) live: bool,
    pub(crate) settings: &'a Settings,
    pub(crate) now: u32,
    pub(crate) id: u32,
    pub(crate) base: u32,
    /// The endpoint id of every slot.
    pub(crate) want: Vec<u16>,
    /// Ids that may still be answered.
    pub(crate) alive: BTreeSet<u16>,
}

impl Job<'_> {
    /// Slots first, then the service's value that makes them visible. Returns the value and the agent's halves
    /// as they will be.
    pub(crate) fn run(
        &self,
        old: Option<&table::Service>,
        slots: &dyn Slots,
        actions: &mut Vec<Action>,
    ) -> (table::Service, Vec<u32>) {
        match old {
            None => self.first(actions),
            Some(old) if self.base == old.base => self.change(old, &slots.block(old), actions),
            Some(old) => self.grow(old, &slots.block(old), actions),
        }
    }

    fn value(&self, epoch: u32, settled: u32, changed: u32) -> table::Service {
        let ticks = |seconds: u32| u64::from(seconds) * u64::from(self.settings.milliticks) / 1000;
        table::Service {
            id: self.id,
            flags: if self.front.ranges.is_empty() { 0 } else { SERVICE_RANGES },
            base: self.base,
            mask: self.want.len() as u32 - 1,
            epoch,
            changed,
            affinity: self.front.affinity.map_or(0, |s| ticks(s).clamp(1, u64::from(u32::MAX)) as u32),
            settled,
        }
    }

    /// The epoch begins at the tick, so what pins remember of an earlier life of this VIP and port is void.
    fn first(&self, actions: &mut Vec<Action>) -> (table::Service, Vec<u32>) {
        let half =
            |w: &u16| if self.live && *w != PASS { Slot::half(*w, PASS, true) } else { Slot::half(*w, *w, false) };
        let halves: Vec<u32> = self.want.iter().map(half).collect();
        let slots = halves.iter().map(|h| Slot(u64::from(*h))).collect();
        actions.push(Action::CopySlots { base: self.base, slots });
        let value = self.value(self.now, self.now, self.now);
        actions.push(Action::PutService(*self.frontend, value));
        (value, halves)
    }

    fn change(&self, old: &table::Service, block: &[Slot], actions: &mut Vec<Action>) -> (table::Service, Vec<u32>) {
        let alive = |id| self.alive.contains(&id);
        let mut halves: Vec<u32> = block.iter().zip(&self.want).map(|(s, w)| slots::next(*s, *w, alive)).collect();
        if block.iter().zip(&self.want).any(|(s, w)| s.cur() != *w) {
            // The time of the change first: UDP that PASS owned stays with kube-proxy for a while after it. An
            // attempt to settle that is under way begins anew.
            let epoch = if old.span() == 0 { old.epoch } else { old.epoch.wrapping_add(1) };
            let value = self.value(epoch, old.settled, self.now);
            actions.push(Action::PutService(*self.frontend, value));
            actions.extend(slots::writes(self.base, block, &halves));
            return (value, halves);
        }
        let mut value = self.value(old.epoch, old.settled, old.changed);
        let step = slots::step(block, old, self.now, self.settings.settle);
        match step {
            Step::Stay => {}
            Step::Begin => value.epoch = old.epoch.wrapping_add(1),
            Step::Settle => {
                value.settled = old.epoch;
                halves = self.want.iter().map(|w| Slot::half(*w, *w, false)).collect();
            }
        }
        actions.extend(slots::writes(self.base, block, &halves));
        if value != *old {
            actions.push(Action::PutService(*self.frontend, value));
        }
        if step == Step::Begin {
            actions.push(Action::Synchronize);
        }
        (value, halves)
    }

    /// A longer block. All of it is unsettled: a mark that a program makes in the old block meanwhile is lost,
    /// and nothing else than the pin behind it says where that flow went.
    fn grow(&self, old: &table::Service, block: &[Slot], actions: &mut Vec<Action>) -> (table::Service, Vec<u32>) {
        let alive = |id| self.alive.contains(&id);
        let half = |(i, w): (usize, &u16)| {
            let slot = block.get(i & old.mask as usize).copied().unwrap_or_default();
            slots::next(slot, *w, alive) | Slot::half(0, 0, true)
        };
        let halves: Vec<u32> = self.want.iter().enumerate().map(half).collect();
        let epoch = if old.span() == 0 { old.epoch } else { old.epoch.wrapping_add(1) };
        let slots = halves.iter().map(|h| Slot(u64::from(*h))).collect();
        actions.push(Action::CopySlots { base: self.base, slots });
        let value = self.value(epoch, old.settled, self.now);
        actions.push(Action::PutService(*self.frontend, value));
        actions.push(Action::Synchronize);
        (value, halves)
    }
}
