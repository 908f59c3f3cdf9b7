//! kube-proxy's IPVS mode beside our agent, on a real API server: other machines' kernels often lack `ip_vs`. One node: a
//! guest is slow.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::{clients, sys};
use serde_json::json;

/// In that mode kube-proxy has every VIP on a dummy device of every node, and its tables answer whatever gets that far: what
/// has the policy Local never does, what has the policy Cluster always, and without our agent everything.
#[test]
fn beside_kube_proxy() -> Result<()> {
    // On no device: what a node has itself kube-proxy does not bind.
    let options = Options { nodes: 1, pods: 2, routed: true, kube_proxy: Some("ipvs"), ..Options::new("xdp") };
    let (mut lab, admin, _allocator) = Lab::on_cluster(options)?;
    lab.route_vips(&[1])?;
    (0..2).try_for_each(|pod| lab.pod(&admin, 0, pod, "web", true))?;
    let make = |name: &str, policy: &str| {
        let spec = json!({
            "externalTrafficPolicy": policy, "allocateLoadBalancerNodePorts": true, "selector": {"app": "web"},
        });
        lab.service(&admin, name, spec)
    };
    let (local, cluster) = (make("local", "Local")?, make("cluster", "Cluster")?);
    for vip in local.iter().chain(&cluster) {
        sys::wait_for(&format!("IPVS has {vip}"), Duration::from_secs(30), || {
            let said = lab.nodes[0].netns.ip("-br address show dev kube-ipvs0")?;
            ensure!(said.contains(&vip.to_string()), "{said}");
            Ok(true)
        })?;
    }
    for (vips, ours) in [(&local, true), (&cluster, false)] {
        let before = lab.nodes[0].agent.packets(vips)?;
        served(&lab, vips).with_context(|| lab.logs())?;
        let packets = lab.nodes[0].agent.packets(vips)? - before;
        ensure!((packets > 0) == ours, "{packets} packets to {vips:?} went through XDP");
    }
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.nodes[0].agent.command(&["cleanup"], false)?;
    served(&lab, &local).and_then(|()| served(&lab, &cluster)).context("kube-proxy alone")
}

/// Both pods answer, over TCP and over UDP.
fn served(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    for vip in vips {
        sys::wait_for(&format!("both pods answer at {vip}"), Duration::from_secs(30), || {
            let found = clients::spread(&lab.client, (*vip, 80).into(), 8)?;
            ensure!(found.len() == 2, "{found:?}");
            clients::udp(&lab.client, (*vip, 80).into(), 200).map(|_| true)
        })?;
    }
    Ok(())
}
