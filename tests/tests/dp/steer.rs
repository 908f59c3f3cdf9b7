//! Requests through the loaded programs: which endpoint, or which reason, and every byte of the frame. Invariants I5, I6 and I9.

use anyhow::{Context as _, Result, ensure};
use purelb_common::table::{
    CONFIG_KUBE_PROXY, GONE, PASS, Pin, READY, SERVICE_RANGES, Service, Slot, TERMINATING, UNREADY,
    VIP_OTHER_PROTOCOLS, VIP_UNKNOWN_PASS,
};
use purelb_common::verdict::Reason;
use purelb_tests::case::{CLIENT, DNS, DNS_POD, EPOCH, Hook, Row, SPARE, WEB, WEB_POD, World, check, service};
use purelb_tests::packet::{Family, Host, L4, Packet};

const SYN: u8 = 2;
const ACK: u8 = 16;
const BOTH: [Hook; 2] = [Hook::Xdp, Hook::Tcx];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

type SetUp = fn(&mut World) -> Result<()>;

fn nothing(_: &mut World) -> Result<()> {
    Ok(())
}

fn syn(to: (Host, u16)) -> Packet {
    Packet::new(L4::Tcp(SYN), CLIENT, to)
}

fn ack(to: (Host, u16)) -> Packet {
    Packet::new(L4::Tcp(ACK), CLIENT, to)
}

fn udp(to: (Host, u16)) -> Packet {
    Packet::new(L4::Udp, CLIENT, to)
}

fn half(cur: u16, prev: u16, unsettled: bool) -> Slot {
    Slot(u64::from(Slot::half(cur, prev, unsettled)))
}

fn row(name: &'static str, set_up: SetUp, packet: Packet, reason: Reason, to: Option<(Host, u16)>) -> Row {
    Row { name, set_up, packet, reason, to }
}

/// Tables from long ago: the agent is silent.
fn stale(w: &mut World) -> Result<()> {
    w.configure(|c| {
        c.heartbeat = c.heartbeat.wrapping_sub(500);
        c.heartbeat_limit = 100;
    })
}

#[test]
fn forwards() -> Result<()> {
    let f = Reason::Forwarded;
    let web = Some(WEB_POD);
    let dns = Some(DNS_POD);
    let rows = [
        row("SYN", nothing, syn(WEB), f, web),
        row("ACK", nothing, ack(WEB), f, web),
        row("TCP options", nothing, Packet::new(L4::TcpOptions(SYN), CLIENT, WEB), f, web),
        row("FIN", nothing, Packet::new(L4::Tcp(ACK | 1), CLIENT, WEB), f, web),
        row("RST", nothing, Packet::new(L4::Tcp(4), CLIENT, WEB), f, web),
        row("UDP", nothing, udp(DNS), f, dns),
        row("UDP without checksum", nothing, Packet::new(L4::UdpNoChecksum, CLIENT, DNS), f, dns),
        row("UDP without payload", nothing, Packet { payload: 0, ..udp(DNS) }, f, dns),
        row("odd payload", nothing, Packet { payload: 1, ..udp(DNS) }, f, dns),
        row("long payload", nothing, Packet { payload: 1400, ..ack(WEB) }, f, web),
        row("VLAN", nothing, Packet { tags: &[0x8100], ..syn(WEB) }, f, web),
        row("QinQ", nothing, Packet { tags: &[0x88a8, 0x8100], ..udp(DNS) }, f, dns),
        row("one option or extension", nothing, Packet { extras: 1, ..syn(WEB) }, f, web),
        row("two options or extensions", nothing, Packet { extras: 2, ..udp(DNS) }, f, dns),
        row("three options or extensions", nothing, Packet { extras: 3, ..ack(WEB) }, f, web),
        row("QinQ with extensions", nothing, Packet { tags: &[0x88a8, 0x8100], extras: 3, ..syn(WEB) }, f, web),
        row("hop limit 1", nothing, Packet { hop_limit: 1, ..syn(WEB) }, f, web),
        row("unready endpoint keeps TCP", |w| w.endpoint(2, WEB_POD, UNREADY), ack(WEB), f, web),
        row("terminating endpoint named by a slot", |w| w.endpoint(2, WEB_POD, TERMINATING), syn(WEB), f, web),
    ];
    check(&rows, &BOTH, &FAMILIES)
}

