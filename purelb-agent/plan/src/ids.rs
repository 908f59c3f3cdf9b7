//! Endpoint ids: one per family, address and port. An id whose endpoint is gone may be used again with
//! the next generation, which voids what pins and replies remember of the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use purelb_common::table::{ENDPOINT_IDS, FIRST_ENDPOINT, GONE};

use crate::observed::{Action, EndpointEntry, Family, Observed};

/// Family of an address.
#[must_use]
pub const fn family(addr: IpAddr) -> Family {
    match addr {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// Ids of all wanted endpoints, and the writes that make them so.
#[derive(Debug, Default)]
pub struct Ids {
    ids: BTreeMap<(IpAddr, u16), u16>,
    /// Before any slot names them.
    pub puts: Vec<Action>,
    /// After no slot names them any more.
    pub purges: Vec<Action>,
}

impl Ids {
    /// Keeps ids that are in use, gives free ones to new endpoints, purges what nobody wants.
    #[must_use]
    pub fn assign(observed: &Observed, wanted: &BTreeMap<(IpAddr, u16), u16>) -> Self {
        let mut out = Self::default();
        for (&(family, id), entry) in &observed.endpoints {
            if entry.state == GONE {
                continue;
            }
            let key = (entry.addr, entry.port);
            match wanted.get(&key) {
                Some(&state) if !out.ids.contains_key(&key) => {
                    out.ids.insert(key, id);
                    if state != entry.state {
                        out.puts.push(Action::PutEndpoint(family, id, EndpointEntry { state, ..*entry }));
                    }
                }
                _ => out.purges.push(Action::PutEndpoint(family, id, EndpointEntry { state: GONE, ..*entry })),
            }
        }
        let fresh: Vec<_> = wanted.iter().filter(|(key, _)| !out.ids.contains_key(key)).collect();
        if fresh.is_empty() {
            return out;
        }
        let named = named_by_slots(observed);
        let mut cursor = [FIRST_ENDPOINT, FIRST_ENDPOINT];
        for (&(addr, port), &state) in fresh {
            let family = family(addr);
            let [v4, v6] = &mut cursor;
            let from = if family == Family::V4 { v4 } else { v6 };
            let free = (*from..ENDPOINT_IDS as u16).find(|id| {
                !named.contains(&(family, *id))
                    && observed.endpoints.get(&(family, *id)).is_none_or(|e| e.state == GONE)
            });
            let Some(id) = free else { continue };
            *from = id + 1;
            let generation = observed.endpoints.get(&(family, id)).map_or(0, |e| e.generation).wrapping_add(1).max(1);
            out.ids.insert((addr, port), id);
            out.puts.push(Action::PutEndpoint(family, id, EndpointEntry { addr, port, state, generation }));
        }
        out
    }

    /// Id of an endpoint.
    #[must_use]
    pub fn get(&self, addr: IpAddr, port: u16) -> Option<u16> {
        self.ids.get(&(addr, port)).copied()
    }
}

fn named_by_slots(observed: &Observed) -> BTreeSet<(Family, u16)> {
    let mut seen = BTreeSet::new();
    for (frontend, service) in &observed.services {
        let family = family(frontend.vip);
        // Neighbouring slots repeat ids; most look-ups are spared by remembering the last few.
        let mut flags = vec![false; ENDPOINT_IDS as usize];
        for slot in observed.blocks.get(&service.base).into_iter().flatten() {
            for id in [slot.cur(), slot.prev()] {
                if let Some(flag) = flags.get_mut(usize::from(id))
                    && !*flag
                {
                    *flag = true;
                    seen.insert((family, id));
                }
            }
        }
    }
    seen
}
