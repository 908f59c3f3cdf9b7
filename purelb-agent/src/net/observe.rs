//! Which interfaces are uplinks, and which addresses are the host's own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use futures::TryStreamExt as _;
use ipnet::IpNet;
use purelb_plan::problem::Problem;
use purelb_plan::world::{Announcing, Datapath};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::address::{AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

use super::address::{Entry, entry};
use super::vip_device::{LOCAL_MARK, VIP_DEVICE, is_marked};
use super::{NetError, Netlink, Snapshot, Uplink, local};

impl Netlink {
    /// Reads links, addresses and routes once.
    pub async fn snapshot(
        &mut self,
        datapath: &Datapath,
        announcing: Option<&Announcing>,
    ) -> Result<Snapshot, NetError> {
        let begin = Instant::now();
        let fail = |what| move |source| NetError::Dump { what, source };
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(fail("links"))?;
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(fail("addresses"))?;
        let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
        let mut routes: Vec<RouteMessage> =
            self.handle.route().get(v4).execute().try_collect().await.map_err(fail("routes"))?;
        routes.extend(self.handle.route().get(v6).execute().try_collect::<Vec<_>>().await.map_err(fail("routes"))?);
        self.macs = links.iter().filter_map(|link| Some((link.header.index, mac(link)?.to_vec()))).collect();
        let vip_device = announcing.map_or(VIP_DEVICE, |announcing| announcing.device.as_str());
        let defaults = &mut self.defaults;
        let (local, problems) = announcing
            .map(|announcing| local::networks(&links, &addresses, &routes, announcing, defaults))
            .unwrap_or_default();
        // Packets for local addresses come by their interfaces, which need not have a default route.
        self.carried.extend(local.values().map(|link| link.index));
        let mut snapshot = snapshot(&links, &addresses, &routes, (datapath, vip_device), &mut self.carried);
        snapshot.twins = local::twins(&links, &addresses, &local);
        snapshot.local = local;
        snapshot.problems.extend(problems);
        snapshot.of.1 = announcing.cloned();
        self.took(begin.elapsed());
        Ok(snapshot)
    }
}

fn snapshot(
    links: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    (datapath, vip_device): (&Datapath, &str),
    carried: &mut BTreeSet<u32>,
) -> Snapshot {
    let devices: BTreeMap<u32, Uplink> = links
        .iter()
        .filter(|l| !l.header.flags.contains(LinkFlags::Loopback))
        .map(device)
        .map(|d| (d.index, d))
        .collect();
    let mut problems = Vec::new();
    let wanted: BTreeSet<u32> = if datapath.interfaces.is_empty() {
        // A route that goes may come back in a moment, and requests may come this way still: without the program
        // each of them would be answered by a reset.
        carried.extend(routes.iter().filter(|r| is_default(r)).flat_map(outgoing));
        carried.retain(|index| devices.contains_key(index));
        carried.clone()
    } else {
        carried.clear();
        datapath.interfaces.iter().flat_map(|entry| matching(entry, &devices, &mut problems)).collect()
    };
    // D1: all that lead to a net or a gateway; a route to one address alone is a pod's.
    let gateways: BTreeSet<u32> =
        routes.iter().filter(|r| has_gateway(r) || leads_to_net(r)).flat_map(outgoing).collect();
    let pick = |indices: &BTreeSet<u32>| {
        indices.iter().filter_map(|i| devices.get(i)).filter(|d| !of_vips(d, vip_device)).cloned().collect()
    };
    let exits = gateways.difference(&wanted).copied().collect();
    Snapshot {
        uplinks: pick(&wanted),
        exits: pick(&exits),
        addresses: own(addresses, routes, &devices, vip_device),
        held: addresses.iter().filter_map(entry).filter(|e| e.protocol == LOCAL_MARK).map(|e| e.ip).collect(),
        local: local::Networks::new(),
        twins: Vec::new(),
        problems,
        of: (datapath.clone(), None),
    }
}

fn device(link: &LinkMessage) -> Uplink {
    let mut device = Uplink {
        name: String::new(),
        index: link.header.index,
        kind: String::new(),
        mtu: 0,
        up: link.header.flags.contains(LinkFlags::Up),
        mac: mac(link).and_then(|mac| mac.try_into().ok()),
    };
    let mut port = false;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::Controller(index) => port = *index != 0,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        device.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    if port {
        device.mac = None;
    }
    device
}

/// Its address, of whatever length.
pub(super) fn mac(link: &LinkMessage) -> Option<&[u8]> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => Some(mac.as_slice()),
        _ => None,
    })
}

pub(super) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

fn has_gateway(route: &RouteMessage) -> bool {
    let gateway = |a: &RouteAttribute| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
    route.attributes.iter().any(|a| match a {
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.attributes.iter().any(gateway)),
        other => gateway(other),
    })
}

