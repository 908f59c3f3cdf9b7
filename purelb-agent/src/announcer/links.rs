//! Has on this node's interfaces what the election says, and nothing else of ours: adds, renews before the kernel's
//! lifetimes end, adds again what somebody removed, and takes away. Before the election has begun it does nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use purelb_plan::world::AddressOptions;
use tokio::sync::{mpsc, watch};

use super::neighbours::{Line, Neighbours, Probes, Rights, Word, text};
use super::{Order, Wish, clock};
use crate::metrics::Announcing;
use crate::net::local::{LocalLink, place};
use crate::net::{Added, NetError, Netlink, Placing, Present, in_front};

/// Everything is looked at this often even if nothing says that it changed.
const POLL: Duration = Duration::from_secs(10);
/// What could not be taken away is tried again after so long, ...
const SOON: Duration = Duration::from_millis(100);
/// ... what could not be added after so long, ...
const LATER: Duration = Duration::from_secs(1);
/// ... and what the kernel found on another host.
const LATE: Duration = Duration::from_secs(10);
/// An address that was wanted for so long has been somewhere before: it is not looked for.
const NEW: Duration = Duration::from_secs(10);
/// A claim of somebody else is shown for so long.
const SHOWN: Duration = Duration::from_secs(60);
/// A call that took longer made the address live too long where no data path keeps the fence, in milliseconds.
const SLOW: u64 = 300;

/// A local address that this node answers for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Its interface; none while it is on none.
    pub iface: Option<String>,
    /// Why it is on none, or not alone in the network.
    pub fault: Option<String>,
    /// It was there before this agent began.
    pub adopted: bool,
}

/// What leads in and out.
pub struct Lines {
    pub wishes: watch::Receiver<Arc<Wish>>,
    pub orders: mpsc::UnboundedReceiver<Order>,
    pub gone: mpsc::UnboundedSender<IpAddr>,
    pub reports: watch::Sender<BTreeMap<IpAddr, Held>>,
    pub metrics: Announcing,
}

/// The addresses on the interfaces.
pub struct Links {
    node: String,
    netlink: Netlink,
    lines: Lines,
    begun: bool,
    held: BTreeMap<IpAddr, Mine>,
    /// To be taken away, and not confirmed yet; as they were made.
    leaving: BTreeMap<IpAddr, Option<Placing>>,
    /// Where no data path keeps the fence, an address may live until then: milliseconds of the clock.
    deadline: u64,
    next: Instant,
    neighbours: Neighbours,
    words: mpsc::UnboundedReceiver<Word>,
    /// Since when each address is wanted.
    wanted: BTreeMap<IpAddr, Instant>,
}

/// Whether it was looked for in the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Probe {
    #[default]
    Not,
    Asked,
    Done,
}

/// One of them.
#[derive(Debug, Default)]
struct Mine {
    held: Held,
    made: Option<Made>,
    /// Not before.
    again: Option<Instant>,
    /// Since when no interface has its network.
    lost: Option<Instant>,
    probe: Probe,
    /// It came, and the neighbours do not know.
    untold: bool,
    /// Who else claims it, and until when that is shown.
    rival: Option<(String, Instant)>,
}

/// As it was made last.
#[derive(Clone, Copy, Debug)]
struct Made {
    placing: Placing,
    when: Instant,
    /// The deadline that it had, where no data path keeps the fence.
    deadline: Option<u64>,
}

impl Links {
    /// Nothing is touched yet.
    ///
    /// # Errors
    /// No netlink.
    pub fn new(node: &str, lines: Lines) -> Result<Self, NetError> {
        let (neighbours, words) = Neighbours::new(lines.metrics.clone());
        Ok(Self {
            node: node.to_owned(),
            netlink: Netlink::of_addresses()?,
            lines,
            begun: false,
            held: BTreeMap::new(),
            leaving: BTreeMap::new(),
            deadline: 0,
            next: Instant::now() + POLL,
            neighbours,
            words,
            wanted: BTreeMap::new(),
        })
    }

    /// Until the election ends. What it said last is done, too.
    pub async fn run(mut self) {
        let mut over = false;
        while !over {
            tokio::select! {
                order = self.lines.orders.recv() => match order {
                    Some(order) => self.hear(order),
                    None => over = true,
                },
                Ok(()) = self.lines.wishes.changed() => {}
                Some(word) = self.words.recv() => self.listen(word),
                changed = self.netlink.changed() => if let Err(error) = changed {
                    tracing::error!(op = "watchAddresses", %error, "the network is not seen any more");
                    return;
                },
                () = tokio::time::sleep_until(self.next.into()) => {}
            }
            while let Ok(order) = self.lines.orders.try_recv() {
                self.hear(order);
            }
            if self.begun {
                self.look().await;
            } else {
                self.next = Instant::now() + POLL;
            }
        }
    }

