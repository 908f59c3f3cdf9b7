//! The thread on which the protocol runs (`purelb_plan::announce::owner`). It waits for Leases and time alone: what it asks
//! of interfaces is done elsewhere and answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use purelb_plan::announce::owner::{self, Effect, Event, Identity, Owner, Phase, Stop};
use tokio::sync::{mpsc, watch};

use super::clock::Alarm;
use super::registry::{PREFIX, Registry, Seen};
use super::{Order, Settings, State, Wish, clock};
use crate::bpf::Fence;
use crate::metrics::Announcing;
use crate::net::Netlink;
use crate::net::local::subnets;

/// While the registry or the lock cannot be had it is tried again this often.
const AGAIN: Duration = Duration::from_secs(2);
/// The fence ends so much later than the last address of ours can be on an interface, in milliseconds.
const SLACK: u64 = 30_000;
/// So many odd Leases are shown.
const MOST_ODD: usize = 20;
/// How it stands is said so often at most, ...
const PACE: u64 = 100;
/// ... and looked at that often even if nothing changed, in milliseconds.
const REST: u64 = 1000;

/// What leads in and out.
pub struct Lines {
    pub wishes: watch::Receiver<Arc<Wish>>,
    pub orders: mpsc::UnboundedSender<Order>,
    pub gone: mpsc::UnboundedReceiver<IpAddr>,
    pub stops: mpsc::UnboundedReceiver<Stop>,
    pub states: watch::Sender<State>,
    pub metrics: Announcing,
}

/// Starts the thread; it ends with the keeper's end of `stops`, or when it was told to stop.
pub fn spawn(settings: Settings, lines: Lines) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let work = move || runtime.block_on(run(&settings, lines));
    std::thread::Builder::new().name("election".to_owned()).spawn(work).map(drop)
}

async fn run(settings: &Settings, mut lines: Lines) {
    let Opened { registry, _lock, me, fence, found } = loop {
        match open(settings, &mut lines).await {
            Ok(Some(opened)) => break opened,
            // The agent ends.
            Ok(None) => return,
            Err(fault) => {
                if lines.states.borrow().fault.as_ref() != Some(&fault) {
                    tracing::warn!(op = "joinElection", error = fault, "local addresses wait");
                    lines.states.send_modify(|state| state.fault = Some(fault));
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            _ = lines.stops.recv() => return,
        }
    };
    let times = owner::Settings { duration: settings.duration, hold: settings.hold, on_api_loss: settings.on_api_loss };
    let until = fence.get().map_or(0, |(until, _)| until / 1_000_000);
    let (owner, effects) = Owner::start(me, times, &found, until, clock::now());
    let _ = lines.orders.send(Order::Begin(found));
    let seen = registry.watch(Duration::from_millis(settings.duration / 2));
    let alarm = match Alarm::new() {
        Ok(alarm) => alarm,
        Err(error) => {
            tracing::error!(op = "joinElection", %error, "no timer");
            return;
        }
    };
    let (faults, said, valid) = (Faults::default(), Said::default(), lines.wishes.borrow().options.valid);
    let mut election = Election { owner, registry, fence, lines, valid, lives: 0, waits: Vec::new(), faults, said };
    election.go(effects, seen, &alarm).await;
}

/// What has to be there before it can begin.
struct Opened {
    registry: Registry,
    /// One agent in a network namespace, whatever the container or the bpf root.
    _lock: UnixListener,
    me: Identity,
    fence: Fence,
    /// Ours on interfaces, from before.
    found: BTreeSet<IpAddr>,
}

/// Waits until the node has a part in it: a network for local addresses, or one of ours from before. None when the agent
/// ends.
async fn open(settings: &Settings, lines: &mut Lines) -> Result<Option<Opened>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let name = SocketAddr::from_abstract_name("purelb-ebpf-election").map_err(|error| text(&error))?;
    let lock = UnixListener::bind_addr(&name)
        .map_err(|error| format!("another agent of this network namespace announces local addresses: {error}"))?;
    let present = Netlink::of_addresses().map_err(|error| text(&error))?.present().await;
    let present = present.map_err(|error| text(&error))?;
    let found: BTreeSet<_> = present.iter().filter(|one| one.ours).map(|one| one.ip).collect();
    while found.is_empty() && lines.wishes.borrow_and_update().networks.is_empty() {
        tokio::select! {
            changed = lines.wishes.changed() => if changed.is_err() { return Ok(None) },
            _ = lines.stops.recv() => return Ok(None),
        }
    }
    let fence = Fence::open(&settings.bpf_root).map_err(|error| text(&error))?;
    let registry = Registry::open(settings).await?;
    let random = |file: &str| fs::read_to_string(format!("/proc/sys/kernel/random/{file}"));
    let place = || -> std::io::Result<(String, String)> {
        let netns = fs::metadata("/proc/thread-self/ns/net")?.ino();
        Ok((format!("{}/{netns}", random("boot_id")?.trim()), random("uuid")?.trim().to_owned()))
    };
    let (place, session) = place().map_err(|error| text(&error))?;
    let me = Identity { node: settings.node.clone(), instance: settings.instance.clone(), place, session };
    Ok(Some(Opened { registry, _lock: lock, me, fence, found }))
}

struct Election {
    owner: Owner,
    registry: Registry,
    fence: Fence,
    lines: Lines,
    /// How long addresses live on interfaces, in seconds; 0: for ever.
    valid: u32,
    /// Until when `links` was told that addresses may live.
    lives: u64,
    /// Asked of the registry and not begun.
    waits: Vec<Effect>,
    faults: Faults,
    said: Said,
}

/// What does not work, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Faults {
    /// Reading and writing the own Lease.
    own: Option<String>,
    /// The watch.
    watch: Option<String>,
    /// Taking over from a node that is silent.
    others: BTreeMap<String, String>,
}

