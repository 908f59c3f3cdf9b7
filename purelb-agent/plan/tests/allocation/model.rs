//! An API server with Services that people change at random, and allocators that see it late, write late, and die.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a model in a test may stop at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use purelb_plan::alloc::allocator::{Allocator, Estate, Settings};
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::{Claim, Decision, annotation};
use purelb_plan::alloc::external::{Call, Debt, Fault, Sidecars, What};
use purelb_plan::alloc::group::{Announce, External, PoolSpec, Pools, Spec};
use purelb_plan::observed::Family;

use crate::chance::Chance;
use crate::sidecar::{self, Sidecar};

#[path = "judge.rs"]
mod judge;

const NAMESPACES: [&str; 3] = ["red", "blue", "green"];
const POOLS: [&str; 6] =
    ["10.0.0.0/29", "10.0.0.8/30", "10.0.1.1-10.0.1.3", "2001:db8::/126", "2001:db8:1::/64", "10.0.0.2/31"];
pub const PAUSE: u64 = 50;

/// What happened, to see that the model is not too tame.
#[derive(Debug, Default)]
pub struct Count {
    pub landed: u64,
    pub lost: u64,
    pub given: u64,
    pub shared: u64,
    pub refused: u64,
    pub restarts: u64,
    pub asked: u64,
    pub external: u64,
}

#[derive(Clone)]
struct Object {
    version: u64,
    claim: Arc<Claim>,
}

/// A write on its way: bound to uid and version.
struct Write {
    name: String,
    version: u64,
    uid: String,
    decision: Decision,
    catalog: Arc<Catalog>,
}

pub struct Model {
    pub chance: Chance,
    /// Ranges that groups may have.
    pools: Vec<String>,
    now: u64,
    version: u64,
    server: BTreeMap<String, Object>,
    /// What the allocator has seen of it.
    view: BTreeMap<String, Object>,
    groups: BTreeMap<(String, String), Arc<Spec>>,
    pub catalog: Arc<Catalog>,
    subnets: BTreeSet<ipnet::IpNet>,
    allocator: Allocator,
    /// Grants that were written down before they were written.
    journal: BTreeMap<String, (String, BTreeSet<IpAddr>)>,
    wires: Vec<Write>,
    sidecar: Sidecar,
    sidecars: Sidecars,
    /// To the sidecar, on their way.
    calls: Vec<Call>,
    /// What was written down for the next leader.
    debts: Vec<Debt>,
    /// Services and their uids at the last look.
    looked: BTreeMap<String, String>,
    /// Given to Services that have others of the sidecar's, since the last look.
    further: BTreeSet<(String, IpAddr)>,
    /// The same, where the answer was lost: the leader asks again.
    unheard: BTreeSet<(String, IpAddr)>,
    /// The leader has not looked yet.
    fresh: bool,
    /// No call is lost, and no write.
    calm: bool,
    pub count: Count,
}

pub fn settings() -> Settings {
    Settings { class: "purelb.io/purelbv2".to_owned(), default_announcer: true, cool_down: PAUSE }
}

impl Model {
    /// `more` ranges than its own.
    pub fn new(chance: Chance, more: &[String]) -> Self {
        let mut model = Self {
            chance,
            pools: POOLS.iter().map(|pool| (*pool).to_owned()).chain(more.iter().cloned()).collect(),
            now: 1000,
            version: 1,
            server: BTreeMap::new(),
            view: BTreeMap::new(),
            groups: BTreeMap::new(),
            catalog: Arc::default(),
            subnets: ["10.0.0.0/16".parse().unwrap()].into(),
            allocator: Allocator::new(settings(), BTreeMap::new()),
            journal: BTreeMap::new(),
            wires: Vec::new(),
            sidecar: Sidecar::default(),
            sidecars: Sidecars::new(Vec::new()),
            calls: Vec::new(),
            debts: Vec::new(),
            looked: BTreeMap::new(),
            further: BTreeSet::new(),
            unheard: BTreeSet::new(),
            fresh: false,
            calm: false,
            count: Count::default(),
        };
        let external = External { provider: "p".into(), socket: "/x.sock".into(), announce: Announce::Remote };
        let external = Spec { external: Some(external), ..Spec::default() };
        model.groups.insert(("purelb".to_owned(), "x".to_owned()), Arc::new(external));
        for name in ["default", "a", "b"] {
            model.change_group(name);
        }
        model
    }

