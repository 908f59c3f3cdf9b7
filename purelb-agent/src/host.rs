//! What the host must offer, and the remedy where it does not.

mod kernel;
mod kube_proxy;

use std::fs;
use std::path::Path;
use std::time::Duration;

use purelb_plan::problem::Problem;

use crate::net::Uplink;
use crate::net::local::Twin;

pub use kernel::{PreflightError, preflight};
pub use kube_proxy::KubeProxy;

/// The settings of this network namespace.
const SYSCTL: &str = "/proc/sys";

/// Looks at what the data path needs of this host (in this network namespace).
#[must_use]
pub fn check(uplinks: &[Uplink]) -> Vec<Problem> {
    let mut out = sysctls(Path::new(SYSCTL), uplinks);
    out.extend(kernel::btf());
    out
}

/// Interfaces that answer ARP for local addresses of another one: the network hears two MAC addresses of this node.
#[must_use]
pub fn twins(twins: &[Twin]) -> Vec<Problem> {
    let open = twins.iter().filter(|twin| answers_for_others(&twin.name));
    open.map(|Twin { name, network, .. }| {
        let field = conf(name, "arp_ignore");
        let message =
            format!("is 0: {name} is in {network} too, and answers ARP there for addresses of another interface");
        problem(&field, &message, format!("sysctl -w {field}=1"))
    })
    .collect()
}

/// An interface answers ARP for addresses that are on others.
#[must_use]
pub fn answers_for_others(name: &str) -> bool {
    ignores(Path::new(SYSCTL), name) == Some(0)
}

/// The larger one counts, as in the kernel.
fn ignores(root: &Path, name: &str) -> Option<u32> {
    let set = |interface| value(root, "net/ipv4/conf", interface, "arp_ignore");
    Some(set("all")?.max(set(name)?))
}

/// `None`: there is no such setting, as for IPv6 where it is disabled. Dots in names of interfaces stay.
fn value(root: &Path, group: &str, interface: &str, name: &str) -> Option<u32> {
    fs::read_to_string(root.join(group).join(interface).join(name)).ok()?.trim().parse().ok()
}

/// As sysctl names it, which writes a dot of an interface's name as a slash.
fn conf(interface: &str, setting: &str) -> String {
    format!("net.ipv4.conf.{}.{setting}", interface.replace('.', "/"))
}

/// A name that no other process has, that of the host (in a pod: of the pod) in front.
///
/// # Errors
/// /proc cannot be read.
pub fn identity() -> std::io::Result<String> {
    let read = |file: &str| fs::read_to_string(Path::new(SYSCTL).join("kernel").join(file));
    Ok(format!("{}_{}", read("hostname")?.trim(), read("random/uuid")?.trim()))
}

/// Since the machine started; nothing where that cannot be read.
#[must_use]
pub fn uptime() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
    seconds.map(Duration::from_secs_f64).unwrap_or_default()
}

/// The node's own ephemeral ports, first and last.
#[must_use]
pub fn local_ports() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse().ok());
    (numbers.next().unwrap_or(32_768), numbers.next().unwrap_or(60_999))
}

fn problem(field: &str, message: &str, remedy: String) -> Problem {
    Problem {
        object: "host".to_owned(),
        field: field.to_owned(),
        message: message.to_owned(),
        remedy,
        origin: String::new(),
    }
}

