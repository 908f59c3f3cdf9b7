//! Addresses that sidecars hand out: what a Service asks for, what its group's sidecar answered, and what a sidecar has
//! to be told. PureLB's rules, but for this: a sidecar that is away delays nobody but Services of its own groups.
//!
//! A sidecar remembers what it gave by group and Service, and so do we:
//! ```text
//! asks of the allocator ── Allocate ──> answers ──> decide ──> ledger
//! ledger let go of it   ── Release ───> sidecar
//! a new leader          ── Hold ──────> sidecar: one that forgot must not give it to another one
//! ```
//! The ledger is what counts: an address is given back once no status names it and no write can bring it back. An answer
//! that was lost is asked for again, also when nobody wants it any more: what it names goes back. Where an allocator ends
//! before that, a further address of a Service stays with the sidecar until the Service goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::allocator::{Allocator, Estate};
use super::catalog::Catalog;
use super::claim::{Claim, annotation};
use super::ledger::Ledger;

mod call;

pub use call::{Answer, Ask, Call, Debt, Fault, What};

use call::LAST;

/// So many calls to one sidecar at once.
const AT_ONCE: usize = 8;
/// A sidecar that does not answer is tried again after so many milliseconds, twice as many each time, ...
const SOON: u64 = 1_000;
/// ... and at most so many.
const LATE: u64 = 15_000;
/// So often it is tried, for some minutes, where its group is gone too.
const PATIENCE: u32 = 20;

/// What a sidecar gave to a Service.
#[derive(Debug)]
struct Holding {
    /// Of the Service; empty: of one that is gone.
    uid: String,
    socket: String,
    ips: BTreeSet<IpAddr>,
    /// What was asked when the answer was lost: it may have given something, and that must not stay there unknown.
    doubt: Option<Ask>,
}

impl Holding {
    fn new(uid: &str, socket: &str) -> Self {
        Self { uid: uid.to_owned(), socket: socket.to_owned(), ips: BTreeSet::new(), doubt: None }
    }

    fn is_asked(&self, (service, group): &Pair, asks: &BTreeMap<String, Ask>) -> bool {
        let same = |ask: &Ask| ask.group == *group && ask.uid == self.uid;
        asks.get(service).is_some_and(|ask| same(ask) && self.doubt.as_ref().is_none_or(|doubt| doubt == ask))
    }
}

#[derive(Clone, Debug, Default)]
struct Pause {
    count: u32,
    until: u64,
}

/// A question is asked again later.
#[derive(Debug)]
struct Refused {
    ask: Ask,
    /// There was no room.
    exhausted: bool,
    pause: Pause,
}

impl Pause {
    fn longer(&mut self, now: u64, most: u64) {
        self.until = now + most.min(SOON << self.count.min(16));
        self.count += 1;
    }
}

/// The Service, the group.
type Pair = (String, String);

/// What sidecars have to be asked and told.
#[derive(Debug)]
pub struct Sidecars {
    holdings: BTreeMap<Pair, Holding>,
    answers: BTreeMap<String, Arc<Answer>>,
    /// What the sidecar of a group has to be told that it is held, before anything is asked of it.
    untold: BTreeMap<String, BTreeSet<(String, IpAddr)>>,
    /// Whose call is under way, and to which socket.
    running: BTreeMap<String, String>,
    refused: BTreeMap<Pair, Refused>,
    /// What a sidecar did not take back, and why; it is tried again later.
    kept: BTreeMap<Pair, (Pause, Fault)>,
    /// Of groups whose sidecar is away.
    outages: BTreeMap<String, (Pause, Fault)>,
    /// Before the first look debts are those of a former allocator.
    fresh: bool,
    debts: BTreeSet<Debt>,
}

impl Sidecars {
    /// Knows nothing but what a former one had to give back.
    #[must_use]
    pub fn new(inherited: Vec<Debt>) -> Self {
        Self {
            holdings: BTreeMap::new(),
            answers: BTreeMap::new(),
            untold: BTreeMap::new(),
            running: BTreeMap::new(),
            refused: BTreeMap::new(),
            kept: BTreeMap::new(),
            outages: BTreeMap::new(),
            fresh: true,
            debts: inherited.into_iter().collect(),
        }
    }

    /// By Service; for [`Estate::answers`].
    #[must_use]
    pub const fn answers(&self) -> &BTreeMap<String, Arc<Answer>> {
        &self.answers
    }

