//! How long nobody answers for a local address: given for the first time, moved, its agents upgraded, its node dead, and
//! whether two ever did; and how soon a router knows of a remote one.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use indicatif::ProgressBar;
use nix::sys::signal::Signal;
use serde_json::json;

use super::report::{Row, Section};
use crate::answers::Answers;
use crate::lab::Options;
use crate::lan::{Lan, ips, silence};
use crate::load::{LongLived, Newcomers};
use crate::sys;

mod remote;

/// Three probes, 200 ms each, go before an address that nobody had.
const PROBES: f64 = 0.6;
/// Leases and how long nobody may answer when a node dies, in seconds.
const LEASES: [(&str, f64); 3] = [("10s", 12.0), ("5s", 6.5), ("2s", 3.0)];
/// Between an old agent and its new one: an image is pulled.
const PULL: Duration = Duration::from_secs(30);

/// Measures it.
///
/// # Errors
/// The lab does not start, or nobody has an address at last.
pub fn measure(bar: &ProgressBar) -> Result<Section> {
    bar.set_length(4 + LEASES.len() as u64);
    let mut rows = given()?;
    bar.inc(1);
    rows.extend(remote::rows()?);
    bar.inc(1);
    rows.push(moved()?);
    bar.inc(1);
    rows.extend(upgraded()?);
    bar.inc(1);
    for (lease, limit) in LEASES {
        rows.push(dead(lease, limit)?);
        bar.inc(1);
    }
    let method = "Three nodes, agents on a folder. Local: in one network, ARP and neighbour solicitations every 10 ms; the figure is \
                  the longer one of IPv4 and IPv6, and above any limit when two nodes answered at once. Remote: BIRD and FRR on \
                  the nodes, FRR as router.";
    Ok(Section { name: "announce", method: method.to_owned(), rows })
}

fn quiet() -> Options {
    Options { logs: false, ..Options::new("xdp") }
}

fn row(name: &str, value: f64, limit: f64) -> Row {
    Row { name: name.to_owned(), value, unit: "s", limit: Some(limit), detail: String::new(), more: json!({}) }
}

/// Without an answer; beyond any limit when two answered at once.
fn seconds(answers: &Answers) -> Result<f64> {
    Ok(silence(answers, &ips()?).map_or(f64::INFINITY, |silence| silence.as_secs_f64()))
}

fn count(name: &str, value: usize, limit: Option<f64>) -> Row {
    let value = u32::try_from(value).map_or(f64::INFINITY, f64::from);
    Row { unit: "", limit, ..row(name, value, 0.0) }
}

/// From the Service's file to the first answer, allocation in it. IPv6 says that nothing needs to be probed for.
fn given() -> Result<Vec<Row>> {
    let lan = Lan::new(3, "10s", quiet())?;
    lan.group(true)?;
    // Nodes take nothing in the first term of their Leases.
    sys::wait_for("all stand", Duration::from_secs(60), || {
        let status = lan.lab.nodes.first().context("a node")?.agent.query(&["status"])?;
        Ok(status["election"]["members"] == 3)
    })?;
    sys::pause(15_000);
    let asker = lan.ask()?;
    let begin = Instant::now();
    lan.write()?;
    let ips = ips()?;
    for ip in &ips {
        lan.owner(*ip, &[])?;
    }
    sys::pause(300);
    let answers = asker.finish()?;
    let first = |family: fn(&IpAddr) -> bool| {
        let mut of = answers.all.iter().filter(|answer| family(&answer.ip) && !answer.unasked);
        of.next().map_or(f64::INFINITY, |answer| answer.at.duration_since(begin).as_secs_f64())
    };
    Ok(vec![
        row("address given: answered, with probes", first(IpAddr::is_ipv4), PROBES + 0.5),
        row("address given: answered, without probes", first(IpAddr::is_ipv6), 0.5),
    ])
}

fn moved() -> Result<Row> {
    let lan = Lan::serving(3, "10s", quiet())?;
    // What was wanted for a while is not probed for.
    sys::pause(11_000);
    let (_, answers) = lan.hand_over()?;
    Ok(row("graceful move: no answer", seconds(&answers)?, 0.3))
}

fn dead(lease: &'static str, limit: f64) -> Result<Row> {
    let mut lan = Lan::serving(3, lease, quiet())?;
    sys::pause(11_000);
    let (_, answers) = lan.bereave()?;
    Ok(row(&format!("node dies, Lease {lease}: no answer"), seconds(&answers)?, limit))
}

/// One node after the other, under load.
fn upgraded() -> Result<Vec<Row>> {
    let mut lan = Lan::serving(3, "10s", quiet())?;
    let targets: Vec<SocketAddr> = ips()?.into_iter().map(|ip| (ip, 80).into()).collect();
    let client = lan.lab.client.clone();
    let asker = lan.ask()?;
    let running = targets.iter().map(|to| LongLived::start(&client, *to, 5)).collect::<Result<Vec<_>>>()?;
    let coming: Vec<_> = targets.iter().map(|to| Newcomers::start(&client, *to)).collect();
    for node in &mut lan.lab.nodes {
        node.agent.stop(Signal::SIGTERM)?;
        sys::pause(PULL.as_millis().try_into()?);
        node.agent.start()?;
        node.agent.wait_ready()?;
    }
    sys::pause(2_000);
    let mut new = 0;
    for coming in coming {
        new += coming.finish()?.values().sum::<usize>();
    }
    ensure!(new > 1_000, "hardly a new connection: {new}");
    let broken: usize = running.into_iter().map(|running| running.end().1.len()).sum();
    let answers = asker.finish()?;
    let moves: usize = targets.iter().map(|to| answers.owners(to.ip()).len().saturating_sub(1)).sum();
    Ok(vec![
        Row {
            detail: format!("{new} new ones opened at the first SYN, or this would have ended"),
            ..count("agents upgraded, 30 s between: running connections broken", broken, Some(0.0))
        },
        count("the same: addresses that moved", moves, Some(0.0)),
    ])
}