    fn hear(&mut self, order: Order) {
        match order {
            Order::Begin(found) => {
                self.begun = true;
                let adopted = || Mine { held: Held { adopted: true, ..Held::default() }, ..Mine::default() };
                self.held = found.into_iter().map(|ip| (ip, adopted())).collect();
            }
            Order::Hold(ip) => {
                self.leaving.remove(&ip);
                self.lines.metrics.wins.inc();
                self.held.entry(ip).or_default();
            }
            Order::Withdraw(ip) => {
                // Nothing is said for it any more before anybody may hear that it is gone.
                self.neighbours.forget(ip);
                self.lines.metrics.losses.inc();
                let mine = self.held.remove(&ip);
                self.leaving.insert(ip, mine.and_then(|mine| mine.made).map(|made| made.placing));
            }
            Order::Live(deadline) => self.deadline = deadline,
        }
    }

    fn listen(&mut self, word: Word) {
        let now = Instant::now();
        let (ip, rival) = match word {
            Word::Probed(ip, rival) => {
                self.held.get_mut(&ip).into_iter().for_each(|mine| mine.probe = Probe::Done);
                (ip, rival)
            }
            Word::Claimed(ip, rival) => (ip, Some(rival)),
        };
        let (Some(mine), Some(mac)) = (self.held.get_mut(&ip), rival) else { return };
        let mac = text(mac);
        self.lines.metrics.conflicts.inc();
        tracing::warn!(event = "addressConflict", %ip, mac, "somebody else in the network claims a local address");
        mine.rival = Some((mac, now + SHOWN));
    }

    /// Makes it so.
    async fn look(&mut self) {
        let now = Instant::now();
        self.next = now + POLL;
        let wish = Arc::clone(&self.lines.wishes.borrow_and_update());
        let mut present = match self.netlink.present().await {
            Ok(present) => present,
            Err(error) => {
                tracing::warn!(op = "listAddresses", %error, "tried again");
                self.next = now + SOON;
                return;
            }
        };
        self.take_away(&present).await;
        self.step_back(&mut present).await;
        let wants = wish.wants.iter().flat_map(BTreeMap::keys);
        self.wanted = wants.map(|ip| (*ip, self.wanted.get(ip).copied().unwrap_or(now))).collect();
        let mut there: BTreeMap<IpAddr, Vec<Present>> = BTreeMap::new();
        for one in &present {
            there.entry(one.ip).or_default().push(*one);
        }
        let neighbours: BTreeSet<(u32, IpAddr)> =
            present.iter().filter(|one| !one.ours).map(|one| (one.index, one.ip)).collect();
        let ips: Vec<IpAddr> = self.held.keys().copied().collect();
        for ip in ips {
            let there = there.get(&ip).map(Vec::as_slice).unwrap_or_default();
            self.have(ip, there, &neighbours, &wish, now).await;
        }
        self.speak(&wish, &present);
        let report: BTreeMap<_, _> = self.held.iter().map(|(ip, mine)| (*ip, mine.held.clone())).collect();
        self.lines.reports.send_if_modified(|old| {
            let differs = *old != report;
            if differs {
                *old = report;
            }
            differs
        });
    }

    /// What is ours and is not to be here. The election hears of it when it is gone, and not before.
    async fn take_away(&mut self, present: &[Present]) {
        let mut stuck = BTreeSet::new();
        for one in present.iter().filter(|one| !self.held.contains_key(&one.ip)) {
            // Whatever became of the mark, what we made there is ours.
            let made = self.leaving.get(&one.ip).copied().flatten();
            if !one.ours && made.is_none_or(|made| (made.index, made.prefix) != (one.index, one.prefix)) {
                continue;
            }
            match self.netlink.remove_local(one).await {
                Ok(()) => {
                    self.lines.metrics.withdrawals.inc();
                    tracing::info!(event = "withdrawAddress", ip = %one.ip, "local address withdrawn");
                }
                Err(error) => {
                    tracing::warn!(op = "withdrawAddress", ip = %one.ip, %error, "tried again");
                    stuck.insert(one.ip);
                    self.next = Instant::now() + SOON;
                }
            }
        }
        let (gone, lines) = (&mut self.leaving, &self.lines);
        // Nobody hears of it only when everything ends.
        gone.retain(|ip, _| stuck.contains(ip) || lines.gone.send(*ip).is_err());
    }

