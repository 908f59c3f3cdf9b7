//! Local addresses on a real API server: Leases, annotations and events there, one answer in the network, whatever is cut
//! off or taken away. Invariant I16.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use nix::sys::signal::Signal;
use purelb_tests::answers::Answers;
use purelb_tests::cluster::Part;
use purelb_tests::cluster::proxy::{Fate, Rule};
use purelb_tests::cluster::tenant::INSTALL;
use purelb_tests::lab::Node;
use purelb_tests::lab::kube::{NAMESPACE, set_ready};
use purelb_tests::lan::scene::{LEASE, Scene};
use purelb_tests::lan::{TAKE_OVER, has, proven};
use purelb_tests::{clients, sys};
use serde_json::{Value, json};

/// Watches of Leases.
const WATCHES: &str = "GET .*/leases\\?.*watch=true";
/// Whatever is asked of Leases.
const READS: &str = "GET .*/leases";

/// The Service says who announces it, an event says since when, and the Lease is one of PureLB's kind.
#[test]
fn said_as_purelb_says_it() -> Result<()> {
    let scene = Scene::new("Cluster")?;
    scene.settle()?;
    for (ip, key) in scene.vips.iter().zip(["purelb.io/announcing-IPv4", "purelb.io/announcing-IPv6"]) {
        let node = &scene.owner(*ip, &[])?.name;
        let slot = format!("{node},lan0,{ip}");
        let what = format!("says {slot}");
        scene.admin.wait("Service", (NAMESPACE, "web"), &what, |web| web["metadata"]["annotations"][key] == slot)?;
        sys::wait_for(&format!("an event says that {node} announces something"), Duration::from_secs(20), || {
            let said = |event: &Value| {
                let note = event["note"].as_str().or(event["message"].as_str()).unwrap_or_default().to_owned();
                event["reason"] == "AnnouncingLocal" && note.starts_with(&format!("node {node} announces "))
            };
            Ok(scene.admin.list("Event", NAMESPACE)?.iter().any(said))
        })?;
        let lease = scene.lease(node)?;
        let (meta, spec) = (&lease["metadata"], &lease["spec"]);
        ensure!(meta["annotations"]["purelb.io/subnets"] == "198.18.50.0/24,2001:db8:50::/64", "{meta}");
        ensure!(meta["labels"]["app.kubernetes.io/component"] == "lbnodeagent", "{meta}");
        ensure!(meta["ownerReferences"][0]["kind"] == "Node" && meta["ownerReferences"][0]["name"] == **node, "{meta}");
        ensure!(spec["holderIdentity"] == **node && spec["leaseDurationSeconds"] == LEASE.as_secs(), "{spec}");
    }
    // The Service goes: nobody has it, and nobody writes any more.
    scene.admin.delete("Service", NAMESPACE, "web")?;
    sys::wait_for("nobody has it", TAKE_OVER, || {
        Ok(!scene.lab.nodes.iter().any(|node| scene.vips.iter().any(|ip| has(node, *ip))))
    })
}

