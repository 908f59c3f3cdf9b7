//! On Kubernetes: whoever holds the Lease gives addresses. What it is about to give it writes down there first, then
//! it writes each Service under the condition that it is still the version that was decided about.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kube::Client;
use purelb_plan::alloc::allocator::{Allocator, Settings};
use purelb_plan::alloc::claim::{Claim, Decision};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::groups::Groups;
use super::networks::Networks;
use super::sidecars::Sidecars;
use super::{Figures, tell};
use crate::cluster::journal::{Grant, Grants, Journal};
use crate::cluster::lease::{Candidate, DURATION, LeaseError, PACE, Term};
use crate::cluster::store::Store;
use crate::cluster::watch::{Feed, of_allocator};
use crate::cluster::write::{self, Events, MANAGER, Outcome};
use crate::source::claim::Home;
use crate::source::estate::Register;
use crate::source::parse::Kind;

/// So many writes at once...
const AT_ONCE: usize = 32;
/// ... of so many that were written down together.
const BATCH: usize = 256;
/// So many addresses are written down at most, unless it is one Service's alone: a Lease has room for 256 KiB.
const ADDRESSES: usize = 2_000;
/// A write that was refused, or whose fate is not known, is tried again after so long, ...
const SOON: Duration = Duration::from_secs(1);
/// ... and later each time.
const LATE: Duration = Duration::from_secs(60);
/// What is under way at the end is waited for so long.
const LAST: Duration = Duration::from_secs(5);

/// Where and as whom.
#[derive(Clone)]
pub struct Office {
    /// The API.
    pub client: Client,
    /// Of the Lease.
    pub namespace: String,
    /// The only namespace whose ServiceGroups count, where it is known.
    pub install: Option<String>,
    /// This process's alone.
    pub identity: String,
    /// Whose addresses, and how.
    pub settings: Settings,
}

/// Why a term ended.
enum End {
    Stopped,
    Lost(LeaseError),
}