    /// What is to be given back and is not yet, or may have been given and is in no status, or will be in none once what
    /// was decided is written; as of the last look. To be written down before calls and writes begin.
    #[must_use]
    pub const fn debts(&self) -> &BTreeSet<Debt> {
        &self.debts
    }

    /// A sidecar has anything.
    #[must_use]
    pub fn are_used(&self) -> bool {
        !self.holdings.is_empty() || !self.debts.is_empty()
    }

    /// A sidecar may have something of this Service that it should not.
    #[must_use]
    pub fn owes(&self, service: &str) -> bool {
        self.holdings.keys().any(|(name, _)| name == service)
    }

    /// A Service that is gone had this, as what was written down about it says.
    pub fn owe(&mut self, debt: Debt) {
        let Debt { service, group, socket, ip } = debt;
        let new = || Holding::new("", &socket);
        self.holdings.entry((service, group)).or_insert_with(new).ips.extend(ip);
    }

    /// The calls to begin now; each ends with [`done`](Self::done). The allocator has looked at this estate, with the
    /// answers as they are, just before. `now` in milliseconds, of a clock that never goes back.
    pub fn look(&mut self, estate: &Estate, allocator: &Allocator, now: u64) -> Vec<Call> {
        self.learn(estate, allocator);
        let (ledger, asks) = (allocator.ledger(), allocator.asks());
        let (mut calls, mut back) = (Vec::new(), BTreeSet::new());
        for (call, asks) in self.owed(estate, ledger, asks) {
            let pair = (call.service.clone(), call.group.clone());
            let holding = self.holdings.get(&pair).filter(|_| !self.kept.contains_key(&pair));
            if let (What::Release(ip), Some(holding)) = (&call.what, holding) {
                let ips = holding.ips.iter().filter(|own| ip.is_none_or(|ip| ip == **own));
                back.extend(ips.map(|ip| (call.group.clone(), *ip)));
            }
            // What was answered before is not true any more.
            self.answers.remove(&call.service);
            let group = call.group.clone();
            if self.begin(call, now, &mut calls) && asks {
                // What it gave was refused: perhaps it gave what another one has.
                self.retell(&group);
            }
        }
        self.tell(estate, ledger, &back, now, &mut calls);
        self.ask(estate, asks, now, &mut calls);
        self.note_debts(estate, allocator);
        calls
    }

    /// What of a holding is in no use any more: some addresses of it, or `None` for all.
    fn idle(pair: &Pair, holding: &Holding, estate: &Estate, ledger: &Ledger, asks: bool) -> Vec<Option<IpAddr>> {
        let live = estate.services.get(&pair.0).is_some_and(|claim| claim.uid == holding.uid);
        let held = ledger.of(&pair.0).filter(|_| live);
        let (used, idle): (Vec<_>, Vec<_>) =
            holding.ips.iter().partition(|ip| held.is_some_and(|held| held.contains(*ip)));
        if used.is_empty() && !asks { vec![None] } else { idle.into_iter().copied().map(Some).collect() }
    }

    /// What should be given back, and whether its Service asks for something else.
    fn owed(&self, estate: &Estate, ledger: &Ledger, asks: &BTreeMap<String, Ask>) -> Vec<(Call, bool)> {
        let mut calls = Vec::new();
        for (pair, holding) in &self.holdings {
            let asks = holding.is_asked(pair, asks);
            let idle = Self::idle(pair, holding, estate, ledger, asks);
            // Beside what is in use only the sidecar knows what it gave.
            let doubt = holding.doubt.clone().filter(|_| !asks && !idle.contains(&None));
            for what in idle.into_iter().map(What::Release).chain(doubt.map(What::Allocate)) {
                let ((service, group), socket) = (pair.clone(), holding.socket.clone());
                calls.push((Call { service, group, socket, what }, asks));
            }
        }
        calls
    }

