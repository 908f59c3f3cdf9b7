//! Nodes in one network, whose agents give local addresses of it and elect who answers for each; on a folder.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::answers::{Answers, Asker};
use crate::clients;
use crate::lab::{Lab, Node, Options};
use crate::manifests::Service;
use crate::sys;

pub mod scene;

/// The addresses of the Service, one of each family.
pub const VIPS: [&str; 2] = ["198.18.50.200", "2001:db8:50::200"];
/// Longer than a take-over with a Lease of five seconds takes on a busy machine.
pub const TAKE_OVER: Duration = Duration::from_secs(20);
/// An answer of another between two of one node that lie closer together: both had the address. One that goes away and
/// comes back with its owner's link is gone for longer.
pub const TOGETHER: Duration = Duration::from_millis(500);

/// A lab with a Service that is answered for.
#[derive(Debug)]
pub struct Lan {
    /// The lab.
    pub lab: Lab,
}

impl Lan {
    /// So many nodes with Leases of that length (as `5s`), and no Service yet.
    pub fn new(nodes: u16, lease: &'static str, options: Options) -> Result<Self> {
        let interfaces = vec!["lan0".to_owned()];
        let agent_args = vec!["--lease-duration", lease];
        let lab = Lab::start(Options { standalone: true, lan: true, nodes, interfaces, agent_args, ..options })?;
        let lan = Self { lab };
        lan.group(false)?;
        lan.announce(&json!({}))?;
        Ok(lan)
    }

    /// With the Service, given, answered for by one node each, and served.
    pub fn serving(nodes: u16, lease: &'static str, options: Options) -> Result<Self> {
        let lan = Self::new(nodes, lease, options)?;
        lan.write()?;
        // Who comes first takes what another one has the better right to, for the length of a Lease at most.
        for node in &lan.lab.nodes {
            sys::wait_for(&format!("{} knows all nodes", node.name), Duration::from_secs(60), || {
                Ok(node.agent.query(&["status"])?["election"]["members"] == nodes)
            })?;
        }
        let seconds: u64 = lease.trim_end_matches('s').parse().context("a Lease in seconds")?;
        sys::pause(seconds * 1_000 + 3_000);
        for ip in ips()? {
            lan.owner(ip, &[]).with_context(|| lan.lab.logs())?;
        }
        lan.served()?;
        Ok(lan)
    }

    /// The pools of both addresses; whether duplicates of IPv6 addresses are not looked for.
    pub fn group(&self, skip_ipv6_dad: bool) -> Result<()> {
        let pool = |pool: &str, subnet: &str| json!({"pool": pool, "subnet": subnet, "aggregation": "default"});
        let local = json!({
            "v4pool": pool("198.18.50.200-198.18.50.220", "198.18.50.0/24"),
            "v6pool": pool("2001:db8:50::200-2001:db8:50::220", "2001:db8:50::/64"),
            "skipIPv6DAD": skip_ipv6_dad,
        });
        self.lab.write_objects("near.yaml", &[object("ServiceGroup", "near", &json!({"local": local}))]).map(drop)
    }

    /// Writes the Service with all pods ready.
    pub fn write(&self) -> Result<()> {
        let group = Some("near".to_owned());
        self.write_as(&Service { vips: ips()?, local: false, group, ..self.lab.web()? })
    }

    /// Writes a Service that is to be given its addresses.
    pub fn write_as(&self, service: &Service) -> Result<()> {
        let mut web = service.service();
        web.as_object_mut().context("an object")?.remove("status");
        let mut objects = vec![web];
        objects.extend(service.slices());
        self.lab.write_objects("web.yaml", &objects)?;
        self.lab.wait_programmed(service)
    }

    /// `LBNodeAgent.spec.local` of all nodes.
    pub fn announce(&self, local: &Value) -> Result<()> {
        self.lab
            .write_objects("announce.yaml", &[object("LBNodeAgent", "announce", &json!({"local": local}))])
            .map(drop)
    }

    /// The one node that has the address, and none of these.
    pub fn owner(&self, ip: IpAddr, but: &[&str]) -> Result<&Node> {
        owner(&self.lab, ip, but)
    }

    /// Where in the list of nodes the one that has it stands.
    pub fn index(&self, ip: IpAddr) -> Result<usize> {
        let name = &self.owner(ip, &[])?.name;
        self.lab.nodes.iter().position(|node| node.name == *name).context("it")
    }

    /// Both addresses are served.
    pub fn served(&self) -> Result<()> {
        served(&self.lab, &ips()?)
    }

    /// The label that keeps load balancers away from a node.
    pub fn exclude(&self, name: &str) -> Result<()> {
        let nodes = self.lab.nodes.iter().map(|node| {
            let mut object = crate::manifests::node(&node.name, &node.addresses);
            if node.name == name {
                object["metadata"]["labels"] = json!({"node.kubernetes.io/exclude-from-external-load-balancers": ""});
            }
            object
        });
        self.lab.write_objects("nodes.yaml", &nodes.collect::<Vec<_>>()).map(drop)
    }

