//! Beside the real kube-proxy on a real API server: three nodes with two pods each, a remote group that the router leads to
//! all nodes, a local one in their common network. Who serves what, and that coming, going, dying and upgrading is not felt.
//!
//! All tests share one cluster and lab, one after the other; each begins with agents on all nodes. Figures are printed.

use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use purelb_tests::agent::Agent;
use purelb_tests::answers::Asker;
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::kube::set_ready;
use purelb_tests::leftovers::{self, Owner};
use purelb_tests::scenario::{HEARTBEAT, SOON, Scene, all_held, targets};
use purelb_tests::sys;

fn with_scene(test: impl FnOnce(&mut Scene) -> Result<()>) -> Result<()> {
    static SHARED: OnceLock<Result<Mutex<Scene>, String>> = OnceLock::new();
    let made = SHARED.get_or_init(|| {
        sys::at_exit(|| leftovers::remove(Owner::This));
        Scene::new("nftables", "xdp").map(Mutex::new).map_err(|error| format!("{error:#}"))
    });
    let scene = made.as_ref().map_err(|error| anyhow!("no scene: {error}"))?;
    let mut scene = scene.lock().unwrap_or_else(PoisonError::into_inner);
    let begin = Instant::now();
    scene.lab.route_vips(&[1, 2, 3])?;
    scene.restore().context("before the test").and_then(|()| test(&mut scene)).with_context(|| scene.logs())?;
    println!("took {:.1?}", begin.elapsed());
    Ok(())
}

/// Policy Cluster is kube-proxy's, at any node; where it is said so (`PreferLocal`) it is ours, for pods
/// of the node while it has any.
#[test]
fn policy_cluster() -> Result<()> {
    with_scene(|scene| {
        scene.pods_of_all_nodes(&scene.cluster, true)?;
        for to in targets(&[&scene.near]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1]))?;
        }
        scene.traffic(Some("PreferLocal"))?;
        for node in 0..3 {
            scene.wait_endpoints(node, &scene.cluster, &[0, 1])?;
        }
        scene.pods_of_the_node(&scene.cluster)?;
        for to in targets(&[&scene.near]) {
            let owner = scene.having("lan0", to.ip());
            let at = scene.lab.nodes.iter().position(|node| owner == [node.name.clone()]);
            let at = at.with_context(|| format!("{to} is at {owner:?}"))?;
            let seen = scene.counted(&scene.near, || scene.meets_itself(to, &scene.pods(Some(at), &[0, 1])))?;
            println!("near: {to} at node{}, packets by node through XDP: {seen:?}", at + 1);
            ensure!(seen[at] >= 40, "{to}: through XDP went {seen:?}");
        }
        // A node that has none of them leaves it to kube-proxy.
        scene.lab.route_vips(&[1])?;
        for pod in &scene.lab.nodes[0].pods[..2] {
            set_ready(&scene.admin, &pod.name, &pod.addresses, false)?;
        }
        let others = &scene.pods(Some(1), &[0, 1]) | &scene.pods(Some(2), &[0, 1]);
        for to in targets(&[&scene.cluster]) {
            scene.meets(&scene.lab.client, to, &others)?;
        }
        scene.ready(&[0, 1])?;
        scene.traffic(None)?;
        for to in targets(&[&scene.cluster, &scene.near]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1])).context("back to kube-proxy")?;
        }
        Ok(())
    })
}

/// Policy Local is ours: the node's own pods, the client's own address.
#[test]
fn policy_local() -> Result<()> {
    with_scene(|scene| {
        scene.pods_of_the_node(&scene.local)?;
        for to in targets(&[&scene.local]) {
            scene.meets_itself(to, &scene.pods(None, &[0, 1])).context("over all three nodes")?;
        }
        for node in &scene.lab.nodes {
            let problems = node.agent.problems()?;
            ensure!(problems == "[]", "{}: {problems}", node.name);
        }
        Ok(())
    })
}

/// Node ports, cluster addresses, VIPs from nodes and pods, also to the asking pod itself: kube-proxy's, as without us.
#[test]
fn from_inside() -> Result<()> {
    with_scene(|scene| {
        let ways = scene.inside()?;
        println!("{ways} ways from inside and by node ports are served by kube-proxy");
        Ok(())
    })
}

/// The same beside kube-proxy's iptables mode, with programs that hang at tcx and frames with checksums yet to come.
#[test]
fn iptables_mode() -> Result<()> {
    let mut scene = Scene::new("iptables", "tcx")?;
    let mut all = || -> Result<()> {
        scene.restore()?;
        for (node, uplink) in scene.lab.nodes.iter().flat_map(|node| ["eth0", "lan0"].map(|uplink| (node, uplink))) {
            ensure!(node.agent.uplink(uplink)? == "tcx attached", "{}: {}", node.name, node.agent.uplink(uplink)?);
        }
        scene.pods_of_all_nodes(&scene.cluster, true)?;
        scene.pods_of_the_node(&scene.local)?;
        println!("{} ways from inside and by node ports are served by kube-proxy's iptables", scene.inside()?);
        Ok(())
    };
    all().with_context(|| scene.logs())
}