    fn note_debts(&mut self, estate: &Estate, allocator: &Allocator) {
        self.debts.clear();
        for (pair, holding) in &self.holdings {
            let asks = holding.is_asked(pair, allocator.asks());
            let mut idle = Self::idle(pair, holding, estate, allocator.ledger(), asks);
            let named: &[IpAddr] = estate.services.get(&pair.0).map_or(&[], |claim| &claim.ingress);
            let soon = allocator.unwritten().get(&pair.0).map(|decision| &decision.ingress);
            let is_sure = |ip: &IpAddr| named.contains(ip) && soon.is_none_or(|soon| soon.contains(ip));
            if holding.ips.iter().any(|ip| named.contains(ip)) {
                idle.extend(holding.ips.iter().filter(|ip| !is_sure(ip)).map(|ip| Some(*ip)));
            } else {
                idle = std::iter::once(None).chain(holding.ips.iter().copied().map(Some)).collect();
            }
            let debt = |ip| Debt { service: pair.0.clone(), group: pair.1.clone(), socket: holding.socket.clone(), ip };
            self.debts.extend(idle.into_iter().map(debt));
        }
    }

    /// Its sidecar has to hear again what is held.
    fn retell(&mut self, group: &str) {
        let own = self.holdings.iter().filter(|((_, of), _)| of == group);
        let held = own.flat_map(|((service, _), holding)| holding.ips.iter().map(|ip| (service.clone(), *ip)));
        self.untold.insert(group.to_owned(), held.collect());
    }

    /// Whether the sidecar of a group answers, and whether that is news.
    fn heard(&mut self, group: &str, fault: Option<&Fault>, now: u64) -> bool {
        let Some(fault) = fault.filter(|fault| fault.is_outage()) else {
            return self.outages.remove(group).is_some();
        };
        let is_new = !self.outages.contains_key(group);
        if fault.is_break() && !self.outages.get(group).is_some_and(|(_, last)| last.is_break()) {
            self.retell(group);
        }
        let (pause, last) = self.outages.entry(group.to_owned()).or_insert((Pause::default(), fault.clone()));
        // Of those that were under way together the first one counts.
        if pause.until <= now {
            pause.longer(now, LATE);
            *last = fault.clone();
        }
        is_new
    }

    /// A call ended. Whether its sidecar went away, or came back, just then.
    pub fn done(&mut self, call: &Call, result: Result<Vec<IpAddr>, Fault>, now: u64) -> bool {
        self.running.remove(&call.service);
        let news = self.heard(&call.group, result.as_ref().err(), now);
        let pair = (call.service.clone(), call.group.clone());
        match (&call.what, result) {
            (What::Allocate(ask), result) => {
                let fault = result.as_ref().err();
                if let Some(holding) = self.holdings.get_mut(&pair) {
                    holding.ips.extend(result.iter().flatten());
                    holding.doubt = fault.filter(|fault| fault.is_doubtful()).map(|_| ask.clone());
                }
                if !fault.is_some_and(Fault::is_outage) {
                    // Also a good answer may be refused, here.
                    let new = || Refused { ask: ask.clone(), exhausted: false, pause: Pause::default() };
                    let refused = self.refused.entry(pair).or_insert_with(new);
                    refused.exhausted = fault.is_some_and(|fault| fault.code == "ResourceExhausted");
                    refused.pause.longer(now, fault.map_or(LAST, Fault::longest));
                }
                let answer = Answer { ask: ask.clone(), result };
                self.answers.insert(call.service.clone(), Arc::new(answer));
            }
            (What::Hold { .. } | What::Release(_), Err(fault)) if fault.is_outage() => {}
            // It knows, or it never will.
            (What::Hold { ip, .. }, _) => {
                if let Some(untold) = self.untold.get_mut(&call.group) {
                    untold.remove(&(call.service.clone(), *ip));
                }
            }
            (What::Release(_), Err(fault)) if fault.code != "NotFound" => {
                let (pause, last) = self.kept.entry(pair).or_insert_with(|| (Pause::default(), fault.clone()));
                pause.longer(now, fault.longest());
                *last = fault;
            }
            (What::Release(ip), _) => {
                // There is room.
                self.refused.retain(|(_, group), refused| *group != call.group || !refused.exhausted);
                self.kept.remove(&pair);
                match (ip, self.holdings.get_mut(&pair)) {
                    (Some(ip), Some(holding)) => drop(holding.ips.remove(ip)),
                    _ => drop(self.holdings.remove(&pair)),
                }
            }
        }
        news
    }

