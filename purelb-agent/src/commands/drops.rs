//! `drops`: reasons with counts; `--watch`: sampled drops as they happen.

use std::net::IpAddr;

use purelb_common::table::Event;
use purelb_common::verdict::{Action, Reason};
use serde_json::json;

use crate::args::{Drops, Output};
use crate::bpf::Maps;

use super::say;

/// Prints them; `--watch` runs until interrupted.
///
/// # Errors
/// The pins are missing.
pub async fn run(args: &Drops) -> anyhow::Result<u8> {
    let maps = Maps::open(&args.query.instance.bpf_root)?;
    let json = args.query.output == Output::Json;
    if args.watch {
        let mut events = maps.events()?;
        while let Some(event) = events.next().await {
            print(&event, json);
        }
        return Ok(0);
    }
    let reasons = maps.reasons()?;
    let action = |reason: Reason| if reason.action() == Action::Drop { "drop" } else { "pass" };
    if json {
        let rows: Vec<_> =
            reasons.iter().map(|(r, n)| json!({"reason": r.name(), "action": action(*r), "packets": n})).collect();
        say(&json!({"reasons": rows}).to_string());
    } else {
        for (reason, packets) in reasons.iter().filter(|(_, n)| *n > 0) {
            say(&format!("{:<22} {:<5} {packets:>12}", reason.name(), action(*reason)));
        }
    }
    Ok(0)
}

fn print(event: &Event, json: bool) {
    let addr = |bytes: [u8; 16]| match (event.family, bytes) {
        (4, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(bytes),
    };
    let reason = Reason::ALL.get(event.reason as usize).map_or("unknown", |r| r.name());
    let (client, vip) = (addr(event.client), addr(event.vip));
    let (from, to, proto) = (event.client_port, event.port, event.proto);
    if json {
        say(&json!({"reason": reason, "proto": proto, "client": client, "client_port": from, "vip": vip, "port": to})
            .to_string());
    } else {
        say(&format!("{reason:<18} proto {proto} {client} {from} -> {vip} {to}"));
    }
}
