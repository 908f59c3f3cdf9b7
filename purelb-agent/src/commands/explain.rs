//! `explain`: the decision for one packet, by the code that the kernel runs and the live maps.

use std::net::{IpAddr, SocketAddr};

use purelb_common::decide::{self, Flow, Tables, Verdict};
use purelb_common::hash::Address;
use purelb_common::parse::{ACK, SYN};
use purelb_common::table::{Config, ServiceKey, Vip};
use purelb_common::verdict::Reason;
use serde_json::json;

use crate::args::{Explain, Output};
use crate::bpf::Maps;

use super::say;

struct Answer {
    steps: Vec<String>,
    reason: Reason,
    endpoint: Option<SocketAddr>,
}

/// Exit code 0; 1 when the packet would be dropped.
///
/// # Errors
/// The pins are missing, or the addresses are of two families.
pub fn run(args: &Explain) -> anyhow::Result<u8> {
    let maps = Maps::open(&args.query.instance.bpf_root)?;
    let (config, tick) = (maps.config()?, maps.clock()?.tick);
    let tcp = args.protocol.eq_ignore_ascii_case("tcp");
    let flags = if !tcp {
        0
    } else if args.running {
        ACK
    } else {
        SYN
    };
    let ports = (args.source.port(), args.destination.port());
    let observed = maps.observe()?;
    let vip = observed.vips.get(&args.destination.ip()).map(|flags| Vip { flags: *flags });
    let answer = match (args.source.ip(), args.destination.ip()) {
        (IpAddr::V4(c), IpAddr::V4(v)) => {
            answer(&maps.tables4()?, &config, vip, &flow(c.octets(), v.octets(), ports, flags), tcp, tick)
        }
        (IpAddr::V6(c), IpAddr::V6(v)) => {
            answer(&maps.tables6()?, &config, vip, &flow(c.octets(), v.octets(), ports, flags), tcp, tick)
        }
        _ => anyhow::bail!("{} and {} are of two families", args.source, args.destination),
    };
    let dropped = answer.reason.action() == purelb_common::verdict::Action::Drop;
    if args.query.output == Output::Json {
        let endpoint = answer.endpoint.map(|e| e.to_string());
        say(&json!({"verdict": answer.reason.name(), "endpoint": endpoint, "steps": answer.steps}).to_string());
    } else {
        for (number, step) in (1..).zip(&answer.steps) {
            say(&format!("{number}. {step}"));
        }
        let end = answer.endpoint.map_or(String::new(), |e| format!(" to {e}"));
        say(&format!("=> {}{end}", answer.reason.name()));
    }
    Ok(u8::from(dropped))
}

fn flow<A: Address>(client: A, vip: A, (client_port, port): (u16, u16), flags: u8) -> Flow<A> {
    Flow { client, vip, client_port, port, flags: u32::from(flags) }
}

fn answer<A: Address, T: Tables<A>>(
    tables: &T,
    config: &Config,
    vip: Option<Vip>,
    flow: &Flow<A>,
    tcp: bool,
    tick: u32,
) -> Answer {
    let mut steps = Vec::new();
    let Some(vip) = vip else {
        steps.push("the destination is no VIP of this node: untouched".to_owned());
        return Answer { steps, reason: Reason::NotVip, endpoint: None };
    };
    steps.push("the destination is a VIP".to_owned());
    let key = ServiceKey { vip: flow.vip, port: flow.port, proto: if tcp { 6 } else { 17 } };
    let Some(service) = tables.service(&key) else {
        let pass = vip.flags & purelb_common::table::VIP_UNKNOWN_PASS != 0;
        steps.push(format!("no Service has port {}", flow.port));
        let reason = if pass { Reason::PassedUnknownPort } else { Reason::UnknownPort };
        return Answer { steps, reason, endpoint: None };
    };
    steps.push(format!(
        "service {} has {} slots from {}, epoch {}, affinity {} ticks",
        service.id,
        service.mask + 1,
        service.base,
        service.epoch,
        service.affinity
    ));
    let verdict: Option<Verdict<A>> = if tcp {
        decide::decide::<A, T, 6>(tables, config, flow, tick)
    } else {
        decide::decide::<A, T, 17>(tables, config, flow, tick)
    };
    let Some(verdict) = verdict else {
        return Answer { steps, reason: Reason::UnknownPort, endpoint: None };
    };
    if verdict.slot != u32::MAX {
        let slot = tables.slot(verdict.slot);
        let settled = if slot.unsettled(service.epoch) { "unsettled" } else { "settled" };
        steps.push(format!(
            "slot {}: {settled}, cur endpoint {}, prev endpoint {}",
            verdict.slot,
            slot.cur(),
            slot.prev()
        ));
    }
    if verdict.reason != Reason::Forwarded {
        return Answer { steps, reason: verdict.reason, endpoint: None };
    }
    let (addr, port) = (verdict.endpoint.addr.wide(), verdict.endpoint.port);
    let ip = match (A::FAMILY, addr) {
        (4, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(addr),
    };
    let endpoint = SocketAddr::new(ip, port);
    steps.push(format!("endpoint {} is {endpoint}", verdict.id));
    Answer { steps, reason: Reason::Forwarded, endpoint: Some(endpoint) }
}
