//! Real routing daemons in a lab: a node's takes the addresses of `kube-lb0` to the router by eBGP, the router's has an
//! equal-cost route over all nodes that announce one. FRR or BIRD, each in its namespace, with a folder of its own.
//!
//! AS 65000 are the nodes, 65001 is the router. A session is given up after three seconds of silence, and its routes with
//! it. Where a test asks for BGP's graceful restart, they stay for [`RESTART`] seconds longer: also those of a node that died.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::Lab;
use crate::netns::Netns;
use crate::sys;

pub mod arrivals;
mod bird;
mod frr;
pub mod scene;
pub mod watch;

use watch::Watch;

/// After so many seconds of silence a session and its routes are given up: the least that BGP knows.
pub const HOLD: u64 = 3;
/// With graceful restart a node's routes stay so many seconds for it to come back.
pub const RESTART: u64 = 10;
/// The device whose addresses nodes announce.
pub const DEVICE: &str = "kube-lb0";

/// Which program speaks BGP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// FRR's zebra and bgpd.
    Frr,
    /// BIRD 2.
    Bird,
}

/// What a speaker is told.
#[derive(Clone, Debug)]
struct Role {
    id: Ipv4Addr,
    own: u32,
    other: u32,
    /// Both families.
    peers: Vec<IpAddr>,
    /// It tells what is on the device and learns nothing; else it learns and tells nothing.
    announces: bool,
    /// Graceful restart.
    graceful: bool,
}

/// A program to start.
struct Start {
    program: &'static str,
    args: Vec<String>,
    /// It is ready when this socket is there.
    socket: PathBuf,
}

/// A routing daemon, which ends when this is dropped.
#[derive(Debug)]
pub struct Speaker {
    /// Which one.
    pub kind: Kind,
    netns: Netns,
    folder: PathBuf,
    children: Vec<Child>,
}

impl Speaker {
    fn new(kind: Kind, netns: &Netns, folder: PathBuf, role: &Role) -> Result<Self> {
        fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        match kind {
            Kind::Frr => frr::configure(&folder, role)?,
            Kind::Bird => bird::configure(&folder, role)?,
        }
        let mut made = Self { kind, netns: netns.clone(), folder, children: Vec::new() };
        made.start()?;
        Ok(made)
    }

    /// Starts its processes; sessions come up by themselves.
    pub fn start(&mut self) -> Result<()> {
        let programs = match self.kind {
            Kind::Frr => frr::programs(&self.folder),
            Kind::Bird => bird::programs(&self.folder),
        };
        for Start { program, args, socket } in programs {
            drop(fs::remove_file(&socket));
            let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("log"))?;
            let mut command = self.netns.command(program);
            command.args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            self.children.push(command.spawn().with_context(|| format!("start {program} by nsenter"))?);
            let ready = sys::wait_for(&format!("{program} is ready"), Duration::from_secs(20), || Ok(socket.exists()));
            ready.with_context(|| self.log())?;
        }
        Ok(())
    }

    /// Ends its processes, the last one first, and waits.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        while let Some(mut child) = self.children.pop() {
            kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signal a routing daemon")?;
            let ended = sys::wait_for("the daemon ends", Duration::from_secs(5), || Ok(child.try_wait()?.is_some()));
            if ended.is_err() {
                drop(child.kill());
                drop(child.wait());
            }
        }
        Ok(())
    }

    /// What it says of its sessions and routes.
    pub fn sessions(&self) -> Result<String> {
        let asked = [
            "show protocols",
            "show route all",
            "show bgp summary",
            "show bgp ipv4",
            "show bgp nexthop",
            "show nexthop-group rib",
        ];
        let one = |asked: &str| {
            let mut command = match self.kind {
                Kind::Frr => {
                    let mut command = Command::new("vtysh");
                    command.arg("--vty_socket").arg(&self.folder).args(["-c", asked]);
                    command
                }
                Kind::Bird => {
                    let mut command = Command::new("birdc");
                    command.arg("-s").arg(self.folder.join("ctl")).args(asked.split(' '));
                    command
                }
            };
            sys::output(&mut command)
        };
        let (bird, frr) = asked.split_at(2);
        let asked = if self.kind == Kind::Bird { bird } else { frr };
        asked.iter().map(|asked| one(asked)).collect()
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log(&self) -> String {
        sys::tail(&self.folder.join("log"), 20)
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        drop(self.stop(Signal::SIGKILL));
    }
}

