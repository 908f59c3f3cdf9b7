//! From objects to the [`World`]; a fault becomes a [`Problem`] on its object and field.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use purelb_plan::problem::Problem;
use purelb_plan::world::{Datapath, Endpoint, EndpointState, Hook, Mode, Protocol, Service, ServicePort, World};

use super::dir::{Listing, Object};
use super::objects as o;

/// Services of this class, or of none, are ours.
const CLASS: &str = "purelb.io/purelb";

struct Faults<'a> {
    object: String,
    origin: &'a str,
    problems: &'a mut Vec<Problem>,
}

impl Faults<'_> {
    fn add(&mut self, field: &str, message: String, remedy: &str) {
        self.problems.push(Problem {
            object: self.object.clone(),
            field: field.to_owned(),
            message,
            remedy: remedy.to_owned(),
            origin: self.origin.to_owned(),
        });
    }
}

/// Converts everything; the caller adds what the host knows (`node_addresses` of its own, `kube_proxy`, `live`).
#[must_use]
pub fn world(node: &str, listing: &Listing) -> (World, Vec<Problem>) {
    let mut world = World { node: node.to_owned(), ..World::default() };
    let mut problems = listing.problems.clone();
    let mut unready_counts = BTreeSet::new();
    let mut agents: Vec<(&o::NodeAgent, String)> = Vec::new();
    for ((kind, name), (object, origin)) in &listing.objects {
        let mut faults = Faults { object: format!("{kind} {name}"), origin, problems: &mut problems };
        match object {
            Object::Service(s) => {
                if let Some(service) = service(s, &mut faults) {
                    if s.spec.publish_not_ready_addresses {
                        unready_counts.insert(name.clone());
                    }
                    world.services.insert(name.clone(), service);
                }
            }
            Object::Node(n) => {
                for a in n.status.addresses.iter().filter(|a| a.r#type.ends_with("IP")) {
                    match a.address.parse::<IpAddr>() {
                        Ok(addr) => drop(world.node_addresses.insert(addr)),
                        Err(_) => {
                            faults.add("status.addresses", format!("{:?} is no IP address", a.address), "correct it")
                        }
                    }
                }
            }
            Object::NodeAgent(a) => agents.push((a, name.clone())),
            Object::Slice(_) => {}
        }
    }
    for ((kind, name), (object, origin)) in &listing.objects {
        if let Object::Slice(s) = object {
            let mut faults = Faults { object: format!("{kind} {name}"), origin, problems: &mut problems };
            slice(s, &unready_counts, &mut world.services, &mut faults);
        }
    }
    // One named as the node wins over the one for all, as PureLB's `default` does.
    let of_node = |(_, name): &&(&o::NodeAgent, String)| name.ends_with(&format!("/{node}"));
    if let Some((agent, _)) = agents.iter().find(of_node).or_else(|| agents.first()) {
        world.datapath = datapath(&agent.spec.datapath);
    }
    (world, problems)
}

fn datapath(d: &o::Datapath) -> Datapath {
    Datapath {
        interfaces: d.interfaces.clone(),
        hook: match d.hook {
            o::Hook::Auto => Hook::Auto,
            o::Hook::Xdp => Hook::Xdp,
            o::Hook::XdpGeneric => Hook::XdpGeneric,
            o::Hook::Tcx => Hook::Tcx,
        },
        mode: match d.mode {
            o::Mode::Auto => Mode::Auto,
            o::Mode::Stack => Mode::Stack,
            o::Mode::Fast => Mode::Fast,
            o::Mode::Off => Mode::Off,
        },
        unknown_ports_pass: matches!(d.unknown_ports, o::UnknownPorts::Pass),
        prefer_local: d.cluster_traffic.map(|c| matches!(c, o::ClusterTraffic::PreferLocal)),
    }
}

