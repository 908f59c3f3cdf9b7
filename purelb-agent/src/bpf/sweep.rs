//! Removes reply entries of flows that are over, so that those that run keep their room (4.3).

use std::path::Path;
use std::time::Duration;

use purelb_common::hash::Address;
use purelb_common::table::{CLOSED, Config, Reply, ReplyKey, TICK_SHIFT};

use super::maps::Table;
use super::{BpfError, Maps};

/// How often.
pub const SWEEP: Duration = Duration::from_secs(30);
/// What follows the end of a connection still finds its way back: retransmitted FINs and ACKs.
const CLOSING: Duration = Duration::from_secs(120);

/// Looks at every entry once.
pub fn sweep(root: &Path) {
    match all(root) {
        Ok(0) => {}
        Ok(removed) => tracing::debug!(op = "sweep", removed, "reply entries of flows that are over"),
        Err(error) => tracing::warn!(op = "sweep", %error, "cannot sweep the reply entries"),
    }
}

fn all(root: &Path) -> Result<usize, BpfError> {
    let maps = Maps::open(root)?;
    let (config, clock) = (maps.config()?, maps.clock()?);
    let closing = u32::try_from((CLOSING.as_secs() * u64::from(clock.hz)) >> TICK_SHIFT).unwrap_or(u32::MAX);
    let limits = Limits { now: clock.tick, closing, config };
    Ok(family::<[u8; 4]>(root, &limits)? + family::<[u8; 16]>(root, &limits)?)
}

struct Limits {
    now: u32,
    closing: u32,
    config: Config,
}

impl Limits {
    fn over<A: Address>(&self, entry: &Reply<A>, idle: u32) -> bool {
        let age = self.now.wrapping_sub(entry.used);
        // An entry a moment ahead of the reading is young.
        let age = if age > u32::MAX / 2 { 0 } else { age };
        age > idle || entry.state == CLOSED && age > self.closing
    }
}

fn family<A: Address>(root: &Path, limits: &Limits) -> Result<usize, BpfError> {
    let config = &limits.config;
    // A client may be silent for hours after the handshake, and only the endpoint's first answer makes a reply entry
    // of the half-open one. Those of SYNs that nobody answers go by themselves when room is needed.
    let maps = [("HALF_OPEN", config.tcp_idle), ("REPLIES", config.tcp_idle), ("UDP_REPLIES", config.udp_idle)];
    let mut removed = 0;
    for (name, idle) in maps.into_iter().filter(|(_, idle)| *idle > 0) {
        let table: Table<ReplyKey<A>, Reply<A>> = Table::open(root, &format!("{name}{}", A::FAMILY))?;
        let mut over = Vec::new();
        table.for_each(|key, entry| {
            if limits.over(&entry, idle) {
                over.push(key);
            }
        })?;
        for key in over {
            // It may have spoken since: then it stays. What speaks in this very moment loses its entry, after
            // hours of silence.
            if table.get(&key)?.is_some_and(|entry| limits.over(&entry, idle)) {
                removed += usize::from(table.remove(&key)?);
            }
        }
    }
    Ok(removed)
}
