//! From the text of a file to objects: documents, lists, kinds. No I/O.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use purelb_plan::problem::Problem;
use serde::{Deserialize, Deserializer};
use serde_yaml_ng::Value;

use super::node_agent::NodeAgent;
use super::objects::{EndpointSlice, Lease, Node, Service, ServiceGroup};

/// The kinds that count here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// v1
    Service,
    /// discovery.k8s.io/v1
    Slice,
    /// v1
    Node,
    /// purelb.io/v2
    NodeAgent,
    /// purelb.io/v2
    ServiceGroup,
    /// coordination.k8s.io/v1; in a cluster only.
    Lease,
}

impl Kind {
    /// As Kubernetes writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::Slice => "EndpointSlice",
            Self::Node => "Node",
            Self::NodeAgent => "LBNodeAgent",
            Self::ServiceGroup => "ServiceGroup",
            Self::Lease => "Lease",
        }
    }
}

/// Kind and `namespace/name`; a Node's name alone.
pub type Key = (Kind, String);

/// `Service default/web`, as problems name objects.
#[must_use]
pub fn label((kind, name): &Key) -> String {
    format!("{} {name}", kind.name())
}

/// An object of one of the kinds.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    Slice(Box<EndpointSlice>),
    /// A Node.
    Node(Box<Node>),
    /// An LBNodeAgent.
    NodeAgent(Box<NodeAgent>),
    /// A ServiceGroup.
    ServiceGroup(Box<ServiceGroup>),
    /// A Lease.
    Lease(Box<Lease>),
}

/// An object and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The object.
    pub object: Object,
    /// `file:line`
    pub origin: String,
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Each object once.
    pub objects: BTreeMap<Key, Arc<Found>>,
    /// What could not be read as an object.
    pub problems: Vec<Problem>,
    /// Nothing but space and comments.
    pub blank: bool,
}

/// A problem with the file or object of that name.
#[must_use]
pub fn fault(object: &str, origin: &str, message: String, remedy: &str) -> Problem {
    Problem {
        object: object.to_owned(),
        field: String::new(),
        message,
        remedy: remedy.to_owned(),
        origin: origin.to_owned(),
    }
}

/// Parses all documents of a file.
#[must_use]
pub fn parse(file: &str, text: &str) -> Parsed {
    let mut out = Parsed { blank: true, ..Parsed::default() };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut start = 1;
    let mut document = String::new();
    for (number, line) in (1..).zip(text.lines()) {
        match line.strip_prefix("---") {
            Some(rest) if rest.is_empty() || rest.starts_with([' ', '\t']) => {
                out.document(file, start, &document);
                document.clear();
                start = number;
                // What follows the marker belongs to the new document.
                document.push_str(rest);
            }
            _ => document.push_str(line),
        }
        document.push('\n');
    }
    out.document(file, start, &document);
    out
}

impl Parsed {
    fn document(&mut self, file: &str, start: usize, text: &str) {
        let empty = |line: &&str| line.trim().is_empty() || line.trim_start().starts_with(['#', '%']);
        // Comments before the object do not move its line.
        let blank = text.lines().take_while(empty).count();
        if blank == text.lines().count() {
            return;
        }
        self.blank = false;
        // JSON is YAML too, but its own parser is eight times as fast.
        let json = text.trim_start().starts_with('{').then(|| serde_json::from_str::<Value>(text).ok()).flatten();
        match json.map_or_else(|| serde_yaml_ng::from_str::<Value>(text), Ok) {
            Ok(value) => {
                let origin = format!("{file}:{}", start + blank);
                self.object(value, &origin, &format!("file {origin}"));
            }
            Err(error) => {
                let line = error.location().map_or(start + blank, |l| start + l.line().max(1) - 1);
                let origin = format!("{file}:{line}");
                self.problems.push(fault(&format!("file {file}"), &origin, error.to_string(), "correct the YAML"));
            }
        }
    }

