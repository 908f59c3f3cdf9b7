//! What goes wrong beside the election: addresses that hang on others, interfaces that answer for others, processes that
//! end or stop half-way. Invariants I16, I18.

use std::fs::File;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::answers::Asker;
use purelb_tests::lab::{Lab, Node, Options};
use purelb_tests::lan::{Lan, TAKE_OVER, VIPS, entry, has, ips, mac, signal};
use purelb_tests::manifests::{Service, announcer, remote_group};
use purelb_tests::routing::watch::Watch;
use purelb_tests::sys;

fn promote(node: &Node, device: &str, on: bool) -> Result<()> {
    node.netns.sysctl("net.ipv4.conf.all.promote_secondaries", "0")?;
    node.netns.sysctl(&format!("net.ipv4.conf.{device}.promote_secondaries"), if on { "1" } else { "0" })
}

/// The node's own address in the common network.
fn own(node: &Node) -> Result<IpAddr> {
    format!("198.18.50.{}", 10 + node.name.trim_start_matches("node").parse::<u16>()?).parse().context("address")
}

fn second(node: &Node, ip: IpAddr) -> bool {
    entry(node, "lan0", ip)["secondary"] == true
}

/// The node's own address goes and comes back, as when a DHCP client begins anew, and stands behind the VIP, without its
/// route. The agent puts the VIP behind it; and neither that nor the end of the VIP takes it along, though the kernel is
/// not told to promote.
#[test]
fn own_address_comes_second() -> Result<()> {
    let lan = Lan::serving(1, "5s", Options::new("xdp"))?;
    let (node, ip): (_, IpAddr) = (&lan.lab.nodes[0], VIPS[0].parse()?);
    let own = own(node)?;
    promote(node, "lan0", true)?;
    signal(node, Signal::SIGSTOP)?;
    node.netns.ip(&format!("address del {own}/24 dev lan0"))?;
    node.netns.ip(&format!("address add {own}/24 dev lan0"))?;
    node.netns.ip("route replace default via 198.18.50.1 dev lan0 onlink")?;
    promote(node, "lan0", false)?;
    ensure!(second(node, own) && !second(node, ip), "the VIP is to be first, or nothing is tested");
    ensure!(!node.netns.ip("route show dev lan0")?.contains("198.18.50.0/24"), "there is a route");
    signal(node, Signal::SIGCONT)?;
    sys::wait_for("the VIP is behind", Duration::from_secs(10), || Ok(second(node, ip) && !second(node, own)))?;
    let routes = node.netns.ip("route show dev lan0")?;
    ensure!(routes.contains("198.18.50.0/24") && routes.contains("default"), "{routes}");
    lan.served()?;
    // What hangs on the node's own address goes with that, and comes when that is back; not before.
    node.netns.ip(&format!("address del {own}/24 dev lan0"))?;
    ensure!(!has(node, ip), "the kernel left it there");
    sys::pause(50);
    ensure!(!has(node, ip), "it came without the node's own address");
    node.netns.ip(&format!("address add {own}/24 dev lan0"))?;
    node.netns.ip("route replace default via 198.18.50.1")?;
    sys::wait_for("it is back", TAKE_OVER, || Ok(has(node, ip)))?;
    ensure!(second(node, ip) && !second(node, own), "it is in front");
    ensure!(node.netns.exec("sysctl -n net.ipv4.conf.lan0.promote_secondaries")?.trim() == "0", "it stays as it was");
    std::fs::remove_file(lan.lab.manifests().join("web.yaml"))?;
    sys::wait_for("the VIP is gone", Duration::from_secs(10), || Ok(!has(node, ip)))?;
    ensure!(has(node, own), "the node's own address is gone");
    Ok(())
}