#[test]
fn passes() -> Result<()> {
    let icmp = |kind4, kind6| Packet::new(L4::Icmp(kind4, kind6), CLIENT, WEB);
    let to_pass: SetUp = |w| w.slots(0, 2048, half(PASS, PASS, false));
    let unknown_pass: SetUp = |w| w.vip(WEB.0, VIP_UNKNOWN_PASS);
    let rows = [
        row("other destination", nothing, syn((Host::Pod(9), 80)), Reason::NotVip, None),
        row("bit set, no VIP", |w| w.bit(Host::Pod(9)), syn((Host::Pod(9), 80)), Reason::NotVip, None),
        row("slot PASS, TCP", to_pass, syn(WEB), Reason::PassedToProxy, None),
        row("slot PASS, running TCP", to_pass, ack(WEB), Reason::PassedToProxy, None),
        row("slot PASS, UDP", to_pass, udp(DNS), Reason::PassedToProxy, None),
        row("echo request", nothing, icmp(8, 128), Reason::PassedProtocol, None),
        row("echo reply", nothing, icmp(0, 129), Reason::PassedProtocol, None),
        row("too big", nothing, icmp(3, 2), Reason::PassedProtocol, None),
        row(
            "SCTP",
            |w| w.vip(WEB.0, VIP_OTHER_PROTOCOLS),
            Packet::new(L4::Other(132), CLIENT, WEB),
            Reason::PassedProtocol,
            None,
        ),
        row("answer to the node's own connection", nothing, ack((WEB.0, 40_001)), Reason::PassedOwn, None),
        row(
            "SYN+ACK to the node's own SYN",
            nothing,
            Packet::new(L4::Tcp(SYN | ACK), CLIENT, (WEB.0, 32_768)),
            Reason::PassedOwn,
            None,
        ),
        row("stale: new TCP", stale, syn(WEB), Reason::PassedStale, None),
        row("stale: unknown running TCP", stale, ack(WEB), Reason::PassedStale, None),
        row("stale: new UDP", stale, udp(DNS), Reason::PassedStale, None),
        row("stale: drops lapse", stale, syn((WEB.0, 81)), Reason::PassedStale, None),
        row("stale: malformed lapses too", stale, Packet::new(L4::Tcp(0), CLIENT, WEB), Reason::PassedStale, None),
        row("unknown port to pass, TCP", unknown_pass, syn((WEB.0, 81)), Reason::PassedUnknownPort, None),
        row("unknown port to pass, UDP", unknown_pass, udp((WEB.0, 81)), Reason::PassedUnknownPort, None),
        row("later fragment", nothing, Packet { fragment: Some((4, true)), ..udp(DNS) }, Reason::PassedFragment, None),
        row("last fragment", nothing, Packet { fragment: Some((9, false)), ..udp(DNS) }, Reason::PassedFragment, None),
    ];
    check(&rows, &BOTH, &FAMILIES)?;
    let neighbour = [133, 134, 135, 136, 137]
        .map(|kind| row("NDP", nothing, Packet { hop_limit: 255, ..icmp(8, kind) }, Reason::PassedProtocol, None));
    check(&neighbour, &BOTH, &[Family::V6])
}

#[test]
fn other_host() -> Result<()> {
    let packet = Packet { mac: [2, 0, 0, 0, 0, 99], ..syn(WEB) };
    let mine: SetUp = |w| w.uplink([0; 6]);
    let multicast = Packet { mac: [1, 0, 0x5e, 0, 0, 1], ..syn(WEB) };
    let rows = [
        row("another MAC address", mine, packet.clone(), Reason::PassedOtherHost, None),
        row("a port of a bridge: any MAC address", nothing, packet.clone(), Reason::Forwarded, Some(WEB_POD)),
        row("multicast MAC address", mine, multicast, Reason::Forwarded, Some(WEB_POD)),
    ];
    check(&rows, &BOTH, &FAMILIES)?;
    // Nobody told XDP of the device's new address; tcx has the kernel's word for it.
    let silent: SetUp = |w| w.uplink([0; 6]).and_then(|()| stale(w));
    check(&[row("silent agent", silent, packet.clone(), Reason::PassedStale, None)], &[Hook::Xdp], &FAMILIES)?;
    check(&[row("silent agent", silent, packet, Reason::PassedOtherHost, None)], &[Hook::Tcx], &FAMILIES)
}

