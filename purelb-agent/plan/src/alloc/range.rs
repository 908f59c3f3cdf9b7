//! Ranges of addresses as ServiceGroups write them, and sets of addresses that are taken.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::ids::family;
use crate::observed::Family;

/// Addresses of one family, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

impl Range {
    /// `192.0.2.0/24` (from the address as it is written: host bits count, as in PureLB), `192.0.2.1-192.0.2.9`
    /// (spaces around the dash are allowed), or one address.
    ///
    /// # Errors
    /// What is wrong with the text, as the end of a sentence that begins with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let address = |part: &str| {
            let ip: IpAddr = part.trim().parse().map_err(|_| format!("{:?} is no address", part.trim()))?;
            match ip {
                IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err(format!("{ip} must be written as IPv4")),
                _ => Ok(ip),
            }
        };
        let (first, last) = if let Some((from, to)) = text.split_once('-') {
            (address(from)?, address(to)?)
        } else if text.contains('/') {
            let net: IpNet = text.trim().parse().map_err(|_| "is no network in CIDR form".to_owned())?;
            (address(&net.addr().to_string())?, net.broadcast())
        } else {
            (address(text)?, address(text)?)
        };
        if family(first) != family(last) {
            return Err("begins and ends in different families".to_owned());
        }
        if first > last {
            return Err("ends before it begins".to_owned());
        }
        Ok(Self { first, last })
    }

    /// Of which family.
    #[must_use]
    pub const fn family(&self) -> Family {
        family(self.first)
    }

    /// The address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.first <= ip && ip <= self.last
    }

    /// Both ends lie in the network.
    #[must_use]
    pub fn is_within(&self, net: &IpNet) -> bool {
        net.contains(&self.first) && net.contains(&self.last)
    }

    /// What both have, if anything.
    #[must_use]
    pub fn common(&self, other: &Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (family(first) == family(last) && first <= last).then_some(Self { first, last })
    }

    /// How many addresses; `i64::MAX` when more, so that it fits a status (PureLB's sizes of IPv6 ranges wrap).
    #[must_use]
    pub fn size(&self) -> i64 {
        let count = (number(self.last) - number(self.first)).saturating_add(1);
        i64::try_from(count).unwrap_or(i64::MAX)
    }

    /// The entries of a map whose addresses are in it.
    pub fn slice<'a, T>(&self, map: &'a BTreeMap<IpAddr, T>) -> impl Iterator<Item = (&'a IpAddr, &'a T)> + use<'a, T> {
        map.range(self.first..=self.last)
    }

    /// The first address that is in none of the sets.
    #[must_use]
    pub fn first_free(&self, taken: &[&Taken]) -> Option<IpAddr> {
        let mut candidate = self.first;
        while candidate <= self.last {
            match taken.iter().filter_map(|set| set.until(candidate)).max() {
                None => return Some(candidate),
                Some(last) => candidate = next(last)?,
            }
        }
        None
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// A set of addresses, kept as stretches without a gap: to find a free one costs as much as there are gaps before it,
/// however large the range is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken(BTreeMap<IpAddr, IpAddr>);

impl Taken {
    /// Adds one address.
    pub fn add(&mut self, ip: IpAddr) {
        self.add_range(Range { first: ip, last: ip });
    }

    /// Adds a range.
    pub fn add_range(&mut self, range: Range) {
        let Range { mut first, mut last } = range;
        // Stretches that touch it or lie in it become one with it.
        let reach = next(last).unwrap_or(last);
        let touching: Vec<_> = self
            .0
            .range(..=reach)
            .rev()
            .take_while(|(_, end)| **end >= first || next(**end) == Some(first))
            .map(|(begin, end)| (*begin, *end))
            .collect();
        for (begin, end) in touching {
            self.0.remove(&begin);
            (first, last) = (first.min(begin), last.max(end));
        }
        self.0.insert(first, last);
    }

    /// Takes one address out.
    pub fn remove(&mut self, ip: IpAddr) {
        let Some((&begin, &end)) = self.0.range(..=ip).next_back().filter(|(_, end)| **end >= ip) else { return };
        self.0.remove(&begin);
        if let Some(before) = previous(ip).filter(|before| *before >= begin && begin < ip) {
            self.0.insert(begin, before);
        }
        if let Some(after) = next(ip).filter(|after| *after <= end && ip < end) {
            self.0.insert(after, end);
        }
    }

    /// The address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.until(ip).is_some()
    }

    /// Its stretches.
    pub fn ranges(&self) -> impl Iterator<Item = Range> {
        self.0.iter().map(|(first, last)| Range { first: *first, last: *last })
    }

    /// The end of the stretch that the address is in.
    fn until(&self, ip: IpAddr) -> Option<IpAddr> {
        self.0.range(..=ip).next_back().map(|(_, end)| *end).filter(|end| *end >= ip)
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn next(ip: IpAddr) -> Option<IpAddr> {
    Some(match ip {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().checked_add(1)?).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().checked_add(1)?).into(),
    })
}

