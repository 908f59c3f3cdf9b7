//! The laws of the plan, held by the code the kernel runs too. Invariants I1, I2, I3 and I4.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use purelb_common::table::{Config, FIRST_ENDPOINT, GONE, PASS};
use purelb_plan::apply::Twin;
use purelb_plan::maglev;
use purelb_plan::observed::{Action, Family, Slots as _};
use purelb_plan::plan::{Plan, Planner, Settings, plan, release};
use purelb_plan::world::{Endpoint, EndpointState, Mode, Protocol, Service, ServicePort, World};

use chance::Chance;
use maps::Maps;
use model::{Count, Kind, SETTINGS, SETTLE, VIP, empty, endpoint, tcp};

#[path = "laws/announced.rs"]
mod announced;
#[path = "laws/chance.rs"]
mod chance;
#[path = "laws/maps.rs"]
mod maps;
#[path = "laws/model.rs"]
mod model;
#[path = "laws/race.rs"]
mod race;
#[path = "laws/room.rs"]
mod room;
#[path = "laws/unread.rs"]
mod unread;

fn law(kind: Kind, seeds: std::ops::Range<u64>) {
    let mut sum = Count::default();
    for seed in seeds {
        let count = model::run(seed, kind, 200);
        assert_eq!((count.moved, count.unstuck), (0, 0), "seed {seed} of {kind:?}: {count:?}");
        sum.packets += count.packets;
        sum.epochs += count.epochs;
        sum.slots = sum.slots.max(count.slots);
    }
    assert!(sum.packets > 1000 && sum.epochs > 0 && sum.slots > 1024, "the model is too tame: {sum:?}");
}

const PLAIN: Kind =
    Kind { affinity: false, pass: false, two_ports: false, crash: false, between: false, udp: false, starved: false };

#[test]
fn a_flow_whose_endpoint_is_alive_never_moves() {
    law(PLAIN, 0..6);
}

#[test]
fn nor_with_affinity() {
    law(Kind { affinity: true, ..PLAIN }, 0..6);
}

#[test]
fn nor_from_kube_proxy() {
    law(Kind { pass: true, ..PLAIN }, 0..6);
    law(Kind { pass: true, affinity: true, ..PLAIN }, 0..6);
}

#[test]
fn nor_when_ports_share_pods() {
    law(Kind { two_ports: true, ..PLAIN }, 0..6);
    law(Kind { two_ports: true, affinity: true, ..PLAIN }, 0..6);
}

#[test]
fn nor_when_the_agent_dies() {
    law(Kind { crash: true, ..PLAIN }, 0..6);
    law(Kind { crash: true, affinity: true, ..PLAIN }, 0..6);
}

#[test]
fn nor_between_two_writes() {
    law(Kind { between: true, ..PLAIN }, 0..6);
    law(Kind { between: true, affinity: true, ..PLAIN }, 0..6);
}

#[test]
fn nor_without_budget() {
    law(Kind { starved: true, ..PLAIN }, 0..12);
    law(Kind { starved: true, affinity: true, two_ports: true, ..PLAIN }, 0..12);
}

#[test]
fn nor_udp() {
    law(Kind { udp: true, ..PLAIN }, 0..24);
    law(Kind { udp: true, affinity: true, ..PLAIN }, 0..12);
    law(Kind { udp: true, pass: true, ..PLAIN }, 0..12);
    law(Kind { udp: true, crash: true, between: true, ..PLAIN }, 0..12);
    law(Kind { udp: true, starved: true, ..PLAIN }, 0..12);
}

