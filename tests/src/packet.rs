//! Frames for the kernel's programs, described once for both families and built by etherparse with
//! right checksums: what a program rewrote is compared with the frame built anew.

use anyhow::{Context as _, Result};
use etherparse::{
    Icmpv6Header, Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader, UdpHeader,
};

/// Address family of a row's run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// Who: the same name has an address in each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// A client outside of the cluster.
    Client(u8),
    /// A load balancer address.
    Vip(u8),
    /// A pod.
    Pod(u8),
    /// An IPv4-mapped IPv6 address; in IPv4 a plain one.
    Mapped,
}

impl Host {
    /// In IPv4.
    #[must_use]
    pub const fn v4(self) -> [u8; 4] {
        match self {
            Self::Client(n) => [198, 18, 0, n],
            Self::Vip(n) => [203, 0, 113, n],
            Self::Pod(n) => [10, 244, 1, n],
            Self::Mapped => [10, 9, 8, 7],
        }
    }
    /// In IPv6.
    #[must_use]
    pub const fn v6(self) -> [u8; 16] {
        match self {
            Self::Client(n) => [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0x12, 0x34, 0, 0, 0, 0, 0, n],
            Self::Vip(n) => [0x20, 1, 0xd, 0xb8, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x56, n],
            Self::Pod(n) => [0xfd, 0, 0, 0x10, 0x02, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0x78, n],
            Self::Mapped => [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 8, 7],
        }
    }
}

/// What the network header carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// With this flag byte.
    Tcp(u8),
    /// The same with 12 bytes of options.
    TcpOptions(u8),
    /// With a checksum.
    Udp,
    /// Checksum 0.
    UdpNoChecksum,
    /// The message type of each family.
    Icmp(u8, u8),
    /// Any other protocol.
    Other(u8),
}

/// One frame.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Source.
    pub from: (Host, u16),
    /// Destination.
    pub to: (Host, u16),
    /// Transport.
    pub l4: L4,
    /// Ethertypes of the tags, the outer first.
    pub tags: &'static [u16],
    /// How many words of IPv4 options, or IPv6 extension headers.
    pub extras: u8,
    /// Offset in 8 bytes, and more fragments.
    pub fragment: Option<(u16, bool)>,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Destination MAC address; all zero is the loopback device's, which test runs use.
    pub mac: [u8; 6],
    /// Bytes after the transport header.
    pub payload: usize,
}

impl Packet {
    /// From the first client to a VIP or whoever.
    #[must_use]
    pub const fn new(l4: L4, from: (Host, u16), to: (Host, u16)) -> Self {
        Self { from, to, l4, tags: &[], extras: 0, fragment: None, hop_limit: 61, mac: [0; 6], payload: 33 }
    }

    /// The same to another destination.
    #[must_use]
    pub fn towards(&self, to: (Host, u16)) -> Self {
        Self { to, ..self.clone() }
    }

    /// The same from another source.
    #[must_use]
    pub fn coming(&self, from: (Host, u16)) -> Self {
        Self { from, ..self.clone() }
    }

    /// Offset of the network header.
    #[must_use]
    pub const fn network(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// Offset of the transport header.
    #[must_use]
    pub const fn transport(&self, family: Family) -> usize {
        let fragment = if matches!(family, Family::V6) && self.fragment.is_some() { 8 } else { 0 };
        self.network()
            + fragment
            + match family {
                Family::V4 => 20 + 4 * self.extras as usize,
                Family::V6 => 40 + 8 * self.extras as usize,
            }
    }

    /// The bytes of the frame.
    ///
    /// # Errors
    /// A description that no frame can hold.
    pub fn bytes(&self, family: Family) -> Result<Vec<u8>> {
        let mut frame = Vec::new();
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&[2, 0, 0, 0, 0, 1]);
        for tag in self.tags {
            frame.extend_from_slice(&tag.to_be_bytes());
            frame.extend_from_slice(&[0, 100]);
        }
        let body = self.body(family)?;
        let proto = match self.l4 {
            L4::Tcp(_) | L4::TcpOptions(_) => 6,
            L4::Udp | L4::UdpNoChecksum => 17,
            L4::Icmp(..) => {
                if family == Family::V4 {
                    1
                } else {
                    58
                }
            }
            L4::Other(n) => n,
        };
        match family {
            Family::V4 => self.v4(&mut frame, proto, &body)?,
            Family::V6 => self.v6(&mut frame, proto, &body)?,
        }
        Ok(frame)
    }

