//! The protocol by which an address has one owner: a state machine of one node. Events with the time go in, effects come out.
//!
//! 1. *Renewal.* Our right rests on our Lease. Each write of it is bound to the version seen last; `stamp` is the time
//!    before the write was sent, and only an acknowledged one counts. Without one for 0.7 of a Lease's duration D
//!    user space withdraws, which others cannot know and need not.
//! 2. *Fence.* The data path answers until `stamp + D - margin` and not longer, whatever becomes of the process.
//! 3. *Take-over.* A Lease that did not change for D is revoked by compare-and-swap. Success proves that no renewal slipped
//!    in, so its fence has passed; its holder gets a conflict and begins anew.
//! 4. *Yield.* What a node may answer for stands in its Lease: subnets, in which its lot of PureLB's election counts, and
//!    claims, which go before them (a node with endpoints). Whoever asserts more gives that a new name, an epoch, and waits until
//!    every node that is not gone has left its mark for it. A mark says: I answer for nothing that you assert more
//!    strongly, and will not until your Lease says otherwise. Two nodes so never both hold an address, whatever each
//!    of them believes of elections. Owners leave theirs last, so that nobody waits without an owner. Asserting less needs nothing, but
//!    comes after the withdrawal.
//! 5. *Start.* A new Lease first lists all others, so of two that begin one knows the other; later ones need our
//!    mark. For D it takes nothing: the Lease of a node that still answers may have been deleted before we looked. A process
//!    that finds the Lease of its own place goes on with it, and with what is on the interface.
//!
//! A deleted Lease of another node proves nothing for D, unless it said that it was released. If our own is deleted,
//! revoked, or written by an agent elsewhere, everything is withdrawn.
//!
//! Marks, not announcing slots, are what a move waits for: a slot of a Service says nothing of who sees it late. Slots
//! are waited for where PureLB's agents, which leave no marks, have the address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::election::Lots;
use super::lease::{Lease, Statement};
use super::peers::{News, Peers};
pub use event::{Effect, Event, Found, OnApiLoss, Stop, Want, Written};

mod entry;
mod event;
mod rights;
mod write;

/// The fence ends this much before the Lease, in milliseconds: kernels' timers and clock rates that differ by 1 %.
const MARGIN: u64 = 1000;
/// Nobody waits longer for the answers of a stop, in milliseconds.
const PATIENCE: u64 = 5000;

/// Who this process is.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Node name.
    pub node: String,
    /// UID of the pod.
    pub instance: String,
    /// Boot and network namespace, which no two agents share at once (they take a lock).
    pub place: String,
    /// A name that no process had before, without `.`, `/`, `,` or spaces.
    pub session: String,
}

/// Times, all in milliseconds.
#[derive(Clone, Debug)]
pub struct Settings {
    /// D: how long a Lease runs without renewal (`PURELB_LEASE_DURATION`), at least two seconds. Renewed every fifth.
    pub duration: u64,
    /// How long it runs after a stop for an upgrade.
    pub hold: u64,
    /// What to do when no renewal is acknowledged.
    pub on_api_loss: OnApiLoss,
}

impl Default for Settings {
    fn default() -> Self {
        Self { duration: 10_000, hold: 60_000, on_api_loss: OnApiLoss::Withdraw }
    }
}

/// How far this node's own Lease is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Wants to know all Leases.
    Looking,
    /// An agent elsewhere has our name: its Lease, and since when it did not change.
    Refused(Lease, u64),
    /// The first write is under way.
    Entering,
    /// Written; now wants to know all Leases once more.
    Listing,
    /// One of the others.
    In,
    /// Stopping, since then.
    Leaving(Stop, u64),
    /// Nothing will be done any more.
    Stopped,
}

