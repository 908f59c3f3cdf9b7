//! What each reason means, for whoever is paged at night.

use purelb_common::verdict::{Action, Reason};

/// `drop` or `pass`.
pub(crate) fn action(reason: Reason) -> &'static str {
    match reason.action() {
        Action::Drop => "drop",
        Action::Pass => "pass",
    }
}

/// One line.
pub(super) const fn meaning(reason: Reason) -> &'static str {
    match reason {
        Reason::NotVip => "for no VIP: untouched",
        Reason::Forwarded => "sent to an endpoint of this node",
        Reason::PassedToProxy => "left to kube-proxy, as the Service's policy says",
        Reason::PassedProtocol => "ARP, neighbour discovery, ICMP or another protocol: not judged",
        Reason::PassedOwn => "reply to a connection of the node itself",
        Reason::PassedStale => "the agent is silent: left to kube-proxy",
        Reason::PassedOtherHost => "the frame is for another MAC address",
        Reason::PassedUnknownPort => "no Service has the port, and unknownPorts is Pass",
        Reason::PassedFragment => "later fragment; its first one is judged",
        Reason::UnknownPort => "no Service has this port of the VIP",
        Reason::SourceRange => "the client is outside loadBalancerSourceRanges",
        Reason::NoEndpoint => "the Service has no usable endpoint on this node",
        Reason::Malformed => "truncated or contradictory headers",
        Reason::TcpFlags => "TCP flags that no stack sends",
        Reason::MappedAddress => "an IPv4 address inside an IPv6 header",
        Reason::TupleCollision => "the client's port already speaks to this pod through another VIP",
        Reason::OverBudget => "too many new flows at once",
        Reason::ReplyTranslated => "reply whose source became the VIP again",
        Reason::ReplyByService => "the same, found by the pod's port alone",
        Reason::Fragment => "first fragment of a packet that would be balanced",
        Reason::IcmpType => "an ICMP type that a VIP never answers",
        Reason::NotReply => "outgoing, and no reply of a VIP: untouched",
        Reason::RemoteAddress => "a neighbour asks for an address that is announced by routing",
        Reason::Fenced => "a neighbour asks for a local address, and this node may not answer for it now",
    }
}
