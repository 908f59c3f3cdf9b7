//! A Service of type LoadBalancer, without its endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_plan::alloc::claim::{BRAND, annotation};
use purelb_plan::announce::slots::{self, ANNOUNCING_V4, ANNOUNCING_V6};
use purelb_plan::world::{Protocol, Service, ServicePort};

use super::Faults;
use crate::source::objects as o;
use crate::source::state::ServiceState;

/// Services of these classes are ours. The second was that of PureLB's first version, and its documents still name it.
const CLASSES: [&str; 2] = ["purelb.io/purelbv2", "purelb.io/purelb"];

/// Of type LoadBalancer.
pub(super) fn is_balanced(s: &o::Service) -> bool {
    s.spec.r#type == "LoadBalancer"
}

/// Of type LoadBalancer and of our class, or of none.
pub(super) fn is_ours(s: &o::Service) -> bool {
    is_balanced(s) && s.spec.load_balancer_class.as_deref().is_none_or(|c| c.is_empty() || CLASSES.contains(&c))
}

/// Of type LoadBalancer, with addresses that an allocator of PureLB's kind gave it. One that let go of it takes the group
/// away and leaves the brand to the agents that announce: the Service may be another controller's by now.
pub(super) fn is_signed(s: &o::Service) -> bool {
    let annotations = &s.metadata.annotations;
    let branded = annotations.get(annotation::ALLOCATED_BY).is_some_and(|by| by == BRAND);
    is_balanced(s) && branded && annotations.contains_key(annotation::ALLOCATED_FROM)
}

/// The addresses that are some.
pub(super) fn addresses(s: &o::Service) -> BTreeSet<IpAddr> {
    s.status.load_balancer.ingress.iter().filter_map(|i| i.ip.as_deref()?.parse().ok()).collect()
}

/// Why nothing in a cluster can be reached at an address.
pub(super) fn unfit(addr: IpAddr) -> Option<&'static str> {
    let (link_local, broadcast, mapped) = match addr {
        IpAddr::V4(a) => (a.is_link_local(), a.is_broadcast(), false),
        IpAddr::V6(a) => (a.is_unicast_link_local(), false, a.to_ipv4_mapped().is_some()),
    };
    [
        (addr.is_unspecified(), "an unspecified address"),
        (addr.is_loopback(), "a loopback address"),
        (addr.is_multicast(), "a multicast address"),
        (link_local, "a link-local address"),
        (broadcast, "the broadcast address"),
        (mapped, "an IPv4 address in IPv6 form"),
    ]
    .into_iter()
    .find_map(|(is, what)| is.then_some(what))
}

/// Converts it; endpoints are added from its slices.
pub(super) fn convert(s: &o::Service, state: Option<&ServiceState>, faults: &mut Faults<'_>) -> Service {
    let said = |key: &str| s.metadata.annotations.get(key).map(String::as_str);
    let annotated = said("purelb.io/prefer-local") == Some("true");
    let slots = [ANNOUNCING_V4, ANNOUNCING_V6].into_iter().filter_map(said).flat_map(slots::parse).collect();
    Service {
        origin: faults.origin.to_owned(),
        vips: match state.and_then(ServiceState::given).filter(|given| !given.is_empty()) {
            Some(given) => given.iter().copied().collect(),
            None => vips(s, state, faults),
        },
        remote: given(s, state, annotation::POOL_TYPE) == Some("remote"),
        ports: ports(s, faults),
        local_policy: local_policy(s, faults),
        // Values that nobody knows yet are hints that we do not follow, no faults.
        prefer_local: annotated || s.spec.traffic_distribution.as_deref() == Some("PreferSameNode"),
        affinity: affinity(s, faults),
        source_ranges: source_ranges(s, faults),
        endpoints: Vec::new(),
        slots,
        follows_endpoints: said(annotation::NODE_AFFINITY) == Some("service-endpoints"),
        shared: said(annotation::SHARING_KEY).is_some_and(|key| !key.is_empty()),
        skip_dad: given(s, state, annotation::SKIP_IPV6_DAD) == Some("true"),
    }
}

/// An annotation that the allocator writes: on a folder beside the Service.
fn given<'a>(s: &'a o::Service, state: Option<&'a ServiceState>, key: &str) -> Option<&'a str> {
    let given = state.and_then(|state| state.annotations.get(key)?.as_deref());
    given.or_else(|| s.metadata.annotations.get(key).map(String::as_str))
}