    pub fn step(&mut self) {
        self.now += self.chance.below(10);
        match self.chance.below(100) {
            0..20 => self.create(),
            20..28 => self.delete(),
            28..36 => self.change(),
            36..38 => {
                let name = self.chance.pick(&["default", "a", "b"]).unwrap();
                self.change_group(name);
            }
            38..40 => self.restart(),
            40..55 => self.deliver(),
            55..70 => self.land(),
            70..80 => self.call(),
            _ => self.look(),
        }
    }

    fn create(&mut self) {
        let name = format!("{}/{}", self.chance.pick(&NAMESPACES).unwrap(), self.chance.below(5));
        if self.server.contains_key(&name) {
            return;
        }
        let both = [Family::V4, Family::V6];
        let families = match self.chance.below(6) {
            0..3 => vec![Family::V4],
            3 => vec![Family::V6],
            4 => both.to_vec(),
            _ => Vec::new(),
        };
        let mut claim = Claim {
            uid: format!("uid{}", self.version),
            created: format!("{:06}", self.now),
            namespace: name.split_once('/').unwrap().0.to_owned(),
            load_balancer: true,
            families,
            ports: [("TCP".to_owned(), 80 + self.chance.below(3) as u16)].into(),
            ..Claim::default()
        };
        let mut set = |key: &str, value: &str| drop(claim.annotations.insert(key.to_owned(), value.to_owned()));
        match self.chance.below(14) {
            0 => set(annotation::SERVICE_GROUP, "a"),
            1 => set(annotation::ADDRESSES, "10.0.0.1"),
            2 => set(annotation::ADDRESSES, "10.0.0.3,2001:db8::1"),
            3 => set(annotation::MULTI_POOL, "true"),
            4..7 => set(annotation::SHARING_KEY, "key"),
            7..9 => set(annotation::SERVICE_GROUP, "x"),
            9 => {
                set(annotation::SERVICE_GROUP, "x");
                set(annotation::SHARING_KEY, "key");
            }
            _ => {}
        }
        self.put(&name, claim);
    }

    fn delete(&mut self) {
        if let Some(name) = self.any() {
            self.server.remove(&name);
        }
    }

    /// What a person or another controller does to a Service.
    fn change(&mut self) {
        let Some(name) = self.any() else { return };
        let mut claim = (*self.server[&name].claim).clone();
        match self.chance.below(7) {
            5 => drop(claim.annotations.insert(annotation::SERVICE_GROUP.to_owned(), "x".to_owned())),
            6 => drop(claim.annotations.remove(annotation::SERVICE_GROUP)),
            // The API server itself clears the status of another type.
            0 => (claim.load_balancer, claim.ingress) = (!claim.load_balancer, Vec::new()),
            1 => claim.families = vec![Family::V4],
            2 => claim.families = vec![Family::V4, Family::V6],
            3 => drop(claim.annotations.insert("purelb.io/allow-local".to_owned(), self.now.to_string())),
            _ => claim.ingress = if self.chance.permille(300) { Vec::new() } else { claim.ingress },
        }
        self.put(&name, claim);
    }

    fn change_group(&mut self, name: &str) {
        let mut pools = Pools { multi_pool: self.chance.permille(200), ..Pools::default() };
        pools.balance_pools = self.chance.permille(200);
        for (index, pool) in self.pools.iter().enumerate().filter(|_| self.chance.permille(500)) {
            let list = if pool.contains(':') { &mut pools.v6 } else { &mut pools.v4 };
            let subnet = match pool {
                pool if pool.contains("db8") => "2001:db8::/32",
                pool if pool.contains(':') => "::/0",
                pool if pool.starts_with("10.0.") => "10.0.0.0/16",
                _ => "0.0.0.0/0",
            };
            let (pool, subnet) = (pool.clone(), subnet.to_owned());
            list.push(PoolSpec { field: format!("p{index}"), pool, subnet, aggregation: None });
        }
        let remote = self.chance.permille(500);
        let fenced = self.chance.permille(300);
        let spec = Spec {
            local: (!remote).then(|| pools.clone()),
            remote: remote.then_some(pools),
            namespaces: if fenced { vec!["red".to_owned()] } else { Vec::new() },
            enforce_namespaces: fenced && self.chance.permille(500),
            exclude: if self.chance.permille(300) { vec![self.excluded()] } else { Vec::new() },
            ..Spec::default()
        };
        self.groups.insert(("purelb".to_owned(), name.to_owned()), Arc::new(spec));
        self.catalog = Arc::new(Catalog::new(&self.groups, Some("purelb")));
    }

