//! Which networks nodes have that are alive, as their Leases say (`purelb.io/subnets`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use crate::source::Objects;
use crate::source::objects::Lease;
use crate::source::parse::{Kind, Object};

/// Annotation of a Lease: networks with commas.
const SUBNETS: &str = "purelb.io/subnets";
/// What a Lease without a duration is taken to have.
const USUAL: Duration = Duration::from_secs(10);
/// As PureLB reads them: more networks of one node are ignored.
const MOST: usize = 256;

/// By Lease.
#[derive(Debug, Default)]
pub struct Networks {
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug)]
struct Node {
    until: Instant,
    subnets: BTreeSet<IpNet>,
}

impl Networks {
    /// Reads a Lease that changed. One that is renewed while we look lives by our own clock; for the first sight of one
    /// there is only the time that it names.
    pub fn read(&mut self, objects: &dyn Objects, name: &str) {
        let found = objects.get(&(Kind::Lease, name.to_owned()));
        let Some(Object::Lease(lease)) = found.map(|found| &found.object) else {
            self.nodes.remove(name);
            return;
        };
        let duration = lease.spec.lease_duration_seconds.map_or(USUAL, |seconds| Duration::from_secs(seconds.into()));
        let is_new = !self.nodes.contains_key(name);
        let age = if is_new { age(lease, Timestamp::now()) } else { Duration::ZERO };
        let until = Instant::now() + duration.saturating_sub(age);
        self.nodes.insert(name.to_owned(), Node { until, subnets: subnets(lease) });
    }

    /// Those of nodes that are alive.
    #[must_use]
    pub fn alive(&self, now: Instant) -> BTreeSet<IpNet> {
        self.nodes.values().filter(|node| node.until > now).flat_map(|node| &node.subnets).copied().collect()
    }
}

fn age(lease: &Lease, now: Timestamp) -> Duration {
    let renewed = lease.spec.renew_time.as_ref().and_then(|text| text.parse::<Timestamp>().ok());
    // A clock that is ahead of ours makes it no younger than now.
    renewed.map_or(Duration::MAX, |at| now.duration_since(at).try_into().unwrap_or(Duration::ZERO))
}

fn subnets(lease: &Lease) -> BTreeSet<IpNet> {
    let text = lease.metadata.annotations.get(SUBNETS).map(String::as_str).unwrap_or_default();
    text.split(',').filter_map(|net| net.trim().parse::<IpNet>().ok()).map(|net| net.trunc()).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::objects::{LeaseSpec, Meta};

    fn lease(subnets: &str, renewed: Option<&str>) -> Lease {
        let annotations = [(SUBNETS.to_owned(), subnets.to_owned())].into();
        let spec = LeaseSpec { lease_duration_seconds: Some(10), renew_time: renewed.map(str::to_owned) };
        Lease { metadata: Meta { annotations, ..Meta::default() }, spec }
    }

    #[test]
    fn what_a_lease_says() {
        let rows =
            [("192.0.2.0/24,2001:db8::/64", 2), ("192.0.2.7/24, 192.0.2.0/24", 1), ("x,192.0.2.0/33,,", 0), ("", 0)];
        for (text, count) in rows {
            assert_eq!(subnets(&lease(text, None)).len(), count, "{text}");
        }
        let many: Vec<_> = (0..10_000).map(|n| format!("10.{}.{}.0/24", n / 256, n % 256)).collect();
        assert_eq!(subnets(&lease(&many.join(","), None)).len(), MOST);
    }

    #[test]
    fn how_old_it_is() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let rows = [
            (Some("2026-01-01T00:00:58.000000Z"), Duration::from_secs(2)),
            (Some("2026-01-01T00:02:00Z"), Duration::ZERO),
            (Some("yesterday"), Duration::MAX),
            (None, Duration::MAX),
        ];
        for (renewed, want) in rows {
            assert_eq!(age(&lease("", renewed), now), want, "{renewed:?}");
        }
    }
}
