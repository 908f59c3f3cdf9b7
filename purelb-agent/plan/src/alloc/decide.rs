//! One Service: what it keeps, what it lets go of, and what it gets. What it has is never exchanged for anything else.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::catalog::Catalog;
use super::claim::{BRAND, Claim, Condition, Decision, annotation};
use super::external::{Answer, Ask};
use super::group::{Announce, Group, Pool};
use super::ledger::{Ledger, Use};
use super::refusal::Refusal;
use crate::ids::family;
use crate::observed::Family;

/// Characters of a refusal at most.
const LONGEST: usize = 1000;

/// What a decision is made by.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The groups.
    pub catalog: &'a Catalog,
    /// Who holds what; a grant that is not written yet is held by its Service already.
    pub ledger: &'a Ledger,
    /// Networks of nodes that are alive.
    pub subnets: &'a BTreeSet<IpNet>,
    /// What a sidecar answered, perhaps to another question.
    pub answer: Option<&'a Answer>,
}

/// About a Service of type LoadBalancer that is ours to serve.
#[must_use]
pub fn decide(name: &str, claim: &Claim, scene: Scene<'_>) -> Decision {
    let held = scene.ledger.of(name).cloned().unwrap_or_default();
    let case = Case { name, claim, scene, used: claim.usage(), held };
    let mut out = Decision { ingress: claim.ingress.clone(), ..Decision::default() };
    if claim.annotation(annotation::RE_EVALUATE) == Some("true") {
        out.annotations.insert(annotation::RE_EVALUATE, None);
    }
    let foreign = case.is_foreign();
    let got = if foreign {
        Err(Refusal::Foreign(claim.ingress.iter().copied().collect()))
    } else {
        case.trim(&mut out);
        case.extend(&mut out)
    };
    if !foreign && !out.ingress.is_empty() && got.is_ok() {
        case.sign(&mut out);
        case.advise(&mut out);
    }
    out.condition = match &got {
        Ok(()) => Some(allocated(&out.ingress)),
        // What was said before is true until the answer is there.
        Err(Refusal::Awaiting(_)) => claim.condition.clone(),
        Err(refusal) => Some(Condition { status: false, reason: refusal.reason().to_owned(), message: short(refusal) }),
    };
    if let Err(refusal) = got {
        if claim.condition != out.condition {
            out.tell(true, "AllocationFailed", short(&refusal));
        }
        out.refusal = Some(refusal);
    }
    out
}

/// About a Service that is of another type by now: what it had is free again, whatever its status says.
#[must_use]
pub fn let_go(claim: &Claim) -> Decision {
    let mut out = Decision::default();
    if claim.annotations.contains_key(annotation::ALLOCATED_FROM) {
        out.annotations.insert(annotation::ALLOCATED_FROM, None);
        out.tell(false, "AddressReleased", "its type is no longer LoadBalancer");
    }
    out
}

