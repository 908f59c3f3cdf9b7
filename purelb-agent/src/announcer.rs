//! Local addresses: who of the nodes answers for them, and having them on this node's interfaces.
//!
//! ```text
//! keeper ── Wish (wants, networks) ──> election ── Owner (plan) ──> Leases (registry: API server or folder)
//!   ^                                     │ thread and runtime of its own: nothing else is waited for there
//!   │                                     ├──> FENCE of the data path
//!   │                                     └── Order (hold, withdraw) ──> links ──> netlink, GARP
//!   └────────── State, what is on the links <──────────────────────────────┘
//! ```
//! The election decides by what is proven, `links` does what it is told, and the keeper tells both what there is.

mod clock;
mod election;
mod files;
mod kube_leases;
mod links;
mod neighbours;
mod registry;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use purelb_plan::announce::owner::{OnApiLoss, Stop, Want};
use purelb_plan::world::{AddressOptions, Garp};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::args;
use crate::metrics::Announcing;
use crate::net::NetError;
use crate::net::local::Networks;

pub use links::Held;
pub use registry::PREFIX;

/// Where the Leases of the nodes are.
#[derive(Clone, Debug)]
pub enum Place {
    /// An API server.
    Kube(args::Kube),
    /// The folder for what Kubernetes would keep in status.
    Folder(PathBuf),
}

/// Who this node is, and its times.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Node name.
    pub node: String,
    /// UID of the pod, or empty.
    pub instance: String,
    /// Where the Leases are.
    pub place: Place,
    /// How long a Lease runs, in milliseconds.
    pub duration: u64,
    /// How long after a stop for an upgrade, in milliseconds.
    pub hold: u64,
    /// What to do when no renewal is acknowledged.
    pub on_api_loss: OnApiLoss,
    /// Where the data path's maps are.
    pub bpf_root: PathBuf,
}

/// What the keeper knows of local addresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// The addresses; none before the first list.
    pub wants: Option<BTreeMap<IpAddr, Want>>,
    /// The networks of the interfaces that they go on. Empty: the node has no part in it.
    pub networks: Networks,
    /// The tables are right, and the node forwards.
    pub ready: bool,
    /// Kernel options.
    pub options: AddressOptions,
    /// How they are made known.
    pub garp: Option<Garp>,
    /// IPv6 addresses that are taken without a look for duplicates.
    pub skip_dad: BTreeSet<IpAddr>,
    /// Interfaces where the data path keeps the fence; elsewhere the kernel's lifetimes do.
    pub fenced: BTreeSet<u32>,
}

/// How the election stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// `looking`, `entering`, `in`, ...
    pub phase: &'static str,
    /// The networks in which it stands, as its Lease says.
    pub subnets: usize,
    /// Nodes that live, this one among them.
    pub members: usize,
    /// Agents of PureLB's among them: with those one owner is likely and not proven.
    pub purelbs: usize,
    /// Why its Lease cannot be written or read now.
    pub fault: Option<String>,
    /// Other nodes whose Leases are odd, and how.
    pub odd: BTreeMap<String, String>,
    /// Nodes that are silent and whose Lease cannot be revoked, and why.
    pub stuck: BTreeMap<String, String>,
    /// Addresses that nobody has, since a Lease has no room for their claims.
    pub unclaimed: usize,
}

/// What the election tells `links`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    /// The election begins, with these of ours on interfaces. Before that nothing is touched.
    Begin(BTreeSet<IpAddr>),
    /// Have it.
    Hold(IpAddr),
    /// Have it no more, and say when it is gone.
    Withdraw(IpAddr),
    /// The Lease was renewed: where no data path keeps the fence an address may live until then, in milliseconds of the
    /// clock.
    Live(u64),
}

/// The keeper's end of it. Ends with it.
#[derive(Debug)]
pub struct Announcer {
    wish: watch::Sender<Arc<Wish>>,
    stop: mpsc::UnboundedSender<Stop>,
    links: JoinHandle<()>,
    /// How the election stands.
    pub state: watch::Receiver<State>,
    /// What is on the interfaces.
    pub held: watch::Receiver<BTreeMap<IpAddr, Held>>,
}

/// The election or its interfaces ended by themselves.
#[derive(Debug, thiserror::Error)]
#[error("the election of local addresses ended by itself")]
pub struct Ended;

/// Nobody waits longer for the end, though the protocol's own patience is shorter.
const PATIENCE: Duration = Duration::from_secs(8);

impl Announcer {
    /// Begins: addresses of ours that are there are taken over once it is clear that no other agent has them.
    ///
    /// # Errors
    /// The network cannot be read, or there is no thread to be had.
    pub fn start(settings: Settings, metrics: &Announcing) -> Result<Self, NetError> {
        let (wish, wishes) = watch::channel(Arc::<Wish>::default());
        let (orders, ordered) = mpsc::unbounded_channel();
        let (withdrawn, gone) = mpsc::unbounded_channel();
        let (stop, stops) = mpsc::unbounded_channel();
        let (reports, held) = watch::channel(BTreeMap::new());
        let lines = links::Lines {
            wishes: wishes.clone(),
            orders: ordered,
            gone: withdrawn,
            reports,
            metrics: metrics.clone(),
        };
        let links = tokio::spawn(links::Links::new(&settings.node, lines)?.run());
        let (states, state) = watch::channel(State::default());
        let lines = election::Lines { wishes, orders, gone, stops, states, metrics: metrics.clone() };
        election::spawn(settings, lines)?;
        Ok(Self { wish, stop, links, state, held })
    }

    /// Says what there is now.
    pub fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|old| {
            let differs = **old != wish;
            if differs {
                *old = Arc::new(wish);
            }
            differs
        });
    }

    /// Resolves when the election or the interfaces changed.
    ///
    /// # Errors
    /// One of them ended, which it never should: what is held is nobody's to let go.
    pub async fn changed(&mut self) -> Result<(), Ended> {
        let changed = tokio::select! {
            changed = self.state.changed() => changed,
            changed = self.held.changed() => changed,
        };
        changed.map_err(|_| Ended)
    }

    /// Leaves the election, as it is told, and waits until that is done.
    pub async fn stop(&mut self, how: Stop) {
        if self.stop.send(how).is_ok() {
            let ended = async {
                while self.state.changed().await.is_ok() {}
                // What the election said last is still to be done on the interfaces.
                (&mut self.links).await
            };
            if tokio::time::timeout(PATIENCE, ended).await.is_err() {
                tracing::warn!(op = "leaveElection", "the election did not end in time; its Lease runs out");
            }
        }
    }
}
