//! What is measured, packet by packet: the tables, the frame, the flows, and the proof that the
//! packets take the way that the row's name says.

use anyhow::{Context as _, Result, ensure};
use aya::EbpfLoader;
use purelb_common::table::{Pin, READY, SERVICE_RANGES, SLOTS_PER_ELEMENT, Slot};
use purelb_common::verdict::{Action, Reason};

use super::wrapper::{Program, Walk, Wrapper, frame};
use crate::case::{DNS, EPOCH, WEB, service};
use crate::packet::{Family, Host, L4, Packet};
use crate::world::World;

const SYN: u8 = 2;
const ACK: u8 = 16;
const CLIENT: (Host, u16) = (Host::Client(1), 40_000);
/// Its SYNs are not among those of [`CLIENT`].
const OTHER: (Host, u16) = (Host::Client(200), 40_000);
/// TCP service whose slots are unsettled and whose flows are pinned.
const PINNED: (Host, u16) = (Host::Vip(1), 81);
/// TCP service with source ranges.
const RANGED: (Host, u16) = (Host::Vip(1), 82);
const WEB_PODS: &[(Host, u16)] = &[(Host::Pod(2), 8080), (Host::Pod(3), 8080), (Host::Pod(4), 8080)];
const DNS_PODS: &[(Host, u16)] = &[(Host::Pod(5), 5353), (Host::Pod(6), 5353), (Host::Pod(7), 5353)];
/// Only pins name it.
const PIN_PODS: &[(Host, u16)] = &[(Host::Pod(10), 8080)];
/// Near the client and far, nested and not.
const RANGES: [(Host, u32); 8] = [
    (Host::Client(16), 28),
    (Host::Client(32), 28),
    (Host::Client(64), 26),
    (Host::Client(192), 27),
    (Host::Vip(0), 24),
    (Host::Vip(0), 28),
    (Host::Pod(0), 16),
    (Host::Mapped, 8),
];
const MANY: u64 = 1 << 16;
const MILLION: u64 = 1 << 20;

/// One row.
pub struct Case {
    /// Its name in the table.
    pub name: &'static str,
    /// As a multiple of the trivial program; none for what is there to compare with.
    pub limit: Option<f64>,
    /// Of its packets.
    pub family: Family,
    /// How it is run.
    pub program: Program,
    /// Flows that take turns, a power of two.
    pub flows: u64,
    packet: Packet,
    reason: Reason,
    /// Where its packets may go; nowhere: they leave as they came.
    pods: &'static [(Host, u16)],
    /// The map that must know its last flow.
    known: Option<&'static str>,
    /// The map is too small for the flows: the first one is forgotten by now.
    full: bool,
}

/// The rows of the packet table.
#[must_use]
pub fn all() -> Vec<Case> {
    let v4 = Case {
        name: "",
        limit: None,
        family: Family::V4,
        program: Program::Wrapped(Family::V4),
        flows: 1,
        packet: Packet::new(L4::Tcp(ACK), CLIENT, WEB),
        reason: Reason::Forwarded,
        pods: WEB_PODS,
        known: None,
        full: false,
    };
    let settled = |name, limit: f64, flows| Case { name, limit: Some(limit), flows, packet: v4.packet.clone(), ..v4 };
    let settled6 = |name, limit, flows| Case {
        family: Family::V6,
        program: Program::Wrapped(Family::V6),
        ..settled(name, limit, flows)
    };
    let pinned =
        |name, limit, flows| Case { packet: v4.packet.towards(PINNED), pods: PIN_PODS, ..settled(name, limit, flows) };
    let udp = |name, limit, flows| Case {
        packet: Packet::new(L4::Udp, CLIENT, DNS),
        pods: DNS_PODS,
        known: Some("UDP_REPLIES"),
        ..settled(name, limit, flows)
    };
    let syn = |name, limit, from, flows| Case {
        packet: Packet::new(L4::Tcp(SYN), from, WEB),
        known: Some("HALF_OPEN"),
        full: flows > 1,
        ..settled(name, limit, flows)
    };
    let bare = |name, limit, to, reason| Case {
        program: Program::Bare,
        packet: v4.packet.towards(to),
        reason,
        pods: &[],
        ..settled(name, limit, 1)
    };
    let yardstick = |name, flows| Case { name, flows, program: Program::LookUp, packet: v4.packet.clone(), ..v4 };
    vec![
        yardstick("(the kernel's look-up in an LRU, one flow)", 1),
        yardstick("(the kernel's look-up in an LRU, 65,536 flows)", MANY),
        bare("non-VIP pass", 1.6, (Host::Pod(9), 80), Reason::NotVip),
        settled("TCPv4 established, settled, one flow", 3.2, 1),
        settled("TCPv4 established, settled, 65,536 flows", 3.7, MANY),
        settled("TCPv4 established, settled, a million flows", 4.0, MILLION),
        settled6("TCPv6 established, settled, one flow", 3.7, 1),
        settled6("TCPv6 established, settled, 65,536 flows", 4.2, MANY),
        pinned("TCPv4, unsettled slot with a pin, one flow", 5.0, 1),
        pinned("TCPv4, unsettled slot with a pin, 65,536 flows", 11.0, MANY),
        udp("UDPv4, one flow", 5.0, 1),
        udp("UDPv4, 65,536 flows", 11.0, MANY),
        syn("SYN, new tuple each time into a full table", 33.0, CLIENT, 2 * MILLION),
        syn("SYN, the same tuple again", 5.0, OTHER, 1),
        bare("drop, unknown port", 3.0, (Host::Vip(1), 8443), Reason::UnknownPort),
        bare("drop, source outside 8 ranges", 4.0, RANGED, Reason::SourceRange),
    ]
}