/// kube-proxy is killed on all nodes under load: what it wrote goes on, what we serve follows the endpoints, no agent thinks
/// less of itself, and no connection notices it. Started again it serves everything as before.
#[test]
fn kube_proxy_restarts() -> Result<()> {
    with_scene(|scene| {
        let all = [&scene.cluster, &scene.local];
        let (running, coming) = (scene.running(&all)?, scene.coming(&all));
        let stays_ready = |scene: &Scene, time: Duration| -> Result<()> {
            let begin = Instant::now();
            while begin.elapsed() < time {
                for node in &scene.lab.nodes {
                    let (code, missing) = node.agent.page("/readyz")?;
                    ensure!(code == 200, "{} after {:.1?}: {missing}", node.name, begin.elapsed());
                }
                sys::pause(50);
            }
            Ok(())
        };
        sys::pause(300);
        scene.lab.kill_kube_proxies();
        stays_ready(scene, Duration::from_secs(3))?;
        // Pods come and go meanwhile, which only we hear of.
        scene.ready(&[0, 1, 2])?;
        (0..3).try_for_each(|node| scene.wait_endpoints(node, &scene.local, &[0, 1, 2]))?;
        for to in targets(&[&scene.local]) {
            scene.meets_itself(to, &scene.pods(None, &[0, 1, 2]))?;
        }
        for to in targets(&[&scene.cluster]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1])).context("by the rules that are left")?;
        }
        let begin = Instant::now();
        scene.lab.restart_kube_proxies()?;
        println!("kube-proxies are healthy again {:.1?} after the start", begin.elapsed());
        stays_ready(scene, Duration::from_secs(2))?;
        for to in targets(&[&scene.cluster]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1, 2])).context("what came meanwhile")?;
        }
        scene.ready(&[0, 1])?;
        for node in 0..3 {
            scene.wait_endpoints(node, &scene.local, &[0, 1])?;
        }
        println!("{} ways from inside and by node ports are served", scene.inside()?);
        let seen = coming.finish(&scene.watch)?;
        println!("{} new connections meanwhile", seen.count());
        seen.check()?;
        println!("{} running connections held", all_held(running)?);
        Ok(())
    })
}

/// Agents are stopped and `cleanup` is run on all nodes: kube-proxy serves everything, no connection notices it, and
/// nothing of us is left.
#[test]
fn kube_proxy_alone() -> Result<()> {
    with_scene(|scene| {
        let running = scene.running(&[&scene.cluster, &scene.local])?;
        let coming = scene.coming(&[&scene.cluster, &scene.local]);
        sys::pause(300);
        scene.stop_all(Signal::SIGTERM)?;
        let begin = Instant::now();
        thread::scope(|scope| -> Result<()> {
            let clean = |agent: &'_ Agent| agent.command(&["cleanup", "--deadline", "8s"], false);
            let all: Vec<_> = scene.lab.nodes.iter().map(|node| scope.spawn(move || clean(&node.agent))).collect();
            sys::pause(1_500);
            let held = all_held(running)?;
            for one in all {
                one.join().map_err(|_| anyhow!("cleanup's thread panicked"))??;
            }
            println!("cleanup of three nodes took {:.1?}, {held} running connections held", begin.elapsed());
            Ok(())
        })?;
        for node in &scene.lab.nodes {
            let left = std::fs::read_dir(node.agent.bpf_root()).map_or(0, Iterator::count);
            let links = node.netns.ip("-details link show")?;
            let ours: Vec<_> = links.lines().filter(|line| line.contains("xdp") || line.contains("kube-lb0")).collect();
            ensure!(left == 0 && ours.is_empty(), "cleanup left {left} pins and {ours:?}");
        }
        for to in targets(&[&scene.cluster, &scene.local]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1]))?;
        }
        let seen = coming.finish(&scene.watch)?;
        println!("{} new connections meanwhile, by {} pods", seen.count(), seen.served.len());
        seen.check()?;
        scene.pods_of_all_nodes(&scene.cluster, false)?;
        for n in 0..3_u16 {
            scene.lab.route_vips(&[n + 1])?;
            for to in targets(&[&scene.local]) {
                scene.meets_itself(to, &scene.pods(Some(n.into()), &[0, 1]))?;
            }
        }
        scene.lab.route_vips(&[1, 2, 3])?;
        println!("{} ways from inside are served", scene.inside()?);
        // As PureLB's agent puts it there.
        let lan = &scene.lab.nodes[0].netns;
        for (ip, length) in scene.near.vips.iter().zip([24, 64]) {
            lan.ip(&format!("address add {ip}/{length} dev lan0 nodad"))?;
        }
        for to in targets(&[&scene.near]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &[0, 1]))?;
        }
        for (ip, length) in scene.near.vips.iter().zip([24, 64]) {
            lan.ip(&format!("address del {ip}/{length} dev lan0"))?;
        }
        Ok(())
    })
}

