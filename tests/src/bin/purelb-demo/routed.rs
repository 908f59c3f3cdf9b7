//! The second part: three nodes announce a remote address by BGP, and a router spreads clients over them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::clients;
use purelb_tests::lab::Lab;
use purelb_tests::load::LongLived;
use purelb_tests::routing::Kind::{Bird, Frr};
use purelb_tests::routing::arrivals::Arrivals;
use purelb_tests::routing::scene::{self, ALL, FAR, SOON, targets};
use purelb_tests::routing::{HOLD, Routing};
use purelb_tests::sys;

use crate::screen::Screen;

/// All of its steps; what it stands on.
pub fn show(screen: &mut Screen) -> Result<(Lab, Routing)> {
    println!(
        "\nclient - router (FRR) - three nodes (BIRD, FRR, BIRD) with two pods each; the pool begins with {} and {}",
        FAR[0], FAR[1]
    );
    let (mut lab, mut routing) = scene::start(Frr, &[Bird, Frr], false)?;
    let mut web = scene::service(&lab, "web", "far", FAR)?;
    let to = targets(FAR)?;

    screen.step("A remote address goes onto kube-lb0 of three nodes, and BGP takes it to the router", |screen| {
        let begin = Instant::now();
        lab.place(&web)?;
        routing.wait_hops(&FAR, &ALL, SOON)?;
        screen.say(&format!("{:.1?} after the Service was written:", begin.elapsed()));
        screen.command("ip address show dev kube-lb0 # on node1");
        screen.shown(&lab.nodes[0].netns.ip("-br address show dev kube-lb0")?, 4);
        screen.command(&format!("ip route show {} # on the router", FAR[0]));
        screen.shown(&lab.router.ip(&format!("route show {}", FAR[0]))?, 6);
        lab.wait_programmed(&web)
    });
    screen.step("The router spreads clients over all nodes, each node over its pods", |screen| {
        for to in &to {
            screen.say(&format!("90 TCP connections to {to}"));
            let found = clients::spread(&lab.client, *to, 90)?;
            screen.bars(&found);
            let nodes = found.keys().filter_map(|pod| pod.split('-').next()).collect::<std::collections::BTreeSet<_>>();
            ensure!(nodes.len() == 3, "not every node got clients");
        }
        Ok(())
    });
    screen.step("A node is drained: the router turns away while its pods still serve", |screen| {
        let running = LongLived::start(&lab.client, to[0], 5)?;
        let coming = Arrivals::start(&lab.client, &to);
        sys::pause(300);
        let pods = ["node2-pod0", "node2-pod1"];
        scene::terminate(&mut web, &pods);
        let begin = Instant::now();
        lab.place(&web)?;
        routing.wait_hops(&FAR, &[1, 3], SOON)?;
        screen.say(&format!("its pods terminate; {:.1?} later it is no next hop any more", begin.elapsed()));
        web.endpoints.retain(|endpoint| !pods.contains(&endpoint.pod.as_str()));
        lab.apply(&web)?;
        let seen = coming.finish(&routing.watch)?;
        seen.check()?;
        let (held, broken) = running.end();
        screen.say(&format!("{} new connections meanwhile, none failed", seen.count()));
        screen.say(&format!(
            "of {} long-lived ones {held} held, the router led {} to other nodes",
            held + broken.len(),
            broken.len()
        ));
        Ok(())
    });
    screen.step("A node hangs, its link up: BGP gives it up after its hold time", |screen| {
        let coming = Arrivals::start(&lab.client, &to);
        sys::pause(300);
        lab.hang(&lab.nodes[2].netns)?;
        lab.nodes[2].agent.stop(Signal::SIGKILL)?;
        routing.nodes[2].stop(Signal::SIGKILL)?;
        let dead = Instant::now();
        routing.wait_hops(&FAR, &[1], SOON)?;
        let gone = Instant::now();
        screen.say(&format!("the router turned away after {:.1?} (hold time {HOLD} s)", dead.elapsed()));
        sys::wait_for("a moment without it", Duration::from_secs(5), || Ok(gone.elapsed() > Duration::from_secs(1)))?;
        let seen = coming.finish(&routing.watch)?;
        let (_, last) = seen.failed.context("nobody noticed")?;
        screen.say(&format!(
            "{} new connections failed until then, none of {} since or elsewhere",
            seen.faults.len(),
            seen.count()
        ));
        ensure!(last <= gone, "one failed {:.1?} after the router had turned away", last - gone);
        Ok(())
    });
    if !screen.failed.is_empty() {
        println!("{}\n{}", lab.logs(), routing.logs());
    }
    Ok((lab, routing))
}
