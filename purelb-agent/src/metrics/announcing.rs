//! Metrics of who announces what, by PureLB's names (`election_*` and `lbnodeagent_*`). Unlike PureLB's they count what was
//! done, not how often it was looked at.

use std::sync::atomic::AtomicI64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Number = Gauge<i64, AtomicI64>;

/// What is announced for whom.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct Announced {
    /// `namespace/name`
    pub service: String,
    /// This node.
    pub node: String,
    /// The address.
    pub ip: String,
}

/// Of a node; clones count together.
#[derive(Clone, Debug, Default)]
pub struct Announcing {
    /// 1: its Lease is renewed in time.
    pub lease_healthy: Number,
    /// Renewals and other writes of Leases.
    pub renewals: Counter,
    /// Those that were refused or not answered.
    pub renewal_failures: Counter,
    /// Nodes that live.
    pub members: Number,
    /// Networks in which this node stands.
    pub local_subnets: Number,
    /// Addresses that it came to answer for.
    pub wins: Counter,
    /// Addresses that it had to leave.
    pub losses: Counter,
    /// Addresses added to interfaces.
    pub additions: Counter,
    /// Addresses taken away.
    pub withdrawals: Counter,
    /// Lifetimes renewed.
    pub address_renewals: Counter,
    /// What the kernel refused of that.
    pub address_renewal_errors: Counter,
    /// Gratuitous ARP sent (requests and replies together are one).
    pub garp_sent: Counter,
    /// Unsolicited advertisements sent.
    pub na_sent: Counter,
    /// Claims of somebody else's for an address that is here.
    pub conflicts: Counter,
    /// Local addresses on interfaces.
    pub announced: Family<Announced, Number>,
}

impl Announcing {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let out = Self::default();
        registry.register("election_lease_healthy", "1 while this node's Lease is renewed", out.lease_healthy.clone());
        registry.register("election_lease_renewals", "Writes of Leases", out.renewals.clone());
        registry.register(
            "election_lease_renewal_failures",
            "Writes of Leases that failed",
            out.renewal_failures.clone(),
        );
        registry.register("election_member_count", "Nodes that live", out.members.clone());
        registry.register(
            "election_local_subnet_count",
            "Networks in which this node stands",
            out.local_subnets.clone(),
        );
        registry.register("lbnodeagent_election_wins", "Addresses that this node came to have", out.wins.clone());
        registry.register("lbnodeagent_election_losses", "Addresses that this node left", out.losses.clone());
        registry.register("lbnodeagent_address_additions", "Local addresses added", out.additions.clone());
        registry.register("lbnodeagent_address_withdrawals", "Local addresses taken away", out.withdrawals.clone());
        registry.register("lbnodeagent_address_renewals", "Lifetimes renewed", out.address_renewals.clone());
        let errors = out.address_renewal_errors.clone();
        registry.register("lbnodeagent_address_renewal_errors", "Renewals that the kernel refused", errors);
        registry.register("lbnodeagent_garp_sent", "Gratuitous ARP", out.garp_sent.clone());
        registry.register("lbnodeagent_na_sent", "Unsolicited neighbour advertisements", out.na_sent.clone());
        registry.register("lbnodeagent_address_conflicts", "Claims of others for an address", out.conflicts.clone());
        registry.register("lbnodeagent_announced", "Local addresses on interfaces", out.announced.clone());
        out
    }
}
