//! All ServiceGroups together: which can be used, which one serves whom, and why not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::group::{Group, Spec};
use super::refusal::Refusal;
use crate::problem::Problem;

/// The group of Services that nothing else is said about.
const COMMON: &str = "default";

/// The groups, by name: Services name no namespace, so of two with one name the first counts.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    groups: BTreeMap<String, Group>,
    /// There, but not to be used.
    unusable: BTreeSet<String>,
    namespaces: BTreeMap<String, Eligible>,
    /// Faults of the groups.
    pub problems: Vec<Problem>,
    /// `namespace/name` of those that lie outside the install namespace.
    pub out_of_scope: BTreeSet<(String, String)>,
    /// `namespace/name` of those that another one, which counts, has the name or addresses of.
    pub conflicting: BTreeSet<(String, String)>,
}

/// Groups that list a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Eligible {
    groups: BTreeSet<String>,
    enforce: bool,
}

/// The group for a Service.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// The group.
    pub group: &'a Group,
    /// It is the common one, since these serve the namespace and none is the default.
    pub ambiguous: Option<&'a BTreeSet<String>>,
}

impl Catalog {
    /// From the objects by (namespace, name), in whose order the first of two that overlap counts. `install`: the only
    /// namespace whose groups count, unless that leaves none.
    #[must_use]
    pub fn new(specs: &BTreeMap<(String, String), Arc<Spec>>, install: Option<&str>) -> Self {
        let mut out = Self::default();
        let inside = |namespace: &str| install.is_none_or(|install| install == namespace);
        let scoped = specs.keys().any(|(namespace, _)| inside(namespace));
        for ((namespace, name), spec) in specs {
            if scoped && !inside(namespace) {
                out.out_of_scope.insert((namespace.clone(), name.clone()));
                let message = format!("is outside the namespace {}, and ignored", install.unwrap_or_default());
                out.problem(namespace, name, spec, "metadata.namespace", &message, "create it there");
                continue;
            }
            match Group::parse(namespace, name, spec) {
                Ok(group) => out.add(group, spec),
                Err(faults) => {
                    out.unusable.insert(name.clone());
                    out.problems.extend(faults);
                }
            }
        }
        // A good one of that name may come later.
        out.unusable.retain(|name| !out.groups.contains_key(name));
        for group in out.groups.values() {
            for namespace in &group.namespaces {
                let eligible = out.namespaces.entry(namespace.clone()).or_default();
                eligible.groups.insert(group.name.clone());
                eligible.enforce |= group.enforce;
            }
        }
        out
    }

    fn add(&mut self, group: Group, spec: &Spec) {
        let (namespace, name) = (group.namespace.clone(), group.name.clone());
        if let Some(first) = self.groups.get(&name) {
            let message = format!("has the name of {}/{name}, which counts", first.namespace);
            self.conflicting.insert((namespace.clone(), name.clone()));
            return self.problem(&namespace, &name, spec, "metadata.name", &message, "rename one of them");
        }
        let pairs = |other: &Group| {
            let common =
                |a: IpPool<'_>, b: IpPool<'_>| a.range.common(&b.range).map(|_| (a.text.clone(), b.text.clone()));
            group.pools.iter().find_map(|a| other.pools.iter().find_map(|b| common(a, b)))
        };
        let overlap = self.groups.values().find_map(|other| Some((other.name.clone(), pairs(other)?)));
        if let Some((other, (own, its))) = overlap {
            self.unusable.insert(name.clone());
            self.conflicting.insert((namespace.clone(), name.clone()));
            let message = format!("{own} overlaps {its} of ServiceGroup {other}, which counts");
            return self.problem(&namespace, &name, spec, "spec", &message, "take the addresses out of one of them");
        }
        self.groups.insert(name, group);
    }

    fn problem(&mut self, namespace: &str, name: &str, spec: &Spec, field: &str, message: &str, remedy: &str) {
        self.problems.push(Problem {
            object: format!("ServiceGroup {namespace}/{name}"),
            field: field.to_owned(),
            message: message.to_owned(),
            remedy: remedy.to_owned(),
            origin: spec.origin.clone(),
        });
    }

    /// All that can be used, by name.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Group> {
        self.groups.get(name)
    }

    /// The group that an address belongs to.
    #[must_use]
    pub fn of(&self, ip: IpAddr) -> Option<&Group> {
        self.groups.values().find(|group| group.pool(ip).is_some())
    }

    /// The group for a Service of a namespace, which may name one.
    ///
    /// # Errors
    /// There is none, or it may not be used there.
    pub fn resolve(&self, namespace: &str, named: Option<&str>) -> Result<Chosen<'_>, Refusal> {
        let mut ambiguous = None;
        let name = match (named, self.namespaces.get(namespace)) {
            (Some(name), _) => name,
            (None, None) => COMMON,
            (None, Some(eligible)) => match self.default_of(eligible) {
                Some(name) => name,
                None if eligible.enforce => return Err(Refusal::Ambiguous(eligible.groups.clone())),
                None => {
                    ambiguous = Some(&eligible.groups);
                    COMMON
                }
            },
        };
        Ok(Chosen { group: self.checked(namespace, name)?, ambiguous })
    }

    /// A group by name, if the namespace may use it.
    ///
    /// # Errors
    /// There is none, or it may not be used there.
    pub fn checked(&self, namespace: &str, name: &str) -> Result<&Group, Refusal> {
        let Some(group) = self.groups.get(name) else {
            let unusable = self.unusable.contains(name);
            return Err(if unusable { Refusal::Unusable(name.to_owned()) } else { Refusal::Unknown(name.to_owned()) });
        };
        let own = self.namespaces.get(namespace);
        let serves = group.namespaces.is_empty() || group.namespaces.contains(namespace);
        let fenced = self.namespaces.values().any(|e| e.enforce && e.groups.contains(name));
        let confined = own.is_some_and(|e| e.enforce && !e.groups.contains(name));
        if fenced && !serves || confined {
            return Err(Refusal::Denied { group: name.to_owned(), namespace: namespace.to_owned(), confined });
        }
        Ok(group)
    }

    fn default_of<'a>(&self, eligible: &'a Eligible) -> Option<&'a str> {
        let marked = |name: &&String| self.groups.get(*name).is_some_and(|group| group.default);
        let mut defaults = eligible.groups.iter().filter(marked);
        match (eligible.groups.len(), defaults.next(), defaults.next()) {
            (1, _, _) => eligible.groups.first().map(String::as_str),
            (_, Some(only), None) => Some(only),
            _ => None,
        }
    }
}

