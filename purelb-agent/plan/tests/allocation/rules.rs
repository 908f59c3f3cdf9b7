//! PureLB's rules of allocation, one row each (sections 3 and 4 of its behaviour), and its faults that are not ours.
#![expect(clippy::unwrap_used, reason = "a helper of tests may stop at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use purelb_plan::alloc::allocator::{Allocator, Estate};
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::{Claim, Decision, annotation};
use purelb_plan::alloc::external::{Answer, Ask, Call, Fault, Sidecars};
use purelb_plan::alloc::group::{PoolSpec, Pools, Spec};
use purelb_plan::observed::Family;

use crate::model::settings;

/// A small cluster whose writes all arrive at once.
pub struct Cluster {
    estate: Estate,
    groups: BTreeMap<(String, String), Arc<Spec>>,
    pub allocator: Allocator,
    pub now: u64,
    count: u64,
    /// Reasons of the events so far.
    pub events: Vec<&'static str>,
}

/// `ranges` of both families, each its own subnet where that is not said.
pub fn pools(ranges: &[&str]) -> Pools {
    let mut out = Pools::default();
    for (index, text) in ranges.iter().enumerate() {
        let (pool, subnet) =
            text.split_once(" of ").unwrap_or((text, if text.contains(':') { "::/0" } else { "0.0.0.0/0" }));
        let list = if text.contains(':') { &mut out.v6 } else { &mut out.v4 };
        let (pool, subnet) = (pool.to_owned(), subnet.to_owned());
        list.push(PoolSpec { field: format!("spec.pools[{index}]"), pool, subnet, aggregation: None });
    }
    out
}

impl Cluster {
    pub fn new(groups: &[(&str, Spec)]) -> Self {
        let mut out = Self {
            estate: Estate::default(),
            groups: BTreeMap::new(),
            allocator: Allocator::new(settings(), BTreeMap::new()),
            now: 1000,
            count: 0,
            events: Vec::new(),
        };
        for (name, spec) in groups {
            out.groups.insert(("purelb".to_owned(), (*name).to_owned()), Arc::new(spec.clone()));
        }
        out.estate.catalog = Arc::new(Catalog::new(&out.groups, Some("purelb")));
        out
    }

    pub fn of(ranges: &[&str]) -> Self {
        Self::new(&[("default", Spec { local: Some(pools(ranges)), ..Spec::default() })])
    }

    pub fn subnets(&mut self, subnets: &[&str]) {
        self.estate.subnets = subnets.iter().map(|net| net.parse().unwrap()).collect();
    }

    pub fn group(&mut self, name: &str, spec: Spec) {
        self.groups.insert(("purelb".to_owned(), name.to_owned()), Arc::new(spec));
        self.estate.catalog = Arc::new(Catalog::new(&self.groups, Some("purelb")));
    }

    /// Creates or changes a Service; what it has then, or the reason why nothing.
    pub fn apply(&mut self, name: &str, change: impl FnOnce(&mut Claim)) -> String {
        self.count += 1;
        let namespace = name.split_once('/').unwrap().0.to_owned();
        let new = Claim {
            uid: self.count.to_string(),
            created: format!("{:06}", self.count),
            namespace,
            load_balancer: true,
            families: vec![Family::V4],
            ports: [("TCP".to_owned(), 80)].into(),
            ..Claim::default()
        };
        let mut claim = self.estate.services.get(name).map_or(new, |claim| (**claim).clone());
        change(&mut claim);
        self.estate.services.insert(name.to_owned(), Arc::new(claim));
        self.run();
        self.said(name)
    }

    pub fn remove(&mut self, name: &str) {
        self.estate.services.remove(name);
        self.run();
    }

    /// The next leader: it knows what rests.
    pub fn restart(&mut self) {
        let resting: Vec<_> = self.allocator.resting(self.now).collect();
        self.allocator = Allocator::new(settings(), BTreeMap::new());
        self.allocator.rest(resting, self.now);
        self.run();
    }

    /// Until nothing is left to write.
    pub fn run(&mut self) {
        for round in 0.. {
            assert!(round < 5, "never ends");
            let writes: Vec<(String, Decision)> =
                self.allocator.look(&self.estate, self.now).iter().map(|(n, d)| (n.clone(), d.clone())).collect();
            if writes.is_empty() {
                return;
            }
            for (name, decision) in writes {
                let mut claim = (*self.estate.services[&name]).clone();
                self.events.extend(decision.events.iter().map(|event| event.reason));
                (claim.ingress, claim.condition) = (decision.ingress, decision.condition);
                for (key, value) in decision.annotations {
                    match value {
                        Some(value) => drop(claim.annotations.insert(key.to_owned(), value)),
                        None => drop(claim.annotations.remove(key)),
                    }
                }
                self.estate.services.insert(name, Arc::new(claim));
            }
        }
    }

    /// What a Service wants from a sidecar.
    pub fn ask(&self, name: &str) -> Option<&Ask> {
        self.allocator.asks().get(name)
    }

    /// A sidecar answers the Service's question; what the Service has then.
    pub fn answer(&mut self, name: &str, result: Result<&[&str], (&'static str, &str)>) -> String {
        let ips = |ips: &[&str]| ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let result =
            result.map(ips).map_err(|(code, message)| Fault { code, message: message.to_owned(), answered: true });
        let ask = self.ask(name).unwrap().clone();
        self.estate.answers.insert(name.to_owned(), Arc::new(Answer { ask, result }));
        self.run();
        self.said(name)
    }

    /// Calls to sidecars that begin now, when everything is written that can be.
    pub fn calls(&mut self, sidecars: &mut Sidecars) -> Vec<Call> {
        self.estate.answers.clone_from(sidecars.answers());
        self.run();
        sidecars.look(&self.estate, &self.allocator, self.now)
    }

    pub fn said(&self, name: &str) -> String {
        let claim = &self.estate.services[name];
        let ips: Vec<_> = claim.ingress.iter().map(IpAddr::to_string).collect();
        let refused = claim.condition.as_ref().filter(|condition| !condition.status);
        refused.map_or(ips.join(" "), |condition| {
            if ips.is_empty() { condition.reason.clone() } else { format!("{} {}", ips.join(" "), condition.reason) }
        })
    }

    pub fn annotations(&self, name: &str) -> BTreeMap<&str, &str> {
        self.estate.services[name].annotations.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    pub fn claim(&self, name: &str) -> &Claim {
        &self.estate.services[name]
    }
}

pub fn set(key: &'static str, value: &'static str) -> impl FnOnce(&mut Claim) {
    move |claim| drop(claim.annotations.insert(key.to_owned(), value.to_owned()))
}

pub fn families(families: &[Family]) -> impl FnOnce(&mut Claim) + use<> {
    let families = families.to_vec();
    move |claim| claim.families = families
}

pub fn shared(key: &'static str, port: u16) -> impl FnOnce(&mut Claim) {
    move |claim| {
        claim.annotations.insert(annotation::SHARING_KEY.to_owned(), key.to_owned());
        claim.ports = BTreeSet::from([("TCP".to_owned(), port)]);
    }
}
