//! Networks that local addresses may be of: those of the interfaces that `LBNodeAgent.spec.local` chooses (PureLB's
//! behaviour, 5.2).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use purelb_plan::problem::Problem;
use purelb_plan::world::Announcing;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};

use super::address::{Entry, entry};
use super::observe::{is_default, mac, outgoing};
use super::vip_device::is_marked;

/// An interface that local addresses go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalLink {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Its MAC address, with Ethernet.
    pub mac: Option<[u8; 6]>,
}

/// The networks that local addresses may be of, with the interface that has each.
pub type Networks = BTreeMap<IpNet, LocalLink>;

/// Interfaces of the default routes of IPv4 and of IPv6.
pub(super) type Defaults = [Recent; 2];

/// A default route that goes may come back in a moment, as where a routing daemon begins anew: for so long its interface
/// counts.
const FLAP: Duration = Duration::from_secs(5);

/// The interfaces that a default route was seen with last, and when.
#[derive(Debug, Default)]
pub(super) struct Recent(Option<(Vec<u32>, Instant)>);

impl Recent {
    /// Those, or the ones from a moment ago where there are none.
    fn or(&mut self, found: Vec<u32>) -> Vec<u32> {
        if found.is_empty() {
            let recent = self.0.as_ref().filter(|(_, seen)| seen.elapsed() < FLAP);
            return recent.map(|(known, _)| known.clone()).unwrap_or_default();
        }
        self.0 = Some((found.clone(), Instant::now()));
        found
    }
}

/// The networks, and what is wrong with the choice. Of two interfaces in one network the one chosen first counts.
pub(super) fn networks(
    links: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    announcing: &Announcing,
    defaults: &mut Defaults,
) -> (Networks, Vec<Problem>) {
    let mut named: Vec<(&str, &LinkMessage)> = links
        .iter()
        .filter(|link| !link.header.flags.contains(LinkFlags::Loopback))
        .filter_map(|link| Some((name(link)?, link)))
        .filter(|(name, _)| *name != announcing.device)
        .collect();
    named.sort_by_key(|(name, _)| *name);
    let mut problems = Vec::new();
    let mut problem = |field: &str, message: String, remedy: &str| {
        problems.push(Problem {
            object: "LBNodeAgent".to_owned(),
            field: format!("spec.local.{field}"),
            message,
            remedy: remedy.to_owned(),
            origin: String::new(),
        });
    };
    // An interface, for IPv4 or for IPv6.
    let mut chosen: Vec<(u32, bool)> = Vec::new();
    let both = |link: &LinkMessage| [(link.header.index, true), (link.header.index, false)];
    if matches!(announcing.interface.as_str(), "" | "default") {
        let of = |(v4, recent): (bool, &mut Recent)| recent.or(default(routes, v4)).into_iter().map(move |i| (i, v4));
        chosen.extend([true, false].into_iter().zip(defaults).flat_map(of));
    } else {
        match regex::Regex::new(&announcing.interface) {
            Ok(pattern) => {
                chosen.extend(named.iter().filter(|(name, _)| pattern.is_match(name)).flat_map(|(_, link)| both(link)));
                if chosen.is_empty() {
                    let message = format!("{:?} matches no interface of this node", announcing.interface);
                    problem("localInterface", message, "correct it, or write default");
                }
            }
            Err(error) => problem(
                "localInterface",
                format!("{:?} is no regular expression: {error}", announcing.interface),
                "write default, or correct it; the syntax is that of the Rust crate regex",
            ),
        }
    }
    for more in announcing.interfaces.iter().filter(|more| !more.is_empty() && **more != announcing.device) {
        match named.iter().find(|(name, _)| name == more) {
            Some((_, link)) => chosen.extend(both(link)),
            None => problem("interfaces", format!("{more:?} is no interface of this node"), "correct or remove it"),
        }
    }
    let mut networks = Networks::new();
    for (index, v4) in chosen {
        // Without a carrier nobody would hear an answer.
        let alive = LinkFlags::Up | LinkFlags::LowerUp;
        let link = named.iter().find(|(_, link)| link.header.index == index && link.header.flags.contains(alive));
        let Some((name, link)) = link else { continue };
        let local =
            || LocalLink { index, name: (*name).to_owned(), mac: mac(link).and_then(|mac| mac.try_into().ok()) };
        let of = |message: &&AddressMessage| {
            message.header.index == index && (message.header.family == AddressFamily::Inet) == v4 && !is_marked(message)
        };
        for network in addresses.iter().filter(of).filter_map(network) {
            networks.entry(network).or_insert_with(local);
        }
    }
    (networks, problems)
}

