//! Local addresses: one node has each, whatever fails, and soon after a fault one has it again. Invariant I16.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::answers::{Answers, claim};
use purelb_tests::lab::{Node, Options};
use purelb_tests::lan::{Lan, TAKE_OVER, VIPS, entry, has, ips, mac, never_two, object, signal};
use purelb_tests::manifests::{Service, remote_group};
use purelb_tests::routing::watch::Watch;
use purelb_tests::{lan, sys};
use serde_json::json;

/// Writes of Leases that an agent asked for.
const RENEWALS: &str = "purelb_election_lease_renewals_total";

/// A running lab with a Service that is answered for.
fn serving(nodes: u16) -> Result<Lan> {
    Lan::serving(nodes, "5s", Options::new("xdp"))
}

fn proven(answers: &Answers, limit: Duration) -> Result<()> {
    lan::proven(answers, &ips()?, limit)
}

#[test]
fn one_of_three() -> Result<()> {
    let lan = serving(3)?;
    let asker = lan.ask()?;
    sys::pause(500);
    // What somebody takes away comes back, and what somebody else put there stays.
    let ip: IpAddr = VIPS[0].parse()?;
    let node = lan.owner(ip, &[])?;
    node.netns.ip("address add 198.18.50.99/24 dev lan0")?;
    node.netns.ip(&format!("address del {ip}/24 dev lan0"))?;
    sys::wait_for("it is back", Duration::from_secs(5), || Ok(has(node, ip)))?;
    // A default route that flaps takes nothing with it.
    node.netns.ip("route del default")?;
    sys::pause(700);
    node.netns.ip("route add default via 198.18.50.1")?;
    sys::pause(1_500);
    let answers = asker.finish()?;
    ensure!(answers.owners(ip).len() == 1, "it moved: {:x?}", answers.owners(ip));
    proven(&answers, Duration::from_secs(3))?;
    lan.served()?;
    ensure!(has(node, "198.18.50.99".parse()?), "another's address is gone");
    let status = node.agent.query(&["status"])?;
    ensure!(status["election"]["members"] == 3 && status["election"]["addresses"][VIPS[0]] == "lan0", "{status}");
    let metrics = node.agent.page("/metrics")?.1;
    let announced =
        format!("purelb_lbnodeagent_announced{{service=\"default/web\",node=\"{}\",ip=\"{ip}\"}} 1", node.name);
    for line in [announced.as_str(), "purelb_election_member_count 3", "purelb_election_lease_healthy 1"] {
        ensure!(metrics.contains(line), "no {line} in {metrics}");
    }
    // The Service goes, and the address with it.
    std::fs::remove_file(lan.lab.manifests().join("web.yaml"))?;
    for ip in ips()? {
        sys::wait_for(&format!("nobody has {ip}"), Duration::from_secs(10), || {
            Ok(!lan.lab.nodes.iter().any(|node| has(node, ip)))
        })?;
    }
    Ok(())
}

/// Its links go down and its agent is killed; later it comes back as another of them.
#[test]
fn node_dies() -> Result<()> {
    let mut lan = serving(3)?;
    let asker = lan.ask()?;
    let ip: IpAddr = VIPS[0].parse()?;
    let dead = lan.index(ip)?;
    let name = lan.lab.nodes[dead].name.clone();
    lan.lab.nodes[dead].netns.ip("link set lan0 down")?;
    lan.lab.nodes[dead].agent.stop(Signal::SIGKILL)?;
    for ip in ips()? {
        lan.owner(ip, &[&name])?;
    }
    lan.served()?;
    sys::pause(500);
    proven(&asker.finish()?, TAKE_OVER)
}

