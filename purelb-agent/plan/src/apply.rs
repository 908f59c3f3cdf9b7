//! An in-memory twin of the maps, and what an [`Action`] does to it. The agent keeps its picture of the
//! maps current with [`apply`]; the tests run the decision itself on a [`Twin`].

use purelb_common::table::{Service, Slot};

use crate::observed::{Action, Observed, Slots};

/// Does to `observed` what the real executor does to the maps, slots apart.
pub fn apply(observed: &mut Observed, action: &Action) {
    match action {
        Action::PutEndpoint(family, id, entry) => drop(observed.endpoints.insert((*family, *id), *entry)),
        Action::PutService(frontend, service) => drop(observed.services.insert(*frontend, *service)),
        Action::DeleteService(frontend) => drop(observed.services.remove(frontend)),
        Action::PutVip(vip, flags) => drop(observed.vips.insert(*vip, *flags)),
        Action::DeleteVip(vip) => drop(observed.vips.remove(vip)),
        Action::PutRange(id, range) => drop(observed.ranges.insert((*id, *range), 1)),
        Action::DeleteRange(id, range) => drop(observed.ranges.remove(&(*id, *range))),
        Action::PutReverse(backend, vip, port) => drop(observed.reverse.insert(*backend, (*vip, *port))),
        Action::DeleteReverse(backend) => drop(observed.reverse.remove(backend)),
        Action::PutCluster(net) => drop(observed.cluster.insert(*net)),
        Action::DeleteCluster(net) => drop(observed.cluster.remove(net)),
        Action::WriteSlots { .. } | Action::CopySlots { .. } | Action::Synchronize => {}
    }
}

/// The maps with their slots.
#[derive(Clone, Debug, Default)]
pub struct Twin {
    /// All but the slots.
    pub observed: Observed,
    slots: Vec<Slot>,
}

impl Slots for Twin {
    fn block(&self, service: &Service) -> Vec<Slot> {
        (service.base..=service.base + service.mask).map(|i| self.slot(i)).collect()
    }
}

impl Twin {
    /// Empty maps with so many slots, and room for any number of source ranges.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let observed = Observed { capacity, range_capacity: u32::MAX, ..Observed::default() };
        Self { observed, slots: Vec::new() }
    }

    /// One slot; 0 where none was ever written.
    #[must_use]
    pub fn slot(&self, index: u32) -> Slot {
        self.slots.get(index as usize).copied().unwrap_or_default()
    }

    /// Stores a slot.
    pub fn put(&mut self, index: u32, slot: Slot) {
        let index = index as usize;
        if index >= self.slots.len() {
            self.slots.resize(index + 1, Slot(0));
        }
        if let Some(at) = self.slots.get_mut(index) {
            *at = slot;
        }
    }

    /// Carries out an action.
    pub fn apply(&mut self, action: &Action) {
        match action {
            Action::WriteSlots { base, halves } => {
                for (index, half) in (*base..).zip(halves) {
                    let slot = self.slot(index);
                    self.put(index, Slot(slot.0 & !0xffff_ffff | u64::from(*half)));
                }
            }
            Action::CopySlots { base, slots } => (*base..).zip(slots).for_each(|(index, slot)| self.put(index, *slot)),
            other => apply(&mut self.observed, other),
        }
    }
}
