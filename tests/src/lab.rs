//! Client - router - nodes - pods, dual-stack, out of namespaces; taken down on drop, on Ctrl-C, or by the next lab.
//!
//! Client 198.18.0.2, router .1; node N (from 1) at 198.18.(100+N).2, its pods at 198.19.N.(10+i).
//! IPv6 alike: 2001:db8::2, 2001:db8:(100+N)::2, 2001:db8:(200+N)::(10+i). VIPs 203.0.113.0/24 and 2001:db8:ffff::/64.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::Agent;
use crate::manifests::{self, Endpoint, Port, Service};
use crate::netns::{self, Netns, PREFIX};
use crate::servers::{self, Servers};
use crate::sys;

/// First VIP of each family.
pub const VIPS: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];
/// Ports that every pod serves.
pub const POD_PORTS: [u16; 2] = [8080, 9090];

/// What the lab looks like.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: u16,
    /// How many pods on each.
    pub pods: u16,
    /// `LBNodeAgent.spec.datapath.hook`
    pub hook: String,
    /// nftables rules as kube-proxy has them: conntrack, `ct state invalid drop`.
    pub nft: bool,
    /// Leaves transmit checksum offload on, so packets on the links carry partial checksums.
    pub offload: bool,
    /// Prints the agents' logs when the lab goes: the test harness shows them only if the test failed.
    pub logs: bool,
}

impl Options {
    /// One node with three pods.
    #[must_use]
    pub fn new(hook: &str) -> Self {
        Self { nodes: 1, pods: 3, hook: hook.to_owned(), nft: false, offload: false, logs: true }
    }

    /// The same with kube-proxy-shaped rules or without.
    #[must_use]
    pub fn nft(mut self, nft: bool) -> Self {
        self.nft = nft;
        self
    }
}

/// A pod: its namespace, addresses and servers.
#[derive(Debug)]
pub struct Pod {
    /// Its name, which its servers say.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// IPv4 and IPv6.
    pub addresses: Vec<IpAddr>,
    servers: Servers,
}

/// A node: its namespace, pods and agent. (The agent ends first.)
#[derive(Debug)]
pub struct Node {
    /// `node1`, …
    pub name: String,
    /// Its agent.
    pub agent: Agent,
    /// Its namespace.
    pub netns: Netns,
    /// IPv4 and IPv6.
    pub addresses: Vec<IpAddr>,
    /// Its pods.
    pub pods: Vec<Pod>,
}

/// All of it.
#[derive(Debug)]
pub struct Lab {
    /// `nodes[0]` is `node1`.
    pub nodes: Vec<Node>,
    /// Where clients are.
    pub client: Netns,
    /// Between client and nodes.
    pub router: Netns,
    options: Options,
    prefix: String,
    folder: TempDir,
}

impl Lab {
    /// Builds everything, writes Node and LBNodeAgent, starts the agents and waits until they are ready.
    pub fn start(options: Options) -> Result<Self> {
        let mut lab = Self::build(options)?;
        lab.write_base()?;
        for node in &mut lab.nodes {
            node.agent.start()?;
        }
        for node in &mut lab.nodes {
            node.agent.wait_ready()?;
        }
        Ok(lab)
    }

    /// Builds everything but leaves the folder of manifests empty and the agents stopped.
    pub fn build(options: Options) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        tear_down_on_signal();
        netns::remove_leftovers(None);
        if !std::fs::read_to_string("/proc/mounts")?.contains(" /sys/fs/bpf ") {
            sys::run("mount -t bpf bpf /sys/fs/bpf")?;
        }
        let prefix = format!("{PREFIX}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = TempDir::with_prefix(format!("{prefix}-"))?;
        std::fs::create_dir(folder.path().join("manifests"))?;
        let client = Netns::create(&format!("{prefix}-client"))?;
        let router = Netns::create(&format!("{prefix}-router"))?;
        let mut lab = Self { nodes: Vec::new(), client, router, options, prefix, folder };
        lab.wire().context("build the lab")?;
        Ok(lab)
    }

    fn wire(&mut self) -> Result<()> {
        forwarding(&self.router)?;
        link(&self.client, "eth0", &self.router, "client", self.options.offload)?;
        address(&self.client, "eth0", &["198.18.0.2/24", "2001:db8::2/64"])?;
        address(&self.router, "client", &["198.18.0.1/24", "2001:db8::1/64"])?;
        self.client.ip("route add default via 198.18.0.1")?;
        self.client.ip("-6 route add default via 2001:db8::1")?;
        for number in 1..=self.options.nodes {
            let node = self.wire_node(number).with_context(|| format!("node{number}"))?;
            self.nodes.push(node);
        }
        self.route_vips(&(1..=self.options.nodes).collect::<Vec<_>>())
    }

