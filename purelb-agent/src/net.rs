//! The host's network by rtnetlink: read as the agent needs it; written are the device for remote addresses, and local
//! addresses where the election says so.

mod address;
pub mod local;
mod local_addresses;
pub mod neighbour;
mod observe;
mod removal;
mod vip_device;
mod watch;

use std::collections::BTreeSet;
use std::net::IpAddr;

use purelb_plan::problem::Problem;
use purelb_plan::world::{Announcing, Datapath};

pub use local_addresses::{Added, Placing, Present, in_front};
pub use vip_device::VipDevice;
pub use watch::Netlink;

/// An interface that packets for VIPs arrive by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// `veth`, `bridge`, ...; empty for a device with a driver of its own.
    pub kind: String,
    /// MTU.
    pub mtu: u32,
    /// It is up.
    pub up: bool,
    /// Its MAC address; none where frames for another one may be its own: without Ethernet, or a port of a
    /// bridge or bond.
    pub mac: Option<[u8; 6]>,
}

/// The network at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In the order of their indices.
    pub uplinks: Vec<Uplink>,
    /// Other interfaces with a route through a gateway: replies may leave by them.
    pub exits: Vec<Uplink>,
    /// The host's own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Local addresses that we put on interfaces.
    pub held: BTreeSet<IpAddr>,
    /// Networks of the interfaces that local addresses go on (`LBNodeAgent.spec.local`).
    pub local: local::Networks,
    /// Interfaces that are in one of those networks beside the one that has it.
    pub twins: Vec<local::Twin>,
    /// Faults of `datapath.interfaces`.
    pub problems: Vec<Problem>,
    /// The settings that it was looked at with: with others it is another one.
    pub of: (Datapath, Option<Announcing>),
}

/// Netlink did not answer.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// A dump failed.
    #[error("cannot list {what} by netlink: {source}")]
    Dump {
        /// links, addresses or routes.
        what: &'static str,
        /// Why.
        source: rtnetlink::Error,
    },
    /// The socket's task ended.
    #[error("the netlink socket was closed")]
    Closed,
}