    /// `place` names it as long as its own name is not known.
    fn object(&mut self, mut value: Value, origin: &str, place: &str) {
        without_nulls(&mut value);
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, version) = (text(&value, "kind"), text(&value, "apiVersion"));
        if kind.is_empty() || version.is_empty() {
            let message = "is no Kubernetes object".to_owned();
            return self.problems.push(fault(place, origin, message, "add apiVersion and kind"));
        }
        if let (Some(of), Some(Value::Sequence(items))) = (kind.strip_suffix("List"), value.get_mut("items")) {
            for (index, mut item) in std::mem::take(items).into_iter().enumerate() {
                // The items of a typed list need not repeat what they are.
                if let (false, Value::Mapping(item)) = (of.is_empty(), &mut item) {
                    item.entry("kind".into()).or_insert_with(|| of.into());
                    item.entry("apiVersion".into()).or_insert_with(|| version.as_str().into());
                }
                self.object(item, origin, &format!("{place} items[{index}]"));
            }
            return;
        }
        let Some(kind) = known(&kind, &version) else {
            if let Some(right) = other_version(&kind, &version) {
                let message = format!("{kind} of {version} is not read");
                let problem = fault(place, origin, message, &format!("write it as {right}"));
                self.problems.push(Problem { field: "apiVersion".to_owned(), ..problem });
            }
            return;
        };
        let named = |n: &str| value.get("metadata").and_then(|m| m.get(n)).and_then(Value::as_str).unwrap_or_default();
        let name = named("name").to_owned();
        let key = match (kind, named("namespace")) {
            (Kind::Node, _) => (kind, name.clone()),
            (_, "") => (kind, format!("default/{name}")),
            (_, namespace) => (kind, format!("{namespace}/{name}")),
        };
        let parsed = object(kind, value);
        let label = label(&key);
        let bad = |field: &str, message: String, remedy: &str| Problem {
            field: field.to_owned(),
            ..fault(&label, origin, message, remedy)
        };
        match parsed {
            _ if name.is_empty() => {
                self.problems.push(bad("metadata.name", "is missing".to_owned(), "name the object"));
            }
            Err((field, message)) => self.problems.push(bad(&field, message, "write the field as Kubernetes does")),
            Ok(object) => match self.objects.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(Arc::new(Found { object, origin: origin.to_owned() }));
                }
                Entry::Occupied(entry) => {
                    let message = format!("is defined a second time; {} counts", entry.get().origin);
                    self.problems.push(bad("", message, "remove one of them"));
                }
            },
        }
    }
}

fn known(kind: &str, version: &str) -> Option<Kind> {
    match (version, kind) {
        ("v1", "Service") => Some(Kind::Service),
        ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::Slice),
        ("v1", "Node") => Some(Kind::Node),
        ("purelb.io/v2" | "purelb.io/v1", "LBNodeAgent") => Some(Kind::NodeAgent),
        ("purelb.io/v2", "ServiceGroup") => Some(Kind::ServiceGroup),
        _ => None,
    }
}

/// The version that is read, for a kind whose group is right; other groups may use the same words.
fn other_version(kind: &str, version: &str) -> Option<&'static str> {
    match (kind, version.split_once('/')?.0) {
        ("EndpointSlice", "discovery.k8s.io") => Some("discovery.k8s.io/v1"),
        ("LBNodeAgent" | "ServiceGroup", "purelb.io") => Some("purelb.io/v2"),
        _ => None,
    }
}

/// To Kubernetes a field that is null is one that is not there.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Mapping(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Sequence(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// The object of a kind, without fields that are null.
///
/// # Errors
/// Field path and fault where it does not fit.
pub fn object<'de, D: Deserializer<'de>>(kind: Kind, value: D) -> Result<Object, (String, String)> {
    match kind {
        Kind::Service => typed(value).map(Object::Service),
        Kind::Slice => typed(value).map(Object::Slice),
        Kind::Node => typed(value).map(Object::Node),
        Kind::NodeAgent => typed(value).map(Object::NodeAgent),
        Kind::ServiceGroup => typed(value).map(Object::ServiceGroup),
        Kind::Lease => typed(value).map(Object::Lease),
    }
}

fn typed<'de, T: Deserialize<'de>, D: Deserializer<'de>>(value: D) -> Result<Box<T>, (String, String)> {
    let parsed = serde_path_to_error::deserialize(value).map(Box::new);
    parsed.map_err(|e| (e.path().to_string(), e.inner().to_string()))
}
