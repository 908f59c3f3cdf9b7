//! The folder as it was last read: which file holds which object. The last good version of an object
//! stays while its file is broken or cannot be read; a missing or empty folder is not a list (D18).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use purelb_plan::problem::Problem;

use super::look::Look;
use super::parse::{Found, Key, Kind, fault, label};
use super::read::{Reading, read_all};
use super::walk::{Place, Stamp, Walk, is_dotted, is_manifest, place, walk};

#[derive(Debug, Default)]
struct File {
    /// `None`: must be read again whatever the stamp.
    stamp: Option<Stamp>,
    objects: BTreeMap<Key, Arc<Found>>,
    problems: Vec<Problem>,
    /// Some of it could never be read.
    unread: bool,
}

/// The folder.
#[derive(Debug)]
pub struct Dir {
    root: PathBuf,
    skip: PathBuf,
    files: BTreeMap<Arc<Path>, File>,
    folders: BTreeSet<PathBuf>,
    /// Which files define a key; the first counts.
    holders: BTreeMap<Key, BTreeSet<Arc<Path>>>,
    /// Keys with several holders.
    twice: BTreeSet<Key>,
    /// What the last walk could not see.
    hidden: Vec<Problem>,
    /// Why there is no list now.
    missing: Option<Problem>,
}

/// How often a folder that changes all the time is read again before it counts as it was last seen.
const TRIES: u32 = 8;

/// What a look found.
type Seen = BTreeMap<PathBuf, Option<Reading>>;