fn sysctls(root: &Path, uplinks: &[Uplink]) -> Vec<Problem> {
    let value = |group: &str, interface: &str, name: &str| value(root, group, interface, name);
    let sysctl = |name: &str, value: u32| format!("sysctl -w {name}={value}");
    let mut out = Vec::new();
    let off = "is off: packets for pods are not forwarded";
    let v4 = value("net/ipv4", "", "ip_forward") != Some(0);
    if !v4 {
        out.push(problem("net.ipv4.ip_forward", off, sysctl("net.ipv4.ip_forward", 1)));
    }
    if value("net/ipv6/conf", "all", "forwarding") == Some(0) {
        out.push(problem("net.ipv6.conf.all.forwarding", off, sysctl("net.ipv6.conf.all.forwarding", 1)));
    }
    let strict = |name: &str| {
        // The kernel takes the stricter word, and 2 (loose) overrides 1 (strict).
        let set = |interface| value("net/ipv4/conf", interface, "rp_filter").unwrap_or(0);
        set("all").max(set(name)) == 1
    };
    for (group, name) in [("net/bridge", "bridge-nf-call-iptables"), ("net/bridge", "bridge-nf-call-ip6tables")] {
        let bridges = uplinks.iter().any(|u| u.kind == "bridge");
        if bridges && value(group, "", name) == Some(1) {
            let field = format!("net.bridge.{name}");
            let message = "is on: netfilter sees packets for VIPs on the bridge before they are rewritten there";
            let remedy = format!("name the bridge's port in datapath.interfaces instead, or sysctl -w {field}=0");
            out.push(problem(&field, message, remedy));
        }
    }
    for name in uplinks.iter().map(|u| u.name.as_str()) {
        let field = |setting: &str| conf(name, setting);
        if v4 && value("net/ipv4/conf", name, "forwarding") == Some(0) {
            let field = field("forwarding");
            out.push(problem(&field, off, sysctl(&field, 1)));
        }
        // With one uplink the way back to a client is the way it came by, and a strict filter never sees a difference.
        if uplinks.len() > 1 && strict(name) {
            let field = field("rp_filter");
            let message = "is strict: with several uplinks, packets whose replies leave by another one are dropped";
            out.push(problem(&field, message, sysctl(&field, 2)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_matter_are_named() {
        let temp = tempfile::tempdir().unwrap();
        let set = |path: &str, value: &str| {
            let path = temp.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        };
        let uplink = |name: &str| Uplink {
            name: name.to_owned(),
            index: 1,
            kind: String::new(),
            mtu: 1500,
            up: true,
            mac: None,
        };
        assert_eq!(ignores(temp.path(), "eth0"), None);
        set("net/ipv4/conf/all/arp_ignore", "0");
        set("net/ipv4/conf/eth0/arp_ignore", "0");
        assert_eq!(ignores(temp.path(), "eth0"), Some(0));
        set("net/ipv4/conf/all/arp_ignore", "1");
        assert_eq!(ignores(temp.path(), "eth0"), Some(1), "the larger one");
        let one = [uplink("eth0")];
        let two = [uplink("eth0"), uplink("eth1.5")];
        let fields = |uplinks: &[Uplink]| -> Vec<String> {
            sysctls(temp.path(), uplinks).into_iter().map(|p| format!("{} | {}", p.field, p.remedy)).collect()
        };
        assert!(fields(&two).is_empty(), "what is not there is not judged");
        set("net/ipv4/ip_forward", "1");
        set("net/ipv6/conf/all/forwarding", "1");
        set("net/ipv4/conf/all/rp_filter", "1");
        set("net/ipv4/conf/eth0/rp_filter", "2");
        set("net/ipv4/conf/eth1.5/rp_filter", "0");
        assert!(fields(&one).is_empty());
        let strict = "net.ipv4.conf.eth1/5.rp_filter | sysctl -w net.ipv4.conf.eth1/5.rp_filter=2";
        assert_eq!(fields(&two), [strict], "eth0 is loose");
        set("net/bridge/bridge-nf-call-iptables", "1");
        assert!(fields(&one).is_empty(), "no bridge, no matter");
        let bridge = [Uplink { kind: "bridge".to_owned(), ..uplink("br0") }];
        assert!(fields(&bridge).first().unwrap().starts_with("net.bridge.bridge-nf-call-iptables | name the bridge's"));
        set("net/ipv4/conf/eth0/forwarding", "0");
        set("net/ipv6/conf/all/forwarding", "0");
        let found = fields(&one);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.iter().all(|f| f.contains("forwarding=1")), "{found:?}");
        set("net/ipv4/ip_forward", "0");
        assert_eq!(fields(&one).first().unwrap(), "net.ipv4.ip_forward | sysctl -w net.ipv4.ip_forward=1");
    }
}
