//! A packet's way through the program: address, VIP, headers, decision, rewrite, one reason.

use aya_ebpf::programs::TcContext;
use purelb_common::decide::{self, FRAGMENT, Flow, Tables, Verdict};
use purelb_common::neighbour;
use purelb_common::parse::{self, ACK, Frame as _, Ip, Network, SYN, TCP, UDP};
use purelb_common::reply;
use purelb_common::table::{Endpoint, Event, ReplyKey, Service, VIP_OTHER_PROTOCOLS};
use purelb_common::verdict::{self, Action, Reason};

use crate::maps::{self, Family, Maps};
use crate::packet::{Change, Packet, Side, Skb, own_udp_socket};

/// Ingress at an uplink, XDP or tcx.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P) -> Action {
    match parse::ethernet(packet) {
        Some((<[u8; 4] as Ip>::ETHERTYPE, at)) => family::<[u8; 4], P>(packet, at),
        Some((<[u8; 16] as Ip>::ETHERTYPE, at)) => family::<[u8; 16], P>(packet, at),
        Some((neighbour::ARP, at)) => action(arp(packet, at)).unwrap_or_else(not_vip),
        _ => not_vip(),
    }
}

#[inline(always)]
fn not_vip() -> Action {
    maps::count(Reason::NotVip as u32);
    Action::Pass
}

#[inline(always)]
fn family<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> Action
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let Some((_, vip)) = A::addresses(packet, at) else { return not_vip() };
    if maps::maybe_vip(vip)
        && let Some(action) = action(vip_packet::<A, P>(packet, at))
    {
        return action;
    }
    if A::noteworthy(packet, at)
        && let Some(action) = action(noted::<A, P>(packet, at))
    {
        return action;
    }
    not_vip()
}

/// Traffic that is not for a VIP leaves untouched; a SYN for an endpoint's own address is remembered (4.3), and who asks
/// the link for a VIP does so by an address that many share.
#[inline(never)]
fn noted<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> u32
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let Ok(n) = A::network(packet, at) else { return NEITHER };
    let Some((client, addr)) = A::addresses(packet, at) else { return NEITHER };
    if let Some(target) = A::solicited(packet, &n) {
        return asked(packet, client, target, u16::from(n.proto));
    }
    if n.proto == TCP
        && !n.later_fragment
        && let Some([flags]) = packet.load(n.transport + 13)
        && flags & (SYN | ACK) == SYN
        && let Some([s0, s1, d0, d1]) = packet.load(n.transport)
        && let Some(config) = maps::config()
    {
        let (client_port, pod_port) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
        let key = ReplyKey { pod: addr, client, pod_port, client_port, proto: 6 };
        let tick = maps::tick();
        if reply::direct(&Maps, config, &key, tick) {
            A::put_direct(&key, tick);
        }
    }
    NEITHER
}

/// An ARP request for a VIP; any other ARP leaves untouched.
#[inline(never)]
fn arp<P: Packet>(packet: &P, at: usize) -> u32 {
    let Some((asker, target)) = neighbour::arp(packet, at) else { return NEITHER };
    asked(packet, asker, target, neighbour::ARP)
}

/// Somebody asks the link for an address.
#[inline(always)]
fn asked<A: Ip + Family, P: Packet>(packet: &P, asker: A, target: A, proto: u16) -> u32 {
    if !maps::maybe_vip(target) {
        return NEITHER;
    }
    let reason = if packet.other_host() { Reason::PassedOtherHost } else { answer(target) };
    let flow = Flow { client: asker, vip: target, client_port: 0, port: 0, flags: 0 };
    leave(packet, &flow, &Left::early(reason, proto))
}

/// Whether the kernel may answer for an address.
#[inline(always)]
fn answer<A: Family>(target: A) -> Reason {
    neighbour::judge(target.vip().map_or(0, |vip| vip.flags), maps::fenced)
}

/// What [`vip_packet`], [`noted`] and [`arp`] answer, each of whose frames must end before the next one's begins.
const PASS: u32 = 0;
const DROP: u32 = 1;
/// Two addresses share a bit of the bitmap, and this one is no VIP.
const NEITHER: u32 = 2;

/// None: it goes on.
#[inline(always)]
const fn action(answer: u32) -> Option<Action> {
    match answer {
        PASS => Some(Action::Pass),
        DROP => Some(Action::Drop),
        _ => None,
    }
}

#[inline(always)]
fn vip_packet<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> u32
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let Some((client, vip)) = A::addresses(packet, at) else { return NEITHER };
    let mut flow = Flow { client, vip, client_port: 0, port: 0, flags: 0 };
    let left = judge(packet, at, &mut flow);
    if left.reason == Reason::Forwarded as u32 {
        maps::count(Reason::Forwarded as u32);
        return PASS;
    }
    leave(packet, &flow, &left)
}

