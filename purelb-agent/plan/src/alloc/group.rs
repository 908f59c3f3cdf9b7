//! A ServiceGroup: from its texts to ranges, with everything that is wrong with it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::range::{Range, Taken};
use crate::ids::family;
use crate::observed::Family;
use crate::problem::Problem;

/// Linux takes no longer path of a socket.
const LONGEST_PATH: usize = 107;

/// ServiceGroup.spec as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// `file:line`, or empty.
    pub origin: String,
    /// Addresses of the nodes' subnets.
    pub local: Option<Pools>,
    /// Addresses for every node's `kube-lb0`.
    pub remote: Option<Pools>,
    /// Addresses that a sidecar hands out.
    pub external: Option<External>,
    /// Addresses, networks and ranges that are never handed out.
    pub exclude: Vec<String>,
    /// Whom it serves; empty: all.
    pub namespaces: Vec<String>,
    /// Others are kept out, and these are kept in.
    pub enforce_namespaces: bool,
    /// The one of several that Services without an annotation get.
    pub namespace_default: bool,
}

/// spec.local and spec.remote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pools {
    /// v4pools, then v4pool.
    pub v4: Vec<PoolSpec>,
    /// v6pools, then v6pool.
    pub v6: Vec<PoolSpec>,
    /// spec.local.skipIPv6DAD
    pub skip_ipv6_dad: bool,
    /// One address of every range.
    pub multi_pool: bool,
    /// The range with the fewest addresses in use comes first.
    pub balance_pools: bool,
}

/// An AddressPool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolSpec {
    /// Where it stands: `spec.local.v4pools[0]`.
    pub field: String,
    /// CIDR, or from-to.
    pub pool: String,
    /// CIDR.
    pub subnet: String,
    /// `default`, or a prefix length with its slash.
    pub aggregation: Option<String>,
}

/// spec.external
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External {
    /// Its name, for people.
    pub provider: String,
    /// Path of its unix socket.
    pub socket: String,
    /// How its addresses are announced.
    pub announce: Announce,
}

/// Where an address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Announce {
    /// On one node's interface.
    Local,
    /// On every node's `kube-lb0`.
    Remote,
}

impl Announce {
    /// As the annotation `purelb.io/pool-type` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

/// A ServiceGroup that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Namespace.
    pub namespace: String,
    /// Name, by which Services name it.
    pub name: String,
    /// Where its addresses go.
    pub announce: Announce,
    /// Who hands them out, if not we.
    pub external: Option<External>,
    /// All of IPv4, then all of IPv6, each in the order in which addresses are taken.
    pub pools: Vec<Pool>,
    /// Never handed out.
    pub excluded: Taken,
    /// One address of every range.
    pub multi_pool: bool,
    /// The emptiest range first.
    pub balance_pools: bool,
    /// Local IPv6 addresses go without duplicate address detection.
    pub skip_ipv6_dad: bool,
    /// Whom it serves; empty: all.
    pub namespaces: BTreeSet<String>,
    /// `namespaces` is a fence.
    pub enforce: bool,
    /// Preferred among several.
    pub default: bool,
}

/// A range of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// As it is written.
    pub text: String,
    /// Its addresses.
    pub range: Range,
    /// The network they belong to.
    pub subnet: IpNet,
    /// As remote addresses they have this prefix length: `aggregation`, or that of the network.
    pub prefix: u8,
}