fn service(s: &o::Service, faults: &mut Faults<'_>) -> Option<Service> {
    let ours = s.spec.load_balancer_class.as_deref().is_none_or(|c| c == CLASS);
    if s.spec.r#type != "LoadBalancer" || !ours {
        return None;
    }
    let mut out = Service { origin: faults.origin.to_owned(), ..Service::default() };
    for ip in s.status.load_balancer.ingress.iter().filter_map(|i| i.ip.as_deref()) {
        match ip.parse::<IpAddr>() {
            Ok(addr) => drop(out.vips.insert(addr)),
            Err(_) => faults.add("status.loadBalancer.ingress.ip", format!("{ip:?} is no IP address"), "correct it"),
        }
    }
    let mut seen = BTreeSet::new();
    for port in &s.spec.ports {
        let word = port.protocol.as_deref().unwrap_or("TCP");
        let protocol = match protocol(word) {
            Ok(protocol) => protocol,
            Err(message) => {
                faults.add("spec.ports.protocol", message, "use TCP, UDP or SCTP");
                continue;
            }
        };
        if !seen.insert((port.port, word.to_owned())) {
            let message = format!("port {} {word} stands twice", port.port);
            faults.add("spec.ports", message, "remove one of them");
            continue;
        }
        out.ports.push(ServicePort { name: port.name.clone().unwrap_or_default(), port: port.port, protocol });
    }
    let mut bad_range = false;
    for range in &s.spec.load_balancer_source_ranges {
        match range.trim().parse::<IpNet>() {
            Ok(net) => drop(out.source_ranges.insert(net.trunc())),
            Err(_) => {
                bad_range = true;
                faults.add(
                    "spec.loadBalancerSourceRanges",
                    format!("{range:?} is no CIDR"),
                    "write it as 192.0.2.0/24",
                );
            }
        }
    }
    if bad_range && out.source_ranges.is_empty() {
        // An unreadable list must never open the service to everybody.
        let nobody = ["255.255.255.255/32", "ff00::/128"];
        out.source_ranges.extend(nobody.iter().filter_map(|n| n.parse::<IpNet>().ok()));
    }
    out.local_policy = match s.spec.external_traffic_policy.as_deref() {
        None | Some("Cluster" | "") => false,
        Some("Local") => true,
        Some(other) => {
            faults.add(
                "spec.externalTrafficPolicy",
                format!("{other:?} is unknown; Cluster is assumed"),
                "use Local or Cluster",
            );
            false
        }
    };
    out.affinity = match s.spec.session_affinity.as_deref() {
        None | Some("None" | "") => None,
        Some("ClientIP") => {
            let config = s.spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
            Some(config.and_then(|c| c.timeout_seconds).unwrap_or(10_800))
        }
        Some(other) => {
            faults.add(
                "spec.sessionAffinity",
                format!("{other:?} is unknown; None is assumed"),
                "use ClientIP or None",
            );
            None
        }
    };
    let annotated = s.metadata.annotations.get("purelb.io/prefer-local").is_some_and(|v| v == "true");
    out.prefer_local = annotated || s.spec.traffic_distribution.as_deref() == Some("PreferSameNode");
    Some(out)
}

fn protocol(word: &str) -> Result<Option<Protocol>, String> {
    match word {
        "TCP" => Ok(Some(Protocol::Tcp)),
        "UDP" => Ok(Some(Protocol::Udp)),
        "SCTP" => Ok(None),
        other => Err(format!("protocol {other:?} is unknown")),
    }
}

fn slice(
    s: &o::EndpointSlice,
    unready_counts: &BTreeSet<String>,
    services: &mut BTreeMap<String, Service>,
    faults: &mut Faults<'_>,
) {
    let Some(owner) = s.metadata.labels.get("kubernetes.io/service-name") else {
        let remedy = "add the label kubernetes.io/service-name";
        return faults.add("metadata.labels", "names no Service".to_owned(), remedy);
    };
    let namespace = if s.metadata.namespace.is_empty() { "default" } else { &s.metadata.namespace };
    let full = format!("{namespace}/{owner}");
    let v4 = match s.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            return faults.add("addressType", format!("{other:?} cannot be balanced"), "use IPv4 or IPv6");
        }
    };
    let mut endpoints = Vec::new();
    for (index, endpoint) in s.endpoints.iter().flatten().enumerate() {
        let Some(text) = endpoint.addresses.first() else { continue };
        match text.parse::<IpAddr>() {
            Ok(addr) if addr.is_ipv4() == v4 => endpoints.push((addr, endpoint)),
            _ => {
                let message = format!("{text:?} is no {} address", s.address_type);
                faults.add(&format!("endpoints[{index}].addresses"), message, "correct it");
            }
        }
    }
    let mut found = Vec::new();
    for port in s.ports.iter().flatten() {
        let protocol = match protocol(port.protocol.as_deref().unwrap_or("TCP")) {
            Ok(Some(protocol)) => protocol,
            Ok(None) => continue,
            Err(message) => {
                faults.add("ports.protocol", message, "use TCP, UDP or SCTP");
                continue;
            }
        };
        let target = match port.port {
            Some(target) if target != 0 => target,
            _ => {
                faults.add("ports.port", "0 or no port cannot be reached".to_owned(), "name the target port");
                continue;
            }
        };
        for &(addr, endpoint) in &endpoints {
            let c = &endpoint.conditions;
            let ready = c.ready.unwrap_or(true) || unready_counts.contains(&full);
            let state = match (c.terminating.unwrap_or(false), ready) {
                (true, _) => EndpointState::Terminating,
                (false, true) => EndpointState::Ready,
                (false, false) => EndpointState::Unready,
            };
            found.push(Endpoint {
                addr,
                port_name: port.name.clone().unwrap_or_default(),
                protocol,
                port: target,
                node: endpoint.node_name.clone(),
                state,
                serving: c.serving.unwrap_or(ready),
            });
        }
    }
    if let Some(service) = services.get_mut(&full) {
        service.endpoints.extend(found);
    }
}