/// What `cleanup` hands over are new flows, those of clients that stick to an endpoint too; running ones stay.
#[test]
fn released_clients_do_not_stick() {
    let maps = Maps::default();
    let service = Service {
        vips: [IpAddr::from(VIP)].into(),
        ports: vec![tcp(80)],
        local_policy: true,
        affinity: Some(10_000),
        endpoints: (1..5).map(|i| endpoint([10, 0, 0, i], EndpointState::Ready)).collect(),
        ..Service::default()
    };
    let services = [("default/web".to_owned(), Arc::new(service))].into();
    let world = World { node: "n".to_owned(), services, ..World::default() };
    let mut twin = empty();
    follow(&world, &mut twin, 100);
    maps.twin.replace(twin);
    let config = Config { half_open: 60, tcp_idle: SETTLE, ..Config::default() };
    let flow = |client, port| ([198, 51, 100, client], port, 80);
    let before: Vec<_> = (0..20).map(|c| maps.packet(&config, VIP, flow(c, 1000), true, 110)).collect();
    assert!(before.iter().all(|to| matches!(to, Ok(Some(_)))), "{before:?}");
    let release = release(&maps.twin.borrow().observed, &*maps.twin.borrow(), 120);
    release.actions.iter().for_each(|a| maps.twin.borrow_mut().apply(a));
    for (client, to) in (0..20).zip(before) {
        assert_eq!(maps.packet(&config, VIP, flow(client, 2000), true, 130), Ok(None), "a new flow of client {client}");
        assert_eq!(maps.packet(&config, VIP, flow(client, 1000), false, 130), to, "a running flow of client {client}");
    }
}

/// A pod that went and came back has another id when its own was given away meanwhile. What an earlier flow of the same
/// client port left says the old one, which leads nowhere, and must not hide the new one. Found by the fuzzer.
#[test]
fn what_an_id_left_behind_hides_no_answer() {
    let maps = Maps::default();
    let (config, flow) =
        (Config { half_open: 60, tcp_idle: SETTLE, ..Config::default() }, ([198, 51, 100, 1], 1000, 80));
    let (pod, other) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let now = |endpoints: Vec<Endpoint>, tick| {
        let vips = [IpAddr::from(VIP)].into();
        let service = Service { vips, ports: vec![tcp(80)], local_policy: true, endpoints, ..Service::default() };
        let services = [("default/web".to_owned(), Arc::new(service))].into();
        let world = World { node: "n".to_owned(), services, ..World::default() };
        follow(&world, &mut maps.twin.borrow_mut(), tick);
    };
    let talk = |tick| {
        assert_eq!(maps.packet(&config, VIP, flow, true, tick), Ok(Some(pod)));
        assert_eq!(maps.answer(&config, flow, pod, tick), Some(VIP), "at {tick}");
    };
    maps.twin.replace(empty());
    now(vec![endpoint(pod, EndpointState::Ready)], 100);
    talk(110);
    now(vec![], 120);
    now(vec![endpoint(other, EndpointState::Unready)], 130);
    now(vec![endpoint(pod, EndpointState::Ready), endpoint(other, EndpointState::Unready)], 140);
    talk(150);
}

fn pods(n: u32, seed: u64) -> Vec<(IpAddr, u16)> {
    let mut chance = Chance(seed);
    let mut out = BTreeSet::new();
    while out.len() < n as usize {
        out.insert((IpAddr::from(Ipv4Addr::from(0x0a00_0000 | chance.below(1 << 16) as u32)), 8080));
    }
    out.into_iter().collect()
}

#[test]
fn shares_are_fair() {
    let mut worst = (0.0_f64, 0);
    for (n, seed) in (2..=40).flat_map(|n| (0..3).map(move |s| (n, s))) {
        let length = maglev::slots_for(n as usize);
        let mut shares = vec![0_u32; n as usize];
        for owner in maglev::table(&pods(n, seed), length) {
            shares[usize::from(owner)] += 1;
        }
        let fair = f64::from(length) / f64::from(n);
        let off = shares.iter().map(|s| (f64::from(*s) / fair - 1.0).abs()).fold(0.0, f64::max);
        if off > worst.0 {
            worst = (off, n);
        }
    }
    println!("worst share: {:.2} % off, {} endpoints", worst.0 * 100.0, worst.1);
    assert!(worst.0 <= 0.05, "{worst:?}");
}

#[test]
fn removing_one_disturbs_little() {
    let mut worst = (0.0_f64, 0);
    for (n, seed) in (2..=40).flat_map(|n| (0..3).map(move |s| (n, s))) {
        let all = pods(n, seed);
        // The table of a service never shrinks.
        let length = maglev::slots_for(n as usize);
        let before = maglev::table(&all, length);
        for gone in (0..n as usize).step_by(3) {
            let mut rest = all.clone();
            rest.remove(gone);
            let after = maglev::table(&rest, length);
            let moved = before.iter().zip(&after);
            let moved =
                moved.filter(|(b, a)| usize::from(**b) != gone && all[usize::from(**b)] != rest[usize::from(**a)]);
            let share = moved.count() as f64 / f64::from(length);
            if share > worst.0 {
                worst = (share, n);
            }
        }
    }
    println!("worst disturbance: {:.2} % of other slots, {} endpoints", worst.0 * 100.0, worst.1);
    assert!(worst.0 <= 0.04, "{worst:?}");
}

