//! With no cluster at all: agents that give addresses and serve them, out of a folder of manifests.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::LongLived;
use purelb_tests::{clients, each_hook, manifests, sys};
use serde_json::Value;

fn state(lab: &Lab, service: &str) -> Result<Value> {
    let path = lab.state().join("services").join(format!("default_{service}.json"));
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// A Service at addresses that are only known once they are given.
fn at(lab: &Lab, name: &str, addresses: [&str; 2]) -> Result<manifests::Service> {
    let vips = addresses.iter().map(|ip| ip.parse().context("VIP")).collect::<Result<_>>()?;
    Ok(manifests::Service { name: name.to_owned(), vips, ..lab.web()? })
}

/// Manifests without a single address become Services that answer, and what is given survives every agent's death.
fn addresses_are_given(options: Options) -> Result<()> {
    let mut lab = Lab::start(Options { standalone: true, nodes: 2, ..options })?;
    let web = lab.web()?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        ensure!(!clients::spread(&lab.client, to, 20)?.is_empty(), "no answer");
    }
    let said = state(&lab, "web")?;
    ensure!(said["annotations"]["purelb.io/allocated-from"] == "default", "{said}");
    ensure!(said["condition"]["reason"] == "Allocated", "{said}");

    let running: Vec<_> =
        lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 4)).collect::<Result<_>>()?;
    // Whichever of them allocates: the other one goes on with it.
    for node in 0..2 {
        lab.nodes[node].agent.stop(Signal::SIGKILL)?;
        let second = at(
            &lab,
            &format!("next{node}"),
            [["203.0.113.2", "2001:db8:ffff::2"], ["203.0.113.3", "2001:db8:ffff::3"]][node],
        )?;
        let mut object = second.service();
        object.as_object_mut().context("an object")?.remove("status");
        let mut objects = vec![object];
        objects.extend(second.slices());
        lab.write_objects(&format!("{}.yaml", second.name), &objects)?;
        sys::wait_for("an address from the one that is left", Duration::from_secs(10), || {
            let said = state(&lab, &second.name)?;
            Ok(said["ingress"][0] == second.vips[0].to_string() && said["ingress"][1] == second.vips[1].to_string())
        })?;
        lab.nodes[node].agent.start()?;
        lab.nodes[node].agent.wait_ready()?;
        lab.wait_programmed(&second)?;
    }
    for one in running {
        one.finish()?;
    }
    // All start anew at once, and nothing moves.
    for node in &mut lab.nodes {
        node.agent.stop(Signal::SIGTERM)?;
    }
    for node in &mut lab.nodes {
        node.agent.start()?;
    }
    for node in &mut lab.nodes {
        node.agent.wait_ready()?;
    }
    lab.wait_programmed(&web)?;
    ensure!(state(&lab, "web")? == said, "{} after {said}", state(&lab, "web")?);
    Ok(())
}

/// What cannot be given is said on every node; a Service that goes frees its address for one that waits.
fn refusals_are_shown(options: Options) -> Result<()> {
    let lab = Lab::start(Options { standalone: true, ..options })?;
    lab.write_objects("group.yaml", &[manifests::service_group("203.0.113.1/32", "2001:db8:ffff::1/128")])?;
    lab.apply(&lab.web()?)?;
    let mut second = at(&lab, "second", ["203.0.113.1", "2001:db8:ffff::1"])?.service();
    second.as_object_mut().context("an object")?.remove("status");
    lab.write_objects("second.yaml", &[second])?;
    lab.nodes[0].agent.wait_problem(&["Service default/second", "PoolExhausted"])?;
    let (code, text) = lab.nodes[0].agent.page("/readyz")?;
    ensure!(code == 200 && text.contains("ok"), "/readyz: {code} {text}");
    ensure!(lab.nodes[0].agent.page("/livez")?.0 == 200, "/livez");
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 10)?;
    }
    let (code, text) = lab.nodes[0].agent.page("/metrics")?;
    ensure!(code == 200, "/metrics: {code}");
    let value = |series: &str| text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse::<f64>().ok());
    let rejected = r#"purelb_address_pool_allocation_rejected_total{pool="<none>",reason="exhausted"}"#;
    for (series, least) in [
        (r#"purelb_address_pool_size{pool="default"}"#, 2.0),
        (r#"purelb_address_pool_addresses_in_use{pool="default"}"#, 2.0),
        (rejected, 1.0),
        (r#"purelb_datapath_packets_total{reason="forwarded",action="pass"}"#, 20.0),
        (
            r#"purelb_datapath_service_new_flows_total{service="default/web",vip="203.0.113.1",port="80",protocol="TCP"}"#,
            10.0,
        ),
        ("purelb_datapath_endpoints", 6.0),
    ] {
        ensure!(value(series).is_some_and(|value| value >= least), "{series} is {:?} in\n{text}", value(series));
    }
    lab.write_objects(
        "broken.yaml",
        &[{
            let mut group = manifests::service_group("203.0.113.9-203.0.113.2", "2001:db8:ffff::1/128");
            group["metadata"]["name"] = "broken".into();
            group
        }],
    )?;
    lab.nodes[0].agent.wait_problem(&[
        "ServiceGroup purelb-system/broken",
        "spec.local.v4pools[0].pool",
        "ends before it begins",
    ])?;
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    sys::wait_for("the address of the one that went", Duration::from_secs(10), || {
        Ok(state(&lab, "second")?["ingress"][0] == "203.0.113.1" && state(&lab, "web").is_err())
    })?;
    sys::wait_for("the series of the Service that went to be gone", Duration::from_secs(5), || {
        Ok(!lab.nodes[0].agent.page("/metrics")?.1.contains("default/web"))
    })
}

each_hook! { addresses_are_given refusals_are_shown }
