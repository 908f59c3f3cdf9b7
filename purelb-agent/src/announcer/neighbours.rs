//! Words with the neighbours about the addresses that this node has: whether somebody has one already, that it is here now,
//! and again when somebody else claims it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use purelb_plan::world::Garp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::clock;
use crate::metrics::Announcing;
use crate::net::neighbour::{Mac, Wire, announce, frame, probe};

/// The wait after each probe.
const GAP: Duration = Duration::from_millis(200);
/// A link that takes no frame keeps no address from its node for longer.
const PATIENCE: Duration = Duration::from_secs(2);
/// An address is defended so often at most (RFC 5227, 2.4 c).
const DEFENCE: Duration = Duration::from_secs(10);

/// How often an address is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Probes {
    /// Before it is taken for the first time.
    Three = 3,
    /// Beside taking it over: whoever had it before should be silent.
    One = 1,
}

/// What is heard of it.
#[derive(Debug)]
pub enum Word {
    /// Nobody has it, or this one.
    Probed(IpAddr, Option<Mac>),
    /// This one claims it.
    Claimed(IpAddr, Mac),
}

/// What this node may speak for, as far as its Lease goes.
#[derive(Clone, Debug, Default)]
pub struct Rights {
    /// The addresses that are on an interface.
    pub on: BTreeMap<IpAddr, u32>,
    /// Until then: milliseconds of the clock.
    pub until: u64,
}

impl Rights {
    fn has(&self, ip: IpAddr, index: u32) -> bool {
        self.on.get(&ip) == Some(&index) && clock::now() < self.until
    }
}

/// An interface as it is to be spoken on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Its MAC address.
    pub mac: Option<Mac>,
    /// What IPv6 neighbours are told from.
    pub link_local: Option<Ipv6Addr>,
}

/// Speaks in the background.
#[derive(Debug)]
pub struct Neighbours {
    words: mpsc::UnboundedSender<Word>,
    rights: watch::Sender<Rights>,
    lines: BTreeMap<u32, Line>,
    guards: BTreeMap<u32, JoinHandle<()>>,
    /// To be looked for, by interface.
    asks: BTreeMap<(u32, Probes), Vec<IpAddr>>,
    metrics: Announcing,
}

impl Neighbours {
    /// Nothing is said yet; what is heard comes out of the receiver.
    #[must_use]
    pub fn new(metrics: Announcing) -> (Self, mpsc::UnboundedReceiver<Word>) {
        let (words, heard) = mpsc::unbounded_channel();
        let (lines, guards, asks) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        (Self { words, rights: watch::Sender::default(), lines, guards, asks, metrics }, heard)
    }

    /// What may be spoken for from now on, and where. On each interface somebody listens. Gives back those that have
    /// another MAC address than before.
    pub fn update(&mut self, rights: Rights, lines: Vec<Line>, listen: bool) -> BTreeSet<u32> {
        self.rights.send_replace(rights);
        let lines: BTreeMap<u32, Line> = lines.into_iter().map(|line| (line.index, line)).collect();
        let before = std::mem::replace(&mut self.lines, lines);
        let lines = &self.lines;
        self.guards.retain(|index, task| {
            let stays = listen && lines.get(index) == before.get(index) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        for (index, line) in self.lines.iter().filter(|_| listen) {
            self.guards
                .entry(*index)
                .or_insert_with(|| tokio::spawn(guard(line.clone(), self.rights.subscribe(), self.words.clone())));
        }
        let moved = |(index, line): &(&u32, &Line)| before.get(index).is_some_and(|old| old.mac != line.mac);
        self.lines.iter().filter(moved).map(|(index, _)| *index).collect()
    }

    /// Nothing is said for it any more.
    pub fn forget(&self, ip: IpAddr) {
        self.rights.send_modify(|rights| {
            rights.on.remove(&ip);
        });
    }

    /// Asks whether somebody has the address, with the next [`Self::ask`].
    pub fn probe(&mut self, ip: IpAddr, index: u32, probes: Probes) {
        self.asks.entry((index, probes)).or_default().push(ip);
    }

    /// Asks for all of them at once, and says by a [`Word`] what became of each.
    pub fn ask(&mut self) {
        for ((index, probes), ips) in std::mem::take(&mut self.asks) {
            let (words, line) = (self.words.clone(), self.lines.get(&index).cloned());
            tokio::spawn(async move {
                let asked = async {
                    let line = line.ok_or(std::io::ErrorKind::NotFound)?;
                    probe(&Wire::open(&line.name)?, &ips, probes as u32, GAP).await
                };
                let found = match tokio::time::timeout(PATIENCE, asked).await {
                    Ok(Ok(found)) => found,
                    // Nobody to be asked.
                    Ok(Err(_)) | Err(_) => BTreeMap::new(),
                };
                for ip in ips {
                    let _ = words.send(Word::Probed(ip, found.get(&ip).copied()));
                }
            });
        }
    }

    /// Says that the addresses are here, as long as each of them is.
    pub fn tell(&self, ips: Vec<IpAddr>, index: u32, garp: Option<Garp>) {
        let (Some(garp), Some(line)) = (garp, self.lines.get(&index).cloned()) else { return };
        let (rights, metrics) = (self.rights.subscribe(), self.metrics.clone());
        tokio::spawn(async move {
            let said = async {
                tokio::time::sleep(Duration::from_millis(garp.delay)).await;
                let wire = Wire::open(&line.name)?;
                for n in 0..garp.count {
                    if n > 0 {
                        tokio::time::sleep(Duration::from_millis(garp.interval)).await;
                    }
                    for ip in &ips {
                        if rights.borrow().has(*ip, line.index) {
                            announce(&wire, *ip, line.link_local).await?;
                            if ip.is_ipv4() { &metrics.garp_sent } else { &metrics.na_sent }.inc();
                        }
                    }
                }
                std::io::Result::Ok(())
            };
            if let Err(error) = said.await {
                tracing::debug!(op = "announceAddress", iface = line.name, %error, "not told");
            }
        });
    }
}

/// Listens on an interface, and answers whoever claims what is here.
async fn guard(line: Line, rights: watch::Receiver<Rights>, words: mpsc::UnboundedSender<Word>) {
    let listened = async {
        let wire = Wire::open(&line.name)?;
        let mut defended: BTreeMap<IpAddr, Instant> = BTreeMap::new();
        loop {
            let Some(claim) = frame::claim(&wire.recv().await?) else { continue };
            let ours = !claim.probes && claim.mac != wire.mac() && rights.borrow().has(claim.ip, line.index);
            let now = Instant::now();
            if !ours || defended.get(&claim.ip).is_some_and(|last| now < *last + DEFENCE) {
                continue;
            }
            defended.insert(claim.ip, now);
            announce(&wire, claim.ip, line.link_local).await?;
            if words.send(Word::Claimed(claim.ip, claim.mac)).is_err() {
                return Ok(());
            }
        }
    };
    let ended: std::io::Result<()> = listened.await;
    if let Err(error) = ended {
        tracing::debug!(op = "guardAddresses", iface = line.name, %error, "nobody listens there now");
        // Tried again, and not at once.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.guards.values().for_each(JoinHandle::abort);
    }
}

/// As people write it.
#[must_use]
pub fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
