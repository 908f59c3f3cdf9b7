//! Remote addresses as they are meant: on `kube-lb0` of every node that serves them, announced from there by FRR or BIRD,
//! and the router, which runs the other one, spreads flows over all of them.
//!
//! Figures are printed; the limits are generous, since they only tell that it happened. What the router leads elsewhere by
//! another hash over fewer next hops breaks, and is counted apart.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::Lab;
use purelb_tests::load::LongLived;
use purelb_tests::manifests::{Port, Service};
use purelb_tests::routing::Kind::{Bird, Frr};
use purelb_tests::routing::arrivals::Arrivals;
use purelb_tests::routing::scene::{self, ALL, FAR, SOON, WIDE, WIDE_ROUTES, service, targets};
use purelb_tests::routing::{HOLD, Kind, RESTART, Routing};
use purelb_tests::sys;

/// A route that is added again so soon was replaced.
const REPLACED: Duration = Duration::from_millis(300);

/// The Service of [`FAR`], whose file is not written yet.
fn web(lab: &Lab) -> Result<Service> {
    service(lab, "web", "far", FAR)
}

fn long_lived(lab: &Lab) -> Result<Vec<LongLived>> {
    targets(FAR)?.into_iter().map(|to| LongLived::start(&lab.client, to, 6)).collect()
}

/// Ends them and prints how many broke at which node.
fn count_broken(what: &str, running: Vec<LongLived>) {
    let (mut held, mut nodes) = (0, Vec::new());
    for one in running {
        let (good, broken) = one.end();
        held += good;
        nodes.extend(broken.into_iter().filter_map(|(pod, _)| pod.split('-').next().map(str::to_owned)));
    }
    nodes.sort();
    println!("{what}: {held} of {} long-lived connections held; broken were those of {nodes:?}", held + nodes.len());
}

/// Packets that a node's programs brought to endpoints of that VIP.
fn packets(lab: &Lab, node: usize, vip: &str) -> Result<u64> {
    let all = lab.nodes[node].agent.query(&["services"])?;
    let of = all.as_array().into_iter().flatten().filter(|row| row["vip"] == vip);
    Ok(of.filter_map(|row| row["packets"].as_u64()).sum())
}

/// Every node's pods answer, through its XDP program, and see the client itself.
fn spread(lab: &Lab) -> Result<()> {
    for (vip, to) in FAR.into_iter().zip(targets(FAR)?) {
        let before = (0..3).map(|node| packets(lab, node, vip)).collect::<Result<Vec<_>>>()?;
        let found = clients::spread(&lab.client, to, 200)?;
        println!("200 flows to {to}: {found:?}");
        ensure!(found.len() == 6, "not all pods got flows: {found:?}");
        for (node, before) in before.into_iter().enumerate() {
            let seen = packets(lab, node, vip)? - before;
            ensure!(seen >= 100, "XDP at node{} brought only {seen} packets of {to}", node + 1);
        }
        let mut conn = Conn::open(&lab.client, to)?;
        let (peer, own) = (conn.ask("PEER")?, conn.local()?.ip().to_string());
        ensure!(peer == own, "the pod sees {peer}, the client is {own}");
    }
    Ok(())
}

fn announced(router: Kind, nodes: &[Kind]) -> Result<()> {
    let (lab, routing) = scene::start(router, nodes, true)?;
    let web = web(&lab)?;
    let begin = Instant::now();
    lab.place(&web)?;
    routing.wait_hops(&FAR, &ALL, Duration::from_secs(10))?;
    println!(
        "{router:?} as router: three next hops of each family {:.1?} after the object was written",
        begin.elapsed()
    );
    lab.wait_programmed(&web)?;
    spread(&lab)?;
    // Withdrawn first, served a moment longer: whoever still is sent here is served. What the router does without the
    // route is played by one that is always there.
    let (hop4, hop6) = (lab.nodes[0].addresses[0], lab.nodes[0].addresses[1]);
    lab.router.ip(&format!("route add 203.0.113.64/28 via {hop4}"))?;
    lab.router.ip(&format!("-6 route add 2001:db8:ffff::40/124 via {hop6}"))?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    let begin = Instant::now();
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    routing.wait_hops(&FAR, &[], Duration::from_secs(10))?;
    println!("{router:?} as router: withdrawn {:.1?} after the object was deleted", begin.elapsed());
    let seen = coming.finish(&routing.watch)?;
    println!("meanwhile {} new connections, {} led away by the router", seen.count(), seen.led_away);
    seen.check()?;
    sys::wait_for("nothing serves it", SOON, || Ok(packets(&lab, 0, FAR[0])? == 0 && endpoints(&lab, 0)? == 0))
}

