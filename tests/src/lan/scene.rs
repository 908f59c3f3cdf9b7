//! Three nodes in one network on a real API server, whose agents elect who answers for the addresses of a Service there.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::TAKE_OVER;
use crate::answers::Asker;
use crate::cluster::Client;
use crate::cluster::proxy::Rule;
use crate::cluster::tenant::{Allocator, INSTALL};
use crate::lab::{Lab, Node, Options};
use crate::sys;

/// The Leases' length. A node withdraws when 0.7 of it passed without an answer, and with shorter ones an API server that
/// is busy with another test's start would move addresses.
pub const LEASE: Duration = Duration::from_secs(6);

/// A running lab with a Service that is answered for.
#[derive(Debug)]
pub struct Scene {
    /// The lab.
    pub lab: Lab,
    /// All rights.
    pub admin: Client,
    _allocator: Allocator,
    /// The addresses of the Service, one of each family.
    pub vips: Vec<IpAddr>,
}

impl Scene {
    /// Three nodes with a pod each, and a Service of all pods with that policy.
    pub fn new(policy: &str) -> Result<Self> {
        Self::with(policy, false)
    }

    /// The same with a proxy between each agent and the API server.
    pub fn behind_proxies(policy: &str) -> Result<Self> {
        Self::with(policy, true)
    }

    fn with(policy: &str, proxied: bool) -> Result<Self> {
        let interfaces = vec!["lan0".to_owned()];
        let agent_args = vec!["--lease-duration", "6s", "--lease-hold", "20s"];
        let options = Options { nodes: 3, pods: 1, lan: true, interfaces, agent_args, proxied, ..Options::new("xdp") };
        let (lab, admin, allocator) = Lab::on_cluster(options)?;
        for node in 0..lab.nodes.len() {
            lab.pod(&admin, node, 0, "web", true)?;
        }
        let vips = lab.service(&admin, "web", json!({"externalTrafficPolicy": policy}))?;
        let scene = Self { lab, admin, _allocator: allocator, vips };
        for ip in &scene.vips {
            scene.owner(*ip, &[]).with_context(|| scene.lab.logs())?;
        }
        Ok(scene)
    }

    /// Waits until all agents know of each other and everything is where it should be.
    pub fn settle(&self) -> Result<()> {
        for node in &self.lab.nodes {
            self.knows(node, 3)?;
        }
        // Who comes first has for the length of a Lease what another one has the better right to.
        sys::pause(u64::try_from(LEASE.as_millis())? + 1_500);
        self.vips.iter().try_for_each(|ip| self.owner(*ip, &[]).map(drop))?;
        self.served()
    }

    /// Waits until an agent knows of so many nodes, itself among them.
    pub fn knows(&self, node: &Node, members: usize) -> Result<()> {
        sys::wait_for(&format!("{} knows of {members} nodes", node.name), TAKE_OVER, || {
            let status = node.agent.query(&["status"])?;
            ensure!(status["election"]["members"] == members, "{}", status["election"]);
            Ok(true)
        })
    }

    /// The one node that has the address, and none of these.
    pub fn owner(&self, ip: IpAddr, but: &[&str]) -> Result<&Node> {
        super::owner(&self.lab, ip, but)
    }

    /// Where in the list of nodes the one that has it stands.
    pub fn index(&self, ip: IpAddr) -> Result<usize> {
        let name = &self.owner(ip, &[])?.name;
        self.lab.nodes.iter().position(|node| node.name == *name).context("it")
    }

    /// Asks in the network for all addresses.
    pub fn ask(&self) -> Result<Asker> {
        Asker::start(&self.lab.router, "lan", &self.vips)
    }

    /// The client meets somebody at each address.
    pub fn served(&self) -> Result<()> {
        super::served(&self.lab, &self.vips)
    }

    /// A node's Lease.
    pub fn lease(&self, node: &str) -> Result<Value> {
        self.admin.get("Lease", INSTALL, &format!("purelb-node-{node}"))
    }

    /// The API server is out of the reach of the node at that place in the list, or not any more.
    pub fn cut(&self, node: usize, cut: bool) -> Result<()> {
        self.lab.reach_api(u16::try_from(node)? + 1, !cut)
    }

    /// All nodes but that one, by their places.
    #[must_use]
    pub fn others(&self, node: usize) -> Vec<usize> {
        (0..self.lab.nodes.len()).filter(|one| *one != node).collect()
    }

    /// What happens from now on to requests of the agent at that place in the list of nodes.
    pub fn rules(&self, node: usize, rules: &[Rule]) -> Result<()> {
        self.lab.proxies.get(node).context("no proxy")?.rules(rules)
    }
}