/// A socket of the node that waits for UDP answers takes what no Service has.
#[test]
fn own_udp() -> Result<()> {
    let mut world = World::load()?;
    let socket = std::net::UdpSocket::bind("[::]:0").context("a UDP socket for the look-up")?;
    let port = socket.local_addr()?.port();
    for family in FAMILIES {
        for hook in BOTH {
            world.reset(family)?;
            world.base()?;
            world.configure(|c| (c.local_port_min, c.local_port_max) = (u32::from(port), u32::from(port)))?;
            let own = udp((WEB.0, port));
            world.expect(hook, &own, Reason::PassedOwn, &own)?;
            world.configure(|c| c.local_port_min = c.local_port_max + 1)?;
            world.expect(hook, &own, Reason::UnknownPort, &own)?;
        }
    }
    Ok(())
}

fn ranged(w: &mut World) -> Result<()> {
    w.service(WEB, 6, service(1, SERVICE_RANGES))?;
    w.service(DNS, 17, service(2, SERVICE_RANGES))
}

#[test]
fn drops() -> Result<()> {
    let none: SetUp = |w| w.slots(0, 2048, Slot(0));
    let gone: SetUp = |w| w.endpoint(2, WEB_POD, GONE);
    let rows = [
        row("unknown TCP port", nothing, syn((WEB.0, 81)), Reason::UnknownPort, None),
        row("unknown UDP port", nothing, udp((WEB.0, 80)), Reason::UnknownPort, None),
        row(
            "VIP beside another one of its bit",
            |w| w.vip_beside(Host::Vip(2), 0),
            syn((Host::Vip(2), 81)),
            Reason::UnknownPort,
            None,
        ),
        row("SYN to a local port", nothing, syn((WEB.0, 40_001)), Reason::UnknownPort, None),
        row("UDP below the local ports", nothing, udp((WEB.0, 1)), Reason::UnknownPort, None),
        row("SCTP without Service", nothing, Packet::new(L4::Other(132), CLIENT, WEB), Reason::UnknownPort, None),
        row("no range holds the client", ranged, syn(WEB), Reason::SourceRange, None),
        row("no range holds the UDP client", ranged, udp(DNS), Reason::SourceRange, None),
        row("no endpoint, TCP", none, syn(WEB), Reason::NoEndpoint, None),
        row("no endpoint, running TCP", none, ack(WEB), Reason::NoEndpoint, None),
        row("no endpoint, UDP", none, udp(DNS), Reason::NoEndpoint, None),
        row("endpoint gone", gone, ack(WEB), Reason::NoEndpoint, None),
        row("first fragment", nothing, Packet { fragment: Some((0, true)), ..udp(DNS) }, Reason::Fragment, None),
        row("first TCP fragment", nothing, Packet { fragment: Some((0, true)), ..ack(WEB) }, Reason::Fragment, None),
        row("null flags", nothing, Packet::new(L4::Tcp(0), CLIENT, WEB), Reason::TcpFlags, None),
        row("PSH alone", nothing, Packet::new(L4::Tcp(8), CLIENT, WEB), Reason::TcpFlags, None),
        row("SYN+FIN", nothing, Packet::new(L4::Tcp(3), CLIENT, WEB), Reason::TcpFlags, None),
        row("SYN+RST", nothing, Packet::new(L4::Tcp(6), CLIENT, WEB), Reason::TcpFlags, None),
        row("FIN alone", nothing, Packet::new(L4::Tcp(1), CLIENT, WEB), Reason::TcpFlags, None),
        row("christmas tree", nothing, Packet::new(L4::Tcp(0x3f), CLIENT, WEB), Reason::TcpFlags, None),
        row(
            "redirect",
            nothing,
            Packet { hop_limit: 64, ..Packet::new(L4::Icmp(5, 137), CLIENT, WEB) },
            Reason::IcmpType,
            None,
        ),
        row("timestamp or NDP from afar", nothing, Packet::new(L4::Icmp(13, 135), CLIENT, WEB), Reason::IcmpType, None),
    ];
    check(&rows, &BOTH, &FAMILIES)?;
    let from_mapped = Packet::new(L4::Tcp(SYN), (Host::Mapped, 40_000), WEB);
    check(&[row("mapped source", nothing, from_mapped, Reason::MappedAddress, None)], &BOTH, &[Family::V6])
}

