//! Metrics of the allocator, by PureLB's names (`address_pool_*`, without its prefix here).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::{Claim, Decision, annotation};
use purelb_plan::alloc::group::Spec;
use purelb_plan::alloc::ledger::Ledger;
use purelb_plan::alloc::status::{FAMILIES, status};

use crate::allocator::sidecars::Figures;
use crate::cluster::write::Outcome;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pool {
    pool: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rejection {
    pool: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Outside {
    namespace: String,
    name: String,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Written {
    outcome: &'static str,
}

/// Of the allocator.
#[derive(Debug, Default)]
pub struct Allocation {
    size: Family<Pool, Gauge<i64, AtomicI64>>,
    in_use: Family<Pool, Gauge<i64, AtomicI64>>,
    rejected: Family<Rejection, Counter>,
    multi: Family<Pool, Counter>,
    partial: Family<Pool, Counter>,
    balanced: Family<Pool, Counter>,
    outside: Family<Outside, Gauge<i64, AtomicI64>>,
    statuses: Family<Written, Counter>,
    updates: Counter,
    update_errors: Counter,
    config_loaded: Gauge<i64, AtomicI64>,
    known: BTreeSet<String>,
    known_outside: BTreeSet<Outside>,
}

impl Allocation {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let out = Self::default();
        registry.register("address_pool_size", "Addresses of a ServiceGroup", out.size.clone());
        registry.register("address_pool_addresses_in_use", "Addresses in use of a ServiceGroup", out.in_use.clone());
        registry.register("address_pool_allocation_rejected", "Services that were refused", out.rejected.clone());
        registry.register("address_pool_multipool_allocations", "Multi-pool allocations", out.multi.clone());
        registry.register("address_pool_multipool_partial", "Multi-pool allocations without all", out.partial.clone());
        registry.register("address_pool_balance_pools_allocations", "Balanced allocations", out.balanced.clone());
        registry.register("servicegroups_out_of_scope", "ServiceGroups of other namespaces", out.outside.clone());
        registry.register("allocator_sg_status_writes", "Writes of ServiceGroup status", out.statuses.clone());
        registry.register("k8s_client_updates", "Writes of Services", out.updates.clone());
        registry.register("k8s_client_update_errors", "Writes of Services that failed", out.update_errors.clone());
        registry.register("k8s_client_config_loaded_bool", "1 once ServiceGroups were read", out.config_loaded.clone());
        out
    }

    /// The groups as they are now; those that are gone leave nothing.
    pub fn pools(&mut self, catalog: &Catalog, ledger: &Ledger, sidecars: &BTreeMap<String, Figures>) {
        let mut now = BTreeSet::new();
        for group in catalog.groups() {
            let pool = Pool { pool: group.name.clone() };
            let figures = sidecars.get(&group.name).and_then(|figures| figures.known.as_ref());
            let sum = |v4: u64, v6: u64| i64::try_from(v4.saturating_add(v6)).unwrap_or(i64::MAX);
            let (size, in_use) = match figures {
                Some(known) => (sum(known.size_v4, known.size_v6), sum(known.in_use_v4, known.in_use_v6)),
                None => (
                    FAMILIES.iter().fold(0, |sum: i64, of| sum.saturating_add(group.size(*of))),
                    status(group, ledger).allocated.iter().sum(),
                ),
            };
            self.size.get_or_create(&pool).set(size);
            self.in_use.get_or_create(&pool).set(in_use);
            now.insert(group.name.clone());
        }
        for gone in self.known.difference(&now) {
            let pool = Pool { pool: gone.clone() };
            for family in [&self.size, &self.in_use] {
                family.remove(&pool);
            }
        }
        self.known = now;
    }

    /// ServiceGroups were read; those of other namespaces are told.
    pub fn groups(&mut self, catalog: &Catalog, groups: &BTreeMap<(String, String), Arc<Spec>>) {
        self.config_loaded.set(1);
        let mut now = BTreeSet::new();
        for (namespace, name) in &catalog.out_of_scope {
            let spec = groups.get(&(namespace.clone(), name.clone()));
            let r#type = match spec.map(|spec| (&spec.local, &spec.remote)) {
                Some((Some(_), _)) => "local",
                Some((None, Some(_))) => "remote",
                _ => "external",
            };
            now.insert(Outside { namespace: namespace.clone(), name: name.clone(), r#type });
        }
        for one in &now {
            self.outside.get_or_create(one).set(1);
        }
        for gone in self.known_outside.difference(&now) {
            self.outside.remove(gone);
        }
        self.known_outside = now;
    }

    /// A write of a ServiceGroup's status.
    pub fn status_written(&self, outcome: &Outcome) {
        let outcome = match outcome {
            Outcome::Done => "success",
            Outcome::Outdated => "conflict",
            Outcome::Refused(_) => "forbidden",
            Outcome::Unknown(_) => "other",
        };
        self.statuses.get_or_create(&Written { outcome }).inc();
    }

    /// A write of a Service.
    pub fn written(&self, outcome: &Outcome) {
        self.updates.inc();
        if *outcome != Outcome::Done {
            self.update_errors.inc();
        }
    }

    /// A decision that was written.
    pub fn decided(&self, catalog: &Catalog, claim: &Claim, decision: &Decision) {
        if let Some(refusal) = &decision.refusal {
            if decision.events.iter().any(|event| event.reason == "AllocationFailed") {
                let named = claim.annotations.get(annotation::SERVICE_GROUP).cloned();
                let pool = named.unwrap_or_else(|| "<none>".to_owned());
                self.rejected.get_or_create(&Rejection { pool, reason: refusal.metric() }).inc();
            }
            return;
        }
        let new = decision.ingress.iter().find(|ip| !claim.ingress.contains(ip));
        let Some(group) = new.and_then(|ip| catalog.of(*ip)) else { return };
        let pool = Pool { pool: group.name.clone() };
        if decision.multi {
            self.multi.get_or_create(&pool).inc();
        }
        if decision.partial {
            self.partial.get_or_create(&pool).inc();
        }
        if group.balance_pools && !decision.multi && claim.usage().key.is_none() {
            self.balanced.get_or_create(&pool).inc();
        }
    }
}
