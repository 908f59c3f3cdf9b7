//! Finds the manifests below a folder, following links, and tells what is gone from what cannot be seen.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Two readings of a file that differ have different stamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    file: (u64, u64),
    changed: (i64, i64),
    modified: (i64, i64),
    /// Bytes.
    pub length: u64,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            file: (meta.dev(), meta.ino()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            length: meta.len(),
        }
    }
}

/// What stands at a path.
#[derive(Debug)]
pub enum Place {
    /// A regular file, at the end of links maybe.
    File(Stamp),
    /// A folder.
    Folder,
    /// Nothing, or what can never be a manifest.
    Nothing,
    /// Something is there, but it cannot be seen now: no permission, a loop of links, a link to nothing.
    Hidden(io::Error),
}

/// Looks at a path.
#[must_use]
pub fn place(path: &Path) -> Place {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Place::File(Stamp::of(&meta)),
        Ok(meta) if meta.is_dir() => Place::Folder,
        Ok(_) => Place::Nothing,
        Err(error) => match fs::symlink_metadata(path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Place::Nothing,
            _ => Place::Hidden(error),
        },
    }
}

/// Everything below a folder.
#[derive(Debug, Default)]
pub struct Walk {
    /// Manifests.
    pub files: HashMap<PathBuf, Stamp>,
    /// Folders that were entered.
    pub folders: BTreeSet<PathBuf>,
    /// Paths that could not be seen; what was known at or below them may still be there.
    pub hidden: BTreeMap<PathBuf, io::Error>,
}

/// Manifests are `*.yaml`, `*.yml`, `*.json` whose name does not begin with a dot: such are editors' files,
/// and `..data` of a mounted ConfigMap.
#[must_use]
pub fn is_manifest(path: &Path) -> bool {
    !is_dotted(path) && path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

/// Its name begins with a dot.
#[must_use]
pub fn is_dotted(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))
}

/// Walks below `root`, leaving out `skip`.
#[must_use]
pub fn walk(root: &Path, skip: &Path) -> Walk {
    let mut out = Walk::default();
    let mut visited = BTreeSet::new();
    out.folder(root, skip, &mut visited);
    out
}

impl Walk {
    fn folder(&mut self, folder: &Path, skip: &Path, visited: &mut BTreeSet<PathBuf>) {
        if folder == skip {
            return;
        }
        let entries = match fs::canonicalize(folder).map(|real| visited.insert(real)) {
            Ok(true) => fs::read_dir(folder).and_then(|entries| entries.map(|e| Ok(e?.path())).collect()),
            // A loop of links comes back to a folder that was visited.
            Ok(false) => return,
            Err(error) => Err(error),
        };
        let mut entries: Vec<PathBuf> = match entries {
            Ok(entries) => entries,
            Err(error) => {
                if !matches!(place(folder), Place::Nothing) {
                    self.hidden.insert(folder.to_owned(), error);
                }
                return;
            }
        };
        self.folders.insert(folder.to_owned());
        // Comparing names beats comparing paths, part by part, by far.
        entries.sort_unstable_by(|a, b| a.file_name().cmp(&b.file_name()));
        for path in entries.into_iter().filter(|p| !is_dotted(p)) {
            match place(&path) {
                Place::Folder => self.folder(&path, skip, visited),
                Place::File(stamp) if is_manifest(&path) => drop(self.files.insert(path, stamp)),
                Place::Hidden(error) => drop(self.hidden.insert(path, error)),
                _ => {}
            }
        }
    }
}