    /// What statuses say that sidecars gave, and what became of what was asked.
    fn learn(&mut self, estate: &Estate, allocator: &Allocator) {
        let catalog = &estate.catalog;
        let mut moved = BTreeSet::new();
        for ((_, group), holding) in &mut self.holdings {
            let external = catalog.get(group).and_then(|group| group.external.as_ref());
            if let Some(external) = external.filter(|external| external.socket != holding.socket) {
                holding.socket.clone_from(&external.socket);
                moved.insert(group.clone());
            }
        }
        for group in moved {
            self.outages.remove(&group);
            self.retell(&group);
        }
        if catalog.groups().any(|group| group.external.is_some()) {
            for (name, claim) in estate.services.iter().filter(|(_, claim)| allocator.is_mine(claim)) {
                self.learn_of(name, claim, catalog, allocator.ledger());
            }
        }
        self.inherit(estate, allocator.ledger());
        let services = &estate.services;
        self.answers.retain(|name, answer| {
            let claim = services.get(name).filter(|claim| claim.uid == answer.ask.uid);
            let written = |ips: &Vec<IpAddr>, claim: &Claim| ips.iter().all(|ip| claim.ingress.contains(ip));
            let asked = allocator.asks().contains_key(name);
            claim.is_some_and(|claim| asked || answer.result.as_ref().is_ok_and(|ips| !written(ips, claim)))
        });
        let outages = &self.outages;
        let is_over = |group: &String| outages.get(group).is_some_and(|(pause, _)| pause.count >= PATIENCE);
        self.holdings.retain(|(_, group), _| catalog.get(group).is_some() || !is_over(group));
        let holdings = &self.holdings;
        let doubt = |pair: &Pair| holdings.get(pair).and_then(|holding| holding.doubt.as_ref());
        self.refused.retain(|pair, Refused { ask, .. }| {
            let asked = allocator.asks().get(&pair.0);
            asked == Some(ask) || doubt(pair) == Some(ask)
        });
        self.kept.retain(|pair, _| holdings.contains_key(pair));
        self.outages.retain(|group, _| catalog.get(group).is_some() || holdings.keys().any(|pair| pair.1 == *group));
    }

    fn inherit(&mut self, estate: &Estate, ledger: &Ledger) {
        if !std::mem::take(&mut self.fresh) {
            return;
        }
        let mut debts: BTreeMap<Pair, Vec<Debt>> = BTreeMap::new();
        for debt in std::mem::take(&mut self.debts) {
            debts.entry((debt.service.clone(), debt.group.clone())).or_default().push(debt);
        }
        for (pair, debts) in debts {
            let ips: BTreeSet<_> = debts.iter().filter_map(|debt| debt.ip).collect();
            let held = ledger.of(&pair.0).is_some_and(|held| !held.is_disjoint(&ips));
            let claim = estate.services.get(&pair.0).filter(|_| held || self.holdings.contains_key(&pair));
            match (claim, debts.into_iter().next()) {
                // By now it has been given again, or a grant of the former one may still come true.
                (Some(claim), Some(Debt { socket, .. })) => {
                    let new = || Holding::new(&claim.uid, &socket);
                    self.holdings.entry(pair).or_insert_with(new).ips.extend(ips);
                }
                (None, Some(debt)) => self.owe(debt),
                (_, None) => {}
            }
        }
    }

    fn learn_of(&mut self, name: &str, claim: &Claim, catalog: &Catalog, ledger: &Ledger) {
        let first = self.fresh;
        for (group, socket) in groups_of(claim, catalog) {
            let ips: BTreeSet<_> = claim.ingress.iter().copied().filter(|ip| catalog.of(*ip).is_none()).collect();
            let pair = (name.to_owned(), group.to_owned());
            if ips.is_empty() && !first {
                continue;
            }
            let held = ledger.of(name).into_iter().flatten().copied().filter(|ip| catalog.of(*ip).is_none());
            let held: BTreeSet<_> = held.filter(|_| ips.is_empty()).collect();
            if ips.is_empty() && held.is_empty() {
                // Whatever it had was perhaps not given back before the end of a former allocator.
                self.holdings.insert(pair, Holding::new("", socket));
                continue;
            }
            let new = || Holding::new(&claim.uid, socket);
            let holding = self.holdings.entry(pair).or_insert_with(new);
            if holding.uid == claim.uid {
                // Did the sidecar give it? Not to us.
                let told: Vec<_> = ips.difference(&holding.ips).map(|ip| (name.to_owned(), *ip)).collect();
                if !told.is_empty() {
                    self.untold.entry(group.to_owned()).or_default().extend(told);
                }
                // Where no status names it a grant may still come true.
                holding.ips.extend(ips.into_iter().chain(held));
            }
        }
    }

