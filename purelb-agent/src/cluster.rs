//! A Kubernetes API server as the source.
//!
//! `connect` finds it, `watch` lists and watches each kind and sends [`News`] of what it sees, `store` holds the
//! objects as they were seen last, and [`Cluster`] makes this node's world of them. While the API server is away what
//! was seen stays; `hearing` finds out whether it is away from this node alone.

pub mod connect;
pub mod daemon_set;
pub mod hearing;
pub mod journal;
pub mod lease;
pub mod slots;
pub mod store;
pub mod watch;
pub mod write;

use std::time::Instant;

use purelb_plan::problem::Problem;
use purelb_plan::world::World;

use crate::source::convert::{Converter, Whose};
use hearing::Hearing;
use store::Store;
use watch::News;

#[cfg(test)]
mod tests;

/// A cluster as this node's world.
#[derive(Debug)]
pub struct Cluster {
    store: Store,
    pub(crate) converter: Converter,
    hearing: Option<Hearing>,
    /// All is being listed anew.
    renewing: bool,
}

impl Cluster {
    /// Nothing is seen yet.
    #[must_use]
    pub fn new(node: &str, kinds: &[watch::Watched], install: Option<String>) -> Self {
        let converter = Converter::new(node, Whose::Signed, install);
        Self { store: Store::new(kinds), converter, hearing: None, renewing: false }
    }

    /// The same, which no more announces what it knows when it alone is deaf.
    #[must_use]
    pub fn with_hearing(self, hearing: Option<Hearing>) -> Self {
        Self { hearing, ..self }
    }

    /// It was deaf for too long: the watches are to begin anew.
    pub fn renews(&mut self) -> bool {
        let renews = !self.renewing && self.hearing.as_ref().is_some_and(Hearing::is_back);
        if renews {
            self.renewing = true;
            self.store.renew();
        }
        renews
    }

    /// What it knows is older than what other nodes know: it says nothing to routers.
    #[must_use]
    pub fn is_mute(&self) -> bool {
        self.hearing.as_ref().is_some_and(Hearing::is_alone)
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
        if let Some(hearing) = &self.hearing {
            hearing.others(&self.converter.world().node_addresses);
            if self.renewing && self.store.is_renewed(Instant::now()) {
                self.renewing = false;
                hearing.recover();
            }
        }
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
        problems.extend(self.hearing.as_ref().and_then(Hearing::problem));
        problems
    }
}
