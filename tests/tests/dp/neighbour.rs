//! ARP requests and neighbour solicitations for VIPs through the loaded programs: what the kernel, which would answer, gets
//! to hear. Invariants I9 and I19.

use anyhow::{Context as _, Result, ensure};
use purelb_common::table::{VIP_LOCAL, VIP_OTHER_PROTOCOLS, VIP_REMOTE};
use purelb_common::verdict::Reason;
use purelb_tests::case::{CLIENT, Hook, WEB, World};
use purelb_tests::neighbour::Question;
use purelb_tests::packet::{Family, Host, L4, Packet};

const BOTH: [Hook; 2] = [Hook::Xdp, Hook::Tcx];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const LOCAL: Host = Host::Vip(2);
const REMOTE: Host = Host::Vip(3);
const NEVER: u64 = u64::MAX;

type SetUp = fn(&mut World) -> Result<()>;

struct Row {
    name: &'static str,
    set_up: SetUp,
    question: Question,
    reason: Reason,
}

fn row(name: &'static str, set_up: SetUp, question: Question, reason: Reason) -> Row {
    Row { name, set_up, question, reason }
}

fn nothing(_: &mut World) -> Result<()> {
    Ok(())
}

/// The right to answer has run out.
fn down(w: &mut World) -> Result<()> {
    w.fence(1, NEVER)
}

fn silent(w: &mut World) -> Result<()> {
    w.configure(|c| {
        c.heartbeat = c.heartbeat.wrapping_sub(500);
        c.heartbeat_limit = 100;
    })
}

fn ask(target: Host) -> Question {
    Question::new(target)
}

/// A VIP of no kind, a local and a remote one.
fn base(w: &mut World, family: Family) -> Result<()> {
    w.reset(family)?;
    w.base()?;
    w.vip(LOCAL, VIP_LOCAL)?;
    w.vip(REMOTE, VIP_REMOTE | VIP_OTHER_PROTOCOLS)
}

fn expect(w: &mut World, hook: Hook, frame: &[u8], reason: Reason) -> Result<()> {
    let out = w.run(hook, frame)?.context("the kernel refuses the frame")?;
    ensure!(out.reasons == [reason], "counted {:?} instead of {reason:?}", out.reasons);
    ensure!(out.action == reason.action(), "the verdict is {:?} though the reason is {reason:?}", out.action);
    ensure!(out.frame == frame, "the frame was changed");
    Ok(())
}

