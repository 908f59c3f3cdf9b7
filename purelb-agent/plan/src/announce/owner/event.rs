//! What the shells tell the owner, and what it asks of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::announce::election::Preference;
use crate::announce::lease::{Lease, Statement};

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time passed: [`due`](super::Owner::due) was reached.
    Tick,
    /// A watch showed a Lease, ours among them.
    Observed(Lease),
    /// A watch showed that a Lease was deleted; the version is that of the deletion.
    Deleted {
        /// Whose.
        node: String,
        /// `metadata.resourceVersion` of the event.
        version: u64,
        /// Its last version, if the event bears it: that it was released may not have been seen otherwise.
        last: Option<Lease>,
    },
    /// The answer to [`Effect::Read`].
    Read {
        /// Whose Lease.
        node: String,
        /// What was found.
        found: Found,
    },
    /// The answer to [`Effect::List`]: the version of the list and all Leases of nodes; none when it failed.
    Listed(Option<(u64, Vec<Lease>)>),
    /// The answer to [`Effect::Create`], [`Effect::Renew`] or [`Effect::Delete`]: exactly one each.
    Written(Written),
    /// The answer to [`Effect::Revoke`]: exactly one each.
    Revoked {
        /// Whose Lease.
        node: String,
        /// What became of it.
        result: Written,
    },
    /// Which local addresses there are, all of them.
    Wants(BTreeMap<IpAddr, Want>),
    /// The networks that the node's interfaces have, all of them. None while a label keeps the node out.
    Subnets(BTreeSet<IpNet>),
    /// Tables are programmed and the node forwards: it may stand for election.
    Ready,
    /// An address that was asked to be withdrawn is on no interface any more.
    Withdrawn(IpAddr),
    /// SIGTERM.
    Stop(Stop),
}

/// What the owner asks for, to be done in this order. A [`Effect::Withdraw`] may take its time, since it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// List all Leases of nodes, consistently and not from a cache.
    List,
    /// Read a Lease, consistently.
    Read {
        /// Whose.
        node: String,
    },
    /// Create the own Lease; it must not be there.
    Create(Box<Statement>),
    /// Replace what the own Lease says, if it is still this version.
    Renew {
        /// What it says from now on.
        says: Box<Statement>,
        /// `metadata.resourceVersion` that it must have.
        version: u64,
    },
    /// Write [`REVOKED`](crate::announce::lease::REVOKED) into another node's Lease, if it is still this version.
    Revoke {
        /// Whose.
        node: String,
        /// `metadata.resourceVersion` that it must have.
        version: u64,
    },
    /// Delete the own Lease, if it is still this version.
    Delete {
        /// `metadata.resourceVersion` that it must have.
        version: u64,
    },
    /// Put the address on its interface and answer for it.
    Hold(IpAddr),
    /// Take the address away, then say so.
    Withdraw(IpAddr),
    /// Answer for local addresses until then: milliseconds of the clock that `now` is of.
    Fence(u64),
    /// The process may end.
    Stopped,
}

/// A local address that a Service has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// Which nodes should have it first.
    pub preference: Preference,
    /// The node that its announcing slot names. A move away from a node of PureLB's waits until that is gone.
    pub slot: Option<String>,
}

/// What a read found.
#[derive(Clone, Debug)]
pub enum Found {
    /// The Lease.
    Lease(Lease),
    /// There is none.
    Absent,
    /// Nobody knows.
    Failed,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It was carried out.
    Done {
        /// The version that it made.
        version: u64,
        /// `metadata.uid` of the object.
        uid: String,
    },
    /// It was not: the object is another version, or there although it should not be.
    Conflict,
    /// It was not: there is no such object.
    Gone,
    /// Nobody knows; it may even be carried out later.
    Unknown,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// For an upgrade: the addresses stay, and are answered for until the next process comes, 60 s at most.
    Hold,
    /// For good: the addresses go to other nodes at once.
    HandOver,
}

/// What to do when no renewal is acknowledged any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnApiLoss {
    /// Withdraw: another node may be elected. No address has two owners.
    #[default]
    Withdraw,
    /// Go on answering as long as the process runs: if it is only this node that is cut off, an address has two owners.
    Hold,
}