fn endpoints(lab: &Lab, node: usize) -> Result<usize> {
    Ok(lab.nodes[node].agent.endpoints(FAR[0], 80)?.len())
}

/// From the object to the router's table, to all pods, and back out of the table before it is no longer served.
#[test]
fn announced_to_frr() -> Result<()> {
    announced(Frr, &[Bird, Frr])
}

/// The same the other way round.
#[test]
fn announced_to_bird() -> Result<()> {
    announced(Bird, &[Frr, Bird])
}

/// Of two Services in one aggregated route one goes, and then the other: the route goes with the last. (BIRD 2.0.12 gives an
/// IPv6 prefix up with the first of its addresses, though the kernel keeps its route.)
#[test]
fn aggregate_outlives_one_service() -> Result<()> {
    let (lab, routing) = scene::start(Frr, &[Frr], true)?;
    lab.apply(&service(&lab, "second", "wide", WIDE[1])?)?;
    let coming = Arrivals::start(&lab.client, &targets(WIDE[1])?);
    sys::pause(300);
    let before = routing.watch.changes("proto b")?.len();
    std::fs::remove_file(lab.manifests().join("first.yaml"))?;
    sys::wait_for("the first is served no more", SOON, || {
        let left = lab.nodes.iter().map(|node| node.agent.endpoints(WIDE[0][0], 80).map(|all| all.len()));
        Ok(left.sum::<Result<usize>>()? == 0)
    })?;
    coming.finish(&routing.watch)?.check()?;
    let changes = routing.watch.changes("proto b")?;
    ensure!(changes.len() == before, "the route changed: {:?}", changes.get(before..));
    std::fs::remove_file(lab.manifests().join("second.yaml"))?;
    routing.wait_hops(&WIDE_ROUTES, &[], SOON).map(drop)
}

/// Two Services share the addresses by a key, with a port each: one route for both, which goes with the last of them.
#[test]
fn shared_is_one_route() -> Result<()> {
    let (lab, routing) = scene::start(Bird, &[Bird, Frr], true)?;
    let sharing = |name: &str, port: u16| -> Result<Service> {
        let ports = vec![Port::new("http", port, 8080, "TCP")];
        Ok(Service { ports, sharing: Some("key".to_owned()), ..service(&lab, name, "far", FAR)? })
    };
    for (name, port) in [("one", 80), ("other", 81)] {
        lab.apply(&sharing(name, port)?)?;
        routing.wait_hops(&FAR, &ALL, SOON)?;
    }
    let routes = |family: &str, net: &str| lab.router.ip(&format!("{family} route show root {net}"));
    let count = |text: &str| text.lines().filter(|line| line.contains("proto b")).count();
    for (family, net, ip) in [("-4", "203.0.113.0/24", FAR[0]), ("-6", "2001:db8:ffff::/64", FAR[1])] {
        let text = routes(family, net)?;
        // ip(8) shows an IPv6 route of several next hops as one or as many, by the daemon that made it.
        let named = text.lines().filter(|line| line.contains("proto b")).all(|line| line.starts_with(ip));
        ensure!(count(&text) >= 1 && named && (family == "-6" || count(&text) == 1), "{text}");
        for port in [80, 81] {
            let found = clients::spread(&lab.client, (ip.parse::<IpAddr>()?, port).into(), 120)?;
            ensure!(found.len() == 6, "{ip} at {port}: {found:?}");
        }
    }
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    let before = routing.watch.changes("proto b")?.len();
    std::fs::remove_file(lab.manifests().join("other.yaml"))?;
    sys::wait_for("the other is served no more", SOON, || {
        let left = lab.nodes.iter().map(|node| node.agent.endpoints(FAR[0], 81).map(|all| all.len()));
        Ok(left.sum::<Result<usize>>()? == 0)
    })?;
    coming.finish(&routing.watch)?.check()?;
    let changes = routing.watch.changes("proto b")?;
    ensure!(changes.len() == before, "the route changed: {:?}", changes.get(before..));
    std::fs::remove_file(lab.manifests().join("one.yaml"))?;
    routing.wait_hops(&FAR, &[], SOON).map(drop)
}

