//! What the cluster and the host say, as plain values. Sources fill it, the plan reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::announce::remote::RemoteRange;
use crate::announce::slots::Slot;

/// TCP or UDP; anything else a Service names is [`ServicePort::other_protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Protocol {
    /// 6
    Tcp,
    /// 17
    Udp,
}

/// Everything the plan may look at besides the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// This node's name.
    pub node: String,
    /// The listed Services of type LoadBalancer of our class, by `namespace/name`. A source hands out the same
    /// `Arc` again while nothing about a Service or its endpoints changed, which makes the comparison cheap.
    pub services: BTreeMap<String, Arc<Service>>,
    /// Addresses that are never judged: any `Node.status.addresses`, and the host's own.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Networks of the interfaces that local addresses go on: whatever lies in one of them is no remote address here.
    pub local_networks: BTreeSet<IpNet>,
    /// `Node.spec.podCIDRs` of all nodes: their traffic with pods is never taken for replies to clients.
    pub pod_ranges: BTreeSet<IpNet>,
    /// `LBNodeAgent.spec.datapath` of this node.
    pub datapath: Datapath,
    /// Local addresses that are on an interface still though nothing above says that they are any: the fence is for
    /// them until they are gone.
    pub leaving: BTreeSet<IpAddr>,
    /// How addresses are announced here; `None`: not at all.
    pub announcing: Option<Announcing>,
    /// The node is to have no local address: a label keeps load balancers away from it.
    pub excluded: bool,
    /// The node is being emptied for good (a taint that evicts): what it announces goes to others when the agent stops.
    pub evicting: bool,
    /// kube-proxy was found beside us: PASS is an answer (D13).
    pub kube_proxy: bool,
    /// The node already carries connections to its VIPs by kube-proxy: what is new in the tables begins with `prev = PASS` (4.2).
    pub live: bool,
    /// Something of the source could not be read since the start: what is not here may still be meant.
    pub unread: bool,
    /// No program hangs anywhere, as `datapath.mode: off` wants it: the tables serve nothing.
    pub detached: bool,
}

/// A Service with its addresses and endpoints (all slices of it already merged).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Where it was read, for people: `file:line` or empty.
    pub origin: String,
    /// `status.loadBalancer.ingress[].ip`.
    pub vips: BTreeSet<IpAddr>,
    /// The annotation `purelb.io/pool-type` is `remote`.
    pub remote: bool,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.externalTrafficPolicy: Local`.
    pub local_policy: bool,
    /// This node is preferred (annotation, trafficDistribution PreferSameNode), D13.
    pub prefer_local: bool,
    /// `spec.sessionAffinity: ClientIP`: its timeout in seconds.
    pub affinity: Option<u32>,
    /// `spec.loadBalancerSourceRanges`; empty: everybody.
    pub source_ranges: BTreeSet<IpNet>,
    /// Endpoints of all its EndpointSlices.
    pub endpoints: Vec<Endpoint>,
    /// Who says that it announces which of its addresses (`purelb.io/announcing-IPv4` and `-IPv6`).
    pub slots: Vec<Slot>,
    /// `purelb.io/node-affinity: service-endpoints`: a local address should be where endpoints are.
    pub follows_endpoints: bool,
    /// `purelb.io/allow-shared-ip`: other Services may have its addresses too.
    pub shared: bool,
    /// `purelb.io/skip-ipv6-dad: "true"`
    pub skip_dad: bool,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, may be empty; matched with the slice's port name.
    pub name: String,
    /// Host order.
    pub port: u16,
    /// `None`: a protocol that is not TCP or UDP (SCTP): passed.
    pub protocol: Option<Protocol>,
}

/// One endpoint address with one named port of a slice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Pod or node address.
    pub addr: IpAddr,
    /// Name of the Service port that this leads to.
    pub port_name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Target port, host order.
    pub port: u16,
    /// `nodeName`; `None`: not local.
    pub node: Option<String>,
    /// Its conditions.
    pub state: EndpointState,
    /// `conditions.serving` (while terminating it may still serve).
    pub serving: bool,
}

/// The three states an endpoint in a slice can have; a fourth, gone, is absence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// Takes new flows.
    Ready,
    /// Takes none; running TCP flows keep going, UDP decides anew.
    Unready,
    /// Keeps its flows; takes new ones only when nothing else is left and it serves.
    Terminating,
}

/// Kernel options of local addresses (PureLB's behaviour, 5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressOptions {
    /// Seconds until the kernel removes one that is not renewed; 0: never.
    pub valid: u32,
    /// Seconds until the node prefers another source address; 0: at once.
    pub preferred: u32,
    /// No route to the subnet comes with it.
    pub no_prefix_route: bool,
}

impl Default for AddressOptions {
    fn default() -> Self {
        Self { valid: 300, preferred: 300, no_prefix_route: true }
    }
}

/// Gratuitous ARP and unsolicited neighbour advertisements (5.7); times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garp {
    /// Before the first.
    pub delay: u64,
    /// How many.
    pub count: u32,
    /// Between two.
    pub interval: u64,
}

impl Default for Garp {
    fn default() -> Self {
        Self { delay: 0, count: 3, interval: 500 }
    }
}

/// `LBNodeAgent.spec.local`, defaults filled in, and the ranges of remote ServiceGroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcing {
    /// `localInterface`: `default`, or an expression that a part of an interface's name matches.
    pub interface: String,
    /// `interfaces`: more of them, by name.
    pub interfaces: Vec<String>,
    /// `dummyInterface`
    pub device: String,
    /// Ranges of remote ServiceGroups.
    pub remote: Vec<RemoteRange>,
    /// Options of local addresses.
    pub options: AddressOptions,
    /// Said when a local address comes; none: nothing is said.
    pub garp: Option<Garp>,
}

impl Default for Announcing {
    fn default() -> Self {
        let (interface, device) = ("default".to_owned(), "kube-lb0".to_owned());
        let (options, garp) = (AddressOptions::default(), Some(Garp::default()));
        Self { interface, interfaces: Vec::new(), device, remote: Vec::new(), options, garp }
    }
}

/// `LBNodeAgent.spec.datapath`, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Datapath {
    /// Names or regular expressions (`/…/`); empty: found by routes.
    pub interfaces: Vec<String>,
    /// `auto`, `xdp`, `xdp-generic`, `tcx`.
    pub hook: Hook,
    /// `Off` hands everything back to kube-proxy, then detaches; the rest is stack mode for now.
    pub mode: Mode,
    /// Ports of a VIP that no Service has are passed instead of dropped.
    pub unknown_ports_pass: bool,
    /// `clusterTraffic`; `None`: PreferLocal without kube-proxy, KubeProxy with it.
    pub prefer_local: Option<bool>,
}

/// Which hook an uplink gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// Native XDP where it is right, else tcx (D15).
    #[default]
    Auto,
    /// Native XDP or a problem.
    Xdp,
    /// Generic XDP.
    XdpGeneric,
    /// tcx ingress.
    Tcx,
}

/// `datapath.mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Stack mode for now.
    #[default]
    Auto,
    /// Into normal forwarding.
    Stack,
    /// Later; treated as stack and reported.
    Fast,
    /// No programs on the uplinks, once what runs through them has ended.
    Off,
}

impl Default for Datapath {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            hook: Hook::Auto,
            mode: Mode::Auto,
            unknown_ports_pass: false,
            prefer_local: None,
        }
    }
}
