//! On a folder: objects in, state files out. One at a time has the lock of the state folder; the others stand by.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use purelb_plan::alloc::allocator::Allocator;
use purelb_plan::alloc::claim::{Decision, annotation};
use purelb_plan::alloc::external::Debt;

use super::sidecars::Sidecars;
use super::{Figures, tell};
use crate::args;
use crate::lock::{self, Lock, LockError};
use crate::source::Look;
use crate::source::estate::FolderEstate;
use crate::source::state::{Said, ServiceState};
use crate::source::watch::Watch;

/// Everything is looked at this often even if nothing says that it changed, ...
const POLL: Duration = Duration::from_secs(5);
/// ... but less often where that takes long: so many times as long as it took.
const REST: u32 = 200;
/// A lock that another one has is tried again.
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
pub async fn run(
    folder: PathBuf,
    state: PathBuf,
    settings: &args::Allocation,
    figures: Figures,
) -> Result<(), AllocateError> {
    let mut lock = turn(&state, &figures.ready).await?;
    // It remembers what it gave, also when somebody removes the folder.
    let mut desk = Desk::new(&folder, &state, settings, figures);
    loop {
        tracing::info!(event = "stateSynced", state = %state.display(), "allocating");
        work(&lock, &folder, &state, &mut desk).await;
        tracing::warn!(event = "stateReplaced", state = %state.display(), "the state folder is another one: its lock is taken anew");
        drop(lock);
        lock = turn(&state, &desk.figures.ready).await?;
        // Nothing of it is there.
        desk.sidecars.written_down(BTreeSet::new());
    }
}

