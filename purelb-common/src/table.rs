//! Keys and values of the pinned maps. Padding-free, integers only, generic over the address
//! bytes (`[u8; 4]` or `[u8; 16]`); maps carry the suffix 4 or 6.
//!
//! The generic types are `packed` on the user side, where bytemuck's derive proves them plain data
//! only so, and naturally aligned in the kernel, where a copy of a packed value becomes a call to
//! a byte-wise `memmove`. The layout is the same; the assertions at the end hold it in both builds.

#![allow(
    clippy::multiple_bound_locations,
    reason = "derives on a packed type need the bound that bytemuck's derive repeats"
)]

use bytemuck::{Pod, Zeroable};

/// `tick = jiffies64 >> TICK_SHIFT`; the unit of every time in the maps (0.256 s at HZ=1000).
pub const TICK_SHIFT: u32 = 8;
/// Endpoint id: left to kube-proxy.
pub const PASS: u16 = 1;
/// Endpoint id: nobody; dropped with a reason. Also what empty slots hold.
pub const DROP: u16 = 0;
/// First id that names an entry of `ENDPOINTS`.
pub const FIRST_ENDPOINT: u16 = 2;
/// Endpoint ids are below this (the slot's half has one bit for the agent).
pub const ENDPOINT_IDS: u32 = 1 << 15;
/// Slots per element of the map `SLOTS` (the kernel pads elements to 8 bytes).
pub const SLOTS_PER_ELEMENT: u32 = 16;
/// Slots in all, for all services of both families (64 MiB): 8,191 services of the smallest block.
pub const SLOTS: u32 = 1 << 23;
/// The smallest block of a service, in slots.
pub const MIN_BLOCK: u32 = 1024;
/// Service ids are below this; `STATS` is indexed by them.
pub const SERVICE_IDS: u32 = 1 << 14;
/// Bits of the VIP bitmap.
pub const VIP_BITS: u32 = 1 << 16;
/// VIPs of one family at most.
pub const VIP_COUNT: u32 = 1 << 14;
/// Entries of `UPLINKS`, indexed by the low bits of the interface index.
pub const UPLINKS: u32 = 256;

/// `CONFIG`, one element: what the agent tells the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// [`crate::SCHEMA`] of the agent that wrote the maps.
    pub schema: u32,
    /// See the `CONFIG_*` bits.
    pub flags: u32,
    /// Tick of the agent's last sign of life (D17).
    pub heartbeat: u32,
    /// Silence, in ticks, after which tables count as stale; 0: never.
    pub heartbeat_limit: u32,
    /// Seed of the flow hash, equal on all nodes of a cluster (D8).
    pub seed: u64,
    /// Pins, and UDP reply entries apart from them, that each CPU may insert in one tick; 0: no limit.
    pub insert_budget: u32,
    /// How many drops each CPU may put on `EVENTS` in one tick: rare ones are all seen, a flood costs little.
    pub sample: u32,
    /// How long an unanswered SYN counts as half open, ticks.
    pub half_open: u32,
    /// How long a UDP flow without packets counts as live, ticks.
    pub udp_idle: u32,
    /// How long a TCP reply entry without packets counts as live, ticks.
    pub tcp_idle: u32,
    /// How long UDP flows that PASS owned stay with kube-proxy after a change, ticks (180 s).
    pub udp_pass: u32,
    /// First port of the node's own ephemeral range (`ip_local_port_range`), host order.
    pub local_port_min: u32,
    /// Last port of it.
    pub local_port_max: u32,
}
/// `CONFIG.flags`: `REVSVC` may answer on a miss (4.3).
pub const CONFIG_REVSVC: u32 = 1;
/// `CONFIG.flags`: kube-proxy serves the node too, and keeps what passes to it while the tables are stale.
pub const CONFIG_KUBE_PROXY: u32 = 2;

/// `FENCE`, one element: until when this node answers for local VIPs, whatever becomes of the agent. Both are nanoseconds of
/// `CLOCK_BOOTTIME`. Each word is stored at once; an old one beside a new one says no more than either pair does. All 0: never
/// written, nothing is fenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Fence {
    /// Later, ARP requests and neighbour solicitations for local VIPs are dropped...
    pub until: u64,
    /// ... but no longer from here on, when no address that the agent added can still be on an interface: then they
    /// are another's, as after a way back to PureLB.
    pub over: u64,
}

