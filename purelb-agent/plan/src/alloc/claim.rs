//! A Service as the allocator sees it, and what it decides about it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::external::Ask;
use super::ledger::Use;
use super::refusal::Refusal;
use crate::ids::family;
use crate::observed::Family;

/// Annotations, by PureLB's names.
pub mod annotation {
    /// The group to use at the first allocation.
    pub const SERVICE_GROUP: &str = "purelb.io/service-group";
    /// Addresses that are asked for: one, or several with commas.
    pub const ADDRESSES: &str = "purelb.io/addresses";
    /// Services with the same key may share an address.
    pub const SHARING_KEY: &str = "purelb.io/allow-shared-ip";
    /// `true`: one address of every range; anything else: not.
    pub const MULTI_POOL: &str = "purelb.io/multi-pool";
    /// `true`: look again; removed by whoever did.
    pub const RE_EVALUATE: &str = "purelb.io/re-evaluate";
    /// Election by endpoints.
    pub const NODE_AFFINITY: &str = "purelb.io/node-affinity";
    /// Who gave the addresses.
    pub const ALLOCATED_BY: &str = "purelb.io/allocated-by";
    /// The groups they are of.
    pub const ALLOCATED_FROM: &str = "purelb.io/allocated-from";
    /// `local` or `remote`.
    pub const POOL_TYPE: &str = "purelb.io/pool-type";
    /// `true`, or not there.
    pub const SKIP_IPV6_DAD: &str = "purelb.io/skip-ipv6-dad";
}

/// Value of [`annotation::ALLOCATED_BY`].
pub const BRAND: &str = "PureLB";

/// A Service as the allocator sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Another one under the same name is another Service.
    pub uid: String,
    /// `creationTimestamp`: who came first is served first.
    pub created: String,
    /// Namespace.
    pub namespace: String,
    /// Its type is LoadBalancer.
    pub load_balancer: bool,
    /// `spec.loadBalancerClass`
    pub class: Option<String>,
    /// It is headless, or has no cluster address yet.
    pub unready: bool,
    /// `spec.ipFamilies`
    pub families: Vec<Family>,
    /// Protocols and ports.
    pub ports: BTreeSet<(String, u16)>,
    /// Those that begin with `purelb.io/`.
    pub annotations: BTreeMap<String, String>,
    /// `spec.loadBalancerIP`
    pub load_balancer_ip: Option<String>,
    /// `status.loadBalancer.ingress[].ip`
    pub ingress: Vec<IpAddr>,
    /// Some of its ingress has a name and no address.
    pub host_names: bool,
    /// The condition `purelb.io/Allocated` as it is.
    pub condition: Option<Condition>,
}

impl Claim {
    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    /// Its addresses were given by us.
    #[must_use]
    pub fn is_branded(&self) -> bool {
        self.annotation(annotation::ALLOCATED_BY) == Some(BRAND)
    }

    /// Something of it was given by us once.
    pub(super) fn is_ours(&self) -> bool {
        self.is_branded() || self.annotations.contains_key(annotation::ALLOCATED_FROM)
    }

    /// How it uses its addresses.
    #[must_use]
    pub fn usage(&self) -> Use {
        let key = self.annotation(annotation::SHARING_KEY).filter(|key| !key.is_empty());
        Use { key: key.map(str::to_owned), ports: self.ports.clone() }
    }

    pub(super) fn has(&self, of: Family) -> bool {
        self.ingress.iter().any(|ip| family(*ip) == of)
    }
}

/// What a Service's status and annotations should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// All of `status.loadBalancer.ingress`, in order.
    pub ingress: Vec<IpAddr>,
    /// What must be set, or removed where there is no value.
    pub annotations: BTreeMap<&'static str, Option<String>>,
    /// To be told once it is written.
    pub events: Vec<Event>,
    /// The condition; `None`: none.
    pub condition: Option<Condition>,
    /// Why it has not all that it asks for.
    pub refusal: Option<Refusal>,
    /// Its addresses are one of every range.
    pub multi: bool,
    /// With multi-pool: some range had no address for it.
    pub partial: bool,
    /// What a sidecar is to be asked for.
    pub ask: Option<Ask>,
}

impl Decision {
    /// Something of it is not so yet.
    #[must_use]
    pub fn changes(&self, claim: &Claim) -> bool {
        let annotated = |(key, value): (&&str, &Option<String>)| claim.annotations.get(*key) != value.as_ref();
        self.ingress != claim.ingress || self.annotations.iter().any(annotated) || self.condition != claim.condition
    }

    pub(super) fn set(&mut self, key: &'static str, value: impl Into<String>) {
        self.annotations.insert(key, Some(value.into()));
    }

    pub(super) fn tell(&mut self, warning: bool, reason: &'static str, message: impl Into<String>) {
        self.events.push(Event { warning, reason, message: message.into() });
    }
}

/// A Kubernetes event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `Warning`, not `Normal`.
    pub warning: bool,
    /// PureLB's.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// `purelb.io/Allocated`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// True: it has what it asks for.
    pub status: bool,
    /// `Allocated`, or [`Refusal::reason`].
    pub reason: String,
    /// For people.
    pub message: String,
}
