//! Reads the maps into the plan's plain values.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_common::hash::Address;
use purelb_common::table::{self as t, Slot};
use purelb_plan::observed::{EndpointEntry, Family, Frontend, Observed, Slots};
use purelb_plan::world::Protocol;

use super::maps::Tables;
use super::{BpfError, Maps};

impl Maps {
    /// The maps as they are now.
    pub fn observe(&self) -> Result<Observed, BpfError> {
        let mut observed =
            Observed { capacity: self.slots.len(), range_capacity: self.v4.ranges.entries(), ..Observed::default() };
        read(&self.v4, Family::V4, &mut observed)?;
        read(&self.v6, Family::V6, &mut observed)?;
        Ok(observed)
    }
}

impl Slots for Maps {
    /// A block that cannot be mapped counts as empty: it is written anew.
    fn block(&self, service: &t::Service) -> Vec<Slot> {
        let count = service.mask.saturating_add(1);
        let words = self.slots.load(service.base, count).unwrap_or_else(|_| vec![0; count as usize]);
        words.into_iter().map(Slot).collect()
    }
}

fn read<A: Address + Into<IpAddr>>(
    tables: &Tables<A>,
    family: Family,
    observed: &mut Observed,
) -> Result<(), BpfError> {
    tables.vips.for_each(|vip, value| {
        observed.vips.insert(vip.into(), value.flags);
    })?;
    tables.services.for_each(|key, service| {
        if let Some(protocol) = protocol(key.proto) {
            let frontend = Frontend { vip: { key.vip }.into(), port: key.port, protocol };
            observed.services.insert(frontend, service);
        }
    })?;
    let mut owners = BTreeMap::new();
    tables.owners.for_each(|id, owner| {
        owners.insert(id, owner.service);
    })?;
    tables.endpoints.for_each(|id, entry| {
        let service = owners.get(&id).copied().unwrap_or_default();
        if let Ok(id) = u16::try_from(id)
            && id >= t::FIRST_ENDPOINT
            && entry.generation != 0
        {
            let (addr, port, state, generation) = ({ entry.addr }.into(), entry.port, entry.state, entry.generation);
            observed.endpoints.insert((family, id), EndpointEntry { addr, port, state, generation, service });
        }
    })?;
    tables.reverse.for_each(|key, rev| {
        if let Some(protocol) = protocol(key.proto) {
            let backend = Frontend { vip: { key.pod }.into(), port: key.port, protocol };
            observed.reverse.insert(backend, ({ rev.vip }.into(), rev.port));
        }
    })?;
    tables.ranges.for_each(|key, value| {
        let data = key.data;
        let bits = u8::try_from(key.bits.saturating_sub(32)).unwrap_or(u8::MAX);
        if let Ok(net) = IpNet::new({ data.client }.into(), bits) {
            observed.ranges.insert((u32::from_be(data.service), net), value);
        }
    })?;
    tables.cluster.for_each(|key, _| {
        if let Ok(net) = IpNet::new({ key.data }.into(), u8::try_from(key.bits).unwrap_or(u8::MAX)) {
            observed.cluster.insert(net);
        }
    })
}

const fn protocol(number: u16) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        _ => None,
    }
}
