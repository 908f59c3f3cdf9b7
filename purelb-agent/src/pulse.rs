//! What the programs are told once a second in `CONFIG`: that the agent lives, and its settings in ticks.

use std::fs;
use std::time::Duration;

use purelb_common::table::{CONFIG_KUBE_PROXY, CONFIG_REVSVC, Config};

use crate::args::{Node, OrOff};
use crate::bpf::{BpfError, Maps};
use crate::host;

/// New flows that each CPU may insert in a tick; katran's cap for a second.
const INSERTS: u32 = 125_000;
/// Drops that each CPU may put on the ring buffer in a tick.
const SAMPLES: u32 = 64;

/// Ticks of so many milliseconds, at least one.
#[must_use]
pub fn ticks(ticks_per_1000s: u64, milliseconds: u64) -> u32 {
    u32::try_from((milliseconds.saturating_mul(ticks_per_1000s) / 1_000_000).max(1)).unwrap_or(u32::MAX)
}

/// Whether `REVSVC` may answer now. `None`: as it was, an earlier agent may have run long enough.
#[must_use]
pub fn fallback(setting: OrOff, uptime: Duration) -> Option<bool> {
    match setting {
        OrOff::Off => Some(false),
        OrOff::After(ms) if uptime >= Duration::from_millis(ms) => Some(true),
        OrOff::After(_) => None,
    }
}

/// Writes `CONFIG`.
///
/// # Errors
/// The map cannot be written.
pub fn beat(
    maps: &Maps,
    args: &Node,
    ticks_per_1000s: u64,
    fallback: Option<bool>,
    kube_proxy: bool,
) -> Result<(), BpfError> {
    let (local_port_min, local_port_max) = host::local_ports();
    let ticks = |milliseconds| ticks(ticks_per_1000s, milliseconds);
    let old = maps.config()?;
    let flags = match fallback {
        Some(true) => old.flags | CONFIG_REVSVC,
        Some(false) => old.flags & !CONFIG_REVSVC,
        None => old.flags,
    };
    let flags = if kube_proxy { flags | CONFIG_KUBE_PROXY } else { flags & !CONFIG_KUBE_PROXY };
    maps.set_config(&Config {
        heartbeat: maps.clock()?.tick,
        heartbeat_limit: ticks(args.heartbeat),
        // One cluster, one table: the seed is a constant until the cluster hands one out.
        seed: 0x7075_7265_6c62,
        insert_budget: inserts(),
        sample: SAMPLES,
        half_open: ticks(20_000),
        // Two minutes as in conntrack, and at least (RFC 4787, REQ-5).
        udp_idle: ticks(120_000),
        // Beyond the first keep-alive, two hours by default, which Linux sends up to some minutes late (RFC 5382, REQ-5).
        tcp_idle: ticks(9_000_000),
        udp_pass: ticks(180_000),
        flags,
        local_port_min,
        local_port_max,
        ..old
    })
}

/// A SYN that passes still makes a conntrack entry where conntrack is on, so one second's worth of new flows
/// must not fill its table.
fn inserts() -> u32 {
    let text = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let all: u32 = text.trim().parse().unwrap_or(u32::MAX);
    INSERTS.min(all / u32::try_from(cpus).unwrap_or(1).max(1)).max(1000)
}