impl Group {
    /// Reads it.
    ///
    /// # Errors
    /// Every fault of it: then nothing is allocated from it.
    pub fn parse(namespace: &str, name: &str, spec: &Spec) -> Result<Self, Vec<Problem>> {
        let mut faults = Faults { object: format!("ServiceGroup {namespace}/{name}"), spec, list: Vec::new() };
        let kinds = [spec.local.is_some(), spec.remote.is_some(), spec.external.is_some()];
        if kinds.into_iter().filter(|set| *set).count() != 1 {
            faults.add("spec", "must have exactly one of local, remote and external", "keep the one that is meant");
        }
        if spec.namespaces.is_empty() && (spec.enforce_namespaces || spec.namespace_default) {
            faults.add("spec.namespaces", "must not be empty with enforceNamespaces or namespaceDefault", "list them");
        }
        let (announce, pools) = match (&spec.local, &spec.remote, &spec.external) {
            (Some(pools), _, _) => (Announce::Local, pools.clone()),
            (_, Some(pools), _) => (Announce::Remote, pools.clone()),
            (_, _, external) => (external.as_ref().map_or(Announce::Local, |e| e.announce), Pools::default()),
        };
        if spec.external.is_none() && pools.v4.is_empty() && pools.v6.is_empty() {
            faults.add("spec", "has no pool", "add v4pools or v6pools");
        }
        if let Some(External { socket, .. }) = &spec.external
            && (!socket.starts_with('/') || socket.contains('\0') || socket.len() > LONGEST_PATH)
        {
            let message = format!("must be an absolute path of at most {LONGEST_PATH} bytes");
            faults.add("spec.external.socket", &message, "name the file on which the sidecar listens");
        }
        let mut ranges: Vec<Pool> = Vec::new();
        let of = |family: Family| move |pool| (family, pool);
        for (family, pool) in pools.v4.iter().map(of(Family::V4)).chain(pools.v6.iter().map(of(Family::V6))) {
            let Some(parsed) = faults.pool(family, pool) else { continue };
            match ranges.iter().find_map(|other| other.range.common(&parsed.range).map(|common| (other, common))) {
                Some((other, common)) => {
                    let message = format!("overlaps {} of the same group in {common}", other.text);
                    faults.add(&format!("{}.pool", pool.field), &message, "take it out of one of them");
                }
                None => ranges.push(parsed),
            }
        }
        let mut excluded = Taken::default();
        for (index, text) in spec.exclude.iter().enumerate() {
            match Range::parse(text) {
                Ok(range) => excluded.add_range(range),
                Err(error) => {
                    let field = format!("spec.exclude[{index}]");
                    faults.add(&field, &format!("{text:?} {error}"), "write an address, a CIDR or from-to");
                }
            }
        }
        if !faults.list.is_empty() {
            return Err(faults.list);
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            announce,
            external: spec.external.clone(),
            pools: ranges,
            excluded,
            multi_pool: pools.multi_pool,
            balance_pools: pools.balance_pools,
            skip_ipv6_dad: pools.skip_ipv6_dad && announce == Announce::Local,
            namespaces: spec.namespaces.iter().cloned().collect(),
            enforce: spec.enforce_namespaces,
            default: spec.namespace_default,
        })
    }

    /// The range that an address belongs to.
    #[must_use]
    pub fn pool(&self, ip: IpAddr) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.range.contains(ip))
    }

    /// Ranges of a family.
    pub fn of(&self, of: Family) -> impl Iterator<Item = &Pool> {
        self.pools.iter().filter(move |pool| pool.range.family() == of)
    }

    /// How many addresses of a family it can hand out; `i64::MAX` when more.
    #[must_use]
    pub fn size(&self, of: Family) -> i64 {
        self.of(of).fold(0, |sum: i64, pool| sum.saturating_add(self.size_of(pool)))
    }

    /// How many addresses of one of its ranges it can hand out; `i64::MAX` when more.
    #[must_use]
    pub fn size_of(&self, pool: &Pool) -> i64 {
        // Stretches, since the entries of `exclude` may overlap.
        let parts = self.excluded.ranges().filter_map(|range| range.common(&pool.range));
        let excluded = parts.fold(0_i64, |sum, part| sum.saturating_add(part.size()));
        pool.range.size().saturating_sub(excluded)
    }
}

struct Faults<'a> {
    object: String,
    spec: &'a Spec,
    list: Vec<Problem>,
}

