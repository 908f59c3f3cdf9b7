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
        Action::CopySlots { base, slots } => {
            // What a dead agent left there.
            let within: Vec<u32> = observed.blocks.range(*base..base + slots.len() as u32).map(|(b, _)| *b).collect();
            within.iter().for_each(|b| drop(observed.blocks.remove(b)));
            observed.blocks.insert(*base, slots.clone());
        }
        Action::PutService(frontend, service) => {
            let old = observed.services.insert(*frontend, *service);
            if let Some(old) = old.filter(|old| old.base != service.base) {
                observed.blocks.remove(&old.base);
            }
        }
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
