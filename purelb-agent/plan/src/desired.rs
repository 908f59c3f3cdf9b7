//! What this node should serve: one [`Front`] per VIP, port and protocol, checked, without ids yet.
//!
//! Each Service is checked on its own: a fault in one becomes a [`Problem`] on it and changes nothing
//! for another, except that of two Services with the same VIP and port only one can have it. So what
//! comes of a Service that did not change is the same as last time, and [`Desired`] keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use purelb_common::table::{
    DROP, PASS, READY, TERMINATING, UNREADY, VIP_LOCAL, VIP_OTHER_PROTOCOLS, VIP_REMOTE, VIP_UNKNOWN_PASS,
};

use crate::announce::remote::{self, Kind};
use crate::ids::family;
use crate::observed::{Frontend, Observed, Slots};
use crate::problem::Problem;
use crate::world::{Endpoint, EndpointState, Mode, Service, World};

/// A VIP, port and protocol with the endpoints of this node.
#[derive(Clone, Debug)]
pub struct Front {
    /// `namespace/name` of the Service.
    pub service: String,
    /// Where it was read.
    pub origin: String,
    /// Local endpoints: (address, port) -> state as the map has it.
    pub endpoints: BTreeMap<(IpAddr, u16), u16>,
    /// Local endpoints that the Service does not balance here (any more), but whose flows may still run through us.
    pub kept: BTreeMap<(IpAddr, u16), u16>,
    /// Those that take new flows, sorted.
    pub usable: Vec<(IpAddr, u16)>,
    /// Endpoints of this node take new flows.
    pub balanced: bool,
    /// Answer when none does: PASS or DROP.
    pub fallback: u16,
    /// ClientIP affinity, seconds.
    pub affinity: Option<u32>,
    /// Who may come; empty: everybody.
    pub ranges: BTreeSet<IpNet>,
}

/// What comes of one Service.
#[derive(Debug, Default)]
struct Part {
    fronts: Vec<(Frontend, Arc<Front>)>,
    vips: Vec<(IpAddr, u32)>,
    problems: Vec<Problem>,
}

/// Everything that should be programmed, kept from look to look.
#[derive(Debug, Default)]
pub struct Desired {
    /// By key of `SERVICES`.
    pub fronts: BTreeMap<Frontend, Arc<Front>>,
    /// VIPs and their flags.
    pub vips: BTreeMap<IpAddr, u32>,
    /// What is wrong with the input.
    pub problems: Vec<Problem>,
    known: BTreeMap<String, (Arc<Service>, Part)>,
    contested: BTreeSet<String>,
    seen: Option<World>,
}

impl Desired {
    /// Checks what changed of the world since the last call. `observed` decides who keeps a contested VIP and port.
    pub fn update(&mut self, world: &World, observed: &Observed, slots: &dyn Slots) {
        // Everything but the Services counts for each of them.
        let frame = World {
            node: world.node.clone(),
            services: BTreeMap::new(),
            node_addresses: world.node_addresses.clone(),
            local_networks: world.local_networks.clone(),
            leaving: world.leaving.clone(),
            pod_ranges: BTreeSet::new(),
            datapath: world.datapath.clone(),
            announcing: world.announcing.clone(),
            excluded: false,
            evicting: false,
            kube_proxy: world.kube_proxy,
            live: false,
            unread: false,
            detached: world.detached,
        };
        let before = self.known.len();
        if self.seen.as_ref() != Some(&frame) {
            self.known.clear();
            self.seen = Some(frame);
        }
        let same = |name: &String, service: &Arc<Service>| world.services.get(name).is_some_and(|s| alike(s, service));
        self.known.retain(|name, (service, _)| same(name, service));
        // Nothing went, and all that is there is known.
        if before == self.known.len() && before == world.services.len() && self.contested.is_empty() {
            return;
        }
        let owners = owners(world, observed, slots);
        let contested: BTreeSet<String> = owners.values().flat_map(|(_, all)| all.clone()).collect();
        // Who wins a contest may change with the tables, and who was in one may be alone now.
        for name in contested.union(&self.contested) {
            self.known.remove(name);
        }
        self.contested = contested;
        for (name, service) in &world.services {
            if !self.known.contains_key(name) {
                let part = part(world, name, service, &owners);
                self.known.insert(name.clone(), (Arc::clone(service), part));
            }
        }
        self.gather();
    }

    /// From the parts.
    pub(crate) fn gather(&mut self) {
        self.fronts.clear();
        self.vips.clear();
        self.problems.clear();
        for (_, part) in self.known.values() {
            self.fronts.extend(part.fronts.iter().map(|(f, front)| (*f, Arc::clone(front))));
            self.problems.extend(part.problems.iter().cloned());
            for (vip, flags) in &part.vips {
                *self.vips.entry(*vip).or_insert(0) |= flags;
            }
        }
    }
}