    /// One of ours that is before an address of the host's own is added anew, behind it.
    async fn step_back(&mut self, present: &mut Vec<Present>) {
        for one in in_front(present) {
            let Some(mine) = self.held.get_mut(&one.ip) else { continue };
            if let Err(error) = self.netlink.remove_local(&one).await {
                tracing::warn!(op = "stepBack", ip = %one.ip, %error, "tried again");
                self.next = Instant::now() + SOON;
                continue;
            }
            tracing::info!(event = "stepBack", ip = %one.ip, "it was before the host's own address");
            present.retain(|other| *other != one);
            // It was here, so nobody else had it.
            mine.probe = Probe::Done;
        }
    }

    /// Has one of them where it belongs. `there`: where it is; `neighbours`: what is on the interfaces and not ours.
    async fn have(
        &mut self,
        ip: IpAddr,
        there: &[Present],
        neighbours: &BTreeSet<(u32, IpAddr)>,
        wish: &Wish,
        now: Instant,
    ) {
        let slot = wish.wants.as_ref().and_then(|wants| wants.get(&ip)?.slot.as_ref());
        let lately = self.wanted.get(&ip).is_none_or(|since| now < *since + NEW);
        let Some(mine) = self.held.get_mut(&ip) else { return };
        // One that came without the host's own address of the network would be before it when that comes back.
        let own =
            |index: u32, net: IpNet| neighbours.iter().any(|(on, of)| *on == index && *of != ip && net.contains(of));
        let is_here = |index: u32, prefix: u8| there.iter().any(|one| (one.index, one.prefix) == (index, prefix));
        let good =
            |(link, prefix, net): &(&LocalLink, u8, IpNet)| is_here(link.index, *prefix) || own(link.index, *net);
        let Some((link, prefix, network)) = place(&wish.networks, ip).filter(good) else {
            // Its interface went, or that one's own address; the election hears of it from the keeper. Before the first wish
            // nothing is known.
            let lost = *mine.lost.get_or_insert(now);
            if wish.wants.is_some() && now >= lost + LATER {
                mine.held = Held { iface: None, fault: Some("no interface has its network".to_owned()), ..mine.held };
            }
            self.next = self.next.min(lost + LATER).max(now + SOON);
            return;
        };
        mine.lost = None;
        if let Some(again) = mine.again.filter(|again| *again > now) {
            self.next = self.next.min(again);
            return;
        }
        mine.again = None;
        let (index, name) = (link.index, &link.name);
        let fenced = wish.fenced.contains(&index);
        let deadline = (!fenced).then_some(self.deadline);
        let here = there.iter().find(|one| (one.index, one.prefix) == (index, prefix));
        if deadline == Some(0) && mine.held.adopted && mine.made.is_none() {
            // Nobody has said yet how long what was here before may live.
            return;
        }
        let fresh = mine.made.is_some_and(|made| {
            let same = (made.placing.index, made.placing.prefix) == (index, prefix) && made.deadline == deadline;
            let asked = wish.options;
            let set = made.placing.options;
            let options = if fenced { set == asked } else { set.no_prefix_route == asked.no_prefix_route };
            same && options && now < made.when + renewal(&set)
        });
        // PureLB's agent, which was here before, left no mark; and the host's only address is nobody's VIP.
        let adoptable = |one: &&Present| one.brief && slot == Some(&self.node) && own(index, network);
        let fault = match here {
            Some(one) if one.failed && one.ours => {
                (mine.again, mine.made) = (Some(now + LATE), None);
                // It says nothing for the address, so it need not go at once.
                let _ = self.netlink.remove_local(one).await;
                Some("another host of the network has it".to_owned())
            }
            Some(one) if one.ours && fresh => None,
            Some(one) if one.ours || adoptable(&one) => {
                match put(&self.netlink, ip, (index, prefix), wish.options, deadline, true).await {
                    Ok(placing) => {
                        self.lines.metrics.address_renewals.inc();
                        mine.made = Some(Made { placing, when: now, deadline });
                        None
                    }
                    Err(fault) => {
                        self.lines.metrics.address_renewal_errors.inc();
                        Some(fault)
                    }
                }
            }
            Some(_) => Some(format!("somebody else put it on {name}; it is answered for, and left there")),
            None if mine.probe == Probe::Not && slot.is_none() && lately && !wish.skip_dad.contains(&ip) => {
                mine.probe = Probe::Asked;
                self.neighbours.probe(ip, index, Probes::Three);
                return;
            }
            None if mine.probe == Probe::Asked => return,
            None => match put(&self.netlink, ip, (index, prefix), wish.options, deadline, false).await {
                Ok(placing) => {
                    self.lines.metrics.additions.inc();
                    tracing::info!(event = "announcingLocal", ip = %ip, iface = name, "local address added");
                    (mine.made, mine.untold) = (Some(Made { placing, when: now, deadline }), true);
                    // It was another's, who answers no more unless something is wrong with that: nobody waits for it.
                    if mine.probe == Probe::Not && !wish.skip_dad.contains(&ip) {
                        mine.probe = Probe::Done;
                        self.neighbours.probe(ip, index, Probes::One);
                    }
                    None
                }
                Err(fault) => {
                    mine.made = None;
                    Some(fault)
                }
            },
        };
        if fault.is_some() {
            mine.again = mine.again.or(Some(now + LATER));
        } else {
            // Where it was before.
            for one in there.iter().filter(|one| one.ours && (one.index, one.prefix) != (index, prefix)) {
                let _ = self.netlink.remove_local(one).await;
            }
        }
        let on = fault.is_none() || here.is_some_and(|one| !one.failed);
        mine.held.iface = on.then(|| name.clone());
        mine.rival = mine.rival.take().filter(|(_, until)| *until > now);
        let rival = mine.rival.as_ref().map(|(mac, _)| format!("{mac} in the network claims it too"));
        mine.held.fault = fault.or(rival);
        let renewed = mine.made.map_or(now + POLL, |made| made.when + renewal(&made.placing.options));
        self.next = self.next.min(mine.again.unwrap_or(renewed)).max(now + Duration::from_millis(5));
    }

