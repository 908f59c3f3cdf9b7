//! A node that alone does not hear the API server says nothing to routers; one of many that do not goes on. Invariant I20.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use purelb_tests::cluster::Part;
use purelb_tests::lab::kube::NAMESPACE;
use purelb_tests::lab::{Lab, Node, Options};
use purelb_tests::lan::entry;
use purelb_tests::{manifests, sys};
use serde_json::json;

/// Silence of eight seconds, others asked every two, and a busy machine.
const LATER: Duration = Duration::from_secs(40);

fn announced(node: &Node, vips: &[IpAddr]) -> bool {
    vips.iter().all(|ip| !entry(node, "kube-lb0", *ip).is_null())
}

/// While one node is cut off a Service goes and its addresses are another's; then the API server is away for all.
#[test]
fn alone_and_together() -> Result<()> {
    let agent_args = vec!["--deaf-after", "8s", "--host", "0.0.0.0", "--port", "7472"];
    let options = Options { nodes: 3, pods: 1, lan: true, agent_args, ..Options::new("xdp") };
    let (lab, admin, _allocator) = Lab::on_cluster(options)?;
    let v4 = ["203.0.113.64/32", "203.0.113.0/24", "/32"];
    admin.apply(&manifests::remote_group("far", v4, ["2001:db8:ffff::40/128", "2001:db8:ffff::/64", "/128"]))?;
    for node in 0..lab.nodes.len() {
        lab.pod(&admin, node, 0, "web", true)?;
    }
    let vips = lab.service_of(&admin, "web", "far", json!({}))?;
    let on = |nodes: &[bool]| {
        sys::wait_for(&format!("announced: {nodes:?}"), LATER, || {
            Ok(lab.nodes.iter().zip(nodes).all(|(node, on)| announced(node, &vips) == *on))
        })
        .with_context(|| lab.logs())
    };
    on(&[true, true, true])?;
    let first = &lab.nodes[0];
    lab.reach_api(1, false)?;
    on(&[false, true, true])?;
    first.agent.wait_problem(&["API server", "remote addresses are withdrawn"])?;
    // The pods of the new one are not ready anywhere yet: it is announced by nobody, and least of all by who knows the old.
    admin.delete("Service", NAMESPACE, "web")?;
    on(&[false, false, false])?;
    ensure!(lab.service_of(&admin, "other", "far", json!({}))? == vips, "it got others");
    lab.reach_api(1, true)?;
    sys::wait_for("it hears again", LATER, || {
        let status = first.agent.query(&["status"])?.to_string();
        Ok(!status.contains("remote addresses are withdrawn"))
    })?;
    ensure!(!lab.nodes.iter().any(|node| announced(node, &vips)), "announced with no endpoint");
    for node in 0..lab.nodes.len() {
        lab.pod(&admin, node, 0, "other", true)?;
    }
    on(&[true, true, true])?;
    let cluster = lab.cluster.as_ref().context("a cluster")?;
    cluster.kill(Part::Api)?;
    // Almost four times as long.
    for _ in 0..60 {
        ensure!(lab.nodes.iter().all(|node| announced(node, &vips)), "withdrawn, and nobody hears it");
        sys::pause(500);
    }
    cluster.run(Part::Api)?;
    cluster.wait_served()
}
