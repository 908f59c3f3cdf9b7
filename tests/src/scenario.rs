//! Three nodes on a real API server beside the real kube-proxy, with a remote group that the router leads to all nodes and
//! a local one in their common network; three Services of the same pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::clients::{self, Conn};
use crate::cluster::Client;
use crate::cluster::tenant::{Allocator, INSTALL};
use crate::lab::kube::{NAMESPACE, set_ready};
use crate::lab::{Lab, Options};
use crate::load::LongLived;
use crate::manifests::remote_group;
use crate::netns::Netns;
use crate::routing::arrivals::Arrivals;
use crate::routing::watch::Watch;
use crate::sys;

/// kube-proxy and agents on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(20);
/// Agents that are silent for so long have tables that count as stale.
pub const HEARTBEAT: &str = "10s";

/// A Service and its addresses.
#[derive(Debug)]
pub struct Served {
    /// Its name.
    pub name: &'static str,
    /// Of both families.
    pub vips: Vec<IpAddr>,
}

/// All of it.
#[derive(Debug)]
pub struct Scene {
    /// The lab.
    pub lab: Lab,
    /// All rights.
    pub admin: Client,
    _allocator: Allocator,
    /// The router's routes.
    pub watch: Watch,
    /// Remote, policy Cluster.
    pub cluster: Served,
    /// Remote, policy Local.
    pub local: Served,
    /// In the nodes' own network, policy Cluster.
    pub near: Served,
}