    /// Tells the neighbours what is new here, and listens where something is.
    fn speak(&mut self, wish: &Wish, present: &[Present]) {
        let lines: Vec<_> = wish.networks.values().map(|link| line(link, present)).collect();
        let on = |mine: &Mine| mine.made.filter(|_| mine.held.iface.is_some()).map(|made| made.placing.index);
        let rights = self.held.iter().filter_map(|(ip, mine)| Some((*ip, on(mine)?))).collect();
        let moved = self.neighbours.update(Rights { on: rights, until: self.deadline }, lines, !self.held.is_empty());
        let mut new: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
        for (ip, mine) in &mut self.held {
            let Some(index) = on(mine) else { continue };
            if std::mem::take(&mut mine.untold) || moved.contains(&index) {
                new.entry(index).or_default().push(*ip);
            }
        }
        for (index, ips) in new {
            self.neighbours.tell(ips, index, wish.garp);
        }
        self.neighbours.ask();
    }
}

/// Puts it there, for no longer than the deadline allows, however long the call takes.
async fn put(
    netlink: &Netlink,
    ip: IpAddr,
    (index, prefix): (u32, u8),
    options: AddressOptions,
    deadline: Option<u64>,
    again: bool,
) -> Result<Placing, String> {
    let begin = clock::now();
    let options = match deadline {
        None => options,
        Some(deadline) => {
            let left = u32::try_from(deadline.saturating_sub(begin) / 1000).unwrap_or(u32::MAX);
            // A zero would be for ever.
            if left == 0 {
                return Err("this node's Lease gives it no time here; no data path keeps the fence".to_owned());
            }
            let valid = if options.valid == 0 { left } else { left.min(options.valid) };
            AddressOptions { valid, preferred: valid.min(options.preferred), ..options }
        }
    };
    let placing = Placing { index, prefix, options };
    match netlink.add_local(ip, &placing, again).await {
        Added::Yes if deadline.is_some() && clock::now() > begin + SLOW => {
            let one = Present { index, ip, prefix, ours: true, failed: false, brief: true, behind: false };
            let _ = netlink.remove_local(&one).await;
            Err("the kernel took too long for it".to_owned())
        }
        Added::Yes => Ok(placing),
        Added::Foreign => Err("somebody else put it there".to_owned()),
        Added::No(error) => Err(format!("the kernel does not take it: {error}")),
    }
}

fn line(link: &LocalLink, present: &[Present]) -> Line {
    let of = present.iter().filter(|one| one.index == link.index);
    let link_local = of.filter_map(|one| match one.ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some(ip),
        _ => None,
    });
    Line { index: link.index, name: link.name.clone(), mac: link.mac, link_local: link_local.min() }
}

/// Half of the life, as PureLB does.
fn renewal(options: &AddressOptions) -> Duration {
    match options.valid {
        0 => POLL * 1000,
        valid => Duration::from_secs(u64::from(valid).div_ceil(2).max(1)),
    }
}