/// An interface with an IPv4 address of a network whose local addresses go on another one. Linux answers ARP for them there
/// too, with another MAC address, unless `arp_ignore` is set; neighbour solicitations it does not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Twin {
    /// Its name.
    pub name: String,
    /// The network.
    pub network: IpNet,
    /// Index of the interface that has it.
    pub of: u32,
}

/// Those that there are, and up.
pub(super) fn twins(links: &[LinkMessage], addresses: &[AddressMessage], networks: &Networks) -> Vec<Twin> {
    let up: BTreeMap<u32, &str> = links
        .iter()
        .filter(|link| link.header.flags.contains(LinkFlags::Up) && !link.header.flags.contains(LinkFlags::Loopback))
        .filter_map(|link| Some((link.header.index, name(link)?)))
        .collect();
    let v4 = addresses.iter().filter(|message| message.header.family == AddressFamily::Inet && !is_marked(message));
    let of = v4.filter_map(|message| Some((message.header.index, up.get(&message.header.index)?, network(message)?)));
    let twins = of.flat_map(|(index, name, net)| {
        let common = move |network: &IpNet| network.contains(&net) || net.contains(network);
        let others = networks.iter().filter(move |(network, link)| link.index != index && common(network));
        others.map(move |(network, link)| Twin { name: (*name).to_owned(), network: *network, of: link.index })
    });
    let twins: BTreeSet<Twin> = twins.collect();
    twins.into_iter().collect()
}

/// The interface for a local address and the prefix length that it gets: those of the smallest network that has it.
#[must_use]
pub fn place(networks: &Networks, ip: IpAddr) -> Option<(&LocalLink, u8, IpNet)> {
    let all = networks.iter().filter(|(network, _)| network.contains(&ip));
    all.max_by_key(|(network, _)| network.prefix_len()).map(|(network, link)| (link, network.prefix_len(), *network))
}

/// Their addresses.
#[must_use]
pub fn subnets(networks: &Networks) -> BTreeSet<IpNet> {
    networks.keys().copied().collect()
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// Interfaces of the default route with the smallest metric of the main table; several where it has several hops.
fn default(routes: &[RouteMessage], v4: bool) -> Vec<u32> {
    let metric = |route: &RouteMessage| {
        let found = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        });
        found.unwrap_or_default()
    };
    let is_main = |route: &RouteMessage| {
        let table = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
        table.unwrap_or_else(|| route.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
    };
    let of_family = |route: &RouteMessage| (route.header.address_family == AddressFamily::Inet) == v4;
    let all: Vec<_> = routes.iter().filter(|r| is_default(r) && of_family(r) && is_main(r)).collect();
    let least = all.iter().map(|route| metric(route)).min();
    all.into_iter().filter(|route| Some(metric(route)) == least).flat_map(outgoing).collect()
}

/// The network of an address, but for those that say nothing about the link: link-local ones, and of IPv6 those that are
/// not good or are addresses of VIPs.
fn network(message: &AddressMessage) -> Option<IpNet> {
    let Entry { ip, flags, .. } = entry(message)?;
    let skip = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => {
            let bad = AddressFlags::Dadfailed | AddressFlags::Deprecated | AddressFlags::Tentative;
            ip.is_unicast_link_local() || flags.intersects(bad)
        }
    };
    if skip { None } else { IpNet::new(ip, message.header.prefix_len).ok().map(|net| net.trunc()) }
}
