//! What this node should serve: one [`Front`] per VIP, port and protocol, checked, without ids yet.
//!
//! Each Service is checked on its own: a fault in one becomes a [`Problem`] on it and changes nothing
//! for another, except that of two Services with the same VIP and port only one can have it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_common::table::{
    DROP, PASS, READY, TERMINATING, UNREADY, VIP_OTHER_PROTOCOLS, VIP_UNKNOWN_PASS,
};

use crate::observed::{Frontend, Observed};
use crate::problem::Problem;
use crate::world::{Endpoint, EndpointState, Service, World};

/// A VIP, port and protocol with the endpoints of this node.
#[derive(Clone, Debug)]
pub struct Front {
    /// `namespace/name` of the Service.
    pub service: String,
    /// Where it was read.
    pub origin: String,
    /// Local endpoints: (address, port) -> state as the map has it.
    pub endpoints: BTreeMap<(IpAddr, u16), u16>,
    /// Those that take new flows, sorted.
    pub usable: Vec<(IpAddr, u16)>,
    /// Answer when none does: PASS or DROP.
    pub fallback: u16,
    /// ClientIP affinity, seconds.
    pub affinity: Option<u32>,
    /// Who may come; empty: everybody.
    pub ranges: BTreeSet<IpNet>,
}

/// Everything that should be programmed.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// By key of `SERVICES`.
    pub fronts: BTreeMap<Frontend, Front>,
    /// VIPs and their flags.
    pub vips: BTreeMap<IpAddr, u32>,
    /// What is wrong with the input.
    pub problems: Vec<Problem>,
}

/// Checks the world. `observed` decides who keeps a contested VIP and port.
#[must_use]
pub fn desired(world: &World, observed: &Observed) -> Desired {
    let mut out = Desired::default();
    // Two passes, so that a VIP and port that is served already stays with a Service that still wants it.
    let mut order: Vec<(&String, &Service)> = world.services.iter().collect();
    order.sort_by_key(|(name, s)| (!holds(observed, s), (*name).clone()));
    for (name, service) in order {
        add(world, name, service, &mut out);
    }
    out
}

fn holds(observed: &Observed, service: &Service) -> bool {
    let addresses: BTreeSet<IpAddr> = service.endpoints.iter().map(|e| e.addr).collect();
    observed.reverse.iter().any(|(backend, (vip, _))| addresses.contains(&backend.vip) && service.vips.contains(vip))
}

fn add(world: &World, name: &str, service: &Service, out: &mut Desired) {
    let problem = |field: &str, message: String, remedy: &str| Problem {
        object: format!("Service {name}"),
        field: field.to_owned(),
        message,
        remedy: remedy.to_owned(),
        origin: service.origin.clone(),
    };
    for &vip in &service.vips {
        if world.node_addresses.contains(&vip) {
            out.problems.push(problem(
                "status.loadBalancer.ingress",
                format!("{vip} is an address of a node or of this host; its packets are never judged"),
                "give the Service another address",
            ));
            continue;
        }
        if vip.is_unspecified() || vip.is_multicast() || vip.is_loopback() {
            out.problems.push(problem(
                "status.loadBalancer.ingress",
                format!("{vip} cannot be a load balancer's address"),
                "use a unicast address",
            ));
            continue;
        }
        let flags = out.vips.entry(vip).or_insert(0);
        if world.datapath.unknown_ports_pass {
            *flags |= VIP_UNKNOWN_PASS;
        }
        for port in &service.ports {
            let Some(protocol) = port.protocol else {
                *flags |= VIP_OTHER_PROTOCOLS;
                continue;
            };
            if port.port == 0 {
                out.problems.push(problem("spec.ports.port", "port 0 cannot be served".to_owned(), "use 1 to 65535"));
                continue;
            }
            let frontend = Frontend { vip, port: port.port, protocol };
            if let Some(other) = out.fronts.get(&frontend) {
                let owner = &other.service;
                let message = format!("{vip} port {} {protocol:?} already belongs to Service {owner}", port.port);
                out.problems.push(problem("spec.ports", message, "give one of them another port or address"));
                continue;
            }
            out.fronts.insert(frontend, front(world, name, service, &port.name, frontend));
        }
    }
}

fn front(world: &World, name: &str, service: &Service, port_name: &str, frontend: Frontend) -> Front {
    let preferred = service.prefer_local || world.datapath.prefer_local.unwrap_or(!world.kube_proxy);
    let balanced = service.local_policy || preferred;
    let fallback = if !service.local_policy && (world.kube_proxy || !preferred) { PASS } else { DROP };
    let local = |e: &&Endpoint| {
        balanced
            && e.port_name == port_name
            && e.protocol == frontend.protocol
            && e.addr.is_ipv4() == frontend.vip.is_ipv4()
            && e.node.as_deref() == Some(world.node.as_str())
            && e.port != 0
    };
    let mut endpoints: BTreeMap<(IpAddr, u16), (u16, bool)> = BTreeMap::new();
    for e in service.endpoints.iter().filter(local) {
        let state = match e.state {
            EndpointState::Ready => READY,
            EndpointState::Unready => UNREADY,
            EndpointState::Terminating => TERMINATING,
        };
        // The same endpoint in two slices: the better state counts (ready, terminating, unready).
        let entry = endpoints.entry((e.addr, e.port)).or_insert((state, e.serving));
        if rank(state) < rank(entry.0) {
            *entry = (state, e.serving);
        }
    }
    let takers = |wanted: u16, all: bool| -> Vec<(IpAddr, u16)> {
        endpoints.iter().filter(|(_, (s, serving))| *s == wanted && (all || *serving)).map(|(k, _)| *k).collect()
    };
    let mut usable = takers(READY, true);
    if usable.is_empty() {
        usable = takers(TERMINATING, false);
    }
    Front {
        service: name.to_owned(),
        origin: service.origin.clone(),
        endpoints: endpoints.into_iter().map(|(k, (s, _))| (k, s)).collect(),
        usable,
        fallback,
        affinity: service.affinity,
        ranges: service.source_ranges.iter().filter(|r| r.addr().is_ipv4() == frontend.vip.is_ipv4()).copied().collect(),
    }
}

/// Better states first.
#[must_use]
pub const fn rank(state: u16) -> u8 {
    match state {
        READY => 0,
        TERMINATING => 1,
        _ => 2,
    }
}