/// How it stood when that was said last.
#[derive(Debug, Default)]
struct Said {
    revision: u64,
    faults: Faults,
    phase: &'static str,
    at: u64,
}

impl Election {
    /// Runs until it is told to stop.
    async fn go(&mut self, effects: Vec<Effect>, mut seen: mpsc::Receiver<Seen>, alarm: &Alarm) {
        let mut calls = FuturesUnordered::new();
        let mut told = Told::default();
        let mut ends = self.carry_out(effects);
        self.told(&mut told);
        loop {
            for effect in self.waits.drain(..) {
                calls.push(self.registry.clone().call(effect).boxed());
            }
            let again = self.publish(ends);
            if ends {
                return;
            }
            let due = self.owner.due().min(again);
            ends = tokio::select! {
                biased;
                stop = self.lines.stops.recv() => match stop {
                    Some(stop) => self.step(Event::Stop(stop)),
                    None => return,
                },
                Some((event, fault)) = calls.next() => {
                    self.count(event.as_ref(), fault.is_some());
                    self.faults.note(event.as_ref(), self.owner.node(), fault);
                    event.is_some_and(|event| self.step(event))
                }
                Some(ip) = self.lines.gone.recv() => self.step(Event::Withdrawn(ip)),
                news = seen.recv() => match news {
                    Some(news) => self.see(news),
                    None => return,
                },
                Ok(()) = self.lines.wishes.changed() => self.told(&mut told),
                rang = alarm.at(due) => match rang {
                    Ok(()) => self.step(Event::Tick),
                    Err(error) => {
                        tracing::error!(op = "waitForTime", %error, "the election ends");
                        return;
                    }
                },
            };
        }
    }

    fn step(&mut self, event: Event) -> bool {
        let effects = self.owner.step(clock::now(), event);
        self.carry_out(effects)
    }

    /// Whether it is over.
    fn carry_out(&mut self, effects: Vec<Effect>) -> bool {
        let mut over = false;
        for effect in effects {
            match effect {
                Effect::Fence(until) => self.set_fence(until),
                Effect::Hold(ip) => self.order(Order::Hold(ip)),
                Effect::Withdraw(ip) => self.order(Order::Withdraw(ip)),
                Effect::Stopped => over = true,
                call => self.waits.push(call),
            }
        }
        let lives = self.owner.kernel_deadline();
        if lives != self.lives {
            self.lives = lives;
            self.order(Order::Live(lives));
        }
        over
    }

    /// Writes of Leases; reads and lists are none.
    fn count(&self, event: Option<&Event>, failed: bool) {
        if matches!(event, Some(Event::Written(_) | Event::Revoked { .. })) {
            self.lines.metrics.renewals.inc();
            if failed {
                self.lines.metrics.renewal_failures.inc();
            }
        }
    }

    fn order(&self, order: Order) {
        // Nobody is there only when the agent ends.
        let _ = self.lines.orders.send(order);
    }

    fn set_fence(&self, until: u64) {
        let nanoseconds = |milliseconds: u64| milliseconds.saturating_mul(1_000_000);
        let over = match self.valid {
            0 => u64::MAX,
            valid => nanoseconds(clock::now().max(until) + u64::from(valid) * 1000 + SLACK),
        };
        // Zero would be a fence that nobody ever set.
        if let Err(error) = self.fence.set(nanoseconds(until).max(1), over) {
            tracing::error!(op = "setFence", %error, "the fence stays as it was");
        }
    }

    /// Takes in what a watch saw. A list is not the answer to one that the protocol asked for, which began later.
    fn see(&mut self, seen: Seen) -> bool {
        let mut over = false;
        self.faults.watch = None;
        match seen {
            Seen::One(lease) => over |= self.step(Event::Observed(lease)),
            Seen::Gone(node, version, last) => over |= self.step(Event::Deleted { node, version, last }),
            Seen::All(version, leases) => {
                let listed: BTreeSet<_> = leases.iter().map(|lease| lease.node.clone()).collect();
                for lease in leases {
                    over |= self.step(Event::Observed(lease));
                }
                let known: Vec<_> = self.owner.peers().iter().map(|(node, _)| node.to_owned()).collect();
                let own = std::iter::once(self.owner.node().to_owned());
                for node in known.into_iter().chain(own).filter(|node| !listed.contains(node)) {
                    over |= self.step(Event::Deleted { node, version, last: None });
                }
            }
            Seen::Away(why) => self.faults.watch = Some(why),
        }
        over
    }