/// Loads the programs with maps of the sizes that ship, but for the table of the SYN row: a million.
///
/// # Errors
/// A kernel that refuses something.
pub fn world() -> Result<World> {
    let mut world = World::load_by(EbpfLoader::new().map_max_entries("HALF_OPEN4", MILLION as u32))?;
    world.reset(Family::V4)?;
    // As the agent sets them; drops are sampled too.
    world.configure(|c| {
        c.insert_budget = 125_000;
        c.sample = 16;
    })?;
    for family in [Family::V4, Family::V6] {
        world.family = family;
        world.vip(WEB.0, 0)?;
        world.service(WEB, 6, service(1, 0))?;
        world.service(DNS, 17, service(2, 0))?;
        world.service(PINNED, 6, service(3, 0))?;
        world.service(RANGED, 6, service(4, SERVICE_RANGES))?;
        for (id, at) in (2..).zip(WEB_PODS.iter().chain(DNS_PODS)) {
            world.endpoint(id, *at, READY)?;
        }
        world.endpoint(8, (Host::Pod(8), 8080), READY)?;
        world.endpoint(9, (Host::Pod(9), 8080), READY)?;
        for at in PIN_PODS {
            world.endpoint(10, *at, READY)?;
        }
    }
    let half = |cur, prev, unsettled| Slot(u64::from(Slot::half(cur, prev, unsettled)));
    for (base, first) in [(0, 2), (1024, 5), (3072, 2)] {
        for (id, begin, end) in [(first, 0, 336), (first + 1, 336, 672), (first + 2, 672, 1024)] {
            world.slots(base + begin, (end - begin) / SLOTS_PER_ELEMENT * SLOTS_PER_ELEMENT, half(id, id, false))?;
        }
    }
    world.slots(2048, 1024, half(8, 9, true))?;
    world.family = Family::V4;
    for (host, bits) in RANGES {
        world.range(4, host, bits)?;
    }
    let walk = Walk { packets: 0, flows: MANY, step: 1 };
    for packet in 0..MANY {
        let (_, port) = walk.flow(packet);
        world.pin((CLIENT.0, CLIENT.1 ^ port), PINNED, 6, Pin { endpoint: 10, generation: 100, epoch: EPOCH })?;
    }
    Ok(world)
}

impl Case {
    /// Its frame.
    ///
    /// # Errors
    /// None for the rows of [`all`].
    pub fn frame(&self) -> Result<Vec<u8>> {
        frame(&self.packet, self.family)
    }

    /// Its flows, in turn.
    #[must_use]
    pub const fn walk(&self) -> Walk {
        Walk { packets: 0, flows: self.flows, step: 1 }
    }

    /// Runs every flow once, then proves that the packets take the way that the name says.
    ///
    /// # Errors
    /// They do not.
    pub fn prove(&self, world: &mut World, wrapper: &mut Wrapper, walk: &mut Walk) -> Result<()> {
        let frame = self.frame()?;
        world.family = self.family;
        let before = world.counted()?;
        if self.program == Program::LookUp {
            wrapper.run(world, self.program, &frame, walk, self.flows as u32)?;
            return Ok(());
        }
        let run = wrapper.run(world, self.program, &frame, walk, self.flows as u32)?;
        let after = world.counted()?;
        for (reason, (before, after)) in Reason::ALL.into_iter().zip(before.into_iter().zip(after)) {
            let expected = if reason == self.reason { self.flows } else { 0 };
            ensure!(after - before == expected, "{} packets left for {reason:?}, not {expected}", after - before);
        }
        let code = if self.reason.action() == Action::Pass { 2 } else { 1 };
        ensure!(run.code == code, "the program returned {}, not {code}", run.code);
        if self.program == Program::Bare {
            ensure!(run.frame == frame, "the frame was changed");
            return Ok(());
        }
        let (byte, port) = walk.flow(walk.packets - 1);
        let last = self.client(byte, port)?;
        let sent = |to| -> Result<bool> {
            let expected = self::frame(&self.packet.coming(last).towards(to), self.family)?;
            Ok([self.addresses(), self.ports()]
                .into_iter()
                .all(|bytes| run.frame.get(bytes.clone()) == expected.get(bytes)))
        };
        let pods: Vec<_> = self.pods.iter().map(|pod| Ok((*pod, sent(*pod)?))).collect::<Result<_>>()?;
        let pod = pods.iter().find(|(_, sent)| *sent).context("the last packet went to none of its pods")?.0;
        if let Some(map) = self.known {
            let proto = if map == "UDP_REPLIES" { 17 } else { 6 };
            ensure!(world.state(map, (pod, last, proto))?.is_some(), "{map} does not know the last flow");
            if self.full {
                let (byte, port) = walk.flow(walk.packets - self.flows);
                let first = self.client(byte, port)?;
                let mut found = self.pods.iter().map(|pod| world.state(map, (*pod, first, proto)));
                let forgotten = found.try_fold(true, |none, state| Ok::<_, anyhow::Error>(none && state?.is_none()))?;
                ensure!(forgotten, "{map} has room for {} flows: it is not full", self.flows);
            }
        }
        Ok(())
    }

    fn client(&self, byte: u8, port: u16) -> Result<(Host, u16)> {
        let (Host::Client(n), base) = self.packet.from else { anyhow::bail!("packets come from clients") };
        Ok((Host::Client(n ^ byte), base ^ port))
    }

    const fn addresses(&self) -> std::ops::Range<usize> {
        if matches!(self.family, Family::V4) { 26..34 } else { 22..54 }
    }

    const fn ports(&self) -> std::ops::Range<usize> {
        if matches!(self.family, Family::V4) { 34..38 } else { 54..58 }
    }
}