    /// With ranges that are not its own, the last of them.
    fn excluded(&self) -> String {
        let own = "10.0.0.4/31".to_owned();
        self.pools.get(POOLS.len()..).and_then(|more| more.last().cloned()).unwrap_or(own)
    }

    /// The next leader: it knows the journal, and lists everything before its first grant.
    fn restart(&mut self) {
        self.count.restarts += 1;
        for call in std::mem::take(&mut self.calls) {
            if !self.is_further(&call) {
                drop(self.answer(&call));
            }
        }
        self.further.append(&mut self.unheard);
        for (name, ip) in std::mem::take(&mut self.further) {
            if !self.known(&name).any(|known| *known == ip) {
                self.sidecar.take(&name, ip);
            }
        }
        self.view = self.server.clone();
        self.allocator = Allocator::new(settings(), self.journal.clone());
        self.sidecars = Sidecars::new(self.debts.clone());
        self.fresh = true;
    }

    /// A call arrives, or is lost, or its answer is.
    fn call(&mut self) {
        if self.calls.is_empty() {
            return;
        }
        let call = self.calls.swap_remove(self.chance.below(self.calls.len() as u64) as usize);
        let answer = self.answer(&call);
        if let (What::Allocate(_), Ok(_)) = (&call.what, &answer) {
            self.unheard.retain(|(name, _)| *name != call.service);
        }
        if let (true, Ok(ips)) = (self.is_further(&call), &answer) {
            self.further.extend(ips.iter().map(|ip| (call.service.clone(), *ip)));
        }
        self.sidecars.done(&call, answer, self.now);
    }

    /// Asks for a further address, beside one that it has or that a write under way may give it: if the leader ends before
    /// the answer, nobody knows of it until the Service gives all back.
    fn is_further(&self, call: &Call) -> bool {
        let has = self.known(&call.service).any(|ip| sidecar::is_of(*ip));
        has && matches!(call.what, What::Allocate(_))
    }

    /// What it has, or a write under way may give it.
    fn known(&self, name: &str) -> impl Iterator<Item = &IpAddr> {
        let named = self.server.get(name).into_iter().flat_map(|object| &object.claim.ingress);
        named.chain(self.journal.get(name).into_iter().flat_map(|(_, ips)| ips))
    }

    fn answer(&mut self, call: &Call) -> Result<Vec<IpAddr>, Fault> {
        let trouble = if self.calm { 40 } else { self.chance.below(40) };
        match trouble {
            0 => return Err(sidecar::away()),
            1 => {
                let given = self.sidecar.serve(call);
                if self.is_further(call) {
                    self.unheard.extend(given.into_iter().flatten().map(|ip| (call.service.clone(), ip)));
                }
                return Err(sidecar::away());
            }
            2 => {
                self.sidecar.forget();
                return Err(sidecar::away());
            }
            // Unnoticed.
            3 => self.sidecar.forget(),
            _ => {}
        }
        self.count.asked += u64::from(matches!(call.what, What::Allocate(_)));
        self.sidecar.serve(call)
    }

    fn deliver(&mut self) {
        let names: BTreeSet<_> = self.server.keys().chain(self.view.keys()).cloned().collect();
        let names: Vec<_> = names.into_iter().collect();
        let Some(name) = self.chance.pick(&names) else { return };
        match self.server.get(&name) {
            Some(object) => drop(self.view.insert(name, object.clone())),
            None => drop(self.view.remove(&name)),
        }
    }

    fn look(&mut self) {
        if std::mem::take(&mut self.fresh) {
            // Nobody remembers those that were deleted since something was written down last.
            let (view, looked, debts) = (&self.view, &self.looked, &self.debts);
            let same = |name: &str| view.get(name).is_some_and(|o| looked.get(name) == Some(&o.claim.uid));
            self.sidecar.keep(|name| same(name) || debts.iter().any(|debt| debt.service == name));
        }
        let estate = self.estate();
        let mut writes = Vec::new();
        for (name, decision) in self.allocator.look(&estate, self.now) {
            let object = &self.view[name];
            self.count.refused += u64::from(decision.refusal.is_some());
            writes.push((name.clone(), object.version, object.claim.uid.clone(), decision.clone()));
        }
        // The whole journal at once, before any write. What it no longer names is not on its way any more: bound to a
        // version that is gone.
        let versions = |write: &Write| self.view.get(&write.name).is_some_and(|o| o.version == write.version);
        let mut journal: BTreeMap<String, (String, BTreeSet<IpAddr>)> = BTreeMap::new();
        let open = self.wires.iter().filter(|w| versions(w)).map(|w| (&w.name, &w.uid, &w.decision));
        for (name, uid, decision) in open.chain(writes.iter().map(|(name, _, uid, decision)| (name, uid, decision))) {
            let entry = journal.entry(name.clone()).or_insert_with(|| (uid.clone(), BTreeSet::new()));
            if entry.0 == *uid {
                entry.1.extend(&decision.ingress);
            } else {
                *entry = (uid.clone(), decision.ingress.iter().copied().collect());
            }
        }
        self.journal = journal;
        self.calls.extend(self.sidecars.look(&estate, &self.allocator, self.now));
        self.further.clear();
        self.looked = estate.services.iter().map(|(name, claim)| (name.clone(), claim.uid.clone())).collect();
        self.debts = self.sidecars.debts().iter().cloned().collect();
        for (name, version, uid, decision) in writes {
            let catalog = self.catalog.clone();
            self.wires.push(Write { name, version, uid, decision, catalog });
        }
    }

