//! The frames, built and read: pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, Icmpv6Header, Icmpv6Type, IpNumber, Ipv6Header,
    NetSlice, SlicedPacket, TransportSlice,
};

/// A MAC address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Options of neighbour discovery, each eight bytes long.
const TARGET_LINK_LAYER: u8 = 2;
const NONCE: u8 = 14;

/// What PureLB sends for an address that comes: for IPv4 a request and a reply, for IPv6 an unsolicited advertisement, from
/// the link-local address.
#[must_use]
pub fn announcement(vip: IpAddr, mac: Mac, link_local: Option<Ipv6Addr>) -> Vec<Vec<u8>> {
    match vip {
        IpAddr::V4(vip) => {
            [ArpOperation::REQUEST, ArpOperation::REPLY].map(|operation| gratuitous(operation, vip, mac)).into()
        }
        IpAddr::V6(vip) => link_local.map(|source| advertisement(vip, mac, source)).into_iter().collect(),
    }
}

fn gratuitous(operation: ArpOperation, vip: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let vip = vip.octets();
    let arp =
        ArpEthIpv4Packet { operation, sender_mac: mac, sender_ipv4: vip, target_mac: BROADCAST, target_ipv4: vip };
    arp_frame(&arp)
}

fn advertisement(vip: Ipv6Addr, mac: Mac, source: Ipv6Addr) -> Vec<u8> {
    let kind = NeighborAdvertisementHeader { router: false, solicited: false, r#override: true };
    message(Icmpv6Type::NeighborAdvertisement(kind), mac, (source, ALL_NODES), vip, TARGET_LINK_LAYER, mac)
}

/// Asks who has an address without a claim to it: an ARP probe (RFC 5227), or a solicitation as for the detection of
/// duplicates (RFC 4862) with a nonce (RFC 7527).
#[must_use]
pub fn probe(vip: IpAddr, mac: Mac, nonce: [u8; 6]) -> Vec<u8> {
    match vip {
        IpAddr::V4(vip) => arp_frame(&ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: mac,
            sender_ipv4: [0; 4],
            target_mac: [0; 6],
            target_ipv4: vip.octets(),
        }),
        IpAddr::V6(vip) => {
            let [.., x, y] = vip.segments();
            let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | x & 0xff, y);
            message(Icmpv6Type::NeighborSolicitation, mac, (Ipv6Addr::UNSPECIFIED, group), vip, NONCE, nonce)
        }
    }
}

fn arp_frame(arp: &ArpEthIpv4Packet) -> Vec<u8> {
    let ethernet = Ethernet2Header { source: arp.sender_mac, destination: BROADCAST, ether_type: EtherType::ARP };
    [&ethernet.to_bytes()[..], &arp.to_bytes()].concat()
}

/// A message of neighbour discovery to a multicast group, with one option.
fn message(
    kind: Icmpv6Type,
    mac: Mac,
    (source, group): (Ipv6Addr, Ipv6Addr),
    target: Ipv6Addr,
    option: u8,
    value: [u8; 6],
) -> Vec<u8> {
    let payload = [&target.octets()[..], &[option, 1], &value].concat();
    let (source, destination) = (source.octets(), group.octets());
    // Only a payload of 4 GiB has no checksum.
    let icmp = Icmpv6Header::with_checksum(kind, source, destination, &payload).unwrap_or(Icmpv6Header::new(kind));
    let ip = Ipv6Header {
        payload_length: (icmp.header_len() + payload.len()) as u16,
        next_header: IpNumber::IPV6_ICMP,
        hop_limit: 255,
        source,
        destination,
        ..Ipv6Header::default()
    };
    let [.., a, b, c, d] = destination;
    let ethernet = Ethernet2Header { source: mac, destination: [0x33, 0x33, a, b, c, d], ether_type: EtherType::IPV6 };
    [&ethernet.to_bytes()[..], &ip.to_bytes(), &icmp.to_bytes(), &payload].concat()
}

