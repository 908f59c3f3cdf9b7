//! FRR: zebra, which knows the kernel's addresses and routes, and bgpd.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use super::{DEVICE, HOLD, RESTART, Role, Start, write};

/// Where Debian's package has the daemons.
const DAEMONS: [&str; 2] = ["/usr/lib/frr/zebra", "/usr/lib/frr/bgpd"];

pub(super) fn configure(folder: &Path, role: &Role) -> Result<()> {
    // FRR 8.4 loses a member of a group of next hops whose link flaps; routes with their own next hops it keeps right.
    write(&folder.join("zebra.conf"), "no zebra nexthop kernel enable\n")?;
    write(&folder.join("bgpd.conf"), &bgpd(role)?)
}

fn bgpd(role: &Role) -> Result<String> {
    let graceful = if role.graceful {
        // That a node's kernel forwards on is what the announcement says, and what XDP does.
        format!(
            "bgp graceful-restart\n bgp graceful-restart restart-time {RESTART}\n bgp graceful-restart preserve-fw-state"
        )
    } else {
        "bgp graceful-restart-disable".to_owned()
    };
    let mut out = format!(
        "route-map none deny 10\n\
         route-map addresses permit 10\n match interface {DEVICE}\n \
         ! Redistributed routes have another origin than BIRD's, and paths of several origins are not equal.\n \
         set origin igp\n\
         router bgp {}\n bgp router-id {}\n no bgp ebgp-requires-policy\n bgp bestpath as-path multipath-relax\n \
         {graceful}\n \
         coalesce-time 10\n timers bgp 1 {HOLD}\n",
        role.own, role.id
    );
    for peer in &role.peers {
        writeln!(out, " neighbor {peer} remote-as {}", role.other)?;
        writeln!(out, " neighbor {peer} timers connect 1\n neighbor {peer} advertisement-interval 0")?;
    }
    for v4 in [true, false] {
        writeln!(out, " address-family {} unicast\n  maximum-paths 16", if v4 { "ipv4" } else { "ipv6" })?;
        if role.announces {
            writeln!(out, "  redistribute connected route-map addresses")?;
        }
        for peer in &role.peers {
            if peer.is_ipv4() == v4 {
                let side = if role.announces { "in" } else { "out" };
                writeln!(out, "  neighbor {peer} activate\n  neighbor {peer} route-map none {side}")?;
            } else if v4 {
                writeln!(out, "  no neighbor {peer} activate")?;
            }
        }
        writeln!(out, " exit-address-family")?;
    }
    Ok(out)
}

pub(super) fn programs(folder: &Path) -> Vec<Start> {
    let path = |name: &str| folder.join(name).display().to_string();
    let of = |program: &'static str| {
        let name = program.rsplit('/').next().unwrap_or_default();
        let config = path(&format!("{name}.conf"));
        let pid = path(&format!("{name}.pid"));
        let (routes, shells) = (path("zserv.api"), folder.display().to_string());
        // Of the group that may speak to it by vtysh, which root is not a member of; no port for telnet.
        let args = [
            "-f",
            &config,
            "-i",
            &pid,
            "-z",
            &routes,
            "--vty_socket",
            &shells,
            "-u",
            "root",
            "-g",
            "frrvty",
            "-P",
            "0",
        ];
        let args = args.into_iter().chain(["--log", "stdout"]).map(str::to_owned).collect();
        Start { program, args, socket: folder.join(format!("{name}.vty")) }
    };
    DAEMONS.into_iter().map(of).collect()
}
