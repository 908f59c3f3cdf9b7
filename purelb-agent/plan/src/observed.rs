//! What the pinned maps hold, as plain values; and the actions that change them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_common::table;

use crate::world::Protocol;

/// VIP, port, protocol: the key of `SERVICES4`/`SERVICES6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// Address the client uses.
    pub vip: IpAddr,
    /// Port, host order.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// Pod address, port, protocol: the key of `REVSVC4`/`REVSVC6`.
pub type Backend = Frontend;

/// An entry of `ENDPOINTS4`/`ENDPOINTS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointEntry {
    /// Pod or node address (its family names the map).
    pub addr: IpAddr,
    /// Target port, host order.
    pub port: u16,
    /// `table::GONE`, `READY`, `UNREADY`, `TERMINATING`.
    pub state: u16,
    /// Grows when the id is used again.
    pub generation: u32,
    /// `table::Service::id` that the id belongs to (`OWNERS4`/`OWNERS6`).
    pub service: u32,
}

/// Address family; the endpoint ids of each are their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// The maps as they are.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// `VIPS4` and `VIPS6`: flags.
    pub vips: BTreeMap<IpAddr, u32>,
    /// `SERVICES4` and `SERVICES6`.
    pub services: BTreeMap<Frontend, table::Service>,
    /// Used entries of `ENDPOINTS4`/`6`: ids from `table::FIRST_ENDPOINT` on whose generation is not 0.
    pub endpoints: BTreeMap<(Family, u16), EndpointEntry>,
    /// `SRC_RANGES4`/`6`: (service id, network).
    pub ranges: BTreeMap<(u32, IpNet), u32>,
    /// `REVSVC4`/`6`: pod address and port -> VIP and port.
    pub reverse: BTreeMap<Backend, (IpAddr, u16)>,
    /// `CLUSTER4`/`6`: addresses of nodes, ranges of pods.
    pub cluster: BTreeSet<IpNet>,
    /// Number of slots in the map `SLOTS`.
    pub capacity: u32,
    /// Number of entries that each of `SRC_RANGES4` and `SRC_RANGES6` has room for.
    pub range_capacity: u32,
}

/// Reads the map `SLOTS`. Apart from [`Observed`], since there are millions and a look needs few of them.
pub trait Slots {
    /// The slots of a service's block as they are now.
    fn block(&self, service: &table::Service) -> Vec<table::Slot>;
}

/// One idempotent change of the maps. The executor applies them in order; a crash between any two
/// leaves a state from which planning again ends in the same place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Set `OWNERS[id]`, then `ENDPOINTS[id]`.
    PutEndpoint(Family, u16, EndpointEntry),
    /// Store the agent's halves (`table::Slot::half`) of consecutive slots from `base` on; the program's halves stay.
    WriteSlots { base: u32, halves: Vec<u32> },
    /// Store whole slots, stamps included (a new or doubled block nobody reads yet).
    CopySlots { base: u32, slots: Vec<table::Slot> },
    /// Set a key of `SERVICES`.
    PutService(Frontend, table::Service),
    /// Remove it.
    DeleteService(Frontend),
    /// Set the bit in the bitmap, then the key of `VIPS` with its flags.
    PutVip(IpAddr, u32),
    /// Remove the key, then clear the bit when no other VIP needs it.
    DeleteVip(IpAddr),
    /// Set a key of `SRC_RANGES`.
    PutRange(u32, IpNet),
    /// Remove it.
    DeleteRange(u32, IpNet),
    /// Set a key of `REVSVC`.
    PutReverse(Backend, IpAddr, u16),
    /// Remove it.
    DeleteReverse(Backend),
    /// Set a key of `CLUSTER`.
    PutCluster(IpNet),
    /// Remove it.
    DeleteCluster(IpNet),
    /// Wait for an RCU grace period: no program reads any more what the actions before took away.
    Synchronize,
}