/// A node is cut off: from the API server, from the network with its link down, from the network with its link up, from
/// both; others have the address as soon as it cannot be there, and nobody notices when the node is back. All the while two of
/// three wall clocks are wrong by half a minute: a renewal says when it was by the wall clock, and no agent reads that.
#[test]
fn cut_off() -> Result<()> {
    let mut scene = Scene::new("Cluster")?;
    scene.settle()?;
    let node = scene.index(scene.vips[0])?;
    let mut off = ["-30s", "+0s"].into_iter();
    for at in 0..3 {
        let agent = &mut scene.lab.nodes[at].agent;
        agent.stop(Signal::SIGTERM)?;
        agent.shift_clock(if at == node { "+30s" } else { off.next().unwrap_or_default() });
        agent.start()?;
        agent.wait_ready()?;
    }
    scene.settle()?;
    let (ip, scene) = (scene.vips[0], scene);
    let own = &scene.lab.nodes[node];
    ensure!(has(own, ip), "it moved when its agent was started anew");
    let ahead = |name: &str| -> Result<i64> {
        let lease = scene.lease(name)?;
        let said: Timestamp = lease["spec"]["renewTime"].as_str().context("a time")?.parse()?;
        Ok(said.as_second() - Timestamp::now().as_second())
    };
    let skews = scene.lab.nodes.iter().map(|node| ahead(&node.name)).collect::<Result<Vec<_>>>()?;
    println!("wall clocks by the Leases: {skews:?} s");
    ensure!(skews[node] > 20 && skews.iter().any(|skew| *skew < -20), "the clocks are right: {skews:?}");
    let port = format!("lan-{}", node + 1);
    let link = |word: &str| scene.lab.router.ip(&format!("link set {port} {word}")).map(drop);
    // Like a switch that loses all frames of a port whose link is up.
    let frames = |pass: bool| link(if pass { "master lan" } else { "nomaster" });
    let back = || -> Result<()> {
        scene.lab.nodes.iter().try_for_each(|node| scene.knows(node, 3))?;
        sys::pause(8_000);
        scene.owner(ip, &[])?;
        scene.served()
    };
    let stage = |what: &str, work: &dyn Fn() -> Result<()>| -> Result<Answers> {
        let asker = scene.ask()?;
        sys::pause(300);
        work().with_context(|| what.to_owned())?;
        back().with_context(|| format!("after {what}"))?;
        println!("{what}:");
        let answers = asker.finish()?;
        proven(&answers, &scene.vips, TAKE_OVER)?;
        Ok(answers)
    };
    stage("cut off from the API server", &|| {
        scene.cut(node, true)?;
        scene.owner(ip, &[&own.name])?;
        scene.served()?;
        ensure!(!has(own, ip), "it did not withdraw");
        sys::pause(1_500);
        scene.cut(node, false)
    })?;
    stage("its link is down", &|| {
        link("down")?;
        scene.owner(ip, &[&own.name])?;
        ensure!(!has(own, ip), "it did not withdraw");
        // One owner after another is told from two at once by the time between.
        sys::pause(1_500);
        link("up")
    })?;
    // Nobody can tell, neither here nor there: the Lease is renewed, so it stays where it is.
    let answers = stage("its frames are lost", &|| {
        frames(false)?;
        sys::pause(10_000);
        let has = |node: &&Node| has(node, ip);
        ensure!(scene.lab.nodes.iter().filter(has).count() == 1 && has(&own), "it moved");
        frames(true)
    })?;
    ensure!(answers.owners(ip).len() == 1, "another answered: {:x?}", answers.owners(ip));
    ensure!(answers.longest_silence(ip) > Duration::from_secs(9), "no frame was lost: nothing is tested");
    stage("its frames are lost, and it is cut off from the API server", &|| {
        frames(false)?;
        scene.cut(node, true)?;
        scene.owner(ip, &[&own.name])?;
        // A fence holds what user space forgets; here both are there.
        ensure!(!has(own, ip), "it did not withdraw");
        frames(true)?;
        sys::pause(3_000);
        scene.cut(node, false)
    })
    .map(drop)
}

/// Nothing that an agent asks of Leases comes back, while what it writes arrives: of who has the address, of those who might,
/// of all. Silence alone moves nothing, though candidates try; and when the owner dies meanwhile somebody has it in the end.
#[test]
fn reads_stall() -> Result<()> {
    let mut scene = Scene::behind_proxies("Cluster")?;
    scene.settle()?;
    let (ip, asker) = (scene.vips[0], scene.ask()?);
    let owner = scene.index(ip)?;
    let others = scene.others(owner);
    let revocation =
        format!("PATCH /apis/coordination.k8s.io/v1/namespaces/{INSTALL}/leases/purelb-node-node{}", owner + 1);
    for (what, nodes, requests) in [
        ("watches of all", [&[owner], &others[..]].concat(), WATCHES),
        ("all reads of the owner", vec![owner], READS),
        ("all reads of the others", others.clone(), READS),
    ] {
        let tried = |n: &usize| scene.lab.proxies[*n].count(&revocation);
        let before: usize = others.iter().map(tried).sum();
        nodes.iter().try_for_each(|n| scene.rules(*n, &[Rule(requests, Fate::Silence)]))?;
        sys::pause(13_000);
        let tries = others.iter().map(tried).sum::<usize>() - before;
        println!("{what} are silent: {tries} revocations tried");
        ensure!(scene.index(ip)? == owner, "it moved while {what} are silent");
        if requests == READS && !nodes.contains(&owner) {
            ensure!(tries > 0, "nobody believed that the owner is silent: nothing is tested");
        }
        (0..3).try_for_each(|n| scene.rules(n, &[]))?;
        for node in &scene.lab.nodes {
            scene.knows(node, 3)?;
        }
    }
    // Who reads nothing might stand in the way, and others might not.
    scene.rules(others[0], &[Rule(READS, Fate::Silence)])?;
    sys::pause(5_000);
    scene.lab.nodes[owner].agent.stop(Signal::SIGKILL)?;
    sys::pause(10_000);
    scene.rules(others[0], &[])?;
    scene.owner(ip, &[&format!("node{}", owner + 1)])?;
    scene.served()?;
    sys::pause(1_000);
    proven(&asker.finish()?, &scene.vips, Duration::from_secs(60))
}