fn alike(a: &Arc<Service>, b: &Arc<Service>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

/// The contested VIPs and ports: who has each, and all who want it. It goes to the first by name whose
/// endpoints its slots name already, so that a newcomer never takes what is served; else the first by name.
fn owners(world: &World, observed: &Observed, slots: &dyn Slots) -> BTreeMap<Frontend, (String, Vec<String>)> {
    let mut claims: BTreeMap<Frontend, Vec<&String>> = BTreeMap::new();
    for (name, service) in &world.services {
        let ports = service.ports.iter().filter_map(|p| Some((p.port, p.protocol?)));
        for (port, protocol) in ports {
            for &vip in &service.vips {
                claims.entry(Frontend { vip, port, protocol }).or_default().push(name);
            }
        }
    }
    claims.retain(|_, names| {
        names.dedup();
        names.len() > 1
    });
    let owner = |(frontend, names): (Frontend, Vec<&String>)| {
        let served = served(observed, slots, &frontend);
        let holds = |name: &&&String| {
            let endpoints = world.services.get(**name).into_iter().flat_map(|s| &s.endpoints);
            endpoints.into_iter().any(|e| served.contains(&(e.addr, e.port)))
        };
        let holder = names.iter().find(holds).or(names.first())?;
        Some((frontend, ((*holder).clone(), names.into_iter().cloned().collect())))
    };
    claims.into_iter().filter_map(owner).collect()
}

/// The endpoints that the slots of a VIP and port name.
fn served(observed: &Observed, slots: &dyn Slots, frontend: &Frontend) -> BTreeSet<(IpAddr, u16)> {
    let Some(service) = observed.services.get(frontend) else { return BTreeSet::new() };
    let ids: BTreeSet<u16> = slots.block(service).iter().map(|s| s.cur()).collect();
    let entries = ids.iter().filter_map(|id| observed.endpoints.get(&(family(frontend.vip), *id)));
    entries.map(|e| (e.addr, e.port)).collect()
}

fn part(world: &World, name: &str, service: &Service, owners: &BTreeMap<Frontend, (String, Vec<String>)>) -> Part {
    let mut out = Part::default();
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
        let pass = world.datapath.unknown_ports_pass || world.datapath.mode == Mode::Off;
        let mut flags = if pass { VIP_UNKNOWN_PASS } else { 0 };
        flags |= match remote::kind(world, service, vip) {
            Some(Kind::Local) => VIP_LOCAL,
            Some(Kind::Remote(_)) => VIP_REMOTE,
            None => 0,
        };
        for port in &service.ports {
            let Some(protocol) = port.protocol else {
                flags |= VIP_OTHER_PROTOCOLS;
                continue;
            };
            if port.port == 0 {
                out.problems.push(problem("spec.ports.port", "port 0 cannot be served".to_owned(), "use 1 to 65535"));
                continue;
            }
            let frontend = Frontend { vip, port: port.port, protocol };
            let owner = owners.get(&frontend).map_or(name, |(owner, _)| owner);
            if owner != name || out.fronts.iter().any(|(f, _)| *f == frontend) {
                let message = format!("{vip} port {} {protocol:?} already belongs to Service {owner}", port.port);
                out.problems.push(problem("spec.ports", message, "give one of them another port or address"));
                continue;
            }
            out.fronts.push((frontend, Arc::new(front(world, name, service, &port.name, frontend))));
        }
        out.vips.push((vip, flags));
    }
    if world.detached {
        // Its faults stay, and its tables are made anew when there are programs again.
        (out.fronts, out.vips) = (Vec::new(), Vec::new());
    }
    out
}

fn front(world: &World, name: &str, service: &Service, port_name: &str, frontend: Frontend) -> Front {
    let preferred = service.prefer_local || world.datapath.prefer_local.unwrap_or(!world.kube_proxy);
    let off = world.datapath.mode == Mode::Off;
    let balanced = !off && (service.local_policy || preferred);
    let others = !service.local_policy && (world.kube_proxy || !preferred);
    let fallback = if off || others { PASS } else { DROP };
    let local = |e: &&Endpoint| {
        e.port_name == port_name
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
    let endpoints = endpoints.into_iter().map(|(k, (s, _))| (k, s)).collect();
    // Kube-proxy gets the new flows, and those that run stay where they are.
    let (endpoints, kept, usable) =
        if balanced { (endpoints, BTreeMap::new(), usable) } else { (BTreeMap::new(), endpoints, Vec::new()) };
    Front {
        service: name.to_owned(),
        origin: service.origin.clone(),
        endpoints,
        kept,
        usable,
        balanced,
        fallback,
        // Who sticks to an endpoint lets go of it; yet none would put the client's port into the flow hash.
        affinity: service.affinity.map(|seconds| if off { 0 } else { seconds }),
        ranges: service
            .source_ranges
            .iter()
            .filter(|r| r.addr().is_ipv4() == frontend.vip.is_ipv4())
            .copied()
            .collect(),
    }
}

/// Better states first.
const fn rank(state: u16) -> u8 {
    match state {
        READY => 0,
        TERMINATING => 1,
        _ => 2,
    }
}