/// Why a packet leaves, and what was known of it.
struct Left {
    /// A [`Reason`], or [`OTHER_PROTOCOL`] or [`NO_SERVICE`].
    reason: u32,
    /// [`Service::id`], or `u32::MAX`: nothing says yet that the address is a VIP.
    service: u32,
    /// IP protocol, or the ethertype of ARP.
    proto: u16,
}

impl Left {
    #[inline(always)]
    fn early(reason: Reason, proto: u16) -> Self {
        Self { reason: reason as u32, service: u32::MAX, proto }
    }
}

/// Reads the headers of a packet for a VIP, and steers it.
#[inline(always)]
fn judge<A: Ip + Family, P: Packet>(packet: &P, at: usize, flow: &mut Flow<A>) -> Left
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    if packet.other_host() {
        return Left::early(Reason::PassedOtherHost, 0);
    }
    if A::FAMILY == 6 && flow.client.mapped() {
        return Left::early(Reason::MappedAddress, 0);
    }
    let n = match A::network(packet, at) {
        Ok(n) => n,
        Err(reason) => return Left::early(reason, 0),
    };
    if n.later_fragment {
        // Without its first fragment, which is judged, nothing is ever reassembled.
        return Left::early(Reason::PassedFragment, u16::from(n.proto));
    }
    match n.proto {
        TCP | UDP => {}
        parse::ICMP if A::FAMILY == 4 => return Left::early(icmp::<A, P>(packet, &n), u16::from(n.proto)),
        parse::ICMPV6 if A::FAMILY == 6 => return Left::early(icmp::<A, P>(packet, &n), u16::from(n.proto)),
        proto => return Left { reason: OTHER_PROTOCOL, service: u32::MAX, proto: u16::from(proto) },
    }
    let t = match parse::transport(packet, &n, at) {
        Ok(t) => t,
        Err(reason) => return Left::early(reason, u16::from(n.proto)),
    };
    flow.client_port = t.source;
    flow.port = t.destination;
    flow.flags = u32::from(t.flags) | if n.first_fragment { FRAGMENT } else { 0 };
    steer(packet, flow, at, &n)
}

/// Instead of a reason: a protocol that is neither TCP nor UDP.
const OTHER_PROTOCOL: u32 = u32::MAX - 1;

#[inline(always)]
fn icmp<A: Ip + Family, P: Packet>(packet: &P, n: &Network) -> Reason {
    if let Some(target) = A::solicited(packet, n)
        && maps::maybe_vip(target)
    {
        return answer(target);
    }
    match packet.load::<8>(n.transport) {
        None => Reason::Malformed,
        Some([kind, ..]) if parse::icmp_may_pass(n.proto, kind, n.hop_limit) => Reason::PassedProtocol,
        Some(_) => Reason::IcmpType,
    }
}

#[inline(always)]
fn steer<A: Ip + Family, P: Packet>(packet: &P, flow: &Flow<A>, at: usize, n: &Network) -> Left
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let mut left = Left { reason: NO_SERVICE, service: u32::MAX, proto: u16::from(n.proto) };
    let Some(config) = maps::config() else { return left };
    let Some(found) = decide::find(&Maps, config, flow, u16::from(n.proto)) else { return left };
    left.service = found.service.id;
    if !decide::allowed(&Maps, &found, flow) {
        left.reason = Reason::SourceRange as u32;
        return left;
    }
    let tick = maps::tick();
    let (addr, port, new);
    if n.proto == TCP
        && let Some(endpoint) = decide::settled(&Maps, config, flow, &found, tick)
    {
        (addr, port, new) = (endpoint.addr, endpoint.port, false);
    } else {
        let mut to = Verdict::none(flow.vip);
        let reason = if n.proto == TCP {
            decide::decide_found::<A, Maps, 6>(&Maps, config, flow, &found, tick, &mut to)
        } else {
            decide::decide_found::<A, Maps, 17>(&Maps, config, flow, &found, tick, &mut to)
        };
        if reason != Reason::Forwarded {
            left.reason = reason as u32;
            return left;
        }
        (addr, port, new) = (to.addr, to.port as u16, to.new != 0);
    }
    let change = Change { old: flow.vip, new: addr, old_port: flow.port, new_port: port };
    let side = Side::Destination;
    let rewritten = if n.proto == TCP {
        packet.rewrite::<A, 6>(at, n.transport, side, &change)
    } else {
        packet.rewrite::<A, 17>(at, n.transport, side, &change)
    };
    left.reason = if rewritten.is_some() { Reason::Forwarded } else { Reason::Malformed } as u32;
    if rewritten.is_some() {
        maps::count_service(left.service, n.length, new, false);
    }
    left
}