/// `VIPS4`/`VIPS6`, keyed by the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Vip {
    /// See the `VIP_*` bits.
    pub flags: u32,
}
/// `VIPS.flags`: a port that no Service has is passed, not dropped.
pub const VIP_UNKNOWN_PASS: u32 = 1;

/// `VIPS.flags`: a Service has a protocol that is neither TCP nor UDP (SCTP): such packets pass.
pub const VIP_OTHER_PROTOCOLS: u32 = 2;

/// `VIPS.flags`: a local address: the one node that owns it answers ARP requests and neighbour solicitations for it, while
/// [`Fence`] lets it.
pub const VIP_LOCAL: u32 = 4;

/// `VIPS.flags`: announced by routing: nobody answers ARP requests and neighbour solicitations for it.
pub const VIP_REMOTE: u32 = 8;

/// Element of `VIP_INDEX4`/`VIP_INDEX6`, at [`crate::hash::vip_bit`] of the address: the flags of one of the VIPs
/// that share the bit without a look-up in `VIPS`, which has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct VipAt<A: Pod> {
    /// The VIP.
    pub addr: A,
    /// Its flags and [`VIP_HERE`]; 0: nobody's.
    pub flags: u32,
}
/// `VIP_INDEX.flags`: the element is somebody's.
pub const VIP_HERE: u32 = 1 << 31;

/// Key of `SERVICES4`/`SERVICES6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct ServiceKey<A: Pod> {
    /// Destination address of the packet.
    pub vip: A,
    /// Destination port.
    pub port: u16,
    /// 6 or 17.
    pub proto: u16,
}

/// Value of `SERVICES4`/`SERVICES6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Service {
    /// Index into `STATS`, part of the keys of `SRC_RANGES` and `AFFINITY`.
    pub id: u32,
    /// See the `SERVICE_*` bits.
    pub flags: u32,
    /// First slot of the block.
    pub base: u32,
    /// Length of the block less one.
    pub mask: u32,
    /// What pins and marks made now carry. It begins at the tick of the service's birth and grows with
    /// every attempt to settle.
    pub epoch: u32,
    /// Tick of the last change of any slot.
    pub changed: u32,
    /// ClientIP affinity in ticks; 0: none.
    pub affinity: u32,
    /// Pins and marks from this epoch on count: the epoch when it last settled.
    pub settled: u32,
}
/// `SERVICES.flags`: `SRC_RANGES` decides who may come.
pub const SERVICE_RANGES: u32 = 1;

impl Service {
    /// How many epochs back pins and marks still count.
    #[must_use]
    #[inline(always)]
    pub const fn span(&self) -> u32 {
        self.epoch.wrapping_sub(self.settled)
    }
    /// Whether a pin of that epoch counts.
    #[must_use]
    #[inline(always)]
    pub const fn counts(&self, epoch: u32) -> bool {
        self.epoch.wrapping_sub(epoch) <= self.span()
    }
}

/// One 8-byte slot, as one load sees it.
///
/// bits 0..16 `cur` · 16..31 `prev` · 31 the agent's unsettled bit (the agent stores this half) ·
/// 32..56 stamp, the tick (24 bits) of the last packet that resolved to anything but `cur` ·
/// 56..64 the program's unsettled mark: 0x80 | low 7 bits of the epoch (the program stores this half).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Slot(pub u64);

impl Slot {
    /// The agent's half.
    #[must_use]
    pub const fn half(cur: u16, prev: u16, unsettled: bool) -> u32 {
        cur as u32 | (prev as u32 & 0x7fff) << 16 | (unsettled as u32) << 31
    }
    /// The program's half: `tick` and the mark of `epoch`.
    #[must_use]
    pub const fn stamp_half(tick: u32, epoch: u32) -> u32 {
        tick & 0x00ff_ffff | (0x80 | epoch & 0x7f) << 24
    }
    /// Endpoint of new flows.
    #[must_use]
    pub const fn cur(self) -> u16 {
        self.0 as u16
    }
    /// Endpoint that owned the slot when it was last settled.
    #[must_use]
    pub const fn prev(self) -> u16 {
        (self.0 >> 16) as u16 & 0x7fff
    }
    /// The agent changed the slot since it was last settled.
    #[must_use]
    pub const fn agent_unsettled(self) -> bool {
        self.0 & 1 << 31 != 0
    }
    /// The program's mark, 0 where there is none.
    #[inline(always)]
    const fn mark(self) -> u32 {
        (self.0 >> 56) as u32
    }
    /// The program sent a flow of this slot elsewhere since the service last settled.
    #[must_use]
    #[inline(always)]
    pub const fn program_unsettled(self, service: &Service) -> bool {
        let mark = self.mark();
        mark & 0x80 != 0 && service.epoch.wrapping_sub(mark) & 0x7f <= service.span()
    }
    /// The mark is of the service's present epoch.
    #[must_use]
    pub const fn marked_now(self, service: &Service) -> bool {
        self.mark() == 0x80 | service.epoch & 0x7f
    }
    /// More than one answer is possible.
    #[must_use]
    #[inline(always)]
    pub const fn unsettled(self, service: &Service) -> bool {
        // Most slots have neither bit, which is one test.
        self.0 & (1 << 31 | 1 << 63) != 0 && (self.agent_unsettled() || self.program_unsettled(service))
    }
    /// Low 24 bits of the tick of the last packet that did not go to `cur`.
    #[must_use]
    pub const fn stamp(self) -> u32 {
        (self.0 >> 32) as u32 & 0x00ff_ffff
    }
}

