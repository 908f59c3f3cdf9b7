//! The endpoints of an EndpointSlice.

use std::net::IpAddr;

use purelb_plan::world::{Endpoint, EndpointState, Protocol};

use super::Faults;
use super::service::{protocol, unfit};
use crate::source::objects as o;

/// `namespace/name` of its Service.
pub(super) fn owner(s: &o::EndpointSlice) -> Option<String> {
    let name = s.metadata.labels.get("kubernetes.io/service-name").filter(|name| !name.is_empty())?;
    let namespace = if s.metadata.namespace.is_empty() { "default" } else { &s.metadata.namespace };
    Some(format!("{namespace}/{name}"))
}

/// Each endpoint with each port. `publish`: the Service wants unready ones too.
pub(super) fn convert(s: &o::EndpointSlice, publish: bool, faults: &mut Faults<'_>) -> Vec<Endpoint> {
    let v4 = match s.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            faults.add("addressType", format!("{other:?} cannot be balanced"), "use IPv4 or IPv6");
            return Vec::new();
        }
    };
    let endpoints = s.endpoints.iter().flatten().enumerate();
    let endpoints: Vec<_> = endpoints.filter_map(|(i, e)| Some((address(e, i, v4, faults)?, e))).collect();
    let mut found = Vec::new();
    for port in s.ports.iter().flatten() {
        let Some((protocol, target)) = target(port, faults) else { continue };
        found.extend(endpoints.iter().map(|&(addr, e)| Endpoint {
            addr,
            port_name: port.name.clone().unwrap_or_default(),
            protocol,
            port: target,
            node: e.node_name.clone().filter(|node| !node.is_empty()),
            state: state(&e.conditions, publish),
            serving: serving(&e.conditions, publish),
        }));
    }
    found
}

/// The first one counts: Kubernetes promises that all lead to the same endpoint.
fn address(e: &o::Endpoint, index: usize, v4: bool, faults: &mut Faults<'_>) -> Option<IpAddr> {
    let field = format!("endpoints[{index}].addresses");
    let Some(text) = e.addresses.first() else {
        faults.add(&field, "holds no address".to_owned(), "name the endpoint's address");
        return None;
    };
    match text.parse::<IpAddr>() {
        Ok(addr) if addr.is_ipv4() == v4 => match unfit(addr) {
            None => return Some(addr),
            Some(what) => {
                faults.add(&field, format!("{text} is {what}; no endpoint is there"), "name the pod's address")
            }
        },
        _ => {
            let family = if v4 { "IPv4" } else { "IPv6" };
            faults.add(&field, format!("{text:?} is no {family} address"), "correct it");
        }
    }
    None
}

fn target(port: &o::SlicePort, faults: &mut Faults<'_>) -> Option<(Protocol, u16)> {
    match (protocol(port.protocol.as_deref().unwrap_or("TCP")), port.port) {
        (Err(message), _) => faults.add("ports.protocol", message, "use TCP, UDP or SCTP"),
        (Ok(None), _) => {}
        (Ok(Some(protocol)), Some(target)) if target != 0 => return Some((protocol, target)),
        _ => faults.add("ports.port", "0 or no port cannot be reached".to_owned(), "name the target port"),
    }
    None
}

/// As kube-proxy reads them. An endpoint that says ready while it terminates does so because the
/// Service publishes unready ones.
fn state(c: &o::Conditions, publish: bool) -> EndpointState {
    match (publish || c.ready == Some(true), c.terminating.unwrap_or(false), c.ready) {
        (true, _, _) => EndpointState::Ready,
        (false, true, _) => EndpointState::Terminating,
        (false, false, None) => EndpointState::Ready,
        (false, false, Some(_)) => EndpointState::Unready,
    }
}

/// Unknown counts as ready does.
fn serving(c: &o::Conditions, publish: bool) -> bool {
    publish || c.serving.or(c.ready).unwrap_or(true)
}
