//! Broken frames towards a VIP: cut anywhere, or with headers that contradict themselves, they are
//! dropped or left untouched and counted once, and never reach an endpoint.

use anyhow::{Context as _, Result, ensure};
use purelb_common::verdict::Reason;
use purelb_tests::case::{CLIENT, DNS, Hook, WEB, World};
use purelb_tests::packet::{Family, L4, Packet};

const BOTH: [Hook; 2] = [Hook::Xdp, Hook::Tcx];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const SYN: u8 = 2;

fn tcp() -> Packet {
    Packet::new(L4::Tcp(SYN), CLIENT, WEB)
}

fn udp() -> Packet {
    Packet::new(L4::Udp, CLIENT, DNS)
}

fn shapes() -> Vec<Packet> {
    let mut shapes = Vec::new();
    for base in [tcp(), udp(), Packet::new(L4::Icmp(8, 128), CLIENT, WEB)] {
        for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
            for extras in 0..3 {
                shapes.push(Packet { tags, extras, ..base.clone() });
            }
        }
        shapes.push(Packet { fragment: Some((0, true)), ..base.clone() });
    }
    shapes
}

/// Bytes of the transport header.
fn header(packet: &Packet) -> usize {
    if matches!(packet.l4, L4::Tcp(_)) { 20 } else { 8 }
}

/// Cut anywhere: before the destination address ends the frame is not ours, after it malformed.
#[test]
fn every_truncation() -> Result<()> {
    let mut w = World::load()?;
    let mut runs = 0;
    for family in FAMILIES {
        w.reset(family)?;
        w.base()?;
        for packet in shapes() {
            let frame = packet.bytes(family)?;
            let address = packet.network() + if family == Family::V4 { 20 } else { 40 };
            for length in 0..frame.len() {
                let cut = frame.get(..length).context("length")?;
                for hook in BOTH {
                    // The kernel itself builds no packet out of the shortest frames.
                    let Some(out) = w.run(hook, cut)? else { continue };
                    runs += 1;
                    let reason = if length < address { Reason::NotVip } else { Reason::Malformed };
                    ensure!(
                        out.reasons == [reason],
                        "{hook:?} {family:?} {packet:?} cut to {length}: {:?}",
                        out.reasons
                    );
                    ensure!(out.action == reason.action(), "{packet:?} cut to {length}: {:?}", out.action);
                    ensure!(out.frame == cut, "{packet:?} cut to {length} was changed");
                }
            }
        }
    }
    ensure!(runs > 2000, "only {runs} runs: the kernel refused the others");
    Ok(())
}

/// A header byte that contradicts the rest.
struct Lie {
    name: &'static str,
    packet: Packet,
    families: &'static [Family],
    /// From the network header, or the transport header.
    in_transport: bool,
    at: usize,
    bytes: &'static [u8],
    reason: Reason,
}

fn lie(name: &'static str, packet: Packet, families: &'static [Family], at: usize, bytes: &'static [u8]) -> Lie {
    Lie { name, packet, families, in_transport: false, at, bytes, reason: Reason::Malformed }
}

fn transport_lie(name: &'static str, packet: Packet, at: usize, bytes: &'static [u8]) -> Lie {
    Lie { in_transport: true, ..lie(name, packet, &FAMILIES, at, bytes) }
}

#[test]
fn contradictions() -> Result<()> {
    const V4: &[Family] = &[Family::V4];
    const V6: &[Family] = &[Family::V6];
    let lies = [
        lie("version 5", tcp(), V4, 0, &[0x55]),
        lie("version 6 in IPv4", tcp(), V4, 0, &[0x65]),
        lie("header of 16 bytes", tcp(), V4, 0, &[0x44]),
        lie("header of 0 bytes", udp(), V4, 0, &[0x40]),
        lie("total length 0", udp(), V4, 2, &[0, 0]),
        lie("total length of half a header", udp(), V4, 2, &[0, 10]),
        lie("total length without TCP", tcp(), V4, 2, &[0, 20]),
        lie("total length of half of TCP", tcp(), V4, 2, &[0, 39]),
        lie("total length of half of UDP", udp(), V4, 2, &[0, 27]),
        lie("version 4 in IPv6", tcp(), V6, 0, &[0x40]),
        lie("payload length 0, TCP", tcp(), V6, 4, &[0, 0]),
        lie("payload length 0, UDP", udp(), V6, 4, &[0, 0]),
        lie("payload length of half of TCP", tcp(), V6, 4, &[0, 19]),
        lie("payload length below UDP's", udp(), V6, 4, &[0, 40]),
        lie("five extension headers", Packet { extras: 5, ..tcp() }, V6, 7, &[61]),
        lie("extension header that leaves the frame", Packet { extras: 1, ..tcp() }, V6, 41, &[255]),
        lie("extension header that ends the packet", Packet { extras: 1, ..udp() }, V6, 41, &[4]),
        transport_lie("TCP header of 16 bytes", tcp(), 12, &[0x40]),
        transport_lie("TCP header of 0 bytes", tcp(), 12, &[0]),
        transport_lie("TCP header beyond the packet", tcp(), 12, &[0xf0]),
        transport_lie("UDP length 0", udp(), 4, &[0, 0]),
        transport_lie("UDP length 7", udp(), 4, &[0, 7]),
        transport_lie("UDP length beyond the packet", udp(), 4, &[0, 42]),
        transport_lie("UDP length of 65535", udp(), 4, &[0xff, 0xff]),
    ];
    let mut w = World::load()?;
    let mut failures = Vec::new();
    for lie in lies {
        for &family in lie.families {
            let mut frame = lie.packet.bytes(family)?;
            let base = if lie.in_transport { lie.packet.transport(family) } else { lie.packet.network() };
            frame.get_mut(base + lie.at..).context("offset")?.iter_mut().zip(lie.bytes).for_each(|(to, &b)| *to = b);
            for hook in BOTH {
                w.reset(family)?;
                w.base()?;
                let out = w.run(hook, &frame)?.context("the kernel refuses the frame")?;
                if out.reasons != [lie.reason] || out.action != lie.reason.action() || out.frame != frame {
                    failures.push(format!("{} ({family:?}, {hook:?}): {:?} {:?}", lie.name, out.reasons, out.action));
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// Whatever bytes come: one reason, its verdict, and no change unless it was forwarded.
#[test]
fn random_bytes() -> Result<()> {
    let mut w = World::load()?;
    // xorshift with a fixed seed: a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    for family in FAMILIES {
        w.reset(family)?;
        w.base()?;
        let shapes = shapes();
        for _ in 0..3000 {
            let packet = shapes.get(next(shapes.len())).context("shape")?;
            let mut frame = packet.bytes(family)?;
            let headers = packet.transport(family) + header(packet);
            for _ in 0..=next(4) {
                let at = 12 + next(headers - 12);
                if let Some(byte) = frame.get_mut(at) {
                    *byte = next(256) as u8;
                }
            }
            for hook in BOTH {
                let Some(out) = w.run(hook, &frame)? else { continue };
                let [reason] = out.reasons.as_slice() else {
                    anyhow::bail!("{hook:?} counted {:?} for {frame:02x?}", out.reasons);
                };
                ensure!(out.action == reason.action(), "{hook:?} {reason:?} {:?} for {frame:02x?}", out.action);
                ensure!(*reason == Reason::Forwarded || out.frame == frame, "{hook:?} {reason:?} changed {frame:02x?}");
            }
        }
    }
    Ok(())
}
