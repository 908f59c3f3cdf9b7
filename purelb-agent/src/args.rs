//! The command line.

use std::net::{IpAddr, SocketAddr};
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
    #[command(after_help = "Example: purelb-agent node --node-name node1\n\
        Without a cluster: purelb-agent node --source dir:./manifests --node-name node1")]
    Node(Node),
    /// Give Services their addresses; several may run, one of them works.
    #[command(after_help = "Example: purelb-agent allocator --namespace purelb-system\n\
        Without a cluster: purelb-agent allocator --source dir:./manifests")]
    Allocator(Allocator),
    /// Both in one process: addresses for the Services of a folder, and this node's tables.
    #[command(after_help = "Example: purelb-agent standalone --source dir:./manifests --node-name node1")]
    Standalone(Standalone),
    /// Uplinks, hooks and why, problems.
    #[command(after_help = "Example: purelb-agent status -o json\n\nExit code: 0 ready, 1 not ready.")]
    Status(Query),
    /// VIPs and ports with their endpoints, states and shares.
    #[command(after_help = "Example: purelb-agent services")]
    Services(Query),
    /// Ranges of the ServiceGroups, and what is in use of them.
    #[command(after_help = "Example: purelb-agent pools\n\
        Without a cluster: purelb-agent pools --source dir:./manifests")]
    Pools(Manifests),
    /// What is wrong or doubtful about ServiceGroups and LBNodeAgents.
    #[command(after_help = "Example: purelb-agent validate --strict\n\
        Without a cluster: purelb-agent validate --source dir:./manifests\n\n\
        Exit code: 0 nothing, 1 a FAIL (with --strict also a WARN), 2 wrong usage.")]
    Validate(Validate),
    /// Each step of the decision for a packet, from the live maps.
    #[command(after_help = "Example: purelb-agent explain tcp 198.51.100.7:40000 203.0.113.1:80 --flags fin,ack\n\n\
        Exit code: 0 forwarded or passed, 1 dropped, 2 wrong usage or no tables.")]
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
    /// Where the objects come from: kube, the Kubernetes API, or dir:PATH, a folder of manifests.
    #[arg(long, default_value = "kube", env = "PURELB_SOURCE")]
    pub source: String,
    #[command(flatten)]
    /// How to reach Kubernetes.
    pub kube: Kube,
    /// This node's name, as in EndpointSlices.
    #[arg(long, env = "PURELB_NODE_NAME")]
    pub node_name: String,
    #[command(flatten)]
    /// The instance.
    pub instance: Instance,
    /// Folder for what Kubernetes would keep in status, with a folder of manifests [default: PATH/state].
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// kube-proxy serves this node too, and what is not balanced here is left to it; auto: it answers on
    /// port 10256 of loopback.
    #[arg(long, value_enum, default_value_t, value_name = "WHETHER")]
    pub kube_proxy: Choice,
    /// The node already carries connections to its VIPs by other means, and they stay where they are; auto:
    /// kube-proxy was found and no agent ever completed tables here.
    #[arg(long, value_enum, default_value_t, value_name = "WHETHER")]
    pub live: Choice,
    /// The agent must have run this long before a reply that no flow entry names is translated by its
    /// pod's port alone; off: never.
    #[arg(long, default_value = "10m", value_parser = duration_or_off, value_name = "DURATION|off")]
    pub reply_fallback: OrOff,
    /// A service settles this long after its last change.
    #[arg(long, default_value = "24h", value_parser = duration)]
    pub settle: u64,
    /// Silence of the agent after which the tables count as stale.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub heartbeat: u64,
    /// Without a renewal of this node's Lease for so long other nodes take its local addresses.
    #[arg(long, default_value = "10s", env = "PURELB_LEASE_DURATION", value_parser = lease_duration, value_name = "DURATION")]
    pub lease_duration: u64,
    /// How long local addresses stay after the agent was stopped for an upgrade.
    #[arg(long, default_value = "60s", value_parser = lease_duration, value_name = "DURATION")]
    pub lease_hold: u64,
    /// What becomes of local addresses when the Lease cannot be renewed; hold: they stay, and another node may have them too.
    #[arg(long, value_enum, default_value_t)]
    pub on_api_loss: OnApiLoss,
    /// Remote addresses are withdrawn when the API server was not heard for so long, while other nodes hear it (their
    /// agents are asked, at this --port).
    #[arg(long, default_value = "1m", value_parser = duration_or_off, value_name = "DURATION|off")]
    pub deaf_after: OrOff,
    /// How long an address that is withdrawn from the routers is served still.
    #[arg(long, default_value = "3s", value_parser = duration, value_name = "DURATION")]
    pub withdraw_wait: u64,
    /// UID of the agent's pod.
    #[arg(long, env = "PURELB_POD_UID", default_value = "", hide_default_value = true, value_name = "UID")]
    pub pod_uid: String,
    /// The DaemonSet that runs the agent: while it is being deleted what ends hands its local addresses over, where it would
    /// keep them for an upgrade.
    #[arg(long, env = "PURELB_DAEMONSET", value_name = "NAME")]
    pub daemonset: Option<String>,
    #[command(flatten)]
    /// Metrics and health.
    pub http: Http,
    /// Form of the log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// `allocator`