/// An agent that is gone for good left a VIP before the node's own address: `cleanup` takes the one and not the other.
#[test]
fn cleanup_takes_only_ours() -> Result<()> {
    let mut lan = Lan::serving(1, "5s", Options::new("xdp"))?;
    let (own, ip): (_, IpAddr) = (own(&lan.lab.nodes[0])?, VIPS[0].parse()?);
    lan.lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let node = &lan.lab.nodes[0];
    promote(node, "lan0", true)?;
    node.netns.ip(&format!("address del {own}/24 dev lan0"))?;
    node.netns.ip(&format!("address add {own}/24 dev lan0"))?;
    promote(node, "lan0", false)?;
    ensure!(second(node, own) && !second(node, ip), "the VIP is to be first, or nothing is tested");
    node.agent.command(&["cleanup"], false)?;
    ensure!(!has(node, ip) && has(node, own), "the VIP is there, or the node's own address is not");
    Ok(())
}

/// Two remote addresses of one aggregate: the one that goes does not take the other along, not even for a moment.
#[test]
fn remote_address_goes_alone() -> Result<()> {
    let lab = Lab::start(Options { standalone: true, ..Options::new("xdp") })?;
    let node = &lab.nodes[0];
    promote(node, "kube-lb0", false)?;
    lab.write_objects("announce.yaml", &[announcer("kube-lb0")])?;
    let v6 = ["2001:db8:ffff::40/124", "2001:db8:ffff::/64", "default"];
    lab.write_objects("far.yaml", &[remote_group("far", ["203.0.113.64/28", "203.0.113.0/24", "default"], v6)])?;
    let vips: [IpAddr; 2] = ["203.0.113.64".parse()?, "203.0.113.65".parse()?];
    for (name, vip) in [("first", vips[0]), ("second", vips[1])] {
        let service = Service { name: name.to_owned(), vips: vec![vip], group: Some("far".to_owned()), ..lab.web()? };
        lab.place(&service)?;
        sys::wait_for("it is there", Duration::from_secs(10), || Ok(!entry(node, "kube-lb0", vip).is_null()))?;
    }
    ensure!(entry(node, "kube-lb0", vips[1])["secondary"] == true, "it is to hang on the other, or nothing is tested");
    let watch = Watch::start(&node.netns)?;
    std::fs::remove_file(lab.manifests().join("first.yaml"))?;
    sys::wait_for("it is gone", Duration::from_secs(10), || Ok(entry(node, "kube-lb0", vips[0]).is_null()))?;
    sys::pause(500);
    let deleted = watch.changes("Deleted")?;
    let gone = |ip: IpAddr| deleted.iter().any(|(_, line)| line.contains(&format!("inet {ip}/")));
    ensure!(gone(vips[0]), "the watch saw nothing: {deleted:?}");
    ensure!(!gone(vips[1]), "the other went too: {deleted:?}");
    ensure!(!entry(node, "kube-lb0", vips[1]).is_null(), "the other is not there");
    Ok(())
}

/// A second interface in the same network answers for what is on the first. That is named; and since no program keeps the
/// fence there, the kernel ends the address when the agent does not say that it lives.
#[test]
fn another_interface_answers() -> Result<()> {
    let lan = Lan::serving(2, "5s", Options::new("xdp"))?;
    let ip: IpAddr = VIPS[0].parse()?;
    let node = lan.owner(ip, &[])?;
    let lives = |node: &Node| entry(node, "lan0", ip)["valid_life_time"].as_u64().unwrap_or_default();
    ensure!(lives(node) > 100, "no program keeps the fence");
    lan.lab.router.ip("link add lan-twin type veth peer name lan1")?;
    lan.lab.router.ip(&format!("link set lan1 netns {}", node.netns.name()))?;
    lan.lab.router.ip("link set lan-twin up master lan")?;
    node.netns.sysctl("net.ipv4.conf.all.arp_ignore", "0")?;
    node.netns.sysctl("net.ipv4.conf.lan1.arp_ignore", "0")?;
    node.netns.ip("address add 198.18.50.77/24 dev lan1 noprefixroute")?;
    node.netns.ip("link set lan1 up")?;
    node.agent.wait_problem(&["net.ipv4.conf.lan1.arp_ignore", "198.18.50.0/24"])?;
    sys::wait_for("the kernel ends it", Duration::from_secs(15), || Ok((1..=5).contains(&lives(node))))?;
    signal(node, Signal::SIGSTOP)?;
    let other = lan.owner(ip, &[&node.name])?;
    let asker = Asker::start(&lan.lab.router, "lan", &[ip])?;
    sys::pause(2_000);
    let answers = asker.finish()?;
    signal(node, Signal::SIGCONT)?;
    ensure!(answers.owners(ip) == [mac(other)?], "{:x?} answer", answers.owners(ip));
    node.netns.sysctl("net.ipv4.conf.lan1.arp_ignore", "1")?;
    sys::wait_for("it is no problem any more", Duration::from_secs(20), || {
        Ok(!node.agent.problems()?.contains("arp_ignore"))
    })?;
    lan.owner(ip, &[]).map(drop)
}