/// While a node is cut off its address is given to another Service: the node has withdrawn before anybody answers for that.
#[test]
fn given_away_while_cut_off() -> Result<()> {
    let scene = Scene::new("Cluster")?;
    let (ip, asker) = (scene.vips[0], scene.ask()?);
    let node = scene.index(ip)?;
    scene.cut(node, true)?;
    scene.admin.delete("Service", NAMESPACE, "web")?;
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "other", "namespace": NAMESPACE, "annotations": {"purelb.io/addresses": ip.to_string()}},
        "spec": {
            "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    });
    object["spec"]["ipFamilies"] = json!([if ip.is_ipv4() { "IPv4" } else { "IPv6" }]);
    scene.admin.create(&object)?;
    scene.owner(ip, &[&scene.lab.nodes[node].name])?;
    sys::wait_for("it answers", Duration::from_secs(10), || {
        Ok(!clients::spread(&scene.lab.client, (ip, 80).into(), 1)?.is_empty())
    })?;
    scene.cut(node, false)?;
    sys::pause(3_000);
    scene.owner(ip, &[])?;
    proven(&asker.finish()?, &[ip], TAKE_OVER)
}

/// Its Lease is deleted: a node cannot prove any more that the address is its own.
#[test]
fn lease_is_deleted() -> Result<()> {
    let scene = Scene::new("Cluster")?;
    let (ip, asker) = (scene.vips[0], scene.ask()?);
    for _ in 0..2 {
        let node = scene.owner(ip, &[])?.name.clone();
        scene.admin.delete("Lease", INSTALL, &format!("purelb-node-{node}"))?;
        sys::pause(1_000);
        scene.owner(ip, &[])?;
        sys::wait_for("it has a Lease again", TAKE_OVER, || scene.lease(&node).map(|_| true))?;
    }
    scene.served()?;
    proven(&asker.finish()?, &scene.vips, TAKE_OVER)
}

/// The API server is away: everybody withdraws, and all is as before when it is back.
#[test]
fn api_server_is_away() -> Result<()> {
    let scene = Scene::new("Cluster")?;
    let asker = scene.ask()?;
    let cluster = scene.lab.cluster.as_ref().context("a cluster")?;
    cluster.kill(Part::Api)?;
    sys::wait_for("all have withdrawn", TAKE_OVER, || {
        Ok(!scene.lab.nodes.iter().any(|node| scene.vips.iter().any(|ip| has(node, *ip))))
    })?;
    cluster.run(Part::Api)?;
    cluster.wait_served()?;
    for ip in &scene.vips {
        scene.owner(*ip, &[])?;
    }
    scene.served()?;
    proven(&asker.finish()?, &scene.vips, Duration::from_secs(60))
}

/// Policy Local: the address is where a ready endpoint is, and follows it; the Service's spec stays as it is.
#[test]
fn where_a_ready_endpoint_is() -> Result<()> {
    let scene = Scene::new("Local")?;
    let ip = scene.vips[0];
    let asker = scene.ask()?;
    for index in [0, 1] {
        let pods: Vec<_> = scene.lab.nodes.iter().map(|node| &node.pods[0]).collect();
        for (at, pod) in pods.iter().enumerate() {
            set_ready(&scene.admin, &pod.name, &pod.addresses, at == index)?;
        }
        let others = scene.lab.nodes.iter().enumerate().filter(|(at, _)| *at != index);
        let others: Vec<_> = others.map(|(_, node)| node.name.as_str()).collect();
        let node = scene.owner(ip, &others)?;
        ensure!(node.name == scene.lab.nodes[index].name, "{} has it", node.name);
        scene.served()?;
        // Two owners in turn are told from two at once by the time between.
        sys::pause(1_500);
    }
    let web = scene.admin.get("Service", NAMESPACE, "web")?;
    ensure!(web["spec"]["externalTrafficPolicy"] == "Local", "{web}");
    proven(&asker.finish()?, &scene.vips, TAKE_OVER)
}