/// Stands for leader and allocates until `stop` says true; then it finishes what is under way and lets go of the Lease.
pub async fn run(office: Office, mut figures: Figures, mut stop: watch::Receiver<bool>) {
    if office.install.is_none() {
        tracing::warn!(event = "installNamespaceUnknown", "ServiceGroups of all namespaces count: see --namespace");
    }
    let candidate = Candidate::new(office.client.clone(), &office.namespace, office.identity.clone());
    // What it had written down itself: a Lease that was deleted or spoilt since ends no write.
    let (mut own, mut led) = ((Journal::default(), Instant::now()), false);
    loop {
        // Standing by is being ready.
        figures.ready.store(true, Ordering::Relaxed);
        let mut term = tokio::select! {
            term = candidate.lead() => term,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        figures.ready.store(false, Ordering::Relaxed);
        let mut inherited = std::mem::take(&mut term.inherited);
        inherit(&mut inherited, own.0.aged(own.1.elapsed()));
        let mut desk = Desk::new(&office, figures, inherited);
        desk.unproven = term.unproven && !led;
        led = true;
        let end = desk.work(&mut term, &mut stop).await;
        own = (desk.journal(), Instant::now());
        figures = desk.figures;
        match end {
            End::Stopped => return term.release(&own.0).await,
            End::Lost(error) => tracing::warn!(event = "leaseLost", %error, "no longer leading"),
        }
    }
}

/// Beside what the Lease says. Of two grants about one version either may come true.
fn inherit(inherited: &mut Journal, own: Journal) {
    inherited.debts.extend(own.debts);
    for (ip, rest) in own.resting {
        let known = inherited.resting.entry(ip).or_default();
        *known = rest.max(*known);
    }
    let inherited = &mut inherited.grants;
    for (name, grant) in own.grants {
        match inherited.get_mut(&name) {
            Some(known) if known.uid == grant.uid && known.version == grant.version => known.ips.extend(grant.ips),
            Some(_) => {}
            None => drop(inherited.insert(name, grant)),
        }
    }
}

/// A write, from its decision until the object shows that it is over.
struct Write {
    claim: Arc<Claim>,
    version: String,
    decision: Decision,
    grant: Option<Grant>,
    stage: Stage,
}

#[derive(PartialEq, Eq)]
enum Stage {
    /// Written down, not begun.
    Waiting,
    UnderWay,
    /// The watch has not shown it yet.
    Done,
    /// Nobody knows; begun again then.
    Unclear(Instant),
}

/// Writes of a Service that failed.
struct Failure {
    /// Which it was then: another one is no failure yet.
    version: String,
    count: u32,
    /// It is tried again then.
    until: Instant,
}

struct Desk {
    office: Office,
    figures: Figures,
    events: Events,
    store: Store,
    register: Register,
    networks: Networks,
    /// From the first list on.
    allocator: Option<Allocator>,
    inherited: Grants,
    /// What the former leader let go of lately: until the first list.
    resting: BTreeMap<IpAddr, u64>,
    sidecars: Sidecars,
    writes: BTreeMap<String, Write>,
    running: JoinSet<(String, Outcome)>,
    failures: BTreeMap<String, Failure>,
    groups: Groups,
    /// There may be something to decide.
    due: bool,
    /// More was decided than is written at once.
    more: bool,
    /// There was no Lease. Where addresses were given before, somebody deleted it, and a leader that nobody knows of may
    /// have writes under way.
    unproven: bool,
    /// Nothing is given before.
    rests: Instant,
    started: Instant,
}

impl Desk {
    fn new(office: &Office, figures: Figures, inherited: Journal) -> Self {
        let sidecars = Sidecars::new(inherited.debts, figures.rpcs.clone());
        let events = Events::new(office.client.clone(), MANAGER, &office.identity);
        Self {
            office: office.clone(),
            figures,
            groups: Groups::new(office.client.clone(), events.clone()),
            events,
            store: Store::new(&of_allocator(&office.namespace)),
            register: Register::default(),
            networks: Networks::default(),
            allocator: None,
            inherited: inherited.grants,
            resting: inherited.resting,
            sidecars,
            writes: BTreeMap::new(),
            running: JoinSet::new(),
            failures: BTreeMap::new(),
            due: false,
            more: false,
            unproven: false,
            rests: Instant::now(),
            started: Instant::now(),
        }
    }

    async fn work(&mut self, term: &mut Term, stop: &mut watch::Receiver<bool>) -> End {
        // Watches that begin now list what is there now: nothing is given before that.
        let mut feed = Feed::new(&self.office.client, &of_allocator(&self.office.namespace));
        let mut beat = tokio::time::interval(PACE);
        loop {
            let renew = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => {
                    self.finish().await;
                    return End::Stopped;
                }
                _ = beat.tick() => {
                    // What time changes: writes that are tried again, and what is asked of sidecars.
                    let now = Instant::now();
                    self.due |= self.sidecars.are_used() || self.failures.values().any(|failure| failure.until <= now);
                    true
                }
                mut news = feed.next() => {
                    feed.burst(&mut news).await;
                    let now = Instant::now();
                    news.into_iter().for_each(|news| self.store.take(news, now));
                    false
                }
                Some(done) = self.running.join_next(), if !self.running.is_empty() => {
                    self.ended(done);
                    false
                }
                done = self.sidecars.next() => {
                    self.sidecars.take(done, self.clock());
                    self.due = true;
                    false
                }
            };
            self.read();
            let granted = self.decide();
            if renew || granted || !self.sidecars.is_written_down() {
                let journal = self.journal();
                match term.renew(&journal).await {
                    Ok(()) => self.written_down(journal),
                    Err(error @ LeaseError::Lost(_)) => return End::Lost(error),
                    Err(error @ LeaseError::Away(_)) if term.is_sure() => {
                        tracing::debug!(op = "renewLease", %error, "not renewed")
                    }
                    Err(error @ LeaseError::Away(_)) => return End::Lost(error),
                }
            }
            if !term.is_sure() {
                return End::Lost(LeaseError::Away("too long ago".to_owned()));
            }
            self.begin();
            if renew && let Some(allocator) = &self.allocator {
                let metrics = &mut self.figures.metrics;
                let figures = self.sidecars.figures();
                self.groups.look(&self.store, &self.register, (allocator.ledger(), figures), metrics);
                metrics.pools(&self.register.estate.catalog, allocator.ledger(), figures);
            }
        }
    }

    /// Takes in what changed.
    fn read(&mut self) {
        let changed = self.store.changed();
        // Nodes renew their Leases all the time.
        self.due |= changed.iter().any(|key| key.0 != Kind::Lease);
        if changed.iter().any(|key| key.0 == Kind::ServiceGroup) {
            self.register.read_groups(&self.store, self.office.install.as_deref());
            let (catalog, groups) = (&self.register.estate.catalog, &self.register.groups);
            if self.office.install.is_some() && !groups.is_empty() && groups.keys().all(|key| self.is_outside(key)) {
                tracing::warn!(event = "installNamespaceSuspect", "no ServiceGroup is in our namespace: all count");
            }
            tracing::debug!(event = "configUpdated", groups = catalog.groups().count(), "ServiceGroups were read");
        }
        for (_, name) in changed.iter().filter(|key| key.0 == Kind::Service) {
            self.register.read_service(&self.store, name, Home::Cluster, false);
        }
        for (_, name) in changed.iter().filter(|key| key.0 == Kind::Lease) {
            self.networks.read(&self.store, name);
        }
        let subnets = self.networks.alive(Instant::now());
        self.due |= subnets != self.register.estate.subnets;
        self.register.estate.subnets = subnets;
        if !self.store.is_listed(Instant::now()) {
            return;
        }
        let is = |name: &str, version: &str| {
            self.store.version(&(Kind::Service, name.to_owned())).is_some_and(|now| now == version)
        };
        // The writes of a former leader are bound to versions too.
        self.inherited.retain(|name, grant| is(name, &grant.version));
        let before = self.writes.len() + self.failures.len();
        // What became of one that is under way is told by its answer, also when the watch was faster.
        self.writes.retain(|name, write| write.stage == Stage::UnderWay || is(name, &write.version));
        self.failures.retain(|name, failure| is(name, &failure.version));
        // The new version may be the same to us, and what was decided about the old one is still to be written.
        self.due |= self.writes.len() + self.failures.len() < before;
        if self.allocator.is_none() {
            let inherited =
                self.inherited.iter().map(|(name, grant)| (name.clone(), (grant.uid.clone(), grant.ips.clone())));
            let mut allocator = Allocator::new(self.office.settings.clone(), inherited.collect());
            allocator.rest(std::mem::take(&mut self.resting), self.clock());
            self.allocator = Some(allocator);
            self.figures.ready.store(true, Ordering::Relaxed);
            if self.unproven && self.register.estate.services.values().any(|claim| claim.is_branded()) {
                tracing::info!(
                    event = "leaseUnproven",
                    "addresses were given before, and there was no Lease: nothing is given for {DURATION:?}"
                );
                self.rests = Instant::now() + DURATION;
            }
            tracing::info!(event = "stateSynced", services = self.register.estate.services.len(), "allocating");
        }
    }

    fn is_outside(&self, (namespace, _): &(String, String)) -> bool {
        self.office.install.as_ref().is_some_and(|install| install != namespace)
    }

    /// Decides; whether there is a grant that must be written down before it is written.
    fn decide(&mut self) -> bool {
        let now = Instant::now();
        // A few at a time would be written down one by one.
        let room = self.writes.len() <= BATCH / 2;
        if !(self.due || self.more && room) || self.rests > now || !self.store.is_listed(now) {
            return false;
        }
        if self.allocator.is_none() {
            return false;
        }
        (self.due, self.more) = (false, false);
        let clock = self.clock();
        let Some(allocator) = &mut self.allocator else { return false };
        self.register.estate.answers.clone_from(self.sidecars.answers());
        let mut granted = false;
        let grants = self.writes.values().filter_map(|write| write.grant.as_ref());
        let mut open: usize = grants.map(|grant| grant.ips.len()).sum();
        for (name, decision) in allocator.look(&self.register.estate, clock) {
            if self.writes.len() >= BATCH {
                self.more = true;
                break;
            }
            let waits = self.failures.get(name).is_some_and(|failure| failure.until > now);
            let key = (Kind::Service, name.clone());
            let (Some(claim), Some(version)) = (self.register.estate.services.get(name), self.store.version(&key))
            else {
                continue;
            };
            if waits || self.writes.contains_key(name) {
                continue;
            }
            let ips: BTreeSet<_> = decision.ingress.iter().filter(|ip| !claim.ingress.contains(ip)).copied().collect();
            if open > 0 && open + ips.len() > ADDRESSES {
                self.more = true;
                continue;
            }
            open += ips.len();
            let grant = (!ips.is_empty()).then(|| Grant { uid: claim.uid.clone(), version: version.to_owned(), ips });
            granted |= grant.is_some();
            let (claim, version, decision) = (Arc::clone(claim), version.to_owned(), decision.clone());
            let stage = Stage::Waiting;
            self.writes.insert(name.clone(), Write { claim, version, decision, grant, stage });
        }
        self.sidecars.look(&self.register.estate, allocator, clock);
        granted
    }

    /// In milliseconds.
    fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Everything that was given and may come true without the object showing it yet, what sidecars owe, and what rests.
    fn journal(&self) -> Journal {
        let own = self.writes.iter().filter(|(_, write)| write.stage != Stage::Done);
        let own = own.filter_map(|(name, write)| Some((name.clone(), write.grant.clone()?)));
        let grants = self.inherited.clone().into_iter().chain(own).collect();
        let resting = match &self.allocator {
            // Of others' addresses there may be more than fit.
            Some(allocator) => {
                let catalog = &self.register.estate.catalog;
                allocator.resting(self.clock()).filter(|(ip, _)| catalog.of(*ip).is_some()).collect()
            }
            None => self.resting.clone(),
        };
        Journal { grants, debts: self.sidecars.debts(), resting }
    }

    /// What waits may be begun.
    fn written_down(&mut self, journal: Journal) {
        self.sidecars.written_down(journal.debts);
        for write in self.writes.values_mut().filter(|write| write.stage == Stage::Waiting) {
            write.stage = Stage::Unclear(Instant::now());
        }
    }

    fn begin(&mut self) {
        let now = Instant::now();
        let written = self.sidecars.is_written_down();
        if written {
            self.sidecars.begin();
        }
        for (name, write) in &mut self.writes {
            if self.running.len() >= AT_ONCE {
                break;
            }
            let begins = match write.stage {
                // What it takes from a status a sidecar may owe then.
                Stage::Waiting => write.grant.is_none() && written,
                Stage::Unclear(when) => when <= now,
                Stage::UnderWay | Stage::Done => false,
            };
            if begins {
                write.stage = Stage::UnderWay;
                let patch = write::patch(&write.claim, &write.version, &write.decision, &write::now());
                let (client, name) = (self.office.client.clone(), name.clone());
                self.running.spawn(async move {
                    let outcome = write::service(client, &name, patch).await;
                    (name, outcome)
                });
            }
        }
    }

    fn ended(&mut self, done: Result<(String, Outcome), tokio::task::JoinError>) {
        let Ok((name, outcome)) = done else { return };
        let Some(write) = self.writes.get_mut(&name) else { return };
        self.figures.metrics.written(&outcome);
        match outcome {
            Outcome::Done => {
                write.stage = Stage::Done;
                self.failures.remove(&name);
                self.figures.metrics.decided(&self.register.estate.catalog, &write.claim, &write.decision);
                for event in &write.decision.events {
                    tell(&name, &write.decision, event);
                    self.events.service(&name, &write.claim.uid, event);
                }
            }
            Outcome::Unknown(why) => {
                tracing::warn!(op = "updateServiceStatus", svc = name, error = why, "its write is tried again");
                write.stage = Stage::Unclear(later(&mut self.failures, &name, &write.version));
            }
            Outcome::Outdated | Outcome::Refused(_) => {
                // An earlier try of an outdated write may have come true. Until the watch shows it, what it gave is in use.
                let version = self.store.version(&(Kind::Service, name.clone()));
                let mut over = version != Some(write.version.as_str());
                if let Outcome::Refused(why) = outcome {
                    tracing::warn!(op = "updateServiceStatus", svc = name, error = why, "its status is not accepted");
                    over = true;
                }
                // Also an outdated one: the watch may not have shown the new version yet, or be silent.
                later(&mut self.failures, &name, &write.version);
                self.writes.remove(&name);
                if let Some(allocator) = self.allocator.as_mut().filter(|_| over) {
                    allocator.failed(&name);
                    self.due = true;
                }
            }
        }
    }

    async fn finish(&mut self) {
        let end = tokio::time::sleep(LAST);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return,
                done = self.running.join_next() => match done {
                    Some(done) => self.ended(done),
                    None => return,
                },
            }
        }
    }
}

fn later(failures: &mut BTreeMap<String, Failure>, name: &str, version: &str) -> Instant {
    let first = || Failure { version: version.to_owned(), count: 0, until: Instant::now() };
    let failure = failures.entry(name.to_owned()).or_insert_with(first);
    if failure.version != version {
        *failure = first();
    }
    failure.until = Instant::now() + LATE.min(SOON.saturating_mul(1 << failure.count.min(16)));
    failure.count = failure.count.saturating_add(1);
    failure.until
}
