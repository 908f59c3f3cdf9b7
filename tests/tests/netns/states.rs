//! States of endpoints: unready, terminating, none that is ready, none at all; and ClientIP affinity.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use purelb_tests::clients::{self, Conn, any};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::LongLived;
use purelb_tests::manifests::Endpoint;
use purelb_tests::{each_hook_and_rules, sys};

/// Bound sockets, one of which speaks to each pod through the VIP.
fn udp_clients(lab: &Lab, to: SocketAddr, pods: usize) -> Result<Vec<(UdpSocket, String)>> {
    let mut found: Vec<(UdpSocket, String)> = Vec::new();
    for _ in 0..100 {
        let socket = lab.client.enter(move || UdpSocket::bind(any(to)))??;
        let (pod, _) = clients::udp_on(&socket, to, 10)?;
        if !found.iter().any(|(_, name)| *name == pod) {
            found.push((socket, pod));
        }
        if found.len() == pods {
            return Ok(found);
        }
    }
    anyhow::bail!("a hundred UDP clients met only {} pods", found.len())
}

fn set(endpoint: &mut Endpoint, ready: bool, serving: bool, terminating: bool) {
    (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, serving, terminating);
}

/// Unready: TCP goes on, UDP decides anew, nobody new. Terminating: both go on, nobody new.
fn one_leaves(options: Options) -> Result<()> {
    let (lab, mut web) = Lab::serving(options)?;
    for to in lab.targets(80)? {
        let running = LongLived::start(&lab.client, to, 3)?;
        let datagrams = udp_clients(&lab, to, 3)?;
        for (terminating, keeps_udp) in [(true, true), (false, false)] {
            set(&mut web.endpoints[0], false, terminating, terminating);
            lab.apply(&web)?;
            let found = clients::spread(&lab.client, to, 40)?;
            ensure!(found.len() == 2 && !found.contains_key("node1-pod0"), "new clients met {found:?}");
            let new: BTreeSet<_> = (0..20).map(|_| Ok(clients::udp(&lab.client, to, 10)?.0)).collect::<Result<_>>()?;
            ensure!(!new.contains("node1-pod0"), "new UDP clients met {new:?}");
            for (socket, pod) in &datagrams {
                let (now, _) = clients::udp_on(socket, to, 10)?;
                let stays = pod != "node1-pod0" || keeps_udp;
                ensure!((now == *pod) == stays, "a UDP flow of {pod} is at {now}, terminating: {terminating}");
            }
        }
        set(&mut web.endpoints[0], true, true, false);
        lab.apply(&web)?;
        running.finish()?;
    }
    Ok(())
}

/// None ready: terminating ones that serve take new clients; when they do not serve either, nobody does and
/// what runs goes on; when they are gone, it ends.
fn none_ready(options: Options) -> Result<()> {
    let (lab, mut web) = Lab::serving(options)?;
    let running =
        lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 3)).collect::<Result<Vec<_>>>()?;
    web.endpoints.iter_mut().for_each(|endpoint| set(endpoint, false, true, true));
    lab.apply(&web)?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "of three that terminate and serve, new clients met {found:?}");
        clients::udp(&lab.client, to, 10)?;
    }
    // Unready ones, then terminating ones that do not serve.
    for terminating in [false, true] {
        web.endpoints.iter_mut().for_each(|endpoint| set(endpoint, false, false, terminating));
        lab.apply(&web)?;
        nobody(&lab).with_context(|| format!("terminating: {terminating}"))?;
        sys::pause(100);
        ensure!(running.iter().all(|one| one.ended() == 0), "a connection broke, terminating: {terminating}");
    }
    for one in running {
        one.finish()?;
    }
    let mut held = lab.targets(80)?.into_iter().map(|_| Vec::<Conn>::new()).collect::<Vec<_>>();
    web.endpoints.iter_mut().for_each(|endpoint| set(endpoint, true, true, false));
    lab.apply(&web)?;
    for (to, conns) in lab.targets(80)?.into_iter().zip(&mut held) {
        conns.push(Conn::open(&lab.client, to)?);
    }
    web.endpoints.clear();
    lab.apply(&web)?;
    nobody(&lab).context("no endpoint at all")?;
    for conn in held.iter_mut().flatten() {
        ensure!(conn.ask_within("NAME", Duration::from_millis(300)).is_err(), "an endpoint that is gone answered");
    }
    Ok(())
}

/// New clients of both protocols are refused with a reason.
fn nobody(lab: &Lab) -> Result<()> {
    for to in lab.targets(80)? {
        let before = lab.nodes[0].agent.dropped("no-endpoint")?;
        let limit = Duration::from_millis(300);
        ensure!(Conn::open_within(&lab.client, any(to), to, limit).is_err(), "a new client of {to} was served");
        let socket = lab.client.enter(move || UdpSocket::bind(any(to)))??;
        ensure!(clients::udp_within(&socket, to, 10, limit).is_err(), "a new UDP client of {to} was served");
        let counted = lab.nodes[0].agent.dropped("no-endpoint")? - before;
        ensure!(counted >= 2, "{counted} packets to {to} were counted as no-endpoint");
    }
    Ok(())
}

/// ClientIP: all connections of a client meet one pod, through a scale-up too, and what is open stays.
fn client_ip(options: Options) -> Result<()> {
    let lab = Lab::start(options.pods(6))?;
    let mut web = lab.web()?;
    web.affinity = true;
    let mut two = web.clone();
    two.endpoints.truncate(2);
    lab.apply(&two)?;
    for to in lab.targets(80)? {
        let mut open = Conn::open(&lab.client, to)?;
        let name = open.ask("NAME")?;
        lab.apply(&web)?;
        let found = clients::spread(&lab.client, to, 20)?;
        ensure!(found.len() == 1 && found.contains_key(&name), "first {name}, after the scale-up {found:?}");
        ensure!(open.ask("NAME")? == name, "the open connection moved");
        open.echo(10_000)?;
        lab.apply(&two)?;
    }
    Ok(())
}

each_hook_and_rules! { one_leaves none_ready client_ip }
