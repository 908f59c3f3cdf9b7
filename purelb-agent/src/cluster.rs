//! A Kubernetes API server as the source.
//!
//! `connect` finds it, `watch` lists and watches each kind and sends [`News`] of what it sees, `store` holds the
//! objects as they were seen last, and [`Cluster`] makes this node's world of them. While the API server is away what
//! was seen stays.

pub mod connect;
pub mod lease;
pub mod store;
pub mod watch;
pub mod write;

use std::time::Instant;

use purelb_plan::problem::Problem;
use purelb_plan::world::World;

use crate::source::convert::{Converter, Whose};
use store::Store;
use watch::News;

#[cfg(test)]
mod tests;

/// A cluster as this node's world.
#[derive(Debug)]
pub struct Cluster {
    store: Store,
    pub(crate) converter: Converter,
}

impl Cluster {
    /// Nothing is seen yet.
    #[must_use]
    pub fn new(node: &str, kinds: &[watch::Watched]) -> Self {
        Self { store: Store::new(kinds), converter: Converter::new(node, Whose::Signed) }
    }

    /// Takes in what the watches saw.
    pub fn hear(&mut self, news: Vec<News>) {
        let now = Instant::now();
        news.into_iter().for_each(|news| self.store.take(news, now));
    }

    /// Converts what changed.
    pub fn look(&mut self) {
        let changed = self.store.changed();
        self.converter.unread(self.store.is_unread());
        self.converter.update(&self.store, &changed);
    }

    /// The world; `None` before the first list of every kind that is needed (D18).
    #[must_use]
    pub fn world(&self) -> Option<&World> {
        self.store.is_listed(Instant::now()).then(|| self.converter.world())
    }

    /// What is wrong with the watches and the objects.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.store.problems(Instant::now());
        problems.extend(self.converter.problems());
        problems
    }
}
