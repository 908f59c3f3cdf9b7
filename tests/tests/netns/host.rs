//! The node's own traffic, sockets and addresses beside a VIP, and neighbour discovery.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options, POD_PORTS, VIPS};
use purelb_tests::load::LongLived;
use purelb_tests::manifests::Endpoint;
use purelb_tests::{each_hook, each_hook_and_rules, servers, sys};

const CLIENT: [&str; 2] = ["198.18.0.2", "2001:db8::2"];

/// What the node itself opens or asks from the VIP gets its replies: TCP and UDP.
fn own_traffic(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    let node = &lab.nodes[0].netns;
    let far = servers::start(&lab.client, "client", &[9999])?;
    for (vip, peer) in VIPS.into_iter().zip(CLIENT) {
        let (from, to) = (SocketAddr::new(vip.parse()?, 0), SocketAddr::new(peer.parse()?, 9999));
        let mut conn = Conn::open_from(node, from, to)?;
        conn.echo(20_000)?;
        conn.bulk(500_000)?;
        ensure!(conn.ask("PEER")? == vip, "the connection did not come from the VIP");
        let before = lab.nodes[0].agent.dropped("passed-own")?;
        let socket = node.enter(move || UdpSocket::bind(from))??;
        for _ in 0..3 {
            let (name, seen) = clients::udp_on(&socket, to, 200)?;
            ensure!(name == "client" && seen.to_string() == vip, "{name} saw {seen}, not the VIP");
        }
        ensure!(
            lab.nodes[0].agent.dropped("passed-own")? >= before + 3,
            "the answers were not counted as the node's own"
        );
        clients::spread(&lab.client, SocketAddr::new(vip.parse()?, 80), 6)?;
    }
    drop(far);
    Ok(())
}

/// An endpoint that is the node's own address (a pod with hostNetwork), alone and beside a pod.
fn host_network(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(1))?;
    let node = &lab.nodes[0];
    let own = servers::start(&node.netns, "host", &POD_PORTS)?;
    let mut web = lab.web()?;
    let pod = web.endpoints.clone();
    let host = Endpoint { pod: "host".to_owned(), addresses: node.addresses.clone(), ..pod[0].clone() };
    web.endpoints = vec![host.clone()];
    lab.apply(&web)?;
    let mut running = Vec::new();
    for (to, addr) in lab.targets(80)?.into_iter().zip(&node.addresses) {
        let mut conn = Conn::open(&lab.client, to)?;
        ensure!(conn.ask("NAME")? == "host", "another than the host answered");
        ensure!(conn.ask("PEER")? == conn.local()?.ip().to_string(), "the client's address was not kept");
        conn.echo(20_000)?;
        conn.bulk(2_000_000)?;
        ensure!(clients::udp(&lab.client, to, 1_000)?.0 == "host", "another than the host answered by UDP");
        // The node's own address is served as ever, beside it.
        let mut direct = Conn::open(&lab.client, SocketAddr::new(*addr, POD_PORTS[0]))?;
        direct.echo(2_000)?;
        conn.echo(2_000)?;
        running.push(LongLived::start(&lab.client, to, 2)?);
    }
    web.endpoints = [vec![host], pod].concat();
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 2 && found.contains_key("host"), "pod and host together: {found:?}");
        running.push(LongLived::start(&lab.client, to, 3)?);
    }
    sys::pause(200);
    for one in running {
        one.finish()?;
    }
    drop(own);
    Ok(())
}