/// Value of `ENDPOINTS4`/`ENDPOINTS6`, indexed by endpoint id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct Endpoint<A: Pod> {
    /// Target port.
    pub port: u16,
    /// One of `GONE`, `READY`, `UNREADY`, `TERMINATING`.
    pub state: u16,
    /// Grows when the id is given to another endpoint; pins and replies remember it.
    pub generation: u32,
    /// Pod (or node) address. Behind the rest, which is one aligned word so: a reader never sees a new
    /// state with an old generation.
    pub addr: A,
}
/// No longer in any slice: its pins are void, no packet goes there.
pub const GONE: u16 = 0;
/// Takes new flows.
pub const READY: u16 = 1;
/// Takes none; TCP keeps going, UDP decides anew.
pub const UNREADY: u16 = 2;
/// Keeps its flows, takes none (unless only such are left: then slots name it).
pub const TERMINATING: u16 = 3;

/// Value of `OWNERS4`/`OWNERS6`, indexed by endpoint id: for people and for an agent that starts; no program reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Owner {
    /// [`Service::id`] of the VIP and port that the endpoint id belongs to.
    pub service: u32,
}

/// Key of `PINS4`/`PINS6`: the flow as the client sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C, align(8)))]
pub struct FlowKey<A: Pod> {
    /// Client address.
    pub client: A,
    /// Destination address.
    pub vip: A,
    /// Client port.
    pub client_port: u16,
    /// Destination port.
    pub port: u16,
    /// 6 or 17.
    pub proto: u32,
}

/// Value of `PINS4`/`PINS6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Pin {
    /// Endpoint id, PASS included.
    pub endpoint: u32,
    /// Generation of the endpoint when the pin was made.
    pub generation: u32,
    /// Epoch of the service when the pin was made.
    pub epoch: u32,
}

/// Key of `HALF_OPEN`, `REPLIES`, `UDP_REPLIES`, `DIRECT`: the flow as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C, align(8)))]
pub struct ReplyKey<A: Pod> {
    /// Endpoint address.
    pub pod: A,
    /// Client address.
    pub client: A,
    /// Endpoint port.
    pub pod_port: u16,
    /// Client port.
    pub client_port: u16,
    /// 6 or 17.
    pub proto: u32,
}

/// Value of `HALF_OPEN`, `REPLIES`, `UDP_REPLIES`: what the client thinks it speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct Reply<A: Pod> {
    /// Address the client used.
    pub vip: A,
    /// Port the client used.
    pub port: u16,
    /// `OPEN`, `FIN_CLIENT`, `FIN_ENDPOINT` or `CLOSED`.
    pub state: u16,
    /// Tick of the last packet seen (refreshed at most once a tick).
    pub used: u32,
    /// Endpoint id.
    pub endpoint: u32,
    /// Its generation.
    pub generation: u32,
}
/// `Reply.state`: the flow runs (or began).
pub const OPEN: u16 = 0;
/// Bit: the client sent FIN.
pub const FIN_CLIENT: u16 = 1;
/// Bit: the endpoint sent FIN.
pub const FIN_ENDPOINT: u16 = 2;
/// Both sides sent FIN, or one RST.
pub const CLOSED: u16 = 3;

