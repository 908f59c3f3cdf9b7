//! Finds, parses and watches the files. The last good version of an object stays while its file is
//! broken; a missing or empty folder is not a list (D18).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use purelb_plan::problem::Problem;
use serde::de::DeserializeOwned;
use serde_yaml_ng::Value;

use super::objects::{EndpointSlice, Node, NodeAgent, Service};

const LARGEST: u64 = 8 << 20;

/// An object we know.
#[derive(Clone, Debug)]
pub enum Object {
    /// v1
    Service(Box<Service>),
    /// discovery.k8s.io/v1
    Slice(Box<EndpointSlice>),
    /// v1
    Node(Box<Node>),
    /// purelb.io/v2
    NodeAgent(Box<NodeAgent>),
}

/// Kind and `namespace/name`.
pub type Key = (String, String);

/// All objects with where they were read, and what could not be read.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// The objects.
    pub objects: BTreeMap<Key, (Object, String)>,
    /// Faults.
    pub problems: Vec<Problem>,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<(SystemTime, u64)>,
    objects: BTreeMap<Key, (Object, String)>,
    problems: Vec<Problem>,
}

/// The folder as it was last read.
#[derive(Debug)]
pub struct Dir {
    root: PathBuf,
    skip: PathBuf,
    files: BTreeMap<PathBuf, File>,
}

impl Dir {
    /// `skip` is the state folder, which may lie inside.
    #[must_use]
    pub fn new(root: PathBuf, skip: PathBuf) -> Self {
        Self { root, skip, files: BTreeMap::new() }
    }

    /// Reads what changed. `None`: the folder is missing or holds no manifest, so nothing may be concluded.
    pub fn scan(&mut self) -> Option<Listing> {
        let mut found = BTreeMap::new();
        let mut problems = Vec::new();
        let mut visited = BTreeSet::new();
        self.walk(&self.root.clone(), &mut visited, &mut found, &mut problems);
        self.files.retain(|path, _| found.contains_key(path));
        for (path, stamp) in found {
            let file = self.files.entry(path.clone()).or_default();
            if file.stamp != Some(stamp) {
                file.stamp = Some(stamp);
                read(&path, stamp.1, file);
            }
        }
        if self.files.is_empty() {
            return None;
        }
        let mut out = Listing { objects: BTreeMap::new(), problems };
        for file in self.files.values() {
            out.problems.extend(file.problems.iter().cloned());
            for (key, (object, origin)) in &file.objects {
                if let Some((_, first)) = out.objects.get(key) {
                    out.problems.push(fault(
                        &format!("{} {}", key.0, key.1),
                        origin,
                        format!("is defined a second time; {first} counts"),
                        "remove one of them",
                    ));
                } else {
                    out.objects.insert(key.clone(), (object.clone(), origin.clone()));
                }
            }
        }
        Some(out)
    }

    fn walk(
        &self,
        folder: &Path,
        visited: &mut BTreeSet<PathBuf>,
        found: &mut BTreeMap<PathBuf, (SystemTime, u64)>,
        problems: &mut Vec<Problem>,
    ) {
        // A loop of links comes back to a folder that was visited.
        if folder == self.skip || !fs::canonicalize(folder).is_ok_and(|real| visited.insert(real)) {
            return;
        }
        let Ok(entries) = fs::read_dir(folder) else { return };
        // Names with a leading dot are not manifests: editors' files, and `..data` of a mounted ConfigMap.
        let hidden = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let mut entries: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| !hidden(p)).collect();
        entries.sort();
        for path in entries {
            let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
            match fs::metadata(&path) {
                Ok(meta) if meta.is_dir() => self.walk(&path, visited, found, problems),
                Ok(meta) if meta.is_file() && manifest => {
                    found.insert(path, (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len()));
                }
                Err(error) if manifest => {
                    let origin = path.display().to_string();
                    problems.push(fault(
                        &format!("file {origin}"),
                        &origin,
                        error.to_string(),
                        "make the file readable",
                    ));
                }
                _ => {}
            }
        }
    }
}

fn fault(object: &str, origin: &str, message: String, remedy: &str) -> Problem {
    Problem {
        object: object.to_owned(),
        field: String::new(),
        message,
        remedy: remedy.to_owned(),
        origin: origin.to_owned(),
    }
}

