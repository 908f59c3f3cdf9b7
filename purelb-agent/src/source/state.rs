//! What Kubernetes would keep in a Service's status: below `--state`, a file an object, replaced by rename.
//!
//! The allocator writes it, every node reads it. Annotations and ingress here come before those of the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use purelb_plan::alloc::claim::Condition;
use purelb_plan::alloc::external::Debt;
use purelb_plan::alloc::refusal::FOREIGN;
use purelb_plan::problem::Problem;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::look::Look;
use super::parse::fault;
use super::walk::{Place, Stamp, place};

/// The allocator's own, in no node's interest: what sidecars have to take back.
const OWED: &str = "sidecars.json";

/// A Service's status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// `namespace/name`
    pub service: String,
    /// Of the object that it was written for, where it has one.
    pub uid: String,
    /// Annotations that were set, or with null removed.
    pub annotations: BTreeMap<String, Option<String>>,
    /// Addresses.
    pub ingress: Vec<IpAddr>,
    /// The condition `purelb.io/Allocated`.
    pub condition: Option<Allocated>,
}

/// The condition `purelb.io/Allocated`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocated {
    /// It has what it asks for.
    pub status: bool,
    /// One of a closed list.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl ServiceState {
    /// What the allocator gave; `None` where the manifest has an address of its own, which counts.
    #[must_use]
    pub fn given(&self) -> Option<&[IpAddr]> {
        let foreign = self.condition.as_ref().is_some_and(|condition| condition.reason == FOREIGN);
        (!foreign).then_some(&self.ingress)
    }
}

impl From<Condition> for Allocated {
    fn from(c: Condition) -> Self {
        Self { status: c.status, reason: c.reason, message: c.message }
    }
}

/// What the allocator says besides, in `allocator.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Faults of ServiceGroups and of what Services ask for.
    pub problems: Vec<Problem>,
}

/// The folder.
#[derive(Debug)]
pub struct State {
    root: PathBuf,
    files: BTreeMap<PathBuf, (Stamp, String)>,
    services: BTreeMap<String, Arc<ServiceState>>,
    said: Said,
    said_at: Option<Stamp>,
    broken: BTreeMap<PathBuf, Problem>,
}

impl State {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        // The watcher names absolute paths.
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let (files, services) = (BTreeMap::new(), BTreeMap::new());
        Self { root, files, services, said: Said::default(), said_at: None, broken: BTreeMap::new() }
    }

    /// Reads what may have changed; the Services whose state is another one.
    pub fn scan(&mut self, look: &Look) -> BTreeSet<String> {
        let folder = self.root.join("services");
        let paths: BTreeSet<PathBuf> = match look {
            Look::Paths(paths) if paths.contains(&folder) => self.all(&folder),
            Look::Paths(paths) => paths.iter().filter(|path| path.parent() == Some(&folder)).cloned().collect(),
            Look::All => self.all(&folder),
        };
        let said = self.root.join("allocator.json");
        if *look == Look::All || matches!(look, Look::Paths(paths) if paths.contains(&said)) {
            self.listen(&said);
        }
        let paths = paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json"));
        paths.filter_map(|path| self.file(&path)).flatten().collect()
    }

    fn all(&self, folder: &Path) -> BTreeSet<PathBuf> {
        let there = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        there.chain(self.files.keys().cloned()).collect()
    }

    /// Whose state is another one now.
    fn file(&mut self, path: &Path) -> Option<Vec<String>> {
        let stamp = match place(path) {
            Place::File(stamp) => stamp,
            Place::Nothing => {
                self.broken.remove(path);
                let (_, name) = self.files.remove(path)?;
                self.services.remove(&name);
                return Some(vec![name]);
            }
            // What was last read counts.
            Place::Folder | Place::Hidden(_) => return None,
        };
        if self.files.get(path).is_some_and(|(old, _)| *old == stamp) {
            return None;
        }
        let state = self.read::<ServiceState>(path)?;
        let old = self.files.insert(path.to_owned(), (stamp, state.service.clone())).map(|(_, name)| name);
        let name = state.service.clone();
        let same = self.services.get(&name).is_some_and(|old| **old == state);
        self.services.insert(name.clone(), Arc::new(state));
        let other = old.filter(|old| *old != name).inspect(|old| drop(self.services.remove(old)));
        Some(other.into_iter().chain((!same).then_some(name)).collect())
    }

    fn listen(&mut self, path: &Path) {
        match place(path) {
            Place::File(stamp) if self.said_at == Some(stamp) => {}
            Place::File(stamp) => {
                if let Some(said) = self.read(path) {
                    (self.said, self.said_at) = (said, Some(stamp));
                }
            }
            _ => (self.said, self.said_at) = (Said::default(), None),
        }
    }

    fn read<T: DeserializeOwned>(&mut self, path: &Path) -> Option<T> {
        let parsed = fs::read(path).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from));
        match parsed {
            Ok(value) => {
                self.broken.remove(path);
                Some(value)
            }
            Err(error) => {
                let name = path.display().to_string();
                let message = format!("cannot be read: {error}; what was last read there counts");
                let remedy = "remove it if it is broken: the allocator writes it anew";
                self.broken.insert(path.to_owned(), fault(&format!("file {name}"), &name, message, remedy));
                None
            }
        }
    }

    /// Of a Service.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<&Arc<ServiceState>> {
        self.services.get(name)
    }

    /// Of all of them.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceState>> {
        self.services.values()
    }

    /// Faults that the allocator found, and those of the folder.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.said.problems.iter().chain(self.broken.values()).cloned().collect()
    }

    /// Writes a Service's state, durably: an address that was given must not be given again after a power cut.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, state: ServiceState) -> io::Result<()> {
        let folder = self.root.join("services");
        let path = folder.join(file_name(&state.service));
        replace(&path, &state)?;
        if let Place::File(stamp) = place(&path) {
            self.files.insert(path, (stamp, state.service.clone()));
        }
        self.services.insert(state.service.clone(), Arc::new(state));
        Ok(())
    }

    /// The Service is gone.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&mut self, name: &str) -> io::Result<()> {
        self.services.remove(name);
        let files: Vec<_> = self.files.iter().filter(|(_, (_, of))| of == name).map(|(path, _)| path.clone()).collect();
        for path in files {
            fs::remove_file(&path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
            self.files.remove(&path);
        }
        Ok(())
    }

    /// What sidecars had to take back when the last allocator ended.
    pub fn debts(&mut self) -> BTreeSet<Debt> {
        let path = self.root.join(OWED);
        match place(&path) {
            Place::File(_) => self.read(&path).unwrap_or_default(),
            _ => BTreeSet::new(),
        }
    }

    /// Writes down what sidecars have to take back.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn owe(&mut self, debts: &BTreeSet<Debt>) -> io::Result<()> {
        let path = self.root.join(OWED);
        replace(&path, debts)?;
        self.broken.remove(&path);
        Ok(())
    }

    /// Writes what the allocator says, if it is new.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn say(&mut self, said: Said) -> io::Result<()> {
        if self.said_at.is_none() || self.said != said {
            let path = self.root.join("allocator.json");
            replace(&path, &said)?;
            if let Place::File(stamp) = place(&path) {
                (self.said, self.said_at) = (said, Some(stamp));
            }
        }
        Ok(())
    }
}