    fn v4(&self, frame: &mut Vec<u8>, proto: u8, body: &[u8]) -> Result<()> {
        frame.extend_from_slice(&[8, 0]);
        let options = vec![1u8; 4 * usize::from(self.extras)];
        let mut ip = Ipv4Header::new(0, self.hop_limit, IpNumber(proto), self.from.0.v4(), self.to.0.v4())?;
        ip.options = Ipv4Options::try_from(options.as_slice())?;
        ip.set_payload_len(body.len())?;
        if let Some((offset, more)) = self.fragment {
            ip.dont_fragment = false;
            ip.more_fragments = more;
            ip.fragment_offset = IpFragOffset::try_new(offset)?;
        }
        ip.header_checksum = ip.calc_header_checksum();
        frame.extend_from_slice(&ip.to_bytes());
        frame.extend_from_slice(body);
        Ok(())
    }

    fn v6(&self, frame: &mut Vec<u8>, proto: u8, body: &[u8]) -> Result<()> {
        frame.extend_from_slice(&[0x86, 0xdd]);
        // Hop-by-hop, destination options, routing, each of eight bytes, then the fragment header.
        let mut chain: Vec<u8> = [0, 60, 43, 60, 60].into_iter().take(usize::from(self.extras)).collect();
        if self.fragment.is_some() {
            chain.push(44);
        }
        chain.push(proto);
        let mut rest = Vec::new();
        for pair in chain.windows(2) {
            if let [kind, next] = pair {
                match (kind, self.fragment) {
                    (44, Some((offset, more))) => {
                        let field = (offset << 3 | u16::from(more)).to_be_bytes();
                        rest.extend_from_slice(&[*next, 0, field[0], field[1], 0, 0, 0, 9]);
                    }
                    // A routing header of type 4 without segments, else padding.
                    (43, _) => rest.extend_from_slice(&[*next, 0, 4, 0, 0, 0, 0, 0]),
                    _ => rest.extend_from_slice(&[*next, 0, 1, 4, 0, 0, 0, 0]),
                }
            }
        }
        rest.extend_from_slice(body);
        let ip = Ipv6Header {
            payload_length: u16::try_from(rest.len()).context("payload")?,
            next_header: IpNumber(chain.first().copied().unwrap_or(proto)),
            hop_limit: self.hop_limit,
            source: self.from.0.v6(),
            destination: self.to.0.v6(),
            ..Ipv6Header::default()
        };
        frame.extend_from_slice(&ip.to_bytes());
        frame.extend_from_slice(&rest);
        Ok(())
    }

    fn body(&self, family: Family) -> Result<Vec<u8>> {
        let payload: Vec<u8> = (0..self.payload).map(|i| (i * 7 + 3) as u8).collect();
        let ((from, source), (to, destination)) = (self.from, self.to);
        let mut body = match self.l4 {
            L4::Tcp(flags) | L4::TcpOptions(flags) => {
                let mut tcp = TcpHeader::new(source, destination, 0x0102_0304, 501);
                (tcp.fin, tcp.syn, tcp.rst) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
                (tcp.psh, tcp.ack, tcp.urg) = (flags & 8 != 0, flags & 16 != 0, flags & 32 != 0);
                if matches!(self.l4, L4::TcpOptions(_)) {
                    tcp.set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])?;
                }
                tcp.checksum = match family {
                    Family::V4 => tcp.calc_checksum_ipv4_raw(from.v4(), to.v4(), &payload)?,
                    Family::V6 => tcp.calc_checksum_ipv6_raw(from.v6(), to.v6(), &payload)?,
                };
                tcp.to_bytes().to_vec()
            }
            L4::Udp | L4::UdpNoChecksum => {
                let length = u16::try_from(8 + payload.len())?;
                let mut udp = UdpHeader { source_port: source, destination_port: destination, length, checksum: 0 };
                if self.l4 == L4::Udp {
                    udp.checksum = match family {
                        Family::V4 => udp.calc_checksum_ipv4_raw(from.v4(), to.v4(), &payload)?,
                        Family::V6 => udp.calc_checksum_ipv6_raw(from.v6(), to.v6(), &payload)?,
                    };
                }
                udp.to_bytes().to_vec()
            }
            L4::Icmp(kind4, kind6) => {
                icmp(family, if family == Family::V4 { kind4 } else { kind6 }, from, to, &payload)?
            }
            L4::Other(_) => vec![0, 80, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        body.extend_from_slice(&payload);
        Ok(body)
    }
}

fn icmp(family: Family, kind: u8, from: Host, to: Host, payload: &[u8]) -> Result<Vec<u8>> {
    let bytes5to8 = [0, 1, 0, 2];
    if family == Family::V4 {
        let kind = etherparse::Icmpv4Type::Unknown { type_u8: kind, code_u8: 0, bytes5to8 };
        return Ok(etherparse::Icmpv4Header::with_checksum(kind, payload).to_bytes().to_vec());
    }
    let kind = Icmpv6Type::Unknown { type_u8: kind, code_u8: 0, bytes5to8 };
    Ok(Icmpv6Header::with_checksum(kind, from.v6(), to.v6(), payload)?.to_bytes().to_vec())
}