fn vips(s: &o::Service, state: Option<&ServiceState>, faults: &mut Faults<'_>) -> BTreeSet<IpAddr> {
    let field = "status.loadBalancer.ingress";
    let mut vips = BTreeSet::new();
    let mut given = s.status.load_balancer.ingress.iter().filter_map(|i| i.ip.as_deref()).peekable();
    if given.peek().is_none() {
        match state.and_then(|state| state.condition.as_ref()) {
            Some(refused) => {
                let message = format!("has no address: {} ({})", refused.message, refused.reason);
                faults.add(field, message, "see there; it is tried again with every change");
            }
            None => {
                let remedy = "write its addresses there as ip: entries, or run purelb-agent allocator or standalone";
                faults.add(field, "has no address yet".to_owned(), remedy);
            }
        }
    }
    for ip in given {
        match ip.parse::<IpAddr>().map(|addr| (addr, unfit(addr))) {
            Ok((addr, None)) => drop(vips.insert(addr)),
            Ok((_, Some(what))) => {
                faults.add(field, format!("{ip} is {what}; it cannot be a load balancer's"), "use a unicast address");
            }
            Err(_) => faults.add("status.loadBalancer.ingress.ip", format!("{ip:?} is no IP address"), "correct it"),
        }
    }
    vips
}

fn ports(s: &o::Service, faults: &mut Faults<'_>) -> Vec<ServicePort> {
    let mut numbers = BTreeSet::new();
    let mut names = BTreeSet::new();
    let mut ports = Vec::new();
    for port in &s.spec.ports {
        let word = port.protocol.as_deref().unwrap_or("TCP");
        let protocol = match protocol(word) {
            Ok(protocol) => protocol,
            Err(message) => {
                faults.add("spec.ports.protocol", message, "use TCP, UDP or SCTP");
                continue;
            }
        };
        let name = port.name.clone().unwrap_or_default();
        if !numbers.insert((port.port, word)) {
            faults.add("spec.ports", format!("port {} {word} stands twice", port.port), "remove one of them");
        } else if !names.insert((name.clone(), word)) {
            // Slices refer to a port by its name.
            let message = format!("port {} {word} has the name {name:?} of another one and is left out", port.port);
            faults.add("spec.ports.name", message, "give each port a name of its own");
        } else {
            ports.push(ServicePort { name, port: port.port, protocol });
        }
    }
    ports
}

/// TCP, UDP, or none for one that is known and not balanced.
pub(super) fn protocol(word: &str) -> Result<Option<Protocol>, String> {
    match word {
        "TCP" => Ok(Some(Protocol::Tcp)),
        "UDP" => Ok(Some(Protocol::Udp)),
        "SCTP" => Ok(None),
        other => Err(format!("protocol {other:?} is unknown")),
    }
}

fn local_policy(s: &o::Service, faults: &mut Faults<'_>) -> bool {
    match s.spec.external_traffic_policy.as_deref() {
        None | Some("Cluster" | "") => false,
        Some("Local") => true,
        Some(other) => {
            let message = format!("{other:?} is unknown; Cluster is assumed");
            faults.add("spec.externalTrafficPolicy", message, "use Local or Cluster");
            false
        }
    }
}

fn affinity(s: &o::Service, faults: &mut Faults<'_>) -> Option<u32> {
    match s.spec.session_affinity.as_deref() {
        None | Some("None" | "") => None,
        Some("ClientIP") => {
            let config = s.spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
            Some(config.and_then(|c| c.timeout_seconds).unwrap_or(10_800))
        }
        Some(other) => {
            let message = format!("{other:?} is unknown; None is assumed");
            faults.add("spec.sessionAffinity", message, "use ClientIP or None");
            None
        }
    }
}

fn source_ranges(s: &o::Service, faults: &mut Faults<'_>) -> BTreeSet<IpNet> {
    let mut ranges = BTreeSet::new();
    for range in &s.spec.load_balancer_source_ranges {
        match range.trim().parse::<IpNet>() {
            Ok(net) => drop(ranges.insert(net.trunc())),
            Err(_) => {
                faults.add(
                    "spec.loadBalancerSourceRanges",
                    format!("{range:?} is no CIDR"),
                    "write it as 192.0.2.0/24",
                );
            }
        }
    }
    if ranges.is_empty() && !s.spec.load_balancer_source_ranges.is_empty() {
        // An unreadable list must never open the service to everybody.
        let nobody = ["255.255.255.255/32", "ff00::/128"];
        ranges.extend(nobody.iter().filter_map(|n| n.parse::<IpNet>().ok()));
    }
    ranges
}
