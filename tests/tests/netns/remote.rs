//! Remote addresses: on the device of every node that serves them, and nowhere else; what others put there stays.
//! Invariant I18.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Node, Options};
use purelb_tests::manifests::{Service, announcer, remote_group};
use purelb_tests::{clients, sys};
use serde_json::Value;

const VIPS: [&str; 2] = ["203.0.113.64", "2001:db8:ffff::40"];
const FOREIGN: &str = "203.0.113.99/32";

/// Addresses on a device, `ip/prefix`, but for those that the kernel gives itself.
fn on_device(node: &Node, device: &str) -> Result<Vec<String>> {
    let said: Value = serde_json::from_str(&node.netns.ip(&format!("-j address show dev {device}"))?)?;
    let all = said[0]["addr_info"].as_array().into_iter().flatten().filter(|a| a["scope"] == "global");
    let mut all: Vec<_> =
        all.map(|a| format!("{}/{}", a["local"].as_str().unwrap_or_default(), a["prefixlen"])).collect();
    all.sort();
    Ok(all)
}

fn wait_for(node: &Node, device: &str, wanted: &[&str]) -> Result<()> {
    let what = format!("{wanted:?} on {device} of {}", node.name);
    sys::wait_for(&what, Duration::from_secs(10), || {
        let found = on_device(node, device)?;
        // What the lab itself put there.
        let found: Vec<_> =
            found.iter().filter(|a| !a.starts_with("203.0.113.1/") && *a != "2001:db8:ffff::1/128").collect();
        ensure!(found == wanted, "it has {found:?}; {}", node.agent.log_tail());
        Ok(true)
    })
}

/// A lab whose agents give addresses of a remote group, and announce them.
fn lab(nodes: u16) -> Result<Lab> {
    let lab = Lab::start(Options { standalone: true, nodes, ..Options::new("xdp") })?;
    announce(&lab, "kube-lb0")?;
    let v6 = ["2001:db8:ffff::40/124", "2001:db8:ffff::/64", "default"];
    lab.write_objects("far.yaml", &[remote_group("far", ["203.0.113.64/28", "203.0.113.0/24", "/32"], v6)])?;
    Ok(lab)
}

fn announce(lab: &Lab, device: &str) -> Result<()> {
    lab.write_objects("announce.yaml", &[announcer(device)]).map(drop)
}

fn web(lab: &Lab) -> Result<Service> {
    let vips = VIPS.iter().map(|ip| ip.parse().context("VIP")).collect::<Result<_>>()?;
    Ok(Service { vips, group: Some("far".to_owned()), ..lab.web()? })
}

fn write(lab: &Lab, service: &Service) -> Result<()> {
    lab.apply(service).map(drop)
}

fn targets() -> Result<Vec<SocketAddr>> {
    VIPS.iter().map(|ip| Ok(SocketAddr::new(ip.parse()?, 80))).collect()
}

const BOTH: [&str; 2] = ["2001:db8:ffff::40/64", "203.0.113.64/32"];