    /// Who has the first address gets the label that keeps load balancers away: his name, and what was answered meanwhile.
    pub fn hand_over(&self) -> Result<(String, Answers)> {
        let ips = ips()?;
        let name = self.owner(*ips.first().context("an address")?, &[])?.name.clone();
        let asker = self.ask()?;
        sys::pause(300);
        self.exclude(&name)?;
        self.elsewhere(&name)?;
        Ok((name, asker.finish()?))
    }

    /// The node that has the first address dies: its name, and what was answered meanwhile.
    pub fn bereave(&mut self) -> Result<(String, Answers)> {
        let dead = self.index(*ips()?.first().context("an address")?)?;
        let asker = self.ask()?;
        sys::pause(300);
        let node = self.lab.nodes.get_mut(dead).context("the node")?;
        let name = node.name.clone();
        // A namespace's kernel would go on answering.
        node.netns.ip("link set lan0 down")?;
        node.agent.stop(Signal::SIGKILL)?;
        self.elsewhere(&name)?;
        Ok((name, asker.finish()?))
    }

    /// Both addresses are at other nodes, and a moment passed.
    fn elsewhere(&self, name: &str) -> Result<()> {
        for ip in ips()? {
            self.owner(ip, &[name])?;
        }
        sys::pause(1_000);
        Ok(())
    }

    /// Asks in the network for both addresses.
    pub fn ask(&self) -> Result<Asker> {
        Asker::start(&self.lab.router, "lan", &ips()?)
    }
}

/// The longest time that nobody answered for one of these; none when two did at once.
#[must_use]
pub fn silence(answers: &Answers, ips: &[IpAddr]) -> Option<Duration> {
    let two: usize = ips.iter().map(|ip| answers.overlaps(*ip, TOGETHER)).sum();
    let longest = ips.iter().map(|ip| answers.longest_silence(*ip)).max();
    longest.filter(|_| two == 0)
}

/// The one node that has the address, these not looked at.
pub fn owner<'a>(lab: &'a Lab, ip: IpAddr, but: &[&str]) -> Result<&'a Node> {
    let mut found = None;
    sys::wait_for(&format!("one node has {ip}, but for {but:?}"), TAKE_OVER, || {
        let others = lab.nodes.iter().filter(|node| !but.contains(&node.name.as_str()));
        let having: Vec<_> = others.filter(|node| has(node, ip)).collect();
        ensure!(having.len() == 1, "{} have it", having.len());
        found = having.first().copied();
        Ok(true)
    })?;
    found.context("nobody")
}

/// The client meets somebody at port 80 of each.
pub fn served(lab: &Lab, ips: &[IpAddr]) -> Result<()> {
    for ip in ips {
        sys::wait_for(&format!("{ip} is served"), Duration::from_secs(10), || {
            Ok(!clients::spread(&lab.client, (*ip, 80).into(), 1)?.is_empty())
        })?;
    }
    Ok(())
}

/// Both addresses.
pub fn ips() -> Result<Vec<IpAddr>> {
    VIPS.iter().map(|ip| ip.parse().context("VIP")).collect()
}

/// An object of PureLB's.
#[must_use]
pub fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "purelb.io/v2", "kind": kind,
        "metadata": {"name": name, "namespace": "purelb-system"}, "spec": spec,
    })
}

/// Whether a node has the address on its interface.
#[must_use]
pub fn has(node: &Node, ip: IpAddr) -> bool {
    !entry(node, "lan0", ip).is_null()
}

/// What `ip address` says of an address on an interface.
#[must_use]
pub fn entry(node: &Node, device: &str, ip: IpAddr) -> Value {
    let said = node.netns.ip(&format!("-j address show dev {device}")).unwrap_or_default();
    let said: Value = serde_json::from_str(&said).unwrap_or_default();
    let mut all = said[0]["addr_info"].as_array().into_iter().flatten();
    all.find(|a| a["local"] == ip.to_string()).cloned().unwrap_or_default()
}

/// The MAC address of its interface.
pub fn mac(node: &Node) -> Result<[u8; 6]> {
    let said: Value = serde_json::from_str(&node.netns.ip("-j link show dev lan0")?)?;
    let text = said[0]["address"].as_str().context("a MAC address")?;
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("six bytes")
}

/// To a node's agent.
pub fn signal(node: &Node, signal: Signal) -> Result<()> {
    let pid = node.agent.pid().context("it runs")?;
    kill(Pid::from_raw(i32::try_from(pid)?), signal).context("signal the agent")
}

/// At no time two answered, and never longer nobody than that. The times are printed: they are figures, the limit is a
/// bound.
pub fn proven(answers: &Answers, ips: &[IpAddr], limit: Duration) -> Result<()> {
    never_two(answers, ips, TOGETHER)?;
    for ip in ips {
        let silence = answers.longest_silence(*ip);
        ensure!(silence < limit, "{ip}: nobody answered for {silence:?}");
    }
    Ok(())
}

/// Nobody answered between two answers of another that lie closer together than this.
pub fn never_two(answers: &Answers, ips: &[IpAddr], closer: Duration) -> Result<()> {
    for ip in ips {
        let (silence, owners) = (answers.longest_silence(*ip), answers.owners(*ip));
        println!("{ip}: without an answer for {silence:?}, {} owners", owners.len());
        let overlaps = answers.overlaps(*ip, closer);
        ensure!(overlaps == 0, "{ip}: two answered at once, {overlaps} times: {owners:x?}");
    }
    Ok(())
}
