//! Endpoint ids: one per service, address and port. An id whose endpoint is gone may be used again with
//! the next generation, which voids what pins and replies remember of the old one.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use purelb_common::table::{ENDPOINT_IDS, FIRST_ENDPOINT, GONE};

use crate::observed::{Action, EndpointEntry, Family, Observed, Slots};

/// Family of an address.
#[must_use]
pub const fn family(addr: IpAddr) -> Family {
    match addr {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// What an id stands for: `table::Service::id`, address and port of the endpoint.
type Key = (u32, IpAddr, u16);

/// Which id is whose, and which are free.
#[derive(Debug, Default)]
pub struct Ids {
    ids: BTreeMap<Key, u16>,
    /// Below `fresh`.
    free: BTreeSet<(Family, u16)>,
    /// From here on all are free: most are, and to list them would be the most of a look.
    fresh: BTreeMap<Family, u16>,
    /// Free from the next look on: programs may still have them.
    purged: Vec<(Family, u16)>,
}

/// The writes that make it so.
#[derive(Debug, Default)]
pub struct Writes {
    /// Before any slot names them.
    pub puts: Vec<Action>,
    /// After no slot names them any more.
    pub purges: Vec<Action>,
    /// Services with endpoints for which no id was left.
    pub missing: BTreeSet<u32>,
}

impl Ids {
    /// As the maps have it. `named` are ids that must not be given away although their endpoint is gone; an id
    /// that stands for the same as another one is purged.
    #[must_use]
    pub fn read(observed: &Observed, named: &Named, writes: &mut Writes) -> Self {
        let taken = |at: &(Family, u16)| observed.endpoints.get(at).is_some_and(|e| e.state != GONE);
        let mut out = Self::default();
        for family in [Family::V4, Family::V6] {
            let known = observed.endpoints.range((family, 0)..=(family, u16::MAX)).next_back().map(|(at, _)| at.1);
            let last = known.max(named.last(family));
            let fresh = last.map_or(FIRST_ENDPOINT, |last| last.saturating_add(1).max(FIRST_ENDPOINT));
            let below = (FIRST_ENDPOINT..fresh).map(|id| (family, id));
            out.free.extend(below.filter(|at| !taken(at) && !named.has(at.0, at.1)));
            out.fresh.insert(family, fresh);
        }
        for (&at, entry) in observed.endpoints.iter().filter(|(_, e)| e.state != GONE) {
            let key = (entry.service, entry.addr, entry.port);
            match out.ids.entry(key) {
                Entry::Vacant(slot) => {
                    slot.insert(at.1);
                }
                Entry::Occupied(_) => out.purge(at, entry, writes),
            }
        }
        out
    }

    /// What was purged in the last look is free now.
    pub fn next(&mut self) {
        self.free.extend(self.purged.drain(..));
    }

    /// Makes the ids of a service those of these endpoints with their states.
    pub fn assign(
        &mut self,
        service: u32,
        endpoints: &BTreeMap<(IpAddr, u16), u16>,
        observed: &Observed,
        writes: &mut Writes,
    ) {
        for (key, id) in self.of(service) {
            let at = (family(key.1), id);
            let Some(entry) = observed.endpoints.get(&at) else { continue };
            match endpoints.get(&(key.1, key.2)) {
                Some(&state) if state == entry.state => {}
                Some(&state) => {
                    writes.puts.push(Action::PutEndpoint(at.0, id, EndpointEntry { state, ..*entry }));
                }
                None => {
                    self.ids.remove(&key);
                    self.purge(at, entry, writes);
                }
            }
        }
        for (&(addr, port), &state) in endpoints {
            if self.ids.contains_key(&(service, addr, port)) {
                continue;
            }
            let family = family(addr);
            let Some(at) = self.take(family) else {
                writes.missing.insert(service);
                continue;
            };
            let generation = observed.endpoints.get(&at).map_or(0, |e| e.generation).wrapping_add(1).max(1);
            let entry = EndpointEntry { addr, port, state, generation, service };
            self.ids.insert((service, addr, port), at.1);
            // The address first, unused, then the state: a program that still has the id from an old pin sees
            // either that it is gone or another generation.
            writes.puts.push(Action::PutEndpoint(family, at.1, EndpointEntry { state: GONE, ..entry }));
            writes.puts.push(Action::PutEndpoint(family, at.1, entry));
        }
    }

    /// Purges the ids of all services but these.
    pub fn keep(&mut self, services: &BTreeSet<u32>, observed: &Observed, writes: &mut Writes) {
        let gone: BTreeSet<u32> = self.ids.keys().map(|k| k.0).filter(|id| !services.contains(id)).collect();
        for service in gone {
            self.assign(service, &BTreeMap::new(), observed, writes);
        }
    }

    /// Id of an endpoint.
    #[must_use]
    pub fn get(&self, service: u32, (addr, port): (IpAddr, u16)) -> Option<u16> {
        self.ids.get(&(service, addr, port)).copied()
    }

    /// The lowest that is free.
    fn take(&mut self, family: Family) -> Option<(Family, u16)> {
        let below = self.free.range((family, 0)..=(family, u16::MAX)).next().copied();
        if let Some(at) = below {
            self.free.remove(&at);
            return Some(at);
        }
        let fresh = self.fresh.get_mut(&family).filter(|id| u32::from(**id) < ENDPOINT_IDS)?;
        let at = (family, *fresh);
        *fresh += 1;
        Some(at)
    }

    fn of(&self, service: u32) -> Vec<(Key, u16)> {
        let lowest = (service, IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let all = self.ids.range(lowest..).take_while(|(key, _)| key.0 == service);
        all.map(|(key, id)| (*key, *id)).collect()
    }

    fn purge(&mut self, (family, id): (Family, u16), entry: &EndpointEntry, writes: &mut Writes) {
        writes.purges.push(Action::PutEndpoint(family, id, EndpointEntry { state: GONE, ..*entry }));
        self.purged.push((family, id));
    }
}

/// Ids that some slot names. Once everything planned is written these are none that is gone; only an
/// agent that died between two writes leaves such.
#[derive(Debug)]
pub struct Named([Vec<bool>; 2]);

impl Named {
    /// None.
    #[must_use]
    pub const fn none() -> Self {
        Self([Vec::new(), Vec::new()])
    }

    /// Looks at every slot.
    #[must_use]
    pub fn by_slots(observed: &Observed, slots: &dyn Slots) -> Self {
        let mut named = Self([vec![false; ENDPOINT_IDS as usize], vec![false; ENDPOINT_IDS as usize]]);
        for (frontend, service) in &observed.services {
            let [v4, v6] = &mut named.0;
            let ids = if frontend.vip.is_ipv4() { v4 } else { v6 };
            for slot in slots.block(service) {
                for id in [slot.cur(), slot.prev()] {
                    if let Some(flag) = ids.get_mut(usize::from(id)) {
                        *flag = true;
                    }
                }
            }
        }
        named
    }

    fn has(&self, family: Family, id: u16) -> bool {
        self.of(family).get(usize::from(id)).copied().unwrap_or(false)
    }

    /// The highest.
    fn last(&self, family: Family) -> Option<u16> {
        let last = self.of(family).iter().rposition(|named| *named)?;
        u16::try_from(last).ok()
    }

    fn of(&self, family: Family) -> &[bool] {
        let [v4, v6] = &self.0;
        if family == Family::V4 { v4 } else { v6 }
    }
}
