//! nftables rules beside the data path: kube-proxy's conntrack rules, its DNAT rules, a network policy.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context, Result};

use super::Lab;
use crate::manifests::Service;
use crate::netns::Netns;

impl Lab {
    /// What kube-proxy's forward and input chains do: invalid to conntrack is dropped, the rest goes on.
    pub(super) fn conntrack_rules(&self, node: &Netns) -> Result<()> {
        self.nft(node, CONNTRACK)
    }

    /// What kube-proxy writes for a Service: new connections to its VIPs go to one of its ready endpoints.
    /// The counter `vip` counts them.
    pub fn proxy_rules(&self, node: &Netns, service: &Service) -> Result<()> {
        let mut chains = String::new();
        let mut services = String::new();
        for (v, vip) in service.vips.iter().enumerate() {
            let family = if vip.is_ipv4() { "ip" } else { "ip6" };
            for port in &service.ports {
                let protocol = port.protocol.to_lowercase();
                let ready = service.endpoints.iter().filter(|endpoint| endpoint.ready);
                let addresses: Vec<_> = ready
                    .filter_map(|e| e.addresses.iter().find(|addr| addr.is_ipv4() == vip.is_ipv4()).copied())
                    .collect();
                let mut choice = String::new();
                for (e, addr) in addresses.iter().enumerate() {
                    let chain = format!("ep-{v}-{protocol}-{}-{e}", port.port);
                    let to = std::net::SocketAddr::new(*addr, port.target);
                    writeln!(
                        chains,
                        "  chain {chain} {{ meta l4proto {protocol} counter name vip dnat {family} to {to}; }}"
                    )?;
                    write!(choice, "{}{e} : goto {chain}", if e == 0 { "" } else { ", " })?;
                }
                writeln!(
                    services,
                    "    {family} daddr {vip} {protocol} dport {} numgen random mod {} vmap {{ {choice} }}",
                    port.port,
                    addresses.len()
                )?;
            }
        }
        self.nft(
            node,
            &format!(
                "table inet proxy {{\n  counter vip {{ }}\n{chains}  chain prerouting {{\n    type nat hook prerouting \
                 priority dstnat; policy accept;\n{services}  }}\n}}\n"
            ),
        )
    }

    /// A network policy as a CNI without eBPF writes it: this pod hears nothing from the client's net.
    /// The counter `denied` counts what it stopped.
    pub fn deny_rules(&self, node: &Netns, pod: &[IpAddr]) -> Result<()> {
        let mut rules = String::new();
        for addr in pod {
            let (family, client) = if addr.is_ipv4() { ("ip", "198.18.0.0/24") } else { ("ip6", "2001:db8::/64") };
            writeln!(rules, "    {family} saddr {client} {family} daddr {addr} counter name denied drop")?;
        }
        self.nft(
            node,
            &format!(
                "table inet netpol {{\n  counter denied {{ }}\n  chain forward {{\n    type filter hook forward priority \
                 filter; policy accept;\n{rules}  }}\n}}\n"
            ),
        )
    }

    /// A node hears and says nothing any more though its links are up, as one behind a switch whose kernel hangs.
    pub fn hang(&self, node: &Netns) -> Result<()> {
        let chain = |hook| format!("  chain {hook} {{ type filter hook {hook} priority -300; policy drop; }}\n");
        self.nft(node, &format!("table inet dead {{\n{}}}\n", ["input", "output", "forward"].map(chain).concat()))
    }

    /// Packets of a named counter in one of these tables.
    pub fn counter(&self, node: &Netns, table: &str, name: &str) -> Result<u64> {
        let text = node.exec(&format!("nft list counter inet {table} {name}"))?;
        let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
        words.nth(1).and_then(|word| word.parse().ok()).with_context(|| format!("no packets in {text}"))
    }

    fn nft(&self, node: &Netns, rules: &str) -> Result<()> {
        let path = self.folder.path().join("rules.nft");
        std::fs::write(&path, rules)?;
        node.exec(&format!("nft -f {}", path.display()))?;
        Ok(())
    }
}

const CONNTRACK: &str = "
table inet kube-proxy {
  chain filter-forward {
    type filter hook forward priority 0; policy accept;
    ct state invalid drop
    ct state new,established,related accept
  }
  chain filter-input {
    type filter hook input priority 0; policy accept;
    ct state invalid drop
  }
}
";
