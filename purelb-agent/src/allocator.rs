//! The allocator's shell on a folder: objects in, state files out. One at a time has the lock of the state folder;
//! the others stand by.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use purelb_plan::alloc::allocator::{Allocator, Estate, Settings};
use purelb_plan::alloc::catalog::Catalog;
use purelb_plan::alloc::claim::{Claim, Decision, Event};
use purelb_plan::problem::Problem;

use crate::args;
use crate::lock::{self, LockError};
use crate::source::dir::Dir;
use crate::source::parse::{Key, Kind, Object};
use crate::source::state::{Said, ServiceState, State};
use crate::source::watch::Watch;
use crate::source::{Look, claim};

/// Everything is looked at this often even if nothing says that it changed, and a lock that others have is tried again.
const POLL: Duration = Duration::from_secs(5);
const STANDBY: Duration = Duration::from_secs(1);

/// Why the allocator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The state folder cannot be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// Allocates until it is dropped.
///
/// # Errors
/// The state folder cannot be used.
pub async fn run(folder: PathBuf, state: PathBuf, settings: &args::Allocation) -> Result<(), AllocateError> {
    let mut lock = loop {
        match lock::take(&state) {
            Ok(lock) => break lock,
            Err(LockError::Held { holder, .. }) => {
                tracing::debug!(?holder, "another allocator has the state folder");
                tokio::time::sleep(STANDBY).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    tracing::info!(state = %state.display(), "allocating");
    let mut watch = Watch::new(&folder, &state);
    let mut desk = Desk::new(&folder, &state, settings);
    let mut look = Look::All;
    loop {
        desk.look(&look);
        look = tokio::select! {
            () = tokio::time::sleep(POLL) => {
                if !lock.holds(&state) {
                    lock = lock::take(&state)?;
                }
                watch.follow();
                Look::All
            }
            Some(notice) = watch.notice() => watch.burst(notice).await,
        };
    }
}

/// What lies on the allocator's desk.
struct Desk {
    dir: Dir,
    state: State,
    allocator: Allocator,
    groups: BTreeMap<(String, String), Arc<purelb_plan::alloc::group::Spec>>,
    estate: Estate,
    /// What Services ask for and nobody can read.
    faults: BTreeMap<String, Vec<Problem>>,
    started: Instant,
}

impl Desk {
    fn new(folder: &Path, state: &Path, settings: &args::Allocation) -> Self {
        let settings = Settings {
            class: settings.load_balancer_class.clone(),
            default_announcer: settings.default_announcer == "PureLB",
            cool_down: settings.cool_down,
        };
        Self {
            dir: Dir::new(folder, state),
            state: State::new(state),
            allocator: Allocator::new(settings, BTreeMap::new()),
            groups: BTreeMap::new(),
            estate: Estate::default(),
            faults: BTreeMap::new(),
            started: Instant::now(),
        }
    }

    fn look(&mut self, look: &Look) {
        let mut changed = self.dir.scan(look);
        changed.extend(self.state.scan(look).into_iter().map(|name| (Kind::Service, name)));
        if self.dir.is_empty() {
            return;
        }
        if changed.iter().any(|key| key.0 == Kind::ServiceGroup) {
            self.read_groups();
        }
        for (_, name) in changed.iter().filter(|key| key.0 == Kind::Service) {
            self.read_service(name);
        }
        self.forget();
        // What it writes is looked at again, until nothing is left; a file that cannot be written waits for the poll.
        for _ in 0..4 {
            let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let due: Vec<_> =
                self.allocator.look(&self.estate, now).iter().map(|(n, d)| (n.clone(), d.clone())).collect();
            let written = due.into_iter().filter(|(name, decision)| self.write(name, decision)).count();
            if written == 0 {
                break;
            }
        }
        let problems = self.estate.catalog.problems.iter().chain(self.faults.values().flatten()).cloned().collect();
        if let Err(error) = self.state.say(Said { problems }) {
            tracing::error!(%error, "cannot write allocator.json");
        }
    }

    fn read_groups(&mut self) {
        self.groups.clear();
        for (key, found) in self.dir.all(Kind::ServiceGroup) {
            if let (Object::ServiceGroup(group), Some((namespace, name))) = (&found.object, key.1.split_once('/')) {
                let spec = Arc::new(claim::spec(&found.origin, &group.spec));
                self.groups.insert((namespace.to_owned(), name.to_owned()), spec);
            }
        }
        self.estate.catalog = Arc::new(Catalog::new(&self.groups, None));
    }

    fn read_service(&mut self, name: &str) {
        let key: Key = (Kind::Service, name.to_owned());
        self.faults.remove(name);
        let found = self.dir.get(&key);
        let Some((found, Object::Service(service))) = found.map(|found| (found, &found.object)) else {
            self.estate.services.remove(name);
            return;
        };
        let (claim, faults) = claim::claim(&key, &found.origin, service, self.state.service(name).map(|s| &**s));
        if !faults.is_empty() {
            self.faults.insert(name.to_owned(), faults);
        }
        if self.estate.services.get(name).is_none_or(|old| **old != claim) {
            self.estate.services.insert(name.to_owned(), Arc::new(claim));
        }
    }

    /// What was given to Services that are gone is free. As long as something could not be read they may still be meant.
    fn forget(&mut self) {
        let gone = |state: &&Arc<ServiceState>| self.dir.get(&(Kind::Service, state.service.clone())).is_none();
        let gone: Vec<_> = self.state.services().filter(gone).cloned().collect();
        for state in gone {
            if self.dir.is_unread() {
                let claim =
                    Claim { unready: true, load_balancer: true, ingress: state.ingress.clone(), ..Claim::default() };
                self.estate.services.entry(state.service.clone()).or_insert_with(|| Arc::new(claim));
                continue;
            }
            self.estate.services.remove(&state.service);
            match self.state.remove(&state.service) {
                Ok(()) => tracing::info!(service = state.service, ingress = ?state.ingress, "released"),
                Err(error) => tracing::error!(service = state.service, %error, "cannot remove its state"),
            }
        }
    }

    /// Whether it is written.
    fn write(&mut self, name: &str, decision: &Decision) -> bool {
        let Some(claim) = self.estate.services.get(name) else { return false };
        let old = self.state.service(name).filter(|state| state.uid == claim.uid);
        let mut annotations = old.map(|state| state.annotations.clone()).unwrap_or_default();
        annotations.extend(decision.annotations.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let state = ServiceState {
            service: name.to_owned(),
            uid: claim.uid.clone(),
            annotations,
            ingress: decision.ingress.clone(),
            condition: decision.condition.clone().map(Into::into),
        };
        if let Err(error) = self.state.write(state) {
            tracing::error!(service = name, %error, "cannot write its state");
            return false;
        }
        for event in &decision.events {
            tell(name, event);
        }
        self.read_service(name);
        true
    }
}

fn tell(service: &str, event: &Event) {
    let Event { warning, reason, message } = event;
    if *warning {
        tracing::warn!(service, reason, "{message}");
    } else {
        tracing::info!(service, reason, "{message}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Case {
        temp: tempfile::TempDir,
        desk: Desk,
    }

    fn settings() -> args::Allocation {
        let class = "purelb.io/purelbv2".to_owned();
        args::Allocation { load_balancer_class: class, default_announcer: "PureLB".to_owned(), cool_down: 60_000 }
    }

    fn group(pool: &str) -> String {
        format!(
            "apiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {{name: default, namespace: purelb-system}}\n\
             spec: {{local: {{v4pools: [{{pool: {pool}, subnet: 192.0.2.0/24}}]}}}}\n"
        )
    }

    fn service(name: &str, more: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, ports: [{{port: 80}}]}}\n{more}"
        )
    }

    impl Case {
        fn new(pool: &str) -> Self {
            let temp = tempfile::tempdir().unwrap();
            fs::write(temp.path().join("group.yaml"), group(pool)).unwrap();
            let desk = Desk::new(temp.path(), &temp.path().join("state"), &settings());
            Self { temp, desk }
        }

        fn write(&mut self, name: &str, text: &str) -> String {
            fs::write(self.temp.path().join(format!("{name}.yaml")), text).unwrap();
            self.desk.look(&Look::All);
            self.said(name)
        }

        fn said(&self, name: &str) -> String {
            let Some(state) = self.desk.state.service(&format!("default/{name}")) else { return String::new() };
            let refused = state.condition.as_ref().filter(|c| !c.status).map(|c| c.reason.clone());
            let ips: Vec<_> = state.ingress.iter().map(ToString::to_string).collect();
            refused.unwrap_or_else(|| ips.join(" "))
        }

        fn restart(&mut self) {
            self.desk = Desk::new(self.temp.path(), &self.temp.path().join("state"), &settings());
            self.desk.look(&Look::All);
        }
    }

    #[test]
    fn what_is_given_stays_given() {
        let mut case = Case::new("192.0.2.8/31");
        assert_eq!(case.write("a", &service("a", "")), "192.0.2.8");
        assert_eq!(case.write("b", &service("b", "")), "192.0.2.9");
        assert_eq!(case.write("c", &service("c", "")), "PoolExhausted");
        fs::remove_file(case.temp.path().join("a.yaml")).unwrap();
        case.restart();
        assert_eq!(
            (case.said("a"), case.said("b"), case.said("c")),
            (String::new(), "192.0.2.9".into(), "192.0.2.8".into())
        );
        // While a file cannot be read nobody knows whether what it held is gone.
        fs::write(case.temp.path().join("b.yaml"), "kind: [").unwrap();
        case.restart();
        assert_eq!(case.said("b"), "192.0.2.9");
        assert_eq!(case.write("d", &service("d", "")), "PoolExhausted");
        assert_eq!(case.write("b", &service("b", "")), "192.0.2.9");
        fs::remove_file(case.temp.path().join("b.yaml")).unwrap();
        case.desk.look(&Look::All);
        assert_eq!((case.said("b"), case.said("d")), (String::new(), "192.0.2.9".into()));
    }

    #[test]
    fn addresses_of_the_manifest_are_left_alone() {
        let mut case = Case::new("192.0.2.8/30");
        let own = "status: {loadBalancer: {ingress: [{ip: 192.0.2.8}]}}\n";
        assert_eq!(case.write("a", &service("a", own)), "ForeignAddress");
        assert_eq!(case.write("b", &service("b", "")), "192.0.2.9");
        let other = own.replace("2.8", "2.10");
        assert_eq!(case.write("a", &service("a", &other)), "ForeignAddress");
        assert_eq!(case.write("c", &service("c", "")), "192.0.2.11", "the manifest's counts as it is now");
        assert_eq!(case.write("a", &service("a", "")), "192.0.2.10", "it asks for one now");
    }

    #[test]
    fn faults_are_told_to_the_nodes() {
        let mut case = Case::new("192.0.3.8/30");
        assert_eq!(case.write("a", &service("a", "")), "NoUsableGroup");
        let mut node = State::new(&case.temp.path().join("state"));
        node.scan(&Look::All);
        let problems = node.problems();
        assert_eq!(problems[0].object, "ServiceGroup purelb-system/default");
        assert!(problems[0].origin.ends_with("group.yaml:1"), "{problems:?}");
        case.write("group", &group("192.0.2.8/30"));
        assert_eq!(case.said("a"), "192.0.2.8");
        node.scan(&Look::All);
        assert_eq!(node.problems(), []);
    }

    #[test]
    fn the_state_of_another_object_does_not_count() {
        let mut case = Case::new("192.0.2.8/30");
        let with_uid = |uid: &str| service("a", "").replace("name: a", &format!("name: a, uid: {uid}"));
        assert_eq!(case.write("a", &with_uid("one")), "192.0.2.8");
        assert_eq!(case.write("a", &with_uid("two")), "192.0.2.9", "the former one's cools down");
    }
}
