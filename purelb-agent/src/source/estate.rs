//! Objects as the allocator sees them: groups, Services with their state, and what is wrong with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use purelb_plan::alloc::allocator::Estate;
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::Claim;
use purelb_plan::alloc::group::Spec;
use purelb_plan::alloc::ledger::Ledger;
use purelb_plan::problem::Problem;

use super::claim::{self, Home};
use super::dir::Dir;
use super::look::Look;
use super::parse::{Found, Key, Kind, Object};
use super::state::{ServiceState, State};
use super::{Files, Objects};

/// The ServiceGroups by namespace and name.
#[must_use]
pub fn groups(objects: &dyn Objects) -> BTreeMap<(String, String), Arc<Spec>> {
    let mut groups = BTreeMap::new();
    for (key, found) in objects.all(Kind::ServiceGroup) {
        if let (Object::ServiceGroup(group), Some((namespace, name))) = (&found.object, key.1.split_once('/')) {
            let spec = Arc::new(claim::spec(&found.origin, &group.spec));
            groups.insert((namespace.to_owned(), name.to_owned()), spec);
        }
    }
    groups
}

/// What was read of the objects.
#[derive(Debug, Default)]
pub struct Register {
    /// What the plan looks at.
    pub estate: Estate,
    /// ServiceGroups by namespace and name.
    pub groups: BTreeMap<(String, String), Arc<Spec>>,
    /// What Services ask for and nobody can read.
    faults: BTreeMap<String, Vec<Problem>>,
}

impl Register {
    /// Reads the ServiceGroups; `install` is the only namespace whose groups count.
    pub fn read_groups(&mut self, objects: &dyn Objects, install: Option<&str>) {
        let groups = groups(objects);
        // A status alone changes nothing.
        if groups == self.groups {
            return;
        }
        self.groups = groups;
        self.estate.catalog = Arc::new(Catalog::new(&self.groups, install));
    }

    /// Reads a Service and its state. `unread`: some object could not be read, and as long as that is so it may still
    /// be meant, and what it has is not free.
    pub fn read_service(&mut self, objects: &dyn Objects, name: &str, home: Home, unread: bool) {
        let key = (Kind::Service, name.to_owned());
        let state = objects.state(name);
        self.faults.remove(name);
        let claim = match objects.get(&key).map(|found| (found, &found.object)) {
            Some((found, Object::Service(service))) => {
                let (claim, faults) = claim::claim(&key, &found.origin, service, state, home);
                if !faults.is_empty() {
                    self.faults.insert(name.to_owned(), faults);
                }
                Some(claim)
            }
            _ => state.filter(|_| unread).map(|state| Claim {
                unready: true,
                load_balancer: true,
                ingress: state.ingress.clone(),
                ..Claim::default()
            }),
        };
        match claim {
            Some(claim) if self.estate.services.get(name).is_some_and(|old| **old == claim) => {}
            Some(claim) => drop(self.estate.services.insert(name.to_owned(), Arc::new(claim))),
            None => drop(self.estate.services.remove(name)),
        }
    }

    /// Who holds what by now.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for (name, claim) in &self.estate.services {
            ledger.hold(name, &claim.ingress.iter().copied().collect(), &claim.usage(), 0);
        }
        ledger
    }

    /// What is wrong with groups, and with what Services ask for.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.estate.catalog.problems.iter().chain(self.faults.values().flatten()).cloned().collect()
    }
}

/// A folder as the allocator sees it.
#[derive(Debug)]
pub struct FolderEstate {
    /// Manifests.
    pub dir: Dir,
    /// What was given.
    pub state: State,
    /// Both of them.
    pub register: Register,
}

impl FolderEstate {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(folder: &Path, state: &Path) -> Self {
        Self { dir: Dir::new(folder, state), state: State::new(state), register: Register::default() }
    }

    /// Reads what may have changed. False: there is no list, from which nothing may be concluded.
    pub fn look(&mut self, look: &Look) -> bool {
        let mut changed = self.dir.scan(look);
        changed.extend(self.state.scan(look).into_iter().map(|name| (Kind::Service, name)));
        if self.dir.is_empty() {
            return false;
        }
        if changed.iter().any(|key| key.0 == Kind::ServiceGroup) {
            self.register.read_groups(&Files { dir: &self.dir, state: &self.state }, None);
        }
        for (_, name) in changed.iter().filter(|key| key.0 == Kind::Service) {
            self.read_service(name);
        }
        true
    }

    /// Reads a Service and its state.
    pub fn read_service(&mut self, name: &str) {
        let files = Files { dir: &self.dir, state: &self.state };
        self.register.read_service(&files, name, Home::Folder, self.dir.is_unread());
    }

    /// Services that have a state and are not there any more.
    #[must_use]
    pub fn gone(&self) -> Vec<String> {
        let is_gone = |name: &&String| self.dir.get(&(Kind::Service, (*name).clone())).is_none();
        self.state.services().map(|state| &state.service).filter(is_gone).cloned().collect()
    }
}

impl Objects for FolderEstate {
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
