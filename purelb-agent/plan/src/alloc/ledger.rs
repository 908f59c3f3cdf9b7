//! Who holds which address, and which were let go of of late.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::group::{Group, Pool};
use super::range::Taken;
use super::refusal::Refusal;
use crate::ids::family;
use crate::observed::Family;

/// How a Service uses its addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Sharing key.
    pub key: Option<String>,
    /// Protocol and port.
    pub ports: BTreeSet<(String, u16)>,
}

/// All addresses in use, by any Service whose status or grant names them.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    users: BTreeMap<IpAddr, BTreeSet<String>>,
    services: BTreeMap<String, (BTreeSet<IpAddr>, Use)>,
    keys: BTreeMap<String, BTreeSet<IpAddr>>,
    taken: Taken,
    /// Until when, in milliseconds.
    cooling: BTreeMap<IpAddr, u64>,
    cooled: Taken,
}

impl Ledger {
    /// From now on the Service holds these and nothing else. What it lets go of, and nobody else has, cools until then.
    /// Whether anything is other than before.
    pub fn hold(&mut self, service: &str, ips: &BTreeSet<IpAddr>, used: &Use, until: u64) -> bool {
        if self.services.get(service).map_or(ips.is_empty(), |(old, how)| old == ips && how == used) {
            return false;
        }
        let (old, how) = self.services.remove(service).unwrap_or_default();
        for ip in &old {
            if let Some(users) = self.users.get_mut(ip) {
                users.remove(service);
                if users.is_empty() {
                    self.users.remove(ip);
                }
            }
        }
        for ip in ips {
            self.users.entry(*ip).or_default().insert(service.to_owned());
            self.taken.add(*ip);
            self.cooling.remove(ip);
            self.cooled.remove(*ip);
        }
        if !ips.is_empty() {
            self.services.insert(service.to_owned(), (ips.clone(), used.clone()));
        }
        let freed: Vec<_> = old.difference(ips).filter(|ip| !self.users.contains_key(ip)).collect();
        for ip in freed {
            self.taken.remove(*ip);
            self.cool(*ip, until);
        }
        for key in [how.key, used.key.clone()].into_iter().flatten() {
            let bound =
                old.union(ips).copied().filter(|ip| self.users_of(*ip).any(|(_, u)| u.key.as_ref() == Some(&key)));
            let bound: BTreeSet<_> = bound.collect();
            let entry = self.keys.entry(key.clone()).or_default();
            entry.retain(|ip| !old.contains(ip) && !ips.contains(ip));
            entry.extend(bound);
            if entry.is_empty() {
                self.keys.remove(&key);
            }
        }
        true
    }

    /// Until then it is taken only when there is no other.
    pub fn cool(&mut self, ip: IpAddr, until: u64) {
        if !self.users.contains_key(&ip) {
            self.cooling.insert(ip, until);
            self.cooled.add(ip);
        }
    }

    /// What cooled long enough may be taken like any other again.
    pub fn pass(&mut self, now: u64) {
        let done: Vec<_> = self.cooling.iter().filter(|(_, until)| **until <= now).map(|(ip, _)| *ip).collect();
        for ip in done {
            self.cooling.remove(&ip);
            self.cooled.remove(ip);
        }
    }

    /// What cools, and until when.
    #[must_use]
    pub const fn cooling(&self) -> &BTreeMap<IpAddr, u64> {
        &self.cooling
    }

    /// What a Service holds.
    #[must_use]
    pub fn of(&self, service: &str) -> Option<&BTreeSet<IpAddr>> {
        self.services.get(service).map(|(ips, _)| ips)
    }

    /// Services that hold anything.
    pub fn services(&self) -> impl Iterator<Item = &str> {
        self.services.keys().map(String::as_str)
    }

    /// Addresses in use within a range of a group.
    pub fn used(&self, pool: &Pool) -> impl Iterator<Item = &IpAddr> {
        pool.range.slice(&self.users).map(|(ip, _)| ip)
    }

    /// Why a Service may not have this address; `None`: it may.
    #[must_use]
    pub fn refuses(&self, ip: IpAddr, service: &str, wanted: &Use) -> Option<Refusal> {
        let others = || self.users_of(ip).filter(|(name, _)| *name != service);
        let stranger = others().find(|(_, used)| used.key.is_none() || used.key != wanted.key);
        if let Some((user, _)) = stranger {
            return Some(Refusal::SharingKeyConflict { ip, user: user.to_owned() });
        }
        let same_port = others().find(|(_, used)| !used.ports.is_disjoint(&wanted.ports));
        same_port.map(|(user, _)| Refusal::PortConflict { ip, user: user.to_owned() })
    }

    /// The address of a family that others with this key have in the group.
    #[must_use]
    pub fn bound(&self, group: &Group, of: Family, service: &str, key: &str) -> Option<IpAddr> {
        let ips = self.keys.get(key).into_iter().flatten().copied();
        ips.filter(|ip| family(*ip) == of && group.pool(*ip).is_some())
            .find(|ip| self.users_of(*ip).any(|(name, used)| name != service && used.key.as_deref() == Some(key)))
    }

    /// The first address of these ranges that is free; one that was in use of late only when there is no other.
    #[must_use]
    pub fn first_free<'a>(&self, group: &Group, pools: impl Iterator<Item = &'a Pool> + Clone) -> Option<IpAddr> {
        let fresh = |pool: &Pool| pool.range.first_free(&[&self.taken, &group.excluded, &self.cooled]);
        pools.clone().find_map(fresh).or_else(|| {
            let free = |ip: &IpAddr| !group.excluded.contains(*ip);
            let cooling = pools.flat_map(|pool| pool.range.slice(&self.cooling)).filter(|(ip, _)| free(ip));
            cooling.min_by_key(|(_, until)| **until).map(|(ip, _)| *ip)
        })
    }

    fn users_of(&self, ip: IpAddr) -> impl Iterator<Item = (&str, &Use)> {
        let names = self.users.get(&ip).into_iter().flatten();
        names.filter_map(|name| Some((name.as_str(), &self.services.get(name)?.1)))
    }
}
