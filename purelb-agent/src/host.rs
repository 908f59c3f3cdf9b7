//! What the host must offer, and the remedy where it does not.

use std::fs;

use purelb_plan::problem::Problem;

/// Looks at what the data path needs of this host (in this network namespace).
#[must_use]
pub fn check() -> Vec<Problem> {
    let mut out = Vec::new();
    for (path, name) in [
        ("/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ] {
        let on = fs::read_to_string(path).is_ok_and(|v| v.trim() != "0");
        if !on {
            out.push(Problem {
                object: "host".to_owned(),
                field: name.to_owned(),
                message: "is off: packets for pods are not forwarded".to_owned(),
                remedy: format!("sysctl -w {name}=1"),
                origin: String::new(),
            });
        }
    }
    out
}

/// The node's own ephemeral ports, first and last.
#[must_use]
pub fn local_ports() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse().ok());
    (numbers.next().unwrap_or(32_768), numbers.next().unwrap_or(60_999))
}