#[test]
fn source_ranges() -> Result<()> {
    let one: SetUp = |w| {
        ranged(w)?;
        w.range(1, CLIENT.0, if w.family == Family::V4 { 32 } else { 128 })
    };
    let nested: SetUp = |w| {
        ranged(w)?;
        w.range(1, Host::Client(0), 8)?;
        w.range(1, Host::Client(0), 24)?;
        w.range(1, Host::Client(200), if w.family == Family::V4 { 32 } else { 128 })
    };
    let several: SetUp = |w| {
        ranged(w)?;
        w.range(1, Host::Pod(0), 24)?;
        w.range(1, Host::Client(0), 24)?;
        w.range(2, Host::Pod(0), 24)
    };
    let all: SetUp = |w| {
        ranged(w)?;
        w.range(1, Host::Client(0), 0)
    };
    let far = Packet::new(L4::Tcp(SYN), (Host::Pod(7), 4), WEB);
    let rows = [
        row("exactly this client", one, syn(WEB), Reason::Forwarded, Some(WEB_POD)),
        row("its neighbour", one, syn(WEB).coming((Host::Client(2), 40_000)), Reason::SourceRange, None),
        row("another service's range", one, udp(DNS), Reason::SourceRange, None),
        row("within nested ranges", nested, syn(WEB), Reason::Forwarded, Some(WEB_POD)),
        row("outside nested ranges", nested, far.clone(), Reason::SourceRange, None),
        row("second of several", several, far.clone(), Reason::Forwarded, Some(WEB_POD)),
        row("several, other service", several, udp(DNS), Reason::SourceRange, None),
        row("range of length 0", all, far, Reason::Forwarded, Some(WEB_POD)),
        row("length 0 of another service", all, udp(DNS), Reason::SourceRange, None),
    ];
    check(&rows, &BOTH, &FAMILIES)
}

fn unsettled(w: &mut World) -> Result<()> {
    w.slots(0, 1024, half(4, 2, true))
}

fn pin(w: &mut World, endpoint: u32, generation: u32, epoch: u32) -> Result<()> {
    unsettled(w)?;
    w.pin(CLIENT, WEB, 6, Pin { endpoint, generation, epoch })
}

#[test]
fn slots_and_pins() -> Result<()> {
    let f = Reason::Forwarded;
    let program: SetUp =
        |w| w.slots(0, 1024, Slot(u64::from(Slot::half(4, 2, false)) | u64::from(Slot::stamp_half(1, EPOCH)) << 32));
    let old_mark: SetUp = |w| {
        w.slots(0, 1024, Slot(u64::from(Slot::half(4, 2, false)) | u64::from(Slot::stamp_half(1, EPOCH + 1)) << 32))
    };
    let rows = [
        row("settled: running goes to cur", |w| w.slots(0, 1024, half(4, 2, false)), ack(WEB), f, Some(SPARE)),
        row("unsettled: running goes to prev", unsettled, ack(WEB), f, Some(WEB_POD)),
        row("unsettled: SYN goes to cur", unsettled, syn(WEB), f, Some(SPARE)),
        row("the program's mark: running goes to prev", program, ack(WEB), f, Some(WEB_POD)),
        row("a mark of another epoch is void", old_mark, ack(WEB), f, Some(SPARE)),
        row("pin of a running flow", |w| pin(w, 4, 40, EPOCH), ack(WEB), f, Some(SPARE)),
        row("pin of another generation is void", |w| pin(w, 4, 41, EPOCH), ack(WEB), f, Some(WEB_POD)),
        row("pin of another epoch is void", |w| pin(w, 4, 40, EPOCH - 1), ack(WEB), f, Some(WEB_POD)),
        row("pin keeps a repeated SYN", |w| pin(w, 2, 20, EPOCH), syn(WEB), f, Some(WEB_POD)),
        row("pin to PASS", |w| pin(w, u32::from(PASS), 0, EPOCH), ack(WEB), Reason::PassedToProxy, None),
        row(
            "prev PASS: running stays with kube-proxy",
            |w| w.slots(0, 1024, half(4, PASS, true)),
            ack(WEB),
            Reason::PassedToProxy,
            None,
        ),
        row("prev PASS: SYN is ours", |w| w.slots(0, 1024, half(4, PASS, true)), syn(WEB), f, Some(SPARE)),
        row("prev nobody: running drops", |w| w.slots(0, 1024, half(4, 0, true)), ack(WEB), Reason::NoEndpoint, None),
        row("unsettled: new UDP goes to cur", |w| w.slots(1024, 1024, half(4, 3, true)), udp(DNS), f, Some(SPARE)),
    ];
    check(&rows, &BOTH, &FAMILIES)
}