/// Services with several addresses and ports, endpoints that share pods, contradicting slices.
fn any_world(chance: &mut Chance) -> World {
    let mut world = World { node: "n".to_owned(), kube_proxy: chance.permille(500), ..World::default() };
    for index in 0..=chance.below(4) as u8 {
        let mut service = Service { local_policy: chance.permille(500), prefer_local: true, ..Service::default() };
        service.vips.insert(IpAddr::from([192, 0, 2, index + 1]));
        if chance.permille(300) {
            service.vips.insert("2001:db8::1".parse().map_or(IpAddr::from([192, 0, 2, 99]), |a: IpAddr| a));
        }
        service.ports = vec![tcp(80 + u16::from(index)), tcp(443)];
        service.ports.push(ServicePort { name: "dns".to_owned(), port: 53, protocol: Some(Protocol::Udp) });
        service.affinity = chance.permille(300).then_some(100);
        if chance.permille(300) {
            service.source_ranges.extend("10.0.0.0/8".parse::<ipnet::IpNet>());
        }
        for _ in 0..chance.below(14) {
            let states = [EndpointState::Ready, EndpointState::Unready, EndpointState::Terminating];
            let state = chance.pick(&states).unwrap_or(EndpointState::Ready);
            let mut e = endpoint([10, 0, chance.below(3) as u8, chance.below(8) as u8], state);
            e.serving = chance.permille(700);
            if chance.permille(200) {
                e.addr = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 1, chance.below(4) as u16]);
            }
            if chance.permille(200) {
                e = Endpoint { port_name: "dns".to_owned(), protocol: Protocol::Udp, ..e };
            }
            service.endpoints.push(e);
        }
        world.services.insert(format!("default/s{index}"), Arc::new(service));
    }
    world
}

fn look(world: &World, twin: &Twin, now: u32) -> Plan {
    plan(world, &twin.observed, twin, &SETTINGS, now)
}

fn apply_all(twin: &mut Twin, plan: &Plan) {
    plan.actions.iter().for_each(|a| twin.apply(a));
}

fn follow(world: &World, twin: &mut Twin, now: u32) {
    let plan = look(world, twin, now);
    apply_all(twin, &plan);
}

/// One look says it all; to settle takes two, since programs run between them.
fn come_to_rest(world: &World, twin: &mut Twin, now: u32, what: &str) {
    let first = look(world, twin, now);
    apply_all(twin, &first);
    let begins = |a: &Action| matches!(a, Action::PutService(_, s) if s.span() != 0);
    if first.actions.iter().any(begins) {
        follow(world, twin, now);
    }
    assert_eq!(look(world, twin, now).actions, [], "{what} at {now}");
}

#[test]
fn order_of_input_changes_nothing() {
    for seed in 0..60 {
        let mut chance = Chance(seed);
        let (mut world, mut observed) = (any_world(&mut chance), empty());
        for now in [100, 200] {
            let first = look(&world, &observed, now);
            for service in world.services.values_mut().map(Arc::make_mut) {
                chance.shuffle(&mut service.endpoints);
                chance.shuffle(&mut service.ports);
            }
            let second = look(&world, &observed, now);
            assert_eq!(first.actions, second.actions, "seed {seed}");
            assert_eq!(format!("{first:?}"), format!("{second:?}"), "seed {seed}");
            apply_all(&mut observed, &first);
            world.services.extend(any_world(&mut chance).services);
        }
    }
}

#[test]
fn nothing_is_left_after_a_crash_at_any_point() {
    for seed in 0..5 {
        let mut chance = Chance(seed);
        let mut observed = empty();
        for now in [100, 200, 200 + SETTLE + 1, 300 + SETTLE] {
            let world = any_world(&mut chance);
            // Nothing changed for the second last: it settles.
            let first = look(&world, &observed, now);
            let mut part = observed.clone();
            for (k, action) in first.actions.iter().enumerate() {
                let mut again = part.clone();
                come_to_rest(&world, &mut again, now, &format!("seed {seed}, crash before action {k} {action:?}"));
                part.apply(action);
            }
            observed = part;
            come_to_rest(&world, &mut observed, now, &format!("seed {seed}"));
            come_to_rest(&world, &mut observed, now + SETTLE + 1, &format!("seed {seed}, settled"));
            let unsettled =
                |s: &purelb_common::table::Service| s.span() != 0 || observed.block(s).iter().any(|x| x.unsettled(s));
            assert!(!observed.observed.services.values().any(unsettled), "seed {seed} has not settled at {now}");
        }
    }
}