fn previous(ip: IpAddr) -> Option<IpAddr> {
    Some(match ip {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().checked_sub(1)?).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().checked_sub(1)?).into(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn range(text: &str) -> Range {
        Range::parse(text).unwrap()
    }

    /// Sections 11.7 and 11.17: sizes that saturate; ranges that are none.
    #[test]
    fn ranges_are_read() {
        let rows = [
            ("192.0.2.0/24", "192.0.2.0-192.0.2.255", 256),
            ("192.0.2.5/24", "192.0.2.5-192.0.2.255", 251),
            ("192.0.2.7/32", "192.0.2.7-192.0.2.7", 1),
            ("192.0.2.1 - 192.0.2.9", "192.0.2.1-192.0.2.9", 9),
            ("192.0.2.9", "192.0.2.9-192.0.2.9", 1),
            ("0.0.0.0/0", "0.0.0.0-255.255.255.255", 1 << 32),
            ("2001:db8::/120", "2001:db8::-2001:db8::ff", 256),
            // PureLB's size of an exact /64 wraps to 0, and that of a larger one to less than nothing.
            ("2001:db8::/65", "2001:db8::-2001:db8::7fff:ffff:ffff:ffff", i64::MAX),
            ("2001:db8::/64", "2001:db8::-2001:db8::ffff:ffff:ffff:ffff", i64::MAX),
            ("::/0", "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", i64::MAX),
        ];
        for (text, want, size) in rows {
            let range = Range::parse(text).unwrap();
            assert_eq!((range.to_string().as_str(), range.size()), (want, size), "{text}");
        }
        for (text, want) in [
            ("192.0.2.9-192.0.2.1", "ends before"),
            ("192.0.2.1-2001:db8::1", "different families"),
            ("192.0.2.1-", "is no address"),
            ("192.0.2.1/33", "no network"),
            ("::ffff:192.0.2.1", "written as IPv4"),
            ("::ffff:192.0.2.1-::ffff:192.0.2.9", "written as IPv4"),
            ("", "is no address"),
            ("web", "is no address"),
        ] {
            let error = Range::parse(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_common_is_so_from_both_sides() {
        let rows = [
            ("192.0.2.0/24", "192.0.2.10-192.0.2.20", Some("192.0.2.10-192.0.2.20")),
            ("192.0.2.0-192.0.2.9", "192.0.2.9-192.0.2.20", Some("192.0.2.9-192.0.2.9")),
            ("192.0.2.0-192.0.2.9", "192.0.2.10-192.0.2.20", None),
            ("0.0.0.0/0", "::/0", None),
        ];
        for (a, b, want) in rows {
            for (a, b) in [(a, b), (b, a)] {
                assert_eq!(range(a).common(&range(b)), want.map(range), "{a} and {b}");
            }
        }
    }

    /// Against a plain set.
    #[test]
    fn a_set_of_stretches_is_a_set() {
        let whole = range("255.255.255.192-255.255.255.255");
        let at = |i: u32| IpAddr::from(Ipv4Addr::from_bits(u32::MAX - 63 + i));
        let (mut set, mut plain) = (Taken::default(), BTreeSet::new());
        let mut seed = 1_u32;
        for step in 0..20_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (i, j) = ((seed >> 8) % 64, (seed >> 16) % 64);
            if seed >> 30 == 0 && i <= j && j < i + 4 {
                set.add_range(Range { first: at(i), last: at(j) });
                plain.extend(i..=j);
            } else if seed >> 31 == 0 {
                set.add(at(i));
                plain.insert(i);
            } else {
                set.remove(at(i));
                plain.remove(&i);
            }
            let free = (0..64).find(|i| !plain.contains(i)).map(at);
            assert_eq!(whole.first_free(&[&set]), free, "step {step}: {set:?}");
            assert!((0..64).all(|i| set.until(at(i)).is_some() == plain.contains(&i)), "step {step}: {set:?}");
            let ends: Vec<_> = set.0.iter().collect();
            assert!(ends.windows(2).all(|w| next(*w[0].1).unwrap() < *w[1].0), "step {step}: not one stretch: {set:?}");
        }
    }
}
