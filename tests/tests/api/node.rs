//! The whole way on a real API server: a Service and Pods are made there, the allocator gives addresses, real
//! controllers make EndpointSlices, agents program their nodes, and clients get answers through XDP and tcx.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::{Client, Part};
use purelb_tests::lab::kube::{NAMESPACE, set_ready};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::{LongLived, Newcomers};
use purelb_tests::{clients, each_hook, sys};
use serde_json::json;

/// The pods' addresses of a family, ready.
fn ready(lab: &Lab, node: usize, pods: &[usize], v4: bool) -> Vec<(IpAddr, &'static str)> {
    let pods = pods.iter().map(|index| &lab.nodes[node].pods[*index]);
    pods.flat_map(|pod| &pod.addresses).filter(|ip| ip.is_ipv4() == v4).map(|ip| (*ip, "ready")).collect()
}

fn wait_ready(lab: &Lab, vips: &[IpAddr], pods: &[usize]) -> Result<()> {
    for node in 0..lab.nodes.len() {
        for vip in vips {
            lab.wait_endpoints(node, *vip, &ready(lab, node, pods, vip.is_ipv4()))?;
        }
    }
    Ok(())
}

fn serving(options: Options, pods: &[usize]) -> Result<(Lab, Client, impl Sized, Vec<IpAddr>)> {
    let (lab, admin, allocator) = Lab::on_cluster(options)?;
    for node in 0..lab.nodes.len() {
        for index in pods {
            lab.pod(&admin, node, *index, "web", true)?;
        }
    }
    let vips = lab.service(&admin, "web", json!({}))?;
    wait_ready(&lab, &vips, pods)?;
    Ok((lab, admin, allocator, vips))
}

fn targets(vips: &[IpAddr]) -> Vec<SocketAddr> {
    vips.iter().map(|vip| SocketAddr::new(*vip, 80)).collect()
}

/// Two nodes with two pods each: every one of them answers, each request at the node that it came to.
fn from_end_to_end(options: Options) -> Result<()> {
    let (lab, admin, _allocator, vips) = serving(Options { nodes: 2, pods: 2, ..options }, &[0, 1])?;
    ensure!(
        vips.iter().map(ToString::to_string).collect::<Vec<_>>() == ["203.0.113.1", "2001:db8:ffff::1"],
        "{vips:?}"
    );
    for to in targets(&vips) {
        let found = clients::spread(&lab.client, to, 60)?;
        ensure!(found.len() == 4, "{to} was answered by {found:?}");
        clients::udp(&lab.client, to, 200)?;
    }
    for node in &lab.nodes {
        let problems = node.agent.problems()?;
        ensure!(problems == "[]", "{}: {problems}", node.name);
    }
    // An unready pod gets no more, and all of it again when it is back.
    let pod = &lab.nodes[0].pods[0];
    set_ready(&admin, &pod.name, &pod.addresses, false)?;
    let one: Vec<_> = pod.addresses.iter().filter(|ip| ip.is_ipv4()).map(|ip| (*ip, "unready")).collect();
    let wanted = [one, ready(&lab, 0, &[1], true)].concat();
    lab.wait_endpoints(0, vips[0], &wanted)?;
    let found = clients::spread(&lab.client, targets(&vips)[0], 40)?;
    ensure!(!found.contains_key(&pod.name), "the unready pod answered: {found:?}");
    // Without a Service nothing is left.
    admin.delete("Service", NAMESPACE, "web")?;
    sys::wait_for("nothing is served", Duration::from_secs(20), || {
        Ok(lab.nodes[0].agent.endpoints(&vips[0].to_string(), 80)?.is_empty())
    })
}

/// All Pods are replaced one after the other, as a Deployment does, each with a moment to drain: not one request fails.
fn rolling_replacement(options: Options) -> Result<()> {
    let (lab, admin, _allocator, vips) = serving(options.pods(4), &[0, 1])?;
    let newcomers: Vec<_> = targets(&vips).into_iter().map(|to| Newcomers::start(&lab.client, to)).collect();
    for (old, new) in [(0, 2), (1, 3)] {
        lab.pod(&admin, 0, new, "web", true)?;
        let pods: Vec<usize> = (old..=new).collect();
        wait_ready(&lab, &vips, &pods)?;
        // The kubelet would kill it at the end of its grace; until then its slice says that it terminates.
        let name = lab.nodes[0].pods[old].name.clone();
        admin.delete("Pod", NAMESPACE, &name)?;
        sys::pause(1_500);
        admin.raw("DELETE", &format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}?gracePeriodSeconds=0"), None)?;
        wait_ready(&lab, &vips, &(old + 1..=new).collect::<Vec<_>>())?;
    }
    for one in newcomers {
        let found = one.finish()?;
        ensure!(found.len() == 4, "answers came from {found:?}");
    }
    Ok(())
}

/// The API server dies and comes back, and so does an agent while it is away: running connections and new ones notice
/// nothing, and what changed meanwhile is caught up with.
fn api_server_away(options: Options) -> Result<()> {
    let (mut lab, admin, _allocator, vips) = serving(options, &[0, 1])?;
    let running: Vec<_> =
        targets(&vips).into_iter().map(|to| LongLived::start(&lab.client, to, 3)).collect::<Result<_>>()?;
    let newcomers: Vec<_> = targets(&vips).into_iter().map(|to| Newcomers::start(&lab.client, to)).collect();
    let cluster = lab.cluster.as_ref().context("no cluster")?;
    cluster.kill(Part::Api)?;
    let agent = &mut lab.nodes[0].agent;
    agent.wait_problem(&["watch of EndpointSlices", "what was seen last is served"])?;
    agent.stop(Signal::SIGKILL)?;
    agent.start()?;
    agent.wait_problem(&["watch of Services", "nothing is written before"])?;
    let (code, missing) = agent.page("/readyz")?;
    ensure!(code == 503, "an agent without a list is ready: {missing}");
    sys::pause(2_000);
    lab.cluster.as_ref().context("no cluster")?.run(Part::Api)?;
    lab.cluster.as_ref().context("no cluster")?.wait_served()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.pod(&admin, 0, 2, "web", true)?;
    wait_ready(&lab, &vips, &[0, 1, 2])?;
    for one in newcomers {
        one.finish()?;
    }
    for one in running {
        one.finish()?;
    }
    Ok(())
}

each_hook! { from_end_to_end rolling_replacement api_server_away }
