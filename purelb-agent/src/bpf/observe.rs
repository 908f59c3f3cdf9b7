//! Reads the maps into the plan's plain values.

use std::net::IpAddr;

use ipnet::IpNet;
use purelb_common::hash::Address;
use purelb_common::table::{self as t, Slot};
use purelb_plan::observed::{EndpointEntry, Family, Frontend, Observed};
use purelb_plan::world::Protocol;

use super::maps::Tables;
use super::{BpfError, Maps};

impl Maps {
    /// The maps as they are now.
    pub fn observe(&self) -> Result<Observed, BpfError> {
        let mut observed = Observed { capacity: self.slots.len(), tick: self.tick()?, ..Observed::default() };
        read(&self.v4, Family::V4, &mut observed)?;
        read(&self.v6, Family::V6, &mut observed)?;
        for service in observed.services.values() {
            let slots = (service.base..=service.base.saturating_add(service.mask))
                .map_while(|slot| self.slots.load(slot).map(Slot));
            observed.blocks.insert(service.base, slots.collect());
        }
        Ok(observed)
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
    tables.endpoints.for_each(|id, entry| {
        if let Ok(id) = u16::try_from(id)
            && id >= t::FIRST_ENDPOINT
            && entry.generation != 0
        {
            let (addr, port, state, generation) = ({ entry.addr }.into(), entry.port, entry.state, entry.generation);
            observed.endpoints.insert((family, id), EndpointEntry { addr, port, state, generation });
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
    })
}

const fn protocol(number: u16) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        _ => None,
    }
}
