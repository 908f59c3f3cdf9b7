//! Words with the neighbours on a link, for local addresses: that one is here now, and whether somebody else has it. `frame`
//! is what is said, `wire` how it gets onto the link.

pub mod frame;
mod wire;

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub use frame::{Claim, Mac};
pub use wire::Wire;

/// Tells the link that the address is at our MAC address: what PureLB sends at once. IPv6 needs the interface's link-local
/// address, and nothing is sent without one.
///
/// # Errors
/// The interface is down or gone.
pub async fn announce(wire: &Wire, vip: IpAddr, link_local: Option<Ipv6Addr>) -> io::Result<()> {
    for frame in frame::announcement(vip, wire.mac(), link_local) {
        wire.send(&frame).await?;
    }
    Ok(())
}

/// Asks `count` times whether somebody has the addresses, and waits for a `gap` after each: the MAC addresses of those who
/// have one, or who ask for it for themselves at the same time (RFC 5227, 2.1.1; RFC 4862, 5.4.3). Another interface of
/// this node is a stranger, too.
///
/// # Errors
/// The interface is down or gone.
pub async fn probe(wire: &Wire, vips: &[IpAddr], count: u32, gap: Duration) -> io::Result<BTreeMap<IpAddr, Mac>> {
    let mut found = BTreeMap::new();
    for _ in 0..count {
        for vip in vips.iter().filter(|vip| !found.contains_key(*vip)) {
            wire.send(&frame::probe(*vip, wire.mac(), nonce())).await?;
        }
        let end = Instant::now() + gap;
        while let Ok(frame) = timeout_at(end, wire.recv()).await {
            let claim = frame::claim(&frame?).filter(|claim| vips.contains(&claim.ip) && claim.mac != wire.mac());
            if let Some(claim) = claim {
                found.entry(claim.ip).or_insert(claim.mac);
            }
            if found.len() == vips.len() {
                return Ok(found);
            }
        }
    }
    Ok(found)
}

/// Tells our probe from one that a bridge sends back to us (RFC 7527); nobody need be unable to guess it.
fn nonce() -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
    [a, b, c, d, e, f]
}
