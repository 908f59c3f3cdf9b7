//! Flows that look alike to a pod: one client port towards two VIP:ports that share a pod's port, towards
//! the pod itself, and one after the other (4.3 of the design).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::manifests::{Port, Service};
use purelb_tests::{each_hook_and_rules, sys};

/// VIPs of a second Service with the pods of the first.
const OTHER: [&str; 2] = ["203.0.113.2", "2001:db8:ffff::2"];
/// A port that nothing else uses, so that every test begins with a tuple that was never there.
const CLIENT_PORT: u16 = 20_000;

fn own(to: SocketAddr) -> Result<IpAddr> {
    Ok(if to.is_ipv4() { "198.18.0.2" } else { "2001:db8::2" }.parse()?)
}

fn open(lab: &Lab, port: u16, to: SocketAddr) -> Result<Conn> {
    let conn = Conn::open_from(&lab.client, SocketAddr::new(own(to)?, port), to);
    conn.with_context(|| format!("from client port {port}"))
}

/// A Service at [`OTHER`] with the endpoints of `web`.
fn other(lab: &Lab, web: &Service) -> Result<Service> {
    let vips = OTHER.into_iter().map(|vip| Ok(vip.parse()?)).collect::<Result<Vec<_>>>()?;
    for (vip, rest) in OTHER.into_iter().zip(["/32", "/128 nodad"]) {
        lab.nodes[0].netns.ip(&format!("address add dev kube-lb0 {vip}{rest}"))?;
    }
    let other = Service { name: "other".to_owned(), vips, ..web.clone() };
    lab.apply(&other)?;
    Ok(other)
}

/// From one client port to both at once: data on both after the handshakes, on the first after the second
/// closed, on the second after the first closed, and on a connection that takes the closed one's place.
fn side_by_side(lab: &Lab, client_port: u16, one: SocketAddr, two: SocketAddr) -> Result<()> {
    for (port, first_ends) in [(client_port, false), (client_port + 1, true)] {
        let mut first = open(lab, port, one)?;
        first.echo(1_000)?;
        let mut second = open(lab, port, two)?;
        for _ in 0..2 {
            first.echo(1_000).context("first, beside the second")?;
            second.echo(1_000).context("second, beside the first")?;
        }
        let (mut left, ended, place) = if first_ends { (second, first, one) } else { (first, second, two) };
        drop(ended);
        left.echo(1_000).context("at once after the other closed")?;
        sys::pause(50);
        left.echo(20_000).context("a moment after the other closed")?;
        // Another port, as the closed tuple is in TIME_WAIT at the client.
        let mut again = open(lab, port + 100, place)?;
        again.echo(1_000)?;
        left.echo(1_000).context("beside a newcomer")?;
    }
    Ok(())
}

fn two_ports_one_target(options: Options) -> Result<()> {
    let lab = Lab::start(options)?;
    let mut web = lab.web()?;
    web.ports.push(Port::new("https", 443, 8080, "TCP"));
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        for round in 0..4 {
            side_by_side(&lab, CLIENT_PORT + 2 * round, to, SocketAddr::new(to.ip(), 443))?;
        }
    }
    Ok(())
}

fn two_vips_one_set_of_pods(options: Options) -> Result<()> {
    let (lab, web) = Lab::serving(options)?;
    other(&lab, &web)?;
    for (one, two) in VIPS.into_iter().zip(OTHER) {
        let (one, two) = (SocketAddr::new(one.parse()?, 80), SocketAddr::new(two.parse()?, 80));
        for round in 0..4 {
            side_by_side(&lab, CLIENT_PORT + 2 * round, one, two)?;
        }
    }
    Ok(())
}

/// With a single pod there is no other place: the second is refused with a reason and harms the first in
/// nothing; when the first has closed, the same client port is free for the second.
fn two_vips_one_pod(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(1))?;
    let web = lab.web()?;
    lab.apply(&web)?;
    other(&lab, &web)?;
    for (one, two) in VIPS.into_iter().zip(OTHER) {
        let both = [SocketAddr::new(one.parse()?, 80), SocketAddr::new(two.parse()?, 80)];
        for (round, (one, two)) in [(both[0], both[1]), (both[1], both[0])].into_iter().enumerate() {
            let port = CLIENT_PORT + u16::try_from(round)?;
            let mut first = open(&lab, port, one)?;
            first.echo(1_000)?;
            let before = lab.nodes[0].agent.dropped("tuple-collision")?;
            let from = SocketAddr::new(own(one)?, port);
            let second = Conn::open_within(&lab.client, from, two, Duration::from_millis(500));
            ensure!(second.is_err(), "two connections from {from} to the same socket of the pod");
            ensure!(lab.nodes[0].agent.dropped("tuple-collision")? > before, "the refusal was not counted");
            first.echo(1_000).context("after the refusal")?;
            drop(first);
            sys::pause(50);
            let mut second = open(&lab, port, two).context("after the first closed")?;
            second.echo(1_000)?;
            second.bulk(100_000)?;
        }
    }
    Ok(())
}

/// A client may speak to a pod itself and through the VIP; replies of each keep their source.
fn direct_beside_vip(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    for to in lab.targets(80)? {
        for pod in &lab.nodes[0].pods {
            let direct = SocketAddr::new(address(&pod.addresses, to)?, 8080);
            let mut through_vip = Conn::open(&lab.client, to)?;
            let mut straight = Conn::open(&lab.client, direct)?;
            for _ in 0..3 {
                straight.echo(2_000)?;
                through_vip.echo(2_000)?;
                clients::udp(&lab.client, direct, 100)?;
                clients::udp(&lab.client, to, 100)?;
            }
            ensure!(straight.ask("NAME")? == pod.name, "a direct connection reached another pod");
        }
    }
    Ok(())
}

/// The port of a closed connection through the VIP is used at once for one to the pod itself, and the other
/// way round.
fn port_used_before(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(1))?;
    let web = lab.web()?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let direct = SocketAddr::new(address(&lab.nodes[0].pods[0].addresses, to)?, 8080);
        for (round, wait) in [0, 100, 1_500].into_iter().enumerate() {
            let port = CLIENT_PORT + 2 * u16::try_from(round)?;
            for (port, before, after) in [(port, to, direct), (port + 1, direct, to)] {
                let mut conn = open(&lab, port, before)?;
                conn.echo(2_000)?;
                drop(conn);
                sys::pause(wait);
                let mut conn = open(&lab, port, after)
                    .with_context(|| format!("{wait} ms after a connection to {before} ended"))?;
                conn.echo(2_000)?;
                conn.bulk(100_000)?;
            }
        }
        // There and back, again and again, from ports that alternate.
        for round in 0..6_u16 {
            let port = CLIENT_PORT + 50 + round;
            let (first, second) = if round % 2 == 0 { (to, direct) } else { (direct, to) };
            open(&lab, port, first)?.echo(500)?;
            let mut held = open(&lab, port, second)?;
            held.echo(500)?;
            clients::spread(&lab.client, to, 3)?;
            held.echo(500)?;
        }
    }
    Ok(())
}

fn address(all: &[IpAddr], to: SocketAddr) -> Result<IpAddr> {
    all.iter().find(|addr| addr.is_ipv4() == to.is_ipv4()).copied().context("no address of that family")
}

each_hook_and_rules! {
    two_ports_one_target
    two_vips_one_set_of_pods
    two_vips_one_pod
    direct_beside_vip
    port_used_before
}