/// It may quote what was asked for, which may be as long as an object; Kubernetes lets a message have 32 KiB.
fn short(refusal: &Refusal) -> String {
    let text = refusal.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn allocated(ips: &[IpAddr]) -> Condition {
    Condition { status: true, reason: "Allocated".to_owned(), message: listed(ips) }
}

fn listed(ips: &[IpAddr]) -> String {
    ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

const fn text(of: Family) -> &'static str {
    match of {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

struct Case<'a> {
    name: &'a str,
    claim: &'a Claim,
    scene: Scene<'a>,
    used: Use,
    /// What the ledger says it has: its status, and grants that are under way.
    held: BTreeSet<IpAddr>,
}

impl Case<'_> {
    /// Its status is somebody else's. Ours is what bears our brand, and what only the second of PureLB's two writes is
    /// missing for.
    fn is_foreign(&self) -> bool {
        let begun = || {
            let ours = |ip: &IpAddr| self.scene.catalog.of(*ip).is_some() || self.external().next().is_some();
            self.claim.annotations.contains_key(annotation::ALLOCATED_FROM) && self.claim.ingress.iter().all(ours)
        };
        let named = self.claim.host_names || !self.claim.ingress.is_empty();
        named && !self.claim.is_branded() && (self.claim.host_names || !begun())
    }

    /// Families that it does not ask for any more go.
    fn trim(&self, out: &mut Decision) {
        let wanted = &self.claim.families;
        if wanted.is_empty() || self.is_multi() {
            return;
        }
        let (keep, drop): (Vec<_>, Vec<_>) = out.ingress.iter().partition(|ip| wanted.contains(&family(**ip)));
        if !drop.is_empty() {
            out.ingress = keep;
            out.tell(false, "AddressReleased", format!("{}: its family is not asked for any more", listed(&drop)));
        }
    }

    /// What is missing comes, all of it or nothing.
    fn extend(&self, out: &mut Decision) -> Result<(), Refusal> {
        let pins = self.pins(out)?;
        let missing = self.missing();
        if let Some(pins) = pins {
            return self.pinned(&pins, &missing, out);
        }
        if self.is_multi() {
            return self.of_every_range(out);
        }
        if missing.is_empty() {
            return Ok(());
        }
        let chosen = self.scene.catalog.resolve(&self.claim.namespace, self.group_name())?;
        let group = chosen.group;
        let mut new = Vec::new();
        if group.external.is_some() {
            new = self.of_sidecar(group, missing, out)?;
        } else {
            for of in self.families(group, &missing) {
                new.push(self.one(group, of)?);
            }
        }
        if let Some(candidates) = chosen.ambiguous {
            let names: Vec<_> = candidates.iter().map(String::as_str).collect();
            let message = format!("{} serve the namespace and none is its default", names.join(", "));
            out.tell(true, "ConfigurationWarning", format!("{message}: addresses come from {}", group.name));
        }
        assigned(&new, out);
        if group.external.is_some() {
            out.set(annotation::ALLOCATED_FROM, group.name.as_str());
        }
        Ok(())
    }

    /// What the group's sidecar gives for all of the families; else it is asked.
    fn of_sidecar(&self, group: &Group, missing: Vec<Family>, out: &mut Decision) -> Result<Vec<IpAddr>, Refusal> {
        let families = if self.claim.families.is_empty() { Vec::new() } else { missing };
        let ask = Ask { uid: self.claim.uid.clone(), group: group.name.clone(), families, key: self.used.key.clone() };
        let answer = self.scene.answer.filter(|answer| answer.ask == ask);
        let got = match answer.map(|answer| &answer.result) {
            None => Err(Refusal::Awaiting(group.name.clone())),
            Some(Err(fault)) => Err(Refusal::Sidecar {
                group: group.name.clone(),
                exhausted: fault.code == "ResourceExhausted",
                answer: format!("answers {}: {}", fault.code, fault.message),
            }),
            Some(Ok(ips)) => self.accepted(group, ips, &ask.families),
        };
        if got.is_err() {
            out.ask = Some(ask);
        }
        got
    }

    /// What a sidecar gave, in the order of the families; it may have lost its memory, or its mind.
    fn accepted(&self, group: &Group, ips: &[IpAddr], families: &[Family]) -> Result<Vec<IpAddr>, Refusal> {
        let fault = |answer: String| Refusal::Sidecar { group: group.name.clone(), exhausted: false, answer };
        let mut new: Vec<IpAddr> = Vec::new();
        for ip in ips.iter().copied().filter(|ip| !self.claim.ingress.contains(ip)) {
            let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
            if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast {
                return Err(fault(format!("gave {ip}, which no Service can have")));
            }
            if !families.is_empty() && !families.contains(&family(ip)) {
                return Err(fault(format!("gave {ip}, and was not asked for {}", text(family(ip)))));
            }
            if let Some(other) = self.scene.catalog.of(ip) {
                return Err(fault(format!("gave {ip}, which is of ServiceGroup {}", other.name)));
            }
            if group.excluded.contains(ip) {
                return Err(fault(format!("gave {ip}, which spec.exclude names")));
            }
            match self.scene.ledger.refuses(ip, self.name, &self.used) {
                Some(Refusal::SharingKeyConflict { ip, user }) => {
                    return Err(fault(format!("gave {ip}, which Service {user} has")));
                }
                Some(refusal) => return Err(refusal),
                None if !new.contains(&ip) => new.push(ip),
                None => {}
            }
        }
        if let Some(of) = families.iter().find(|of| !new.iter().any(|ip| family(*ip) == **of)) {
            return Err(fault(format!("gave no {} address", text(*of))));
        }
        if new.is_empty() {
            return Err(fault("gave no address".to_owned()));
        }
        new.sort_by_key(|ip| families.iter().position(|of| *of == family(*ip)));
        Ok(new)
    }

    /// External groups that some of its addresses are of, as it says itself.
    fn external(&self) -> impl Iterator<Item = &Group> {
        let names = self.claim.annotation(annotation::ALLOCATED_FROM).unwrap_or_default().split(", ");
        names.filter_map(|name| self.scene.catalog.get(name).filter(|group| group.external.is_some()))
    }

    /// Families without an address; where none is named, one of any is enough.
    fn missing(&self) -> Vec<Family> {
        if self.claim.families.is_empty() {
            return if self.claim.ingress.is_empty() { vec![Family::V4, Family::V6] } else { Vec::new() };
        }
        let mut missing: Vec<_> = self.claim.families.iter().copied().filter(|of| !self.claim.has(*of)).collect();
        missing.dedup();
        missing
    }

    /// Where no family is named it is the first of which the group has ranges.
    fn families(&self, group: &Group, missing: &[Family]) -> Vec<Family> {
        if !self.claim.families.is_empty() {
            return missing.to_vec();
        }
        let first = missing.iter().copied().find(|of| group.of(*of).next().is_some());
        first.or(missing.first().copied()).into_iter().collect()
    }

    fn group_name(&self) -> Option<&str> {
        self.claim.annotation(annotation::SERVICE_GROUP)
    }

    /// An address of a family.
    fn one(&self, group: &Group, of: Family) -> Result<IpAddr, Refusal> {
        let ledger = self.scene.ledger;
        if let Some(ip) = self.granted(group, |ip| family(ip) == of) {
            return Ok(ip);
        }
        if let Some(ip) = self.used.key.as_deref().and_then(|key| ledger.bound(group, of, self.name, key)) {
            // A key is bound to one address: a conflict there is one everywhere.
            return self.permitted(group, ip);
        }
        let mut pools: Vec<&Pool> = group.of(of).collect();
        if group.balance_pools && self.used.key.is_none() {
            pools.sort_by_key(|pool| ledger.used(pool).count());
        }
        let free = ledger.first_free(group, pools.into_iter());
        free.ok_or_else(|| Refusal::Exhausted { group: group.name.clone(), family: text(of) })
    }

    /// An address that is asked for by name or key.
    fn permitted(&self, group: &Group, ip: IpAddr) -> Result<IpAddr, Refusal> {
        if group.excluded.contains(ip) {
            return Err(Refusal::Excluded(ip));
        }
        match self.scene.ledger.refuses(ip, self.name, &self.used) {
            Some(refusal) => Err(refusal),
            None => Ok(ip),
        }
    }

    /// What was granted before and is not written yet stays granted, since the write may be under way.
    fn granted(&self, group: &Group, fits: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let may = |ip: &IpAddr| {
            !self.claim.ingress.contains(ip) && group.pool(*ip).is_some() && self.permitted(group, *ip).is_ok()
        };
        self.held.iter().copied().find(|ip| fits(*ip) && may(ip))
    }

    /// Addresses that are asked for by name; `None`: none are.
    fn pins(&self, out: &mut Decision) -> Result<Option<Vec<IpAddr>>, Refusal> {
        let (field, list) = match (self.claim.annotation(annotation::ADDRESSES), &self.claim.load_balancer_ip) {
            (Some(list), _) => (annotation::ADDRESSES, list),
            (None, Some(list)) if !list.is_empty() => ("spec.loadBalancerIP", list.as_str()),
            _ => return Ok(None),
        };
        // It only counts as long as there is nothing.
        if !self.claim.ingress.is_empty() && self.missing().is_empty() {
            return Ok(Some(Vec::new()));
        }
        let mut pins = Vec::new();
        for part in list.split(',').map(str::trim) {
            let ip: IpAddr = part.parse().map_err(|_| Refusal::Invalid(format!("{field}: {part:?} is no address")))?;
            if !self.claim.families.is_empty() && !self.claim.families.contains(&family(ip)) {
                let message = format!("{field}: {ip} is {}, which spec.ipFamilies does not name", text(family(ip)));
                return Err(Refusal::Invalid(message));
            }
            if !pins.contains(&ip) {
                pins.push(ip);
            }
        }
        if field != annotation::ADDRESSES {
            out.tell(false, "DeprecationWarning", "spec.loadBalancerIP is deprecated: use purelb.io/addresses");
        } else if self.group_name().is_some() {
            out.tell(false, "ConfigurationWarning", "purelb.io/addresses counts, purelb.io/service-group does not");
        }
        Ok(Some(pins))
    }

    /// Exactly these, of families that have nothing yet.
    fn pinned(&self, pins: &[IpAddr], missing: &[Family], out: &mut Decision) -> Result<(), Refusal> {
        let mut new = Vec::new();
        for ip in pins.iter().copied().filter(|ip| missing.contains(&family(*ip))) {
            let group = self.scene.catalog.of(ip).ok_or(Refusal::OutsidePools(ip))?;
            self.scene.catalog.checked(&self.claim.namespace, &group.name)?;
            new.push(self.permitted(group, ip)?);
        }
        assigned(&new, out);
        Ok(())
    }

    /// The annotation decides, else the group.
    fn is_multi(&self) -> bool {
        match self.claim.annotation(annotation::MULTI_POOL) {
            Some(value) => value == "true",
            None => {
                let chosen = self.scene.catalog.resolve(&self.claim.namespace, self.group_name());
                chosen.is_ok_and(|chosen| chosen.group.multi_pool)
            }
        }
    }

    /// One address of every range of its families whose network is there. What it has stays, also where that is gone.
    fn of_every_range(&self, out: &mut Decision) -> Result<(), Refusal> {
        out.multi = true;
        let (catalog, ledger) = (self.scene.catalog, self.scene.ledger);
        let group = if self.claim.ingress.is_empty() {
            catalog.resolve(&self.claim.namespace, self.group_name())?.group
        } else {
            let mut groups: Vec<_> = self.claim.ingress.iter().map(|ip| catalog.of(*ip)).collect();
            groups.dedup_by_key(|group| group.map(|g| &g.name));
            match groups[..] {
                [Some(group)] => group,
                _ => return Err(Refusal::MultiPoolMismatch),
            }
        };
        let refused = |why: &str| Err(Refusal::MultiPoolRefused(why.to_owned()));
        if group.balance_pools {
            return refused("and balancePools exclude each other");
        }
        if self.used.key.is_some() {
            return refused("cannot be combined with IP sharing");
        }
        if group.external.is_some() {
            return refused("is not possible with an external ServiceGroup");
        }
        let asked = if self.claim.families.is_empty() { &[Family::V4][..] } else { &self.claim.families };
        let (mut new, mut has) = (Vec::new(), false);
        for pool in asked.iter().flat_map(|of| group.of(*of)) {
            if self.claim.ingress.iter().any(|ip| pool.range.contains(*ip)) {
                has = true;
            } else if group.announce == Announce::Remote || self.scene.subnets.contains(&pool.subnet) {
                let granted = self.granted(group, |ip| pool.range.contains(ip));
                match granted.or_else(|| ledger.first_free(group, std::iter::once(pool))) {
                    Some(ip) => new.push(ip),
                    None => out.partial = true,
                }
            }
        }
        if new.is_empty() && !has && self.claim.ingress.is_empty() {
            let family = text(asked.first().copied().unwrap_or(Family::V4));
            return Err(Refusal::Exhausted { group: group.name.clone(), family });
        }
        assigned(&new, out);
        Ok(())
    }

    /// What is asked for and has no effect, said once.
    fn advise(&self, out: &mut Decision) {
        let affine = self.claim.annotation(annotation::NODE_AFFINITY) == Some("service-endpoints");
        if affine && self.used.key.is_some() && out.ingress != self.claim.ingress {
            let message = "purelb.io/node-affinity has no effect with purelb.io/allow-shared-ip";
            out.tell(true, "ConfigurationWarning", message);
        }
    }

    /// Whose the addresses are.
    fn sign(&self, out: &mut Decision) {
        out.set(annotation::ALLOCATED_BY, BRAND);
        let catalog = self.scene.catalog;
        let given = out.annotations.remove(annotation::ALLOCATED_FROM).flatten();
        let mut groups: Vec<&Group> = out.ingress.iter().filter_map(|ip| catalog.of(*ip)).collect();
        // No range tells which addresses are of a sidecar.
        if out.ingress.iter().any(|ip| catalog.of(*ip).is_none()) {
            groups.extend(self.external().chain(given.and_then(|name| catalog.get(&name))));
        }
        groups.dedup_by_key(|group| &group.name);
        // What is in no group any more keeps what was said about it.
        let Some(first) = groups.first() else { return };
        let names: Vec<_> = groups.iter().map(|group| group.name.as_str()).collect();
        out.set(annotation::ALLOCATED_FROM, names.join(", "));
        out.set(annotation::POOL_TYPE, first.announce.name());
        let skip = first.skip_ipv6_dad.then(|| "true".to_owned());
        out.annotations.insert(annotation::SKIP_IPV6_DAD, skip);
    }
}

fn assigned(new: &[IpAddr], out: &mut Decision) {
    if !new.is_empty() {
        out.ingress.extend(new);
        out.tell(false, "AddressAssigned", listed(new));
    }
}
