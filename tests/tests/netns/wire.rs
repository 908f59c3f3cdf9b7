//! Checksums on the wire: every frame that reaches a client, a pod or a virtual machine behind a tap is
//! complete and right, whatever its sender left for others to finish (D15).

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use purelb_tests::capture::{Capture, Tally};
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::manifests::Endpoint;
use purelb_tests::vm::Vm;
use purelb_tests::{each_hook, each_hook_and_rules, sys};

const CLIENT: [&str; 2] = ["198.18.0.2", "2001:db8::2"];

/// Bulk both ways through one pod, seen at both ends: segments of segmentation offload included.
fn both_ends(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(1))?;
    // The last link before each end finishes checksums, and cuts what is longer than a frame.
    lab.router.offload("client", false)?;
    lab.nodes[0].netns.offload("pod0", false)?;
    lab.apply(&lab.web()?)?;
    let pod = &lab.nodes[0].pods[0];
    let client = CLIENT.into_iter().map(|addr| Ok(addr.parse()?)).collect::<Result<Vec<IpAddr>>>()?;
    let at_client = Capture::start(&lab.client, &client)?;
    let at_pod = Capture::start(&pod.netns, &pod.addresses)?;
    for to in lab.targets(80)? {
        let mut conn = Conn::open(&lab.client, to)?;
        conn.echo(20_000)?;
        conn.bulk(3_000_000)?;
        for length in [1, 2, 100, 1_471] {
            conn.echo(length)?;
            clients::udp(&lab.client, to, length.min(1_400))?;
        }
    }
    at_client.finish()?.check(1_000, 8).context("replies at the client")?;
    at_pod.finish()?.check(1_000, 8).context("requests at the pod")
}

/// An endpoint that is a virtual machine behind a tap.
fn machine(options: Options) -> Result<Tally> {
    let lab = Lab::start(options.pods(1))?;
    let node = &lab.nodes[0];
    let addresses = ("198.19.1.77".parse()?, "2001:db8:201::77".parse()?);
    let vm = Vm::start(&node.netns, "tap0", "vm", addresses)?;
    node.netns.ip("link set tap0 up")?;
    node.netns.ip("address add 198.19.1.1/32 dev tap0")?;
    node.netns.ip("address add fe80::1/64 dev tap0 nodad")?;
    node.netns.ip(&format!("route add {} dev tap0", addresses.0))?;
    node.netns.ip(&format!("-6 route add {} dev tap0", addresses.1))?;
    let mut web = lab.web()?;
    let pod = web.endpoints[0].clone();
    web.endpoints =
        vec![Endpoint { pod: "vm".to_owned(), addresses: vec![addresses.0.into(), addresses.1.into()], ..pod.clone() }];
    lab.apply(&web)?;
    let mut traffic = || -> Result<()> {
        for to in lab.targets(80)? {
            let mut conn = Conn::open(&lab.client, to)?;
            ensure!(conn.ask("NAME")? == "vm", "another than the machine answered");
            for length in [1, 100, 1_460, 20_000, 200_000] {
                conn.echo(length)?;
            }
            for length in [1, 100, 1_400] {
                let (name, seen) = clients::udp(&lab.client, to, length)?;
                ensure!(name == "vm" && seen == conn.local()?.ip(), "{name} saw {seen}");
            }
        }
        // Beside a pod.
        web.endpoints.push(pod.clone());
        lab.apply(&web)?;
        for to in lab.targets(80)? {
            let found = clients::spread(&lab.client, to, 45)?;
            ensure!(found.len() == 2 && found.contains_key("vm"), "machine and pod together: {found:?}");
        }
        Ok(())
    };
    let outcome = traffic();
    sys::pause(50);
    let tally = vm.finish()?;
    outcome.with_context(|| format!("the machine received {tally:?}")).map(|()| tally)
}

fn behind_a_tap(options: Options) -> Result<()> {
    machine(options)?.check(200, 6)
}

/// What D15 rests on, and proof that these tests can fail: XDP under senders that leave partial checksums
/// spoils them.
#[test]
fn xdp_spoils_partial_checksums() -> Result<()> {
    let outcome = machine(Options { offload: true, ..Options::new("xdp") });
    let error = outcome.err().context("XDP coped with partial checksums: D15 may be reconsidered")?;
    ensure!(format!("{error:#}").contains("transport checksum"), "it failed for another reason: {error:#}");
    Ok(())
}

#[test]
fn behind_a_tap_auto() -> Result<()> {
    behind_a_tap(Options::new("auto").nft(true))
}

each_hook_and_rules! { both_ends }
each_hook! { behind_a_tap }
