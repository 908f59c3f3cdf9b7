//! Remote addresses: on the node's dummy device, from where a routing daemon announces them (PureLB's behaviour, 5.2 and
//! 5.6; but no default route is needed, and external groups count too).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::alloc::catalog::Catalog;
use crate::alloc::group::Announce;
use crate::alloc::range::Range;
use crate::world::{EndpointState, Service, World};

/// A range of a remote ServiceGroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// Its addresses.
    pub range: Range,
    /// They go onto the device with this prefix length (`aggregation`).
    pub prefix: u8,
}

/// Of all groups that can be used, in the order of their names.
#[must_use]
pub fn ranges(catalog: &Catalog) -> Vec<RemoteRange> {
    let remote = catalog.groups().filter(|group| group.announce == Announce::Remote);
    let pools = remote.flat_map(|group| &group.pools);
    pools.map(|pool| RemoteRange { range: pool.range, prefix: pool.prefix }).collect()
}

/// What should be on the device, with its prefix length.
#[must_use]
pub fn wanted(world: &World) -> BTreeMap<IpAddr, u8> {
    let served = world.services.values().filter(|service| is_served(service, &world.node));
    let vips = served.flat_map(|service| service.vips.iter().map(move |vip| (service, *vip)));
    let vips = vips.filter(|(_, vip)| !world.node_addresses.contains(vip));
    vips.filter_map(|(service, vip)| match kind(world, service, vip)? {
        Kind::Local => None,
        Kind::Remote(prefix) => Some((vip, prefix)),
    })
    .collect()
}

/// How a VIP is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By the one node that answers for it on the link.
    Local,
    /// By routing, from the device, with this prefix length; also where this node has no endpoint for it.
    Remote(u8),
}

/// How a Service's VIP is announced; `None`: not by us.
#[must_use]
pub fn kind(world: &World, service: &Service, vip: IpAddr) -> Option<Kind> {
    if world.leaving.contains(&vip) {
        return Some(Kind::Local);
    }
    let announcing = world.announcing.as_ref()?;
    if world.local_networks.iter().any(|net| net.contains(&vip)) {
        return Some(Kind::Local);
    }
    let range = announcing.remote.iter().find(|remote| remote.range.contains(vip));
    let host = || service.remote.then_some(if vip.is_ipv4() { 32 } else { 128 });
    range.map(|remote| remote.prefix).or_else(host).map(Kind::Remote)
}

/// With the policy Local only where an endpoint is, in every slice that names its address: a ready one; where no node has
/// any, one that still serves. So routers turn away from a node that is drained before its last endpoint is gone.
fn is_served(service: &Service, node: &str) -> bool {
    if !service.local_policy {
        return true;
    }
    let any_ready = service.endpoints.iter().any(|e| e.node.is_some() && e.state == EndpointState::Ready);
    let mut healthy: BTreeMap<IpAddr, bool> = BTreeMap::new();
    for endpoint in service.endpoints.iter().filter(|endpoint| endpoint.node.as_deref() == Some(node)) {
        let good = endpoint.state == EndpointState::Ready || (endpoint.serving && !any_ready);
        healthy.entry(endpoint.addr).and_modify(|all| *all &= good).or_insert(good);
    }
    healthy.values().any(|good| *good)
}

/// A step on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It has to go.
    Remove(IpAddr, u8),
    /// It has to come.
    Add(IpAddr, u8),
}

/// An address that is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Present {
    /// The address.
    pub ip: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// It bears our mark: nobody else put it there.
    pub ours: bool,
}

