//! Traffic through the VIP: sizes, families, hooks, rules beside it, drops with reasons.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::manifests::Port;

/// The lab carries packets without any agent: what fails elsewhere is not the lab.
#[test]
fn lab_alone() -> Result<()> {
    let mut options = Options::new("xdp").nft(true);
    options.nodes = 2;
    let lab = Lab::build(options)?;
    for pod in lab.nodes.iter().flat_map(|node| &node.pods) {
        for addr in &pod.addresses {
            let to = SocketAddr::new(*addr, 8080);
            let mut conn = Conn::open(&lab.client, to)?;
            conn.echo(20_000)?;
            conn.bulk(1_000_000)?;
            ensure!(conn.http()? == pod.name && conn.ask("NAME")? == pod.name, "another pod answered at {to}");
            clients::udp(&lab.client, to, 100)?;
            let running = clients::LongLived::start(&lab.client, to, 1)?;
            purelb_tests::sys::pause(200);
            ensure!(running.ended() == 0 && running.finish()? == 3, "a long-lived connection is missing");
        }
    }
    Ok(())
}

/// TCP of 100 B and 20 kB, bulk both ways, HTTP keep-alive and UDP, v4 and v6; every endpoint gets clients.
fn traffic(options: Options) -> Result<()> {
    let mut options = options;
    options.pods = 3;
    let lab = Lab::start(options)?;
    lab.apply(&lab.web()?)?;
    for to in lab.targets(80)? {
        let mut conn = Conn::open(&lab.client, to)?;
        for length in [100, 20_000] {
            conn.echo(length)?;
        }
        let client = conn.local()?.ip().to_string();
        ensure!(conn.ask("PEER")? == client, "the pod must see the client's own address");
        conn.bulk(4_000_000)?;
        let name = conn.ask("NAME")?;
        for _ in 0..3 {
            ensure!(conn.http()? == name, "HTTP keep-alive moved to another pod");
        }
        let found = clients::spread(&lab.client, to, 60)?;
        ensure!(found.len() == 3, "not every endpoint got TCP clients: {found:?}");
        let mut pods = BTreeSet::new();
        for _ in 0..60 {
            let (pod, peer) = clients::udp(&lab.client, to, 100)?;
            ensure!(peer.to_string() == client, "the pod saw {peer} as UDP client");
            pods.insert(pod);
        }
        ensure!(pods.len() == 3, "not every endpoint got UDP clients: {pods:?}");
        clients::udp(&lab.client, to, 1_200)?;
    }
    Ok(())
}

#[test]
fn t1_xdp() -> Result<()> {
    traffic(Options::new("xdp"))
}

#[test]
fn t1_xdp_beside_conntrack() -> Result<()> {
    traffic(Options::new("xdp").nft(true))
}

#[test]
fn t1_tcx() -> Result<()> {
    traffic(Options::new("tcx"))
}

#[test]
fn t1_tcx_beside_conntrack() -> Result<()> {
    traffic(Options::new("tcx").nft(true))
}

#[test]
fn t7_xdp_generic() -> Result<()> {
    traffic(Options::new("xdp-generic"))
}

#[test]
fn t10_partial_checksums_tcx() -> Result<()> {
    let mut options = Options::new("tcx").nft(true);
    options.offload = true;
    traffic(options)
}

/// On veth links with offload `auto` must choose tcx by itself.
#[test]
fn t10_partial_checksums_auto() -> Result<()> {
    let mut options = Options::new("auto");
    options.offload = true;
    traffic(options)
}

fn refused(lab: &Lab, to: SocketAddr) -> bool {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    Conn::open_within(&lab.client, any, to, Duration::from_millis(600)).is_err()
}

fn unknown_port(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook))?;
    lab.apply(&lab.web()?)?;
    // A server of the node itself that listens everywhere: the VIP must not expose it.
    let node = &lab.nodes[0];
    let exposed = purelb_tests::servers::start(&node.netns, "the node itself", &[22])?;
    for vip in VIPS {
        let before = node.agent.dropped("unknown-port")?;
        for port in [1, 22, 81, 443, 65_535] {
            let to = SocketAddr::new(vip.parse()?, port);
            ensure!(refused(&lab, to), "{to} was answered, though no Service has it");
        }
        let counted = node.agent.dropped("unknown-port")? - before;
        ensure!(counted >= 5, "only {counted} packets counted as unknown-port for {vip}");
        clients::spread(&lab.client, SocketAddr::new(vip.parse()?, 80), 3)?;
    }
    drop(exposed);
    Ok(())
}

