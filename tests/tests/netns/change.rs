//! Endpoints come, go and change their state beside long-lived connections.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::{LongLived, Newcomers};
use purelb_tests::manifests::Service;
use purelb_tests::{clients, each_hook_and_rules, sys};

fn long_lived(lab: &Lab, each: usize) -> Result<Vec<LongLived>> {
    lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, each)).collect()
}

fn finish(running: Vec<LongLived>, doomed: &[&str]) -> Result<()> {
    for held in running {
        let count = held.finish_except(doomed)?;
        ensure!(count > 0, "no connection held");
    }
    Ok(())
}

fn with_pods(web: &Service, count: usize) -> Service {
    let mut changed = web.clone();
    changed.endpoints.truncate(count);
    changed
}

/// An endpoint turns unready and ready again, several times: its connections stay, new ones avoid it meanwhile.
/// Connections end, and idle ones speak, in either state: what a flap breaks may mend when it flaps back.
fn flap(options: Options) -> Result<()> {
    let (lab, web) = Lab::serving(options)?;
    let running = long_lived(&lab, 4)?;
    let until_unready = long_lived(&lab, 4)?;
    let mut unready = web.clone();
    unready.endpoints[0].ready = false;
    unready.endpoints[0].serving = false;
    for _ in 0..3 {
        lab.apply(&unready)?;
        for to in lab.targets(80)? {
            let found = clients::spread(&lab.client, to, 45)?;
            ensure!(!found.contains_key("node1-pod0"), "an unready endpoint got new clients: {found:?}");
        }
        lab.apply(&web)?;
        sys::pause(100);
    }
    lab.apply(&unready)?;
    finish(until_unready, &[]).context("while the endpoint is unready")?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 60)?;
        ensure!(found.len() == 3, "after the flap not every endpoint got clients: {found:?}");
    }
    finish(running, &[])
}

/// One endpoint, then six, then one (the others terminating): nothing breaks, all six are used.
fn one_six_one(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(6))?;
    let web = lab.web()?;
    lab.apply(&with_pods(&web, 1))?;
    let mut running = long_lived(&lab, 4)?;
    let until_six = long_lived(&lab, 4)?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 120)?;
        ensure!(found.len() == 6, "not every one of six endpoints got clients: {found:?}");
    }
    finish(until_six, &[]).context("while there are six")?;
    running.extend(long_lived(&lab, 6)?);
    let mut shrunk = web.clone();
    for endpoint in shrunk.endpoints.iter_mut().skip(1) {
        endpoint.ready = false;
        endpoint.terminating = true;
    }
    lab.apply(&shrunk)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 45)?;
        ensure!(found.len() == 1 && found.contains_key("node1-pod0"), "terminating endpoints got clients: {found:?}");
    }
    sys::pause(500);
    finish(running, &[])
}

/// Pods are replaced one by one; only connections to the pods that have gone may end, and nobody who comes
/// meanwhile waits.
fn rolling_update(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(6))?;
    let all = lab.web()?;
    let mut web = with_pods(&all, 3);
    lab.apply(&web)?;
    let running = long_lived(&lab, 6)?;
    let newcomers: Vec<_> = lab.targets(80)?.into_iter().map(|to| Newcomers::start(&lab.client, to)).collect();
    for number in 0..2 {
        let until_terminating = long_lived(&lab, 4)?;
        web.endpoints.push(all.endpoints[3 + number].clone());
        lab.apply(&web)?;
        web.endpoints[0].ready = false;
        web.endpoints[0].terminating = true;
        lab.apply(&web)?;
        sys::pause(100);
        finish(until_terminating, &[]).with_context(|| format!("while pod{number} terminates"))?;
        web.endpoints.remove(0);
        lab.apply(&web)?;
        for to in lab.targets(80)? {
            let found = clients::spread(&lab.client, to, 60)?;
            ensure!(found.len() == 3, "in round {number} clients found {found:?}");
        }
    }
    for one in newcomers {
        ensure!(one.finish()?.len() >= 3, "newcomers met fewer pods than there are");
    }
    finish(running, &["node1-pod0", "node1-pod1"])
}

/// A Service is deleted, and nothing else happens: it is served no more, and another one is.
#[test]
fn service_is_deleted() -> Result<()> {
    let (lab, web) = Lab::serving(Options::new("tcx"))?;
    let mut other = web.clone();
    other.name = "other".to_owned();
    other.ports.iter_mut().for_each(|port| port.port = 81);
    lab.apply(&other)?;
    std::fs::remove_file(lab.manifests().join("other.yaml"))?;
    sys::wait_for("port 81 is served no more", Duration::from_secs(3), || {
        let all = lab.nodes[0].agent.query(&["services"])?;
        Ok(all.as_array().is_some_and(|rows| rows.len() == 4))
    })?;
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 5)?;
    }
    Ok(())
}

each_hook_and_rules! { flap one_six_one rolling_update }
