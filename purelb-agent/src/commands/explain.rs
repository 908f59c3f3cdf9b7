//! `explain`: what happens to one packet, by the code that the kernel runs and the live maps.

mod trace;
mod unknown;

use std::net::{IpAddr, SocketAddr};

use purelb_common::decide::{self, Flow, Tables, Verdict};
use purelb_common::hash::Address;
use purelb_common::parse::{self, ACK, Network, RST, SYN};
use purelb_common::table::{Config, RangeKey, SERVICE_RANGES, Service, ServiceKey};
use purelb_common::verdict::{Action, Reason};
use purelb_plan::observed::Frontend;
use purelb_plan::world::Protocol;
use serde_json::json;

use super::live::{Live, protocol_name, seconds, silence};
use super::reason::{action, meaning};
use super::status::{ingress_hook, links};
use super::{BAD, GOOD, painted, say, told};
use crate::args::{Explain, Output};
use crate::bpf::{ClockReading, Maps};
use trace::Traced;

/// What happens, and what was looked at on the way.
struct Answer {
    steps: Vec<String>,
    reason: Reason,
    service: Option<String>,
    endpoint: Option<SocketAddr>,
}

/// Everything but the tables.
struct Packet<'a> {
    live: &'a Live,
    config: Config,
    clock: ClockReading,
    protocol: Protocol,
    client: SocketAddr,
    vip: SocketAddr,
    flags: u8,
}

/// Exit code 0 when the packet is forwarded or passed, 1 when it is dropped, 2 when the pins cannot be read
/// or the addresses are of two families.
#[must_use]
pub fn run(args: &Explain) -> u8 {
    told(show(args))
}

fn show(args: &Explain) -> anyhow::Result<u8> {
    let root = &args.query.instance.bpf_root;
    let maps = Maps::open(root)?;
    let live = Live::read(root, &maps)?;
    let protocol = if args.protocol.eq_ignore_ascii_case("tcp") { Protocol::Tcp } else { Protocol::Udp };
    let flags = match (protocol, args.running) {
        (Protocol::Udp, _) => 0,
        (Protocol::Tcp, true) => ACK,
        (Protocol::Tcp, false) => args.flags.unwrap_or(SYN),
    };
    let (client, vip) = (args.source, args.destination);
    let packet = Packet { live: &live, config: maps.config()?, clock: maps.clock()?, protocol, client, vip, flags };
    let mut answer = match (client.ip(), vip.ip()) {
        (IpAddr::V4(c), IpAddr::V4(v)) => packet.answer(&maps.tables4()?, c.octets(), v.octets()),
        (IpAddr::V6(c), IpAddr::V6(v)) => packet.answer(&maps.tables6()?, c.octets(), v.octets()),
        _ => anyhow::bail!("{client} and {vip} are of two families; give both as IPv4 or both as IPv6"),
    };
    if links(root).values().all(|hooks| ingress_hook(hooks).is_none()) {
        let note = "no uplink has a program (see `purelb-agent status`): no packet meets these tables now";
        answer.steps.insert(0, note.to_owned());
    }
    let dropped = answer.reason.action() == Action::Drop;
    if args.query.output == Output::Json {
        let fields = json!({
            "verdict": answer.reason.name(),
            "action": action(answer.reason),
            "service": answer.service,
            "endpoint": answer.endpoint.map(|e| e.to_string()),
            "steps": answer.steps,
        });
        say(&fields.to_string());
    } else {
        for (number, step) in (1..).zip(&answer.steps) {
            say(&format!("{number}. {step}"));
        }
        let name = painted(if dropped { BAD } else { GOOD }, answer.reason.name());
        let end = answer.endpoint.map_or_else(|| meaning(answer.reason).to_owned(), |e| format!("to {e}"));
        say(&format!("=> {name}: {end}"));
    }
    Ok(u8::from(dropped))
}