    /// What the keeper says, as far as it is new.
    fn told(&mut self, told: &mut Told) -> bool {
        let wish = Arc::clone(&self.lines.wishes.borrow_and_update());
        self.valid = wish.options.valid;
        let mut over = false;
        let networks = subnets(&wish.networks);
        if wish.wants.is_some() && told.subnets.as_ref() != Some(&networks) {
            told.subnets = Some(networks.clone());
            over |= self.step(Event::Subnets(networks));
        }
        if let Some(wants) = &wish.wants
            && told.wants.as_ref() != Some(wants)
        {
            told.wants = Some(wants.clone());
            over |= self.step(Event::Wants(wants.clone()));
        }
        if wish.ready && !told.ready {
            told.ready = true;
            over |= self.step(Event::Ready);
        }
        over
    }

    /// Says how it stands, if that may be another way than before, and when to call it again for what it kept back.
    fn publish(&mut self, ends: bool) -> u64 {
        let now = clock::now();
        let (phase, revision) = (phase(&self.owner), self.owner.revision());
        let said = &self.said;
        let news = said.revision != revision || said.faults != self.faults;
        let next = said.at.saturating_add(if news { PACE } else { REST });
        // Its phase is what others wait for.
        if !ends && phase == said.phase && now < next {
            return if news { next } else { u64::MAX };
        }
        let peers = self.owner.peers();
        self.faults.others.retain(|node, _| peers.get(node).is_some_and(|peer| peer.is_silent(now)));
        self.said = Said { revision, faults: self.faults.clone(), phase, at: now };
        let fault = match self.owner.phase() {
            Phase::Refused(..) => Some("another agent renews the Lease of this node's name".to_owned()),
            _ => self.faults.own.as_ref().or(self.faults.watch.as_ref()).cloned(),
        };
        let alive = || self.owner.peers().iter().filter(|(_, peer)| peer.is_alive(now));
        let odd = alive().filter_map(|(node, peer)| Some((node.to_owned(), peer.says().odd.clone()?)));
        let state = State {
            phase,
            subnets: self.owner.subnets().len(),
            members: alive().count() + usize::from(phase == "in"),
            purelbs: alive().filter(|(_, peer)| peer.is_purelbs()).count(),
            fault,
            odd: odd.take(MOST_ODD).collect(),
            stuck: self.faults.others.clone(),
            unclaimed: self.owner.unclaimed(),
        };
        let metrics = &self.lines.metrics;
        metrics.lease_healthy.set(i64::from(phase == "in" && now < self.owner.fence()));
        metrics.members.set(i64::try_from(state.members).unwrap_or(i64::MAX));
        metrics.local_subnets.set(i64::try_from(state.subnets).unwrap_or(i64::MAX));
        self.lines.states.send_if_modified(|old| {
            if old.phase != state.phase {
                tracing::info!(event = "electionPhase", phase, members = state.members, "election of local addresses");
            }
            if let Some(fault) = state.fault.as_ref().filter(|_| old.fault != state.fault) {
                tracing::warn!(op = "renewLease", error = fault, "the Lease of this node");
            }
            for (node, odd) in state.odd.iter().filter(|(node, odd)| old.odd.get(*node) != Some(odd)) {
                tracing::warn!(op = "readLease", lease = format!("{PREFIX}{node}"), odd, "an odd Lease");
            }
            let differs = *old != state;
            if differs {
                *old = state;
            }
            differs
        });
        u64::MAX
    }
}

impl Faults {
    /// A call was answered, well or with this fault.
    fn note(&mut self, event: Option<&Event>, own: &str, fault: Option<String>) {
        match (event, fault) {
            (Some(Event::Revoked { node, .. }), Some(fault)) => drop(self.others.insert(node.clone(), fault)),
            (Some(Event::Revoked { node, .. }), None) => drop(self.others.remove(node)),
            // After a revocation; what that said says more.
            (Some(Event::Read { node, .. }), _) if node != own => {}
            (_, fault) => self.own = fault,
        }
    }
}

fn phase(owner: &Owner) -> &'static str {
    match owner.phase() {
        Phase::Looking => "looking",
        Phase::Refused(..) => "refused",
        Phase::Entering | Phase::Listing => "entering",
        Phase::In => "in",
        Phase::Leaving(..) => "leaving",
        Phase::Stopped => "stopped",
    }
}

/// What the protocol was told last.
#[derive(Default)]
struct Told {
    wants: Option<BTreeMap<IpAddr, owner::Want>>,
    subnets: Option<BTreeSet<ipnet::IpNet>>,
    ready: bool,
}