#[test]
fn unknown_port_xdp() -> Result<()> {
    unknown_port("xdp")
}

#[test]
fn unknown_port_tcx() -> Result<()> {
    unknown_port("tcx")
}

fn source_ranges(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook))?;
    let mut web = lab.web()?;
    web.ranges = vec!["198.18.0.0/30".into(), "10.0.0.0/8".into(), "2001:db8::/126".into()];
    lab.apply(&web)?;
    for (to, outside) in lab.targets(80)?.into_iter().zip(["198.18.0.77", "2001:db8::77"]) {
        let length = if to.is_ipv4() { 24 } else { 64 };
        let nodad = if to.is_ipv4() { "" } else { "nodad" };
        lab.client.ip(&format!("address add {outside}/{length} dev eth0 {nodad}"))?;
        let inside: IpAddr = if to.is_ipv4() { "198.18.0.2".parse()? } else { "2001:db8::2".parse()? };
        Conn::open_from(&lab.client, SocketAddr::new(inside, 0), to)?.echo(100)?;
        let from = SocketAddr::new(outside.parse()?, 0);
        let before = lab.nodes[0].agent.dropped("source-range")?;
        ensure!(
            Conn::open_within(&lab.client, from, to, Duration::from_millis(600)).is_err(),
            "{outside} is outside the ranges and was served"
        );
        ensure!(lab.nodes[0].agent.dropped("source-range")? > before, "no source-range drop counted for {outside}");
    }
    Ok(())
}

#[test]
fn source_ranges_xdp() -> Result<()> {
    source_ranges("xdp")
}

#[test]
fn source_ranges_tcx() -> Result<()> {
    source_ranges("tcx")
}

/// 80 and 443 lead to one pod port: the same client port towards both must not mix the replies.
fn two_ports_one_target(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook).nft(true))?;
    let mut web = lab.web()?;
    web.ports.push(Port::new("https", 443, 8080, "TCP"));
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        for client_port in 41_000..41_020 {
            let own = if to.is_ipv4() { "198.18.0.2" } else { "2001:db8::2" };
            let from = SocketAddr::new(own.parse()?, client_port);
            let mut first = Conn::open_from(&lab.client, from, to)?;
            let mut second = Conn::open_from(&lab.client, from, SocketAddr::new(to.ip(), 443))?;
            first.echo(1_000)?;
            second.echo(1_000)?;
            drop(second);
            first.echo(1_000)?;
        }
    }
    Ok(())
}

#[test]
fn two_ports_one_target_xdp() -> Result<()> {
    two_ports_one_target("xdp")
}

#[test]
fn two_ports_one_target_tcx() -> Result<()> {
    two_ports_one_target("tcx")
}

/// A client may speak to a pod itself and through the VIP; replies of each keep their source.
fn direct_beside_vip(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook).nft(true))?;
    lab.apply(&lab.web()?)?;
    for to in lab.targets(80)? {
        for pod in &lab.nodes[0].pods {
            let Some(addr) = pod.addresses.iter().find(|addr| addr.is_ipv4() == to.is_ipv4()) else { continue };
            let mut through_vip = Conn::open(&lab.client, to)?;
            let mut direct = Conn::open(&lab.client, SocketAddr::new(*addr, 8080))?;
            for _ in 0..3 {
                direct.echo(2_000)?;
                through_vip.echo(2_000)?;
            }
            ensure!(direct.ask("NAME")? == pod.name, "a direct connection reached another pod");
        }
    }
    Ok(())
}

#[test]
fn direct_beside_vip_xdp() -> Result<()> {
    direct_beside_vip("xdp")
}

#[test]
fn direct_beside_vip_tcx() -> Result<()> {
    direct_beside_vip("tcx")
}

fn iperf(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook))?;
    let mut web = lab.web()?;
    web.endpoints.truncate(1);
    web.ports = vec![Port::new("iperf", 5201, 5201, "TCP")];
    lab.apply(&web)?;
    let mut server =
        lab.nodes[0].pods[0].netns.command("iperf3").args(["-s", "-1"]).stdout(std::process::Stdio::null()).spawn()?;
    purelb_tests::sys::pause(300);
    let result = lab.client.exec(&format!("iperf3 -c {} -p 5201 -t 1 -P 2", VIPS[0]));
    if result.is_err() {
        server.kill()?;
    }
    server.wait()?;
    result.map(|_| ())
}

#[test]
fn iperf3_xdp() -> Result<()> {
    iperf("xdp")
}

#[test]
fn iperf3_tcx() -> Result<()> {
    iperf("tcx")
}
