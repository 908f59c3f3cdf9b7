//! What is said about ServiceGroups: their status, and events about their faults. Only what is new is written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kube::Client;
use purelb_ipam::v1::StatsResponse;
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::Event;
use purelb_plan::alloc::ledger::Ledger;
use purelb_plan::alloc::status::{announce, status};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::sidecars::Figures;
use crate::cluster::store::Store;
use crate::cluster::write::{self, Events, Outcome};
use crate::metrics::Allocation;
use crate::source::Objects as _;
use crate::source::estate::Register;
use crate::source::objects::ServiceGroup;
use crate::source::parse::{Kind, Object};

/// A status that was not accepted is written again after so long.
const LATER: Duration = Duration::from_secs(30);

type Name = (String, String);

/// What was said.
pub struct Groups {
    client: Client,
    events: Events,
    running: JoinSet<(Name, Outcome)>,
    busy: BTreeSet<Name>,
    /// What was not accepted is tried again then.
    later: BTreeMap<Name, Instant>,
    /// Faults that an event told.
    told: BTreeSet<(Name, String)>,
    /// The CRD is PureLB's own, whose status knows no conditions; until the next leader.
    plain: bool,
}

impl Groups {
    /// Nothing was said.
    #[must_use]
    pub fn new(client: Client, events: Events) -> Self {
        let (busy, later, told) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
        Self { client, events, running: JoinSet::new(), busy, later, told, plain: false }
    }

    /// Says what is new.
    pub fn look(
        &mut self,
        store: &Store,
        register: &Register,
        (ledger, figures): (&Ledger, &BTreeMap<String, Figures>),
        metrics: &mut Allocation,
    ) {
        while let Some(done) = self.running.try_join_next() {
            let Ok((name, outcome)) = done else { continue };
            self.busy.remove(&name);
            metrics.status_written(&outcome);
            let why = match outcome {
                Outcome::Done => continue,
                Outcome::Refused(why) | Outcome::Unknown(why) => why,
                Outcome::Outdated => "it is gone, or its CRD has no status: apply deploy/crds".to_owned(),
            };
            tracing::warn!(
                op = "updatePoolStatus",
                pool = name.1,
                namespace = name.0,
                error = why,
                "its status was not written"
            );
            if !self.plain && why.contains(".status.conditions: field not declared in schema") {
                tracing::warn!(
                    event = "oldCRD",
                    "the CRD of ServiceGroups has no conditions, so none are written: apply deploy/crds"
                );
                self.plain = true;
                continue;
            }
            self.later.insert(name, Instant::now() + LATER);
        }
        let now = Instant::now();
        self.later.retain(|_, until| *until > now);
        let catalog = &register.estate.catalog;
        metrics.groups(catalog, &register.groups);
        let mut told = BTreeSet::new();
        for (key, found) in store.all(Kind::ServiceGroup) {
            let (Object::ServiceGroup(group), Some((namespace, name))) = (&found.object, key.1.split_once('/')) else {
                continue;
            };
            let name = (namespace.to_owned(), name.to_owned());
            let faults = faults(catalog, &key.1);
            if !faults.is_empty() {
                let fault = (name.clone(), faults.join("; "));
                if !self.told.contains(&fault) {
                    let outside = catalog.out_of_scope.contains(&name);
                    let reason = if outside { "ServiceGroupOutOfScope" } else { "ParseFailed" };
                    let event = Event { warning: true, reason, message: fault.1.clone() };
                    if outside {
                        tracing::warn!(
                            event = "serviceGroupOutOfScope",
                            pool = name.1,
                            namespace = name.0,
                            "{}",
                            event.message
                        );
                    } else {
                        tracing::warn!(event = reason, pool = name.1, namespace = name.0, "{}", event.message);
                    }
                    self.events.group(&key.1, &group.metadata.uid, &event);
                }
                told.insert(fault);
            }
            // Those of other namespaces may be another installation's.
            if catalog.out_of_scope.contains(&name) {
                continue;
            }
            let Some(mut wanted) = wanted(group, &name, catalog, (ledger, figures), &faults) else { continue };
            if self.plain {
                // To PureLB's users a group without a status is one that is not used.
                if catalog.get(&name.1).is_none_or(|usable| usable.namespace != name.0) {
                    continue;
                }
                wanted.as_object_mut().map(|status| status.remove("conditions"));
            }
            if !self.busy.contains(&name) && !self.later.contains_key(&name) && !says(group.status.as_ref(), &wanted) {
                self.busy.insert(name.clone());
                let client = self.client.clone();
                self.running.spawn(async move {
                    let outcome = write::group(client, &name.0, &name.1, &wanted).await;
                    (name, outcome)
                });
            }
        }
        self.told = told;
    }
}

