//! Who asks on the link for a VIP's MAC address: ARP requests and neighbour solicitations, probes for duplicates among
//! them, and whether the kernel may hear of it, which answers for whatever is on its interfaces.

use crate::parse::{Frame, ICMPV6, Network};
use crate::table::{Fence, VIP_LOCAL, VIP_REMOTE};
use crate::verdict::Reason;

/// Ethertype of ARP.
pub const ARP: u16 = 0x0806;
/// ICMPv6 type.
pub const SOLICITATION: u8 = 135;

/// Asker and target of an ARP request that Linux would answer: IPv4, on Ethernet or what it takes for it (IEEE 802). A
/// host that announces its own address, which looks like a request too, asks nothing.
#[inline(always)]
pub fn arp<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<([u8; 4], [u8; 4])> {
    // Hardware type, protocol type, the lengths of their addresses, operation.
    if !matches!(frame.load(at)?, [0, 1 | 6, 8, 0, 6, 4, 0, 1]) {
        return None;
    }
    let (asker, target) = (frame.load(at + 14)?, frame.load(at + 24)?);
    (asker != target).then_some((asker, target))
}

/// Target of a neighbour solicitation that Linux would answer (RFC 4861, 7.1.1).
#[inline(always)]
pub fn solicitation<F: Frame + ?Sized>(frame: &F, n: &Network) -> Option<[u8; 16]> {
    // Later fragments have no header, and Linux takes no fragments of it at all (RFC 6980).
    if n.proto != ICMPV6
        || n.later_fragment
        || n.hop_limit != 255
        || !matches!(frame.load(n.transport)?, [SOLICITATION, 0])
    {
        return None;
    }
    frame.load(n.transport + 8)
}

impl Fence {
    /// At this moment nobody may be answered who asks for a local VIP.
    #[must_use]
    #[inline(always)]
    pub const fn is_down(&self, now: u64) -> bool {
        self.until < now && now < self.over
    }
}

/// What becomes of a question for a VIP with these flags. When the agent has been silent for too long, what the flags say
/// of a remote address lapses like all drops; only the fence, which is for such agents, stays.
#[inline(always)]
pub fn judge(vip_flags: u32, fenced: impl FnOnce() -> bool) -> Reason {
    if vip_flags & VIP_REMOTE != 0 {
        Reason::RemoteAddress
    } else if vip_flags & VIP_LOCAL != 0 && fenced() {
        Reason::Fenced
    } else {
        Reason::PassedProtocol
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;

    #[test]
    fn the_fence() {
        let down = |until, over, now| Fence { until, over }.is_down(now);
        assert!(!down(0, 0, 5), "nobody ever wrote it");
        assert!(!down(5, u64::MAX, 5) && down(5, u64::MAX, 6));
        assert!(down(5, 10, 9) && !down(5, 10, 10), "over");
        assert!(down(0, u64::MAX, 1), "no right at all");
    }

    #[test]
    fn what_becomes_of_a_question() {
        use Reason::{Fenced, PassedProtocol, RemoteAddress};
        // Flags; then before the fence and behind it.
        let rows = [
            (0, [PassedProtocol, PassedProtocol]),
            (VIP_LOCAL, [PassedProtocol, Fenced]),
            (VIP_REMOTE, [RemoteAddress, RemoteAddress]),
        ];
        for (flags, want) in rows {
            assert_eq!([false, true].map(|fenced| judge(flags, || fenced)), want, "{flags}");
        }
    }
}