/// Instead of a reason: no Service has the port.
const NO_SERVICE: u32 = u32::MAX;

/// Everything but a rewritten packet: what the VIP says of it, lapse of drops when the tables are
/// stale (D17), counters, samples. [`NEITHER`] when the address is no VIP after all.
#[inline(always)]
fn leave<A: Ip + Family, P: Packet>(packet: &P, flow: &Flow<A>, left: &Left) -> u32 {
    let Some(config) = maps::config() else { return PASS };
    let Left { mut reason, service, proto } = *left;
    // With a Service there is a VIP.
    if service == u32::MAX {
        let Some(vip) = flow.vip.vip() else { return NEITHER };
        if reason == OTHER_PROTOCOL {
            let pass = vip.flags & VIP_OTHER_PROTOCOLS != 0;
            reason = if pass { Reason::PassedProtocol } else { Reason::UnknownPort } as u32;
        } else if reason == NO_SERVICE {
            let socket = || own_udp_socket(packet, flow.client, flow.vip, flow.client_port, flow.port);
            reason = decide::unknown(config, vip.flags, flow, proto, socket) as u32;
        }
    }
    if verdict::action(reason) == Action::Drop {
        let tick = maps::tick();
        // The fence is for an agent that is silent.
        if reason != Reason::Fenced as u32 && decide::stale(config, tick) {
            reason = Reason::PassedStale as u32;
        } else {
            if service != u32::MAX {
                maps::count_service(service, 0, false, true);
            }
            if maps::sampled(config, tick) {
                sample(packet, flow, reason, proto);
            }
        }
    }
    maps::count(reason);
    if verdict::action(reason) == Action::Drop { DROP } else { PASS }
}

/// A frame of its own for what few packets need.
#[inline(never)]
fn sample<A: Ip, P: Packet>(packet: &P, flow: &Flow<A>, reason: u32, proto: u16) {
    maps::sample(&Event {
        client: flow.client.wide(),
        vip: flow.vip.wide(),
        client_port: flow.client_port,
        port: flow.port,
        reason,
        family: A::FAMILY,
        proto,
        ifindex: packet.ifindex(),
    });
}

/// Egress at an uplink: replies get their VIP back, everything else leaves untouched.
#[inline(always)]
pub fn egress(context: TcContext) {
    let packet = Skb::new(context);
    let reason = match parse::ethernet(&packet) {
        Some((<[u8; 4] as Ip>::ETHERTYPE, at)) => replies::<[u8; 4]>(&packet, at),
        Some((<[u8; 16] as Ip>::ETHERTYPE, at)) => replies::<[u8; 16]>(&packet, at),
        _ => None,
    };
    maps::count(reason.unwrap_or(Reason::NotReply) as u32);
}

#[inline(always)]
fn replies<A: Ip + Family>(packet: &Skb, at: usize) -> Option<Reason>
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let n = A::network(packet, at).ok()?;
    if n.later_fragment {
        return None;
    }
    match n.proto {
        TCP => translated::<A, 6>(packet, at, &n),
        UDP => translated::<A, 17>(packet, at, &n),
        _ => None,
    }
}

#[inline(always)]
fn translated<A: Ip + Family, const PROTO: u16>(packet: &Skb, at: usize, n: &Network) -> Option<Reason>
where
    Maps: Tables<A, Service = &'static Service, Endpoint = &'static Endpoint<A>>,
{
    let (pod, client) = A::addresses(packet, at)?;
    // GSO packets and replies are the node's own output: only ports and flags are read, lengths are not judged.
    let [s0, s1, d0, d1] = packet.load(n.transport)?;
    let flags = if PROTO == 6 { u32::from(packet.load::<14>(n.transport)?[13]) } else { 0 };
    let key = ReplyKey {
        pod,
        client,
        pod_port: u16::from_be_bytes([s0, s1]),
        client_port: u16::from_be_bytes([d0, d1]),
        proto: u32::from(PROTO),
    };
    let config = maps::config()?;
    let (vip, port, reason) = reply::reply::<A, Maps, PROTO>(&Maps, config, &key, flags, maps::tick())?;
    let change = Change { old: pod, new: vip, old_port: key.pod_port, new_port: port };
    packet.rewrite::<A, PROTO>(at, n.transport, Side::Source, &change)?;
    Some(reason)
}
