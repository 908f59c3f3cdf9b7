//! What this node should serve: one [`Front`] per VIP, port and protocol, checked, without ids yet.
//!
//! Each Service is checked on its own: a fault in one becomes a [`Problem`] on it and changes nothing
//! for another, except that of two Services with the same VIP and port only one can have it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_common::table::{DROP, PASS, READY, TERMINATING, UNREADY, VIP_OTHER_PROTOCOLS, VIP_UNKNOWN_PASS};

use crate::ids::family;
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
    let owners = owners(world, observed);
    for (name, service) in &world.services {
        add(world, name, service, &owners, &mut out);
    }
    out
}

/// Who gets each VIP and port: the first by name whose endpoints its slots name already, so that a
/// newcomer never takes what is served; else the first by name.
fn owners<'a>(world: &'a World, observed: &Observed) -> BTreeMap<Frontend, &'a str> {
    let mut claims: BTreeMap<Frontend, Vec<(&'a str, &'a Service)>> = BTreeMap::new();
    for (name, service) in &world.services {
        let ports = service.ports.iter().filter_map(|p| Some((p.port, p.protocol?)));
        for (port, protocol) in ports {
            for &vip in &service.vips {
                claims.entry(Frontend { vip, port, protocol }).or_default().push((name, service));
            }
        }
    }
    let owner = |(frontend, claims): (Frontend, Vec<(&'a str, &'a Service)>)| {
        let served = if claims.len() > 1 { served(observed, &frontend) } else { BTreeSet::new() };
        let holder = claims.iter().find(|(_, s)| s.endpoints.iter().any(|e| served.contains(&(e.addr, e.port))));
        holder.or(claims.first()).map(|(name, _)| (frontend, *name))
    };
    claims.into_iter().filter_map(owner).collect()
}

/// The endpoints that the slots of a VIP and port name.
fn served(observed: &Observed, frontend: &Frontend) -> BTreeSet<(IpAddr, u16)> {
    let Some(block) = observed.services.get(frontend).and_then(|s| observed.blocks.get(&s.base)) else {
        return BTreeSet::new();
    };
    let ids: BTreeSet<u16> = block.iter().map(|s| s.cur()).collect();
    let entries = ids.iter().filter_map(|id| observed.endpoints.get(&(family(frontend.vip), *id)));
    entries.map(|e| (e.addr, e.port)).collect()
}

fn add(world: &World, name: &str, service: &Service, owners: &BTreeMap<Frontend, &str>, out: &mut Desired) {
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
            let owner = owners.get(&frontend).copied().unwrap_or(name);
            if owner != name || out.fronts.contains_key(&frontend) {
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
        } else if state == entry.0 {
            entry.1 |= e.serving;
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
        ranges: service
            .source_ranges
            .iter()
            .filter(|r| r.addr().is_ipv4() == frontend.vip.is_ipv4())
            .copied()
            .collect(),
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