impl Faults<'_> {
    fn add(&mut self, field: &str, message: &str, remedy: &str) {
        self.list.push(Problem {
            object: self.object.clone(),
            field: field.to_owned(),
            message: message.to_owned(),
            remedy: remedy.to_owned(),
            origin: self.spec.origin.clone(),
        });
    }

    fn pool(&mut self, of: Family, spec: &PoolSpec) -> Option<Pool> {
        let PoolSpec { field, pool, subnet, aggregation } = spec;
        let range = Range::parse(pool);
        if let Err(error) = &range {
            self.add(&format!("{field}.pool"), &format!("{pool:?} {error}"), "write a CIDR or from-to");
        }
        let net = subnet.trim().parse::<IpNet>();
        if net.is_err() {
            let message = format!("{subnet:?} is no network in CIDR form");
            self.add(&format!("{field}.subnet"), &message, "write the subnet that the addresses belong to");
        }
        let bits = if of == Family::V4 { 32 } else { 128 };
        let prefix = aggregation.as_deref().filter(|text| !matches!(*text, "" | "default"));
        let length = |text: &str| text.strip_prefix('/')?.parse::<u8>().ok().filter(|n| (8..=bits).contains(n));
        if let Some(text) = prefix.filter(|text| length(text).is_none()) {
            let message = format!("{text:?} is neither default nor a prefix length from /8 to /{bits}");
            self.add(&format!("{field}.aggregation"), &message, "correct it or leave it out");
            return None;
        }
        let (range, net) = (range.ok()?, net.ok()?);
        if range.family() != of || family(net.addr()) != of {
            self.add(field, "is of the other family", "move it to the list of its family");
            return None;
        }
        if !range.is_within(&net) {
            let message = format!("{pool} is not within the subnet {subnet}");
            self.add(&format!("{field}.pool"), &message, "correct the pool or its subnet");
            return None;
        }
        let prefix = prefix.and_then(length).unwrap_or_else(|| net.prefix_len());
        Some(Pool { text: pool.clone(), range, subnet: net.trunc(), prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(pool: &str, subnet: &str) -> PoolSpec {
        PoolSpec { field: "p".to_owned(), pool: pool.to_owned(), subnet: subnet.to_owned(), aggregation: None }
    }

    fn local(v4: &[(&str, &str)]) -> Spec {
        let v4 = v4.iter().map(|(p, s)| pool(p, s)).collect();
        Spec { local: Some(Pools { v4, ..Pools::default() }), ..Spec::default() }
    }

    fn faults(spec: &Spec) -> Vec<String> {
        let list = Group::parse("purelb", "web", spec).err().unwrap_or_default();
        list.iter().map(|p| format!("{}: {}", p.field, p.message)).collect()
    }

    /// Sections 11.1 and 11.17: also ranges of one group that overlap, that end before they begin, of the other family.
    #[test]
    fn faults_are_named() {
        let net = "192.0.2.0/24";
        let good = local(&[("192.0.2.0/28", net), ("192.0.2.16 - 192.0.2.20", net)]);
        assert_eq!(faults(&good), Vec::<String>::new());
        let both = Spec { remote: good.local.clone(), ..good.clone() };
        let aggregated = |text: &str| {
            let mut spec = good.clone();
            spec.local.as_mut().unwrap().v4[0].aggregation = Some(text.to_owned());
            spec
        };
        let other_list =
            Spec { remote: Some(Pools { v6: vec![pool("192.0.2.0/28", net)], ..Pools::default() }), ..Spec::default() };
        let rows = [
            (Spec::default(), "exactly one of"),
            (both, "exactly one of"),
            (local(&[]), "has no pool"),
            (local(&[("192.0.2.9-192.0.2.1", net)]), "ends before"),
            (local(&[("192.0.3.0/28", net)]), "not within the subnet"),
            (local(&[("192.0.2.0/28", "there")]), "is no network"),
            (local(&[("192.0.2.0/28", net), ("192.0.2.4/32", net)]), "overlaps 192.0.2.0/28"),
            (local(&[("192.0.2.4/32", net), ("192.0.2.0/28", net)]), "overlaps 192.0.2.4/32"),
            (other_list, "other family"),
            (aggregated("/33"), "/8 to /32"),
            (aggregated("24"), "/8 to /32"),
            (Spec { exclude: vec!["web".to_owned()], ..good.clone() }, "spec.exclude[0]"),
            (Spec { enforce_namespaces: true, ..good.clone() }, "must not be empty"),
        ];
        for (spec, want) in rows {
            let found = faults(&spec);
            assert!(found.iter().any(|fault| fault.contains(want)), "{want}: {found:?} of {spec:?}");
        }
        for text in ["", "default", "/8", "/32"] {
            assert_eq!(faults(&aggregated(text)), Vec::<String>::new(), "{text:?}");
        }
        let two = local(&[("here", net), ("192.0.2.0/28", "there")]);
        assert_eq!(faults(&two).len(), 2, "all faults are named: {:?}", faults(&two));
    }

    #[test]
    fn what_is_excluded_is_not_available() {
        let mut spec = local(&[("192.0.2.0/28", "192.0.2.0/24")]);
        spec.exclude = ["192.0.2.0", "192.0.2.14-192.0.2.20", "192.0.2.15"].map(str::to_owned).to_vec();
        let group = Group::parse("purelb", "web", &spec).unwrap();
        assert_eq!(group.size(Family::V4), 13);
        assert_eq!(group.size(Family::V6), 0);
        assert_eq!(group.pools[0].range.first_free(&[&group.excluded]), Some([192, 0, 2, 1].into()));
    }
}