type IpPool<'a> = &'a super::group::Pool;

#[cfg(test)]
mod tests {
    use super::super::group::{PoolSpec, Pools};
    use super::*;

    fn spec(pool: &str, namespaces: &[&str], enforce: bool, default: bool) -> Arc<Spec> {
        let pool = PoolSpec { field: "p".into(), pool: pool.into(), subnet: "0.0.0.0/0".into(), aggregation: None };
        Arc::new(Spec {
            local: Some(Pools { v4: vec![pool], ..Pools::default() }),
            namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
            enforce_namespaces: enforce,
            namespace_default: default,
            ..Spec::default()
        })
    }

    fn catalog(groups: &[(&str, Arc<Spec>)]) -> Catalog {
        let specs = groups.iter().map(|(name, spec)| (("purelb".to_owned(), (*name).to_owned()), spec.clone()));
        Catalog::new(&specs.collect(), Some("purelb"))
    }

    /// What is chosen, or the reason why nothing is; a star where the choice was ambiguous.
    fn chosen(catalog: &Catalog, namespace: &str, named: Option<&str>) -> String {
        match catalog.resolve(namespace, named) {
            Ok(chosen) => format!("{}{}", chosen.group.name, if chosen.ambiguous.is_some() { "*" } else { "" }),
            Err(refusal) => refusal.reason().to_owned(),
        }
    }

    #[test]
    fn the_group_of_a_namespace() {
        let common = ("default", spec("10.0.0.0/24", &[], false, false));
        let a = ("a", spec("10.0.1.0/24", &["red", "blue"], false, false));
        let b = ("b", spec("10.0.2.0/24", &["red"], false, false));
        let b_default = ("b", spec("10.0.2.0/24", &["red"], false, true));
        let b_fence = ("b", spec("10.0.2.0/24", &["red"], true, false));
        let open = catalog(&[common.clone(), a.clone(), b]);
        let marked = catalog(&[common.clone(), a.clone(), b_default]);
        let fenced = catalog(&[common.clone(), a.clone(), b_fence]);
        let rows = [
            (&open, "other", None, "default"),
            (&open, "blue", None, "a"),
            (&open, "red", None, "default*"),
            (&open, "other", Some("a"), "a"),
            (&open, "other", Some("x"), "UnknownGroup"),
            (&marked, "red", None, "b"),
            (&fenced, "red", None, "AmbiguousNamespaceDefault"),
            (&fenced, "red", Some("a"), "a"),
            (&fenced, "red", Some("default"), "NamespaceDenied"),
            (&fenced, "other", Some("b"), "NamespaceDenied"),
            // One fence fences all groups of that namespace.
            (&fenced, "other", Some("a"), "NamespaceDenied"),
            (&fenced, "blue", None, "a"),
            (&fenced, "other", None, "default"),
        ];
        for (catalog, namespace, named, want) in rows {
            assert_eq!(chosen(catalog, namespace, named), want, "{namespace} {named:?}");
        }
        assert_eq!(chosen(&catalog(&[a]), "other", None), "UnknownGroup", "no group named default");
    }

    /// Section 11.1: PureLB accepts a range that lies strictly inside one that is there.
    #[test]
    fn overlap_is_found_from_both_sides() {
        let (large, small) = (spec("10.0.0.0/16", &[], false, false), spec("10.0.3.7/32", &[], false, false));
        for (first, second) in [(large.clone(), small.clone()), (small, large)] {
            let catalog = catalog(&[("a", first), ("b", second)]);
            assert!(catalog.problems[0].message.contains("overlaps"), "{:?}", catalog.problems);
            assert_eq!(catalog.conflicting, [("purelb".to_owned(), "b".to_owned())].into());
            assert_eq!(catalog.groups().map(|g| g.name.as_str()).collect::<Vec<_>>(), ["a"]);
            assert_eq!(chosen(&catalog, "x", Some("b")), "NoUsableGroup");
        }
    }

    #[test]
    fn groups_elsewhere_do_not_count() {
        let one = spec("10.0.0.0/24", &[], false, false);
        let two = spec("10.0.1.0/24", &[], false, false);
        let key = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
        let both = [(key("purelb", "a"), one), (key("team", "b"), two.clone())].into();
        let catalog = Catalog::new(&both, Some("purelb"));
        assert_eq!(catalog.groups().count(), 1);
        assert_eq!(catalog.out_of_scope, [key("team", "b")].into());
        assert_eq!(Catalog::new(&both, None).groups().count(), 2, "the namespace is not known");
        let outside = [(key("team", "b"), two)].into();
        assert_eq!(Catalog::new(&outside, Some("purelb")).groups().count(), 1, "rather all than none");
    }
}
