//! Endpoints come, go and change their state beside long-lived connections.

use anyhow::{Result, ensure};
use purelb_tests::clients::{self, Conn, LongLived};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::manifests::Service;
use purelb_tests::sys;

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
fn flap(hook: &str, nft: bool) -> Result<()> {
    let lab = Lab::start(Options::new(hook).nft(nft))?;
    let web = lab.web()?;
    lab.apply(&web)?;
    let running = long_lived(&lab, 6)?;
    let mut unready = web.clone();
    unready.endpoints[0].ready = false;
    unready.endpoints[0].serving = false;
    for _ in 0..4 {
        lab.apply(&unready)?;
        for to in lab.targets(80)? {
            let found = clients::spread(&lab.client, to, 30)?;
            ensure!(!found.contains_key("node1-pod0"), "an unready endpoint got new clients: {found:?}");
        }
        lab.apply(&web)?;
        sys::pause(100);
    }
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 60)?;
        ensure!(found.len() == 3, "after the flap not every endpoint got clients: {found:?}");
    }
    finish(running, &[])
}

/// One endpoint, then six, then one (the others terminating): nothing breaks, all six are used.
fn one_six_one(hook: &str, nft: bool) -> Result<()> {
    let mut options = Options::new(hook).nft(nft);
    options.pods = 6;
    let lab = Lab::start(options)?;
    let web = lab.web()?;
    lab.apply(&with_pods(&web, 1))?;
    let mut running = long_lived(&lab, 4)?;
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 120)?;
        ensure!(found.len() == 6, "not every one of six endpoints got clients: {found:?}");
    }
    running.extend(long_lived(&lab, 6)?);
    let mut shrunk = web.clone();
    for endpoint in shrunk.endpoints.iter_mut().skip(1) {
        endpoint.ready = false;
        endpoint.terminating = true;
    }
    lab.apply(&shrunk)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 30)?;
        ensure!(found.len() == 1 && found.contains_key("node1-pod0"), "terminating endpoints got clients: {found:?}");
    }
    sys::pause(500);
    finish(running, &[])
}

/// Pods are replaced one by one; only connections to the pods that have gone may end.
fn rolling_update(hook: &str) -> Result<()> {
    let mut options = Options::new(hook).nft(true);
    options.pods = 6;
    let lab = Lab::start(options)?;
    let all = lab.web()?;
    let mut web = with_pods(&all, 3);
    lab.apply(&web)?;
    let running = long_lived(&lab, 6)?;
    for number in 0..2 {
        web.endpoints.push(all.endpoints[3 + number].clone());
        lab.apply(&web)?;
        web.endpoints[0].ready = false;
        web.endpoints[0].terminating = true;
        lab.apply(&web)?;
        sys::pause(100);
        web.endpoints.remove(0);
        lab.apply(&web)?;
        for to in lab.targets(80)? {
            let found = clients::spread(&lab.client, to, 60)?;
            ensure!(found.len() == 3, "in round {number} clients found {found:?}");
        }
    }
    finish(running, &["node1-pod0", "node1-pod1"])
}

/// When only terminating endpoints that serve are left, they take new clients.
fn all_terminating(hook: &str) -> Result<()> {
    let lab = Lab::start(Options::new(hook))?;
    let mut web = lab.web()?;
    lab.apply(&web)?;
    let running = long_lived(&lab, 3)?;
    for endpoint in &mut web.endpoints {
        endpoint.ready = false;
        endpoint.terminating = true;
    }
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 20)?;
    }
    finish(running, &[])
}

/// ClientIP: all connections of a client meet one pod, through a scale-up too.
fn client_ip(hook: &str) -> Result<()> {
    let mut options = Options::new(hook);
    options.pods = 6;
    let lab = Lab::start(options)?;
    let mut web = lab.web()?;
    web.affinity = true;
    lab.apply(&with_pods(&web, 2))?;
    for to in lab.targets(80)? {
        let mut open = Conn::open(&lab.client, to)?;
        let name = open.ask("NAME")?;
        lab.apply(&web)?;
        let found = clients::spread(&lab.client, to, 20)?;
        ensure!(found.len() == 1 && found.contains_key(&name), "first {name}, after the scale-up {found:?}");
        ensure!(open.ask("NAME")? == name, "the open connection moved");
        lab.apply(&with_pods(&web, 2))?;
    }
    Ok(())
}

macro_rules! both_hooks {
    ($($name:ident: $test:expr;)*) => {
        $(mod $name {
            use super::*;
            #[test]
            fn xdp() -> Result<()> {
                ($test)("xdp")
            }
            #[test]
            fn tcx() -> Result<()> {
                ($test)("tcx")
            }
        })*
    };
}

both_hooks! {
    flap_alone: |hook| flap(hook, false);
    flap_beside_conntrack: |hook| flap(hook, true);
    one_six_one_alone: |hook| one_six_one(hook, false);
    one_six_one_beside_conntrack: |hook| one_six_one(hook, true);
    rolling: rolling_update;
    terminating: all_terminating;
    affinity: client_ip;
}