#[derive(Debug, ClapArgs)]
pub struct Allocator {
    /// Where the objects come from: kube, the Kubernetes API, or dir:PATH, a folder of manifests.
    #[arg(long, default_value = "kube", env = "PURELB_SOURCE")]
    pub source: String,
    #[command(flatten)]
    /// How to reach Kubernetes.
    pub kube: Kube,
    /// Folder for what is given, with a folder of manifests [default: PATH/state].
    #[arg(long)]
    pub state: Option<PathBuf>,
    #[command(flatten)]
    /// Whose addresses, and how.
    pub allocation: Allocation,
    #[command(flatten)]
    /// Metrics and health.
    pub http: Http,
    /// Form of the log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How to reach Kubernetes.
#[derive(Clone, Debug, ClapArgs)]
pub struct Kube {
    /// How to reach the Kubernetes API [default: KUBECONFIG, or the pod's service account].
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the Leases, and the only one whose ServiceGroups count [default: the pod's; without a pod all
    /// ServiceGroups count].
    #[arg(long, env = "PURELB_NAMESPACE")]
    pub namespace: Option<String>,
}

/// Whose addresses, and how.
#[derive(Clone, Debug, ClapArgs)]
pub struct Allocation {
    /// Services of this loadBalancerClass are served.
    #[arg(long, default_value = "purelb.io/purelbv2", value_name = "CLASS")]
    pub load_balancer_class: String,
    /// PureLB: Services without a class are served too; anything else: not.
    #[arg(long, default_value = "PureLB", env = "DEFAULT_ANNOUNCER", value_name = "NAME")]
    pub default_announcer: String,
    /// An address that was freed is only given again after so long, unless there is no other.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub cool_down: u64,
}

/// `standalone`
#[derive(Debug, ClapArgs)]
pub struct Standalone {
    #[command(flatten)]
    /// The node's part.
    pub node: Node,
    #[command(flatten)]
    /// The allocator's part.
    pub allocation: Allocation,
}

/// Where metrics and health are.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub struct Http {
    /// Address that metrics and health (/metrics, /livez, /readyz) are served on.
    #[arg(long, default_value = "127.0.0.1", env = "PURELB_HOST", value_name = "ADDRESS")]
    pub host: IpAddr,
    /// Its port; 0: none.
    #[arg(long, default_value_t = 7472)]
    pub port: u16,
}

/// What to do without renewals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnApiLoss {
    /// They are withdrawn.
    #[default]
    Withdraw,
    /// They stay.
    Hold,
}

/// Yes, no, or found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Found out.
    #[default]
    Auto,
    /// Yes.
    Yes,
    /// No.
    No,
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

/// A command that reads the objects themselves.
#[derive(Debug, ClapArgs)]
pub struct Manifests {
    /// Where the objects come from: kube, the Kubernetes API, or dir:PATH, a folder of manifests.
    #[arg(long, default_value = "kube", env = "PURELB_SOURCE")]
    pub source: String,
    #[command(flatten)]
    /// How to reach Kubernetes.
    pub kube: Kube,
    /// Folder of what was given, with a folder of manifests [default: PATH/state].
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// What `--source` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The Kubernetes API.
    Kube,
    /// A folder, and that of the state.
    Folder(PathBuf, PathBuf),
}

/// What `--source` names.
///
/// # Errors
/// Nothing that is known.
pub fn place(source: &str, state: Option<PathBuf>) -> anyhow::Result<Place> {
    if source == "kube" {
        return Ok(Place::Kube);
    }
    let Some(folder) = source.strip_prefix("dir:").map(PathBuf::from) else {
        anyhow::bail!("--source {source} is unknown: use kube, or dir:PATH for a folder of manifests");
    };
    let state = state.unwrap_or_else(|| folder.join("state"));
    Ok(Place::Folder(folder, state))
}

/// The folder of `--source`, and that of the state.
///
/// # Errors
/// It names no folder.
pub fn folders(source: &str, state: Option<PathBuf>) -> anyhow::Result<(PathBuf, PathBuf)> {
    match place(source, state)? {
        Place::Folder(folder, state) => Ok((folder, state)),
        Place::Kube => anyhow::bail!("--source kube: this needs a folder of manifests, as dir:PATH"),
    }
}