/// A SYN to an unsettled slot leaves a pin, and the flow stays when the slot changes again.
#[test]
fn pins_are_made() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            unsettled(&mut w)?;
            w.expect(hook, &syn(WEB), Reason::Forwarded, &syn(SPARE))?;
            let made = w.pinned(CLIENT, WEB, 6)?;
            ensure!(made == Some(Pin { endpoint: 4, generation: 40, epoch: EPOCH }), "pin is {made:?}");
            w.slots(0, 1024, half(3, 2, true))?;
            w.expect(hook, &ack(WEB), Reason::Forwarded, &ack(SPARE))?;
            let marked = (0..1024).filter(|&i| w.slot(i).is_ok_and(|s| s.program_unsettled(&service(1, 0)))).count();
            ensure!(marked == 1, "{marked} slots are marked instead of one");
            // UDP: a running flow stays with prev.
            w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
            w.slots(1024, 1024, half(4, 3, true))?;
            w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
            let made = w.pinned(CLIENT, DNS, 17)?;
            ensure!(made == Some(Pin { endpoint: 3, generation: 30, epoch: EPOCH }), "UDP pin is {made:?}");
        }
    }
    Ok(())
}

#[test]
fn over_budget() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            // Nobody to fall back to; each CPU may insert once.
            w.slots(0, 1024, half(4, 0, true))?;
            w.configure(|c| c.insert_budget = 1)?;
            let mut over = 0;
            for port in 0..64 {
                let packet = syn(WEB).coming((CLIENT.0, 1000 + port));
                let out = w.run(hook, &packet.bytes(family)?)?.context("refused")?;
                ensure!(out.reasons == [Reason::Forwarded] || out.reasons == [Reason::OverBudget], "{:?}", out.reasons);
                over += usize::from(out.reasons == [Reason::OverBudget]);
            }
            ensure!(over >= 32, "only {over} of 64 flows were over a budget of one");
            // With a ready owner the flow stays there instead.
            w.slots(0, 1024, half(4, 2, true))?;
            let mut owner = 0;
            for port in 0..64 {
                let packet = syn(WEB).coming((CLIENT.0, 2000 + port));
                let out = w.run(hook, &packet.bytes(family)?)?.context("refused")?;
                ensure!(out.reasons == [Reason::Forwarded], "{:?}", out.reasons);
                owner += usize::from(out.frame == packet.towards(WEB_POD).bytes(family)?);
            }
            ensure!(owner >= 32, "only {owner} of 64 flows stayed with the owner");
        }
    }
    Ok(())
}

/// A new UDP flow whose reply entry the budget does not allow is dropped; flows that run are not asked.
#[test]
fn udp_over_budget() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            for slot in [half(3, 3, false), half(3, 4, true)] {
                w.reset(family)?;
                w.base()?;
                w.slots(1024, 1024, slot)?;
                w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
                w.configure(|c| c.insert_budget = 1)?;
                let mut over = 0;
                for port in 0..64 {
                    let out =
                        w.run(hook, &udp(DNS).coming((CLIENT.0, 1000 + port)).bytes(family)?)?.context("refused")?;
                    over += usize::from(out.reasons == [Reason::OverBudget]);
                }
                ensure!(over >= 32, "only {over} of 64 flows were over a budget of one");
                w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
            }
        }
    }
    Ok(())
}

