//! Worlds by chance, and what changes the maps besides the planner.

use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::{GONE, Slot};
use purelb_plan::apply::Twin;
use purelb_plan::world::{Announcing, Endpoint, EndpointState, Mode, Protocol, Service, ServicePort, World};

use crate::chance::Chance;

const VIPS: [&str; 9] = [
    "192.0.2.1",
    "192.0.2.2",
    "192.0.2.3",
    "2001:db8::1",
    "2001:db8::2",
    "192.0.2.200",
    "127.0.0.1",
    "224.0.0.1",
    "::",
];
const RANGES: [&str; 7] =
    ["10.0.0.0/8", "0.0.0.0/0", "::/0", "2001:db8::/32", "198.51.100.7/32", "10.1.0.0/16", "255.255.255.255/32"];
const PORTS: [u16; 5] = [80, 443, 53, 0, 65_535];
const NAMES: [&str; 3] = ["", "a", "b"];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A world of this node.
#[must_use]
pub fn any(chance: &mut Chance) -> World {
    let mut world = World { node: "n".to_owned(), kube_proxy: chance.permille(500), ..World::default() };
    world.live = world.kube_proxy && chance.permille(300);
    for _ in 0..chance.below(4) {
        put(&mut world, chance);
    }
    world
}

/// Something of it becomes other.
pub fn change(world: &mut World, chance: &mut Chance) {
    match chance.below(12) {
        0..5 => put(world, chance),
        5 => drop(world.services.remove(&name(chance))),
        6 => world.node_addresses = (0..chance.below(3)).filter_map(|_| address(&VIPS, chance)).collect(),
        7 => world.kube_proxy = !world.kube_proxy,
        8 => world.datapath.unknown_ports_pass = !world.datapath.unknown_ports_pass,
        9 => world.datapath.mode = chance.pick(&[Mode::Auto, Mode::Off, Mode::Fast]).unwrap_or_default(),
        10 => world.datapath.prefer_local = chance.pick(&[None, Some(true), Some(false)]).flatten(),
        _ => match chance.below(5) {
            0 => world.pod_ranges = nets(chance),
            1 => {
                world.local_networks = nets(chance);
                world.announcing = chance.permille(700).then(Announcing::default);
            }
            2 => world.unread = !world.unread,
            3 => world.detached = !world.detached,
            _ => world.live = !world.live,
        },
    }
}

fn name(chance: &mut Chance) -> String {
    format!("default/s{}", chance.below(5))
}

fn address(from: &[&str], chance: &mut Chance) -> Option<IpAddr> {
    chance.pick(from)?.parse().ok()
}

fn nets(chance: &mut Chance) -> std::collections::BTreeSet<ipnet::IpNet> {
    (0..chance.below(4)).filter_map(|_| chance.pick(&RANGES)?.parse().ok()).collect()
}

fn put(world: &mut World, chance: &mut Chance) {
    let name = name(chance);
    let port = |chance: &mut Chance| ServicePort {
        name: chance.pick(&NAMES).unwrap_or_default().to_owned(),
        port: chance.pick(&PORTS).unwrap_or(80),
        protocol: chance.pick(&[Some(Protocol::Tcp), Some(Protocol::Udp), None]).flatten(),
    };
    let count = chance.pick(&[1, 0, 2, 3, 5, 12, 60, 250]).unwrap_or(1);
    let service = Service {
        vips: (0..chance.below(3)).filter_map(|_| address(&VIPS, chance)).collect(),
        ports: (0..chance.below(4)).map(|_| port(chance)).collect(),
        local_policy: chance.permille(500),
        prefer_local: chance.permille(500),
        affinity: chance.pick(&[None, Some(0), Some(100), Some(u32::MAX)]).flatten(),
        source_ranges: nets(chance),
        // The many are alike but for their addresses: they would cost the bytes of all the rest.
        endpoints: (0..count).map(|index| endpoint(if count > 5 { index } else { 0 }, chance)).collect(),
        ..Service::default()
    };
    world.services.insert(name, Arc::new(service));
}

fn endpoint(index: u16, chance: &mut Chance) -> Endpoint {
    if index > 0 {
        let [high, low] = index.to_be_bytes();
        let addr = IpAddr::from([10, 1, high, low]);
        let (port_name, node) = (String::new(), Some("n".to_owned()));
        let (protocol, state) = (Protocol::Tcp, EndpointState::Ready);
        return Endpoint { addr, port_name, protocol, port: 8080, node, state, serving: true };
    }
    let last = chance.below(4) as u8;
    let v6 = chance.permille(300);
    let states = [EndpointState::Ready, EndpointState::Unready, EndpointState::Terminating];
    Endpoint {
        addr: if v6 { IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 1, u16::from(last)]) } else { [10, 0, 0, last].into() },
        port_name: chance.pick(&NAMES).unwrap_or_default().to_owned(),
        protocol: chance.pick(&PROTOCOLS).unwrap_or(Protocol::Tcp),
        port: chance.pick(&[8080, 8081, 0]).unwrap_or(8080),
        node: chance.pick(&[Some("n"), Some("m"), None]).flatten().map(str::to_owned),
        state: chance.pick(&states).unwrap_or(EndpointState::Ready),
        serving: chance.permille(700),
    }
}

/// The programs mark slots whose packets went elsewhere than to `cur`.
pub fn use_slots(twin: &mut Twin, now: u32, chance: &mut Chance) {
    let services: Vec<_> = twin.observed.services.values().copied().collect();
    for _ in 0..chance.below(4) {
        let Some(service) = chance.pick(&services) else { return };
        let index = service.base + (chance.below(1 << 16) as u32 & service.mask);
        let then = now.wrapping_sub(chance.pick(&[0, 1, 999, 1001]).unwrap_or(0));
        let slot = twin.slot(index).0 & 0xffff_ffff | u64::from(Slot::stamp_half(then, service.epoch)) << 32;
        twin.put(index, Slot(slot));
    }
}

/// Somebody else writes the maps.
pub fn meddle(twin: &mut Twin, chance: &mut Chance) {
    let observed = &mut twin.observed;
    match chance.below(6) {
        0 => drop(observed.vips.pop_first()),
        1 => drop(observed.services.pop_last()),
        2 => drop(observed.endpoints.pop_first()),
        3 => drop(observed.ranges.pop_first()),
        4 => observed.endpoints.values_mut().take(1).for_each(|e| e.state = GONE),
        _ => observed.endpoints.values_mut().take(1).for_each(|e| e.port ^= 1),
    }
}