/// Somebody has an address, or is about to take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub ip: IpAddr,
    /// Where it is.
    pub mac: Mac,
    /// He only probes for it: no claim against who has it already, but one against who probes, too.
    pub probes: bool,
}

/// What a frame claims, whoever sent it: any ARP claims its sender's address, an advertisement its target. A question claims
/// nothing, but for the probe, which has no sender's address.
#[must_use]
pub fn claim(frame: &[u8]) -> Option<Claim> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    match (packet.net?, packet.transport) {
        (NetSlice::Arp(arp), _) => {
            let arp = arp.to_packet().try_eth_ipv4().ok()?;
            let probes = arp.sender_ipv4 == [0; 4];
            let ip = if probes { arp.target_ipv4 } else { arp.sender_ipv4 };
            let known = matches!(arp.operation, ArpOperation::REPLY | ArpOperation::REQUEST);
            let said = known && (!probes || arp.operation == ArpOperation::REQUEST);
            said.then(|| Claim { ip: ip.into(), mac: arp.sender_mac, probes })
        }
        (NetSlice::Ipv6(ip), Some(TransportSlice::Icmpv6(icmp))) => {
            let header = ip.header();
            let valid = header.hop_limit() == 255
                && icmp.code_u8() == 0
                && icmp.is_checksum_valid(header.source(), header.destination());
            let probes = matches!(icmp.icmp_type(), Icmpv6Type::NeighborSolicitation);
            let from_nobody = header.source_addr().is_unspecified();
            let said = matches!(icmp.icmp_type(), Icmpv6Type::NeighborAdvertisement(_)) || probes && from_nobody;
            if !valid || !said {
                return None;
            }
            let (target, options) = icmp.payload().split_first_chunk::<16>()?;
            let mac = target_mac(options).or_else(|| frame.get(6..)?.first_chunk().copied())?;
            Some(Claim { ip: Ipv6Addr::from(*target).into(), mac, probes })
        }
        _ => None,
    }
}