    /// One write arrives, in any order, or is lost.
    fn land(&mut self) {
        if self.wires.is_empty() {
            return;
        }
        let write = self.wires.swap_remove(self.chance.below(self.wires.len() as u64) as usize);
        self.arrive(&write);
        let version = |objects: &BTreeMap<String, Object>| objects.get(&write.name).map(|object| object.version);
        if !self.wires.iter().any(|other| other.name == write.name) && version(&self.view) == version(&self.server) {
            self.allocator.failed(&write.name);
        }
    }

    fn arrive(&mut self, write: &Write) {
        if !self.calm && self.chance.permille(100) {
            self.count.lost += 1;
            return;
        }
        let there = self.server.get(&write.name);
        let Some(object) = there.filter(|o| o.version == write.version && o.claim.uid == write.uid) else { return };
        let old = object.claim.clone();
        self.count.landed += 1;
        self.judge(write, &old);
        let mut claim = (*old).clone();
        claim.ingress.clone_from(&write.decision.ingress);
        claim.condition.clone_from(&write.decision.condition);
        for (key, value) in write.decision.annotations.clone() {
            match value {
                Some(value) => drop(claim.annotations.insert(key.to_owned(), value)),
                None => drop(claim.annotations.remove(key)),
            }
        }
        self.put(&write.name, claim);
    }

    /// Everything arrives: then nothing is left to do, for this allocator and for one that begins anew.
    pub fn rest(&mut self) {
        for round in 0..12 {
            self.calm = round > 5;
            self.settle();
            self.look();
            while !self.calls.is_empty() {
                self.call();
                self.look();
            }
            let mut wires = std::mem::take(&mut self.wires);
            self.chance.shuffle(&mut wires);
            self.wires = wires;
            while !self.wires.is_empty() {
                self.land();
            }
            self.now += 1_000_000;
        }
        self.settle();
        self.look_at_sidecar();
        let estate = self.estate();
        let left = self.allocator.look(&estate, self.now).clone();
        assert!(left.is_empty(), "never ends: {left:?}");
        let mut fresh = Allocator::new(settings(), BTreeMap::new());
        let left = fresh.look(&estate, self.now).clone();
        let said: Vec<_> = left.keys().map(|name| &self.server[name].claim).collect();
        assert!(left.is_empty(), "another one would do more: {left:?} of {said:?}");
        assert_eq!(fresh.pending(), self.allocator.pending());
        for (name, object) in &self.server {
            let held: BTreeSet<_> = object.claim.ingress.iter().copied().collect();
            let said = self.allocator.ledger().of(name).cloned().unwrap_or_default();
            assert_eq!(said, held, "the ledger is wrong about {name}");
        }
        self.journal.clear();
        self.calm = false;
    }

    /// All is seen, and what is not on its way any more never comes, also what another allocator began.
    fn settle(&mut self) {
        self.view = self.server.clone();
        if self.wires.is_empty() {
            self.server.keys().for_each(|name| self.allocator.failed(name));
        }
    }

    fn estate(&self) -> Estate {
        let services = self.view.iter().map(|(name, object)| (name.clone(), object.claim.clone()));
        Estate {
            services: services.collect(),
            catalog: self.catalog.clone(),
            subnets: self.subnets.clone(),
            answers: self.sidecars.answers().clone(),
        }
    }

    fn any(&mut self) -> Option<String> {
        let names: Vec<_> = self.server.keys().cloned().collect();
        self.chance.pick(&names)
    }

    fn put(&mut self, name: &str, claim: Claim) {
        self.version += 1;
        self.server.insert(name.to_owned(), Object { version: self.version, claim: Arc::new(claim) });
    }
}