/// Only its agent goes, and never comes back: the kernel would go on answering, but the fence ends that before another
/// node takes the address.
#[test]
fn agent_is_killed() -> Result<()> {
    let mut lan = serving(3)?;
    let asker = lan.ask()?;
    let ip: IpAddr = VIPS[0].parse()?;
    let dead = lan.index(ip)?;
    let name = lan.lab.nodes[dead].name.clone();
    lan.lab.nodes[dead].agent.stop(Signal::SIGKILL)?;
    for ip in ips()? {
        lan.owner(ip, &[&name])?;
    }
    ensure!(has(&lan.lab.nodes[dead], ip), "the dead agent's address is to be there still, or nothing is tested");
    sys::pause(500);
    let answers = asker.finish()?;
    proven(&answers, TAKE_OVER)?;
    ensure!(answers.owners(ip).first() == Some(&mac(&lan.lab.nodes[dead])?), "the dead one did not begin");
    lan.served()
}

/// Stopped half-way, and woken when another node has long taken over.
#[test]
fn agent_freezes() -> Result<()> {
    let lan = serving(3)?;
    let asker = lan.ask()?;
    let ip: IpAddr = VIPS[0].parse()?;
    let frozen = lan.owner(ip, &[])?;
    signal(frozen, Signal::SIGSTOP)?;
    lan.owner(ip, &[&frozen.name])?;
    signal(frozen, Signal::SIGCONT)?;
    sys::wait_for("the woken one lets go", Duration::from_secs(5), || Ok(!has(frozen, ip)))?;
    sys::pause(3_000);
    lan.owner(ip, &[])?;
    proven(&asker.finish()?, TAKE_OVER)?;
    lan.served()
}

/// For an upgrade: nothing moves, and nobody is without an answer.
#[test]
fn agent_is_upgraded() -> Result<()> {
    let mut lan = serving(3)?;
    let asker = lan.ask()?;
    for node in &mut lan.lab.nodes {
        node.agent.stop(Signal::SIGTERM)?;
    }
    sys::pause(6_000);
    for node in &mut lan.lab.nodes {
        node.agent.start()?;
    }
    lan.lab.nodes.iter_mut().try_for_each(|node| node.agent.wait_ready())?;
    sys::pause(8_000);
    let answers = asker.finish()?;
    proven(&answers, Duration::from_secs(1))?;
    for ip in ips()? {
        ensure!(answers.owners(ip).len() == 1, "{ip} moved: {:x?}", answers.owners(ip));
    }
    lan.served()
}

/// Somebody in the network says that both addresses are his, again and again: it is said once in ten seconds where they are,
/// and shown, and nothing moves.
#[test]
fn somebody_claims_it() -> Result<()> {
    let lan = serving(2)?;
    let asker = lan.ask()?;
    let liar = [2, 0, 0, 0, 0x66, 0x66];
    let claims = || ips()?.into_iter().try_for_each(|ip| claim(&lan.lab.router, "lan", ip, liar));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        claims()?;
        sys::pause(100);
    }
    for ip in ips()? {
        lan.owner(ip, &[])?.agent.wait_problem(&[&ip.to_string(), "02:00:00:00:66:66"])?;
    }
    // The time of a defence has passed for the first of them.
    while begin.elapsed() < Duration::from_millis(12_000) {
        sys::pause(100);
    }
    claims()?;
    sys::pause(1_500);
    lan.served()?;
    let answers = asker.finish()?;
    for ip in ips()? {
        let own = mac(lan.owner(ip, &[])?)?;
        let said = answers.all.iter().filter(|answer| answer.unasked && answer.ip == ip && answer.mac == own);
        let said: Vec<_> = said.map(|answer| answer.at.duration_since(begin)).collect();
        // A request and a reply, or an advertisement.
        let all = if ip.is_ipv4() { 4 } else { 2 };
        ensure!(said.len() == all, "{ip}: contradicted after {said:?}");
        // Ten, but for what the asker hears late.
        ensure!(said[all / 2] - said[0] >= Duration::from_secs(8), "{ip}: contradicted after {said:?}");
        ensure!(answers.owners(ip) == [own], "{ip}: {:x?}", answers.owners(ip));
    }
    proven(&answers, Duration::from_secs(5))
}

