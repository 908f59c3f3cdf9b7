//! From objects to the [`World`], a Service at a time: what did not change is the same `Arc` again, and
//! its problems are remembered with it. A fault becomes a [`Problem`] on its object and field.

mod agent;
mod announce;
mod service;
mod slice;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use purelb_plan::problem::Problem;
use purelb_plan::world::World;

use super::objects::{Condition, Node, Taint};
use super::parse::{Found, Key, Kind, Object, label};
use super::{Host, Objects};

/// Label of a Node that is to have no load balancer's addresses, whatever its value.
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// It takes pods away. Not those that say that the node is not heard of: what is announced here may be all right.
fn evicts(taint: &Taint) -> bool {
    let unheard = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
    taint.effect == "NoExecute" && !unheard.contains(&taint.key.as_str())
}

/// What the kubelet says when it shuts the node down gracefully.
fn shuts_down(node: &Node) -> bool {
    let says = |of: &Condition| of.r#type == "Ready" && of.status == "False" && of.message.contains("shutting down");
    node.status.conditions.iter().any(says)
}

/// Collects the problems of one object.
struct Faults<'a> {
    object: String,
    origin: &'a str,
    problems: Vec<Problem>,
}

impl<'a> Faults<'a> {
    fn new(key: &Key, found: &'a Found) -> Self {
        Self { object: label(key), origin: &found.origin, problems: Vec::new() }
    }

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

/// Which Services of type LoadBalancer are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Of our class, or of none: a folder is ours.
    OfClass,
    /// Those that an allocator of PureLB's kind signed, as PureLB's own agents do: a cluster may have load balancers
    /// beside us.
    Signed,
}

/// The world as the objects have it, and what is wrong with them.
#[derive(Debug)]
pub struct Converter {
    world: World,
    whose: Whose,
    /// The only namespace whose ServiceGroups count.
    install: Option<String>,
    /// There is a Node of our name.
    listed: bool,
    /// Addresses of all Nodes.
    nodes: BTreeSet<IpAddr>,
    /// The host's own addresses.
    host: BTreeSet<IpAddr>,
    /// Slice -> its Service.
    owners: BTreeMap<String, String>,
    /// Service -> its slices.
    slices: BTreeMap<String, BTreeSet<String>>,
    /// Addresses of Services of another class.
    foreign: BTreeMap<String, (BTreeSet<IpAddr>, Arc<Found>)>,
    /// By Service; those of a slice without one by the slice.
    problems: BTreeMap<Key, Vec<Problem>>,
    contested: Vec<Problem>,
    of_nodes: Vec<Problem>,
    of_agents: Vec<Problem>,
    of_announcing: Vec<Problem>,
}

impl Converter {
    /// An empty world of this node.
    #[must_use]
    pub fn new(node: &str, whose: Whose, install: Option<String>) -> Self {
        Self {
            world: World { node: node.to_owned(), ..World::default() },
            whose,
            install,
            listed: false,
            nodes: BTreeSet::new(),
            host: BTreeSet::new(),
            owners: BTreeMap::new(),
            slices: BTreeMap::new(),
            foreign: BTreeMap::new(),
            problems: BTreeMap::new(),
            contested: Vec::new(),
            of_nodes: Vec::new(),
            of_agents: Vec::new(),
            of_announcing: Vec::new(),
        }
    }

    /// The world.
    #[must_use]
    pub const fn world(&self) -> &World {
        &self.world
    }

