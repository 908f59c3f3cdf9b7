//! Carries out one [`Action`] of the plan on the maps; each is idempotent.

use std::io;
use std::net::IpAddr;

use bytemuck::Pod;
use ipnet::IpNet;
use purelb_common::hash::{self, Address};
use purelb_common::table as t;
use purelb_plan::observed::{Action, Backend, EndpointEntry, Frontend};
use purelb_plan::world::Protocol;

use super::maps::Tables;
use super::sys::{self, TrieKey};
use super::{BpfError, Maps};

/// Calls a function with the tables and the bytes of the family of an address.
macro_rules! by_family {
    ($maps:expr, $addr:expr, |$tables:ident, $a:ident| $body:expr) => {
        match $addr {
            IpAddr::V4(v4) => {
                let ($tables, $a) = (&$maps.v4, v4.octets());
                $body
            }
            IpAddr::V6(v6) => {
                let ($tables, $a) = (&$maps.v6, v6.octets());
                $body
            }
        }
    };
}

impl Maps {
    /// Changes the maps.
    pub fn apply(&self, action: &Action) -> Result<(), BpfError> {
        match action {
            Action::PutEndpoint(_, id, entry) => by_family!(self, entry.addr, |tables, addr| {
                tables.owners.set(&u32::from(*id), &t::Owner { service: entry.service })?;
                tables.endpoints.set(&u32::from(*id), &endpoint(addr, entry))
            }),
            Action::WriteSlots { base, halves } => self.stored(self.slots.store_halves(*base, halves)),
            Action::CopySlots { base, slots } => self.stored(self.slots.store(*base, slots.iter().map(|slot| slot.0))),
            Action::PutService(frontend, service) => {
                by_family!(self, frontend.vip, |tables, vip| tables.services.set(&service_key(vip, frontend), service))
            }
            Action::DeleteService(frontend) => by_family!(self, frontend.vip, |tables, vip| {
                tables.services.remove(&service_key(vip, frontend)).map(drop)
            }),
            Action::PutVip(addr, flags) => by_family!(self, *addr, |tables, vip| {
                self.mark(hash::vip_bit(vip), true)?;
                // `VIPS` tells the plan what is left to do, so its entry neither comes nor goes without the index's.
                remove_index(tables, vip)?;
                tables.vips.set(&vip, &t::Vip { flags: *flags })?;
                put_index(tables, vip, *flags)
            }),
            Action::DeleteVip(addr) => by_family!(self, *addr, |tables, vip| {
                remove_index(tables, vip)?;
                tables.vips.remove(&vip)?;
                self.unmark(hash::vip_bit(vip))
            }),
            Action::PutRange(service, net) => by_family!(self, net.network(), |tables, network| {
                tables.ranges.set(&range_key(*service, network, net), &1)
            }),
            Action::DeleteRange(service, net) => by_family!(self, net.network(), |tables, network| {
                tables.ranges.remove(&range_key(*service, network, net)).map(drop)
            }),
            Action::PutReverse(backend, vip, port) => self.put_reverse(backend, *vip, *port),
            Action::DeleteReverse(backend) => by_family!(self, backend.vip, |tables, pod| {
                tables.reverse.remove(&reverse_key(pod, backend)).map(drop)
            }),
            Action::PutCluster(net) => by_family!(self, net.network(), |tables, network| {
                tables.cluster.set(&TrieKey { bits: net.prefix_len().into(), data: network }, &1)
            }),
            Action::DeleteCluster(net) => by_family!(self, net.network(), |tables, network| {
                tables.cluster.remove(&TrieKey { bits: net.prefix_len().into(), data: network }).map(drop)
            }),
            Action::Synchronize => {
                sys::synchronize();
                Ok(())
            }
        }
    }

    fn put_reverse(&self, backend: &Backend, vip: IpAddr, port: u16) -> Result<(), BpfError> {
        fn put<A: Address>(tables: &Tables<A>, backend: &Backend, pod: A, vip: A, port: u16) -> Result<(), BpfError> {
            tables.reverse.set(&reverse_key(pod, backend), &t::Rev { vip, port, pad: 0 })
        }
        match (backend.vip, vip) {
            (IpAddr::V4(pod), IpAddr::V4(vip)) => put(&self.v4, backend, pod.octets(), vip.octets(), port),
            (IpAddr::V6(pod), IpAddr::V6(vip)) => put(&self.v6, backend, pod.octets(), vip.octets(), port),
            // A reply never changes its family, so there is nothing to remember.
            _ => Ok(()),
        }
    }

    fn mark(&self, bit: u32, on: bool) -> Result<(), BpfError> {
        let (index, mask) = (bit >> 6, 1u64 << (bit & 63));
        let word = self.bitmap.get(&index)?.unwrap_or(0);
        self.bitmap.set(&index, &if on { word | mask } else { word & !mask })
    }

    /// Clears a bit unless another VIP shares it.
    fn unmark(&self, bit: u32) -> Result<(), BpfError> {
        let mut shared = false;
        self.v4.vips.for_each(|vip, _| shared |= hash::vip_bit(vip) == bit)?;
        self.v6.vips.for_each(|vip, _| shared |= hash::vip_bit(vip) == bit)?;
        if shared { Ok(()) } else { self.mark(bit, false) }
    }

    fn stored(&self, result: io::Result<()>) -> Result<(), BpfError> {
        result.map_err(|e| BpfError::syscall("mmap", self.root.join("SLOTS"), e))
    }
}

/// The first VIP of a bit has its element.
fn put_index<A: Address>(tables: &Tables<A>, vip: A, flags: u32) -> Result<(), BpfError> {
    let bit = hash::vip_bit(vip);
    match tables.index.get(&bit)? {
        Some(at) if at.flags & t::VIP_HERE != 0 && { at.addr } != vip => Ok(()),
        _ => tables.index.set(&bit, &t::VipAt { addr: vip, flags: flags | t::VIP_HERE }),
    }
}

fn remove_index<A: Address>(tables: &Tables<A>, vip: A) -> Result<(), BpfError> {
    let bit = hash::vip_bit(vip);
    match tables.index.get(&bit)? {
        Some(at) if { at.addr } == vip => tables.index.set(&bit, &bytemuck::Zeroable::zeroed()),
        _ => Ok(()),
    }
}

pub(super) const fn number(protocol: Protocol) -> u16 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

const fn endpoint<A: Pod>(addr: A, entry: &EndpointEntry) -> t::Endpoint<A> {
    t::Endpoint { addr, port: entry.port, state: entry.state, generation: entry.generation }
}

const fn service_key<A: Pod>(vip: A, frontend: &Frontend) -> t::ServiceKey<A> {
    t::ServiceKey { vip, port: frontend.port, proto: number(frontend.protocol) }
}

const fn reverse_key<A: Pod>(pod: A, backend: &Backend) -> t::RevKey<A> {
    t::RevKey { pod, port: backend.port, proto: number(backend.protocol) }
}

fn range_key<A: Pod>(service: u32, network: A, net: &IpNet) -> TrieKey<t::RangeKey<A>> {
    TrieKey { bits: 32 + u32::from(net.prefix_len()), data: t::RangeKey { service: service.to_be(), client: network } }
}
