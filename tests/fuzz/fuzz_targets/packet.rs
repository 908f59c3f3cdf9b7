//! Arbitrary frames into the header parsing, and what they name into the decision over arbitrary tables.
#![no_main]

use libfuzzer_sys::fuzz_target;
use purelb_common::decide::{self, FRAGMENT, Flow, Verdict};
use purelb_common::neighbour;
use purelb_common::parse::{self, ACK, Frame as _, Ip, RST, SYN, TCP, UDP};
use purelb_common::reply;
use purelb_common::table::{CONFIG_KUBE_PROXY, CONFIG_REVSVC, Config, ReplyKey};
use purelb_common::verdict::Reason;
use purelb_fuzz::chance::Chance;
use purelb_fuzz::maps::Maps;

// So many bytes are the tables, the rest is the frame.
const TABLES: usize = 64;

fuzz_target!(|data: &[u8]| {
    let (tables, frame) = data.split_at(data.len().min(TABLES));
    let mut chance = Chance::new(tables);
    match parse::ethernet(frame) {
        Some((<[u8; 4] as Ip>::ETHERTYPE, at)) => {
            packet::<[u8; 4]>(&mut chance, frame, at, &[[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 0, 3]]);
        }
        Some((<[u8; 16] as Ip>::ETHERTYPE, at)) => packet(&mut chance, frame, at, &[[1_u8; 16], [2; 16], [3; 16]]),
        Some((neighbour::ARP, at)) => drop(neighbour::arp(frame, at)),
        _ => {}
    }
});

fn packet<A: Ip>(chance: &mut Chance, frame: &[u8], at: usize, pods: &[A]) {
    let noteworthy = A::noteworthy(frame, at);
    let Some((client, vip)) = A::addresses(frame, at) else { return };
    let Ok(n) = A::network(frame, at) else { return };
    assert!(n.transport >= at + if A::FAMILY == 4 { 20 } else { 40 }, "the transport header lies in the network's");
    assert!(frame.holds(at + n.length as usize), "the packet is longer than its frame");
    let kind = frame.get(n.transport).copied().unwrap_or_default();
    let _ = parse::icmp_may_pass(n.proto, kind, n.hop_limit);
    assert!(A::solicited(frame, &n).is_none() || noteworthy, "a solicitation that certainly is none");
    if n.later_fragment || !matches!(n.proto, TCP | UDP) {
        return;
    }
    let Ok(t) = parse::transport(frame, &n, at) else { return };
    let ports = [t.source.to_be_bytes(), t.destination.to_be_bytes()].concat();
    assert_eq!(frame.get(n.transport..n.transport + 4), Some(&ports[..]), "the ports are others");
    assert!(n.proto == UDP || t.flags & (SYN | ACK) != SYN || noteworthy, "a SYN that certainly is none");
    let flags = u32::from(t.flags) | if n.first_fragment { FRAGMENT } else { 0 };
    let flow = Flow { client, vip, client_port: t.source, port: t.destination, flags };
    let tick = chance.pick(&[5000, 0, u32::MAX, 1 << 24]).unwrap_or(5000);
    let config = Config {
        flags: chance.pick(&[0, CONFIG_REVSVC, CONFIG_KUBE_PROXY, 3]).unwrap_or(0),
        heartbeat: tick.wrapping_sub(chance.below(12) as u32),
        heartbeat_limit: chance.pick(&[0, 10]).unwrap_or(0),
        seed: chance.below(256),
        half_open: 60,
        udp_idle: 300,
        tcp_idle: 1000,
        udp_pass: 301,
        local_port_min: 32768,
        local_port_max: 60999,
        ..Config::default()
    };
    let maps = Maps::new(chance, &flow, u32::from(n.proto), tick, pods);
    if n.proto == TCP {
        judge::<A, 6>(&maps, &config, &flow, tick)
    } else {
        judge::<A, 17>(&maps, &config, &flow, tick)
    }
}

type To<A> = Result<(A, u32), Reason>;

fn send<A: Ip, const PROTO: u16>(maps: &Maps<A>, config: &Config, flow: &Flow<A>, tick: u32) -> To<A> {
    let mut to = Verdict::none(flow.vip);
    match decide::decide::<A, _, PROTO>(maps, config, flow, tick, &mut to) {
        Some(Reason::Forwarded) => {
            let endpoint = maps.alive(to.id).expect("the endpoint is there");
            assert_eq!((to.addr, to.port), (endpoint.addr, u32::from(endpoint.port)), "what the verdict names");
            Ok((to.addr, to.port))
        }
        Some(other) => Err(other),
        None => Err(decide::unknown(config, 0, flow, PROTO, || false)),
    }
}

fn judge<A: Ip, const PROTO: u16>(maps: &Maps<A>, config: &Config, flow: &Flow<A>, tick: u32) {
    // The short way says what the long one says.
    let short = decide::find(maps, config, flow, PROTO)
        .filter(|found| PROTO == 6 && decide::allowed(maps, found, flow))
        .and_then(|found| decide::settled(maps, config, flow, &found, tick))
        .map(|e| (e.addr, u32::from(e.port)));
    let to = send::<A, PROTO>(maps, config, flow, tick);
    if let Some(short) = short {
        assert_eq!(Ok(short), to, "the short way leads elsewhere");
    }
    let Ok((pod, port)) = to else { return };
    if PROTO == 6 && flow.flags & u32::from(RST) != 0 {
        // It ends what it belongs to.
        return;
    }
    // What comes next of the flow goes the same way, and the answer finds back.
    let next = Flow { flags: if PROTO == 6 { u32::from(ACK) } else { 0 }, ..*flow };
    assert_eq!(send::<A, PROTO>(maps, config, &next, tick), to, "the flow moves: {maps:?} at {tick}");
    let begins = PROTO == 17 || flow.flags & u32::from(SYN | ACK) == u32::from(SYN);
    let key = ReplyKey {
        pod,
        client: flow.client,
        pod_port: port as u16,
        client_port: flow.client_port,
        proto: PROTO.into(),
    };
    let answer = reply::reply::<A, _, PROTO>(maps, config, &key, u32::from(ACK), tick);
    if begins {
        assert_eq!(
            answer.map(|(vip, port, _)| (vip, port)),
            Some((flow.vip, flow.port)),
            "the answer is lost: {maps:?} at {tick}"
        );
    }
    let _ = reply::direct(maps, config, &key, tick);
}
