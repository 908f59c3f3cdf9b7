//! Local addresses: those in a network of the interfaces that they go on. Which there are, and which nodes should have
//! each first (PureLB's behaviour, 5.2 and 5.3; but the policy Local is honoured and never written away).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::election::Preference;
use super::lease::covers;
use super::owner::Want;
use super::slots::Slot;
use crate::world::{Endpoint, EndpointState, Service, World};

/// The local addresses of all Services. None where nothing is announced.
#[must_use]
pub fn wants(world: &World) -> BTreeMap<IpAddr, Want> {
    let mut out: BTreeMap<IpAddr, Want> = BTreeMap::new();
    if world.announcing.is_none() {
        return out;
    }
    for service in world.services.values() {
        let local = |vip: &&IpAddr| covers(&world.local_networks, **vip) && !world.node_addresses.contains(*vip);
        let mut preference = None;
        for vip in service.vips.iter().filter(local) {
            let preference = preference.get_or_insert_with(|| prefers(service)).clone();
            let slot = service.slots.iter().find(|slot| slot.ip == *vip).map(|slot: &Slot| slot.node.clone());
            match out.get_mut(vip) {
                None => drop(out.insert(*vip, Want { preference, slot })),
                Some(want) => {
                    want.preference = both(&want.preference, &preference);
                    want.slot = want.slot.take().or(slot);
                }
            }
        }
    }
    out
}

fn prefers(service: &Service) -> Preference {
    if service.local_policy {
        Preference::Only(nodes(service, |endpoint| endpoint.state == EndpointState::Ready, true))
    } else if service.follows_endpoints && !service.shared {
        Preference::Prefer(nodes(service, |endpoint| endpoint.state == EndpointState::Ready || endpoint.serving, false))
    } else {
        Preference::None
    }
}

/// Nodes with a good endpoint; `last`: where there is none at all, with one that serves still.
fn nodes(service: &Service, good: impl Fn(&Endpoint) -> bool, last: bool) -> BTreeSet<String> {
    let of = |good: &dyn Fn(&Endpoint) -> bool| -> BTreeSet<String> {
        service
            .endpoints
            .iter()
            .filter(|endpoint| good(endpoint))
            .filter_map(|endpoint| endpoint.node.clone())
            .collect()
    };
    let found = of(&good);
    if found.is_empty() && last { of(&|endpoint| endpoint.serving) } else { found }
}

/// Of two Services that share an address. One that only some nodes may have limits both.
fn both(one: &Preference, other: &Preference) -> Preference {
    match (one, other) {
        (Preference::Only(a), Preference::Only(b)) => {
            let common: BTreeSet<_> = a.intersection(b).cloned().collect();
            Preference::Only(if common.is_empty() { a | b } else { common })
        }
        (only @ Preference::Only(_), _) | (_, only @ Preference::Only(_)) => only.clone(),
        (Preference::Prefer(a), Preference::Prefer(b)) => Preference::Prefer(a | b),
        (prefer @ Preference::Prefer(_), _) | (_, prefer @ Preference::Prefer(_)) => prefer.clone(),
        (Preference::None, Preference::None) => Preference::None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::world::{Announcing, Protocol};

    fn endpoint(node: &str, state: EndpointState, serving: bool) -> Endpoint {
        Endpoint {
            addr: [10, 0, 0, 1].into(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node: Some(node.to_owned()),
            state,
            serving,
        }
    }

    fn service(vips: &[&str], endpoints: Vec<Endpoint>) -> Service {
        Service { vips: vips.iter().map(|ip| ip.parse().unwrap()).collect(), endpoints, ..Service::default() }
    }

    fn world(services: Vec<Service>) -> World {
        let named = services.into_iter().enumerate().map(|(n, service)| (format!("x/{n}"), Arc::new(service)));
        World { services: named.collect(), announcing: Some(Announcing::default()), ..World::default() }
    }

    fn of(world: &World) -> BTreeMap<IpAddr, Want> {
        let local_networks = ["192.0.2.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()].into();
        wants(&World { local_networks, ..world.clone() })
    }

    fn set(nodes: &[&str]) -> BTreeSet<String> {
        nodes.iter().map(|node| (*node).to_owned()).collect()
    }

    #[test]
    fn those_in_a_network() {
        let mut world = world(vec![service(&["192.0.2.1", "198.51.100.1", "2001:db8::9", "192.0.2.7"], vec![])]);
        world.node_addresses.insert([192, 0, 2, 7].into());
        let ips: Vec<_> = of(&world).keys().map(ToString::to_string).collect();
        assert_eq!(ips, ["192.0.2.1", "2001:db8::9"], "a node's own address is nobody's VIP");
        world.announcing = None;
        assert!(of(&world).is_empty());
    }

    #[test]
    fn where_endpoints_are() {
        use EndpointState::{Ready, Terminating, Unready};
        let all = || vec![endpoint("a", Ready, true), endpoint("b", Unready, false), endpoint("c", Terminating, true)];
        let preference = |service| of(&world(vec![service])).into_values().next().unwrap().preference;
        assert_eq!(preference(service(&["192.0.2.1"], all())), Preference::None);
        let local = |endpoints| Service { local_policy: true, ..service(&["192.0.2.1"], endpoints) };
        assert_eq!(preference(local(all())), Preference::Only(set(&["a"])));
        assert_eq!(preference(local(all().split_off(1))), Preference::Only(set(&["c"])), "the last that serve");
        assert_eq!(preference(local(vec![])), Preference::Only(set(&[])));
        let follows = Service { follows_endpoints: true, ..service(&["192.0.2.1"], all()) };
        assert_eq!(preference(follows.clone()), Preference::Prefer(set(&["a", "c"])));
        assert_eq!(preference(Service { shared: true, ..follows }), Preference::None);
    }

    #[test]
    fn of_two_that_share_it_the_stricter_counts() {
        let local = |node| Service {
            local_policy: true,
            ..service(&["192.0.2.1"], vec![endpoint(node, EndpointState::Ready, true)])
        };
        let preference = |services| of(&world(services)).into_values().next().unwrap().preference;
        assert_eq!(preference(vec![service(&["192.0.2.1"], vec![]), local("a")]), Preference::Only(set(&["a"])));
        assert_eq!(preference(vec![local("a"), local("b")]), Preference::Only(set(&["a", "b"])));
    }

    #[test]
    fn the_slot_of_the_address() {
        let slots = super::super::slots::parse("n2,eth0,192.0.2.1 n3,eth0,192.0.2.2");
        let wants = of(&world(vec![Service { slots, ..service(&["192.0.2.2", "192.0.2.3"], vec![]) }]));
        let slots: Vec<_> = wants.values().map(|want| want.slot.as_deref()).collect();
        assert_eq!(slots, [Some("n3"), None]);
    }
}
