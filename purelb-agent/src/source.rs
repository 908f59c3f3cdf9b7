//! The folder source: the very same YAML a cluster has, read from files.
//!
//! `walk` finds the files, `read` and `parse` make objects (`objects`, `node_agent`) of them, `dir`
//! remembers which file holds which, `convert` makes a [`World`] of them. What Kubernetes would keep in `status`
//! is in `state`; `claim` is how the allocator sees the same objects. A fault stays with its document or object,
//! and a change costs what it changes: see [`Look`].

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

use purelb_plan::problem::Problem;
use purelb_plan::world::World;

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
        let converter = convert::Converter::new(node);
        Self { dir: dir::Dir::new(root, state), state: state::State::new(state), converter }
    }

    /// Reads what may have changed; the names of the Services of the world that came, went or differ.
    pub fn look(&mut self, look: &Look) -> BTreeSet<String> {
        let mut changed = self.dir.scan(look);
        changed.extend(self.state.scan(look).into_iter().map(|name| (parse::Kind::Service, name)));
        self.converter.unread(self.dir.is_unread());
        self.converter.update(&self.dir, &self.state, &changed)
    }

    /// What the host says of itself, its own addresses beside it.
    pub fn host(&mut self, addresses: &BTreeSet<IpAddr>, host: Host) {
        self.converter.host(addresses, host);
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
