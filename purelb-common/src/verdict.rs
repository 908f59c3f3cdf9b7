//! Why a packet left the program: one list for the kernel's counters, the CLI, metrics and tests.

/// Every exit of the programs counts exactly one of these in the map `REASONS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// Not IPv4 or IPv6, or not addressed to a VIP: passed untouched.
    NotVip = 0,
    /// Sent to an endpoint of this node (destination rewritten).
    Forwarded = 1,
    /// The slot says PASS: left to kube-proxy untouched (Cluster policy, hand-over).
    PassedToProxy = 2,
    /// ARP, NDP, ICMP, other protocols towards a VIP, when nothing below is said of them: passed.
    PassedProtocol = 3,
    /// Reply to a connection that the node itself opened from the VIP: passed.
    PassedOwn = 4,
    /// Tables are stale (agent silent longer than the heartbeat limit): passed.
    PassedStale = 5,
    /// The frame is for another MAC address: passed (the stack ignores it).
    PassedOtherHost = 6,
    /// The VIP's unknown ports are to be passed (`unknownPorts: Pass`).
    PassedUnknownPort = 7,
    /// Fragment towards a VIP: passed, the stack reassembles it.
    PassedFragment = 8,
    /// No Service has this port of the VIP: dropped.
    UnknownPort = 9,
    /// Source address outside `loadBalancerSourceRanges`: dropped.
    SourceRange = 10,
    /// Local policy (or no kube-proxy) and no usable endpoint on this node: dropped.
    NoEndpoint = 11,
    /// Truncated or self-contradicting headers towards a VIP: dropped.
    Malformed = 12,
    /// Impossible TCP flags (null, SYN+FIN, SYN+RST, FIN without ACK): dropped.
    TcpFlags = 13,
    /// IPv4-mapped address inside an IPv6 header: dropped.
    MappedAddress = 14,
    /// Same client address and port already speaks to this pod port through another VIP: dropped.
    TupleCollision = 15,
    /// Too many new flows and the slot's owner is not ready: dropped.
    OverBudget = 16,
    /// A reply's source was rewritten back to the VIP (tcx egress).
    ReplyTranslated = 17,
    /// The same, found by the pod port alone (`REVSVC`), no flow entry was left.
    ReplyByService = 18,
    /// First fragment of a packet that would be balanced: dropped (the rest never reassembles).
    Fragment = 19,
    /// ICMP type that a VIP never answers (redirect, timestamp, NDP with a hop limit below 255): dropped.
    IcmpType = 20,
    /// Egress only: not a reply of ours, untouched.
    NotReply = 21,
    /// ARP request or neighbour solicitation for a remote VIP, which nobody answers for on a link: dropped.
    RemoteAddress = 22,
    /// The same for a local VIP when this node's right to answer has run out (`FENCE`), or it never had one: dropped.
    Fenced = 23,
}

/// How many reasons there are; the length of the map `REASONS`.
pub const REASONS: usize = 24;

/// What the kernel does with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Goes on to the kernel as it is (or as rewritten).
    Pass,
    /// Ends here.
    Drop,
}

/// One bit for each reason that drops.
const DROPS: u64 = {
    let (mut bits, mut i) = (0, 0);
    while i < REASONS {
        if matches!(Reason::ALL[i].action(), Action::Drop) {
            bits |= 1 << Reason::ALL[i] as u32;
        }
        i += 1;
    }
    bits
};

/// [`Reason::action`] by a reason's number.
#[must_use]
#[inline(always)]
pub const fn action(reason: u32) -> Action {
    if DROPS >> (reason & 63) & 1 != 0 { Action::Drop } else { Action::Pass }
}

impl Reason {
    /// All reasons in the order of their numbers.
    pub const ALL: [Self; REASONS] = [
        Self::NotVip,
        Self::Forwarded,
        Self::PassedToProxy,
        Self::PassedProtocol,
        Self::PassedOwn,
        Self::PassedStale,
        Self::PassedOtherHost,
        Self::PassedUnknownPort,
        Self::PassedFragment,
        Self::UnknownPort,
        Self::SourceRange,
        Self::NoEndpoint,
        Self::Malformed,
        Self::TcpFlags,
        Self::MappedAddress,
        Self::TupleCollision,
        Self::OverBudget,
        Self::ReplyTranslated,
        Self::ReplyByService,
        Self::Fragment,
        Self::IcmpType,
        Self::NotReply,
        Self::RemoteAddress,
        Self::Fenced,
    ];

    /// The name that CLI, metrics and docs use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotVip => "not-vip",
            Self::Forwarded => "forwarded",
            Self::PassedToProxy => "passed-to-proxy",
            Self::PassedProtocol => "passed-protocol",
            Self::PassedOwn => "passed-own",
            Self::PassedStale => "passed-stale",
            Self::PassedOtherHost => "passed-other-host",
            Self::PassedUnknownPort => "passed-unknown-port",
            Self::PassedFragment => "passed-fragment",
            Self::UnknownPort => "unknown-port",
            Self::SourceRange => "source-range",
            Self::NoEndpoint => "no-endpoint",
            Self::Malformed => "malformed",
            Self::TcpFlags => "tcp-flags",
            Self::MappedAddress => "mapped-address",
            Self::TupleCollision => "tuple-collision",
            Self::OverBudget => "over-budget",
            Self::ReplyTranslated => "reply-translated",
            Self::ReplyByService => "reply-by-service",
            Self::Fragment => "fragment",
            Self::IcmpType => "icmp-type",
            Self::NotReply => "not-reply",
            Self::RemoteAddress => "remote-address",
            Self::Fenced => "fenced",
        }
    }

    /// What happens to a packet that leaves for this reason.
    #[must_use]
    pub const fn action(self) -> Action {
        match self {
            Self::UnknownPort
            | Self::SourceRange
            | Self::NoEndpoint
            | Self::Malformed
            | Self::TcpFlags
            | Self::MappedAddress
            | Self::TupleCollision
            | Self::OverBudget
            | Self::Fragment
            | Self::IcmpType
            | Self::RemoteAddress
            | Self::Fenced => Action::Drop,
            _ => Action::Pass,
        }
    }
}