/// A Service went while no agent was there; the next one is killed before it has withdrawn its address, which then nobody
/// takes away. It is not answered for: the fence stands as long as the address does. What kept the agent from
/// withdrawing is a process that is stopped while it has the lock of the Lease, and that is named.
#[test]
fn agent_is_killed_before_it_withdraws() -> Result<()> {
    let mut lan = Lan::serving(1, "20s", Options::new("xdp"))?;
    lan.lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    std::fs::remove_file(lan.lab.manifests().join("web.yaml"))?;
    let path = lan.lab.state().join(".leases/purelb-node-node1.lock");
    let lock = File::open(&path).with_context(|| path.display().to_string())?;
    lock.lock()?;
    lan.lab.nodes[0].agent.start()?;
    lan.lab.nodes[0].agent.wait_ready()?;
    lan.lab.nodes[0].agent.wait_problem(&["purelb-node-node1.lock", &format!("process {}", std::process::id())])?;
    lan.lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let node = &lan.lab.nodes[0];
    ensure!(ips()?.iter().all(|ip| has(node, *ip)), "they are to be there still, or nothing is tested");
    sys::pause(20_000);
    let asker = lan.ask()?;
    sys::pause(1_000);
    let answers = asker.finish()?;
    for ip in ips()? {
        ensure!(has(node, ip), "{ip} is to be there still, or nothing is tested");
        ensure!(answers.owners(ip).is_empty(), "{ip} is answered for");
    }
    drop(lock);
    Ok(())
}

/// Whoever takes an address over from a node that died asks once whether that one, or anybody, answers still.
#[test]
fn stranger_is_found_at_the_take_over() -> Result<()> {
    let mut lan = Lan::serving(2, "5s", Options::new("xdp"))?;
    let ip: IpAddr = VIPS[0].parse()?;
    let index = lan.index(ip)?;
    let name = lan.lab.nodes[index].name.clone();
    let link: serde_json::Value = serde_json::from_str(&lan.lab.router.ip("-j link show dev lan")?)?;
    let stranger = link[0]["address"].as_str().context("a MAC address")?.to_owned();
    lan.lab.router.ip(&format!("address add {ip}/32 dev lan"))?;
    lan.lab.nodes[index].agent.stop(Signal::SIGKILL)?;
    let taker = lan.owner(ip, &[&name])?;
    taker.agent.wait_problem(&[VIPS[0], &stranger])?;
    ensure!(has(taker, ip), "it gave way");
    Ok(())
}

/// What DHCP gave ends, and is the host's own all the same: no Service gets it.
#[test]
fn own_address_that_ends() -> Result<()> {
    let lab = Lab::start(Options::new("xdp"))?;
    let node = &lab.nodes[0];
    node.netns.ip("address add 198.51.100.5/24 dev eth0 valid_lft 300 preferred_lft 300 noprefixroute")?;
    node.netns.ip("route add 198.51.100.0/24 dev eth0 src 198.51.100.5")?;
    node.netns.ip("address add 2001:db8:77::5/64 dev eth0 valid_lft 300 preferred_lft 300 nodad")?;
    let vips = vec!["198.51.100.5".parse()?, "2001:db8:77::5".parse()?];
    lab.place(&Service { vips, ..lab.web()? })?;
    node.agent.wait_problem(&["198.51.100.5", "is an address of a node or of this host"])?;
    node.agent.wait_problem(&["2001:db8:77::5", "is an address of a node or of this host"])
}
