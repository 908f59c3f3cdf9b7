//! Live frames: what forwarding to a pod costs all in all, beside rules shaped as kube-proxy's. A
//! program sends UDP frames into the node's uplink as a driver would deliver them; the pod's
//! ingress hook counts and drops them. Everything runs on one CPU.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::report::{Row, Section};
use super::rounds::{best, pin};
use super::wrapper;
use crate::lab::{Lab, Options as LabOptions, VIPS};
use crate::netns::Netns;
use crate::sys;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rounds over all ways.
    pub rounds: u32,
    /// Frames of a way in a round.
    pub frames: u32,
    /// Flows that take turns, a power of two.
    pub flows: u64,
    /// The CPU that everything runs on.
    pub cpu: usize,
}

/// Services in the rules: their number does not matter to a verdict map (`nft` looks up, it does not search).
const SERVICES: u32 = 100;
/// Offset of it in an IPv4 frame.
const UDP_CHECKSUM: usize = 14 + 20 + 6;
/// Port of the VIP, and what it becomes.
const PORTS: (u16, u16) = (80, 8080);

/// A way to the pod, with a lab of its own that stays up.
struct Way {
    name: &'static str,
    lab: Lab,
    frame: Vec<u8>,
    /// Nanoseconds a frame, round by round.
    samples: Vec<f64>,
}

/// Measures all ways in turn.
///
/// # Errors
/// A lab that cannot be built, or frames that do not arrive.
pub fn measure(options: &Options, bar: &ProgressBar) -> Result<Section> {
    ensure!(options.flows.is_power_of_two() && options.flows <= 1 << 16, "--flows must be a power of two up to 65536");
    ensure!(options.rounds > 0 && options.frames > 0, "--rounds and --frames must be above 0");
    bar.set_length(u64::from(options.rounds) * 5);
    bar.set_message("building five labs");
    let mut ways = vec![
        Way::new("plain forwarding to the pod's own address", "auto", false, Kind::Direct)?,
        Way::new("kube-proxy's shape in nftables", "auto", false, Kind::Rules)?,
        Way::new("XDP", "xdp", false, Kind::Agent)?,
        Way::new("XDP, conntrack rules beside it", "xdp", true, Kind::Agent)?,
        Way::new("tcx", "tcx", false, Kind::Agent)?,
    ];
    bar.set_message("frames");
    for _ in 0..options.rounds {
        for way in &mut ways {
            let sample = way.run(options).with_context(|| way.name.to_owned())?;
            way.samples.push(sample);
            bar.inc(1);
        }
    }
    let rules = ways.get(1).map(|way| way.samples.clone()).unwrap_or_default();
    let rows = ways.iter().map(|way| row(way, &rules)).collect();
    let Options { rounds, frames, flows, cpu } = options;
    let method = format!(
        "x = how many times the packets of kube-proxy's shape; UDP, {flows} flows in turn, {rounds} rounds x {frames} \
         live frames, all on CPU {cpu}"
    );
    Ok(Section { name: "live", method, rows })
}