/// With graceful restart a daemon that dies and comes back is not noticed, since the node forwards on; what was withdrawn while
/// it was away is withdrawn when it is back. The price: a node that died keeps its traffic for the time of a restart.
fn graceful(router: Kind, node: Kind) -> Result<()> {
    let (mut lab, mut routing) = scene::start_graceful(router, &[node])?;
    lab.apply(&web(&lab)?)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let running = long_lived(&lab)?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    let before = routing.watch.changes("proto b")?.len();
    routing.nodes[0].stop(Signal::SIGKILL)?;
    // Longer than a session lives without a word.
    sys::pause((HOLD + 2) * 1_000);
    routing.nodes[0].start()?;
    sys::pause(3_000);
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let changes = routing.watch.changes("proto b")?;
    println!("{node:?} restarted, {router:?} as router: {} changes of routes", changes.len() - before);
    // FRR replaces an IPv6 route of several next hops by taking it away and adding it in one go.
    let changes = changes.get(before..).unwrap_or_default();
    let again = |(when, line): &&(Instant, String)| {
        let added =
            |(later, one): &(Instant, String)| *later >= *when && *later - *when < REPLACED && line.ends_with(one);
        !line.starts_with("Deleted ") || changes.iter().any(added)
    };
    ensure!(changes.iter().all(|change| again(&change)), "a route went: {changes:?}");
    let seen = coming.finish(&routing.watch)?;
    seen.check()?;
    if changes.is_empty() {
        running.into_iter().try_for_each(|one| one.finish().map(drop))?;
    } else {
        // A route that was replaced may have its next hops in another order.
        count_broken("routes were replaced", running);
    }
    // Withdrawn while the daemon is away: gone with the end of its first round of routes.
    routing.nodes[0].stop(Signal::SIGKILL)?;
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    sys::pause(2_000);
    routing.nodes[0].start()?;
    let begin = Instant::now();
    routing.wait_hops(&FAR, &[], SOON)?;
    println!("withdrawn {:.1?} after the daemon was back", begin.elapsed());
    routing.wait_hops(&WIDE_ROUTES, &ALL, SOON)?;
    if node == Bird {
        return Ok(());
    }
    // The price.
    lab.nodes[1].agent.stop(Signal::SIGKILL)?;
    routing.nodes[1].stop(Signal::SIGKILL)?;
    let begin = Instant::now();
    routing.wait_hops(&WIDE_ROUTES, &[1, 3], Duration::from_secs(RESTART * 3))?;
    let took = begin.elapsed();
    println!("a dead daemon's routes were kept for {took:.1?} (restart time {RESTART} s)");
    ensure!(took > Duration::from_secs(RESTART - 2), "the routes of a dead daemon went after {took:?}");
    Ok(())
}

/// BIRD on the nodes, FRR as router.
#[test]
fn graceful_restart_of_bird() -> Result<()> {
    graceful(Frr, Bird)
}

/// FRR on the nodes, BIRD as router.
#[test]
fn graceful_restart_of_frr() -> Result<()> {
    graceful(Bird, Frr)
}

/// Marks the endpoints of those pods as Kubernetes does: they terminate, then they are gone. In between the router must
/// have turned away from nodes that keep none.
fn end_pods(lab: &Lab, routing: &Routing, web: &mut Service, pods: &[&str], left: &[usize]) -> Result<()> {
    scene::terminate(web, pods);
    let begin = Instant::now();
    lab.place(web)?;
    routing.wait_hops(&FAR, left, Duration::from_secs(10)).context("while the last endpoints terminate")?;
    println!("{pods:?} terminate: next hops {left:?} after {:.1?}", begin.elapsed());
    lab.wait_programmed(web)?;
    web.endpoints.retain(|endpoint| !pods.contains(&endpoint.pod.as_str()));
    lab.apply(web).map(drop)
}

