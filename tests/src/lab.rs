//! Client - router - nodes - pods, dual-stack, out of namespaces; taken down on drop, on Ctrl-C, or by the next lab.
//!
//! Client 198.18.0.2, router .1; node N (from 1) at 198.18.(100+N).2, its pods at 198.19.N.(10+i).
//! IPv6 alike: 2001:db8::2, 2001:db8:(100+N)::2, 2001:db8:(200+N)::(10+i). VIPs 203.0.113.0/24 and 2001:db8:ffff::/64.
//! With a network that all share: 198.18.50.(10+N), 2001:db8:50::(10+N), the router .1 and ::1 at its device `lan`.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{self, Agent};
use crate::cluster::Cluster;
use crate::cluster::proxy::Proxy;
use crate::leftovers::{self, Owner};
use crate::manifests::{self, Endpoint, Port, Service};
use crate::netns::Netns;
use crate::servers::Servers;
use crate::sys;

pub mod kube;
pub mod kube_proxy;
mod rules;
mod wire;

pub use wire::POD_PORTS;

/// First VIP of each family.
pub const VIPS: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];

/// What the lab looks like.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: u16,
    /// How many pods on each.
    pub pods: u16,
    /// How many uplinks a node has, 1 or 2: `eth0`, `eth1`.
    pub uplinks: u16,
    /// `LBNodeAgent.spec.datapath.interfaces`
    pub interfaces: Vec<String>,
    /// `LBNodeAgent.spec.datapath.hook`
    pub hook: String,
    /// nftables rules as kube-proxy has them: conntrack, `ct state invalid drop`.
    pub nft: bool,
    /// Leaves transmit checksum offload on, so packets on the links carry partial checksums.
    pub offload: bool,
    /// The agents are `standalone`: they give addresses too, from a ServiceGroup that begins with the first VIPs.
    pub standalone: bool,
    /// The nodes share a network with the router too, by their device `lan0`, which has their default route then.
    pub lan: bool,
    /// Routing daemons will lead VIPs to the nodes: no route of the lab does, and no device has any of them.
    pub routed: bool,
    /// On a cluster: the real kube-proxy runs on every node, in that mode.
    pub kube_proxy: Option<&'static str>,
    /// On a cluster: a proxy of its own is between each agent and the API server.
    pub proxied: bool,
    /// Further arguments of the agents.
    pub agent_args: Vec<&'static str>,
    /// Prints the agents' logs when the lab goes: the test harness shows them only if the test failed.
    pub logs: bool,
}

impl Options {
    /// One node with one uplink and three pods. Offload is on where the hook can cope with it, as it is
    /// on a veth by default: XDP can not (D15).
    #[must_use]
    pub fn new(hook: &str) -> Self {
        Self {
            nodes: 1,
            pods: 3,
            uplinks: 1,
            interfaces: vec!["eth0".to_owned()],
            hook: hook.to_owned(),
            nft: false,
            offload: !hook.starts_with("xdp"),
            standalone: false,
            lan: false,
            routed: false,
            kube_proxy: None,
            proxied: false,
            agent_args: Vec::new(),
            logs: true,
        }
    }

    /// The same with kube-proxy-shaped rules or without.
    #[must_use]
    pub fn nft(self, nft: bool) -> Self {
        Self { nft, ..self }
    }

    /// The same with that many pods a node.
    #[must_use]
    pub fn pods(self, pods: u16) -> Self {
        Self { pods, ..self }
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
    /// Its servers, which end when this is replaced or dropped.
    pub servers: Servers,
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
    /// kube-proxy of each node, where the lab has any.
    pub kube_proxies: Vec<kube_proxy::KubeProxy>,
    /// Before the API server, one for each agent, where the lab has any.
    pub proxies: Vec<Proxy>,
    /// The control plane, where the agents read one.
    pub cluster: Option<Cluster>,
    options: Options,
    prefix: String,
    folder: TempDir,
}

impl Lab {
    /// Builds everything, writes Node and LBNodeAgent, starts the agents and waits until they are ready.
    pub fn start(options: Options) -> Result<Self> {
        let mut lab = Self::build(options)?;
        lab.run()?;
        Ok(lab)
    }

    /// Writes Node and LBNodeAgent, starts the agents of a built lab and waits until they are ready.
    pub fn run(&mut self) -> Result<()> {
        self.write_base()?;
        for node in &mut self.nodes {
            node.agent.start()?;
        }
        self.nodes.iter_mut().try_for_each(|node| node.agent.wait_ready())
    }

    /// A lab that serves [`Lab::web`], programmed at every node.
    pub fn serving(options: Options) -> Result<(Self, Service)> {
        let lab = Self::start(options)?;
        let web = lab.web()?;
        lab.apply(&web)?;
        Ok((lab, web))
    }

