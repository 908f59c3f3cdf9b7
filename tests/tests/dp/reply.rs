//! Replies through the loaded egress program: which get their VIP back, every byte of them, and
//! what the tables remember of a flow's end.

use anyhow::{Result, ensure};
use purelb_common::table::{CLOSED, CONFIG_REVSVC, FIN_CLIENT, FIN_ENDPOINT, OPEN, READY, Slot};
use purelb_common::verdict::Reason;
use purelb_tests::case::{CLIENT, DNS, DNS_POD, Hook, Row, Seen, WEB, WEB_POD, World, check, service};
use purelb_tests::packet::{Family, Host, L4, Packet};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const BOTH: [Hook; 2] = [Hook::Xdp, Hook::Tcx];
const FLOW: Seen = (WEB_POD, CLIENT, 6);

fn request(flags: u8) -> Packet {
    Packet::new(L4::Tcp(flags), CLIENT, WEB)
}

fn answer(flags: u8) -> Packet {
    Packet::new(L4::Tcp(flags), WEB_POD, CLIENT)
}

fn comes(w: &mut World, hook: Hook, flags: u8) -> Result<()> {
    w.expect(hook, &request(flags), Reason::Forwarded, &request(flags).towards(WEB_POD))
}

fn leaves(w: &mut World, flags: u8) -> Result<()> {
    w.expect(Hook::Egress, &answer(flags), Reason::ReplyTranslated, &answer(flags).coming(WEB))
}

fn state(w: &mut World, map: &str, expected: Option<u16>) -> Result<()> {
    let found = w.state(map, FLOW)?;
    ensure!(found == expected, "{map} has {found:?}, not {expected:?}");
    Ok(())
}

/// For each family and ingress hook, with the base set-up.
fn each(run: impl Fn(&mut World, Hook) -> Result<()>) -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            w.reset(family)?;
            w.base()?;
            run(&mut w, hook)?;
        }
    }
    Ok(())
}

#[test]
fn tcp_life() -> Result<()> {
    each(|w, hook| {
        comes(w, hook, SYN)?;
        state(w, "HALF_OPEN", Some(OPEN))?;
        leaves(w, SYN | ACK)?;
        state(w, "HALF_OPEN", Some(OPEN))?;
        state(w, "REPLIES", None)?;
        comes(w, hook, ACK)?;
        leaves(w, ACK)?;
        state(w, "HALF_OPEN", None)?;
        state(w, "REPLIES", Some(OPEN))?;
        comes(w, hook, FIN | ACK)?;
        state(w, "REPLIES", Some(FIN_CLIENT))?;
        leaves(w, ACK)?;
        state(w, "REPLIES", Some(FIN_CLIENT))?;
        leaves(w, FIN | ACK)?;
        state(w, "REPLIES", Some(CLOSED))?;
        comes(w, hook, ACK)?;
        leaves(w, FIN | ACK)
    })
}

#[test]
fn endpoint_closes_first() -> Result<()> {
    each(|w, hook| {
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        leaves(w, FIN | ACK)?;
        state(w, "REPLIES", Some(FIN_ENDPOINT))?;
        comes(w, hook, FIN | ACK)?;
        state(w, "REPLIES", Some(CLOSED))
    })
}

#[test]
fn resets() -> Result<()> {
    each(|w, hook| {
        // A refused connection.
        comes(w, hook, SYN)?;
        leaves(w, RST | ACK)?;
        state(w, "REPLIES", None)?;
        state(w, "HALF_OPEN", None)?;
        // The endpoint's, then the client's, of a running one.
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        leaves(w, RST)?;
        state(w, "REPLIES", Some(CLOSED))?;
        comes(w, hook, SYN)?;
        state(w, "REPLIES", None)?;
        leaves(w, ACK)?;
        comes(w, hook, RST)?;
        state(w, "REPLIES", Some(CLOSED))
    })
}

/// The client port of a closed flow may come back through another port of the VIP.
#[test]
fn port_reuse() -> Result<()> {
    let other = (WEB.0, 8000);
    each(|w, hook| {
        w.service(other, 6, service(3, 0))?;
        w.slots(2048, 1024, Slot(u64::from(Slot::half(2, 2, false))))?;
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        let again = request(SYN).towards(other);
        w.expect(hook, &again, Reason::TupleCollision, &again)?;
        comes(w, hook, RST)?;
        w.expect(hook, &again, Reason::Forwarded, &again.towards(WEB_POD))?;
        for flags in [SYN | ACK, ACK] {
            w.expect(Hook::Egress, &answer(flags), Reason::ReplyTranslated, &answer(flags).coming(other))?;
        }
        Ok(())
    })
}

/// A SYN that comes late, or from somebody who guesses, moves no running flow though the slot has changed.
#[test]
fn late_syn() -> Result<()> {
    each(|w, hook| {
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        w.slots(0, 1024, Slot(u64::from(Slot::half(4, 2, true))))?;
        comes(w, hook, SYN)?;
        comes(w, hook, ACK)?;
        leaves(w, ACK)
    })
}

#[test]
fn udp() -> Result<()> {
    each(|w, hook| {
        for l4 in [L4::Udp, L4::UdpNoChecksum] {
            let (query, reply) = (Packet::new(l4, CLIENT, DNS), Packet::new(l4, DNS_POD, CLIENT));
            w.expect(hook, &query, Reason::Forwarded, &query.towards(DNS_POD))?;
            w.expect(Hook::Egress, &reply, Reason::ReplyTranslated, &reply.coming(DNS))?;
            let odd = Packet { payload: 7, ..reply };
            w.expect(Hook::Egress, &odd, Reason::ReplyTranslated, &odd.coming(DNS))?;
        }
        Ok(())
    })
}