/// Parses a file into `file`; what it held before stays wherever the new text has a fault.
fn read(path: &Path, length: u64, file: &mut File) {
    let name = path.display().to_string();
    let mut problems = Vec::new();
    let mut objects = BTreeMap::new();
    if length > LARGEST {
        problems.push(fault(
            &format!("file {name}"),
            &name,
            format!("{length} bytes are too many"),
            "keep files below 8 MiB",
        ));
    } else {
        match fs::read(path).map(String::from_utf8) {
            Ok(Ok(text)) => documents(&name, &text, &mut objects, &mut problems),
            Ok(Err(_)) => problems.push(fault(
                &format!("file {name}"),
                &name,
                "is not UTF-8 text".to_owned(),
                "write YAML or JSON",
            )),
            Err(error) => {
                problems.push(fault(&format!("file {name}"), &name, error.to_string(), "make the file readable"))
            }
        }
    }
    if problems.is_empty() {
        file.objects = objects;
    } else {
        file.objects.extend(objects);
    }
    file.problems = problems;
}

fn documents(name: &str, text: &str, objects: &mut BTreeMap<Key, (Object, String)>, problems: &mut Vec<Problem>) {
    let mut start = 1;
    let mut document = String::new();
    let lines = text.lines().map(Some).chain([None]);
    for (number, line) in (1..).zip(lines) {
        match line {
            Some(line) if line != "---" && !line.starts_with("--- ") => {
                document.push_str(line);
                document.push('\n');
            }
            _ => {
                parse(name, start, &document, objects, problems);
                document.clear();
                start = number + 1;
            }
        }
    }
}

fn parse(
    name: &str,
    start: usize,
    text: &str,
    objects: &mut BTreeMap<Key, (Object, String)>,
    problems: &mut Vec<Problem>,
) {
    // Comments before the object do not move its line.
    let blank = text.lines().take_while(|l| l.trim().is_empty() || l.trim_start().starts_with('#')).count();
    if blank == text.lines().count() {
        return;
    }
    let origin = format!("{name}:{}", start + blank);
    match serde_yaml_ng::from_str::<Value>(text) {
        Ok(value) => object(value, &origin, objects, problems),
        Err(error) => {
            let line = error.location().map_or(start + blank, |l| start + l.line().max(1) - 1);
            let origin = format!("{name}:{line}");
            problems.push(fault(&format!("file {name}"), &origin, error.to_string(), "correct the YAML"));
        }
    }
}

fn object(value: Value, origin: &str, objects: &mut BTreeMap<Key, (Object, String)>, problems: &mut Vec<Problem>) {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, version) = (text("kind"), text("apiVersion"));
    if kind.is_empty() || version.is_empty() {
        problems.push(fault(
            &format!("file {origin}"),
            origin,
            "is no Kubernetes object".to_owned(),
            "add apiVersion and kind",
        ));
        return;
    }
    if kind.ends_with("List") {
        let items = value.get("items").and_then(Value::as_sequence).cloned().unwrap_or_default();
        for item in items {
            object(item, origin, objects, problems);
        }
        return;
    }
    let named = |n: &str| value.get("metadata").and_then(|m| m.get(n)).and_then(Value::as_str).map(str::to_owned);
    let name = named("name").unwrap_or_default();
    let namespace = named("namespace").unwrap_or_else(|| "default".to_owned());
    let full = if kind == "Node" { name.clone() } else { format!("{namespace}/{name}") };
    let label = format!("{kind} {full}");
    let parsed = match (version.as_str(), kind.as_str()) {
        ("v1", "Service") => typed(value).map(|o| Object::Service(Box::new(o))),
        ("discovery.k8s.io/v1", "EndpointSlice") => typed(value).map(|o| Object::Slice(Box::new(o))),
        ("v1", "Node") => typed(value).map(|o| Object::Node(Box::new(o))),
        ("purelb.io/v2" | "purelb.io/v1", "LBNodeAgent") => typed(value).map(|o| Object::NodeAgent(Box::new(o))),
        _ => return,
    };
    let mut bad = |field: String, message: String, remedy: &str| {
        problems.push(Problem { field, ..fault(&label, origin, message, remedy) });
    };
    match parsed {
        _ if name.is_empty() => bad("metadata.name".to_owned(), "is missing".to_owned(), "name the object"),
        Ok(object) => match objects.entry((kind, full)) {
            std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert((object, origin.to_owned()))),
            std::collections::btree_map::Entry::Occupied(entry) => {
                let message = format!("is defined a second time; {} counts", entry.get().1);
                bad(String::new(), message, "remove one of them");
            }
        },
        Err((field, message)) => bad(field, message, "write the field as Kubernetes does"),
    }
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|e| (e.path().to_string(), e.inner().to_string()))
}