/// Without programs the kernel's lifetimes are the fence.
#[test]
fn without_data_path() -> Result<()> {
    let mut lan = serving(2)?;
    lan.lab.write_objects(
        "lbnodeagent.yaml",
        &[object("LBNodeAgent", "default", &json!({"datapath": {"mode": "off"}}))],
    )?;
    let ip: IpAddr = VIPS[0].parse()?;
    let dead = lan.index(ip)?;
    let name = lan.lab.nodes[dead].name.clone();
    sys::wait_for("the programs are gone", Duration::from_secs(20), || {
        Ok(lan.lab.nodes[dead].netns.ip("-d link show dev lan0").is_ok_and(|text| !text.contains("prog/xdp")))
    })?;
    sys::wait_for("the address will end by itself", Duration::from_secs(5), || {
        let own = entry(&lan.lab.nodes[dead], "lan0", ip);
        ensure!(own["valid_life_time"].as_u64().is_some_and(|seconds| seconds <= 5), "{own}");
        Ok(true)
    })?;
    let asker = lan.ask()?;
    sys::pause(300);
    lan.lab.nodes[dead].agent.stop(Signal::SIGKILL)?;
    lan.owner(ip, &[&name])?;
    ensure!(!has(&lan.lab.nodes[dead], ip), "it is there still");
    sys::pause(500);
    proven(&asker.finish()?, TAKE_OVER)
}

/// Lifetimes and flags as PureLB sets them, so that nobody takes a VIP for the node's address; and what neighbours are told,
/// or not where that is off.
#[test]
fn as_purelb_makes_it() -> Result<()> {
    for told in [true, false] {
        let lan = Lan::new(2, "5s", Options::new("xdp"))?;
        lan.announce(&json!({"garpConfig": {"enabled": told}}))?;
        let asker = lan.ask()?;
        lan.write()?;
        for ip in ips()? {
            let node = lan.owner(ip, &[])?;
            let found = entry(node, "lan0", ip);
            let valid = found["valid_life_time"].as_u64().context("a lifetime")?;
            ensure!((200..=300).contains(&valid) && found["noprefixroute"] == true, "{found}");
            ensure!(found["prefixlen"] == if ip.is_ipv4() { 24 } else { 64 }, "{found}");
            ensure!(ip.is_ipv4() || (found["deprecated"] == true && found["nodad"] == true), "{found}");
        }
        sys::pause(2_500);
        let answers = asker.finish()?;
        for ip in ips()? {
            let own = mac(lan.owner(ip, &[])?)?;
            let unasked: Vec<_> = answers.all.iter().filter(|a| a.unasked && a.ip == ip).map(|a| a.mac).collect();
            // Request and reply three times; an advertisement three times.
            let all = if ip.is_ipv4() { 6 } else { 3 };
            let good = unasked.len() == if told { all } else { 0 };
            ensure!(good && unasked.iter().all(|mac| *mac == own), "{ip}: {unasked:x?} of {own:x?}, told: {told}");
        }
    }
    Ok(())
}