/// Key of `REVSVC4`/`REVSVC6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct RevKey<A: Pod> {
    /// Endpoint address.
    pub pod: A,
    /// Endpoint port.
    pub port: u16,
    /// 6 or 17.
    pub proto: u16,
}

/// Value of `REVSVC4`/`REVSVC6`: the only VIP and port that lead to that pod port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct Rev<A: Pod> {
    /// Address.
    pub vip: A,
    /// Port.
    pub port: u16,
    /// 0.
    pub pad: u16,
}

/// Key of `AFFINITY4`/`AFFINITY6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct AffinityKey<A: Pod> {
    /// Client address. First: built on the stack, it is written in aligned words.
    pub client: A,
    /// [`Service::id`].
    pub service: u32,
}

/// Value of `AFFINITY4`/`AFFINITY6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Affinity {
    /// Endpoint id.
    pub endpoint: u32,
    /// Its generation.
    pub generation: u32,
    /// Tick of the last SYN or first UDP packet.
    pub used: u32,
}

/// Data of a key of `SRC_RANGES4`/`SRC_RANGES6` (an LPM trie: prefix length = 32 + that of the range).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
#[cfg_attr(feature = "user", derive(Pod), repr(C, packed))]
#[cfg_attr(not(feature = "user"), repr(C))]
pub struct RangeKey<A: Pod> {
    /// [`Service::id`], big-endian (`to_be`): the trie compares bits from the first byte on.
    pub service: u32,
    /// Client address or network.
    pub client: A,
}

/// `STATS`, per CPU, indexed by [`Service::id`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Stats {
    /// Packets forwarded to an endpoint.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
    /// SYNs and first UDP packets among them.
    pub new_flows: u64,
    /// Packets of this service that were dropped.
    pub drops: u64,
}

/// A sampled drop, as `EVENTS` carries it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Event {
    /// Client address; IPv4 in the first four bytes.
    pub client: [u8; 16],
    /// Destination address, likewise.
    pub vip: [u8; 16],
    /// Client port.
    pub client_port: u16,
    /// Destination port.
    pub port: u16,
    /// [`crate::verdict::Reason`] as a number.
    pub reason: u32,
    /// 4 or 6.
    pub family: u16,
    /// IP protocol, or the ethertype of ARP.
    pub proto: u16,
    /// Interface index of the uplink.
    pub ifindex: u32,
}

/// `UPLINKS`, indexed by `ifindex % UPLINKS`: which MAC address an XDP uplink answers to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Uplink {
    /// The six bytes as on the wire, in the low 48 bits of a little-endian number.
    pub mac: u64,
    /// Interface index; an entry of another one says nothing.
    pub ifindex: u32,
    /// 0.
    pub pad: u32,
}

/// `CLOCK`, one element: written by the program `clock` so that the agent learns jiffies and HZ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Clock {
    /// `jiffies64`.
    pub jiffies: u64,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub nanoseconds: u64,
    /// The heartbeat of which the program said that it lapsed, so that it says so once.
    pub told: u64,
}

const _: () = {
    assert!(size_of::<ServiceKey<[u8; 4]>>() == 8 && size_of::<ServiceKey<[u8; 16]>>() == 20);
    assert!(
        size_of::<Fence>() == 16 && size_of::<Service>() == 32 && size_of::<Config>() == 56 && size_of::<Slot>() == 8
    );
    assert!(size_of::<FlowKey<[u8; 4]>>() == 16 && size_of::<FlowKey<[u8; 16]>>() == 40);
    assert!(size_of::<ReplyKey<[u8; 4]>>() == 16 && size_of::<ReplyKey<[u8; 16]>>() == 40);
    assert!(size_of::<Reply<[u8; 4]>>() == 20 && size_of::<Reply<[u8; 16]>>() == 32);
    assert!(size_of::<RangeKey<[u8; 4]>>() == 8 && size_of::<RangeKey<[u8; 16]>>() == 20);
    assert!(size_of::<AffinityKey<[u8; 4]>>() == 8 && size_of::<AffinityKey<[u8; 16]>>() == 20);
    assert!(size_of::<RevKey<[u8; 4]>>() == 8 && size_of::<Rev<[u8; 16]>>() == 20);
    assert!(size_of::<VipAt<[u8; 4]>>() == 8 && size_of::<VipAt<[u8; 16]>>() == 20);
    assert!(size_of::<Endpoint<[u8; 4]>>() == 12 && size_of::<Endpoint<[u8; 16]>>() == 24);
};