fn faults(catalog: &Catalog, name: &str) -> Vec<String> {
    let object = format!("ServiceGroup {name}");
    let own = catalog.problems.iter().filter(|problem| problem.object == object);
    own.map(|problem| format!("{}: {}; {}", problem.field, problem.message, problem.remedy)).collect()
}

/// The whole status; `None`: nothing is known of it.
fn wanted(
    group: &ServiceGroup,
    name: &Name,
    catalog: &Catalog,
    (ledger, figures): (&Ledger, &BTreeMap<String, Figures>),
    faults: &[String],
) -> Option<Value> {
    let usable = catalog.get(&name.1).filter(|usable| usable.namespace == name.0);
    let mut out = json!({"allocatedIPv4": 0, "allocatedIPv6": 0});
    let mut away = None;
    if let Some((usable, external)) = usable.and_then(|usable| Some((usable, usable.external.as_ref()?))) {
        // A sidecar alone knows what it has.
        let figures = figures.get(&usable.name)?;
        away = figures.fault.as_ref().map(|fault| format!("the sidecar: {}: {}", fault.code, fault.message));
        out = of_sidecar(figures.known.as_ref(), away.is_some())?;
        out["announce"] = json!(announce(usable.announce));
        out["ipam"] = json!(external.provider);
        if !usable.namespaces.is_empty() {
            out["boundNamespaces"] = json!(usable.namespaces);
        }
    } else if let Some(usable) = usable {
        let status = status(usable, ledger);
        out = json!({
            "announce": status.announce,
            "ipam": "Cluster",
            "addresses": status.addresses,
            "allocatedIPv4": status.allocated[0],
            "allocatedIPv6": status.allocated[1],
            "availableIPv4": status.available[0],
            "availableIPv6": status.available[1],
        });
        if !status.namespaces.is_empty() {
            out["boundNamespaces"] = json!(status.namespaces);
        }
    }
    let old = |kind: &str| {
        let conditions = group.status.as_ref()?.get("conditions")?.as_array()?;
        conditions.iter().find(|condition| condition["type"] == kind).cloned()
    };
    let condition = |kind: &str, is: bool, reason: &str, message: &str| {
        let status = if is { "True" } else { "False" };
        let since = old(kind).filter(|old| old["status"] == status).map(|old| old["lastTransitionTime"].clone());
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "observedGeneration": group.metadata.generation,
            "lastTransitionTime": since.unwrap_or_else(|| write::now().into()),
        })
    };
    let ready = usable.is_some() && away.is_none();
    let why = away.clone().unwrap_or_else(|| faults.join("; "));
    let conflicting = catalog.conflicting.contains(name);
    let reason = match (usable.is_some(), conflicting) {
        (true, _) if away.is_some() => "SidecarFailed",
        (true, _) => "Usable",
        (false, true) => "Conflicting",
        (false, false) => "Invalid",
    };
    let other = if conflicting { "Overlaps" } else { "None" };
    out["conditions"] = json!([
        condition("Ready", ready, reason, &why),
        condition("Conflicting", conflicting, other, if conflicting { &why } else { "" }),
    ]);
    Some(out)
}

/// The figures of a sidecar; `None`: it was not heard yet.
fn of_sidecar(known: Option<&StatsResponse>, away: bool) -> Option<Value> {
    let Some(known) = known else { return away.then(|| json!({"allocatedIPv4": 0, "allocatedIPv6": 0})) };
    let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let mut out = json!({"allocatedIPv4": count(known.in_use_v4), "allocatedIPv6": count(known.in_use_v6)});
    if !known.display_addresses.is_empty() {
        out["addresses"] = json!(known.display_addresses);
    }
    if known.has_known_capacity {
        out["availableIPv4"] = json!(count(known.size_v4.saturating_sub(known.in_use_v4)));
        out["availableIPv6"] = json!(count(known.size_v6.saturating_sub(known.in_use_v6)));
    }
    Some(out)
}

/// The status is as wanted, the times of its conditions apart.
fn says(status: Option<&Value>, wanted: &Value) -> bool {
    let plain = |value: &Value| {
        let mut value = value.clone();
        for condition in value.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(fields) = condition.as_object_mut() {
                fields.remove("lastTransitionTime");
            }
        }
        value
    };
    status.is_some_and(|status| plain(status) == plain(wanted))
}