    fn wire_node(&self, n: u16) -> Result<Node> {
        let netns = Netns::create(&format!("{}-node{n}", self.prefix))?;
        forwarding(&netns)?;
        let port = format!("node{n}");
        link(&netns, "eth0", &self.router, &port, self.options.offload)?;
        let (hop4, hop6) = (format!("198.18.{}.", 100 + n), format!("2001:db8:{}::", 100 + n));
        address(&netns, "eth0", &[&format!("{hop4}2/24"), &format!("{hop6}2/64")])?;
        address(&self.router, &port, &[&format!("{hop4}1/24"), &format!("{hop6}1/64")])?;
        netns.ip(&format!("route add default via {hop4}1"))?;
        netns.ip(&format!("-6 route add default via {hop6}1"))?;
        self.router.ip(&format!("route add 198.19.{n}.0/24 via {hop4}2"))?;
        self.router.ip(&format!("-6 route add 2001:db8:{}::/64 via {hop6}2", 200 + n))?;
        // PureLB's agent puts VIPs on a dummy device; an ifb is the same to the stack and always built in.
        netns.ip("link add kube-lb0 type ifb")?;
        netns.ip("link set kube-lb0 up")?;
        address(&netns, "kube-lb0", &[&format!("{}/32", VIPS[0]), &format!("{}/128", VIPS[1])])?;
        if self.options.nft {
            netns.exec(&format!("nft -f {}", self.nft_rules()?.display()))?;
        }
        let name = format!("node{n}");
        let pods = (0..self.options.pods).map(|i| self.wire_pod(&netns, n, i)).collect::<Result<Vec<_>>>()?;
        let bpf_root = Path::new("/sys/fs/bpf").join(format!("{}-{name}", self.prefix));
        let agent = Agent::new(&netns, &name, &self.manifests(), bpf_root, self.folder.path());
        let addresses = vec![format!("{hop4}2").parse()?, format!("{hop6}2").parse()?];
        Ok(Node { name, agent, netns, addresses, pods })
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

    fn nft_rules(&self) -> Result<PathBuf> {
        let path = self.folder.path().join("rules.nft");
        std::fs::write(&path, NFT_RULES)?;
        Ok(path)
    }

    /// Leads the VIPs to these nodes, by ECMP when there are several.
    pub fn route_vips(&self, nodes: &[u16]) -> Result<()> {
        let (mut hops4, mut hops6) = (String::new(), String::new());
        for n in nodes {
            write!(hops4, " nexthop via 198.18.{}.2", 100 + n)?;
            write!(hops6, " nexthop via 2001:db8:{}::2", 100 + n)?;
        }
        self.router.ip(&format!("route replace 203.0.113.0/24{hops4}"))?;
        self.router.ip(&format!("-6 route replace 2001:db8:ffff::/64{hops6}"))?;
        Ok(())
    }

    /// The folder that the agents read.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.folder.path().join("manifests")
    }

    /// Writes a file of the folder as Kubernetes-minded tools do: beside it, then renamed.
    pub fn write(&self, file: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let beside = self.folder.path().join("being-written");
        std::fs::write(&beside, content)?;
        std::fs::rename(&beside, self.manifests().join(file)).context("rename a manifest")
    }

    /// Writes objects as one YAML file of several documents.
    pub fn write_objects(&self, file: &str, objects: &[Value]) -> Result<String> {
        let mut text = String::new();
        for object in objects {
            write!(text, "---\n{}", serde_yaml_ng::to_string(object)?)?;
        }
        self.write(file, &text)?;
        Ok(text)
    }

    /// Writes the Nodes and the LBNodeAgent.
    pub fn write_base(&self) -> Result<()> {
        let nodes: Vec<_> = self.nodes.iter().map(|node| manifests::node(&node.name, &node.addresses)).collect();
        self.write_objects("nodes.yaml", &nodes)?;
        self.write_objects("lbnodeagent.yaml", &[manifests::node_agent(&["eth0"], &self.options.hook)])?;
        Ok(())
    }

    /// A Service at the first VIPs: TCP and UDP 80 to 8080, all pods ready.
    pub fn web(&self) -> Result<Service> {
        let vips = VIPS.iter().map(|vip| vip.parse().context("VIP")).collect::<Result<Vec<_>>>()?;
        let ports = vec![Port::new("http", 80, 8080, "TCP"), Port::new("dns", 80, 8080, "UDP")];
        let endpoints = self.nodes.iter().flat_map(|node| node.pods.iter().map(|pod| endpoint(node, pod))).collect();
        Ok(Service { name: "web".to_owned(), vips, ports, endpoints, local: true, affinity: false, ranges: Vec::new() })
    }

    /// Writes a Service with its slices in one file and waits until every agent has its endpoints.
    pub fn apply(&self, service: &Service) -> Result<String> {
        let mut objects = vec![service.service()];
        objects.extend(service.slices());
        let text = self.write_objects(&format!("{}.yaml", service.name), &objects)?;
        self.wait_programmed(service)?;
        Ok(text)
    }