/// From what is there to what is wanted. What is not ours stays, but for what is wanted: that becomes ours, since the
/// device is for such addresses alone.
#[must_use]
pub fn steps(present: &BTreeSet<Present>, wanted: &BTreeMap<IpAddr, u8>) -> Vec<Step> {
    let is_wanted = |p: &Present| wanted.get(&p.ip) == Some(&p.prefix);
    let go = present.iter().filter(|p| p.ours && !is_wanted(p)).map(|p| Step::Remove(p.ip, p.prefix));
    let there = |ip: IpAddr, prefix| present.contains(&Present { ip, prefix, ours: true });
    let come = wanted.iter().filter(|(ip, prefix)| !there(**ip, **prefix)).map(|(ip, prefix)| Step::Add(*ip, *prefix));
    go.chain(come).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::alloc::group::{External, PoolSpec, Pools, Spec};
    use crate::world::{Announcing, Endpoint, Protocol};

    fn pool(pool: &str, subnet: &str, aggregation: Option<&str>) -> PoolSpec {
        let aggregation = aggregation.map(str::to_owned);
        PoolSpec { field: "p".to_owned(), pool: pool.to_owned(), subnet: subnet.to_owned(), aggregation }
    }

    fn world() -> World {
        let remote = Pools {
            v4: vec![
                pool("198.51.100.0/28", "198.51.100.0/24", None),
                pool("198.51.100.32/28", "198.51.100.0/24", Some("/32")),
                pool("192.0.2.0/28", "192.0.2.0/24", Some("default")),
            ],
            v6: vec![pool("2001:db8:5::/120", "2001:db8:5::/64", Some("/128"))],
            ..Pools::default()
        };
        let local = Pools { v4: vec![pool("203.0.113.0/28", "203.0.113.0/24", None)], ..Pools::default() };
        let external = External { provider: "x".into(), socket: "/x".into(), announce: Announce::Remote };
        let specs = [
            ("far", Spec { remote: Some(remote), ..Spec::default() }),
            ("near", Spec { local: Some(local), ..Spec::default() }),
            ("sidecar", Spec { external: Some(external), ..Spec::default() }),
        ];
        let specs = specs.map(|(name, spec)| (("purelb".to_owned(), name.to_owned()), Arc::new(spec)));
        let remote = ranges(&Catalog::new(&specs.into(), None));
        let announcing = Announcing { remote, ..Announcing::default() };
        World { node: "node1".to_owned(), announcing: Some(announcing), ..World::default() }
    }

    fn service(vips: &[&str]) -> Service {
        Service { vips: vips.iter().map(|ip| ip.parse().unwrap()).collect(), ..Service::default() }
    }

    fn says(world: &World, local: &[&str]) -> Vec<String> {
        let local_networks = local.iter().map(|net| net.parse().unwrap()).collect();
        wanted(&World { local_networks, ..world.clone() }).iter().map(|(ip, prefix)| format!("{ip}/{prefix}")).collect()
    }

    #[test]
    fn remote_addresses_by_their_group() {
        let mut world = world();
        let vips = ["198.51.100.1", "198.51.100.33", "192.0.2.1", "203.0.113.1", "10.9.9.9", "2001:db8:5::1"];
        world.services.insert("x/a".into(), Arc::new(service(&vips)));
        let external = Service { remote: true, ..service(&["10.20.30.1", "2001:db8:9::1"]) };
        world.services.insert("x/b".into(), Arc::new(external));
        let want = [
            "10.20.30.1/32",
            "192.0.2.1/24",
            "198.51.100.1/24",
            "198.51.100.33/32",
            "2001:db8:5::1/128",
            "2001:db8:9::1/128",
        ];
        assert_eq!(says(&world, &[]), want);
        // In an interface's network it is local there, whatever its group says.
        assert_eq!(says(&world, &["192.0.2.0/24", "10.20.30.0/24"]).len(), 4);
        world.node_addresses.insert([198, 51, 100, 1].into());
        assert_eq!(says(&world, &[]).len(), 5, "nobody's VIP is a node's address");
        world.announcing = None;
        assert_eq!(says(&world, &[]), [""; 0], "no LBNodeAgent says what to do");
    }

    #[test]
    fn policy_local_wants_a_healthy_endpoint_here() {
        let endpoint = |addr: &str, node: &str, state, serving| Endpoint {
            addr: addr.parse().unwrap(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node: Some(node.to_owned()),
            state,
            serving,
        };
        use EndpointState::{Ready, Terminating, Unready};
        let rows = [
            (vec![], false),
            (vec![endpoint("10.0.0.1", "node2", Ready, true)], false),
            (vec![endpoint("10.0.0.1", "node1", Ready, true)], true),
            (vec![endpoint("10.0.0.1", "node1", Unready, false)], false),
            (vec![endpoint("10.0.0.1", "node1", Terminating, true)], true),
            (vec![endpoint("10.0.0.1", "node1", Terminating, false)], false),
            // It goes on to the end where nobody else has a ready one.
            (vec![endpoint("10.0.0.1", "node1", Terminating, true), endpoint("10.0.0.2", "node2", Ready, true)], false),
            (vec![endpoint("10.0.0.1", "node1", Terminating, true), endpoint("10.0.0.2", "node1", Ready, true)], true),
            (
                vec![
                    endpoint("10.0.0.1", "node1", Terminating, true),
                    endpoint("10.0.0.2", "node2", Terminating, true),
                ],
                true,
            ),
            // Healthy in one slice and not in the other.
            (vec![endpoint("10.0.0.1", "node1", Ready, true), endpoint("10.0.0.1", "node1", Unready, false)], false),
            (vec![endpoint("10.0.0.1", "node1", Unready, false), endpoint("10.0.0.2", "node1", Ready, true)], true),
        ];
        for (endpoints, want) in rows {
            let mut world = world();
            let what = format!("{endpoints:?}");
            let service = Service { local_policy: true, endpoints, ..service(&["198.51.100.1"]) };
            world.services.insert("x/a".into(), Arc::new(service));
            assert_eq!(!says(&world, &[]).is_empty(), want, "{what}");
        }
    }

    #[test]
    fn only_what_is_ours_goes() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let present = |text: &str, prefix, ours| Present { ip: ip(text), prefix, ours };
        let there: BTreeSet<_> = [
            present("10.0.0.1", 32, true),
            present("10.0.0.2", 24, true),
            present("10.0.0.3", 32, true),
            present("10.0.0.4", 32, false),
            present("10.0.0.5", 32, false),
        ]
        .into();
        let want = [("10.0.0.1", 32), ("10.0.0.2", 32), ("10.0.0.5", 32), ("10.0.0.6", 32)];
        let want: BTreeMap<_, _> = want.map(|(text, prefix)| (ip(text), prefix)).into();
        let steps = steps(&there, &want);
        let expected = [
            Step::Remove(ip("10.0.0.2"), 24),
            Step::Remove(ip("10.0.0.3"), 32),
            Step::Add(ip("10.0.0.2"), 32),
            Step::Add(ip("10.0.0.5"), 32),
            Step::Add(ip("10.0.0.6"), 32),
        ];
        assert_eq!(steps, expected, "what is wanted and somebody else's becomes ours; the rest of his stays");
    }
}