/// A VIP that is a Node's address is never judged, and reported.
fn vip_equal_to_node_address(options: Options) -> Result<()> {
    let (lab, mut web) = Lab::serving(options)?;
    let node = &lab.nodes[0];
    let own = servers::start(&node.netns, "node1", &[80, 7000])?;
    web.name = "taken".to_owned();
    web.vips = node.addresses.clone();
    let mut objects = vec![web.service()];
    objects.extend(web.slices());
    lab.write_objects("taken.yaml", &objects)?;
    for addr in &node.addresses {
        node.agent.wait_problem(&["default/taken", &addr.to_string()])?;
    }
    for addr in &node.addresses {
        // The Service's own port as well.
        for port in [80, 7000] {
            let to = SocketAddr::new(*addr, port);
            let found = clients::spread(&lab.client, to, 3)?;
            ensure!(found.contains_key("node1"), "the node's own address was judged: {found:?}");
            ensure!(clients::udp(&lab.client, to, 10)?.0 == "node1", "UDP to the node's own address was judged");
        }
    }
    for to in lab.targets(80)? {
        ensure!(clients::spread(&lab.client, to, 45)?.len() == 3, "the other Service suffers");
    }
    drop(own);
    Ok(())
}

/// An IPv6 VIP on the link itself (PureLB's local mode) stays reachable though its neighbour entry expires each second.
fn neighbour_timers(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    let vip = VIPS[1];
    let node = &lab.nodes[0].netns;
    node.ip(&format!("address del {vip}/128 dev kube-lb0"))?;
    node.ip(&format!("address add {vip}/128 dev eth0 nodad"))?;
    lab.router.ip("-6 route replace 2001:db8:ffff::/64 dev node1")?;
    for (key, value) in [("base_reachable_time_ms", "1000"), ("delay_first_probe_time", "1"), ("gc_stale_time", "1")] {
        lab.router.sysctl(&format!("net.ipv6.neigh.node1.{key}"), value)?;
    }
    let to = SocketAddr::new(vip.parse::<IpAddr>()?, 80);
    let running = LongLived::start(&lab.client, to, 2)?;
    for second in 0..60 {
        clients::spread(&lab.client, to, 3).with_context(|| format!("in second {second}"))?;
        sys::pause(1_000);
        // As if nobody had answered: the next packet asks again.
        lab.router.ip("-6 neighbour flush dev node1")?;
    }
    ensure!(running.finish()? == 6, "a connection is missing");
    Ok(())
}

/// A minute, for both hooks at once: nearly all of it is waiting.
#[test]
fn neighbour_timers_for_a_minute() -> Result<()> {
    let tcx = thread::spawn(|| neighbour_timers(Options::new("tcx")).context("tcx"));
    let xdp = neighbour_timers(Options::new("xdp")).context("xdp");
    tcx.join().map_err(|_| anyhow!("the other lab panicked"))?.and(xdp)
}

/// With the capabilities of `deploy/overlays/minimal-privilege` everything works, and without one of them it does not.
fn few_capabilities(options: Options) -> Result<()> {
    let overlay = include_str!("../../../deploy/overlays/minimal-privilege/lbnodeagent.yaml");
    let overlay: serde_json::Value = serde_yaml_ng::from_str(overlay)?;
    let added = overlay.pointer("/spec/template/spec/containers/0/securityContext/capabilities/add");
    let added = added.and_then(serde_json::Value::as_array).context("the overlay adds no capabilities")?;
    let names: Vec<_> = added.iter().filter_map(serde_json::Value::as_str).collect();
    for missing in &names {
        let mut lab = Lab::build(options.clone())?;
        lab.write_base()?;
        let rest: Vec<_> = names.iter().filter(|name| *name != missing).copied().collect();
        lab.nodes[0].agent.confine(&rest);
        lab.nodes[0].agent.start()?;
        ensure!(lab.nodes[0].agent.wait_ready().is_err(), "{missing} is not needed");
    }
    let mut lab = Lab::build(options)?;
    lab.nodes[0].agent.confine(&names);
    lab.run()?;
    let web = lab.web()?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        ensure!(clients::spread(&lab.client, to, 45)?.len() == 3, "not every pod answers");
    }
    ensure!(lab.nodes[0].agent.problems()? == "[]", "{}", lab.nodes[0].agent.problems()?);
    Ok(())
}

each_hook_and_rules! { own_traffic host_network }
each_hook! { few_capabilities vip_equal_to_node_address }
