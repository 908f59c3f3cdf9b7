//! Which LBNodeAgent says how this node announces addresses, and which addresses are remote ones.

use std::collections::BTreeMap;

use purelb_api::node_agent::{self as o, Local};
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::announce::remote::ranges;
use purelb_plan::problem::Problem;
use purelb_plan::world::{AddressOptions, Announcing, Garp};

use super::Faults;
use crate::args::duration;
use crate::source::Objects;
use crate::source::estate::groups;
use crate::source::parse::{Found, Key, Kind, Object};

/// As PureLB chooses: those whose selector matches before those for all nodes, then by name; the first with `spec.local`
/// counts. `None`: there is none, and nothing is announced.
pub(super) fn choose(objects: &dyn Objects, node: &str, install: Option<&str>) -> (Option<Announcing>, Vec<Problem>) {
    let labels = match objects.get(&(Kind::Node, node.to_owned())).map(|found| &found.object) {
        Some(Object::Node(node)) => node.metadata.labels.clone(),
        _ => BTreeMap::new(),
    };
    let mut chosen: Option<(bool, &Key, &Found, &serde_yaml_ng::Value)> = None;
    for (key, found) in objects.all(Kind::NodeAgent) {
        let Object::NodeAgent(agent) = &found.object else { continue };
        let selector = agent.spec.node_selector.as_ref().filter(|selector| !selector.is_empty());
        let specific = selector.is_some();
        let Some(local) = agent.spec.local.as_ref() else { continue };
        let better = chosen.is_none_or(|(other, ..)| specific && !other);
        if better && selector.is_none_or(|selector| selector.matches(&labels)) {
            chosen = Some((specific, key, found, local));
        }
    }
    let Some((_, key, found, local)) = chosen else { return (None, Vec::new()) };
    let mut faults = Faults::new(key, found);
    let announcing = match serde_yaml_ng::from_value::<Local>(local.clone()) {
        Ok(local) if is_device(&local.dummy_interface) => Some(Announcing {
            options: options(local.address_config.as_ref(), &mut faults),
            garp: garp(local.garp_config.as_ref(), &mut faults),
            interface: local.local_interface,
            interfaces: local.interfaces,
            device: local.dummy_interface,
            remote: ranges(&Catalog::new(&groups(objects), install)),
        }),
        Ok(local) => {
            let message = format!("{:?} is no name of an interface, and nothing is announced", local.dummy_interface);
            faults.add("spec.local.dummyInterface", message, "write 1 to 15 characters, or leave it out");
            None
        }
        Err(error) => {
            let message = format!("cannot be read, and nothing is announced: {error}");
            faults.add("spec.local", message, "correct it; see deploy/crds");
            None
        }
    };
    (announcing, faults.problems)
}

/// Lifetimes shorter than a minute are a minute, as with PureLB: they are renewed at half their time.
fn options(config: Option<&o::AddressConfig>, faults: &mut Faults<'_>) -> AddressOptions {
    let usual = AddressOptions::default();
    let Some(config) = config.and_then(|config| config.local_interface.as_ref()) else { return usual };
    let seconds =
        |value: Option<i64>, other: u32| value.map_or(other, |value| u32::try_from(value.max(0)).unwrap_or(u32::MAX));
    let valid = match seconds(config.valid_lifetime, usual.valid) {
        short @ 1..60 => {
            let message = format!("{short} s is too short, 60 s are used");
            faults.add(
                "spec.local.addressConfig.localInterface.validLifetime",
                message,
                "write 60 or more, or 0 for no end",
            );
            60
        }
        valid => valid,
    };
    let preferred = match seconds(config.preferred_lifetime, valid) {
        preferred if valid > 0 => preferred.min(valid),
        preferred => preferred,
    };
    AddressOptions { valid, preferred, no_prefix_route: config.no_prefix_route.unwrap_or(true) }
}

/// Unlike with PureLB it is said where nothing is configured, too: without it neighbours send to the old node until their
/// entries end.
fn garp(config: Option<&o::GarpConfig>, faults: &mut Faults<'_>) -> Option<Garp> {
    let Some(config) = config else { return Some(Garp::default()) };
    if config.enabled == Some(false) {
        return None;
    }
    let mut time = |field: &str, text: &str, usual: u64| {
        duration(text).unwrap_or_else(|error| {
            faults.add(&format!("spec.local.garpConfig.{field}"), error, "correct it; the default is used");
            usual
        })
    };
    Some(Garp {
        delay: time("initialDelay", &config.initial_delay, 100),
        count: config.count.and_then(|count| u32::try_from(count).ok()).unwrap_or(3).clamp(1, 10),
        interval: time("interval", &config.interval, 500),
    })
}

/// As the kernel takes it.
fn is_device(name: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || matches!(c, '/' | ':');
    !matches!(name, "" | "." | ".." | "default" | "all") && name.len() <= 15 && !name.contains(bad)
}
