//! The pinned maps as `purelb_common::decide` reads them: the CLI asks the kernel's own code what
//! it would do. Nothing is ever written.

use bytemuck::Pod;
use purelb_common::decide;
use purelb_common::hash::Address;
use purelb_common::table::{
    Affinity, AffinityKey, Config, Endpoint, FlowKey, Pin, RangeKey, Reply, ReplyKey, Rev, RevKey, Service, ServiceKey,
    Slot,
};

use super::maps::{Table, Tables};
use super::sys::{TrieKey, Words};
use super::{BpfError, Maps};

/// Read-only tables of one family. A map that cannot be read counts as empty.
pub struct ReadOnly<'a, A: Address> {
    tables: &'a Tables<A>,
    slots: &'a Words,
    pins: Table<FlowKey<A>, Pin>,
    affinity: Table<AffinityKey<A>, Affinity>,
    half_open: Table<ReplyKey<A>, Reply<A>>,
    replies: Table<ReplyKey<A>, Reply<A>>,
    udp_replies: Table<ReplyKey<A>, Reply<A>>,
    direct: Table<ReplyKey<A>, u32>,
}

impl Maps {
    /// For IPv4.
    pub fn tables4(&self) -> Result<ReadOnly<'_, [u8; 4]>, BpfError> {
        self.read_only(&self.v4)
    }

    /// For IPv6.
    pub fn tables6(&self) -> Result<ReadOnly<'_, [u8; 16]>, BpfError> {
        self.read_only(&self.v6)
    }

    fn read_only<'a, A: Address>(&'a self, tables: &'a Tables<A>) -> Result<ReadOnly<'a, A>, BpfError> {
        let name = |base: &str| format!("{base}{}", A::FAMILY);
        Ok(ReadOnly {
            tables,
            slots: &self.slots,
            pins: Table::open(&self.root, &name("PINS"))?,
            affinity: Table::open(&self.root, &name("AFFINITY"))?,
            half_open: Table::open(&self.root, &name("HALF_OPEN"))?,
            replies: Table::open(&self.root, &name("REPLIES"))?,
            udp_replies: Table::open(&self.root, &name("UDP_REPLIES"))?,
            direct: Table::open(&self.root, &name("DIRECT"))?,
        })
    }
}

fn read<K: Pod, V: Pod>(table: &Table<K, V>, key: &K) -> Option<V> {
    table.get(key).ok().flatten()
}

impl<A: Address> decide::Tables<A> for ReadOnly<'_, A> {
    type Service = Box<Service>;
    type Endpoint = Box<Endpoint<A>>;
    fn service(&self, key: &ServiceKey<A>) -> Option<Box<Service>> {
        read(&self.tables.services, key).map(Box::new)
    }
    fn in_range(&self, key: &RangeKey<A>) -> bool {
        let bits = u32::try_from(size_of::<RangeKey<A>>() * 8).unwrap_or(u32::MAX);
        read(&self.tables.ranges, &TrieKey { bits, data: *key }).is_some()
    }
    fn slot(&self, index: u32) -> Slot {
        Slot(self.slots.load(index, 1).ok().and_then(|w| w.first().copied()).unwrap_or(0))
    }
    fn stamp(&self, _index: u32, _half: u32) {}
    fn endpoint(&self, id: u32) -> Option<Box<Endpoint<A>>> {
        read(&self.tables.endpoints, &id).map(Box::new)
    }
    fn pin(&self, key: &FlowKey<A>) -> Option<Pin> {
        read(&self.pins, key)
    }
    fn put_pin(&self, _key: &FlowKey<A>, _pin: &Pin) {}
    fn affinity(&self, key: &AffinityKey<A>) -> Option<Affinity> {
        read(&self.affinity, key)
    }
    fn put_affinity(&self, _key: &AffinityKey<A>, _value: &Affinity) {}
    fn half_open(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        read(&self.half_open, key)
    }
    fn put_half_open(&self, _key: &ReplyKey<A>, _value: &Reply<A>) {}
    fn remove_half_open(&self, _key: &ReplyKey<A>) {}
    fn reply<const PROTO: u16>(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        read(if { key.proto } == 6 { &self.replies } else { &self.udp_replies }, key)
    }
    fn put_reply<const PROTO: u16>(&self, _key: &ReplyKey<A>, _value: &Reply<A>) {}
    fn mark_reply<const PROTO: u16>(&self, _key: &ReplyKey<A>, _state: u16, _used: u32) {}
    fn remove_reply<const PROTO: u16>(&self, _key: &ReplyKey<A>) {}
    fn reverse(&self, key: &RevKey<A>) -> Option<Rev<A>> {
        read(&self.tables.reverse, key)
    }
    fn direct(&self, key: &ReplyKey<A>) -> bool {
        read(&self.direct, key).is_some()
    }
    fn in_cluster(&self, addr: A) -> bool {
        let bits = u32::try_from(size_of::<A>() * 8).unwrap_or(u32::MAX);
        read(&self.tables.cluster, &TrieKey { bits, data: addr }).is_some()
    }
    fn budget(&self, _config: &Config, _proto: u16, _tick: u32) -> bool {
        true
    }
}