#[test]
fn shapes() -> Result<()> {
    each(|w, hook| {
        comes(w, hook, SYN)?;
        for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
            for extras in 0..4 {
                let reply = Packet { tags, extras, ..Packet::new(L4::TcpOptions(ACK), WEB_POD, CLIENT) };
                w.expect(Hook::Egress, &reply, Reason::ReplyTranslated, &reply.coming(WEB))?;
            }
        }
        Ok(())
    })
}

fn begun(w: &mut World) -> Result<()> {
    comes(w, Hook::Tcx, SYN)
}

#[test]
fn not_replies() -> Result<()> {
    let row = |name, set_up, packet| Row { name, set_up, packet, reason: Reason::NotReply, to: None };
    let rows = [
        row("no flow", |_| Ok(()), answer(ACK)),
        row("another client port", begun, answer(ACK).towards((CLIENT.0, 40_001))),
        row("another client", begun, answer(ACK).towards((Host::Client(2), CLIENT.1))),
        row("another pod port", begun, answer(ACK).coming((WEB_POD.0, 8081))),
        row("another pod", begun, answer(ACK).coming((Host::Pod(77), WEB_POD.1))),
        row("UDP of the same ports", begun, Packet::new(L4::Udp, WEB_POD, CLIENT)),
        row("ICMP", begun, Packet::new(L4::Icmp(0, 129), WEB_POD, CLIENT)),
        row("SCTP", begun, Packet::new(L4::Other(132), WEB_POD, CLIENT)),
        row("later fragment", begun, Packet { fragment: Some((3, true)), ..answer(ACK) }),
        row(
            "the endpoint's id was given away",
            |w| {
                begun(w)?;
                w.generation(2, WEB_POD, 21)
            },
            answer(ACK),
        ),
    ];
    check(&rows, &[Hook::Egress], &FAMILIES)
}

fn reverse(w: &mut World) -> Result<()> {
    w.configure(|c| c.flags |= CONFIG_REVSVC)?;
    w.reverse(WEB_POD, 6, WEB)?;
    w.reverse(DNS_POD, 17, DNS)
}

/// Without an entry the pod's port alone leads back, for TCP, unless the client spoke to the pod itself.
#[test]
fn by_service() -> Result<()> {
    each(|w, hook| {
        reverse(w)?;
        w.expect(Hook::Egress, &answer(ACK), Reason::ReplyByService, &answer(ACK).coming(WEB))?;
        let reply = Packet::new(L4::Udp, DNS_POD, CLIENT);
        w.expect(Hook::Egress, &reply, Reason::NotReply, &reply)?;
        let own = Packet::new(L4::Tcp(SYN), CLIENT, WEB_POD);
        w.expect(hook, &own, Reason::NotVip, &own)?;
        w.expect(Hook::Egress, &answer(SYN | ACK), Reason::NotReply, &answer(SYN | ACK))?;
        w.expect(Hook::Egress, &answer(ACK), Reason::NotReply, &answer(ACK))?;
        let neighbour = answer(ACK).towards((CLIENT.0, 40_001));
        w.expect(Hook::Egress, &neighbour, Reason::ReplyByService, &neighbour.coming(WEB))?;
        w.configure(|c| c.flags = 0)?;
        w.expect(Hook::Egress, &neighbour, Reason::NotReply, &neighbour)?;
        // An evicted entry of a running flow.
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        w.forget("REPLIES")?;
        w.expect(Hook::Egress, &answer(ACK), Reason::NotReply, &answer(ACK))?;
        w.endpoint(2, WEB_POD, READY)
    })
}

/// Nodes and pods of the cluster speak to the pod itself, and what the pod opens is its own.
#[test]
fn never_by_service() -> Result<()> {
    each(|w, _| {
        reverse(w)?;
        let own = answer(SYN);
        w.expect(Hook::Egress, &own, Reason::NotReply, &own)?;
        let host = if w.family == Family::V4 { 32 } else { 128 };
        for (range, bits) in [(CLIENT.0, host), (Host::Client(0), 24)] {
            w.cluster(range, bits)?;
            w.expect(Hook::Egress, &answer(ACK), Reason::NotReply, &answer(ACK))?;
        }
        w.reset(w.family)?;
        w.base()?;
        reverse(w)?;
        w.cluster(Host::Pod(0), 24)?;
        w.expect(Hook::Egress, &answer(ACK), Reason::ReplyByService, &answer(ACK).coming(WEB))
    })
}

/// A bridge and its port both see a SYN: the second, rewritten one is no connection to the pod itself.
#[test]
fn seen_by_two_hooks() -> Result<()> {
    each(|w, hook| {
        comes(w, hook, SYN)?;
        let rewritten = request(SYN).towards(WEB_POD);
        w.expect(hook, &rewritten, Reason::NotVip, &rewritten)?;
        leaves(w, SYN | ACK)
    })
}

/// A client that first used the VIP and then the pod itself from the same port hears the pod.
#[test]
fn direct_after_vip() -> Result<()> {
    each(|w, hook| {
        let own = Packet::new(L4::Tcp(SYN), CLIENT, WEB_POD);
        comes(w, hook, SYN)?;
        leaves(w, ACK)?;
        leaves(w, RST)?;
        w.expect(hook, &own, Reason::NotVip, &own)?;
        w.expect(Hook::Egress, &answer(SYN | ACK), Reason::NotReply, &answer(SYN | ACK))
    })
}
