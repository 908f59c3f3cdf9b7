//! What a ServiceGroup's status says: where its addresses go, how many are in use, how many are left.

use std::net::IpAddr;

use super::group::{Announce, Group};
use super::ledger::Ledger;
use crate::observed::Family;

/// ServiceGroup.status, as far as it follows from Services. Of groups that hand out their own addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// `Local` or `Remote`.
    pub announce: &'static str,
    /// Ranges as they are written, IPv4 before IPv6.
    pub addresses: Vec<String>,
    /// Addresses in use, however many Services share one.
    pub allocated: [i64; 2],
    /// Addresses that are left; at most `i64::MAX`.
    pub available: [i64; 2],
    /// Whom it serves.
    pub namespaces: Vec<String>,
}

/// In the order of the arrays of [`GroupStatus`].
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// As the status says it.
#[must_use]
pub const fn announce(announce: Announce) -> &'static str {
    match announce {
        Announce::Local => "Local",
        Announce::Remote => "Remote",
    }
}

/// Of a group.
#[must_use]
pub fn status(group: &Group, ledger: &Ledger) -> GroupStatus {
    // What was excluded while it was in use is not missing from what is left.
    let counts = |ip: &IpAddr| !group.excluded.contains(*ip);
    let used = |of: Family, counts: &dyn Fn(&IpAddr) -> bool| -> i64 {
        let used: usize = group.of(of).map(|pool| ledger.used(pool).filter(|ip| counts(ip)).count()).sum();
        i64::try_from(used).unwrap_or(i64::MAX)
    };
    GroupStatus {
        announce: announce(group.announce),
        addresses: group.pools.iter().map(|pool| pool.text.clone()).collect(),
        allocated: FAMILIES.map(|of| used(of, &|_| true)),
        available: FAMILIES.map(|of| group.size(of).saturating_sub(used(of, &counts))),
        namespaces: group.namespaces.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::group::{PoolSpec, Pools, Spec};
    use super::super::ledger::Use;
    use super::*;

    #[test]
    fn what_is_used_and_what_is_left() {
        let pool = |pool: &str, subnet: &str| PoolSpec {
            field: "p".to_owned(),
            pool: pool.to_owned(),
            subnet: subnet.to_owned(),
            aggregation: None,
        };
        let pools = Pools {
            v4: vec![pool("10.0.0.0/29", "10.0.0.0/24"), pool("10.0.0.16/30", "10.0.0.0/24")],
            v6: vec![pool("2001:db8::/64", "2001:db8::/64")],
            ..Pools::default()
        };
        let exclude = vec!["10.0.0.0".to_owned(), "10.0.0.17".to_owned()];
        let spec = Spec { remote: Some(pools), exclude, ..Spec::default() };
        let group = Group::parse("purelb", "default", &spec).unwrap();
        let mut ledger = Ledger::default();
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect();
        ledger.hold("x/a", &ips(&["10.0.0.1", "2001:db8::1"]), &Use::default(), 0);
        ledger.hold("x/b", &ips(&["10.0.0.1", "10.0.0.17", "10.9.9.9"]), &Use::default(), 0);
        let status = status(&group, &ledger);
        assert_eq!(status.allocated, [2, 1], "addresses, not Services");
        assert_eq!(status.available, [9, i64::MAX - 1], "12, two of them excluded, one of the others in use");
        assert_eq!((status.announce, status.addresses.len()), ("Remote", 3));
    }
}