/// One node's part in the protocol.
#[derive(Clone, Debug)]
pub struct Owner {
    me: Identity,
    settings: Settings,
    phase: Phase,
    peers: Peers,
    lots: Lots,
    /// Version of our Lease; none when it is not ours.
    version: Option<u64>,
    mine: Assertion,
    /// What stood before the epoch that is not settled.
    firm: Scope,
    epochs: u64,
    /// Before the last acknowledged renewal was sent.
    stamp: Option<u64>,
    /// Our right to answer ends then; 0 without any.
    granted: u64,
    /// What the data path was told.
    fence: u64,
    /// Nothing new is taken before.
    free_from: u64,
    /// Addresses on interfaces; true: to be withdrawn.
    on_link: BTreeMap<IpAddr, bool>,
    /// Found on interfaces at the start, with the Lease that they rest on.
    inherited: BTreeSet<IpAddr>,
    /// On interfaces without any right: the fence stays down until they are gone.
    purge: BTreeSet<IpAddr>,
    wants: Option<BTreeMap<IpAddr, Want>>,
    subnets: Option<BTreeSet<IpNet>>,
    ready: bool,
    calls: write::Calls,
    /// Grows whenever something may be another than before.
    revision: u64,
    /// Addresses that found no room among the claims.
    unclaimed: usize,
    /// By then something else changes than the age of a renewal.
    changes: u64,
    due: u64,
}

/// What a node may come to answer for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Scope {
    subnets: BTreeSet<IpNet>,
    claims: BTreeSet<IpAddr>,
}

/// What our Lease asserts.
#[derive(Clone, Debug, Default)]
struct Assertion {
    scope: Scope,
    epoch: String,
    settled: bool,
    /// When the epoch was first known to be written.
    written: Option<u64>,
}

impl Owner {
    /// A process starts. `held`: addresses that are proven ours and on interfaces; `fence`: what the data path was told
    /// last.
    #[must_use]
    pub fn start(
        me: Identity,
        settings: Settings,
        held: &BTreeSet<IpAddr>,
        fence: u64,
        now: u64,
    ) -> (Self, Vec<Effect>) {
        let lots = Lots::new(&me.node);
        let mut owner = Self {
            me,
            settings,
            phase: Phase::Looking,
            peers: Peers::default(),
            lots,
            version: None,
            mine: Assertion::default(),
            firm: Scope::default(),
            epochs: 0,
            stamp: None,
            granted: 0,
            fence,
            free_from: u64::MAX,
            on_link: held.iter().map(|ip| (*ip, false)).collect(),
            inherited: held.clone(),
            purge: BTreeSet::new(),
            wants: None,
            subnets: None,
            ready: false,
            calls: write::Calls::default(),
            revision: 0,
            unclaimed: 0,
            changes: now,
            due: now,
        };
        let effects = owner.step(now, Event::Tick);
        (owner, effects)
    }

    /// Something happened at `now`: milliseconds of a clock that also runs while the machine sleeps, and that the fence
    /// is compared with.
    pub fn step(&mut self, now: u64, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        let answered = matches!(event, Event::Written(_));
        let matters = self.hear(event, now, &mut effects) || now >= self.changes;
        self.revision += u64::from(matters);
        if (matters || answered || now >= self.due) && self.phase != Phase::Stopped {
            self.look(matters, now, &mut effects);
        }
        effects
    }

    /// When the next [`Event::Tick`] is due.
    #[must_use]
    pub const fn due(&self) -> u64 {
        self.due
    }

