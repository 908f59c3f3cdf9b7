//! A packet's way through the program: address, VIP, headers, decision, rewrite, one reason.

use aya_ebpf::programs::TcContext;
use purelb_common::decide::{self, FRAGMENT, Flow, Tables};
use purelb_common::parse::{self, ACK, Frame as _, Ip, Network, SYN, TCP, UDP};
use purelb_common::reply;
use purelb_common::table::{Event, ReplyKey, VIP_OTHER_PROTOCOLS, VIP_UNKNOWN_PASS};
use purelb_common::verdict::{Action, Reason};

use crate::maps::{self, Family, Maps};
use crate::packet::{Change, Packet, Side, Skb, own_udp_socket};

/// What is known of a packet for a VIP when it leaves.
struct Exit<A> {
    reason: Reason,
    service: u32,
    flow: Flow<A>,
    at: usize,
    vip_flags: u32,
    network: Network,
}

/// Ingress at an uplink, XDP or tcx.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P) -> Action {
    match parse::ethernet(packet) {
        Some((<[u8; 4] as Ip>::ETHERTYPE, at)) => family::<[u8; 4], P>(packet, at),
        Some((<[u8; 16] as Ip>::ETHERTYPE, at)) => family::<[u8; 16], P>(packet, at),
        _ => not_vip(),
    }
}

#[inline(always)]
fn not_vip() -> Action {
    maps::count(Reason::NotVip);
    Action::Pass
}

#[inline(always)]
fn family<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> Action
where
    Maps: Tables<A>,
{
    let Some((_, vip)) = A::addresses(packet, at) else { return not_vip() };
    if maps::maybe_vip(vip) {
        match vip_packet::<A, P>(packet, at) {
            PASS => return Action::Pass,
            DROP => return Action::Drop,
            _ => {}
        }
    }
    other::<A, P>(packet, at)
}

/// Traffic that is not for a VIP leaves untouched; a SYN for an endpoint's own address is remembered (4.3).
#[inline(always)]
fn other<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> Action
where
    Maps: Tables<A>,
{
    if let Ok(n) = A::network(packet, at)
        && n.proto == TCP
        && !n.later_fragment
        && let Some([flags]) = packet.load(n.transport + 13)
        && flags & (SYN | ACK) == SYN
    {
        direct::<A, P>(packet, at, n.transport);
    }
    not_vip()
}

#[inline(never)]
fn direct<A: Ip + Family, P: Packet>(packet: &P, at: usize, transport: usize)
where
    Maps: Tables<A>,
{
    if let Some((client, pod)) = A::addresses(packet, at)
        && let Some([s0, s1, d0, d1]) = packet.load(transport)
        && let Some(config) = maps::config()
    {
        let (client_port, pod_port) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
        let key = ReplyKey { pod, client, pod_port, client_port, proto: 6 };
        let tick = maps::tick();
        if reply::direct(&Maps, config, &key, tick) {
            A::put_direct(&key, tick);
        }
    }
}

/// What [`vip_packet`] answers: its frame must end before [`other`]'s begins.
const PASS: u32 = 0;
const DROP: u32 = 1;
/// Two addresses share a bit of the bitmap, and this one is no VIP.
const NEITHER: u32 = 2;

/// A function of its own per family and hook: its frame holds the keys, and the kernel's stack is 512 bytes.
#[inline(never)]
fn vip_packet<A: Ip + Family, P: Packet>(packet: &P, at: usize) -> u32
where
    Maps: Tables<A>,
{
    let Some((client, vip)) = A::addresses(packet, at) else { return NEITHER };
    let mut exit = Exit {
        reason: Reason::PassedProtocol,
        service: u32::MAX,
        flow: Flow { client, vip, client_port: 0, port: 0, flags: 0 },
        at,
        vip_flags: 0,
        network: Network {
            proto: 0,
            transport: 0,
            length: 0,
            later_fragment: false,
            first_fragment: false,
            hop_limit: 0,
        },
    };
    match exit.flow.vip.vip() {
        Some(entry) => exit.vip_flags = entry.flags,
        None => return NEITHER,
    }
    exit.reason = judge(packet, &mut exit);
    match finish(packet, &exit) {
        Action::Pass => PASS,
        Action::Drop => DROP,
    }
}

#[inline(always)]
fn judge<A: Ip + Family, P: Packet>(packet: &P, exit: &mut Exit<A>) -> Reason
where
    Maps: Tables<A>,
{
    let reason = read(packet, exit);
    if reason != READ {
        return Reason::ALL.get(reason as usize).copied().unwrap_or(Reason::Malformed);
    }
    if exit.network.proto == TCP { steer::<A, P, 6>(packet, exit) } else { steer::<A, P, 17>(packet, exit) }
}

/// [`read`] found a TCP or UDP packet.
const READ: u32 = u32::MAX;

/// Reads the headers of a packet for a VIP: [`READ`], or the reason for which it leaves.
#[inline(never)]
fn read<A: Ip + Family, P: Packet>(packet: &P, exit: &mut Exit<A>) -> u32 {
    if packet.other_host() {
        return Reason::PassedOtherHost as u32;
    }
    if A::FAMILY == 6 && exit.flow.client.wide().starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]) {
        return Reason::MappedAddress as u32;
    }
    let n = match A::network(packet, exit.at) {
        Ok(n) => n,
        Err(reason) => return reason as u32,
    };
    exit.network = n;
    if n.later_fragment {
        // Without its first fragment, which is judged, nothing is ever reassembled.
        return Reason::PassedFragment as u32;
    }
    let reason = match n.proto {
        TCP | UDP => match parse::transport(packet, &n, exit.at) {
            Ok(t) => {
                exit.flow.client_port = t.source;
                exit.flow.port = t.destination;
                exit.flow.flags = u32::from(t.flags) | if n.first_fragment { FRAGMENT } else { 0 };
                return READ;
            }
            Err(reason) => reason,
        },
        parse::ICMP if A::FAMILY == 4 => icmp(packet, &n),
        parse::ICMPV6 if A::FAMILY == 6 => icmp(packet, &n),
        _ if exit.vip_flags & VIP_OTHER_PROTOCOLS != 0 => Reason::PassedProtocol,
        _ => Reason::UnknownPort,
    };
    reason as u32
}