/// A unicast route to more than one address, link-local ones and multicast apart.
fn leads_to_net(route: &RouteMessage) -> bool {
    let Some(net) = destination(route) else { return false };
    let own = match net.addr() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    route.header.kind == RouteType::Unicast && net.prefix_len() < net.max_prefix_len() && !own
}

pub(super) fn outgoing(route: &RouteMessage) -> Vec<u32> {
    let mut indices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => indices.push(*index),
            RouteAttribute::MultiPath(hops) => indices.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    indices
}

/// An exact name, or `/regex/` over whole names.
fn matching(entry: &str, devices: &BTreeMap<u32, Uplink>, problems: &mut Vec<Problem>) -> Vec<u32> {
    let mut fault = |message: String, remedy: &str| {
        problems.push(Problem {
            object: format!("interface {entry}"),
            field: "spec.datapath.interfaces".to_owned(),
            message,
            remedy: remedy.to_owned(),
            origin: String::new(),
        });
        Vec::new()
    };
    let Some(pattern) = entry.strip_prefix('/').and_then(|e| e.strip_suffix('/')) else {
        return match devices.values().find(|d| d.name == entry) {
            Some(device) => vec![device.index],
            None => fault(
                "there is no such interface on this node".to_owned(),
                "correct the name, or leave the list empty to use those with a default route",
            ),
        };
    };
    match regex::Regex::new(&format!("^(?:{pattern})$")) {
        Err(e) => {
            fault(format!("not a regular expression: {e}"), "correct it; the syntax is that of the Rust crate regex")
        }
        Ok(regex) => {
            let found: Vec<u32> = devices.values().filter(|d| regex.is_match(&d.name)).map(|d| d.index).collect();
            if found.is_empty() {
                fault(
                    "no interface of this node matches".to_owned(),
                    "correct the expression; it must match the whole name",
                )
            } else {
                found
            }
        }
    }
}

/// The host's own: those with a connected route, and host addresses that were given for a time, as by DHCP. Permanent host
/// addresses may be VIPs.
fn own(
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    devices: &BTreeMap<u32, Uplink>,
    vip_device: &str,
) -> BTreeSet<IpAddr> {
    let connected: BTreeSet<(u32, IpNet)> = routes
        .iter()
        .filter(|r| !has_gateway(r))
        .filter_map(|r| destination(r).map(|net| (r, net)))
        .flat_map(|(r, net)| outgoing(r).into_iter().map(move |index| (index, net)))
        .collect();
    let of_host = |message: &&AddressMessage| {
        let device = devices.get(&message.header.index);
        device.is_some_and(|device| !of_vips(device, vip_device)) && !is_marked(message)
    };
    let own = |message: &AddressMessage| {
        let Entry { ip, flags, .. } = entry(message)?;
        let net = IpNet::new(ip, message.header.prefix_len).ok()?;
        let is_own = if is_guest(ip, flags) {
            false
        } else if net.prefix_len() < net.max_prefix_len() {
            connected.contains(&(message.header.index, net.trunc()))
        } else {
            !flags.contains(AddressFlags::Permanent)
        };
        is_own.then_some(ip)
    };
    addresses.iter().filter(of_host).filter_map(own).collect()
}

/// As PureLB's agent makes a VIP, which bears no mark: for a time and without a route, of IPv4 behind the host's own
/// address and of IPv6 deprecated. A lease of DHCP or an address that a router gave is like that, but for the last.
fn is_guest(ip: IpAddr, flags: AddressFlags) -> bool {
    let last = if ip.is_ipv4() { AddressFlags::Secondary } else { AddressFlags::Deprecated };
    !flags.contains(AddressFlags::Permanent) && flags.contains(AddressFlags::Noprefixroute | last)
}

/// It holds addresses of VIPs, never the host's own.
fn of_vips(device: &Uplink, vip_device: &str) -> bool {
    device.name == vip_device || device.name == VIP_DEVICE
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let address = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_end_are_the_hosts_too() {
        use AddressFlags as F;
        let none = F::empty();
        // By DHCP through the kernel and through a manager, by a router, and as PureLB's agent makes VIPs.
        let rows = [
            ("192.0.2.7", F::Permanent, false),
            ("192.0.2.7", F::Permanent | F::Noprefixroute | F::Secondary, false),
            ("192.0.2.7", none, false),
            ("192.0.2.7", F::Noprefixroute, false),
            ("192.0.2.7", F::Secondary, false),
            ("192.0.2.7", F::Noprefixroute | F::Secondary, true),
            ("2001:db8::7", F::Noprefixroute, false),
            ("2001:db8::7", F::Secondary, false),
            ("2001:db8::7", F::Deprecated, false),
            ("2001:db8::7", F::Noprefixroute | F::Deprecated, true),
        ];
        for (ip, flags, guest) in rows {
            assert_eq!(is_guest(ip.parse().unwrap(), flags), guest, "{ip} {flags:?}");
        }
    }
}