    /// This node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.me.node
    }

    /// How far it is.
    #[must_use]
    pub const fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The addresses it answers for, as far as the fence allows.
    pub fn holds(&self) -> impl Iterator<Item = IpAddr> {
        self.on_link.iter().filter(|(_, leaving)| !**leaving).map(|(ip, _)| *ip)
    }

    /// What the data path was told.
    #[must_use]
    pub const fn fence(&self) -> u64 {
        self.fence
    }

    /// Where no data path fences: until when the kernel may be told to keep the addresses. Its timers are up to 1.5 s late.
    #[must_use]
    pub const fn kernel_deadline(&self) -> u64 {
        self.granted.saturating_sub(MARGIN)
    }

    /// Everybody yielded to what our Lease asserts.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.mine.settled
    }

    /// The networks in which it stands for election, as its Lease says.
    #[must_use]
    pub const fn subnets(&self) -> &BTreeSet<IpNet> {
        &self.mine.scope.subnets
    }

    /// The addresses that it claims, as its Lease says.
    #[must_use]
    pub const fn claims(&self) -> &BTreeSet<IpAddr> {
        &self.mine.scope.claims
    }

    /// Another one than before: something of what can be asked may be, too. That a Lease was renewed is nothing.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Addresses that this node should have for its endpoints, and that nobody has: its Lease has no room for their claims.
    #[must_use]
    pub const fn unclaimed(&self) -> usize {
        self.unclaimed
    }

    /// What is known of the others.
    #[must_use]
    pub const fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Takes in what happened; false when nothing follows from it but what time brings.
    fn hear(&mut self, event: Event, now: u64, out: &mut Vec<Effect>) -> bool {
        match event {
            Event::Tick => return false,
            Event::Observed(lease) if lease.node == self.me.node => return self.see_own(&lease, now, out),
            Event::Observed(lease) => return self.peers.observe(&lease, now) == News::Changed,
            Event::Deleted { node, version, .. } if node == self.me.node => self.lost_own(version, now, out),
            Event::Deleted { node, version, last } => {
                if let Some(last) = last {
                    self.peers.observe(&last, now);
                }
                self.peers.delete(&node, version, now);
            }
            Event::Read { node, found } => self.read(&node, &found, now, out),
            Event::Listed(list) => self.listed(list, now, out),
            Event::Written(result) => return self.written(&result, now, out),
            Event::Revoked { node, result } => self.revoked(node, &result, out),
            Event::Wants(wants) => self.wants = Some(wants),
            Event::Subnets(subnets) => self.subnets = Some(subnets),
            Event::Ready => self.ready = true,
            Event::Withdrawn(ip) if self.on_link.get(&ip) == Some(&true) => {
                self.on_link.remove(&ip);
                self.inherited.remove(&ip);
            }
            Event::Withdrawn(_) => return false,
            Event::Stop(how) => self.stop(how, now, out),
        }
        true
    }

    /// Does whatever is to be done now. A renewal alone is no reason to look at every address.
    fn look(&mut self, matters: bool, now: u64, out: &mut Vec<Effect>) {
        self.peers.pass(now);
        self.purge.retain(|ip| self.on_link.contains_key(ip));
        self.heed_silence(now, out);
        self.advance(now, out);
        if matters && matches!(self.phase, Phase::In | Phase::Listing | Phase::Entering) {
            self.tend(now, out);
        }
        self.write(now, out);
        self.raise_fence(out);
        self.changes = self.next_change(now);
        self.due = self.changes.min(self.next_write(now));
    }

    /// Rule 1: no renewal was acknowledged for too long.
    fn heed_silence(&mut self, now: u64, out: &mut Vec<Effect>) {
        if self.is_fresh(now) || self.on_link.is_empty() {
            return;
        }
        // Until its first renewal a new process has what the one before it left.
        let waits = self.stamp.is_none() && now < self.fence;
        let holds = self.settings.on_api_loss == OnApiLoss::Hold && self.granted > 0;
        if holds {
            if now.saturating_add(self.pace()) >= self.granted {
                self.granted = now.saturating_add(self.term(self.settings.duration));
            }
        } else if !waits || matches!(self.phase, Phase::Refused(..)) {
            self.withdraw_all(out);
        }
    }

    /// The last acknowledged renewal is young enough.
    fn is_fresh(&self, now: u64) -> bool {
        self.stamp.is_some_and(|stamp| now < stamp.saturating_add(self.settings.duration / 10 * 7))
    }

    fn withdraw(&mut self, ip: IpAddr, out: &mut Vec<Effect>) {
        if let Some(leaving) = self.on_link.get_mut(&ip).filter(|leaving| !**leaving) {
            *leaving = true;
            out.push(Effect::Withdraw(ip));
        }
    }

    fn withdraw_all(&mut self, out: &mut Vec<Effect>) {
        let all: Vec<_> = self.on_link.keys().copied().collect();
        all.into_iter().for_each(|ip| self.withdraw(ip, out));
    }

    /// How often our Lease is renewed.
    const fn pace(&self) -> u64 {
        self.settings.duration / 5
    }

    /// How long a renewal of a duration lets us answer.
    const fn term(&self, duration: u64) -> u64 {
        let (one, other) = (MARGIN, duration / 50);
        duration.saturating_sub(if one > other { one } else { other })
    }

    fn raise_fence(&mut self, out: &mut Vec<Effect>) {
        if self.granted > self.fence && self.purge.is_empty() {
            self.set_fence(self.granted, out);
        }
    }

    fn set_fence(&mut self, until: u64, out: &mut Vec<Effect>) {
        if self.fence != until {
            self.fence = until;
            out.push(Effect::Fence(until));
        }
    }

    /// What our Lease says now.
    fn statement(&self) -> Statement {
        write::statement(self)
    }
}
