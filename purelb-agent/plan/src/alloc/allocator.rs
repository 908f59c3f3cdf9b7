//! The allocator's memory: who holds what, and whose decision is not settled. All of that follows from the objects, so one
//! that begins anew comes to the same; what rests it has to be told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::catalog::Catalog;
use super::claim::{Claim, Decision};
use super::decide::{Scene, decide, let_go};
use super::external::{Answer, Ask};
use super::ledger::{Ledger, Use};

/// Which Services are ours, and how long a moved address rests.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `loadBalancerClass` that is ours.
    pub class: String,
    /// Services without a class are ours too.
    pub default_announcer: bool,
    /// Milliseconds in which a moved address is only given when there is no other: a node that is cut off may still
    /// announce it.
    pub cool_down: u64,
}

/// What the allocator looks at.
#[derive(Clone, Debug, Default)]
pub struct Estate {
    /// By `namespace/name`. The same `Arc` again means that nothing changed.
    pub services: BTreeMap<String, Arc<Claim>>,
    /// The groups; likewise.
    pub catalog: Arc<Catalog>,
    /// Networks of nodes that are alive.
    pub subnets: BTreeSet<IpNet>,
    /// What sidecars answered, by Service; likewise.
    pub answers: BTreeMap<String, Arc<Answer>>,
}

/// Hands out addresses.
#[derive(Debug)]
pub struct Allocator {
    settings: Settings,
    ledger: Ledger,
    seen: Estate,
    /// Grants of another allocator, whose writes may be under way: by Service its uid and the addresses.
    inherited: BTreeMap<String, (String, BTreeSet<IpAddr>)>,
    /// Who has not all that it asks for.
    pending: BTreeSet<String>,
    /// Who waits for a sidecar, and what for.
    asks: BTreeMap<String, Ask>,
    /// Whose decision is not written yet, as far as its object says.
    unwritten: BTreeMap<String, Decision>,
    /// Whose writes may be under way: an earlier decision may still come true.
    open: BTreeSet<String>,
    /// Whose writes failed since the last look.
    failed: BTreeSet<String>,
}

impl Allocator {
    /// Knows nothing but the grants that another one wrote down before it wrote them to their Services.
    #[must_use]
    pub fn new(settings: Settings, inherited: BTreeMap<String, (String, BTreeSet<IpAddr>)>) -> Self {
        Self {
            settings,
            ledger: Ledger::default(),
            seen: Estate::default(),
            open: inherited.keys().cloned().collect(),
            failed: BTreeSet::new(),
            inherited,
            pending: BTreeSet::new(),
            asks: BTreeMap::new(),
            unwritten: BTreeMap::new(),
        }
    }

    /// Addresses that another one let go of rest for so many milliseconds from now on, if nobody has them, and never longer
    /// than those that it lets go of itself.
    pub fn rest(&mut self, resting: impl IntoIterator<Item = (IpAddr, u64)>, now: u64) {
        for (ip, rest) in resting {
            self.ledger.cool(ip, now.saturating_add(rest.min(self.settings.cool_down)));
        }
    }

    /// What is only given when there is no other, and for how many milliseconds still.
    pub fn resting(&self, now: u64) -> impl Iterator<Item = (IpAddr, u64)> {
        let cooling = self.ledger.cooling().iter().filter(move |(_, until)| **until > now);
        cooling.map(move |(ip, until)| (*ip, until.saturating_sub(now)))
    }

    /// Who holds what.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Who has not all that it asks for.
    #[must_use]
    pub const fn pending(&self) -> &BTreeSet<String> {
        &self.pending
    }

    /// What the last look decided and no object shows yet.
    #[must_use]
    pub const fn unwritten(&self) -> &BTreeMap<String, Decision> {
        &self.unwritten
    }

    /// Who waits for a sidecar, and what for.
    #[must_use]
    pub const fn asks(&self) -> &BTreeMap<String, Ask> {
        &self.asks
    }

    /// It asks us for addresses, or bears our marks.
    #[must_use]
    pub fn is_mine(&self, claim: &Claim) -> bool {
        match (&claim.class, claim.load_balancer) {
            // The class goes with the type, so the marks alone tell whose it was.
            (_, false) => claim.is_ours(),
            (Some(class), true) => *class == self.settings.class,
            (None, true) => self.settings.default_announcer,
        }
    }

    /// No write to this version of the Service can come true any more, also none that another allocator began. Not for
    /// one that did: the object says so itself, and until it is seen its addresses must stay in use.
    pub fn failed(&mut self, name: &str) {
        self.inherited.remove(name);
        if self.open.remove(name) {
            self.failed.insert(name.to_owned());
        }
    }

