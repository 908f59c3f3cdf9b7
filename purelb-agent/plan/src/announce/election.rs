//! PureLB's election: which of the nodes that live should answer for an address. Every node computes it for itself, and
//! PureLB's agents compute the same (`reference/purelb-spec.md` 5.3).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

/// A node's lot for an address; the smallest wins.
pub type Score = [u8; 32];

/// Which nodes should be elected before others, by where the Service's endpoints are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// All nodes alike.
    #[default]
    None,
    /// These, if any of them stands (`purelb.io/node-affinity: service-endpoints`).
    Prefer(BTreeSet<String>),
    /// Only these (externalTrafficPolicy Local: the nodes with a ready endpoint).
    Only(BTreeSet<String>),
}

/// One node's lots, remembered: a hash costs more than an election among the few that stand.
#[derive(Clone, Debug, Default)]
pub struct Lots {
    node: String,
    known: BTreeMap<IpAddr, Score>,
}

/// What an election came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// Who should answer; nobody when no candidate is eligible.
    pub winner: Option<&'a str>,
    /// Who would, if all nodes were alike.
    pub plain: Option<&'a str>,
    /// There was a preference and none of the preferred stands (PureLB's `affinity_fallback`).
    pub fallback: bool,
}

/// SHA-256 of `node#address`, the address as Go writes it: an IPv4 address inside IPv6 as IPv4.
#[must_use]
pub fn score(node: &str, ip: IpAddr) -> Score {
    Sha256::digest(format!("{node}#{}", ip.to_canonical())).into()
}

impl Lots {
    /// Of this node, none known yet.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), known: BTreeMap::new() }
    }

    /// Remembers those of these addresses and forgets all others.
    pub fn remember(&mut self, ips: &BTreeSet<IpAddr>) {
        if self.known.len() != ips.len() || !ips.iter().all(|ip| self.known.contains_key(ip)) {
            self.known = ips.iter().map(|ip| (*ip, self.of(*ip))).collect();
        }
    }

    /// The lot for an address.
    #[must_use]
    pub fn of(&self, ip: IpAddr) -> Score {
        self.known.get(&ip).copied().unwrap_or_else(|| score(&self.node, ip))
    }
}

/// Elects among nodes with their scores for the address: the live ones with a subnet that contains it.
pub fn elect<'a>(candidates: impl Iterator<Item = (&'a str, Score)>, preference: &Preference) -> Outcome<'a> {
    let mut plain: Option<(Score, &str)> = None;
    let mut preferred: Option<(Score, &str)> = None;
    let set = match preference {
        Preference::None => None,
        Preference::Prefer(set) | Preference::Only(set) => Some(set),
    };
    for (node, score) in candidates {
        let lot = (score, node);
        plain = Some(plain.map_or(lot, |least| least.min(lot)));
        if set.is_some_and(|set| set.contains(node)) {
            preferred = Some(preferred.map_or(lot, |least| least.min(lot)));
        }
    }
    let name = |lot: Option<(Score, &'a str)>| lot.map(|(_, node)| node);
    let fallback = matches!(preference, Preference::Prefer(_)) && preferred.is_none() && plain.is_some();
    let winner = match preference {
        Preference::None => plain,
        Preference::Prefer(_) => preferred.or(plain),
        Preference::Only(_) => preferred,
    };
    Outcome { winner: name(winner), plain: name(plain), fallback }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(score: Score) -> String {
        score.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn among<'a>(nodes: &[&'a str], ip: &str, preference: &Preference) -> Outcome<'a> {
        let ip = ip.parse().unwrap();
        elect(nodes.iter().map(|node| (*node, score(node, ip))), preference)
    }

    /// By Python's hashlib.
    #[test]
    fn scores_are_purelbs() {
        for (node, ip, want) in [
            ("node-a", "192.0.2.10", "d4b84135501a6622f43f01422f65d768d1a4637914be8add4e31f107336b8068"),
            ("node-b", "192.0.2.10", "6e9fb809c116d8f27df8ac49a804ddcf00101a76d602d91312d91548ae06abbf"),
            ("node-c", "192.0.2.10", "39f2d7a8f2401847a848a92e8435873a10a277cabe7bc275e797deb43bd7cd0c"),
            ("node-a", "2001:db8::1", "3c9f88a7e2ef52a1c015be314124ea3ab99785b842ce9ee37afdf6470837efbe"),
            ("node-c", "2001:DB8:0::1", "bb833059784d34c0c3dfacf003bec741b65be19b7102e7316af458b26d6ed31a"),
            ("node-a", "::ffff:192.0.2.10", "d4b84135501a6622f43f01422f65d768d1a4637914be8add4e31f107336b8068"),
            ("n", "::1.2.3.4", "e8eb5aefd8be69d99a62552b3a1214109e25b10fbff2886b39bfc1db548f6d5a"),
        ] {
            assert_eq!(hex(score(node, ip.parse().unwrap())), want, "{node} {ip}");
        }
    }

    #[test]
    fn the_least_score_wins() {
        let all = ["node-a", "node-b", "node-c", "node-d"];
        for (ip, want) in [
            ("192.0.2.10", "node-d"),
            ("192.0.2.12", "node-b"),
            ("192.0.2.13", "node-c"),
            ("2001:db8::1", "node-d"),
            ("2001:db8:0:1::a", "node-b"),
        ] {
            let outcome = among(&all, ip, &Preference::None);
            assert_eq!((outcome.winner, outcome.plain, outcome.fallback), (Some(want), Some(want), false), "{ip}");
        }
        assert_eq!(among(&[], "192.0.2.10", &Preference::None).winner, None);
    }

    #[test]
    fn preferred_ones_first() {
        let all = ["node-a", "node-b", "node-c"];
        let set = |nodes: &[&str]| nodes.iter().map(|node| (*node).to_owned()).collect::<BTreeSet<_>>();
        let ip = "192.0.2.10";
        let outcome = among(&all, ip, &Preference::Prefer(set(&["node-a", "node-b"])));
        assert_eq!((outcome.winner, outcome.plain, outcome.fallback), (Some("node-b"), Some("node-c"), false));
        let outcome = among(&all, ip, &Preference::Prefer(set(&["node-z"])));
        assert_eq!((outcome.winner, outcome.fallback), (Some("node-c"), true));
        assert_eq!(among(&all, ip, &Preference::Only(set(&["node-a"]))).winner, Some("node-a"));
        assert_eq!(among(&all, ip, &Preference::Only(set(&[]))).winner, None);
    }
}
