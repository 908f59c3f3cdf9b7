//! Where the objects come from: a folder of the very same YAML a cluster has, or a cluster (`crate::cluster`).
//!
//! Both hold [`Objects`] (`objects`, `node_agent`), `convert` makes a [`World`] of them, and `claim` is how the
//! allocator sees them. Of the folder, `walk` finds the files, `read` and `parse` make objects of them, `dir` remembers
//! which file holds which, and what Kubernetes would keep in `status` is in `state`. A fault stays with its document or
//! object, and a change costs what it changes: see [`Look`].

pub mod claim;
pub mod convert;
pub mod dir;
pub mod estate;
pub mod look;
pub mod node_agent;
pub mod objects;
pub mod parse;
mod read;
pub mod state;
mod walk;
pub mod watch;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use purelb_plan::problem::Problem;
use purelb_plan::world::World;

use parse::{Found, Key, Kind};
use state::ServiceState;

use crate::cluster::Cluster;

#[cfg(test)]
mod tests;

pub use look::Look;

/// What the host says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// kube-proxy serves it.
    pub kube_proxy: bool,
    /// It carried connections to its VIPs before.
    pub live: bool,
    /// No program hangs anywhere, and none shall.
    pub detached: bool,
}

/// Objects by their keys.
pub trait Objects {
    /// The one that counts.
    fn get(&self, key: &Key) -> Option<&Arc<Found>>;
    /// All of a kind.
    fn all(&self, kind: Kind) -> Box<dyn Iterator<Item = (&Key, &Arc<Found>)> + '_>;
    /// What stands beside a Service instead of in its status.
    fn state(&self, service: &str) -> Option<&ServiceState>;
}

/// This node's source.
#[derive(Debug)]
pub enum Source {
    /// Files.
    Folder(Box<Folder>),
    /// A Kubernetes API server.
    Cluster(Box<Cluster>),
}

impl Source {
    /// Takes in what may have changed.
    pub fn look(&mut self, look: &Look) {
        match self {
            Self::Folder(folder) => drop(folder.look(look)),
            Self::Cluster(cluster) => cluster.look(),
        }
    }

    /// What the host says of itself, its own addresses and the networks for local ones beside it.
    pub fn host(&mut self, addresses: &BTreeSet<IpAddr>, local_networks: &BTreeSet<IpNet>, host: Host) {
        match self {
            Self::Folder(folder) => folder.converter.host(addresses, local_networks, host),
            Self::Cluster(cluster) => cluster.converter.host(addresses, local_networks, host),
        }
    }

    /// The world; `None` before the first list, from which nothing may be concluded (D18).
    #[must_use]
    pub fn world(&self) -> Option<&World> {
        match self {
            Self::Folder(folder) => folder.world(),
            Self::Cluster(cluster) => cluster.world(),
        }
    }

    /// Whether what tells of its changes is to begin anew.
    pub fn renews(&mut self) -> bool {
        match self {
            Self::Folder(_) => false,
            Self::Cluster(cluster) => cluster.renews(),
        }
    }

    /// What it knows is too old to be said to routers.
    #[must_use]
    pub fn is_mute(&self) -> bool {
        matches!(self, Self::Cluster(cluster) if cluster.is_mute())
    }

    /// What is wrong with files and objects now.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Folder(folder) => folder.problems(),
            Self::Cluster(cluster) => cluster.problems(),
        }
    }
}

/// A folder of manifests as this node's world.
#[derive(Debug)]
pub struct Folder {
    dir: dir::Dir,
    state: state::State,
    converter: convert::Converter,
}

impl Folder {
    /// Nothing is read yet. The state folder may lie inside `root`.
    #[must_use]
    pub fn new(root: &Path, state: &Path, node: &str) -> Self {
        let converter = convert::Converter::new(node, convert::Whose::OfClass, None);
        Self { dir: dir::Dir::new(root, state), state: state::State::new(state), converter }
    }

    /// Reads what may have changed; the names of the Services of the world that came, went or differ.
    pub fn look(&mut self, look: &Look) -> BTreeSet<String> {
        let mut changed = self.dir.scan(look);
        changed.extend(self.state.scan(look).into_iter().map(|name| (Kind::Service, name)));
        self.converter.unread(self.dir.is_unread());
        self.converter.update(&Files { dir: &self.dir, state: &self.state }, &changed)
    }

    /// The world; `None` before the first list, from which nothing may be concluded (D18).
    #[must_use]
    pub fn world(&self) -> Option<&World> {
        (!self.dir.is_empty()).then(|| self.converter.world())
    }

    /// What is wrong with files and objects now.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.dir.problems();
        problems.extend(self.state.problems());
        problems.extend(self.converter.problems());
        problems
    }
}

/// The folder's objects.
struct Files<'a> {
    dir: &'a dir::Dir,
    state: &'a state::State,
}

impl Objects for Files<'_> {
    fn get(&self, key: &Key) -> Option<&Arc<Found>> {
        self.dir.get(key)
    }

    fn all(&self, kind: Kind) -> Box<dyn Iterator<Item = (&Key, &Arc<Found>)> + '_> {
        Box::new(self.dir.all(kind))
    }

    fn state(&self, service: &str) -> Option<&ServiceState> {
        self.state.service(service).map(|state| &**state)
    }
}
