//! `services`: every VIP and port with its endpoints, states and shares, from the live maps.

use std::net::SocketAddr;

use super::live::{Live, View};
use super::{NOTE, painted, say, table, told};
use crate::args::{Output, Query};
use crate::bpf::Maps;

/// Prints them; exit code 2 when the pins cannot be read.
#[must_use]
pub fn run(query: &Query) -> u8 {
    told(show(query))
}

fn show(query: &Query) -> anyhow::Result<u8> {
    let root = &query.instance.bpf_root;
    let maps = Maps::open(root)?;
    let mut views = Live::read(root, &maps)?.views(&maps)?;
    views.sort_by(|a, b| (&a.service, a.vip, a.port, a.protocol).cmp(&(&b.service, b.vip, b.port, b.protocol)));
    if query.output == Output::Json {
        say(&serde_json::to_string(&views)?);
        return Ok(0);
    }
    if views.is_empty() {
        say("no Service is programmed; `purelb-agent status` says why");
        return Ok(0);
    }
    if views.iter().any(|v| v.service.is_empty()) {
        say(&painted(NOTE, "some names are unknown: they stand in the agent's snapshot, which lacks them"));
    }
    let header =
        ["SERVICE", "ADDRESS", "SLOTS", "ENDPOINT", "STATE", "SHARE", "NEW FLOWS", "PACKETS", "BYTES", "DROPS"];
    say(&table(&header, views.iter().flat_map(rows).collect()));
    Ok(0)
}

/// The first line of a service carries its counters; one line an endpoint.
fn rows(view: &View) -> Vec<Vec<String>> {
    let name = if view.service.is_empty() { "?" } else { &view.service };
    let settled = match view.unsettled_slots {
        0 => "settled".to_owned(),
        n => format!("{n} of {} slots unsettled", view.slots),
    };
    let address = format!("{} {}", SocketAddr::new(view.vip, view.port), view.protocol);
    let mut lines: Vec<[String; 3]> = view
        .endpoints
        .iter()
        .map(|e| {
            let share = format!("{:.1} %", e.share * 100.0);
            [SocketAddr::new(e.addr, e.port).to_string(), e.state.to_owned(), share]
        })
        .collect();
    let others = match view.answer {
        "pass" => Some("(new flows to kube-proxy)"),
        "drop" => Some("(new flows are dropped)"),
        _ => None,
    };
    if let Some(others) = others {
        lines.insert(0, [others.to_owned(), String::new(), String::new()]);
    }
    let counters = [view.new_flows, view.packets, view.bytes, view.drops].map(|n| n.to_string());
    let first = [name.to_owned(), address, settled];
    let blank = || vec![String::new(); 3];
    lines
        .into_iter()
        .enumerate()
        .map(|(i, line)| {
            let mut row = if i == 0 { first.to_vec() } else { blank() };
            row.extend(line);
            row.extend(if i == 0 { counters.to_vec() } else { vec![String::new(); 4] });
            row
        })
        .collect()
}
