//! Questions for a MAC address, described once for both families: ARP in IPv4, neighbour discovery in IPv6.

use std::net::Ipv6Addr;

use anyhow::{Context as _, Result};
use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv6Header, Icmpv6Type, IpNumber, Ipv6Header};

use crate::packet::{Family, Host};

/// MAC address of the asker.
const ASKER: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Who asks for what, and how.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its address; none: a probe for duplicates.
    pub asker: Option<Host>,
    /// The address whose owner shall answer.
    pub target: Host,
    /// It is no question but an answer: ARP reply, neighbour advertisement.
    pub answer: bool,
    /// To the target itself, which the asker knows already, instead of to all.
    pub unicast: bool,
    /// Ethertypes of the tags, the outer first.
    pub tags: &'static [u16],
    /// Destination MAC address of a unicast; all zero is the loopback device's, which test runs use.
    pub mac: [u8; 6],
    /// IPv6: 255 unless it came through a router.
    pub hop_limit: u8,
    /// IPv6: extension headers before the message.
    pub extras: u8,
}

impl Question {
    /// From the first client.
    #[must_use]
    pub const fn new(target: Host) -> Self {
        Self {
            asker: Some(Host::Client(1)),
            target,
            answer: false,
            unicast: false,
            tags: &[],
            mac: [0; 6],
            hop_limit: 255,
            extras: 0,
        }
    }

    /// Offset of what follows Ethernet's header.
    #[must_use]
    pub const fn network(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// The bytes of the frame.
    ///
    /// # Errors
    /// A description that no frame can hold.
    pub fn bytes(&self, family: Family) -> Result<Vec<u8>> {
        let [.., a, b, c] = self.target.v6();
        let mac = match (family, self.unicast) {
            (_, true) => self.mac,
            (Family::V4, _) => [0xff; 6],
            (Family::V6, _) => [0x33, 0x33, 0xff, a, b, c],
        };
        let mut frame = [mac, ASKER].concat();
        for tag in self.tags {
            frame.extend_from_slice(&tag.to_be_bytes());
            frame.extend_from_slice(&[0, 100]);
        }
        match family {
            Family::V4 => self.v4(&mut frame)?,
            Family::V6 => self.v6(&mut frame)?,
        }
        Ok(frame)
    }

    fn v4(&self, frame: &mut Vec<u8>) -> Result<()> {
        let operation = if self.answer { ArpOperation::REPLY } else { ArpOperation::REQUEST };
        let asker = self.asker.map_or([0; 4], Host::v4);
        let (hardware, protocol) = (ArpHardwareId::ETHERNET, EtherType::IPV4);
        let arp = ArpPacket::new(hardware, protocol, operation, &ASKER, &asker, &[0; 6], &self.target.v4())?;
        frame.extend_from_slice(&[8, 6]);
        frame.extend_from_slice(&arp.to_bytes());
        Ok(())
    }

    fn v6(&self, frame: &mut Vec<u8>) -> Result<()> {
        let target = self.target.v6();
        let [.., a, b, c] = target;
        let all = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
        let source = self.asker.map_or(Ipv6Addr::UNSPECIFIED.octets(), Host::v6);
        let destination = if self.unicast { target } else { all };
        // The asker's own MAC address as an option, but for a probe.
        let option: &[u8] = if self.asker.is_some() { &[1, 1, 2, 0, 0, 0, 0, 1] } else { &[] };
        let payload = [&target[..], option].concat();
        let kind = if self.answer {
            Icmpv6Type::NeighborAdvertisement(NeighborAdvertisementHeader {
                router: false,
                solicited: true,
                r#override: true,
            })
        } else {
            Icmpv6Type::NeighborSolicitation
        };
        let icmp = Icmpv6Header::with_checksum(kind, source, destination, &payload)?;
        let mut rest = Vec::new();
        for left in (0..self.extras).rev() {
            rest.extend_from_slice(&[if left == 0 { 58 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        rest.extend_from_slice(&icmp.to_bytes());
        rest.extend_from_slice(&payload);
        let ip = Ipv6Header {
            payload_length: u16::try_from(rest.len()).context("payload")?,
            next_header: if self.extras > 0 { IpNumber(60) } else { IpNumber::IPV6_ICMP },
            hop_limit: self.hop_limit,
            source,
            destination,
            ..Ipv6Header::default()
        };
        frame.extend_from_slice(&[0x86, 0xdd]);
        frame.extend_from_slice(&ip.to_bytes());
        frame.extend_from_slice(&rest);
        Ok(())
    }
}
