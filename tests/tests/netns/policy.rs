//! What must not get through: policies of the node beside the data path (P1 and P4 of the correctness
//! matrix), ports that no Service has, sources outside the ranges.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use purelb_tests::clients::{self, Conn, any};
use purelb_tests::lab::{Lab, Options, VIPS, endpoint};
use purelb_tests::manifests::Service;
use purelb_tests::{each_hook, each_hook_and_rules, servers, sys};

/// How long a client waits that shall not be answered.
const REFUSED: Duration = Duration::from_millis(500);

fn refused(lab: &Lab, to: SocketAddr) -> bool {
    let udp = || -> Result<_> {
        let socket = lab.client.enter(move || UdpSocket::bind(any(to)))??;
        clients::udp_within(&socket, to, 10, REFUSED)
    };
    Conn::open_within(&lab.client, any(to), to, REFUSED).is_err() && udp().is_err()
}

/// The same Service with the lab's first pod alone, and another at port 81 with the second.
fn one_each(lab: &Lab) -> Result<[Service; 2]> {
    let mut services = [lab.web()?, lab.web()?];
    for ((service, pod), port) in services.iter_mut().zip(&lab.nodes[0].pods).zip([80, 81]) {
        service.name = format!("web{port}");
        service.endpoints = vec![endpoint(&lab.nodes[0], pod)];
        service.ports.iter_mut().for_each(|one| one.port = port);
        lab.apply(service)?;
    }
    Ok(services)
}

/// The first pod is closed to the client, the second is not; an open connection ends as well.
fn closed(lab: &Lab, close: impl FnOnce() -> Result<()>) -> Result<()> {
    one_each(lab)?;
    let mut open = Vec::new();
    for to in lab.targets(80)? {
        let mut conn = Conn::open(&lab.client, to)?;
        conn.echo(100)?;
        open.push(conn);
    }
    close()?;
    for (to, mut conn) in lab.targets(80)?.into_iter().zip(open) {
        ensure!(refused(lab, to), "{to} leads to a pod that is closed to the client, and was answered");
        ensure!(conn.ask_within("NAME", REFUSED).is_err(), "an open connection to {to} went on");
    }
    for to in lab.targets(81)? {
        clients::spread(&lab.client, to, 5)?;
        clients::udp(&lab.client, to, 100)?;
    }
    Ok(())
}

/// P1: netfilter drops client -> pod in the forward chain.
fn p1_forward_drop(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(2))?;
    let node = &lab.nodes[0];
    closed(&lab, || lab.deny_rules(&node.netns, &node.pods[0].addresses))?;
    // TCP and UDP of both families.
    let denied = lab.counter(&node.netns, "netpol", "denied")?;
    ensure!(denied >= 4, "the policy stopped only {denied} packets: something else did");
    Ok(())
}

/// P4: a tc program at the egress of the pod's device drops.
fn p4_tc_egress_drop(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(2))?;
    let node = &lab.nodes[0];
    let program = node.agent.bpf_root().join("lab-drop");
    closed(&lab, || {
        sys::pin_program(sys::Kind::TcDrop, &program)?;
        node.netns.exec("tc qdisc add dev pod0 clsact")?;
        node.netns.exec(&format!("tc filter add dev pod0 egress bpf da pinned {}", program.display()))?;
        Ok(())
    })
}

fn unknown_port(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    // A server of the node itself that listens everywhere: the VIP must not expose it.
    let node = &lab.nodes[0];
    let exposed = servers::start(&node.netns, "the node itself", &[22])?;
    for vip in VIPS {
        let before = node.agent.dropped("unknown-port")?;
        for port in [1, 22, 81, 65_535] {
            let to = SocketAddr::new(vip.parse()?, port);
            let outcome = Conn::open_within(&lab.client, any(to), to, REFUSED);
            ensure!(outcome.is_err(), "{to} was answered, though no Service has it");
        }
        let udp = SocketAddr::new(vip.parse()?, 22);
        ensure!(clients::udp(&lab.client, udp, 10).is_err(), "UDP {udp} was answered, though no Service has it");
        let counted = node.agent.dropped("unknown-port")? - before;
        ensure!(counted >= 5, "only {counted} packets counted as unknown-port for {vip}");
        clients::spread(&lab.client, SocketAddr::new(vip.parse()?, 80), 3)?;
    }
    drop(exposed);
    Ok(())
}

fn source_ranges(options: Options) -> Result<()> {
    let lab = Lab::start(options)?;
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
            Conn::open_within(&lab.client, from, to, REFUSED).is_err(),
            "{outside} is outside the ranges and was served"
        );
        ensure!(lab.nodes[0].agent.dropped("source-range")? > before, "no source-range drop counted for {outside}");
    }
    Ok(())
}

each_hook_and_rules! { p1_forward_drop p4_tc_egress_drop }
each_hook! { unknown_port source_ranges }