/// Two ports of a VIP with one pod port, and one client port: the second flow takes another
/// endpoint, and a third none.
#[test]
fn tuple_collision() -> Result<()> {
    let mut w = World::load()?;
    let (other, third) = ((WEB.0, 8000), (Host::Vip(2), 80));
    for family in FAMILIES {
        for hook in BOTH {
            for (proto, flow) in [(6, syn as fn((Host, u16)) -> Packet), (17, udp)] {
                w.reset(family)?;
                w.base()?;
                w.vip(third.0, 0)?;
                for (port, id) in [(WEB, 1), (other, 3), (third, 4)] {
                    w.service(port, proto, service(id, 0))?;
                    w.slots(1024 * (id - 1), 1024, half(2, 2, false))?;
                }
                w.expect(hook, &flow(WEB), Reason::Forwarded, &flow(WEB_POD))?;
                w.expect(hook, &flow(other), Reason::TupleCollision, &flow(other))?;
                alternate(&mut w)?;
                w.expect(hook, &flow(other), Reason::Forwarded, &flow(SPARE))?;
                w.expect(hook, &flow(WEB), Reason::Forwarded, &flow(WEB_POD))?;
                w.expect(hook, &flow(third), Reason::TupleCollision, &flow(third))?;
                // Another client port is free of both.
                let free = flow(third).coming((CLIENT.0, 40_005));
                let out = w.run(hook, &free.bytes(family)?)?.context("refused")?;
                ensure!(out.reasons == [Reason::Forwarded], "{:?}", out.reasons);
            }
        }
    }
    Ok(())
}

/// Slots of services 3 and 4: sixteen of endpoint 4 after sixteen of endpoint 2.
fn alternate(w: &mut World) -> Result<()> {
    for base in (2048..4096).step_by(32) {
        w.slots(base + 16, 16, half(4, 4, false))?;
    }
    Ok(())
}

#[test]
fn affinity() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            w.service(WEB, 6, Service { affinity: 1000, ..service(1, 0) })?;
            w.expect(hook, &syn(WEB), Reason::Forwarded, &syn(WEB_POD))?;
            w.slots(0, 1024, half(4, 2, true))?;
            for port in [40_000, 40_001, 40_002] {
                let next = syn(WEB).coming((CLIENT.0, port));
                w.expect(hook, &next, Reason::Forwarded, &next.towards(WEB_POD))?;
            }
            let stranger = syn(WEB).coming((Host::Client(2), 40_000));
            w.expect(hook, &stranger, Reason::Forwarded, &stranger.towards(SPARE))?;
            w.endpoint(2, WEB_POD, UNREADY)?;
            let next = syn(WEB).coming((CLIENT.0, 40_009));
            w.expect(hook, &next, Reason::Forwarded, &next.towards(SPARE))?;
            w.endpoint(2, WEB_POD, READY)?;
        }
    }
    Ok(())
}

/// While the agent is silent, flows that are known keep their endpoint.
#[test]
fn stale_keeps_flows() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            w.expect(hook, &syn(WEB), Reason::Forwarded, &syn(WEB_POD))?;
            w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
            stale(&mut w)?;
            w.expect(hook, &ack(WEB), Reason::Forwarded, &ack(WEB_POD))?;
            w.expect(hook, &udp(DNS), Reason::Forwarded, &udp(DNS_POD))?;
            w.expect(hook, &syn(WEB), Reason::PassedStale, &syn(WEB))?;
        }
    }
    Ok(())
}

/// What kube-proxy got while the agent was silent stays with it when the agent is back.
#[test]
fn stale_flows_stay_with_kube_proxy() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            stale(&mut w)?;
            // Alone, nobody has the flow: its port is served again at once.
            w.expect(hook, &syn(WEB), Reason::PassedStale, &syn(WEB))?;
            w.configure(|c| c.heartbeat = c.heartbeat.wrapping_add(500))?;
            let early = syn(WEB).coming((CLIENT.0, 40_008));
            w.expect(hook, &early, Reason::Forwarded, &early.towards(WEB_POD))?;
            stale(&mut w)?;
            w.configure(|c| c.flags |= CONFIG_KUBE_PROXY)?;
            w.expect(hook, &syn(WEB), Reason::PassedStale, &syn(WEB))?;
            w.expect(hook, &udp(DNS), Reason::PassedStale, &udp(DNS))?;
            w.configure(|c| c.heartbeat = c.heartbeat.wrapping_add(500))?;
            let later = ack(WEB).coming((CLIENT.0, 40_008));
            w.expect(hook, &later, Reason::Forwarded, &later.towards(WEB_POD))?;
            w.expect(hook, &ack(WEB), Reason::PassedToProxy, &ack(WEB))?;
            w.expect(hook, &udp(DNS), Reason::PassedToProxy, &udp(DNS))?;
            let other = syn(WEB).coming((CLIENT.0, 40_009));
            w.expect(hook, &other, Reason::Forwarded, &other.towards(WEB_POD))?;
        }
    }
    Ok(())
}