/// All speakers of a lab.
#[derive(Debug)]
pub struct Routing {
    /// The router's.
    pub router: Speaker,
    /// The nodes', in their order.
    pub nodes: Vec<Speaker>,
    /// What happens to the router's routes.
    pub watch: Watch,
    netns: Netns,
}

impl Routing {
    /// Starts one on the router and one on every node (`nodes` is repeated), with graceful restart or without.
    pub fn start(lab: &Lab, router: Kind, nodes: &[Kind], graceful: bool) -> Result<Self> {
        let peers: Vec<IpAddr> = lab.nodes.iter().flat_map(|node| node.addresses.clone()).collect();
        let id = Ipv4Addr::new(198, 18, 0, 1);
        let role = Role { id, own: 65_001, other: 65_000, peers, announces: false, graceful };
        let folder = |name: &str| lab.folder().join(format!("bgp-{name}"));
        let router = Speaker::new(router, &lab.router, folder("router"), &role)?;
        let mut speakers = Vec::new();
        for (node, kind) in lab.nodes.iter().zip(nodes.iter().cycle()) {
            let id = node.addresses.iter().find_map(|ip| match ip {
                IpAddr::V4(ip) => Some(*ip),
                IpAddr::V6(_) => None,
            });
            let role = Role {
                id: id.context("a node without IPv4")?,
                own: 65_000,
                other: 65_001,
                peers: lab.gateways(&node.name)?,
                announces: true,
                graceful,
            };
            speakers.push(Speaker::new(*kind, &node.netns, folder(&node.name), &role)?);
        }
        Ok(Self { router, nodes: speakers, watch: Watch::start(&lab.router)?, netns: lab.router.clone() })
    }

    /// The nodes that the router's kernel has as next hops for that address or prefix.
    pub fn hops(&self, to: &str) -> Result<BTreeSet<usize>> {
        let text = self.netns.ip(&format!("{} -j route show {to}", if to.contains(':') { "-6" } else { "-4" }))?;
        let routes: Vec<Value> = if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text)? };
        let paths = routes.iter().flat_map(|route| match route["nexthops"].as_array() {
            Some(paths) => paths.iter().collect::<Vec<_>>(),
            None => vec![route],
        });
        let devices = paths.filter_map(|path| path["dev"].as_str());
        Ok(devices.filter_map(|device| device.strip_prefix("node")?.parse().ok()).collect())
    }

    /// Waits until those nodes, and no others, are next hops for all of these; how long it took.
    pub fn wait_hops(&self, to: &[&str], wanted: &[usize], limit: Duration) -> Result<Duration> {
        let begin = Instant::now();
        let wanted: BTreeSet<usize> = wanted.iter().copied().collect();
        let waited = sys::wait_for(&format!("the router leads {to:?} to nodes {wanted:?}"), limit, || {
            for one in to {
                let found = self.hops(one)?;
                ensure!(found == wanted, "{one} leads to {found:?}");
            }
            Ok(true)
        });
        let took = begin.elapsed();
        waited.with_context(|| self.logs())?;
        Ok(took)
    }

    /// What all of them say; for a failed test.
    #[must_use]
    pub fn logs(&self) -> String {
        let all = [&self.router].into_iter().chain(&self.nodes);
        let said = all.map(|speaker| {
            let sessions = speaker.sessions().unwrap_or_else(|error| format!("{error:#}"));
            format!("--- {} ---\n{sessions}\n{}\n", speaker.folder.display(), speaker.log())
        });
        said.collect()
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
