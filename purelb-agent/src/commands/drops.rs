//! `drops`: reasons with counts; `--watch`: sampled drops as they happen.

use std::net::{IpAddr, SocketAddr};

use purelb_common::neighbour;
use purelb_common::table::Event;
use purelb_common::verdict::{Action, Reason};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::reason::{action, meaning};
use super::{NOTE, complain, painted, say, table, told};
use crate::args::{Drops, Output};
use crate::bpf::Maps;

/// Prints them; `--watch` runs until Ctrl-C. Exit code 2 when the pins cannot be read.
pub async fn run(args: &Drops) -> u8 {
    told(show(args).await)
}

async fn show(args: &Drops) -> anyhow::Result<u8> {
    let maps = Maps::open(&args.query.instance.bpf_root)?;
    let json = args.query.output == Output::Json;
    if args.watch {
        return watch(&maps, json).await;
    }
    let reasons = maps.reasons()?;
    if json {
        let rows: Vec<_> =
            reasons.iter().map(|(r, n)| json!({"reason": r.name(), "action": action(*r), "packets": n})).collect();
        say(&json!({"reasons": rows}).to_string());
        return Ok(0);
    }
    let (mut counted, dropped): (Vec<_>, u64) = (
        reasons.iter().filter(|(_, n)| *n > 0).copied().collect(),
        reasons.iter().filter(|(r, _)| r.action() == Action::Drop).map(|(_, n)| n).sum(),
    );
    if dropped == 0 {
        let seen: u64 = counted.iter().map(|(_, n)| n).sum();
        say(&painted(NOTE, &format!("nothing was dropped yet, of {seen} packets since the tables were pinned")));
    }
    if !counted.is_empty() {
        // Drops first, the most frequent on top.
        counted.sort_by_key(|(r, n)| (r.action() == Action::Pass, std::cmp::Reverse(*n)));
        let row = |(r, n): &(Reason, u64)| vec![r.name().into(), action(*r).into(), n.to_string(), meaning(*r).into()];
        say(&table(&["REASON", "ACTION", "PACKETS", "MEANING"], counted.iter().map(row).collect()));
    }
    Ok(0)
}

async fn watch(maps: &Maps, json: bool) -> anyhow::Result<u8> {
    // Before the first line: whoever reads it may end us at once.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut events = maps.events()?;
    complain("sampled drops, of which only one reader gets each; Ctrl-C ends");
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(0),
            event = events.next() => match event {
                Some(event) if say(&line(&event, json)) => {}
                _ => return Ok(0),
            }
        }
    }
}

fn line(event: &Event, json: bool) -> String {
    let addr = |bytes: [u8; 16]| match (event.family, bytes) {
        (4, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(bytes),
    };
    let reason = Reason::ALL.get(event.reason as usize).copied();
    let name = reason.map_or("unknown", Reason::name);
    let (client, vip) = (addr(event.client), addr(event.vip));
    let (from, to, proto) = (event.client_port, event.port, event.proto);
    let interface = nix::net::if_::if_indextoname(event.ifindex).ok().filter(|name| !name.is_empty());
    let interface = interface.map_or_else(|| event.ifindex.to_string(), |name| name.to_string_lossy().into_owned());
    if json {
        let fields = json!({
            "reason": name, "proto": proto, "client": client, "client_port": from, "vip": vip, "port": to,
            "interface": interface,
        });
        return fields.to_string();
    }
    let (client, vip) = match proto {
        6 | 17 => (SocketAddr::new(client, from).to_string(), SocketAddr::new(vip, to).to_string()),
        _ => (client.to_string(), vip.to_string()),
    };
    let proto = match proto {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        1 | 58 => "ICMP".to_owned(),
        neighbour::ARP => "ARP".to_owned(),
        other => format!("protocol {other}"),
    };
    format!("{name:<18} {proto} {client} -> {vip} at interface {interface}: {}", reason.map_or("", meaning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_as_lines() {
        let mut event =
            Event { family: 4, proto: 6, client_port: 40000, port: 23, ifindex: u32::MAX, ..Event::default() };
        event.reason = Reason::UnknownPort as u32;
        event.client[..4].copy_from_slice(&[198, 51, 100, 7]);
        event.vip[..4].copy_from_slice(&[203, 0, 113, 1]);
        let text = line(&event, false);
        assert!(text.starts_with("unknown-port       TCP 198.51.100.7:40000 -> 203.0.113.1:23 at interface"), "{text}");
        assert!(line(&event, true).contains(r#""client":"198.51.100.7","client_port":40000"#));
        event.family = 6;
        event.proto = 58;
        event.reason = 9999;
        assert!(line(&event, false).starts_with("unknown            ICMP c633:6407:: -> "), "{}", line(&event, false));
    }
}