impl Packet<'_> {
    fn answer<A: Address, T: Tables<A>>(&self, tables: &T, client: A, vip: A) -> Answer {
        let mut answer = Answer { steps: Vec::new(), reason: Reason::NotVip, service: None, endpoint: None };
        let Some(vip_flags) = self.live.observed.vips.get(&self.vip.ip()).copied() else {
            answer.steps.push(format!("{} is no VIP of this node", self.vip.ip()));
            return answer;
        };
        answer.steps.push(format!("{} is a VIP of this node", self.vip.ip()));
        let (silent, stale) = silence(&self.config, self.clock.tick);
        if stale {
            let age = seconds(silent, self.clock.hz);
            answer.steps.push(format!(
                "the agent was last heard of {age:.0} s ago: the tables are stale, new flows pass and nothing is dropped"
            ));
        }
        let flow =
            Flow { client, vip, client_port: self.client.port(), port: self.vip.port(), flags: u32::from(self.flags) };
        answer.reason = match self.headers(&mut answer.steps) {
            Some(reason) => reason,
            None => self.decided(tables, &flow, vip_flags, &mut answer),
        };
        if stale && answer.reason.action() == Action::Drop {
            answer.steps.push(format!("it would be dropped ({}), but drops lapse", answer.reason.name()));
            answer.reason = Reason::PassedStale;
        }
        answer
    }

    /// What the headers alone decide.
    fn headers(&self, steps: &mut Vec<String>) -> Option<Reason> {
        if matches!(self.client.ip(), IpAddr::V6(c) if c.to_ipv4_mapped().is_some()) {
            steps.push(format!("{} is an IPv4 address inside an IPv6 header", self.client.ip()));
            return Some(Reason::MappedAddress);
        }
        if self.protocol == Protocol::Udp {
            return None;
        }
        // A header without options, judged by the program's own parser.
        let mut header = [0u8; 20];
        (header[12], header[13]) = (5 << 4, self.flags);
        let network = Network {
            proto: parse::TCP,
            transport: 0,
            length: 20,
            later_fragment: false,
            first_fragment: false,
            hop_limit: 64,
        };
        let refused = parse::transport(header.as_slice(), &network, 0).err()?;
        steps.push("no TCP stack sends these flags together".to_owned());
        Some(refused)
    }

    fn decided<A: Address, T: Tables<A>>(
        &self,
        tables: &T,
        flow: &Flow<A>,
        vip_flags: u32,
        answer: &mut Answer,
    ) -> Reason {
        let proto: u16 = if self.protocol == Protocol::Tcp { 6 } else { 17 };
        let steps = &mut answer.steps;
        let Some(service) = tables.service(&ServiceKey { vip: flow.vip, port: flow.port, proto }) else {
            steps.push(format!("no Service has port {} {}", flow.port, protocol_name(self.protocol)));
            return unknown::reason(self, flow, vip_flags, steps);
        };
        let frontend = Frontend { vip: self.vip.ip(), port: flow.port, protocol: self.protocol };
        let name = self.live.service_name(&frontend);
        steps.push(self.service(&name, &service));
        answer.service = Some(name);
        if service.flags & SERVICE_RANGES != 0 {
            let allowed = tables.in_range(&RangeKey { service: service.id.to_be(), client: flow.client });
            steps.push(self.ranges(&service, allowed));
        }
        if self.protocol == Protocol::Tcp {
            let first = self.flags & (SYN | ACK) == SYN;
            let kind = if first { "opens a connection" } else { "belongs to a connection that runs" };
            let end = if self.flags & RST != 0 { " and ends it" } else { "" };
            steps.push(format!("the packet {kind}{end}"));
        }
        let traced = Traced::new(tables, self, *service);
        let mut to = Verdict::none(flow.vip);
        let reason = match self.protocol {
            Protocol::Tcp => decide::decide::<A, _, 6>(&traced, &self.config, flow, self.clock.tick, &mut to),
            Protocol::Udp => decide::decide::<A, _, 17>(&traced, &self.config, flow, self.clock.tick, &mut to),
        };
        answer.steps.extend(traced.into_steps());
        if reason == Some(Reason::Forwarded) {
            let port = u16::try_from(to.port).unwrap_or_default();
            answer.endpoint = Some(SocketAddr::new(trace::ip(to.addr), port));
        }
        // None: the Service went in this very moment.
        reason.unwrap_or(Reason::UnknownPort)
    }

    fn service(&self, name: &str, service: &Service) -> String {
        let affinity = match service.affinity {
            0 => String::new(),
            ticks => format!(", clients stick to an endpoint for {:.0} s", seconds(ticks, self.clock.hz)),
        };
        let (port, protocol) = (self.vip.port(), protocol_name(self.protocol));
        format!("port {port} {protocol} belongs to Service {name}: {} slots{affinity}", service.mask + 1)
    }

    fn ranges(&self, service: &Service, allowed: bool) -> String {
        let all = self.live.observed.ranges.keys().filter(|(id, _)| *id == service.id).map(|(_, net)| net);
        let client = self.client.ip();
        if !allowed {
            let all: Vec<String> = all.map(ToString::to_string).collect();
            return format!("{client} is in none of its source ranges ({})", all.join(", "));
        }
        let narrowest = all.filter(|net| net.contains(&client)).max_by_key(|net| net.prefix_len());
        let which = narrowest.map_or_else(|| "one that was added just now".to_owned(), ToString::to_string);
        format!("{client} is in its source range {which}")
    }
}
