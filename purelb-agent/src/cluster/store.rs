//! The objects of a cluster as they were seen last, and how the watches stand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use purelb_plan::problem::Problem;

use super::watch::{Fault, LATE, News, Watched};
use crate::source::Objects;
use crate::source::parse::{Found, Key, Kind, fault, label};
use crate::source::state::ServiceState;

/// An error that did not come again for so long is over: a watch that works is silent.
const OVER: Duration = Duration::from_secs(LATE.as_secs() * 3);
/// A kind is denied when it was so for so long: an API server that starts knows neither roles nor kinds for a moment.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Standing {
    needed: bool,
    /// All of it was seen once.
    listed: bool,
    /// What was seen since the list began.
    listing: Option<BTreeSet<Key>>,
    fault: Option<Trouble>,
    /// It was denied for long enough once: an API server that is away for a moment after that changes nothing.
    denied: bool,
}

#[derive(Debug)]
struct Trouble {
    fault: Fault,
    since: Instant,
    last: Instant,
}

/// The objects, and how the watches stand.
#[derive(Debug)]
pub struct Store {
    objects: BTreeMap<Key, Arc<Found>>,
    versions: BTreeMap<Key, String>,
    kinds: BTreeMap<Kind, Standing>,
    /// Objects that cannot be read, as they are now.
    broken: BTreeMap<Key, Problem>,
    changed: BTreeSet<Key>,
    /// Kinds that are to be listed anew before they count as known.
    renewing: BTreeSet<Kind>,
}

impl Store {
    /// Nothing is seen yet.
    #[must_use]
    pub fn new(kinds: &[Watched]) -> Self {
        let standing = |watched: &Watched| (watched.kind, Standing { needed: watched.needed, ..Standing::default() });
        Self {
            objects: BTreeMap::new(),
            versions: BTreeMap::new(),
            kinds: kinds.iter().map(standing).collect(),
            broken: BTreeMap::new(),
            changed: BTreeSet::new(),
            renewing: BTreeSet::new(),
        }
    }

    /// Takes in what a watch saw at `now`.
    pub fn take(&mut self, news: News, now: Instant) {
        match news {
            News::Begun(kind) => self.standing(kind).listing = Some(BTreeSet::new()),
            News::Seen(key, version, found) => {
                let standing = self.standing(key.0);
                standing.works();
                if let Some(listing) = &mut standing.listing {
                    listing.insert(key.clone());
                }
                self.versions.insert(key.clone(), version);
                self.see(key, found);
            }
            News::Gone(key) => {
                self.standing(key.0).works();
                self.lose(&key);
            }
            News::Listed(kind) => {
                self.renewing.remove(&kind);
                let standing = self.standing(kind);
                standing.listed = true;
                standing.works();
                let seen = standing.listing.take().unwrap_or_default();
                let known = self.versions.range((kind, String::new())..).map(|(key, _)| key);
                let gone: Vec<Key> =
                    known.take_while(|key| key.0 == kind).filter(|key| !seen.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| self.lose(key));
                tracing::info!(event = "listed", kind = kind.name(), objects = seen.len(), "listed");
            }
            News::Failed(kind, fault) => {
                let standing = self.standing(kind);
                if standing.fault.as_ref().is_none_or(|known| known.fault != fault) {
                    tracing::warn!(op = "watch", kind = kind.name(), error = ?fault, "cannot be watched now");
                }
                let same = |known: &&Trouble| std::mem::discriminant(&known.fault) == std::mem::discriminant(&fault);
                let since = standing.fault.as_ref().filter(same).map_or(now, |known| known.since);
                standing.denied = standing.is_denied(now);
                standing.fault = Some(Trouble { fault, since, last: now });
            }
        }
    }

    fn standing(&mut self, kind: Kind) -> &mut Standing {
        self.kinds.entry(kind).or_default()
    }

    fn see(&mut self, key: Key, found: Result<Arc<Found>, (String, String)>) {
        match found {
            Ok(found) => {
                self.broken.remove(&key);
                if self.objects.get(&key) != Some(&found) {
                    self.objects.insert(key.clone(), found);
                    self.changed.insert(key);
                }
            }
            // Its last good version counts.
            Err((field, message)) => {
                let remedy = "write the field as Kubernetes does";
                let problem = Problem { field, ..fault(&label(&key), "", message, remedy) };
                self.broken.insert(key, problem);
            }
        }
    }