fn check(rows: &[Row], families: &[Family]) -> Result<()> {
    let mut w = World::load()?;
    let mut failures = Vec::new();
    for row in rows {
        for &family in families {
            for hook in BOTH {
                let mut one = || {
                    base(&mut w, family)?;
                    (row.set_up)(&mut w)?;
                    expect(&mut w, hook, &row.question.bytes(family)?, row.reason)
                };
                if let Err(error) = one() {
                    failures.push(format!("{} ({family:?}, {hook:?}): {error:#}", row.name));
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn questions() -> Result<()> {
    let (passed, remote, fenced) = (Reason::PassedProtocol, Reason::RemoteAddress, Reason::Fenced);
    let stranger = Question { mac: [2, 0, 0, 0, 0, 99], unicast: true, ..ask(REMOTE) };
    let rows = [
        row("no VIP", down, ask(Host::Pod(9)), Reason::NotVip),
        row("bit set, no VIP", |w| w.bit(Host::Pod(9)), ask(Host::Pod(9)), Reason::NotVip),
        row("a VIP that is not ours to announce", down, ask(WEB.0), passed),
        row("remote", nothing, ask(REMOTE), remote),
        row("remote, probe", nothing, Question { asker: None, ..ask(REMOTE) }, remote),
        row("remote, unicast", nothing, Question { unicast: true, ..ask(REMOTE) }, remote),
        row("remote, VLAN", nothing, Question { tags: &[0x8100], ..ask(REMOTE) }, remote),
        row("remote, QinQ", nothing, Question { tags: &[0x88a8, 0x8100], ..ask(REMOTE) }, remote),
        row("remote, past the fence's end", |w| w.fence(1, 2), ask(REMOTE), remote),
        row("remote, silent agent", silent, ask(REMOTE), Reason::PassedStale),
        row(
            "remote, beside another one of its bit",
            |w| w.vip_beside(Host::Vip(4), VIP_REMOTE),
            ask(Host::Vip(4)),
            remote,
        ),
        row("remote, answer", nothing, Question { answer: true, ..ask(REMOTE) }, Reason::NotVip),
        row("for another MAC address", |w| w.uplink([0; 6]), stranger.clone(), Reason::PassedOtherHost),
        row("a port of a bridge: any MAC address", nothing, stranger, remote),
        row("local, no fence was ever written", nothing, ask(LOCAL), passed),
        row("local, before the fence", |w| w.fence(NEVER, NEVER), ask(LOCAL), passed),
        row("local, behind the fence", down, ask(LOCAL), fenced),
        row("local, no right at all", |w| w.fence(0, NEVER), ask(LOCAL), fenced),
        row("local, behind the fence, probe", down, Question { asker: None, ..ask(LOCAL) }, fenced),
        row("local, behind the fence, unicast", down, Question { unicast: true, ..ask(LOCAL) }, fenced),
        row("local, behind the fence, VLAN", down, Question { tags: &[0x8100], ..ask(LOCAL) }, fenced),
        row("local, behind the fence, silent agent", |w| down(w).and_then(|()| silent(w)), ask(LOCAL), fenced),
        row("local, before the fence, silent agent", silent, ask(LOCAL), passed),
        row("local, past the fence's end", |w| w.fence(1, 2), ask(LOCAL), passed),
        row("local, answer", down, Question { answer: true, ..ask(LOCAL) }, Reason::NotVip),
    ];
    check(&rows, &FAMILIES)
}

#[test]
fn solicitations() -> Result<()> {
    let rows = [
        // The kernel ignores what came through a router.
        row("hop limit", down, Question { hop_limit: 254, ..ask(LOCAL) }, Reason::NotVip),
        row("hop limit, unicast", down, Question { hop_limit: 254, unicast: true, ..ask(LOCAL) }, Reason::IcmpType),
        row("behind a header", down, Question { extras: 1, ..ask(LOCAL) }, Reason::Fenced),
        row("behind two headers", nothing, Question { extras: 2, ..ask(REMOTE) }, Reason::RemoteAddress),
        row("unicast behind a header", down, Question { extras: 1, unicast: true, ..ask(LOCAL) }, Reason::Fenced),
    ];
    check(&rows, &[Family::V6])?;
    let mut w = World::load()?;
    let with = |question: &Question, at: usize, bytes: &[u8]| -> Result<Vec<u8>> {
        let mut frame = question.bytes(Family::V6)?;
        let at = question.network() + at;
        frame.get_mut(at..at + bytes.len()).context("range")?.copy_from_slice(bytes);
        Ok(frame)
    };
    let unicast = Question { unicast: true, ..ask(LOCAL) };
    let frames = [
        ("code", with(&ask(LOCAL), 41, &[1])?, Reason::NotVip),
        ("code, unicast", with(&unicast, 41, &[1])?, Reason::PassedProtocol),
        ("to one VIP for another", with(&unicast, 48, &REMOTE.v6())?, Reason::RemoteAddress),
        ("to a VIP for none", with(&unicast, 48, &Host::Pod(9).v6())?, Reason::PassedProtocol),
        ("to a pod for a VIP", with(&unicast, 24, &Host::Pod(9).v6())?, Reason::Fenced),
        ("router solicitation", with(&ask(LOCAL), 40, &[133])?, Reason::NotVip),
    ];
    for hook in BOTH {
        for (name, frame, reason) in &frames {
            base(&mut w, Family::V6)?;
            down(&mut w)?;
            expect(&mut w, hook, frame, *reason).with_context(|| format!("{name}, {hook:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn arp_of_other_kinds() -> Result<()> {
    let mut w = World::load()?;
    // From the first byte of ARP on.
    let rows: [(&str, usize, &[u8], Reason); 8] = [
        ("IEEE 802, which Linux takes for Ethernet", 0, &[0, 6], Reason::Fenced),
        ("another hardware", 0, &[0, 32], Reason::NotVip),
        ("another protocol", 2, &[0x86, 0xdd], Reason::NotVip),
        ("hardware length", 4, &[8], Reason::NotVip),
        ("protocol length", 5, &[16], Reason::NotVip),
        ("reverse request", 6, &[0, 3], Reason::NotVip),
        ("operation 0x101", 6, &[1, 1], Reason::NotVip),
        ("a host announces its own address", 14, &LOCAL.v4(), Reason::NotVip),
    ];
    for hook in BOTH {
        for (name, at, bytes, reason) in rows {
            base(&mut w, Family::V4)?;
            down(&mut w)?;
            let mut frame = ask(LOCAL).bytes(Family::V4)?;
            frame.get_mut(14 + at..14 + at + bytes.len()).context("range")?.copy_from_slice(bytes);
            expect(&mut w, hook, &frame, reason).with_context(|| format!("{name}, {hook:?}"))?;
        }
    }
    Ok(())
}

/// Cut before the target ends, it asks for nothing; what follows the target does not count.
#[test]
fn every_truncation() -> Result<()> {
    let (mut w, mut runs) = (World::load()?, 0);
    for family in FAMILIES {
        for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
            base(&mut w, family)?;
            let question = Question { tags, ..ask(REMOTE) };
            let frame = question.bytes(family)?;
            for length in 0..frame.len() {
                for hook in BOTH {
                    let cut = frame.get(..length).context("length")?;
                    let Some(out) = w.run(hook, cut)? else { continue };
                    runs += 1;
                    // IPv6 says how long it is, and the kernel drops what is shorter.
                    ensure!(out.reasons == [Reason::NotVip], "{hook:?} {family:?} {length}: {:?}", out.reasons);
                    ensure!(out.frame == cut, "{hook:?} {family:?} {length}: changed");
                }
            }
            for hook in BOTH {
                let padded = [frame.as_slice(), &[0; 18]].concat();
                expect(&mut w, hook, &padded, Reason::RemoteAddress)?;
            }
        }
    }
    ensure!(runs > 300, "only {runs} runs: the kernel refused the others");
    Ok(())
}

/// The fence is compared with the time since boot in nanoseconds, and comes down by itself.
#[test]
fn the_fence_comes_down_in_time() -> Result<()> {
    let mut w = World::load()?;
    let now = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/uptime")?;
        let seconds: f64 = text.split(' ').next().context("uptime")?.parse()?;
        Ok((seconds * 1e9) as u64)
    };
    for family in FAMILIES {
        for hook in BOTH {
            base(&mut w, family)?;
            let frame = ask(LOCAL).bytes(family)?;
            let until = now()? + 2_000_000_000;
            w.fence(until, until + 3_000_000_000)?;
            expect(&mut w, hook, &frame, Reason::PassedProtocol)?;
            while now()? <= until + 10_000_000 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            expect(&mut w, hook, &frame, Reason::Fenced)?;
            while now()? <= until + 3_010_000_000 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            expect(&mut w, hook, &frame, Reason::PassedProtocol)?;
        }
    }
    Ok(())
}

/// Packets for these VIPs are judged as ever.
#[test]
fn packets_do_not_mind() -> Result<()> {
    let mut w = World::load()?;
    for family in FAMILIES {
        for hook in BOTH {
            base(&mut w, family)?;
            down(&mut w)?;
            let packet = Packet::new(L4::Tcp(2), CLIENT, (LOCAL, 80));
            w.expect(hook, &packet, Reason::UnknownPort, &packet)?;
            let packet = Packet::new(L4::Other(132), CLIENT, (REMOTE, 80));
            w.expect(hook, &packet, Reason::PassedProtocol, &packet)?;
            let packet = Packet::new(L4::Icmp(8, 128), CLIENT, (LOCAL, 0));
            w.expect(hook, &packet, Reason::PassedProtocol, &packet)?;
        }
    }
    Ok(())
}