/// Agents are killed and nobody starts them again: when their tables are stale, kube-proxy serves all, also endpoints that
/// came later, and none that went; running connections stay where they are. So do those of kube-proxy when agents are back.
#[test]
fn rolled_back() -> Result<()> {
    with_scene(|scene| {
        let running = scene.running(&[&scene.cluster, &scene.local])?;
        let coming = scene.coming(&[&scene.cluster, &scene.local]);
        sys::pause(300);
        scene.stop_all(Signal::SIGKILL)?;
        let begin = Instant::now();
        scene.ready(&[1, 2])?;
        for node in &scene.lab.nodes {
            sys::wait_for(&format!("the tables of {} are stale", node.name), SOON, || {
                Ok(node.agent.query(&["status"])?["tables"]["stale"] == true)
            })?;
        }
        println!("stale {:.1?} after the agents were killed (heartbeat {HEARTBEAT})", begin.elapsed());
        let later = [1, 2];
        for to in targets(&[&scene.cluster, &scene.local]) {
            scene.meets(&scene.lab.client, to, &scene.pods(None, &later))?;
        }
        let seen = coming.finish(&scene.watch)?;
        println!("{} new connections meanwhile: {:?}", seen.count(), seen.served);
        seen.check()?;
        println!("{} running connections held", all_held(running)?);
        // Node by node.
        for n in 0..3_u16 {
            scene.lab.route_vips(&[n + 1])?;
            for to in targets(&[&scene.local]) {
                scene.meets_itself(to, &scene.pods(Some(n.into()), &later))?;
            }
            for to in targets(&[&scene.cluster]) {
                scene.meets(&scene.lab.client, to, &scene.pods(None, &later))?;
            }
            // Nor is a port dropped that no Service has: the node itself answers.
            let to = SocketAddr::new(scene.local.vips[0], 81);
            let refused = Conn::open_within(&scene.lab.client, clients::any(to), to, Duration::from_secs(2));
            let said = refused.map_or_else(|error| format!("{error:#}"), |_| "it opened".to_owned());
            ensure!(said.contains("refused"), "{to}: {said}");
        }
        scene.lab.route_vips(&[1, 2, 3])?;
        let running = scene.running(&[&scene.cluster, &scene.local])?;
        let coming = scene.coming(&[&scene.cluster, &scene.local]);
        scene.restore().context("agents come back")?;
        sys::pause(500);
        let seen = coming.finish(&scene.watch)?;
        println!("{} new connections while agents came back", seen.count());
        seen.check()?;
        println!("{} connections of kube-proxy's held", all_held(running)?);
        Ok(())
    })
}

/// Agents are upgraded, node by node: no new connection fails, none that runs breaks, no address moves.
#[test]
fn upgraded_under_load() -> Result<()> {
    with_scene(|scene| {
        let all = [&scene.cluster, &scene.local, &scene.near];
        let running = scene.running(&all)?;
        let coming = scene.coming(&all);
        let asker = Asker::start(&scene.lab.router, "lan", &scene.near.vips)?;
        let before = scene.placed();
        ensure!(before.iter().all(|(_, nodes)| nodes.len() == 3 || nodes.len() == 1), "{before:?}");
        for n in 0..3 {
            scene.lab.nodes[n].agent.stop(Signal::SIGTERM)?;
            sys::pause(5_000);
            ensure!(scene.placed() == before, "while node{} is down: {:?}", n + 1, scene.placed());
            let begin = Instant::now();
            scene.lab.nodes[n].agent.start()?;
            scene.wait_agent(n)?;
            println!("node{}: ready {:.1?} after the start", n + 1, begin.elapsed());
            ensure!(scene.placed() == before, "when node{} is back: {:?}", n + 1, scene.placed());
        }
        sys::pause(500);
        let answers = asker.finish()?;
        for ip in &scene.near.vips {
            let owners = answers.owners(*ip);
            ensure!(owners.len() == 1, "{ip} moved: {owners:x?}");
            println!("{ip}: one owner, without an answer for {:.1?}", answers.longest_silence(*ip));
        }
        let seen = coming.finish(&scene.watch)?;
        println!("{} new connections meanwhile", seen.count());
        seen.check()?;
        println!("{} running connections held", all_held(running)?);
        Ok(())
    })
}