/// Waits for the lock.
async fn turn(state: &Path, ready: &AtomicBool) -> Result<Lock, AllocateError> {
    loop {
        match lock::take(state) {
            Ok(lock) => return Ok(lock),
            Err(LockError::Held { holder, .. }) => {
                tracing::debug!(event = "standingBy", ?holder, "another allocator has the state folder");
                ready.store(true, Ordering::Relaxed);
                tokio::time::sleep(STANDBY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Gives addresses as long as the lock is that of the folder.
async fn work(lock: &Lock, folder: &Path, state: &Path, desk: &mut Desk) {
    let mut watch = Watch::new(folder, state);
    let mut beat = tokio::time::interval(STANDBY);
    let mut look = Look::All;
    let mut poll = Instant::now();
    while lock.holds(state) {
        let begin = Instant::now();
        let wrote = !look.is_empty() && desk.look(&look);
        if look == Look::All {
            // What a look costs that finds nothing is what counts.
            poll = Instant::now() + if wrote { POLL } else { POLL.max(begin.elapsed() * REST) };
        }
        look = tokio::select! {
            () = tokio::time::sleep_until(poll.into()) => Look::All,
            _ = beat.tick() => if watch.follow() {
                Look::All
            } else {
                // What sidecars were asked for is asked again.
                if desk.sidecars.are_used() {
                    desk.allocate();
                }
                Look::default()
            },
            Some(notice) = watch.notice() => watch.burst(notice).await,
            done = desk.sidecars.next() => {
                desk.sidecars.take(done, desk.clock());
                desk.allocate();
                Look::default()
            }
        };
    }
}

/// What lies on the allocator's desk.
struct Desk {
    figures: Figures,
    folder: FolderEstate,
    allocator: Allocator,
    sidecars: Sidecars,
    /// Services that are gone and whose sidecar has to take something back first.
    owing: BTreeSet<String>,
    started: Instant,
}

impl Desk {
    /// Whoever calls it has the lock.
    fn new(folder: &Path, state: &Path, settings: &args::Allocation, figures: Figures) -> Self {
        let allocator = Allocator::new(settings.into(), BTreeMap::new());
        let (mut folder, owing) = (FolderEstate::new(folder, state), BTreeSet::new());
        let sidecars = Sidecars::new(folder.state.debts(), figures.rpcs.clone());
        Self { figures, folder, allocator, sidecars, owing, started: Instant::now() }
    }

    /// Whether anything was written.
    fn look(&mut self, look: &Look) -> bool {
        if !self.folder.look(look) {
            return false;
        }
        self.forget();
        self.allocate()
    }

    /// In milliseconds.
    fn clock(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether anything was written.
    fn allocate(&mut self) -> bool {
        let mut wrote = false;
        self.folder.register.estate.answers.clone_from(self.sidecars.answers());
        // What it writes is looked at again, until nothing is left; a file that cannot be written waits for the poll.
        for _ in 0..4 {
            let now = self.clock();
            let due = self.allocator.look(&self.folder.register.estate, now).clone();
            self.sidecars.look(&self.folder.register.estate, &self.allocator, now);
            // Before a state lets go of what a sidecar gave, and before it is asked for more.
            self.note();
            if due.iter().filter(|(name, decision)| self.write(name, decision)).count() == 0 {
                break;
            }
            wrote = true;
        }
        if self.sidecars.is_written_down() {
            self.sidecars.begin();
        }
        if let Err(error) = self.folder.state.say(Said { problems: self.folder.register.problems() }) {
            tracing::error!(op = "writeState", %error, "cannot write allocator.json");
        }
        let (catalog, figures) = (&self.folder.register.estate.catalog, self.sidecars.figures());
        self.figures.metrics.pools(catalog, self.allocator.ledger(), figures);
        self.figures.ready.store(true, Ordering::Relaxed);
        wrote
    }

    /// Writes down what sidecars have to take back: one that begins anew would not know of it.
    fn note(&mut self) {
        if let Some(debts) = self.sidecars.unwritten() {
            match self.folder.state.owe(&debts) {
                Ok(()) => self.sidecars.written_down(debts),
                Err(error) => {
                    tracing::error!(op = "writeState", %error, "cannot write sidecars.json: sidecars are asked for nothing");
                }
            }
        }
    }

    /// A Service that is gone has something of a sidecar. Its state stays until that was taken back.
    fn owes(&mut self, name: &str) -> bool {
        if self.owing.insert(name.to_owned()) {
            let state = self.folder.state.service(name);
            let from = state.and_then(|state| state.annotations.get(annotation::ALLOCATED_FROM)?.clone());
            for group in from.unwrap_or_default().split(", ") {
                let catalog = &self.folder.register.estate.catalog;
                let Some(external) = catalog.get(group).and_then(|group| group.external.as_ref()) else { continue };
                let (service, group, socket) = (name.to_owned(), group.to_owned(), external.socket.clone());
                self.sidecars.owe(Debt { service, group, socket, ip: None });
            }
        }
        self.sidecars.owes(name)
    }

    /// What was given to Services that are gone is free.
    fn forget(&mut self) {
        let gone = self.folder.gone();
        self.owing.retain(|name| gone.contains(name));
        for name in gone {
            if !self.folder.dir.is_unread() && !self.owes(&name) {
                match self.folder.state.remove(&name) {
                    Ok(()) => tracing::info!(event = "serviceDeleted", svc = name, "released"),
                    Err(error) => tracing::error!(op = "removeState", svc = name, %error, "cannot remove its state"),
                }
            }
            self.folder.read_service(&name);
        }
    }

    /// Whether it is written.
    fn write(&mut self, name: &str, decision: &Decision) -> bool {
        let Some(claim) = self.folder.register.estate.services.get(name) else { return false };
        let old = self.folder.state.service(name).filter(|state| state.uid == claim.uid);
        let mut annotations = old.map(|state| state.annotations.clone()).unwrap_or_default();
        annotations.extend(decision.annotations.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let state = ServiceState {
            service: name.to_owned(),
            uid: claim.uid.clone(),
            annotations,
            ingress: decision.ingress.clone(),
            condition: decision.condition.clone().map(Into::into),
        };
        if let Err(error) = self.folder.state.write(state) {
            tracing::error!(op = "writeState", svc = name, %error, "cannot write its state");
            return false;
        }
        self.figures.metrics.decided(&self.folder.register.estate.catalog, claim, decision);
        for event in &decision.events {
            tell(name, decision, event);
        }
        self.folder.read_service(name);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::http::Pages;
    use crate::source::state::State;

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
            let desk = Desk::new(temp.path(), &temp.path().join("state"), &settings(), Figures::new(&mut Pages::new()));
            Self { temp, desk }
        }

        fn write(&mut self, name: &str, text: &str) -> String {
            fs::write(self.temp.path().join(format!("{name}.yaml")), text).unwrap();
            self.desk.look(&Look::All);
            self.said(name)
        }

        fn said(&self, name: &str) -> String {
            let Some(state) = self.desk.folder.state.service(&format!("default/{name}")) else { return String::new() };
            let refused = state.condition.as_ref().filter(|c| !c.status).map(|c| c.reason.clone());
            let ips: Vec<_> = state.ingress.iter().map(ToString::to_string).collect();
            refused.unwrap_or_else(|| ips.join(" "))
        }

        fn restart(&mut self) {
            let figures = Figures::new(&mut Pages::new());
            self.desk = Desk::new(self.temp.path(), &self.temp.path().join("state"), &settings(), figures);
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
    fn the_state_is_removed() {
        let mut case = Case::new("192.0.2.8/30");
        assert_eq!(case.write("z", &service("z", "")), "192.0.2.8");
        assert_eq!(case.write("a", &service("a", "")), "192.0.2.9");
        fs::remove_dir_all(case.temp.path().join("state")).unwrap();
        case.desk.look(&Look::All);
        case.restart();
        assert_eq!((case.said("z"), case.said("a")), ("192.0.2.8".into(), "192.0.2.9".into()), "written anew");
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