/// The target's MAC address, if an advertisement has it.
fn target_mac(mut options: &[u8]) -> Option<Mac> {
    while let [kind, words, rest @ ..] = options {
        if *words == 0 {
            return None;
        }
        if *kind == TARGET_LINK_LAYER {
            return rest.first_chunk().copied();
        }
        options = options.get(usize::from(*words) * 8..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    fn v4() -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, 1)
    }

    fn v6() -> Ipv6Addr {
        "2001:db8::12:3456".parse().unwrap()
    }

    /// Byte for byte what PureLB sends.
    #[test]
    fn arp_announcement() {
        let frames = announcement(v4().into(), MAC, None);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            let head = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, operation];
            let sender = [2, 0, 0, 0, 0, 7, 192, 0, 2, 1];
            let target = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 192, 0, 2, 1];
            assert_eq!(*frame, [&head[..], &sender, &target].concat());
            assert_eq!(claim(frame), Some(Claim { ip: v4().into(), mac: MAC, probes: false }));
        }
        assert_eq!(frames.len(), 2);
    }

    #[test]
    fn arp_probe() {
        let frame = probe(v4().into(), MAC, [9; 6]);
        let head = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
        let rest = [2, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1];
        assert_eq!(frame, [&head[..], &rest].concat());
        assert_eq!(claim(&frame), Some(Claim { ip: v4().into(), mac: MAC, probes: true }));
    }

    #[test]
    fn unsolicited_advertisement() {
        assert_eq!(announcement(v6().into(), MAC, None), [[0u8; 0]; 0], "no link-local address");
        let frames = announcement(v6().into(), MAC, Some("fe80::7".parse().unwrap()));
        let frame = &frames[0];
        assert_eq!((frames.len(), frame.len()), (1, 14 + 40 + 32));
        assert_eq!(frame[..14], [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 7, 0x86, 0xdd]);
        assert_eq!((frame[14 + 6], frame[14 + 7]), (58, 255), "next header, hop limit");
        let addresses: Vec<Ipv6Addr> = ["fe80::7", "ff02::1"].iter().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(frame[22..54], [addresses[0].octets(), addresses[1].octets()].concat());
        // Override only; then the target and its MAC address.
        assert_eq!((frame[54], frame[55], &frame[58..62]), (136, 0, &[0x20, 0, 0, 0][..]));
        assert_eq!(frame[62..78], v6().octets());
        assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 7]);
        assert_eq!(claim(frame), Some(Claim { ip: v6().into(), mac: MAC, probes: false }));
    }

    #[test]
    fn solicitation_as_a_probe() {
        let frame = probe(v6().into(), MAC, [1, 2, 3, 4, 5, 6]);
        assert_eq!(frame[..14], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56, 2, 0, 0, 0, 0, 7, 0x86, 0xdd]);
        let group: Ipv6Addr = "ff02::1:ff12:3456".parse().unwrap();
        assert_eq!(frame[22..54], [[0; 16], group.octets()].concat());
        assert_eq!((frame[21], frame[54], frame[55]), (255, 135, 0));
        assert_eq!(frame[62..], [&v6().octets()[..], &[14, 1, 1, 2, 3, 4, 5, 6]].concat());
        assert_eq!(claim(&frame), Some(Claim { ip: v6().into(), mac: MAC, probes: true }));
    }

    /// What is no claim: questions, and what the kernel would not believe either.
    #[test]
    fn no_claims() {
        let advertisement = announcement(v6().into(), MAC, Some("fe80::7".parse().unwrap())).remove(0);
        let with = |at: usize, byte: u8| {
            let mut frame = advertisement.clone();
            frame[at] = byte;
            claim(&frame)
        };
        assert!(with(60, 0).is_some(), "as it was");
        assert_eq!(with(21, 254), None, "hop limit");
        assert_eq!(with(55, 1), None, "code");
        assert_eq!(with(70, 99), None, "checksum");
        for length in 0..advertisement.len() {
            assert_eq!(claim(&advertisement[..length]), None, "cut to {length}");
        }
        // A question of somebody who has an address: about himself only.
        let mut arp = probe(v4().into(), MAC, [0; 6]);
        arp[28..32].copy_from_slice(&[192, 0, 2, 9]);
        assert_eq!(claim(&arp), Some(Claim { ip: [192, 0, 2, 9].into(), mac: MAC, probes: false }));
        arp[21] = 3;
        assert_eq!(claim(&arp), None, "reverse request");
        for length in 0..arp.len() {
            assert_eq!(claim(&arp[..length]), None, "cut to {length}");
        }
        let from: Ipv6Addr = "fe80::9".parse().unwrap();
        let question = message(Icmpv6Type::NeighborSolicitation, MAC, (from, ALL_NODES), v6(), 1, MAC);
        assert_eq!(claim(&question), None);
    }

    /// An advertisement that another sends for the target, and one without the option.
    #[test]
    fn the_option_goes_before_the_frame() {
        let kind = NeighborAdvertisementHeader { router: false, solicited: false, r#override: true };
        let kind = Icmpv6Type::NeighborAdvertisement(kind);
        let of = |option| claim(&message(kind, MAC, (v6(), ALL_NODES), v6(), option, [8; 6])).map(|claim| claim.mac);
        assert_eq!(of(TARGET_LINK_LAYER), Some([8; 6]));
        assert_eq!(of(NONCE), Some(MAC));
        assert_eq!(target_mac(&[1, 0, 2, 1, 8, 8, 8, 8, 8, 8]), None, "a length of 0 ends it");
        assert_eq!(target_mac(&[1, 1, 0, 0, 0, 0, 0, 0, 2, 1, 8, 8, 8, 8, 8, 8]), Some([8; 6]));
    }
}