impl Dir {
    /// `skip` is the state folder, which may lie inside.
    #[must_use]
    pub fn new(root: &Path, skip: &Path) -> Self {
        // The watcher names absolute paths.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            root: absolute(root),
            skip: absolute(skip),
            files: BTreeMap::new(),
            folders: BTreeSet::new(),
            holders: BTreeMap::new(),
            twice: BTreeSet::new(),
            hidden: Vec::new(),
            missing: None,
        }
    }

    /// Reads what may have changed; the keys of objects that came, went or differ.
    pub fn scan(&mut self, look: &Look) -> BTreeSet<Key> {
        let seen = match look {
            Look::Paths(paths) if self.missing.is_none() => self.named(paths).unwrap_or_else(|| self.everything()),
            _ => self.everything(),
        };
        let some_left = self.files.iter().any(|(path, file)| match seen.get(&**path) {
            None => !file.objects.is_empty(),
            Some(Some(reading)) => reading.keeps(&file.objects),
            Some(None) => false,
        });
        let listed = some_left || seen.values().flatten().any(|reading| !reading.objects.is_empty());
        self.missing = (!listed).then(|| {
            let message = "is missing or holds no object; nothing is concluded from that".to_owned();
            fault(&format!("folder {}", self.root.display()), "", message, "put the manifests there")
        });
        let mut changed = BTreeSet::new();
        for (path, reading) in seen {
            match reading {
                Some(reading) => self.put(path.into(), reading, listed, &mut changed),
                None if listed => self.take(&path, &mut changed),
                None => {}
            }
        }
        changed
    }

    /// No list was ever seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// The object of a key that counts.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Arc<Found>> {
        self.holders.get(key).and_then(|paths| self.files.get(paths.first()?)?.objects.get(key))
    }

    /// All objects of a kind.
    pub fn all(&self, kind: Kind) -> impl Iterator<Item = (&Key, &Arc<Found>)> {
        let keys = self.holders.range((kind, String::new())..).map(|(key, _)| key);
        keys.take_while(move |key| key.0 == kind).filter_map(|key| Some((key, self.get(key)?)))
    }

    /// Something of it was never read: an object that is not there may still be meant.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        !self.hidden.is_empty() || self.files.values().any(|file| file.unread)
    }

    /// What is wrong with the files.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut out: Vec<Problem> = self.missing.iter().chain(&self.hidden).cloned().collect();
        out.extend(self.files.values().flat_map(|f| f.problems.iter().cloned()));
        for key in &self.twice {
            let origin = |path: &Arc<Path>| Some(self.files.get(path)?.objects.get(key)?.origin.clone());
            let mut origins = self.holders.get(key).into_iter().flatten().filter_map(origin);
            let first = origins.next().unwrap_or_default();
            out.extend(origins.map(|origin| {
                let message = format!("is defined a second time; {first} counts");
                fault(&label(key), &origin, message, "remove one of them")
            }));
        }
        out
    }

    /// The named files; `None` when a path says more than that a file changed.
    fn named(&self, paths: &BTreeSet<PathBuf>) -> Option<Seen> {
        let mut seen = Seen::new();
        let mut read = Vec::new();
        for path in paths {
            let folder = path.parent()?;
            if path.starts_with(&self.skip)
                || folder.ancestors().any(|f| f != self.root && f.starts_with(&self.root) && is_dotted(f))
            {
                continue;
            }
            // `..data` of a ConfigMap leads to new versions of everything.
            if self.folders.contains(path) || path.file_name()?.as_encoded_bytes().starts_with(b"..") {
                return None;
            }
            if is_dotted(path) {
                continue;
            }
            match place(path) {
                Place::Folder => return None,
                _ if !is_manifest(path) => {}
                _ if !self.folders.contains(folder) => return None,
                Place::File(stamp) => read.push((path.clone(), stamp)),
                Place::Nothing => drop(seen.insert(path.clone(), None)),
                Place::Hidden(error) => drop(seen.insert(path.clone(), Some(Reading::hidden(path, &error)))),
            }
        }
        seen.extend(read_all(read));
        Some(seen)
    }

    /// All files whose stamp differs from the last time.
    fn everything(&mut self) -> Seen {
        let mut found = walk(&self.root, &self.skip);
        let mut tries = TRIES;
        let read = loop {
            let known = |path: &Path| self.files.get(path).and_then(|f| f.stamp);
            let new = found.files.iter().filter(|(path, stamp)| known(path) != Some(**stamp));
            let read = read_all(new.map(|(path, stamp)| (path.clone(), *stamp)).collect());
            if tries == 0 || !self.loses(&found, &read) {
                break read;
            }
            // A rename while the folder is listed, or `..data` that leads elsewhere half-way, can hide an object in all
            // its places: nothing is gone unless all is the same after it.
            let again = walk(&self.root, &self.skip);
            if again.files == found.files && again.hidden.keys().eq(found.hidden.keys()) {
                break read;
            }
            (found, tries) = (again, tries - 1);
        };
        let mut seen: Seen =
            self.files.keys().filter(|p| is_gone(&found, p)).map(|p| (p.to_path_buf(), None)).collect();
        self.hidden = found
            .hidden
            .iter()
            .filter(|(path, _)| !self.files.contains_key(path.as_path()))
            .flat_map(|(path, error)| Reading::hidden(path, error).problems)
            .collect();
        for (path, error) in found.hidden.iter().filter(|(path, _)| self.files.contains_key(path.as_path())) {
            seen.insert(path.clone(), Some(Reading::hidden(path, error)));
        }
        self.folders = found.folders;
        seen.extend(read);
        seen
    }

    /// A file is gone, or an object of one.
    fn loses(&self, found: &Walk, read: &[(PathBuf, Option<Reading>)]) -> bool {
        let lacks = |(path, reading): &(PathBuf, Option<Reading>)| {
            let (Some(file), Some(reading)) = (self.files.get(&**path), reading) else { return true };
            !reading.keeps(&file.objects) && file.objects.keys().any(|key| !reading.objects.contains_key(key))
        };
        self.files.keys().any(|path| is_gone(found, path))
            || read.iter().filter(|(path, _)| self.files.contains_key(&**path)).any(lacks)
    }

    /// `listed`: the folder as a whole is a list, so an object that is not there is gone.
    fn put(&mut self, path: Arc<Path>, reading: Reading, listed: bool, changed: &mut BTreeSet<Key>) {
        let old = self.files.remove(&path).unwrap_or_default();
        let keeps = !listed || reading.keeps(&old.objects);
        let Reading { stamp, mut objects, mut problems, blank, partial } = reading;
        let unread = partial && (old.unread || old.stamp.is_none() && old.objects.is_empty());
        for (key, found) in &mut objects {
            // The very same object again is the same `Arc` again.
            if let Some(same) = old.objects.get(key).filter(|o| *o == found) {
                *found = same.clone();
            }
        }
        if keeps {
            for (key, found) in &old.objects {
                objects.entry(key.clone()).or_insert_with(|| found.clone());
            }
        }
        if blank && !old.objects.is_empty() {
            let name = path.display().to_string();
            let message = "is empty now; what it held still counts".to_owned();
            problems.push(fault(&format!("file {name}"), &name, message, "remove the file to remove its objects"));
        }
        self.swap(&path, &old.objects, &objects, changed);
        self.files.insert(path, File { stamp, objects, problems, unread });
    }

    fn take(&mut self, path: &Path, changed: &mut BTreeSet<Key>) {
        if let Some((path, file)) = self.files.remove_entry(path) {
            self.swap(&path, &file.objects, &BTreeMap::new(), changed);
        }
    }

    /// Changes who holds the keys that `path` held and holds from now on.
    fn swap(
        &mut self,
        path: &Arc<Path>,
        old: &BTreeMap<Key, Arc<Found>>,
        new: &BTreeMap<Key, Arc<Found>>,
        changed: &mut BTreeSet<Key>,
    ) {
        for key in old.keys().filter(|key| !new.contains_key(*key)) {
            if let Some(holders) = self.holders.get_mut(key) {
                holders.remove(path);
                if holders.len() < 2 {
                    self.twice.remove(key);
                }
                if holders.is_empty() {
                    self.holders.remove(key);
                }
            }
            changed.insert(key.clone());
        }
        for (key, found) in new {
            let before = old.get(key);
            if before.is_some_and(|o| Arc::ptr_eq(o, found)) {
                continue;
            }
            changed.insert(key.clone());
            if before.is_none() {
                let holders = self.holders.entry(key.clone()).or_default();
                holders.insert(path.clone());
                if holders.len() > 1 {
                    self.twice.insert(key.clone());
                }
            }
        }
    }
}

/// The walk did not meet the file, and saw every place where it could be.
fn is_gone(walk: &Walk, path: &Path) -> bool {
    !walk.files.contains_key(path) && !path.ancestors().any(|place| walk.hidden.contains_key(place))
}