    /// Waits until every agent shows the Service's local endpoints with their states.
    pub fn wait_programmed(&self, service: &Service) -> Result<()> {
        for node in &self.nodes {
            for vip in &service.vips {
                for port in &service.ports {
                    let wanted = wanted(service, &node.name, vip);
                    let what = format!("{} {vip}:{} at {} has {wanted:?}", service.name, port.port, node.name);
                    let result = sys::wait_for(&what, Duration::from_secs(10), || {
                        let found = node.agent.endpoints(&vip.to_string(), port.port)?;
                        let found: Vec<_> = found.into_iter().filter(|(_, state)| state != "gone").collect();
                        anyhow::ensure!(found == wanted, "it has {found:?}");
                        Ok(true)
                    });
                    result.with_context(|| node.agent.log_tail())?;
                }
            }
        }
        Ok(())
    }

    /// Both families of the first VIP at that port.
    pub fn targets(&self, port: u16) -> Result<Vec<SocketAddr>> {
        VIPS.iter().map(|vip| Ok(SocketAddr::new(vip.parse()?, port))).collect()
    }

    /// What every agent wrote last; for a failed test.
    #[must_use]
    pub fn logs(&self) -> String {
        self.nodes.iter().fold(String::new(), |mut all, node| {
            all.push_str(&format!("--- log of {} ---\n{}\n", node.name, node.agent.log_tail()));
            all
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.options.logs {
            eprintln!("{}", self.logs());
        }
        for node in self.nodes.drain(..) {
            let root = node.agent.bpf_root().to_owned();
            drop(node.agent);
            let status =
                format!("/run/purelb-agent/{}.json", root.display().to_string().trim_matches('/').replace('/', "-"));
            drop(std::fs::remove_file(status));
            drop(std::fs::remove_dir_all(root));
            for pod in node.pods {
                drop(pod.servers);
                pod.netns.remove();
            }
            node.netns.remove();
        }
        self.router.remove();
        self.client.remove();
        // A lab whose building failed half-way has namespaces that nobody names.
        for line in sys::run("ip netns list").unwrap_or_default().lines() {
            if let Some(name) =
                line.split_whitespace().next().filter(|name| name.starts_with(&format!("{}-", self.prefix)))
            {
                drop(sys::run(&format!("ip netns del {name}")));
            }
        }
    }
}

/// A pod as a ready endpoint.
#[must_use]
pub fn endpoint(node: &Node, pod: &Pod) -> Endpoint {
    Endpoint {
        pod: pod.name.clone(),
        addresses: pod.addresses.clone(),
        node: node.name.clone(),
        ready: true,
        serving: true,
        terminating: false,
    }
}

fn wanted(service: &Service, node: &str, vip: &IpAddr) -> Vec<(String, String)> {
    let mut wanted: Vec<_> = service
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.node == node)
        .filter_map(|endpoint| {
            let addr = endpoint.addresses.iter().find(|addr| addr.is_ipv4() == vip.is_ipv4())?;
            let state = match (endpoint.terminating, endpoint.ready) {
                (true, _) => "terminating",
                (false, true) => "ready",
                (false, false) => "unready",
            };
            Some((addr.to_string(), state.to_owned()))
        })
        .collect();
    wanted.sort();
    wanted
}

fn link(a: &Netns, device: &str, b: &Netns, peer: &str, offload: bool) -> Result<()> {
    a.ip(&format!("link add {device} type veth peer name {peer} netns {}", b.name()))?;
    for (netns, device) in [(a, device), (b, peer)] {
        netns.ip(&format!("link set {device} up"))?;
        if !offload {
            netns.exec(&format!("ethtool -K {device} tx off"))?;
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

fn forwarding(netns: &Netns) -> Result<()> {
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "0"),
        ("net.ipv4.fib_multipath_hash_policy", "1"),
        ("net.ipv6.fib_multipath_hash_policy", "1"),
    ] {
        netns.sysctl(key, value)?;
    }
    Ok(())
}

/// Ctrl-C and SIGTERM take down all labs of this process before it ends.
fn tear_down_on_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let mut terminate = signal(SignalKind::terminate())?;
                tokio::select! { _ = tokio::signal::ctrl_c() => {}, _ = terminate.recv() => {} }
                anyhow::Ok(())
            })?;
            netns::remove_leftovers(Some(std::process::id()));
            std::process::exit(130);
        });
    });
}

/// The shape of kube-proxy's rules: what is invalid to conntrack is dropped, the rest of the forward chain accepts.
const NFT_RULES: &str = "
table inet kube-proxy {
  chain filter-forward {
    type filter hook forward priority 0; policy accept;
    ct state invalid drop
    ct state new,established,related accept
  }
  chain filter-input {
    type filter hook input priority 0; policy accept;
    ct state invalid drop
  }
}
";