impl Scene {
    /// Beside kube-proxy in that mode, with programs at that hook.
    pub fn new(mode: &'static str, hook: &str) -> Result<Self> {
        let begin = Instant::now();
        let options = Options {
            nodes: 3,
            // The third one of a node comes later.
            pods: 3,
            lan: true,
            routed: true,
            interfaces: vec!["eth0".to_owned(), "lan0".to_owned()],
            kube_proxy: Some(mode),
            agent_args: vec!["--heartbeat", HEARTBEAT, "--lease-duration", "6s"],
            ..Options::new(hook)
        };
        let (lab, admin, allocator) = Lab::on_cluster(options)?;
        lab.route_vips(&[1, 2, 3])?;
        let group = remote_group(
            "far",
            ["203.0.113.64/28", "203.0.113.0/24", "/32"],
            ["2001:db8:ffff::40/124", "2001:db8:ffff::/64", "/128"],
        );
        admin.apply(&group)?;
        admin.patch("LBNodeAgent", INSTALL, "default", &json!({"spec": {"local": {"dummyInterface": "kube-lb0"}}}))?;
        let make = |name: &'static str, group: &str, policy: &str| -> Result<Served> {
            let spec = json!({
                "externalTrafficPolicy": policy, "allocateLoadBalancerNodePorts": true, "selector": {"app": "web"},
            });
            Ok(Served { name, vips: lab.service_of(&admin, name, group, spec)? })
        };
        let cluster = make("cluster", "far", "Cluster")?;
        let local = make("local", "far", "Local")?;
        let near = make("near", "default", "Cluster")?;
        let watch = Watch::start(&lab.router)?;
        println!("control plane, three kube-proxies, agents and Services after {:.1?}", begin.elapsed());
        Ok(Self { lab, admin, _allocator: allocator, watch, cluster, local, near })
    }

    /// All agents run, two pods of each node are ready, kube-proxy has what has the policy Cluster.
    pub fn restore(&mut self) -> Result<()> {
        if self.lab.kube_proxies.is_empty() {
            self.lab.restart_kube_proxies()?;
        }
        self.traffic(None)?;
        for node in self.lab.nodes.iter_mut().filter(|node| node.agent.pid().is_none()) {
            node.agent.start()?;
        }
        (0..3).try_for_each(|node| self.wait_agent(node))?;
        self.ready(&[0, 1])?;
        for n in 0..3 {
            self.wait_endpoints(n, &self.local, &[0, 1])?;
        }
        for to in targets(&[&self.cluster, &self.near]) {
            self.meets(&self.lab.client, to, &self.pods(None, &[0, 1]))?;
        }
        // The router goes on sending to a neighbour that it knows.
        for ip in &self.near.vips {
            sys::wait_for(&format!("one node has {ip}"), SOON, || Ok(self.having("lan0", *ip).len() == 1))?;
        }
        Ok(())
    }

    /// Waits until the agent of a node is ready. For a moment after the start `status` has only what the last one left.
    pub fn wait_agent(&mut self, node: usize) -> Result<()> {
        let agent = &mut self.lab.nodes[node].agent;
        agent.wait_ready()?;
        sys::wait_for(&format!("node{} says so itself", node + 1), SOON, || {
            let (code, missing) = agent.page("/readyz")?;
            ensure!(code == 200, "{missing}");
            Ok(true)
        })
    }

    /// `LBNodeAgent.spec.datapath.clusterTraffic`, or what agents find by themselves.
    pub fn traffic(&self, to: Option<&str>) -> Result<()> {
        let patch = json!({"spec": {"datapath": {"clusterTraffic": to}}});
        self.admin.patch("LBNodeAgent", INSTALL, "default", &patch).map(drop)
    }

    /// These pods of every node are ready, the others are not.
    pub fn ready(&self, pods: &[usize]) -> Result<()> {
        for (n, node) in self.lab.nodes.iter().enumerate() {
            for (index, pod) in node.pods.iter().enumerate() {
                let wanted = pods.contains(&index);
                if self.admin.get("Pod", NAMESPACE, &pod.name).is_ok() {
                    set_ready(&self.admin, &pod.name, &pod.addresses, wanted)?;
                } else if wanted {
                    self.lab.pod(&self.admin, n, index, "web", true)?;
                }
            }
        }
        Ok(())
    }

    /// Names of these pods of one node or all.
    #[must_use]
    pub fn pods(&self, node: Option<usize>, of: &[usize]) -> BTreeSet<String> {
        let nodes = self.lab.nodes.iter().enumerate().filter(|(n, _)| node.is_none_or(|node| node == *n));
        nodes.flat_map(|(_, node)| of.iter().map(|index| node.pods[*index].name.clone())).collect()
    }

    /// Waits until the programs of a node give new connections of a Service to these pods of it.
    pub fn wait_endpoints(&self, node: usize, of: &Served, pods: &[usize]) -> Result<()> {
        let node = &self.lab.nodes[node];
        for vip in &of.vips {
            let own = |index: &usize| node.pods[*index].addresses.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4());
            let wanted: BTreeSet<_> = pods.iter().filter_map(own).map(ToString::to_string).collect();
            sys::wait_for(&format!("{} has {wanted:?} for {}", node.name, of.name), SOON, || {
                let found = node.agent.endpoints(&vip.to_string(), 80)?;
                let ready = found.iter().filter(|(_, state)| state == "ready").map(|(ip, _)| ip.clone());
                ensure!(ready.collect::<BTreeSet<_>>() == wanted, "it has {found:?}");
                Ok(true)
            })?;
        }
        Ok(())
    }

    /// Waits until new connections from there meet exactly these pods: whom each of them saw.
    pub fn meets(&self, from: &Netns, to: SocketAddr, wanted: &BTreeSet<String>) -> Result<BTreeSet<IpAddr>> {
        let mut peers = BTreeSet::new();
        sys::wait_for(&format!("{} meets {wanted:?} at {to}", from.name()), SOON, || {
            let mut found = BTreeMap::new();
            peers.clear();
            for _ in 0..wanted.len() * 8 {
                let mut conn = Conn::open_within(from, clients::any(to), to, Duration::from_secs(2))?;
                *found.entry(conn.ask("NAME")?).or_insert(0) += 1;
                peers.insert(conn.ask("PEER")?.parse()?);
            }
            ensure!(found.keys().eq(wanted), "it met {found:?}");
            Ok(true)
        })?;
        Ok(peers)
    }

    /// The client meets exactly these pods, which see the client itself.
    pub fn meets_itself(&self, to: SocketAddr, wanted: &BTreeSet<String>) -> Result<()> {
        let seen = self.meets(&self.lab.client, to, wanted)?;
        let own: [IpAddr; 2] = ["198.18.0.2".parse()?, "2001:db8::2".parse()?];
        ensure!(seen.iter().all(|ip| own.contains(ip)), "{to}: the pods see {seen:?}");
        Ok(())
    }

    /// Does it, and says how many packets the programs of each node brought to endpoints of a Service meanwhile.
    pub fn counted(&self, of: &Served, work: impl FnOnce() -> Result<()>) -> Result<Vec<u64>> {
        let count = || (0..3).map(|node| self.lab.nodes[node].agent.packets(&of.vips)).collect::<Result<Vec<_>>>();
        let before = count()?;
        work()?;
        Ok(count()?.iter().zip(before).map(|(after, before)| after - before).collect())
    }

    /// At whichever node the client comes in, that one's pods serve it through its programs, and see the client itself.
    pub fn pods_of_the_node(&self, of: &Served) -> Result<()> {
        for n in 0..3_u16 {
            let node = usize::from(n);
            self.lab.route_vips(&[n + 1])?;
            let seen = self.counted(of, || {
                targets(&[of]).into_iter().try_for_each(|to| {
                    self.meets_itself(to, &self.pods(Some(node), &[0, 1]))?;
                    clients::udp(&self.lab.client, to, 200).map(drop)
                })
            })?;
            println!("{}: in by node{}, packets by node through XDP: {seen:?}", of.name, n + 1);
            let others: u64 = seen.iter().sum::<u64>() - seen[node];
            ensure!(seen[node] >= 40 && others == 0, "{}: through XDP went {seen:?}", of.name);
        }
        self.lab.route_vips(&[1, 2, 3])
    }

    /// At whichever node the client comes in, pods of all nodes serve it by kube-proxy; the programs bring nothing.
    pub fn pods_of_all_nodes(&self, of: &Served, programs: bool) -> Result<()> {
        for n in 1..=3 {
            self.lab.route_vips(&[n])?;
            let agent = &self.lab.nodes[usize::from(n) - 1].agent;
            let before = if programs { agent.packets(&of.vips)? } else { 0 };
            for to in targets(&[of]) {
                self.meets(&self.lab.client, to, &self.pods(None, &[0, 1]))?;
                clients::udp(&self.lab.client, to, 200)?;
            }
            let after = if programs { agent.packets(&of.vips)? } else { 0 };
            ensure!(before == after, "{}: {} packets went through XDP", of.name, after - before);
        }
        self.lab.route_vips(&[1, 2, 3])
    }

    /// What never comes in by an uplink for a VIP: kube-proxy's alone. How many ways there were.
    pub fn inside(&self) -> Result<usize> {
        let all = self.pods(None, &[0, 1]);
        let mut ways = Vec::new();
        for of in [&self.cluster, &self.local] {
            let spec = &self.admin.get("Service", NAMESPACE, of.name)?["spec"];
            let port: u16 = spec["ports"][0]["nodePort"].as_u64().context("no node port")?.try_into()?;
            for (n, node) in self.lab.nodes.iter().enumerate() {
                // Policy Local: a node's own pods are behind its port.
                let behind = if of.name == "local" { self.pods(Some(n), &[0, 1]) } else { all.clone() };
                ways.extend(
                    node.addresses.iter().map(|ip| (&self.lab.client, SocketAddr::new(*ip, port), behind.clone())),
                );
            }
            let own = spec["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let own = own.map(|ip| Ok(ip.parse()?)).collect::<Result<Vec<IpAddr>>>()?;
            // A pod among whom it meets is itself: hairpin.
            let node = &self.lab.nodes[0];
            for ip in own.iter().chain(&of.vips) {
                ways.extend([&node.netns, &node.pods[0].netns].map(|from| (from, (*ip, 80).into(), all.clone())));
            }
        }
        for ip in &self.near.vips {
            ways.extend(self.lab.nodes.iter().map(|node| (&node.pods[0].netns, (*ip, 80).into(), all.clone())));
        }
        for (from, to, wanted) in &ways {
            self.meets(from, *to, wanted)?;
            // The node port of UDP is another one.
            if to.port() == 80 {
                clients::udp(from, *to, 200).with_context(|| format!("from {}", from.name()))?;
            }
        }
        Ok(ways.len())
    }

    /// Long-lived connections to all of these.
    pub fn running(&self, of: &[&Served]) -> Result<Vec<LongLived>> {
        targets(of).into_iter().map(|to| LongLived::start(&self.lab.client, to, 2)).collect()
    }

    /// New connections to all of these, one after the other.
    #[must_use]
    pub fn coming(&self, of: &[&Served]) -> Arrivals {
        Arrivals::start(&self.lab.client, &targets(of))
    }

    /// The nodes that have an address on a device.
    #[must_use]
    pub fn having(&self, device: &str, ip: IpAddr) -> Vec<String> {
        let has = |netns: &Netns| {
            let said = netns.ip(&format!("-j address show dev {device}")).unwrap_or_default();
            let said: Value = serde_json::from_str(&said).unwrap_or_default();
            said[0]["addr_info"].as_array().into_iter().flatten().any(|one| one["local"] == ip.to_string())
        };
        self.lab.nodes.iter().filter(|node| has(&node.netns)).map(|node| node.name.clone()).collect()
    }

    /// Who has which address of all.
    #[must_use]
    pub fn placed(&self) -> Vec<(IpAddr, Vec<String>)> {
        let far = self.cluster.vips.iter().chain(&self.local.vips).map(|ip| (*ip, self.having("kube-lb0", *ip)));
        far.chain(self.near.vips.iter().map(|ip| (*ip, self.having("lan0", *ip)))).collect()
    }

    /// Stops all agents.
    pub fn stop_all(&mut self, signal: Signal) -> Result<()> {
        self.lab.nodes.iter_mut().try_for_each(|node| node.agent.stop(signal))
    }

    /// What agents and kube-proxies wrote last.
    #[must_use]
    pub fn logs(&self) -> String {
        let proxies = self.lab.kube_proxies.iter().zip(&self.lab.nodes);
        proxies.fold(self.lab.logs(), |all, (proxy, node)| {
            format!("{all}--- kube-proxy of {} ---\n{}\n", node.name, proxy.log_tail())
        })
    }
}

/// Port 80 of all their addresses.
#[must_use]
pub fn targets(of: &[&Served]) -> Vec<SocketAddr> {
    of.iter().flat_map(|one| one.vips.iter().map(|vip| SocketAddr::new(*vip, 80))).collect()
}

/// Ends them; none may have broken. How many there were.
pub fn all_held(running: Vec<LongLived>) -> Result<usize> {
    running.into_iter().map(LongLived::finish).sum()
}