/// With the policy Local the next hops follow the endpoints, from one to six and back: not one new connection fails.
#[test]
fn scaled_under_load() -> Result<()> {
    let (lab, routing) = scene::start(Frr, &[Bird, Frr], true)?;
    let mut web = web(&lab)?;
    let mut later = web.endpoints.split_off(1);
    lab.apply(&web)?;
    routing.wait_hops(&FAR, &[1], SOON)?;
    let running = long_lived(&lab)?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    for endpoint in later.drain(..) {
        web.endpoints.push(endpoint);
        lab.apply(&web)?;
    }
    routing.wait_hops(&FAR, &ALL, SOON)?;
    count_broken("one endpoint to six", running);
    let running = long_lived(&lab)?;
    for (pods, left) in [
        (["node3-pod1"].as_slice(), [1, 2, 3].as_slice()),
        (&["node3-pod0"], &[1, 2]),
        (&["node2-pod0", "node2-pod1"], &[1]),
        (&["node1-pod1"], &[1]),
    ] {
        end_pods(&lab, &routing, &mut web, pods, left)?;
    }
    let seen = coming.finish(&routing.watch)?;
    count_broken("six endpoints to one", running);
    println!("{} new connections, {} led away by the router", seen.count(), seen.led_away);
    seen.check()?;
    // The last of all terminates: where nothing else is ready it is served to its end.
    scene::terminate(&mut web, &["node1-pod0"]);
    lab.apply(&web)?;
    for to in targets(FAR)? {
        clients::spread(&lab.client, to, 10).context("only a terminating endpoint is left")?;
    }
    ensure!(routing.hops(FAR[0])? == [1].into(), "withdrawn though nobody else serves it");
    web.endpoints.clear();
    lab.apply(&web)?;
    routing.wait_hops(&FAR, &[], SOON).map(drop)
}

/// A node is drained: its endpoints terminate and go.
#[test]
fn drained_under_load() -> Result<()> {
    let (lab, routing) = scene::start(Bird, &[Frr, Bird], true)?;
    let mut web = web(&lab)?;
    lab.apply(&web)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let running = long_lived(&lab)?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    end_pods(&lab, &routing, &mut web, &["node2-pod0", "node2-pod1"], &[1, 3])?;
    sys::pause(300);
    let seen = coming.finish(&routing.watch)?;
    count_broken("node2 drained", running);
    println!("{} new connections, {} led away by the router", seen.count(), seen.led_away);
    seen.check()
}

/// Agents die and come back: nothing of it is seen from outside, not even as a change of a route. `cleanup` withdraws.
#[test]
fn agents_come_and_go() -> Result<()> {
    let (mut lab, routing) = scene::start(Frr, &[Frr, Bird], true)?;
    lab.apply(&web(&lab)?)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let running = long_lived(&lab)?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    let before = routing.watch.changes("proto b")?.len();
    // Dead for longer than a session lives without a word.
    for node in 0..2 {
        lab.nodes[node].agent.stop(Signal::SIGKILL)?;
    }
    let dead = Instant::now();
    spread(&lab).context("the tables stay, and so do the addresses")?;
    sys::wait_for("the hold time is over", SOON, || Ok(dead.elapsed() > Duration::from_secs(HOLD + 1)))?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.nodes[2].agent.stop(Signal::SIGTERM)?;
    lab.nodes[2].agent.start()?;
    lab.nodes[2].agent.wait_ready()?;
    spread(&lab)?;
    coming.finish(&routing.watch)?.check()?;
    running.into_iter().try_for_each(|one| one.finish().map(drop))?;
    let changes = routing.watch.changes("proto b")?;
    ensure!(changes.len() == before, "routes changed: {:?}", changes.get(before..));
    // The one that never came back is cleaned up, and one that runs.
    lab.nodes[0].agent.stop(Signal::SIGTERM)?;
    for (node, left) in [(1, [1, 3].as_slice()), (0, &[3])] {
        lab.nodes[node].agent.command(&["cleanup", "--deadline", "1s"], false)?;
        routing.wait_hops(&FAR, left, SOON)?;
        let left = lab.nodes[node].netns.ip("-br address")?;
        ensure!(!left.contains("kube-lb0"), "cleanup left {left}");
    }
    Ok(())
}