/// An address of another interface's network is on no node until that interface is named, and goes when it is not any more.
#[test]
fn another_interface() -> Result<()> {
    let lan = Lan::new(2, "5s", Options::new("xdp"))?;
    let pool = json!({"pool": "198.18.101.200/31", "subnet": "198.18.101.0/24", "aggregation": "default"});
    lan.lab.write_objects("side.yaml", &[object("ServiceGroup", "side", &json!({"local": {"v4pool": pool}}))])?;
    let ip: IpAddr = "198.18.101.200".parse()?;
    let group = Some("side".to_owned());
    lan.write_as(&Service { vips: vec![ip], local: false, group, ..lan.lab.web()? })?;
    let on = |device: &str| lan.lab.nodes.iter().filter(|node| !entry(node, device, ip).is_null()).count();
    sys::pause(1_000);
    ensure!(on("eth0") + on("lan0") + on("kube-lb0") == 0, "somebody has it");
    lan.announce(&json!({"interfaces": ["eth0", "nothing"]}))?;
    sys::wait_for("the node with that network has it", TAKE_OVER, || Ok(on("eth0") == 1))?;
    ensure!(!entry(&lan.lab.nodes[0], "eth0", ip).is_null(), "it is on another node");
    lan.lab.nodes[0].agent.wait_problem(&["nothing", "spec.local.interfaces"])?;
    lan.announce(&json!({}))?;
    sys::wait_for("nobody has it", TAKE_OVER, || Ok(on("eth0") == 0))
}

/// A taint that evicts: what the agent has goes to others when it is stopped, and is not held for the next one.
#[test]
fn node_is_evicted() -> Result<()> {
    let mut lan = serving(3)?;
    let ip: IpAddr = VIPS[0].parse()?;
    let index = lan.index(ip)?;
    let name = lan.lab.nodes[index].name.clone();
    let nodes = lan.lab.nodes.iter().map(|of| {
        let mut node = purelb_tests::manifests::node(&of.name, &of.addresses);
        if of.name == name {
            node["spec"]["taints"] = json!([{"key": "maintenance", "effect": "NoExecute"}]);
        }
        node
    });
    lan.lab.write_objects("nodes.yaml", &nodes.collect::<Vec<_>>())?;
    let asker = lan.ask()?;
    sys::pause(2_000);
    ensure!(has(&lan.lab.nodes[index], ip), "a taint alone moves nothing");
    lan.lab.nodes[index].agent.stop(Signal::SIGTERM)?;
    lan.owner(ip, &[&name])?;
    ensure!(!has(&lan.lab.nodes[index], ip), "it is there still");
    sys::pause(500);
    proven(&asker.finish()?, Duration::from_secs(5))?;
    lan.served()
}

/// The cable is pulled while the agent and its way to the Leases are all right: others have the address at once, and the
/// node stands again when the link is back.
#[test]
fn link_goes_down() -> Result<()> {
    let lan = serving(3)?;
    let ip: IpAddr = VIPS[0].parse()?;
    let node = lan.owner(ip, &[])?;
    let asker = lan.ask()?;
    // Its other end, as when a switch dies.
    let port = format!("lan-{}", lan.index(ip)? + 1);
    lan.lab.router.ip(&format!("link set {port} down"))?;
    lan.owner(ip, &[&node.name])?;
    sys::wait_for("it is gone there", Duration::from_secs(5), || Ok(!has(node, ip)))?;
    sys::pause(1_000);
    lan.lab.router.ip(&format!("link set {port} up"))?;
    sys::wait_for("it stands again", TAKE_OVER, || {
        let status = node.agent.query(&["status"])?;
        Ok(status["election"]["members"] == 3 && status["election"]["subnets"][0] == "198.18.50.0/24")
    })?;
    sys::pause(2_000);
    lan.owner(ip, &[])?;
    proven(&asker.finish()?, Duration::from_secs(5))?;
    lan.served()
}

