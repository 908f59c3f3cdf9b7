//! An in-memory executor of [`Action`]s: the tests' twin of the maps.

use purelb_common::table::Slot;

use crate::observed::{Action, Observed};

/// Does to `observed` what the real executor does to the maps.
pub fn apply(observed: &mut Observed, action: &Action) {
    match action {
        Action::PutEndpoint(family, id, entry) => drop(observed.endpoints.insert((*family, *id), *entry)),
        Action::WriteSlots { base, halves } => {
            for (&first, block) in observed.blocks.range_mut(..=base).next_back().into_iter() {
                for (slot, half) in block.iter_mut().skip((base - first) as usize).zip(halves) {
                    *slot = Slot(slot.0 & !0xffff_ffff | u64::from(*half));
                }
            }
        }
        Action::CopySlots { base, slots } => drop(observed.blocks.insert(*base, slots.clone())),
        Action::PutService(frontend, service) => drop(observed.services.insert(*frontend, *service)),
        Action::DeleteService(frontend) => {
            if let Some(service) = observed.services.remove(frontend) {
                observed.blocks.remove(&service.base);
            }
        }
        Action::PutVip(vip, flags) => drop(observed.vips.insert(*vip, *flags)),
        Action::DeleteVip(vip) => drop(observed.vips.remove(vip)),
        Action::PutRange(id, range) => drop(observed.ranges.insert((*id, *range), 1)),
        Action::DeleteRange(id, range) => drop(observed.ranges.remove(&(*id, *range))),
        Action::PutReverse(backend, vip, port) => drop(observed.reverse.insert(*backend, (*vip, *port))),
        Action::DeleteReverse(backend) => drop(observed.reverse.remove(backend)),
        Action::Synchronize => {}
    }
}
