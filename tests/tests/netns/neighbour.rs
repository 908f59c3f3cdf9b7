//! What is said to neighbours and heard of them, over a real link to a real kernel.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use purelb_agent::net::neighbour::{Mac, Wire, announce, frame, probe};
use purelb_tests::leftovers::{self, Owner};
use purelb_tests::netns::Netns;

const GAP: Duration = Duration::from_millis(200);

/// Two hosts on one link.
struct Link {
    here: Netns,
    there: Netns,
    prefix: String,
}

impl Link {
    fn new() -> Result<Self> {
        let prefix = leftovers::next_prefix()?;
        let (here, there) = (Netns::create(&format!("{prefix}-here"))?, Netns::create(&format!("{prefix}-there"))?);
        let link = Self { here, there, prefix };
        link.here.ip(&format!("link add eth0 type veth peer name eth0 netns {}", link.there.name()))?;
        for (netns, host) in [(&link.here, 1), (&link.there, 2)] {
            netns.ip("link set eth0 up")?;
            netns.ip(&format!("address add fe80::{host}/64 dev eth0 nodad"))?;
        }
        Ok(link)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        leftovers::remove(Owner::Lab(&self.prefix));
    }
}

/// Runs it in a namespace.
fn inside<T: Send + 'static, F: Future<Output = Result<T>>>(
    netns: &Netns,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T> {
    netns.enter(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work())
    })?
}

fn mac(netns: &Netns, device: &'static str) -> Result<Mac> {
    inside(netns, move || async move { Ok(Wire::open(device)?.mac()) })
}

fn ask(netns: &Netns, vip: IpAddr, count: u32) -> Result<Option<Mac>> {
    inside(netns, move || async move { Ok(probe(&Wire::open("eth0")?, &[vip], count, GAP).await?.get(&vip).copied()) })
}

#[test]
fn who_has_an_address() -> Result<()> {
    let link = Link::new()?;
    link.there.ip("address add 192.0.2.1/24 dev eth0")?;
    link.there.ip("address add 2001:db8::1/64 dev eth0 nodad")?;
    let (here, there) = (mac(&link.here, "eth0")?, mac(&link.there, "eth0")?);
    for (taken, free) in [("192.0.2.1", "192.0.2.9"), ("2001:db8::1", "2001:db8::9")] {
        ensure!(ask(&link.here, taken.parse()?, 3)? == Some(there), "{taken} is taken");
        let free: IpAddr = free.parse()?;
        ensure!(ask(&link.here, free, 3)?.is_none(), "nobody has {free}");
        // Both want it at once: each hears of the other.
        let other = link.there.clone();
        let other = std::thread::spawn(move || ask(&other, free, 10));
        let one = ask(&link.here, free, 10)?;
        let other = other.join().ok().context("the other thread panicked")??;
        ensure!(one == Some(there) || other == Some(here), "{free}: {one:?} and {other:?} of {there:?} and {here:?}");
    }
    Ok(())
}

#[test]
fn an_address_is_announced() -> Result<()> {
    let link = Link::new()?;
    link.there.sysctl("net.ipv4.conf.eth0.arp_accept", "1")?;
    link.there.ip("address add 192.0.2.1/24 dev eth0")?;
    link.there.ip("neigh add 2001:db8::7 lladdr 02:00:00:00:00:99 dev eth0 nud stale")?;
    let mac = inside(&link.here, || async {
        let wire = Wire::open("eth0")?;
        let link_local: Ipv6Addr = "fe80::1".parse()?;
        announce(&wire, "192.0.2.7".parse()?, None).await?;
        announce(&wire, "2001:db8::7".parse()?, Some(link_local)).await?;
        Ok(wire.mac())
    })?;
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let known = link.there.ip("neigh show")?;
    for vip in ["192.0.2.7", "2001:db8::7"] {
        ensure!(known.contains(&format!("{vip} dev eth0 lladdr {mac}")), "{vip} is at {mac}, not: {known}");
    }
    Ok(())
}

/// Nothing but ARP and neighbour discovery of others, on this very link.
#[test]
fn what_is_heard() -> Result<()> {
    let link = Link::new()?;
    link.here.ip("link add other type veth peer name another")?;
    link.here.ip("link set other up")?;
    link.here.ip("link set another up")?;
    let there = link.there.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let heard = link.here.spawn(move || -> Result<Vec<Vec<u8>>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let wire = Wire::open("eth0")?;
            // By another socket: no socket hears what it sends itself.
            announce(&Wire::open("eth0")?, "192.0.2.3".parse()?, None).await?;
            announce(&Wire::open("other")?, "192.0.2.4".parse()?, None).await?;
            tell.send(())?;
            let mut heard = Vec::new();
            while let Ok(frame) = tokio::time::timeout(GAP * 5, wire.recv()).await {
                heard.push(frame?);
            }
            Ok(heard)
        })
    })?;
    told.recv().context("the wire does not open")?;
    inside(&there, || async {
        let wire = Wire::open("eth0")?;
        // Of another network on this link.
        for mut frame in frame::announcement("192.0.2.5".parse()?, wire.mac(), None) {
            frame.splice(12..12, [0x81, 0, 0, 5]);
            wire.send(&frame).await?;
        }
        // IPv4, a router solicitation, and IPv6 that is no ICMP.
        let ipv6 = |next: u8, kind: u8| [&[0x60, 0, 0, 0, 0, 8, next, 255][..], &[0; 32], &[kind; 8]].concat();
        for (ethertype, body) in [(0x0800_u16, vec![0x45; 46]), (0x86dd, ipv6(58, 133)), (0x86dd, ipv6(17, 135))] {
            wire.send(&[&[0xff; 6][..], &wire.mac(), &ethertype.to_be_bytes(), &body].concat()).await?;
        }
        announce(&wire, "192.0.2.6".parse()?, None).await?;
        Ok(announce(&wire, "2001:db8::6".parse()?, Some("fe80::2".parse()?)).await?)
    })?;
    let heard = heard.join().ok().context("the thread panicked")???;
    let claims: Vec<_> = heard.iter().map(|frame| frame::claim(frame)).collect();
    // The kernels may do without a word of their own; whatever they say is neighbour discovery, too.
    let ours: Vec<_> =
        claims.iter().flatten().map(|claim| claim.ip.to_string()).filter(|ip| !ip.starts_with("fe80")).collect();
    let ours = {
        // ARP and neighbour discovery come by a socket each.
        let mut ours = ours;
        ours.sort();
        ours
    };
    ensure!(ours == ["192.0.2.6", "192.0.2.6", "2001:db8::6"], "heard {ours:?}: {heard:02x?}");
    let kinds = heard.iter().map(|frame| (frame.get(12..14), frame.get(54)));
    let odd = kinds.filter(|(ethertype, kind)| {
        *ethertype != Some(&[8, 6]) && !(*ethertype == Some(&[0x86, 0xdd]) && matches!(kind, Some(135 | 136)))
    });
    ensure!(odd.count() == 0, "heard {heard:02x?}");
    Ok(())
}