fn replace(path: &Path, value: &impl Serialize) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let next = path.with_extension("next");
    let mut file = fs::File::create(&next)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_data()?;
    fs::rename(next, path)
}

/// Names of Kubernetes have no `_`; others may have anything, and no two have the same file.
fn file_name(service: &str) -> String {
    let mut out = String::new();
    for c in service.chars() {
        match c {
            '/' => out.push('_'),
            c if c.is_ascii_alphanumeric() || c == '-' || c == '.' => out.push(c),
            c => out.push_str(&format!("%{:x}%", u32::from(c))),
        }
    }
    out + ".json"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(service: &str, ip: &str) -> ServiceState {
        ServiceState { service: service.to_owned(), ingress: vec![ip.parse().unwrap()], ..ServiceState::default() }
    }

    #[test]
    fn each_name_has_its_file() {
        let names = ["x/a", "x_a", "x/\u{1}0", "x/\u{10}", "x/\u{100}", "x/%10%", "X/a", ""];
        let files: BTreeSet<_> = names.iter().map(|name| file_name(name)).collect();
        assert_eq!(files.len(), names.len(), "{files:?}");
        assert_eq!(file_name("default/web"), "default_web.json");
    }

    #[test]
    fn what_one_writes_another_reads() {
        let temp = tempfile::tempdir().unwrap();
        let (mut writer, mut reader) = (State::new(temp.path()), State::new(temp.path()));
        let (web, odd) = (state("default/web", "192.0.2.1"), state("default/a_b/../c", "192.0.2.2"));
        writer.write(web.clone()).unwrap();
        writer.write(odd.clone()).unwrap();
        assert_eq!(reader.scan(&Look::All), [web.service.clone(), odd.service.clone()].into());
        assert_eq!(reader.service("default/web"), Some(&Arc::new(web.clone())));
        assert_eq!(reader.scan(&Look::All), BTreeSet::new(), "nothing changed");
        let path = temp.path().join("services/default_web.json");
        let other = state("default/web", "192.0.2.3");
        writer.write(other.clone()).unwrap();
        let named = Look::Paths([path.clone()].into());
        assert_eq!(reader.scan(&named), ["default/web".to_owned()].into());
        fs::write(&path, "{").unwrap();
        assert_eq!(reader.scan(&named), BTreeSet::new(), "what was last read counts");
        assert_eq!(reader.service("default/web"), Some(&Arc::new(other)));
        assert!(reader.problems()[0].message.contains("cannot be read"), "{:?}", reader.problems());
        writer.write(web.clone()).unwrap();
        assert_eq!(reader.scan(&named), ["default/web".to_owned()].into());
        assert!(reader.problems().is_empty());
        writer.remove("default/web").unwrap();
        assert_eq!(reader.scan(&Look::All), ["default/web".to_owned()].into());
        assert_eq!(reader.services().count(), 1);
        let problem = fault("ServiceGroup x/y", "", "is wrong".to_owned(), "mend it");
        writer.say(Said { problems: vec![problem.clone()] }).unwrap();
        reader.scan(&Look::All);
        assert_eq!(reader.problems(), [problem]);
        let [service, group, socket] = ["default/web", "far", "/run/ipam.sock"].map(str::to_owned);
        let debts: BTreeSet<_> = [Debt { service, group, socket, ip: None }].into();
        assert!(State::new(temp.path()).debts().is_empty());
        writer.owe(&debts).unwrap();
        assert_eq!(State::new(temp.path()).debts(), debts);
        fs::write(temp.path().join(OWED), "{").unwrap();
        let mut next = State::new(temp.path());
        assert!(next.debts().is_empty() && next.problems()[0].object.contains(OWED), "{:?}", next.problems());
        next.owe(&debts).unwrap();
        assert!(next.problems().is_empty(), "{:?}", next.problems());
    }
}