/// A planner that remembers finds whatever changes: Services that come, go, change, contest each other, the node's
/// addresses, its settings.
#[test]
fn memory_overlooks_nothing() {
    let never = Settings { settle: u32::MAX / 2, ..SETTINGS };
    for seed in 0..30 {
        let mut chance = Chance(seed);
        let (mut planner, mut twin, mut world) = (Planner::default(), empty(), any_world(&mut chance));
        // A small array: growth and newcomers find no room now and then.
        twin.observed.capacity = if seed % 3 == 0 { 16 << 10 } else { 1 << 20 };
        twin.observed.range_capacity = if seed % 2 == 0 { 3 } else { 100 };
        for now in 100..140 {
            let other = any_world(&mut chance);
            for (name, service) in other.services {
                match chance.below(6) {
                    0 => drop(world.services.insert(name, service)),
                    1 => drop(world.services.remove(&name)),
                    _ => {}
                }
            }
            match chance.below(12) {
                0 => world.node_addresses = [IpAddr::from([192, 0, 2, chance.below(5) as u8])].into(),
                1 => world.kube_proxy = !world.kube_proxy,
                2 => world.datapath.unknown_ports_pass = !world.datapath.unknown_ports_pass,
                3 => world.pod_ranges = ["10.0.0.0/16".parse().unwrap()].into(),
                4 => planner.forget(),
                5 => world.datapath.mode = chance.pick(&[Mode::Auto, Mode::Off]).unwrap(),
                6 => world.detached = chance.permille(300),
                _ => {}
            }
            let mine = planner.plan(&world, &twin.observed, &twin, &never, now);
            let stranger = plan(&world, &twin.observed, &twin, &never, now);
            assert_eq!(mine.actions, stranger.actions, "seed {seed} at {now}");
            assert_eq!(format!("{mine:?}"), format!("{stranger:?}"), "seed {seed} at {now}");
            apply_all(&mut twin, &mine);
        }
    }
}

/// What the maps say about one VIP without ids: flags, affinity, and share of each endpoint for each port.
type Meaning = BTreeMap<String, (u32, u32, Vec<String>)>;

fn meaning(twin: &Twin, vip: IpAddr) -> Meaning {
    let (mut out, observed) = (BTreeMap::new(), &twin.observed);
    for (f, service) in observed.services.iter().filter(|(f, _)| f.vip == vip) {
        let family = if vip.is_ipv4() { Family::V4 } else { Family::V6 };
        let slots = twin.block(service);
        let name = |id: u16| match observed.endpoints.get(&(family, id)) {
            Some(e) if id >= FIRST_ENDPOINT => format!("{}:{}", e.addr, e.port),
            _ => id.to_string(),
        };
        let slots =
            slots.iter().map(|s| format!("{} {} {}", name(s.cur()), name(s.prev()), s.agent_unsettled())).collect();
        out.insert(format!("{f:?}"), (service.flags, service.affinity, slots));
    }
    out
}