/// A node hangs behind a switch, its link up: the hold time ends it. Another one's link goes down with it.
#[test]
fn nodes_die() -> Result<()> {
    let (mut lab, mut routing) = scene::start(Bird, &[Bird, Frr], true)?;
    lab.apply(&web(&lab)?)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let running = long_lived(&lab)?;
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    lab.hang(&lab.nodes[1].netns)?;
    let dead = Instant::now();
    lab.nodes[1].agent.stop(Signal::SIGKILL)?;
    routing.nodes[1].stop(Signal::SIGKILL)?;
    routing.wait_hops(&FAR, &[1, 3], SOON)?;
    let gone = Instant::now();
    println!("node2 hangs: no next hop any more after {:.1?} (hold time {HOLD} s)", dead.elapsed());
    sys::pause(500);
    let seen = coming.finish(&routing.watch)?;
    count_broken("node2 died", running);
    let (_, last) = seen.failed.context("nobody noticed that the node died")?;
    println!("{} of {} new connections failed until then", seen.faults.len(), seen.count());
    ensure!(last <= gone, "a new connection failed {:?} after the next hop was gone", last - gone);
    // Its link goes down, and the node with it.
    let coming = Arrivals::start(&lab.client, &targets(FAR)?);
    sys::pause(300);
    let dead = Instant::now();
    lab.nodes[2].netns.ip("link set eth0 down")?;
    lab.nodes[2].agent.stop(Signal::SIGKILL)?;
    routing.nodes[2].stop(Signal::SIGKILL)?;
    routing.wait_hops(&FAR, &[1], SOON)?;
    let gone = Instant::now();
    println!("node3's link goes down: no next hop any more after {:.1?}", dead.elapsed());
    sys::pause(500);
    let seen = coming.finish(&routing.watch)?;
    println!("{} of {} new connections failed until then", seen.faults.len(), seen.count());
    ensure!(seen.failed.is_none_or(|(_, last)| last <= gone), "failed later: {:?}", seen.faults);
    ensure!(seen.count() > 20, "hardly a new connection");
    for to in targets(FAR)? {
        let found = clients::spread(&lab.client, to, 20)?;
        ensure!(found.len() == 2 && found.keys().all(|pod| pod.starts_with("node1")), "{found:?}");
    }
    Ok(())
}

/// Daemons are restarted, and a link flaps ten times: afterwards all is as before.
#[test]
fn daemons_and_links_flap() -> Result<()> {
    let (lab, mut routing) = scene::start(Frr, &[Bird, Frr], true)?;
    lab.apply(&web(&lab)?)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let shown = |node: usize| -> Result<_> {
        Ok((lab.nodes[node].agent.endpoints(FAR[0], 80)?, lab.nodes[node].agent.endpoints(FAR[1], 80)?))
    };
    let before = (0..3).map(shown).collect::<Result<Vec<_>>>()?;
    for (node, signal) in [(0, Signal::SIGTERM), (1, Signal::SIGKILL)] {
        let speaker = &mut routing.nodes[node];
        let begin = Instant::now();
        speaker.stop(signal)?;
        speaker.start()?;
        // The router may not have noticed that it was away.
        sys::wait_for("the router turned away", Duration::from_secs(1), || Ok(routing.hops(FAR[0])?.len() < 3)).ok();
        routing.wait_hops(&FAR, &ALL, SOON)?;
        println!("{:?} of node{} is back {:.1?} after {signal}", routing.nodes[node].kind, node + 1, begin.elapsed());
    }
    for _ in 0..10 {
        lab.router.ip("link set node3 down")?;
        sys::pause(100);
        lab.router.ip("link set node3 up")?;
        sys::pause(100);
    }
    lab.restore_uplink(3, 0, "eth0")?;
    let begin = Instant::now();
    routing.wait_hops(&FAR, &ALL, Duration::from_secs(30))?;
    println!("three next hops {:.1?} after the last of ten flaps", begin.elapsed());
    spread(&lab)?;
    let after = (0..3).map(shown).collect::<Result<Vec<_>>>()?;
    ensure!(before == after, "before {before:?}, now {after:?}");
    for node in &lab.nodes {
        sys::wait_for("it is ready and has nothing to say", SOON, || {
            let status = node.agent.query(&["status"])?;
            ensure!(status["ready"] == true && status["problems"] == serde_json::json!([]), "{status}");
            Ok(true)
        })?;
        ensure!(node.agent.uplink("eth0")? == "xdp attached", "{}: {}", node.name, node.agent.uplink("eth0")?);
    }
    Ok(())
}
