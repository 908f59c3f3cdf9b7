//! Which LBNodeAgent is in force on this node, and its `spec.datapath`.

use std::collections::BTreeMap;

use purelb_api::node_agent::{self as o, ClusterTraffic, UnknownPorts};
use purelb_plan::problem::Problem;
use purelb_plan::world::{Datapath, Mode};

use super::Faults;
use crate::source::Objects;
use crate::source::parse::{Found, Key, Kind, Object};

/// As PureLB chooses: those whose selector matches this node's labels, one with a selector before one
/// for all nodes, then by name; the first with our section counts.
pub(super) fn choose(objects: &dyn Objects, node: &str) -> (Datapath, Vec<Problem>) {
    let labels = match objects.get(&(Kind::Node, node.to_owned())).map(|found| &found.object) {
        Some(Object::Node(node)) => Some(&node.metadata.labels),
        _ => None,
    };
    let none = BTreeMap::new();
    let mut problems = Vec::new();
    let mut specific: Vec<(&Key, &Found, &o::Datapath)> = Vec::new();
    let mut for_all = Vec::new();
    for (key, found) in objects.all(Kind::NodeAgent) {
        let Object::NodeAgent(agent) = &found.object else { continue };
        let mut faults = Faults::new(key, found);
        for field in agent.spec.unknown.keys() {
            faults.add(&format!("spec.{field}"), "is unknown and changes nothing".to_owned(), "correct or remove it");
        }
        if let Some(datapath) = &agent.spec.datapath {
            match agent.spec.node_selector.as_ref().filter(|s| !s.is_empty()) {
                None => for_all.push((key, &**found, datapath)),
                Some(selector) => {
                    if labels.is_none() {
                        let message = format!("needs the labels of Node {node}, which is not listed");
                        faults.add("spec.nodeSelector", message, "add the Node object");
                    }
                    if selector.matches(labels.unwrap_or(&none)) {
                        specific.push((key, &**found, datapath));
                    }
                }
            }
        }
        problems.append(&mut faults.problems);
    }
    let class = if specific.is_empty() { for_all } else { specific };
    let Some((first, rest)) = class.split_first() else { return (Datapath::default(), problems) };
    for (key, found, _) in rest {
        let mut faults = Faults::new(key, found);
        let message = format!("is for this node as well as {}, which comes first by name and counts", first.0.1);
        faults.add("spec.nodeSelector", message, "let only one of them select the node");
        problems.append(&mut faults.problems);
    }
    let mut faults = Faults::new(first.0, first.1);
    let datapath = datapath(first.2, &mut faults);
    problems.append(&mut faults.problems);
    (datapath, problems)
}

fn datapath(d: &o::Datapath, faults: &mut Faults<'_>) -> Datapath {
    if d.mode == Mode::Fast {
        faults.add("spec.datapath.mode", "fast is not built yet; stack is used".to_owned(), "use auto or stack");
    }
    match d.fragments.as_deref() {
        None | Some("Drop") => {}
        Some("Balance") => {
            let message = "Balance is not built yet; a fragmented packet for an endpoint is dropped".to_owned();
            faults.add("spec.datapath.fragments", message, "use Drop");
        }
        Some(other) => faults.add("spec.datapath.fragments", format!("{other:?} is unknown"), "use Drop"),
    }
    Datapath {
        interfaces: d.interfaces.clone(),
        hook: d.hook,
        mode: d.mode,
        unknown_ports_pass: d.unknown_ports == UnknownPorts::Pass,
        prefer_local: d.cluster_traffic.map(|c| c == ClusterTraffic::PreferLocal),
    }
}