    /// What is wrong with the objects.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let rest = self.contested.iter().chain(&self.of_nodes).chain(&self.of_agents).chain(&self.of_announcing);
        self.problems.values().flatten().chain(rest).chain(&self.nobody()).cloned().collect()
    }

    /// Nothing names this node: it has no endpoint then, and a wrong name looks just the same.
    fn nobody(&self) -> Option<Problem> {
        let mut named =
            self.world.services.values().flat_map(|s| &s.endpoints).filter_map(|e| e.node.as_ref()).peekable();
        let unknown = !self.listed && named.peek().is_some() && !named.any(|node| *node == self.world.node);
        unknown.then(|| Problem {
            object: format!("Node {}", self.world.node),
            field: "--node-name".to_owned(),
            message: "is not listed, and no endpoint names it: nothing is balanced here".to_owned(),
            remedy: "start the agent with this node's name as in EndpointSlices, or add the Node object".to_owned(),
            origin: String::new(),
        })
    }

    /// What the host says of itself, its own addresses and the networks for local ones beside it.
    pub fn host(&mut self, addresses: &BTreeSet<IpAddr>, local_networks: &BTreeSet<IpNet>, host: Host) {
        (self.world.kube_proxy, self.world.live, self.world.detached) = (host.kube_proxy, host.live, host.detached);
        self.world.local_networks.clone_from(local_networks);
        if self.host != *addresses {
            self.host.clone_from(addresses);
            self.node_addresses();
        }
    }

    fn node_addresses(&mut self) {
        self.world.node_addresses = self.nodes.union(&self.host).copied().collect();
    }

    /// Whether the source holds something that was never read.
    pub const fn unread(&mut self, unread: bool) {
        self.world.unread = unread;
    }

    /// Converts what changed; the names of the Services of the world that came, went or differ.
    pub fn update(&mut self, objects: &dyn Objects, changed: &BTreeSet<Key>) -> BTreeSet<String> {
        let mut touched = BTreeSet::new();
        for key in changed {
            match key.0 {
                Kind::Service => drop(touched.insert(key.1.clone())),
                Kind::Slice => touched.extend(self.owner(objects, key)),
                Kind::Node | Kind::NodeAgent | Kind::ServiceGroup | Kind::Lease => {}
            }
        }
        let any = |kind| changed.iter().any(|key| key.0 == kind);
        if any(Kind::Node) {
            self.update_nodes(objects);
        }
        if any(Kind::Node) || any(Kind::NodeAgent) {
            (self.world.datapath, self.of_agents) = agent::choose(objects, &self.world.node);
        }
        if [Kind::Node, Kind::NodeAgent, Kind::ServiceGroup].into_iter().any(any) {
            let install = self.install.as_deref();
            (self.world.announcing, self.of_announcing) = announce::choose(objects, &self.world.node, install);
        }
        touched.retain(|name| self.service(objects, name));
        if any(Kind::Service) {
            self.contested = self.contest();
        }
        touched
    }

    /// Whose slice it was and whose it is.
    fn owner(&mut self, objects: &dyn Objects, key: &Key) -> Vec<String> {
        let before = self.owners.remove(&key.1);
        if let Some(slices) = before.as_ref().and_then(|owner| self.slices.get_mut(owner)) {
            slices.remove(&key.1);
        }
        self.problems.remove(key);
        let mut now = None;
        if let Some(found) = objects.get(key)
            && let Object::Slice(slice) = &found.object
        {
            now = slice::owner(slice);
            match &now {
                Some(owner) => {
                    self.owners.insert(key.1.clone(), owner.clone());
                    self.slices.entry(owner.clone()).or_default().insert(key.1.clone());
                }
                None => {
                    let mut faults = Faults::new(key, found);
                    let remedy = "add the label kubernetes.io/service-name";
                    faults.add("metadata.labels", "names no Service".to_owned(), remedy);
                    self.problems.insert(key.clone(), faults.problems);
                }
            }
        }
        before.into_iter().chain(now).collect()
    }

    /// Converts a Service with its slices; whether the world is another one now.
    fn service(&mut self, objects: &dyn Objects, name: &str) -> bool {
        let key = (Kind::Service, name.to_owned());
        self.foreign.remove(name);
        self.problems.remove(&key);
        let mut problems = Vec::new();
        let (mut service, mut publish) = (None, false);
        if let Some(found) = objects.get(&key)
            && let Object::Service(object) = &found.object
        {
            let ours = match self.whose {
                Whose::OfClass => service::is_ours(object),
                Whose::Signed => service::is_signed(object),
            };
            if ours {
                let mut faults = Faults::new(&key, found);
                service = Some(service::convert(object, objects.state(name), &mut faults));
                publish = object.spec.publish_not_ready_addresses;
                problems.append(&mut faults.problems);
            } else if service::is_balanced(object) {
                self.foreign.insert(name.to_owned(), (service::addresses(object), found.clone()));
            }
        }
        for slice in self.slices.get(name).into_iter().flatten() {
            let key = (Kind::Slice, slice.clone());
            if let Some(found) = objects.get(&key)
                && let Object::Slice(object) = &found.object
            {
                let mut faults = Faults::new(&key, found);
                let endpoints = slice::convert(object, publish, &mut faults);
                problems.append(&mut faults.problems);
                if let Some(service) = &mut service {
                    service.endpoints.extend(endpoints);
                }
            }
        }
        if self.slices.get(name).is_some_and(BTreeSet::is_empty) {
            self.slices.remove(name);
        }
        if !problems.is_empty() {
            self.problems.insert(key, problems);
        }
        match (service, self.world.services.get(name)) {
            (None, None) => false,
            (None, Some(_)) => self.world.services.remove(name).is_some(),
            (Some(mut new), old) => {
                // The order of slices says nothing.
                new.endpoints.sort();
                new.endpoints.dedup();
                let differs = old.is_none_or(|old| **old != new);
                if differs {
                    self.world.services.insert(name.to_owned(), Arc::new(new));
                }
                differs
            }
        }
    }

    fn update_nodes(&mut self, objects: &dyn Objects) {
        let mut ranges = BTreeSet::new();
        self.nodes.clear();
        self.of_nodes.clear();
        let own = match objects.get(&(Kind::Node, self.world.node.clone())).map(|found| &found.object) {
            Some(Object::Node(node)) => Some(node),
            _ => None,
        };
        self.listed = own.is_some();
        self.world.excluded = own.is_some_and(|node| node.metadata.labels.contains_key(EXCLUDED));
        self.world.evicting = own.is_some_and(|node| node.spec.taints.iter().any(evicts) || shuts_down(node));
        for (key, found) in objects.all(Kind::Node) {
            let Object::Node(node) = &found.object else { continue };
            let mut faults = Faults::new(key, found);
            for a in node.status.addresses.iter().filter(|a| a.r#type.ends_with("IP")) {
                match a.address.parse::<IpAddr>() {
                    Ok(addr) => drop(self.nodes.insert(addr)),
                    Err(_) => faults.add("status.addresses", format!("{:?} is no IP address", a.address), "correct it"),
                }
            }
            for range in node.spec.pod_cidrs.iter().flatten() {
                match range.parse::<IpNet>() {
                    Ok(net) => drop(ranges.insert(net.trunc())),
                    Err(_) => faults.add("spec.podCIDRs", format!("{range:?} is no CIDR"), "write it as 10.1.2.0/24"),
                }
            }
            self.of_nodes.append(&mut faults.problems);
        }
        self.world.pod_ranges = ranges;
        self.node_addresses();
    }

    /// Services of another class are never judged (D5), so an address that one shares with ours is a fault.
    fn contest(&self) -> Vec<Problem> {
        let mut others: BTreeMap<IpAddr, (&String, &Arc<Found>)> = BTreeMap::new();
        for (name, (addresses, found)) in &self.foreign {
            others.extend(addresses.iter().map(|addr| (*addr, (name, found))));
        }
        let mut out = Vec::new();
        for (ours, service) in self.world.services.iter().filter(|_| !others.is_empty()) {
            for (addr, (name, found)) in service.vips.iter().filter_map(|vip| Some((vip, others.get(vip)?))) {
                let mut faults = Faults::new(&(Kind::Service, (*name).clone()), found);
                let message = format!("{addr} also belongs to Service {ours}, which is ours and is served");
                faults.add("status.loadBalancer.ingress", message, "give one of them another address");
                out.append(&mut faults.problems);
            }
        }
        out
    }
}
