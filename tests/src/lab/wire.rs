//! Wires the lab: namespaces, links, addresses, routes.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Lab, Node, Pod, VIPS};
use crate::agent::Agent;
use crate::netns::Netns;
use crate::servers;

/// Ports that every pod serves.
pub const POD_PORTS: [u16; 2] = [8080, 9090];

/// The two nets of an uplink: `eth0` of node 1 is in 198.18.101.0/24, its `eth1` in 198.18.151.0/24.
/// The node has .2 in it, the router .1.
fn hop(node: u16, uplink: u16) -> (String, String) {
    let net = 100 + 50 * uplink + node;
    (format!("198.18.{net}."), format!("2001:db8:{net}::"))
}

/// The router's device of an uplink.
fn port(node: u16, uplink: u16) -> String {
    if uplink == 0 { format!("node{node}") } else { format!("node{node}-{uplink}") }
}

impl Lab {
    pub(super) fn wire(&mut self) -> Result<()> {
        forwarding(&self.router)?;
        link(&self.client, "eth0", &self.router, "client", self.options.offload)?;
        address(&self.client, "eth0", &["198.18.0.2/24", "2001:db8::2/64"])?;
        address(&self.router, "client", &["198.18.0.1/24", "2001:db8::1/64"])?;
        self.client.ip("route add default via 198.18.0.1")?;
        self.client.ip("-6 route add default via 2001:db8::1")?;
        if self.options.lan {
            self.router.ip("link add lan type bridge")?;
            self.router.ip("link set lan up")?;
            address(&self.router, "lan", &["198.18.50.1/24", "2001:db8:50::1/64"])?;
        }
        for number in 1..=self.options.nodes {
            let node = self.wire_node(number).with_context(|| format!("node{number}"))?;
            self.nodes.push(node);
        }
        if self.options.routed {
            return Ok(());
        }
        self.route_vips(&(1..=self.options.nodes).collect::<Vec<_>>())
    }

    fn wire_node(&self, n: u16) -> Result<Node> {
        let name = format!("node{n}");
        let netns = Netns::create(&format!("{}-{name}", self.prefix))?;
        forwarding(&netns)?;
        for uplink in 0..self.options.uplinks {
            self.wire_uplink(&netns, n, uplink)?;
        }
        let (hop4, hop6) = hop(n, 0);
        netns.ip(&format!("route add default via {hop4}1"))?;
        netns.ip(&format!("-6 route add default via {hop6}1"))?;
        if self.options.lan {
            self.wire_lan(&netns, n)?;
        }
        self.router.ip(&format!("route add 198.19.{n}.0/24 via {hop4}2"))?;
        self.router.ip(&format!("-6 route add 2001:db8:{}::/64 via {hop6}2", 200 + n))?;
        if self.options.routed {
            // As systemd sets it: the first address of a subnet does not take the others with it.
            netns.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
        } else {
            // PureLB's agent puts VIPs on a dummy device; an ifb is the same to the stack.
            netns.ip(&format!("link add kube-lb0 type {}", netns.vip_device()?))?;
            netns.ip("link set kube-lb0 up")?;
            address(&netns, "kube-lb0", &[&format!("{}/32", VIPS[0]), &format!("{}/128", VIPS[1])])?;
        }
        if self.options.nft {
            self.conntrack_rules(&netns)?;
        }
        let pods = (0..self.options.pods).map(|i| self.wire_pod(&netns, n, i)).collect::<Result<Vec<_>>>()?;
        let bpf_root = Path::new("/sys/fs/bpf").join(format!("{}-{name}", self.prefix));
        let mut agent = Agent::new(&netns, &name, &self.manifests(), bpf_root, self.folder.path());
        agent.add_args(&self.options.agent_args);
        if self.options.standalone {
            agent.allocate(&self.state());
        }
        let addresses = vec![format!("{hop4}2").parse()?, format!("{hop6}2").parse()?];
        Ok(Node { name, agent, netns, addresses, pods })
    }