    /// Everything that should be written and is not yet, by Service, to be written under the condition that the object
    /// is the version that was looked at. `now` in milliseconds, of a clock that never goes
    /// back.
    pub fn look(&mut self, estate: &Estate, now: u64) -> &BTreeMap<String, Decision> {
        self.ledger.pass(now);
        // What is let go of in this look.
        let until = now.saturating_add(self.settings.cool_down);
        let mut moved = false;
        let seen = std::mem::replace(&mut self.seen, estate.clone());
        let is_new = |(name, claim): &(&String, &Arc<Claim>)| {
            !seen.services.get(*name).is_some_and(|old| Arc::ptr_eq(old, claim))
        };
        let changed: BTreeSet<&String> = estate.services.iter().filter(is_new).map(|(name, _)| name).collect();
        for name in seen.services.keys().filter(|name| !estate.services.contains_key(*name)) {
            moved |= self.forget(name, until);
        }
        // What stands in a status is in use, whoever put it there, before anything is given.
        for name in &changed {
            if let Some(claim) = estate.services.get(*name) {
                moved |= self.note(name, claim, seen.services.get(*name), until);
            }
        }
        let rules_changed = !Arc::ptr_eq(&seen.catalog, &estate.catalog) || seen.subnets != estate.subnets;
        let mut due = std::mem::take(&mut self.failed);
        due.extend(changed.iter().map(|name| (*name).clone()));
        if rules_changed {
            due.extend(estate.services.keys().cloned());
        }
        let answers = seen.answers.keys().chain(estate.answers.keys());
        due.extend(answers.filter(|name| seen.answers.get(*name) != estate.answers.get(*name)).cloned());
        // What the first round gives or lets go of may change the answer for those that wait.
        for _ in 0..2 {
            if moved {
                due.extend(self.pending.iter().cloned());
            }
            moved = false;
            let mut order: Vec<_> = due.iter().filter_map(|name| estate.services.get_key_value(name)).collect();
            order.sort_by_key(|(name, claim)| (&claim.created, *name));
            for (name, claim) in order {
                let open = self.open.contains(name) && !changed.contains(name);
                moved |= self.settle(name, claim, estate, open, until);
            }
            due.clear();
        }
        self.inherited.clear();
        self.open.extend(self.unwritten.keys().cloned());
        &self.unwritten
    }

    fn forget(&mut self, name: &str, until: u64) -> bool {
        self.pending.remove(name);
        self.asks.remove(name);
        self.unwritten.remove(name);
        self.open.remove(name);
        self.ledger.hold(name, &BTreeSet::new(), &Use::default(), until)
    }

    /// A Service that is other than before holds what its status says, and what was granted to it: that write may have
    /// been lost, and then the same is granted again.
    fn note(&mut self, name: &str, claim: &Claim, old: Option<&Arc<Claim>>, until: u64) -> bool {
        let same = old.is_some_and(|old| old.uid == claim.uid);
        let moved = !same && old.is_some() && self.forget(name, until);
        let mut ips: BTreeSet<IpAddr> = claim.ingress.iter().copied().collect();
        if claim.load_balancer {
            ips.extend(self.ledger.of(name).into_iter().flatten());
            ips.extend(self.inherited(name, claim).into_iter().flatten());
        }
        self.ledger.hold(name, &ips, &claim.usage(), until) | moved
    }

    fn inherited(&self, name: &str, claim: &Claim) -> Option<&BTreeSet<IpAddr>> {
        self.inherited.get(name).filter(|(uid, _)| *uid == claim.uid).map(|(_, ips)| ips)
    }

    /// Decides. `open`: the object is the version that earlier writes are bound to, so what they grant stays in use.
    fn settle(&mut self, name: &str, claim: &Arc<Claim>, estate: &Estate, open: bool, until: u64) -> bool {
        let decision = match (self.is_mine(claim), claim.load_balancer) {
            (true, true) if !claim.unready => {
                let answer = estate.answers.get(name).map(|answer| &**answer);
                let (catalog, subnets) = (&estate.catalog, &estate.subnets);
                Some(decide(name, claim, Scene { catalog, ledger: &self.ledger, subnets, answer }))
            }
            (true, false) => Some(let_go(claim)),
            _ => None,
        };
        self.pending.remove(name);
        self.asks.remove(name);
        self.unwritten.remove(name);
        // As long as its status names an address it may be announced.
        let mut ips: BTreeSet<IpAddr> = claim.ingress.iter().copied().collect();
        if open {
            ips.extend(self.ledger.of(name).into_iter().flatten());
        }
        ips.extend(self.inherited(name, claim).into_iter().flatten());
        if let Some(decision) = decision {
            ips.extend(&decision.ingress);
            if decision.refusal.is_some() || decision.partial {
                self.pending.insert(name.to_owned());
            }
            if let Some(ask) = &decision.ask {
                self.asks.insert(name.to_owned(), ask.clone());
            }
            if decision.changes(claim) {
                self.unwritten.insert(name.to_owned(), decision);
            }
        }
        self.ledger.hold(name, &ips, &claim.usage(), until)
    }
}
