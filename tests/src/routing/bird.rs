//! BIRD 2: one daemon for everything.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use super::{DEVICE, HOLD, RESTART, Role, Start, write};

pub(super) fn configure(folder: &Path, role: &Role) -> Result<()> {
    let mut out = format!("log stderr all;\nrouter id {};\nprotocol device {{ scan time 1; }}\n", role.id);
    let policy = if role.announces {
        writeln!(out, "protocol direct {{ ipv4; ipv6; interface \"{DEVICE}\"; }}")?;
        "import none; export where source = RTS_DEVICE;"
    } else {
        for family in ["ipv4", "ipv6"] {
            writeln!(out, "protocol kernel {{ {family} {{ import none; export all; }}; merge paths on; }}")?;
        }
        "import all; export none;"
    };
    let graceful = if role.graceful { format!("on; graceful restart time {RESTART}") } else { "off".to_owned() };
    writeln!(
        out,
        "template bgp peer {{\n  local as {};\n  hold time {HOLD}; keepalive time 1;\n  connect delay time 1; connect \
         retry time 1; error wait time 1, 1;\n  graceful restart {graceful};\n}}",
        role.own
    )?;
    for (number, peer) in role.peers.iter().enumerate() {
        let family = if peer.is_ipv4() { "ipv4" } else { "ipv6" };
        writeln!(
            out,
            "protocol bgp peer{number} from peer {{ neighbor {peer} as {}; {family} {{ {policy} }}; }}",
            role.other
        )?;
    }
    write(&folder.join("bird.conf"), &out)
}

pub(super) fn programs(folder: &Path) -> Vec<Start> {
    let path = |name: &str| folder.join(name).display().to_string();
    let args = ["-f".to_owned(), "-c".to_owned(), path("bird.conf"), "-s".to_owned(), path("ctl")];
    let args = args.into_iter().chain(["-P".to_owned(), path("pid")]).collect();
    vec![Start { program: "bird", args, socket: folder.join("ctl") }]
}