/// The owner's link flaps ten times, at odd times: afterwards one node has each address, what is announced by routing
/// protocols was never touched, and nobody wrote or said anything a thousand times.
#[test]
fn link_flaps() -> Result<()> {
    let lan = Lan::serving(2, "5s", Options { routed: true, ..Options::new("xdp") })?;
    let far = ["203.0.113.64", "2001:db8:ffff::40"];
    let v6 = ["2001:db8:ffff::40/124", "2001:db8:ffff::/64", "/128"];
    lan.lab.write_objects("pool.yaml", &[remote_group("far", ["203.0.113.64/28", "203.0.113.0/24", "/32"], v6)])?;
    lan.announce(&json!({"dummyInterface": "kube-lb0"}))?;
    let vips = far.iter().map(|ip| ip.parse().context("VIP")).collect::<Result<Vec<IpAddr>>>()?;
    let group = Some("far".to_owned());
    lan.lab.apply(&Service { name: "far".to_owned(), vips: vips.clone(), group, ..lan.lab.web()? })?;
    let announced = || lan.lab.nodes.iter().all(|node| vips.iter().all(|ip| !entry(node, "kube-lb0", *ip).is_null()));
    sys::wait_for("the remote addresses are on all nodes", Duration::from_secs(20), || Ok(announced()))?;
    // The kernel says of an IPv6 address that it is there a moment after it is.
    sys::pause(1_000);
    let watches = lan.lab.nodes.iter().map(|node| Watch::start(&node.netns)).collect::<Result<Vec<_>>>()?;
    let counts = || -> Result<Vec<(u64, usize)>> {
        let of = |node: &Node| Ok((node.agent.metric(RENEWALS)?, node.agent.log().lines().count()));
        lan.lab.nodes.iter().map(of).collect()
    };
    let (before, begin) = (counts()?, Instant::now());
    let asker = lan.ask()?;
    let port = format!("lan-{}", lan.index(VIPS[0].parse()?)? + 1);
    for down in [20, 900, 150, 60, 2_500, 10, 400, 1_300, 80, 300] {
        lan.lab.router.ip(&format!("link set {port} down"))?;
        sys::pause(down);
        lan.lab.router.ip(&format!("link set {port} up"))?;
        sys::pause(1_010 - down.min(1_000));
    }
    for node in &lan.lab.nodes {
        sys::wait_for(&format!("{} stands, and knows the other", node.name), TAKE_OVER, || {
            let status = node.agent.query(&["status"])?;
            let election = &status["election"];
            ensure!(election["members"] == 2 && election["subnets"][0] == "198.18.50.0/24", "{election}");
            Ok(true)
        })?;
    }
    // What one took while the other had no link goes back.
    sys::pause(7_000);
    for ip in ips()? {
        lan.owner(ip, &[])?;
    }
    lan.served()?;
    // Within a flap one may have it, the other, and the first again.
    let answers = asker.finish()?;
    never_two(&answers, &ips()?, Duration::from_millis(100))?;
    ensure!(answers.owners(VIPS[0].parse()?).len() > 2, "no flap moved it: nothing is tested");
    let took = begin.elapsed();
    for ((writes, lines), ((writes_before, lines_before), node)) in
        counts()?.into_iter().zip(before.into_iter().zip(&lan.lab.nodes))
    {
        let (writes, lines) = (writes - writes_before, lines - lines_before);
        println!("{}: {writes} writes of Leases and {lines} lines in {took:.1?}", node.name);
        // One a second keeps it alive; a flap may take some more.
        ensure!(writes < took.as_secs() + 100 && lines < 400, "{}: {writes} writes, {lines} lines", node.name);
    }
    ensure!(announced(), "the remote addresses are not everywhere any more");
    for watch in watches {
        let seen = watch.changes("kube-lb0")?;
        ensure!(seen.is_empty(), "remote addresses were touched: {seen:?}");
    }
    Ok(())
}

/// The label that keeps load balancers away from a node.
#[test]
fn node_is_excluded() -> Result<()> {
    let lan = serving(3)?;
    let ip: IpAddr = VIPS[0].parse()?;
    let node = lan.owner(ip, &[])?;
    let asker = lan.ask()?;
    sys::pause(300);
    lan.exclude(&node.name)?;
    let begin = Instant::now();
    lan.owner(ip, &[&node.name])?;
    println!("moved after {:?}", begin.elapsed());
    sys::pause(500);
    ensure!(!has(node, ip), "the excluded node has it still");
    proven(&asker.finish()?, Duration::from_secs(5))?;
    lan.served()
}