#[test]
fn a_bad_object_changes_no_other() {
    let good_vip = IpAddr::from([192, 0, 2, 1]);
    let service = |vip: IpAddr, port: u16, pods: std::ops::Range<u8>| Service {
        vips: [vip].into(),
        ports: vec![tcp(port)],
        local_policy: true,
        endpoints: pods.map(|i| endpoint([10, 0, 0, i], EndpointState::Ready)).collect(),
        ..Service::default()
    };
    let good = service(good_vip, 80, 1..5);
    let mut good = Service { ports: vec![tcp(80), tcp(443)], ..good };
    good.affinity = Some(100);
    let other = IpAddr::from([192, 0, 2, 2]);
    let node = IpAddr::from([192, 0, 2, 200]);
    let bad: Vec<(&str, Service)> = vec![
        ("node address", service(node, 80, 10..13)),
        ("loopback", service(IpAddr::from([127, 0, 0, 1]), 80, 10..13)),
        ("multicast", service(IpAddr::from([224, 0, 0, 1]), 80, 10..13)),
        ("unspecified", service(IpAddr::from([0, 0, 0, 0]), 80, 10..13)),
        ("port 0", service(other, 0, 10..13)),
        ("contested port", service(good_vip, 80, 10..13)),
        ("contested port, same pods", service(good_vip, 443, 0..0)),
        ("no endpoints", service(other, 80, 0..0)),
        ("too many endpoints", service(other, 80, 10..250)),
        ("no address", Service { vips: BTreeSet::new(), ..service(other, 80, 10..13) }),
        ("no ports", Service { ports: Vec::new(), ..service(other, 80, 10..13) }),
        ("port 0 of endpoints", {
            let mut s = service(other, 80, 10..13);
            s.endpoints.iter_mut().for_each(|e| e.port = 0);
            s
        }),
        ("ranges of the other family", {
            let mut s = service(other, 80, 10..13);
            s.source_ranges.extend("2001:db8::/32".parse::<ipnet::IpNet>());
            s
        }),
        ("endpoints of the other family", {
            let mut s = service(other, 80, 10..13);
            s.endpoints.iter_mut().for_each(|e| e.addr = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]));
            s
        }),
    ];
    let mut world = World { node: "n".to_owned(), node_addresses: [node].into(), ..World::default() };
    world.services.insert("default/good".to_owned(), Arc::new(good));
    let mut observed = empty();
    follow(&world, &mut observed, 100);
    let want = meaning(&observed, good_vip);
    assert_eq!(want.len(), 2);
    for (what, service) in bad {
        for name in ["aaa/bad", "zzz/bad"] {
            let mut world = world.clone();
            world.services.insert(name.to_owned(), Arc::new(service.clone()));
            let (mut warm, mut cold) = (observed.clone(), empty());
            follow(&world, &mut warm, 200);
            assert_eq!(meaning(&warm, good_vip), want, "{what} named {name}");
            // Before anything is served, a contested port goes to the first by name.
            if !what.starts_with("contested") {
                follow(&world, &mut cold, 200);
                assert_eq!(meaning(&cold, good_vip), want, "{what} named {name}, nothing served before");
            }
        }
    }
}

/// The policy changes, or kube-proxy is found: new flows are its own, those that run stay, and when all has
/// settled nothing is left of the endpoints.
#[test]
fn what_is_handed_to_kube_proxy_keeps_its_flows() {
    let vip = IpAddr::from([192, 0, 2, 1]);
    let service = Service {
        vips: [vip].into(),
        ports: vec![tcp(80)],
        endpoints: (1..4).map(|i| endpoint([10, 0, 0, i], EndpointState::Ready)).collect(),
        ..Service::default()
    };
    let world = World { node: "n".to_owned(), ..World::default() };
    let with = |local_policy, kube_proxy| {
        let service = Arc::new(Service { local_policy, ..service.clone() });
        World { services: [("default/web".to_owned(), service)].into(), kube_proxy, ..world.clone() }
    };
    for (what, before) in [("policy", with(true, true)), ("kube-proxy found", with(false, false))] {
        let mut twin = empty();
        follow(&before, &mut twin, 100);
        let owners = |twin: &Twin, of: fn(purelb_common::table::Slot) -> u16| -> Vec<u16> {
            twin.observed.services.values().flat_map(|s| twin.block(s)).map(of).collect()
        };
        let served = owners(&twin, |s| s.cur());
        let after = with(false, true);
        follow(&after, &mut twin, 200);
        assert!(owners(&twin, |s| s.cur()).iter().all(|id| *id == PASS), "{what}: new flows");
        assert_eq!(owners(&twin, |s| s.prev()), served, "{what}: flows that run");
        let alive = |twin: &Twin| twin.observed.endpoints.values().filter(|e| e.state != GONE).count();
        assert_eq!(alive(&twin), 3, "{what}");
        assert_eq!(look(&after, &twin, 201).actions, [], "{what}");
        for now in [200 + SETTLE + 1, 200 + SETTLE + 2, 200 + SETTLE + 3] {
            follow(&after, &mut twin, now);
        }
        assert_eq!(alive(&twin), 0, "{what}: settled");
    }
}