    /// Sidecars that may not know what is held. What is on its `back` way is another one's to them until it arrives.
    fn tell(
        &mut self,
        estate: &Estate,
        ledger: &Ledger,
        back: &BTreeSet<(String, IpAddr)>,
        now: u64,
        calls: &mut Vec<Call>,
    ) {
        self.untold.retain(|_, told| {
            told.retain(|(service, ip)| ledger.of(service).is_some_and(|held| held.contains(ip)));
            !told.is_empty()
        });
        for (group, told) in self.untold.clone() {
            let Some(external) = estate.catalog.get(&group).and_then(|group| group.external.as_ref()) else {
                self.untold.remove(&group);
                continue;
            };
            for (service, ip) in told.into_iter().filter(|(_, ip)| !back.contains(&(group.clone(), *ip))) {
                let key = estate.services.get(&service).and_then(|claim| claim.usage().key);
                let (group, socket) = (group.clone(), external.socket.clone());
                self.begin(Call { service, group, socket, what: What::Hold { ip, key } }, now, calls);
            }
        }
    }

    fn ask(&mut self, estate: &Estate, asks: &BTreeMap<String, Ask>, now: u64, calls: &mut Vec<Call>) {
        for (service, ask) in asks {
            let Some(external) = estate.catalog.get(&ask.group).and_then(|group| group.external.as_ref()) else {
                continue;
            };
            let pair = (service.clone(), ask.group.clone());
            let answered = self.answers.get(service).is_some_and(|answer| answer.ask == *ask);
            if let Some((_, fault)) = self.outages.get(&ask.group).filter(|_| !answered) {
                let answer = Answer { ask: ask.clone(), result: Err(fault.clone()) };
                self.answers.insert(service.clone(), Arc::new(answer));
            }
            // What was another Service's by this name goes first.
            let others = self.holdings.get(&pair).is_some_and(|holding| !holding.is_asked(&pair, asks));
            if let Some((_, fault)) = self.kept.get(&pair).filter(|_| others) {
                let message = format!("does not take back what was given before: {}", fault.message);
                let answer = Answer { ask: ask.clone(), result: Err(Fault { message, ..fault.clone() }) };
                self.answers.insert(service.clone(), Arc::new(answer));
            }
            if others || self.untold.contains_key(&ask.group) {
                continue;
            }
            let (group, socket) = (ask.group.clone(), external.socket.clone());
            let call = Call { service: service.clone(), group, socket, what: What::Allocate(ask.clone()) };
            if self.begin(call, now, calls) {
                self.holdings.entry(pair).or_insert_with(|| Holding::new(&ask.uid, &external.socket));
            }
        }
    }

    /// Whether it begins now: one call at a time for a Service, and none to a sidecar that has to rest.
    fn begin(&mut self, call: Call, now: u64, calls: &mut Vec<Call>) -> bool {
        let rests = self.outages.get(&call.group).is_some_and(|(pause, _)| pause.until > now);
        let pair = (call.service.clone(), call.group.clone());
        let pause = match call.what {
            What::Allocate(_) => self.refused.get(&pair).map(|refused| &refused.pause),
            What::Hold { .. } => None,
            What::Release(_) => self.kept.get(&pair).map(|(pause, _)| pause),
        };
        let waits = pause.is_some_and(|pause| pause.until > now);
        let busy = self.running.values().filter(|socket| **socket == call.socket).count() >= AT_ONCE;
        if rests || waits || busy || self.running.contains_key(&call.service) {
            return false;
        }
        self.running.insert(call.service.clone(), call.socket.clone());
        calls.push(call);
        true
    }
}

/// External groups that a Service has addresses of, and the sockets of their sidecars.
fn groups_of<'a>(claim: &'a Claim, catalog: &'a Catalog) -> impl Iterator<Item = (&'a str, &'a str)> {
    let names = claim.annotation(annotation::ALLOCATED_FROM).unwrap_or_default().split(", ");
    names.filter_map(|name| Some((name, catalog.get(name)?.external.as_ref()?.socket.as_str())))
}
