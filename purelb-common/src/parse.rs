//! Reads headers: Ethernet with up to two VLAN tags, IPv4 with options, IPv6 with extension
//! headers, then the ports and flags of TCP and UDP.
//!
//! Offsets are from the first byte of the frame. Only a packet for a VIP is judged, so what
//! cannot be read before the destination address is known is simply not ours.

use crate::hash::Address;
use crate::neighbour::{self, SOLICITATION};
use crate::verdict::Reason;

/// The frame, wherever it lies. In the kernel each `load` is one bounds check the verifier follows.
pub trait Frame {
    /// `N` bytes from `offset`, or `None` beyond the end.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// Whether the frame has this many bytes (its tail may lie where `load` does not reach).
    fn holds(&self, length: usize) -> bool;
}

impl Frame for [u8] {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
    fn holds(&self, length: usize) -> bool {
        self.len() >= length
    }
}

/// TCP header bits.
pub const FIN: u8 = 1;
/// TCP header bits.
pub const SYN: u8 = 2;
/// TCP header bits.
pub const RST: u8 = 4;
/// TCP header bits.
pub const ACK: u8 = 16;

/// IP protocol numbers.
pub const TCP: u8 = 6;
/// IP protocol numbers.
pub const UDP: u8 = 17;
/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// IP protocol numbers.
pub const ICMPV6: u8 = 58;

/// A length that its field cannot say. The kernel joins segments of one flow into such packets (BIG TCP)
/// and writes 0 there; nothing that comes by a wire is as long.
const TOO_LONG: usize = 0x1_0000;

/// How many IPv6 extension headers are followed.
const EXTENSIONS: usize = 4;

/// Ethertype (host order) and offset of the network header, after VLAN and QinQ tags.
#[inline(always)]
pub fn ethernet<F: Frame + ?Sized>(frame: &F) -> Option<(u16, usize)> {
    let mut kind = u16::from_be_bytes(frame.load(12)?);
    let mut offset = 14;
    if kind == 0x8100 || kind == 0x88a8 {
        kind = u16::from_be_bytes(frame.load(16)?);
        offset = 18;
        if kind == 0x8100 {
            kind = u16::from_be_bytes(frame.load(20)?);
            offset = 22;
        }
    }
    Some((kind, offset))
}

/// What the network header says.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// IP protocol of the payload.
    pub proto: u8,
    /// Offset of the transport header.
    pub transport: usize,
    /// Length from the IP header on, bytes.
    pub length: u32,
    /// Not the first fragment: no transport header here.
    pub later_fragment: bool,
    /// First of several fragments.
    pub first_fragment: bool,
    /// TTL or hop limit.
    pub hop_limit: u8,
}

/// An address family that can be read from a frame.
pub trait Ip: Address {
    /// Ethertype.
    const ETHERTYPE: u16;
    /// False only when the packet is certainly neither a TCP SYN nor a neighbour solicitation; most are told by two bytes.
    fn noteworthy<F: Frame + ?Sized>(frame: &F, at: usize) -> bool;
    /// Source and destination address.
    fn addresses<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<(Self, Self)>;
    /// The rest of the network header.
    ///
    /// # Errors
    /// The reason to drop it when it is for a VIP.
    fn network<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Network, Reason>;
    /// Target of a neighbour solicitation; IPv4 has none (see [`neighbour::arp`]).
    fn solicited<F: Frame + ?Sized>(frame: &F, n: &Network) -> Option<Self>;
}

/// A flag byte says SYN without ACK.
#[inline(always)]
fn is_syn(flags: Option<[u8; 1]>) -> bool {
    flags.is_some_and(|[flags]| flags & (SYN | ACK) == SYN)
}

impl Ip for [u8; 4] {
    const ETHERTYPE: u16 = 0x0800;

    #[inline(always)]
    fn noteworthy<F: Frame + ?Sized>(frame: &F, at: usize) -> bool {
        match frame.load::<10>(at) {
            Some([0x45, .., TCP]) => is_syn(frame.load(at + 33)),
            Some([.., TCP]) => true,
            _ => false,
        }
    }

    #[inline(always)]
    fn addresses<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<(Self, Self)> {
        let [a, b, c, d, e, f, g, h] = frame.load(at + 12)?;
        Some(([a, b, c, d], [e, f, g, h]))
    }

    #[inline(always)]
    fn network<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Network, Reason> {
        let [first, _, l0, l1, _, _, f0, f1, ttl, proto] = frame.load(at).ok_or(Reason::Malformed)?;
        let header = usize::from(first & 15) * 4;
        let mut length = u32::from(u16::from_be_bytes([l0, l1]));
        if length == 0 && frame.holds(at + TOO_LONG) {
            length = TOO_LONG as u32;
        }
        if first >> 4 != 4 || header < 20 || length < header as u32 || !frame.holds(at + length as usize) {
            return Err(Reason::Malformed);
        }
        let fragment = u16::from_be_bytes([f0, f1]);
        Ok(Network {
            proto,
            transport: at + header,
            length,
            later_fragment: fragment & 0x1fff != 0,
            first_fragment: fragment & 0x3fff == 0x2000,
            hop_limit: ttl,
        })
    }