    /// Builds everything but leaves the folder of manifests empty and the agents stopped.
    pub fn build(options: Options) -> Result<Self> {
        tear_down_on_signal();
        leftovers::remove(Owner::Dead);
        if !std::fs::read_to_string("/proc/mounts")?.contains(" /sys/fs/bpf ") {
            sys::run("mount -t bpf bpf /sys/fs/bpf")?;
        }
        let prefix = leftovers::next_prefix()?;
        let folder = TempDir::with_prefix(format!("{prefix}-"))?;
        std::fs::create_dir(folder.path().join("manifests"))?;
        let client = Netns::create(&format!("{prefix}-client"))?;
        let router = Netns::create(&format!("{prefix}-router"))?;
        let (nodes, kube_proxies, proxies) = (Vec::new(), Vec::new(), Vec::new());
        let mut lab = Self { nodes, client, router, kube_proxies, proxies, cluster: None, options, prefix, folder };
        lab.wire().context("build the lab")?;
        Ok(lab)
    }

    /// The hook that was asked for.
    #[must_use]
    pub fn hook(&self) -> &str {
        &self.options.hook
    }

    /// For files of what runs in it; it goes with the lab.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
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

    /// Where agents that are `standalone` write what they give.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Writes the Nodes and the LBNodeAgent.
    pub fn write_base(&self) -> Result<()> {
        let nodes: Vec<_> = self.nodes.iter().map(|node| manifests::node(&node.name, &node.addresses)).collect();
        self.write_objects("nodes.yaml", &nodes)?;
        if self.options.standalone {
            let group = manifests::service_group("203.0.113.1-203.0.113.9", "2001:db8:ffff::1-2001:db8:ffff::9");
            self.write_objects("group.yaml", &[group])?;
        }
        let interfaces: Vec<_> = self.options.interfaces.iter().map(String::as_str).collect();
        self.set_datapath(&interfaces, &self.options.hook)
    }

    /// Writes the LBNodeAgent anew.
    pub fn set_datapath(&self, interfaces: &[&str], hook: &str) -> Result<()> {
        self.write_objects("lbnodeagent.yaml", &[manifests::node_agent(interfaces, hook)]).map(drop)
    }

    /// A Service at the first VIPs: TCP and UDP 80 to 8080, all pods ready.
    pub fn web(&self) -> Result<Service> {
        let vips = VIPS.iter().map(|vip| vip.parse().context("VIP")).collect::<Result<Vec<_>>>()?;
        let ports = vec![Port::new("http", 80, 8080, "TCP"), Port::new("dns", 80, 8080, "UDP")];
        let endpoints = self.nodes.iter().flat_map(|node| node.pods.iter().map(|pod| endpoint(node, pod))).collect();
        let (name, ranges) = ("web".to_owned(), Vec::new());
        Ok(Service { name, vips, ports, endpoints, local: true, affinity: false, ranges, group: None, sharing: None })
    }

    /// Writes a Service with its slices in one file and waits until every agent has its endpoints.
    pub fn apply(&self, service: &Service) -> Result<String> {
        let text = self.place(service)?;
        self.wait_programmed(service)?;
        Ok(text)
    }

    /// Only writes it.
    pub fn place(&self, service: &Service) -> Result<String> {
        let mut object = service.service();
        if let (true, Some(fields)) = (self.options.standalone, object.as_object_mut()) {
            fields.remove("status");
        }
        let mut objects = vec![object];
        objects.extend(service.slices());
        self.write_objects(&format!("{}.yaml", service.name), &objects)
    }

    /// Waits until every agent shows the Service's local endpoints with their states.
    pub fn wait_programmed(&self, service: &Service) -> Result<()> {
        for node in &self.nodes {
            let what = format!("{} has the endpoints of {}", node.name, service.name);
            let result = sys::wait_for(&what, Duration::from_secs(60), || {
                let all = node.agent.query(&["services"])?;
                for vip in &service.vips {
                    let wanted = wanted(service, &node.name, vip);
                    for port in &service.ports {
                        let mut found = agent::endpoints(&all, &vip.to_string(), port.port)?;
                        found.retain(|(_, state)| state != "gone");
                        anyhow::ensure!(found == wanted, "{vip}:{} has {found:?}, not {wanted:?}", port.port);
                    }
                }
                Ok(true)
            });
            result.with_context(|| node.agent.log_tail())?;
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
        // Agents, servers and kube-proxies end before what they stand on goes.
        self.nodes.clear();
        self.kube_proxies.clear();
        leftovers::remove(Owner::Lab(&self.prefix));
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

/// Ctrl-C and SIGTERM take down all labs of this process before it ends.
pub fn tear_down_on_signal() {
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
            leftovers::remove(Owner::This);
            std::process::exit(130);
        });
    });
}