#[inline(always)]
fn icmp<P: Packet>(packet: &P, n: &Network) -> Reason {
    match packet.load::<8>(n.transport) {
        None => Reason::Malformed,
        Some([kind, ..]) if parse::icmp_may_pass(n.proto, kind, n.hop_limit) => Reason::PassedProtocol,
        Some(_) => Reason::IcmpType,
    }
}

#[inline(always)]
fn steer<A: Ip + Family, P: Packet, const PROTO: u16>(packet: &P, exit: &mut Exit<A>) -> Reason
where
    Maps: Tables<A>,
{
    let mut to = To { addr: exit.flow.vip, port: 0, new: 0, service: u32::MAX };
    let reason = decided::<A, PROTO>(&exit.flow, &mut to);
    if reason == NO_SERVICE {
        return no_service::<A, P, PROTO>(packet, exit);
    }
    exit.service = to.service;
    if reason == Reason::Forwarded as u32 {
        if !rewritten::<A, P, PROTO>(packet, exit, &to) {
            return Reason::Malformed;
        }
        maps::count_service(to.service, exit.network.length, to.new != 0, false);
        return Reason::Forwarded;
    }
    Reason::ALL.get(reason as usize).copied().unwrap_or(Reason::NoEndpoint)
}

#[inline(never)]
fn rewritten<A: Ip + Family, P: Packet, const PROTO: u16>(packet: &P, exit: &Exit<A>, to: &To<A>) -> bool {
    let change = Change { old: (exit.flow.vip, exit.flow.port), new: (to.addr, to.port) };
    packet.rewrite::<A, PROTO>(exit.at, exit.network.transport, Side::Destination, &change).is_some()
}

/// Where a decided packet goes.
#[repr(C, align(8))]
struct To<A> {
    service: u32,
    port: u16,
    new: u16,
    addr: A,
}

/// What [`decided`] answers when no Service has the port.
const NO_SERVICE: u32 = u32::MAX;

/// A frame of its own, once per family and protocol, for both hooks.
#[inline(never)]
fn decided<A: Ip + Family, const PROTO: u16>(flow: &Flow<A>, to: &mut To<A>) -> u32
where
    Maps: Tables<A>,
{
    // A number comes back, not a struct: the verifier refuses functions that leave a stack pointer in r0.
    let Some(config) = maps::config() else { return NO_SERVICE };
    let Some(verdict) = decide::decide::<A, Maps, PROTO>(&Maps, config, flow, maps::tick()) else { return NO_SERVICE };
    to.addr = verdict.endpoint.addr;
    to.port = verdict.endpoint.port;
    to.new = u16::from(verdict.new);
    to.service = verdict.service;
    verdict.reason as u32
}

/// A port of the VIP that no Service has: dropped, unless the node itself asked from it.
#[inline(never)]
fn no_service<A: Ip + Family, P: Packet, const PROTO: u16>(packet: &P, exit: &Exit<A>) -> Reason {
    let flow = &exit.flow;
    let port = u32::from(flow.port);
    let local = maps::config().is_some_and(|c| port >= c.local_port_min && port <= c.local_port_max);
    let own = local
        && if PROTO == 6 {
            flow.flags & u32::from(SYN | ACK) != u32::from(SYN)
        } else {
            own_udp_socket(packet, flow.client, flow.vip, flow.client_port, flow.port)
        };
    if own {
        Reason::PassedOwn
    } else if exit.vip_flags & VIP_UNKNOWN_PASS != 0 {
        Reason::PassedUnknownPort
    } else {
        Reason::UnknownPort
    }
}

/// Counts, samples, and lets drops lapse when the tables are stale (D17).
#[inline(never)]
fn finish<A: Ip, P: Packet>(packet: &P, exit: &Exit<A>) -> Action {
    let mut reason = exit.reason;
    let Some(config) = maps::config() else { return Action::Pass };
    if reason.action() == Action::Drop {
        let silent = maps::tick().wrapping_sub(config.heartbeat);
        if config.heartbeat_limit != 0 && silent < u32::MAX / 2 && silent > config.heartbeat_limit {
            reason = Reason::PassedStale;
        } else {
            maps::count_service(exit.service, 0, false, true);
            if config.sample != 0 && maps::sampled(config.sample) {
                maps::sample(&Event {
                    client: exit.flow.client.wide(),
                    vip: exit.flow.vip.wide(),
                    client_port: exit.flow.client_port,
                    port: exit.flow.port,
                    reason: reason as u32,
                    family: A::FAMILY,
                    proto: u16::from(exit.network.proto),
                    ifindex: packet.ifindex(),
                });
            }
        }
    }
    maps::count(reason);
    reason.action()
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
    maps::count(reason.unwrap_or(Reason::NotReply));
}

#[inline(always)]
fn replies<A: Ip + Family>(packet: &Skb, at: usize) -> Option<Reason>
where
    Maps: Tables<A>,
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
    Maps: Tables<A>,
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
    let change = Change { old: (pod, key.pod_port), new: (vip, port) };
    packet.rewrite::<A, PROTO>(at, n.transport, Side::Source, &change)?;
    Some(reason)
}
