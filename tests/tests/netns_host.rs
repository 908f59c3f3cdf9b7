//! The node's own traffic and neighbour discovery beside a VIP.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use purelb_tests::clients::{self, Conn, LongLived};
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::{servers, sys};

/// A connection that the node itself opens from the VIP gets its replies.
fn own_connection(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook).nft(true))?;
    lab.apply(&lab.web()?)?;
    let far = servers::start(&lab.client, "client", &[9999])?;
    for (vip, peer) in VIPS.into_iter().zip(["198.18.0.2", "2001:db8::2"]) {
        let from = SocketAddr::new(vip.parse()?, 0);
        let mut conn = Conn::open_from(&lab.nodes[0].netns, from, SocketAddr::new(peer.parse()?, 9999))?;
        conn.echo(20_000)?;
        ensure!(conn.ask("PEER")? == vip, "the connection did not come from the VIP");
        clients::spread(&lab.client, SocketAddr::new(vip.parse()?, 80), 6)?;
    }
    drop(far);
    Ok(())
}

#[test]
fn own_connection_xdp() -> Result<()> {
    own_connection("xdp")
}

#[test]
fn own_connection_tcx() -> Result<()> {
    own_connection("tcx")
}

/// An IPv6 VIP on the link itself (PureLB's local mode) stays reachable though its neighbour entry expires each second.
fn neighbour_timers(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook))?;
    lab.apply(&lab.web()?)?;
    let vip = VIPS[1];
    let node = &lab.nodes[0].netns;
    node.ip(&format!("address del {vip}/128 dev kube-lb0"))?;
    node.ip(&format!("address add {vip}/128 dev eth0 nodad"))?;
    lab.router.ip("-6 route replace 2001:db8:ffff::/64 dev node1")?;
    for (key, value) in [("base_reachable_time_ms", "1000"), ("delay_first_probe_time", "1"), ("gc_stale_time", "1")] {
        lab.router.sysctl(&format!("net.ipv6.neigh.node1.{key}"), value)?;
    }
    let to = SocketAddr::new(vip.parse()?, 80);
    let running = LongLived::start(&lab.client, to, 2)?;
    for _ in 0..20 {
        clients::spread(&lab.client, to, 3)?;
        sys::pause(1_000);
        // As if nobody had answered: the next packet asks again.
        lab.router.ip("-6 neighbour flush dev node1")?;
    }
    ensure!(running.finish()? == 6, "a connection is missing");
    Ok(())
}

#[test]
fn neighbour_timers_xdp() -> Result<()> {
    neighbour_timers("xdp")
}

#[test]
fn neighbour_timers_tcx() -> Result<()> {
    neighbour_timers("tcx")
}
