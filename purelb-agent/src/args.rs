//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Load-balances Kubernetes Services in XDP.
#[derive(Debug, Parser)]
#[command(name = "purelb-agent", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve this node: attach the programs and keep the tables in step with the source.
    #[command(after_help = "Example: purelb-agent node --source dir:./manifests --node-name node1")]
    Node(Node),
    /// Uplinks, hooks and why, problems.
    #[command(after_help = "Example: purelb-agent status -o json")]
    Status(Query),
    /// VIPs and ports with their endpoints, states and shares.
    #[command(after_help = "Example: purelb-agent services")]
    Services(Query),
    /// Each step of the decision for a packet, from the live maps.
    #[command(after_help = "Example: purelb-agent explain tcp 198.51.100.7:40000 203.0.113.1:80")]
    Explain(Explain),
    /// Reasons for which packets left, with counts; `--watch` shows sampled drops live.
    #[command(after_help = "Example: purelb-agent drops --watch")]
    Drops(Drops),
    /// Hand all flows back to kube-proxy, then detach and remove everything.
    #[command(after_help = "Example: purelb-agent cleanup --deadline 30s")]
    Cleanup(Cleanup),
}

/// Which instance.
#[derive(Clone, Debug, ClapArgs)]
pub struct Instance {
    /// Folder of the pins, on a bpf file system.
    #[arg(long, default_value = "/sys/fs/bpf/purelb", env = "PURELB_BPF_ROOT")]
    pub bpf_root: PathBuf,
}

/// `node`
#[derive(Debug, ClapArgs)]
pub struct Node {
    /// Where the objects come from: dir:PATH, a folder of manifests.
    #[arg(long)]
    pub source: String,
    /// This node's name, as in EndpointSlices.
    #[arg(long, env = "PURELB_NODE_NAME")]
    pub node_name: String,
    #[command(flatten)]
    /// The instance.
    pub instance: Instance,
    /// Folder for the agent's own state [default: PATH/state].
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// kube-proxy serves this node too: what is not balanced here is left to it.
    #[arg(long)]
    pub kube_proxy: bool,
    /// The node already carries connections to its VIPs by other means: they stay where they are.
    #[arg(long)]
    pub live: bool,
    /// A service settles this long after its last change.
    #[arg(long, default_value = "24h", value_parser = duration)]
    pub settle: u64,
    /// Silence of the agent after which the tables count as stale.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub heartbeat: u64,
    /// Form of the log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For scripts.
    Json,
}

/// A command that only reads.
#[derive(Debug, ClapArgs)]
pub struct Query {
    #[command(flatten)]
    /// The instance.
    pub instance: Instance,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// `explain`
#[derive(Debug, ClapArgs)]
pub struct Explain {
    /// tcp or udp.
    #[arg(value_parser = ["tcp", "udp"], ignore_case = true)]
    pub protocol: String,
    /// Client address and port; IPv6 as [addr]:port.
    pub source: SocketAddr,
    /// VIP and port.
    pub destination: SocketAddr,
    /// A packet of a running connection instead of the first one (TCP).
    #[arg(long)]
    pub running: bool,
    #[command(flatten)]
    /// The rest.
    pub query: Query,
}

/// `drops`
#[derive(Debug, ClapArgs)]
pub struct Drops {
    /// Show sampled drops as they happen.
    #[arg(long)]
    pub watch: bool,
    #[command(flatten)]
    /// The rest.
    pub query: Query,
}

/// `cleanup`
#[derive(Debug, ClapArgs)]
pub struct Cleanup {
    /// How long to wait for flows that still run through the tables.
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub deadline: u64,
    #[command(flatten)]
    /// The rest.
    pub query: Query,
}

/// Milliseconds of a duration as Go writes it: 500ms, 10s, 5m, 24h.
///
/// # Errors
/// What is wrong with it.
pub fn duration(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or("a unit is missing: 500ms, 10s, 5m, 24h")?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("unknown unit {unit:?}: use ms, s, m or h")),
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text} is too long"))
}
