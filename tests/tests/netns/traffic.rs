//! Traffic through the VIP: sizes, families, hooks, rules beside it (T1, T7, T10 of the correctness matrix).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::load::LongLived;
use purelb_tests::manifests::Port;
use purelb_tests::{each_hook, each_hook_and_rules, sys};

/// The lab carries packets without any agent: what fails elsewhere is not the lab.
#[test]
fn lab_alone() -> Result<()> {
    let mut options = Options::new("xdp").nft(true);
    options.nodes = 2;
    let lab = Lab::build(options)?;
    for pod in lab.nodes.iter().flat_map(|node| &node.pods) {
        for addr in &pod.addresses {
            let to = SocketAddr::new(*addr, 8080);
            let mut conn = Conn::open(&lab.client, to)?;
            conn.echo(20_000)?;
            conn.bulk(1_000_000)?;
            ensure!(conn.http()? == pod.name && conn.ask("NAME")? == pod.name, "another pod answered at {to}");
            clients::udp(&lab.client, to, 100)?;
            let running = LongLived::start(&lab.client, to, 1)?;
            sys::pause(200);
            ensure!(running.ended() == 0 && running.finish()? == 3, "a long-lived connection is missing");
        }
    }
    Ok(())
}

/// TCP of 100 B and 20 kB, bulk both ways, HTTP keep-alive and UDP, v4 and v6; every endpoint gets clients.
fn t1(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    for to in lab.targets(80)? {
        let mut conn = Conn::open(&lab.client, to)?;
        for length in [100, 20_000] {
            conn.echo(length)?;
        }
        let client = conn.local()?.ip().to_string();
        ensure!(conn.ask("PEER")? == client, "the pod must see the client's own address");
        conn.bulk(4_000_000)?;
        let name = conn.ask("NAME")?;
        for _ in 0..3 {
            ensure!(conn.http()? == name, "HTTP keep-alive moved to another pod");
        }
        let found = clients::spread(&lab.client, to, 60)?;
        ensure!(found.len() == 3, "not every endpoint got TCP clients: {found:?}");
        let mut pods = BTreeSet::new();
        for _ in 0..60 {
            let (pod, peer) = clients::udp(&lab.client, to, 100)?;
            ensure!(peer.to_string() == client, "the pod saw {peer} as UDP client");
            pods.insert(pod);
        }
        ensure!(pods.len() == 3, "not every endpoint got UDP clients: {pods:?}");
        clients::udp(&lab.client, to, 1_200)?;
    }
    Ok(())
}

#[test]
fn t7_generic() -> Result<()> {
    t1(Options::new("xdp-generic"))
}

#[test]
fn t7_generic_beside_rules() -> Result<()> {
    t1(Options::new("xdp-generic").nft(true))
}

/// Senders that leave partial checksums are the default of [`t1`] at tcx; here they finish them (`tx off`).
fn t10_finished_checksums(options: Options) -> Result<()> {
    t1(Options { offload: false, ..options })
}

#[test]
fn t10_tx_off() -> Result<()> {
    t10_finished_checksums(Options::new("tcx"))
}

#[test]
fn t10_tx_off_beside_rules() -> Result<()> {
    t10_finished_checksums(Options::new("tcx").nft(true))
}

/// On veth links `auto` must choose tcx by itself.
#[test]
fn t10_auto_beside_rules() -> Result<()> {
    t1(Options::new("auto").nft(true))
}

fn iperf3(options: Options) -> Result<()> {
    let lab = Lab::start(options)?;
    let mut web = lab.web()?;
    web.endpoints.truncate(1);
    web.ports = vec![Port::new("iperf", 5201, 5201, "TCP")];
    lab.apply(&web)?;
    for (vip, reverse) in VIPS.into_iter().zip(["", "-R"]) {
        let mut server =
            lab.nodes[0].pods[0].netns.command("iperf3").args(["-s", "-1"]).stdout(Stdio::null()).spawn()?;
        let listens = sys::wait_for("iperf3 listens", Duration::from_secs(20), || {
            Ok(lab.nodes[0].pods[0].netns.exec("ss -Htln")?.contains(":5201"))
        });
        let result = listens.and_then(|()| lab.client.exec(&format!("iperf3 -c {vip} -p 5201 -t 1 -P 2 {reverse}")));
        if result.is_err() {
            server.kill()?;
        }
        server.wait()?;
        result?;
    }
    Ok(())
}

each_hook_and_rules! { t1 }
each_hook! { iperf3 }