    #[inline(always)]
    fn solicited<F: Frame + ?Sized>(_: &F, _: &Network) -> Option<Self> {
        None
    }
}

impl Ip for [u8; 16] {
    const ETHERTYPE: u16 = 0x86dd;

    #[inline(always)]
    fn noteworthy<F: Frame + ?Sized>(frame: &F, at: usize) -> bool {
        match frame.load::<1>(at + 6) {
            Some([TCP]) => is_syn(frame.load(at + 53)),
            Some([0 | 43 | 44 | 60]) => true,
            Some([ICMPV6]) => frame.load(at + 40) == Some([SOLICITATION]),
            _ => false,
        }
    }

    #[inline(always)]
    fn addresses<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<(Self, Self)> {
        Some((frame.load(at + 8)?, frame.load(at + 24)?))
    }

    #[inline(always)]
    fn network<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Network, Reason> {
        let [first, _, _, _, l0, l1, next, hop_limit] = frame.load(at).ok_or(Reason::Malformed)?;
        let mut length = 40 + u32::from(u16::from_be_bytes([l0, l1]));
        if length == 40 && frame.holds(at + TOO_LONG) {
            length = TOO_LONG as u32;
        }
        if first >> 4 != 6 || !frame.holds(at + length as usize) {
            return Err(Reason::Malformed);
        }
        let mut n = Network {
            proto: next,
            transport: at + 40,
            length,
            later_fragment: false,
            first_fragment: false,
            hop_limit,
        };
        for _ in 0..EXTENSIONS {
            match n.proto {
                // Hop-by-hop, routing, destination options: length in 8 bytes beyond the first 8.
                0 | 43 | 60 => {
                    let [next, length] = frame.load(n.transport).ok_or(Reason::Malformed)?;
                    n.proto = next;
                    n.transport += 8 + usize::from(length) * 8;
                }
                44 => {
                    let [next, _, f0, f1] = frame.load(n.transport).ok_or(Reason::Malformed)?;
                    let fragment = u16::from_be_bytes([f0, f1]);
                    n.proto = next;
                    n.transport += 8;
                    n.later_fragment = fragment & 0xfff8 != 0;
                    n.first_fragment = fragment & 0xfff9 == 1;
                    if n.later_fragment {
                        return Ok(n);
                    }
                }
                _ => return Ok(n),
            }
        }
        if matches!(n.proto, 0 | 43 | 44 | 60) { Err(Reason::Malformed) } else { Ok(n) }
    }

    #[inline(always)]
    fn solicited<F: Frame + ?Sized>(frame: &F, n: &Network) -> Option<Self> {
        neighbour::solicitation(frame, n)
    }
}

/// Ports (host order) and, for TCP, the flag byte.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
}

/// Reads and checks the transport header of TCP or UDP.
///
/// # Errors
/// [`Reason::Malformed`] or [`Reason::TcpFlags`].
#[inline(always)]
pub fn transport<F: Frame + ?Sized>(frame: &F, n: &Network, at: usize) -> Result<Transport, Reason> {
    let used = (n.transport - at) as u32;
    if n.proto == TCP {
        let h: [u8; 20] = frame.load(n.transport).ok_or(Reason::Malformed)?;
        let data = u32::from(h[12] >> 4) * 4;
        if data < 20 || used + data > n.length {
            return Err(Reason::Malformed);
        }
        let flags = h[13];
        let set = flags & (FIN | SYN | RST | ACK);
        // No flag at all, SYN with FIN or RST, FIN without ACK: no stack sends them (RFC 9293, 3.10).
        if set == 0
            || set & (SYN | FIN) == SYN | FIN
            || set & (SYN | RST) == SYN | RST
            || set & (FIN | ACK | RST) == FIN
        {
            return Err(Reason::TcpFlags);
        }
        Ok(Transport { source: u16::from_be_bytes([h[0], h[1]]), destination: u16::from_be_bytes([h[2], h[3]]), flags })
    } else {
        let h: [u8; 8] = frame.load(n.transport).ok_or(Reason::Malformed)?;
        let length = u32::from(u16::from_be_bytes([h[4], h[5]]));
        // A jumbogram's 0 (RFC 2675) never fits a VIP's packet; fragments carry the whole datagram's length.
        if length < 8 || !n.first_fragment && used + length > n.length {
            return Err(Reason::Malformed);
        }
        Ok(Transport {
            source: u16::from_be_bytes([h[0], h[1]]),
            destination: u16::from_be_bytes([h[2], h[3]]),
            flags: 0,
        })
    }
}

/// Whether the type byte of an ICMP message may reach a VIP: echo both ways and errors; for IPv6
/// also NDP, whose hop limit must be 255 (RFC 4861, 7.1).
#[must_use]
#[inline(always)]
pub const fn icmp_may_pass(proto: u8, kind: u8, hop_limit: u8) -> bool {
    if proto == ICMP {
        matches!(kind, 0 | 3 | 8 | 11 | 12)
    } else {
        matches!(kind, 1..=4 | 128 | 129) || matches!(kind, 133..=137) && hop_limit == 255
    }
}