/// Every node has them with the prefixes of their pools, and the client an answer; what goes by hand comes back, what is
/// somebody else's stays, and what goes for good is served until the router knows.
#[test]
fn on_every_node() -> Result<()> {
    let lab = lab(2)?;
    for node in &lab.nodes {
        node.netns.ip(&format!("address add {FOREIGN} dev kube-lb0"))?;
    }
    // Another agent left it here: wanted, it becomes ours, and goes when it is not wanted any more.
    lab.nodes[1].netns.ip(&format!("address add {}/32 dev kube-lb0", VIPS[0]))?;
    let service = web(&lab)?;
    write(&lab, &service)?;
    let with_foreign = [BOTH[0], BOTH[1], FOREIGN];
    for node in &lab.nodes {
        wait_for(node, "kube-lb0", &with_foreign)?;
        sys::wait_for("status says so", Duration::from_secs(10), || {
            let status = node.agent.query(&["status"])?;
            let device = &status["vip_device"];
            ensure!(device["name"] == "kube-lb0" && device["kind"] == node.netns.vip_device()?, "{status}");
            ensure!(status["vip_device"]["addresses"].as_array().is_some_and(|all| all.len() == 2), "{status}");
            Ok(true)
        })?;
    }
    for to in targets()? {
        ensure!(!clients::spread(&lab.client, to, 10)?.is_empty(), "no answer");
    }
    let node = &lab.nodes[0];
    for gone in BOTH {
        node.netns.ip(&format!("address del {gone} dev kube-lb0"))?;
        wait_for(node, "kube-lb0", &with_foreign)?;
    }
    // For good: withdrawn at once, served a moment longer, then dropped.
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    let begin = Instant::now();
    for node in &lab.nodes {
        wait_for(node, "kube-lb0", &[FOREIGN])?;
    }
    ensure!(begin.elapsed() < Duration::from_millis(2_500), "withdrawn after {:?}", begin.elapsed());
    for to in targets()? {
        clients::spread(&lab.client, to, 3).context("it is served a moment longer")?;
    }
    sys::wait_for("nothing serves it", Duration::from_secs(10), || {
        Ok(node.agent.endpoints(VIPS[0], 80).map_or(true, |found| found.is_empty()))
    })?;
    ensure!(begin.elapsed() > Duration::from_millis(2_500), "served only for {:?}", begin.elapsed());
    Ok(())
}

/// With the policy Local only nodes with a healthy endpoint; and another device when it is told so.
#[test]
fn where_endpoints_are() -> Result<()> {
    let lab = lab(2)?;
    let mut service = web(&lab)?;
    let name = lab.nodes[1].name.clone();
    service.endpoints.retain(|endpoint| endpoint.node == name);
    write(&lab, &service)?;
    wait_for(&lab.nodes[1], "kube-lb0", &BOTH)?;
    wait_for(&lab.nodes[0], "kube-lb0", &[])?;
    let all = service.endpoints.clone();
    service.endpoints.iter_mut().for_each(|endpoint| (endpoint.ready, endpoint.serving) = (false, false));
    write(&lab, &service)?;
    wait_for(&lab.nodes[1], "kube-lb0", &[])?;
    service.endpoints = all;
    write(&lab, &service)?;
    wait_for(&lab.nodes[1], "kube-lb0", &BOTH)?;
    service.local = false;
    write(&lab, &service)?;
    wait_for(&lab.nodes[0], "kube-lb0", &BOTH)?;
    // A device that is not there is made, and the old one has nothing of ours any more.
    announce(&lab, "lb-new")?;
    for node in &lab.nodes {
        wait_for(node, "lb-new", &BOTH)?;
        wait_for(node, "kube-lb0", &[])?;
    }
    announce(&lab, "no such device")?;
    lab.nodes[0].agent.wait_problem(&["spec.local.dummyInterface", "is no name of an interface"])
}

/// An agent that dies leaves them; the next one takes away what nobody wants any more, and `cleanup` the rest.
#[test]
fn left_over() -> Result<()> {
    let mut lab = lab(1)?;
    announce(&lab, "lb-own")?;
    let service = web(&lab)?;
    write(&lab, &service)?;
    wait_for(&lab.nodes[0], "lb-own", &BOTH)?;
    lab.nodes[0].agent.stop(Signal::SIGTERM)?;
    wait_for(&lab.nodes[0], "lb-own", &BOTH)?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    wait_for(&lab.nodes[0], "lb-own", &BOTH)?;
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    wait_for(&lab.nodes[0], "lb-own", &[])?;
    write(&lab, &service)?;
    wait_for(&lab.nodes[0], "lb-own", &BOTH)?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.nodes[0].agent.command(&["cleanup", "--deadline", "1s"], false)?;
    let left = lab.nodes[0].netns.ip("-br address")?;
    ensure!(!left.contains("lb-own") && left.contains("kube-lb0"), "{left}");
    Ok(())
}