    fn lose(&mut self, key: &Key) {
        self.versions.remove(key);
        self.broken.remove(key);
        if self.objects.remove(key).is_some() {
            self.changed.insert(key.clone());
        }
    }

    /// Objects that came, went or differ since the last call.
    pub fn changed(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.changed)
    }

    /// Everything that is needed was listed once, and of the rest it is known that it cannot be.
    #[must_use]
    pub fn is_listed(&self, now: Instant) -> bool {
        self.kinds.values().all(|standing| standing.listed || !standing.needed && standing.is_denied(now))
    }

    /// Whatever was listed has to be listed anew. Watches that send what they saw before must have ended.
    pub fn renew(&mut self) {
        self.kinds.values_mut().for_each(|standing| standing.listing = None);
        self.renewing = self.kinds.iter().filter(|(_, standing)| standing.listed).map(|(kind, _)| *kind).collect();
    }

    /// All of it was, or cannot be.
    #[must_use]
    pub fn is_renewed(&self, now: Instant) -> bool {
        let denied = |kind: &Kind| self.kinds.get(kind).is_some_and(|standing| standing.is_denied(now));
        self.renewing.iter().all(denied)
    }

    /// Some object was never read.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        self.broken.keys().any(|key| !self.objects.contains_key(key))
    }

    /// Its resourceVersion.
    #[must_use]
    pub fn version(&self, key: &Key) -> Option<&str> {
        self.versions.get(key).map(String::as_str)
    }

    /// What is wrong.
    #[must_use]
    pub fn problems(&self, now: Instant) -> Vec<Problem> {
        let watches = self.kinds.iter().filter_map(|(kind, standing)| standing.problem(*kind, now));
        watches.chain(self.broken.values().cloned()).collect()
    }
}

impl Standing {
    fn works(&mut self) {
        (self.fault, self.denied) = (None, false);
    }

    fn is_denied(&self, now: Instant) -> bool {
        let denied = |known: &Trouble| matches!(known.fault, Fault::Unknown | Fault::Forbidden(_));
        let long = |known: &Trouble| denied(known) && now.duration_since(known.since) >= PATIENCE;
        self.denied || self.fault.as_ref().is_some_and(long)
    }

    fn problem(&self, kind: Kind, now: Instant) -> Option<Problem> {
        let name = kind.name();
        let Trouble { fault, last, .. } = match &self.fault {
            Some(trouble) => trouble,
            None if self.listed => return None,
            None => return Some(self.waiting(name, "they were not listed yet", "wait; if it stays so see the log")),
        };
        // A kind that is denied is so until it is listed.
        if self.listed && now.duration_since(*last) > OVER {
            return None;
        }
        Some(match fault {
            Fault::Unknown => self.waiting(name, "the API server does not know them", "apply deploy/crds"),
            Fault::Forbidden(why) => self.waiting(name, why, "apply the roles of deploy/base"),
            Fault::Away(why) => self.waiting(name, why, "see whether the API server answers from this node"),
        })
    }

    fn waiting(&self, kind: &str, why: &str, remedy: &str) -> Problem {
        let rest = match (self.listed, self.needed) {
            (true, _) => "what was seen last is served",
            (false, true) => "nothing is written before",
            (false, false) => "the rest is served without them",
        };
        fault(&format!("watch of {kind}s"), "", format!("cannot be read now, {rest}: {why}"), remedy)
    }
}

impl Objects for Store {
    fn get(&self, key: &Key) -> Option<&Arc<Found>> {
        self.objects.get(key)
    }

    fn all(&self, kind: Kind) -> Box<dyn Iterator<Item = (&Key, &Arc<Found>)> + '_> {
        Box::new(self.objects.range((kind, String::new())..).take_while(move |(key, _)| key.0 == kind))
    }

    fn state(&self, _: &str) -> Option<&ServiceState> {
        None
    }
}