fn row(way: &Way, rules: &[f64]) -> Row {
    let nanoseconds = best(&way.samples);
    let mut ratios: Vec<f64> = way.samples.iter().zip(rules).map(|(own, rules)| rules / own).collect();
    ratios.sort_by(f64::total_cmp);
    let median = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
    let ends = (ratios.first().copied().unwrap_or(f64::NAN), ratios.last().copied().unwrap_or(f64::NAN));
    Row {
        name: way.name.to_owned(),
        value: median,
        unit: "x",
        limit: None,
        detail: format!("{:.2} to {:.2} x; best {nanoseconds:.0} ns a packet", ends.0, ends.1),
        more: json!({"nanoseconds": nanoseconds, "lowest": ends.0, "highest": ends.1}),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// To the pod's own address; nothing in between.
    Direct,
    /// The VIP by rules.
    Rules,
    /// The VIP by our agent.
    Agent,
}

impl Way {
    fn new(name: &'static str, hook: &str, beside: bool, kind: Kind) -> Result<Self> {
        let options = LabOptions { pods: 1, logs: false, ..LabOptions::new(hook).nft(beside) };
        let lab = if kind == Kind::Agent { Lab::start(options) } else { Lab::build(options) }
            .with_context(|| format!("lab for: {name}"))?;
        let node = lab.nodes.first().context("a lab without nodes")?;
        let pod = node.pods.first().context("a node without pods")?;
        let address = pod.addresses.iter().find(|addr| addr.is_ipv4()).context("a pod without IPv4")?;
        if kind == Kind::Agent {
            lab.apply(&lab.web()?)?;
        }
        if kind == Kind::Rules {
            load(&node.netns, &rules(&address.to_string()))?;
        }
        // Delivered by NAPI, as a NIC does, whether or not a program is attached.
        node.netns.exec("ethtool -K eth0 gro on")?;
        let neighbour = mac(&pod.netns, "eth0")?;
        node.netns.ip(&format!("neigh replace {address} lladdr {} dev pod0", text(neighbour)))?;
        load(&pod.netns, &sink())?;
        let target = if kind == Kind::Direct {
            (address.to_string().parse()?, PORTS.1)
        } else {
            (VIPS.first().context("no VIP")?.parse()?, PORTS.0)
        };
        let frame = frame(mac(&node.netns, "eth0")?, target)?;
        Ok(Self { name, lab, frame, samples: Vec::new() })
    }

    /// Nanoseconds a frame that arrived.
    fn run(&self, options: &Options) -> Result<f64> {
        let node = self.lab.nodes.first().context("a lab without nodes")?;
        let pod = node.pods.first().context("a node without pods")?;
        let before = arrived(&pod.netns)?;
        let Options { frames, flows, cpu, .. } = *options;
        let frame = self.frame.clone();
        let elapsed = self.lab.router.enter(move || send(&frame, flows, frames, cpu))??;
        sys::pause(20);
        let arrived = arrived(&pod.netns)? - before;
        let lost = u64::from(frames) - arrived.min(u64::from(frames));
        ensure!(lost * 100 < u64::from(frames), "{lost} of {frames} frames did not arrive at the pod");
        Ok(elapsed.as_nanos() as f64 / arrived as f64)
    }
}

/// From the router into the uplink of its node; how long it takes.
fn send(frame: &[u8], flows: u64, frames: u32, cpu: usize) -> Result<Duration> {
    pin(cpu)?;
    let device: Value = serde_json::from_str(&sys::run("ip -j link show dev node1")?)?;
    let index = device.pointer("/0/ifindex").and_then(Value::as_u64).context("no ifindex of node1")?;
    wrapper::send(frame, flows, u32::try_from(index)?, frames)
}

fn frame(to: [u8; 6], (target, port): (Ipv4Addr, u16)) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], to).ipv4([198, 18, 0, 9], target.octets(), 61);
    let mut frame = Vec::new();
    builder.udp(40_000, port).write(&mut frame, &[0; wrapper::PAYLOAD])?;
    // No checksum, or conntrack finds all but the first flow's wrong.
    frame.iter_mut().skip(UDP_CHECKSUM).take(2).for_each(|byte| *byte = 0);
    wrapper::with_copy(frame)
}

fn load(netns: &Netns, rules: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), rules)?;
    netns.exec(&format!("nft -f {}", file.path().display())).map(drop)
}

fn sink() -> String {
    let port = PORTS.1;
    format!(
        "table netdev sink {{
  counter arrived {{ }}
  chain ingress {{
    type filter hook ingress device eth0 priority 0; policy accept;
    udp dport {port} counter name arrived drop
  }}
}}
"
    )
}

fn arrived(netns: &Netns) -> Result<u64> {
    let all: Value = serde_json::from_str(&netns.exec("nft -j list counters")?)?;
    let objects = all.get("nftables").and_then(Value::as_array).context("nft wrote no list")?;
    let found = objects.iter().find_map(|object| object.pointer("/counter/packets").and_then(Value::as_u64));
    found.context("the pod's counter is gone")
}

/// A verdict map of services, a chain for each, its endpoints by chance; and what filters beside it.
fn rules(pod: &str) -> String {
    let mut text = String::from("table ip kube-proxy {\n");
    let (port, target) = PORTS;
    let mut elements = String::new();
    for service in 0..SERVICES {
        // The VIP is somewhere in the middle; its three endpoints are one pod, so that all frames arrive.
        let vip = if service == SERVICES / 2 {
            VIPS.first().copied().unwrap_or_default().to_owned()
        } else {
            format!("203.0.113.{}", 100 + service)
        };
        for end in 0..3 {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  chain endpoint-{service}-{end} {{ meta l4proto udp dnat to {pod}:{target}; }}");
        }
        let ends: Vec<_> = (0..3).map(|end| format!("{end} : goto endpoint-{service}-{end}")).collect();
        let _ = writeln!(text, "  chain service-{service} {{ numgen random mod 3 vmap {{ {} }}; }}", ends.join(", "));
        let _ = write!(elements, "{vip} . udp . {port} : goto service-{service}, ");
    }
    let _ = write!(
        text,
        "  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}
  map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  chain services {{ ip daddr . meta l4proto . th dport vmap @service-ips; }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
  chain nat-postrouting {{
    type nat hook postrouting priority srcnat;
    meta mark and 0x4000 != 0 masquerade
  }}
  chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
  chain filter-prerouting {{ type filter hook prerouting priority dstnat - 10; ct state new jump firewall-check; }}
  chain endpoint-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
  chain filter-forward {{
    type filter hook forward priority -110;
    ct state invalid drop
    ct state new jump endpoint-check
  }}
}}
"
    );
    text
}

fn mac(netns: &Netns, device: &str) -> Result<[u8; 6]> {
    let link: Value = serde_json::from_str(&netns.ip(&format!("-j link show dev {device}"))?)?;
    let text = link.pointer("/0/address").and_then(Value::as_str).with_context(|| format!("no address of {device}"))?;
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().with_context(|| format!("{text} is no MAC address"))
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
