//! Several uplinks: replies that leave elsewhere than the request came, and routes that change under load.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::Load;
use purelb_tests::{each_hook, each_hook_and_rules, sys};

fn two(options: Options, interfaces: &[&str]) -> Options {
    Options { uplinks: 2, interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(), ..options }
}

fn check(lab: &Lab, what: &str) -> Result<()> {
    for to in lab.targets(80)? {
        let once = || -> Result<()> {
            let mut conn = Conn::open(&lab.client, to)?;
            conn.echo(20_000)?;
            conn.bulk(1_000_000)?;
            clients::udp(&lab.client, to, 500)?;
            ensure!(clients::spread(&lab.client, to, 45)?.len() == 3, "not every pod got clients");
            Ok(())
        };
        once().with_context(|| format!("{to}, {what}"))?;
    }
    Ok(())
}

/// Both are uplinks: every combination of way in and way out, then all changes of them under load.
fn both_are_uplinks(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(two(options, &["eth0", "eth1"]))?;
    let ways = [(0, 1), (1, 0), (1, 1), (0, 0)];
    for (arrive, leave) in ways {
        lab.arrive_by(1, arrive)?;
        lab.leave_by(1, leave)?;
        check(&lab, &format!("in by eth{arrive}, out by eth{leave}"))?;
    }
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    for (arrive, leave) in ways {
        lab.arrive_by(1, arrive)?;
        lab.leave_by(1, leave)?;
        sys::pause(150);
    }
    load.finish()
}

/// Requests come by the only uplink, replies leave by another interface, to which the default route leads.
fn exit_by_default_route(options: Options) -> Result<()> {
    let mut lab = Lab::build(two(options, &["eth0"]))?;
    lab.leave_by(1, 1)?;
    lab.run()?;
    lab.apply(&lab.web()?)?;
    check(&lab, "in by eth0, out by eth1, which is no uplink")
}

/// The way out moves to an interface that is no uplink, while connections run.
fn exit_appears(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(two(options, &["eth0"]))?;
    check(&lab, "in and out by eth0")?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    for leave in [1, 0, 1] {
        lab.leave_by(1, leave)?;
        sys::pause(150);
    }
    check(&lab, "in by eth0, out by eth1 now, which is no uplink")?;
    load.finish()
}

/// A client on the link of an interface that is no uplink: its replies leave there through no gateway.
fn exit_on_link(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(two(options, &["eth0"]))?;
    for (to, near) in lab.targets(80)?.into_iter().zip(["198.18.151.1", "2001:db8:151::1"]) {
        // The router itself is the client: its packets to the VIP reach the node by eth0.
        let from = SocketAddr::new(near.parse::<IpAddr>()?, 0);
        let mut conn =
            Conn::open_from(&lab.router, from, to).with_context(|| format!("from {near}, on eth1's link"))?;
        conn.echo(20_000)?;
    }
    Ok(())
}

/// Uplinks are those with a default route, and that goes for a moment as a routing session ends, then moves for good
/// while requests come the old way: connections notice nothing.
fn default_route_flaps(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(two(options, &[]))?;
    let node = &lab.nodes[0];
    // Replies have a way all the time, those of the stack to packets that no program took too.
    node.netns.ip("route add 198.18.0.0/24 via 198.18.101.1")?;
    node.netns.ip("-6 route add 2001:db8::/64 via 2001:db8:101::1")?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    node.netns.ip("route del default")?;
    node.netns.ip("-6 route del default")?;
    sys::pause(300);
    lab.leave_by(1, 0)?;
    sys::pause(300);
    lab.leave_by(1, 1)?;
    node.agent.wait_uplink("eth1", &format!("{} attached", lab.hook()))?;
    check(&lab, "in by eth0, default route by eth1")?;
    lab.arrive_by(1, 1)?;
    sys::pause(150);
    load.finish()
}

/// A bridge over the uplink, as virtual machine hosts have it. `nf`: bridged packets pass through conntrack
/// before they reach the bridge itself (br_netfilter), so that only the port is early enough to rewrite them.
fn bridge(interfaces: &[&str], nf: &str) -> Result<()> {
    let mut lab = Lab::build(Options {
        interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
        ..Options::new("auto").nft(true)
    })?;
    let node = &lab.nodes[0];
    node.netns.ip("link add br0 type bridge")?;
    node.netns.sysctl("net.bridge.bridge-nf-call-iptables", nf)?;
    node.netns.sysctl("net.bridge.bridge-nf-call-ip6tables", nf)?;
    node.netns.ip("link set br0 up")?;
    for (addr, length) in node.addresses.iter().zip(["24", "64 nodad"]) {
        node.netns.ip(&format!("address flush dev eth0 to {addr}"))?;
        node.netns.ip(&format!("address add dev br0 {addr}/{length}"))?;
    }
    node.netns.ip("link set eth0 master br0")?;
    lab.leave_by(1, 0)?;
    lab.run()?;
    lab.apply(&lab.web()?)?;
    check(&lab, &format!("a bridge over eth0, uplinks {interfaces:?}"))?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    sys::pause(500);
    load.finish()
}

#[test]
fn bridge_is_the_uplink() -> Result<()> {
    bridge(&["br0"], "0")
}

#[test]
fn bridge_and_its_port_are_uplinks() -> Result<()> {
    bridge(&["eth0", "br0"], "0")?;
    bridge(&["eth0", "br0"], "1")
}

each_hook! { default_route_flaps }
each_hook_and_rules! { both_are_uplinks exit_by_default_route exit_appears exit_on_link }