    fn wire_uplink(&self, netns: &Netns, n: u16, uplink: u16) -> Result<()> {
        let (hop4, hop6) = hop(n, uplink);
        let (device, port) = (format!("eth{uplink}"), port(n, uplink));
        link(netns, &device, &self.router, &port, self.options.offload)?;
        address(netns, &device, &[&format!("{hop4}2/24"), &format!("{hop6}2/64")])?;
        address(&self.router, &port, &[&format!("{hop4}1/24"), &format!("{hop6}1/64")])
    }

    fn wire_lan(&self, netns: &Netns, n: u16) -> Result<()> {
        let port = format!("lan-{n}");
        link(netns, "lan0", &self.router, &port, self.options.offload)?;
        self.router.ip(&format!("link set {port} master lan"))?;
        address(netns, "lan0", &[&format!("198.18.50.{}/24", 10 + n), &format!("2001:db8:50::{:x}/64", 10 + n)])?;
        // As PureLB asks of operators: an address is answered for where it is.
        netns.sysctl("net.ipv4.conf.lan0.arp_ignore", "1")?;
        netns.sysctl("net.ipv4.conf.lan0.arp_announce", "2")?;
        netns.ip("route replace default via 198.18.50.1")?;
        netns.ip("-6 route replace default via 2001:db8:50::1")?;
        Ok(())
    }

    fn wire_pod(&self, node: &Netns, n: u16, i: u16) -> Result<Pod> {
        let name = format!("node{n}-pod{i}");
        let netns = Netns::create(&format!("{}-{name}", self.prefix))?;
        let device = format!("pod{i}");
        link(&netns, "eth0", node, &device, self.options.offload)?;
        let (pod4, pod6) = (format!("198.19.{n}.{}", 10 + i), format!("2001:db8:{}::{:x}", 200 + n, 10 + i));
        let gateway = format!("198.19.{n}.1");
        address(&netns, "eth0", &[&format!("{pod4}/32"), &format!("{pod6}/128")])?;
        address(node, &device, &[&format!("{gateway}/32"), "fe80::1/64"])?;
        netns.ip(&format!("route add {gateway} dev eth0 scope link"))?;
        netns.ip(&format!("route add default via {gateway}"))?;
        netns.ip("-6 route add default via fe80::1 dev eth0")?;
        node.ip(&format!("route add {pod4} dev {device}"))?;
        node.ip(&format!("-6 route add {pod6} dev {device}"))?;
        let servers = servers::start(&netns, &name, &POD_PORTS)?;
        Ok(Pod { name, netns, addresses: vec![pod4.parse()?, pod6.parse()?], servers })
    }

    /// Adds that uplink to a node of a running lab.
    pub fn add_uplink(&self, n: u16, uplink: u16) -> Result<()> {
        let node = self.nodes.get(usize::from(n) - 1).context("no such node")?;
        self.wire_uplink(&node.netns, n, uplink)
    }

    /// Gives a device back what it loses when it goes down: IPv6 addresses and the default routes through it.
    pub fn restore_uplink(&self, n: u16, uplink: u16, device: &str) -> Result<()> {
        let node = self.nodes.get(usize::from(n) - 1).context("no such node")?;
        let (_, hop6) = hop(n, uplink);
        node.netns.ip(&format!("address replace {hop6}2/64 dev {device} nodad"))?;
        self.router.ip(&format!("address replace {hop6}1/64 dev {} nodad", port(n, uplink)))?;
        self.router.ip(&format!("-6 route replace 2001:db8:{}::/64 via {}2", 200 + n, hop(n, 0).1))?;
        self.leave_by(n, uplink)
    }

    /// The router's addresses in the nets of a node's `eth0`.
    pub fn gateways(&self, node: &str) -> Result<Vec<IpAddr>> {
        let (hop4, hop6) = hop(node.strip_prefix("node").context("no node's name")?.parse()?, 0);
        Ok(vec![format!("{hop4}1").parse()?, format!("{hop6}1").parse()?])
    }