/// `validate`
#[derive(Debug, ClapArgs)]
pub struct Validate {
    #[command(flatten)]
    /// The folder.
    pub manifests: Manifests,
    /// A WARN counts as a FAIL.
    #[arg(long)]
    pub strict: bool,
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
    /// A packet of a running connection instead of the first one (TCP), as --flags ack.
    #[arg(long, conflicts_with = "flags")]
    pub running: bool,
    /// TCP flags: fin, syn, rst, psh, ack, urg [default: syn].
    #[arg(long, value_parser = tcp_flags, value_name = "FLAG,...")]
    pub flags: Option<u8>,
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

/// Milliseconds, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrOff {
    /// After so many milliseconds; 0: at once.
    After(u64),
    /// Never.
    Off,
}

/// Milliseconds of a duration as Go writes it: 500ms, 1.5s, 1h30m; what is left of one counts as one.
///
/// # Errors
/// What is wrong with it.
pub fn duration(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut nanoseconds: u128 = 0;
    while !rest.is_empty() || text.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(number);
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let scale: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "" => return Err(format!("{text:?} lacks a unit: write 500ms, 10s, 5m or 1h30m")),
            _ => return Err(format!("{text:?} has the unknown unit {unit:?}: use ms, s, m or h")),
        };
        let bad = || format!("{text:?} is no duration: write 500ms, 10s, 5m or 1h30m");
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u64>() };
        if number.len() > 18 || whole.len() + fraction.len() == 0 || fraction.contains('.') {
            return Err(bad());
        }
        let tenths = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        nanoseconds += u128::from(digits(whole).map_err(|_| bad())?) * scale;
        nanoseconds += u128::from(digits(fraction).map_err(|_| bad())?) * scale / tenths;
        rest = after;
    }
    u64::try_from(nanoseconds.div_ceil(1_000_000)).map_err(|_| format!("{text} is too long"))
}

/// The flag byte of a TCP header from its names: `fin,ack`; `none` for none.
///
/// # Errors
/// A name that is none.
pub fn tcp_flags(text: &str) -> Result<u8, String> {
    let names = ["fin", "syn", "rst", "psh", "ack", "urg"];
    let mut flags = 0;
    for word in text.split(',').filter(|_| !text.eq_ignore_ascii_case("none")) {
        match names.iter().position(|name| word.trim().eq_ignore_ascii_case(name)) {
            Some(bit) => flags |= 1 << bit,
            None => return Err(format!("{word:?} is no TCP flag: use {}, or none alone", names.join(", "))),
        }
    }
    Ok(flags)
}

/// A duration, or `off`.
///
/// # Errors
/// What is wrong with it.
pub fn duration_or_off(text: &str) -> Result<OrOff, String> {
    if text == "off" { Ok(OrOff::Off) } else { duration(text).map(OrOff::After) }
}

/// A duration of a Lease: two seconds at least, since its fence ends a second before.
pub fn lease_duration(text: &str) -> Result<u64, String> {
    match duration(text)? {
        short @ 0..2000 => Err(format!("{short} ms is too short for a Lease: write 2s or more")),
        long => Ok(long),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        let good = [
            ("0", 0),
            ("0s", 0),
            ("500ms", 500),
            ("1.5s", 1_500),
            (".5s", 500),
            ("2.s", 2_000),
            ("10s", 10_000),
            ("5m", 300_000),
            ("24h", 86_400_000),
            ("1h30m", 5_400_000),
            ("1h0.5m1.5s20ms", 3_631_520),
            ("1us", 1),
            ("1500µs", 2),
        ];
        for (text, want) in good {
            assert_eq!(duration(text), Ok(want), "{text}");
        }
        for text in
            ["", "5", "s", ".s", "1.2.3s", "-1s", "+1s", "1d", "1 s", "1h30", "99999999999999999999s", "infinite"]
        {
            let error = duration(text).unwrap_err();
            assert!(error.contains(text) && error.contains("ms"), "{text}: {error}");
        }
        assert_eq!(duration_or_off("off"), Ok(OrOff::Off));
        assert_eq!(duration_or_off("10m"), Ok(OrOff::After(600_000)));
    }

    #[test]
    fn flags_by_name() {
        let rows = [("syn", 2), ("SYN,ack", 18), ("fin, ack", 17), ("none", 0), ("urg,psh,rst", 44)];
        for (text, want) in rows {
            assert_eq!(tcp_flags(text), Ok(want), "{text}");
        }
        assert!(tcp_flags("syn,ock").unwrap_err().contains("ock"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }
}
