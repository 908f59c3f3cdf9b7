//! An API server with Services that people change at random, and allocators that see it late, write late, and die.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a model in a test may stop at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use purelb_plan::alloc::allocator::{Allocator, Estate, Settings};
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::{Claim, Decision, annotation};
use purelb_plan::alloc::group::{PoolSpec, Pools, Spec};
use purelb_plan::ids::family;
use purelb_plan::observed::Family;

use crate::chance::Chance;

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
    chance: Chance,
    now: u64,
    version: u64,
    server: BTreeMap<String, Object>,
    /// What the allocator has seen of it.
    view: BTreeMap<String, Object>,
    groups: BTreeMap<(String, String), Arc<Spec>>,
    catalog: Arc<Catalog>,
    subnets: BTreeSet<ipnet::IpNet>,
    allocator: Allocator,
    /// Grants that were written down before they were written.
    journal: BTreeMap<String, (String, BTreeSet<IpAddr>)>,
    wires: Vec<Write>,
    pub count: Count,
}

pub fn settings() -> Settings {
    Settings { class: "purelb.io/purelbv2".to_owned(), default_announcer: true, cool_down: PAUSE }
}

impl Model {
    pub fn new(seed: u64) -> Self {
        let mut model = Self {
            chance: Chance(seed),
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
            count: Count::default(),
        };
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
            40..60 => self.deliver(),
            60..80 => self.land(),
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
        match self.chance.below(12) {
            0 => set(annotation::SERVICE_GROUP, "a"),
            1 => set(annotation::ADDRESSES, "10.0.0.1"),
            2 => set(annotation::ADDRESSES, "10.0.0.3,2001:db8::1"),
            3 => set(annotation::MULTI_POOL, "true"),
            4..7 => set(annotation::SHARING_KEY, "key"),
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
        match self.chance.below(5) {
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
        for (index, pool) in POOLS.iter().enumerate().filter(|_| self.chance.permille(500)) {
            let list = if pool.contains("db8") { &mut pools.v6 } else { &mut pools.v4 };
            let subnet = if pool.contains("db8") { "2001:db8::/32" } else { "10.0.0.0/16" };
            let (pool, subnet) = ((*pool).to_owned(), subnet.to_owned());
            list.push(PoolSpec { field: format!("p{index}"), pool, subnet, aggregation: None });
        }
        let remote = self.chance.permille(500);
        let fenced = self.chance.permille(300);
        let spec = Spec {
            local: (!remote).then(|| pools.clone()),
            remote: remote.then_some(pools),
            namespaces: if fenced { vec!["red".to_owned()] } else { Vec::new() },
            enforce_namespaces: fenced && self.chance.permille(500),
            exclude: if self.chance.permille(300) { vec!["10.0.0.4/31".to_owned()] } else { Vec::new() },
            ..Spec::default()
        };
        self.groups.insert(("purelb".to_owned(), name.to_owned()), Arc::new(spec));
        self.catalog = Arc::new(Catalog::new(&self.groups, Some("purelb")));
    }

    /// The next leader: it knows the journal, and lists everything before its first grant.
    fn restart(&mut self) {
        self.count.restarts += 1;
        self.view = self.server.clone();
        self.allocator = Allocator::new(settings(), self.journal.clone());
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
        if self.chance.permille(100) {
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

    /// The laws, at the moment of a write.
    fn judge(&mut self, write: &Write, old: &Claim) {
        let (name, new) = (&write.name, &write.decision.ingress);
        let key = |claim: &Claim| claim.annotations.get(annotation::SHARING_KEY).cloned();
        for ip in new.iter().filter(|ip| !old.ingress.contains(ip)) {
            self.count.given += 1;
            for (other, object) in self.server.iter().filter(|(n, o)| *n != name && o.claim.ingress.contains(ip)) {
                let both = key(old).is_some() && key(old) == key(&object.claim);
                let apart = object.claim.ports.is_disjoint(&old.ports);
                assert!(both && apart, "{ip} of {other} is given to {name} too");
                self.count.shared += 1;
            }
            let group = write.catalog.of(*ip).unwrap_or_else(|| panic!("{ip} of {name} is in no group"));
            assert!(!group.excluded.contains(*ip), "{ip} is excluded");
        }
        for ip in old.ingress.iter().filter(|ip| !new.contains(ip)) {
            let asked = old.families.is_empty() || old.families.contains(&family(*ip));
            assert!(!old.load_balancer || !asked, "{name} loses {ip}");
        }
        let distinct: BTreeSet<_> = new.iter().collect();
        assert_eq!(distinct.len(), new.len(), "{name} has an address twice: {new:?}");
        let whole = !old.annotations.contains_key(annotation::ADDRESSES)
            && write.decision.refusal.is_none()
            && !new.is_empty()
            && !old.annotations.contains_key(annotation::MULTI_POOL);
        let multi = write.catalog.groups().any(|group| group.multi_pool);
        if whole && !multi {
            let has: BTreeSet<_> = new.iter().map(|ip| family(*ip)).collect();
            assert!(old.families.iter().all(|of| has.contains(of)), "{name} has {new:?} of {:?}", old.families);
        }
    }

    /// Everything arrives: then nothing is left to do, for this allocator and for one that begins anew.
    pub fn rest(&mut self) {
        for _ in 0..6 {
            self.settle();
            self.look();
            let mut wires = std::mem::take(&mut self.wires);
            self.chance.shuffle(&mut wires);
            self.wires = wires;
            while !self.wires.is_empty() {
                self.land();
            }
            self.now += 2 * PAUSE;
        }
        self.settle();
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
        Estate { services: services.collect(), catalog: self.catalog.clone(), subnets: self.subnets.clone() }
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