    /// Leads the VIPs to these nodes' `eth0`, by ECMP when there are several.
    pub fn route_vips(&self, nodes: &[u16]) -> Result<()> {
        let (mut hops4, mut hops6) = (String::new(), String::new());
        for n in nodes {
            let (hop4, hop6) = hop(*n, 0);
            write!(hops4, " nexthop via {hop4}2")?;
            write!(hops6, " nexthop via {hop6}2")?;
        }
        self.router.ip(&format!("route replace 203.0.113.0/24{hops4}"))?;
        self.router.ip(&format!("-6 route replace 2001:db8:ffff::/64{hops6}"))?;
        Ok(())
    }

    /// Requests for the VIPs reach node `n` by that uplink.
    pub fn arrive_by(&self, n: u16, uplink: u16) -> Result<()> {
        let (hop4, hop6) = hop(n, uplink);
        self.router.ip(&format!("route replace 203.0.113.0/24 via {hop4}2"))?;
        self.router.ip(&format!("-6 route replace 2001:db8:ffff::/64 via {hop6}2"))?;
        Ok(())
    }

    /// Replies leave node `n` by that uplink.
    pub fn leave_by(&self, n: u16, uplink: u16) -> Result<()> {
        let node = &self.nodes.get(usize::from(n) - 1).context("no such node")?.netns;
        let (hop4, hop6) = hop(n, uplink);
        node.ip(&format!("route replace default via {hop4}1"))?;
        node.ip(&format!("-6 route replace default via {hop6}1"))?;
        Ok(())
    }
}

fn link(a: &Netns, device: &str, b: &Netns, peer: &str, offload: bool) -> Result<()> {
    a.ip(&format!("link add {device} type veth peer name {peer} netns {}", b.name()))?;
    for (netns, device) in [(a, device), (b, peer)] {
        netns.ip(&format!("link set {device} up"))?;
        if !offload {
            netns.offload(device, false)?;
        }
    }
    Ok(())
}

fn address(netns: &Netns, device: &str, addresses: &[&str]) -> Result<()> {
    for address in addresses {
        // Without duplicate address detection, which takes a second.
        let nodad = if address.contains(':') { " nodad" } else { "" };
        netns.ip(&format!("address add {address} dev {device}{nodad}"))?;
    }
    Ok(())
}

/// Address of the API server in a lab; the router has .1.
pub const API: &str = "198.18.250.2";

impl Lab {
    /// Wires a control plane to the router.
    pub(super) fn wire_api(&self, api: &Netns) -> Result<()> {
        link(api, "eth0", &self.router, "api", true)?;
        address(api, "eth0", &[&format!("{API}/24")])?;
        address(&self.router, "api", &["198.18.250.1/24"])?;
        api.ip("route add default via 198.18.250.1")?;
        // By the node's own uplink, whatever becomes of a network that all share.
        (1..=self.options.nodes).try_for_each(|n| self.reach_api(n, true))
    }
}

impl Lab {
    /// The API server is in the reach of node `n`, or not any more.
    pub fn reach_api(&self, n: u16, reached: bool) -> Result<()> {
        let node = &self.nodes.get(usize::from(n) - 1).context("no such node")?.netns;
        let way = if reached { format!("{API} via {}1", hop(n, 0).0) } else { format!("blackhole {API}") };
        node.ip(&format!("route replace {way}")).map(drop)
    }
}

fn forwarding(netns: &Netns) -> Result<()> {
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "0"),
        ("net.ipv4.fib_multipath_hash_policy", "1"),
        ("net.ipv6.fib_multipath_hash_policy", "1"),
        // A device that is new or up again solicits at once, not after a second of duplicate detection.
        ("net.ipv6.conf.default.accept_dad", "0"),
    ] {
        netns.sysctl(key, value)?;
    }
    Ok(())
}
