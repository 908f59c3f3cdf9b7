//! Tables of cases for the loaded programs: what most rows start from, and one run of each row per
//! family and hook.

use anyhow::{Result, ensure};
use purelb_common::table::{READY, Service, Slot, TICK_SHIFT};
use purelb_common::verdict::Reason;

use crate::packet::{Family, Host, Packet};
pub use crate::world::{Hook, Outcome, Seen, World};

/// The first client.
pub const CLIENT: (Host, u16) = (Host::Client(1), 40_000);
/// TCP service 1: slots 0..1024, all of endpoint 2.
pub const WEB: (Host, u16) = (Host::Vip(1), 80);
/// UDP service 2: slots 1024..2048, all of endpoint 3.
pub const DNS: (Host, u16) = (Host::Vip(1), 53);
/// Endpoint 2.
pub const WEB_POD: (Host, u16) = (Host::Pod(2), 8080);
/// Endpoint 3.
pub const DNS_POD: (Host, u16) = (Host::Pod(3), 5353);
/// Endpoint 4, ready, in no slot.
pub const SPARE: (Host, u16) = (Host::Pod(4), 8080);
/// Epoch of both services.
pub const EPOCH: u32 = 3;

/// A service whose slots begin at `1024 * (id - 1)`.
#[must_use]
pub const fn service(id: u32, flags: u32) -> Service {
    Service { id, flags, base: 1024 * (id - 1), mask: 1023, epoch: EPOCH, changed: 0, affinity: 0, settled: EPOCH }
}

impl World {
    /// The services and endpoints that most rows start from.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn base(&mut self) -> Result<()> {
        self.vip(WEB.0, 0)?;
        self.service(WEB, 6, service(1, 0))?;
        self.service(DNS, 17, service(2, 0))?;
        self.slots(0, 1024, Slot(u64::from(Slot::half(2, 2, false))))?;
        self.slots(1024, 1024, Slot(u64::from(Slot::half(3, 3, false))))?;
        self.endpoint(2, WEB_POD, READY)?;
        self.endpoint(3, DNS_POD, READY)?;
        self.endpoint(4, SPARE, READY)
    }

    /// Waits until a tick has just begun, for rows that must not cross one.
    ///
    /// # Errors
    /// As [`Self::jiffies`].
    pub fn early_in_tick(&mut self) -> Result<()> {
        while self.jiffies()? % (1 << TICK_SHIFT) > 1 << (TICK_SHIFT - 1) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(())
    }
}

/// One line of a table of cases.
pub struct Row {
    /// What it shows.
    pub name: &'static str,
    /// Beyond [`World::base`].
    pub set_up: fn(&mut World) -> Result<()>,
    /// What comes in.
    pub packet: Packet,
    /// Why it leaves.
    pub reason: Reason,
    /// Where to, or nowhere: untouched.
    pub to: Option<(Host, u16)>,
}

/// Runs every row at the hooks and families, and names the row that fails.
///
/// # Errors
/// All rows that failed.
pub fn check(rows: &[Row], hooks: &[Hook], families: &[Family]) -> Result<()> {
    let mut world = World::load()?;
    let mut failures = Vec::new();
    for row in rows {
        for &family in families {
            for &hook in hooks {
                let mut one = || {
                    world.reset(family)?;
                    world.base()?;
                    (row.set_up)(&mut world)?;
                    let expected = row.to.map_or_else(|| row.packet.clone(), |to| row.packet.towards(to));
                    world.expect(hook, &row.packet, row.reason, &expected)
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
