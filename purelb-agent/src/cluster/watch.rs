//! Lists and watches kinds of objects, each on a task of its own, and sends what it sees.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt as _, StreamExt as _};
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, ExponentialBackoff};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::source::parse::{Found, Key, Kind, object};

/// How many pieces of news wait at most: then the watches wait.
const NEWS: usize = 4096;
/// Changes that belong together come together.
const BURST: Duration = Duration::from_millis(3);
/// A watch is begun anew this often, so that one that went silent is noticed.
pub const LIFE: Duration = Duration::from_secs(90);
/// So long after an error it is asked whether the API server knows what was seen.
const DOUBT: Duration = Duration::from_secs(3);
/// After an error it is tried again this soon, ...
const SOON: Duration = Duration::from_millis(200);
/// ... and with further ones at most so late.
pub const LATE: Duration = Duration::from_secs(5);

/// A kind, and what of it.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The kind.
    pub kind: Kind,
    /// Without it there is no list; otherwise its absence is a problem and nothing more.
    pub needed: bool,
    /// Of one namespace only.
    pub namespace: Option<String>,
    /// Field selector.
    pub fields: Option<&'static str>,
    /// Label selector.
    pub labels: Option<&'static str>,
}

impl Watched {
    /// All of a kind that is needed.
    const fn all(kind: Kind) -> Self {
        Self { kind, needed: true, namespace: None, fields: None, labels: None }
    }
}

/// What a watch saw.
#[derive(Debug)]
pub enum News {
    /// All of the kind is listed anew.
    Begun(Kind),
    /// An object as it is, with its resourceVersion; or field and fault of one that cannot be read.
    Seen(Key, String, Result<Arc<Found>, (String, String)>),
    /// It was deleted.
    Gone(Key),
    /// What was not seen since [`News::Begun`] is not there.
    Listed(Kind),
    /// It does not work now, and is tried again.
    Failed(Kind, Fault),
}

/// Why a watch does not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The API server does not know the kind.
    Unknown,
    /// It does not let us.
    Forbidden(String),
    /// Anything else.
    Away(String),
}

/// What a node needs.
#[must_use]
pub fn of_node() -> Vec<Watched> {
    vec![
        Watched { fields: Some("spec.type=LoadBalancer"), ..Watched::all(Kind::Service) },
        // As kube-proxy: a headless Service has no address.
        Watched { labels: Some("!service.kubernetes.io/headless"), ..Watched::all(Kind::Slice) },
        Watched::all(Kind::Node),
        Watched { needed: false, ..Watched::all(Kind::NodeAgent) },
        Watched { needed: false, ..Watched::all(Kind::ServiceGroup) },
    ]
}

/// What the allocator needs. Services of every type: those that were balanced once let go of their addresses. The Leases
/// of the nodes, in its namespace, say which networks they have.
#[must_use]
pub fn of_allocator(namespace: &str) -> Vec<Watched> {
    let labels = Some("app.kubernetes.io/name=purelb,app.kubernetes.io/component=lbnodeagent");
    let namespace = Some(namespace.to_owned());
    vec![
        Watched::all(Kind::Service),
        Watched::all(Kind::ServiceGroup),
        Watched { needed: false, namespace, labels, ..Watched::all(Kind::Lease) },
    ]
}

/// What there is to allocate from, who has what, and which nodes are for it.
#[must_use]
pub fn of_inventory() -> Vec<Watched> {
    vec![
        Watched { fields: Some("spec.type=LoadBalancer"), ..Watched::all(Kind::Service) },
        Watched::all(Kind::ServiceGroup),
        Watched { needed: false, ..Watched::all(Kind::Node) },
        Watched { needed: false, ..Watched::all(Kind::NodeAgent) },
    ]
}

/// Running watches; they end with it.
#[derive(Debug)]
pub struct Feed {
    news: mpsc::Receiver<News>,
    _watches: JoinSet<()>,
}

impl Feed {
    /// Begins. Must be called inside a tokio runtime.
    #[must_use]
    pub fn new(client: &Client, kinds: &[Watched]) -> Self {
        let (sender, news) = mpsc::channel(NEWS);
        let mut watches = JoinSet::new();
        for watched in kinds {
            watches.spawn(run(client.clone(), watched.clone(), sender.clone()));
        }
        Self { news, _watches: watches }
    }

    /// The next news. Loses none when it is dropped half-way.
    pub async fn next(&mut self) -> Vec<News> {
        let mut news = Vec::new();
        self.news.recv_many(&mut news, NEWS).await;
        news
    }

    /// All of the burst that news begin.
    pub async fn burst(&mut self, news: &mut Vec<News>) {
        tokio::time::sleep(BURST).await;
        while let Ok(more) = self.news.try_recv() {
            news.push(more);
        }
    }
}

async fn run(client: Client, watched: Watched, sender: mpsc::Sender<News>) {
    loop {
        // A fault of ours in one watch must not leave its kind as it was for ever.
        match AssertUnwindSafe(follow(&client, &watched, &sender)).catch_unwind().await {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => {
                tracing::error!(
                    event = "watchPanicked",
                    kind = watched.kind.name(),
                    "its watch panicked, and begins anew"
                );
                tokio::time::sleep(LATE).await;
            }
        }
    }
}

/// Follows one watch; whether a new one is to begin with a list.
async fn follow(client: &Client, watched: &Watched, sender: &mpsc::Sender<News>) -> bool {
    let kind = watched.kind;
    let api = api(client, kind, watched.namespace.as_deref());
    let config = watcher::Config {
        field_selector: watched.fields.map(str::to_owned),
        label_selector: watched.labels.map(str::to_owned),
        timeout: u32::try_from(LIFE.as_secs()).ok(),
        ..watcher::Config::default()
    };
    let backoff = backon::ExponentialBuilder::default().with_min_delay(SOON).with_max_delay(LATE).without_max_times();
    let backoff: ExponentialBackoff = backoff.with_jitter().into();
    let mut events = std::pin::pin!(watcher::watcher(api, config).backoff(backoff));
    // What comes after an error is no witness of what was before it.
    let (mut witness, mut suspects, mut doubt) = (None, Vec::new(), None);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = doubtful(doubt) => {
                match remember(client, kind, &suspects).await {
                    Some(true) => {
                        doubt = None;
                        suspects.drain(..suspects.len().saturating_sub(1));
                    }
                    Some(false) => {
                        tracing::warn!(event = "apiServerSetBack", kind = kind.name(), "the API server may have been set back: all is listed anew");
                        return true;
                    }
                    None => doubt = Some(Instant::now() + DOUBT),
                }
                continue;
            }
        };
        let Some(event) = event else { return true };
        let news = match event {
            Ok(Event::Init) => News::Begun(kind),
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                witness = Witness::newest(witness, &object, true);
                seen(kind, object)
            }
            Ok(Event::Delete(object)) => {
                witness = Witness::newest(witness, &object, false);
                News::Gone(key(kind, &object))
            }
            Ok(Event::InitDone) => News::Listed(kind),
            Err(error) => {
                suspects.extend(witness.take());
                doubt = Some(Instant::now() + DOUBT);
                match fault(&error) {
                    Some(fault) => News::Failed(kind, fault),
                    None => continue,
                }
            }
        };
        if sender.send(news).await.is_err() {
            return false;
        }
    }
}

async fn doubtful(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

/// The newest thing that a watch saw: an object in a version, or that it was deleted.
struct Witness {
    namespace: Option<String>,
    name: String,
    version: u64,
    there: bool,
}

impl Witness {
    fn newest(known: Option<Self>, object: &DynamicObject, there: bool) -> Option<Self> {
        let meta = &object.metadata;
        let version = number(meta.resource_version.as_deref());
        if known.as_ref().is_some_and(|known| known.version > version) {
            return known;
        }
        Some(Self { namespace: meta.namespace.clone(), name: meta.name.clone().unwrap_or_default(), version, there })
    }
}

/// Whether it knows all of them.
async fn remember(client: &Client, kind: Kind, suspects: &[Witness]) -> Option<bool> {
    for witness in suspects {
        match remembers(client, kind, witness).await {
            Some(true) => {}
            other => return other,
        }
    }
    Some(true)
}

/// Whether the API server still knows what it told last; `None`: it does not answer. An etcd that was restored from a
/// backup does not, and a watch from a version that it does not know yet would be silent, and miss what comes before.
async fn remembers(client: &Client, kind: Kind, witness: &Witness) -> Option<bool> {
    let Witness { namespace, name, version, there } = witness;
    match api(client, kind, namespace.as_deref()).get_metadata_opt(name).await {
        Ok(Some(now)) => Some(*there && number(now.metadata.resource_version.as_deref()) >= *version),
        Ok(None) => Some(!there),
        Err(_) => None,
    }
}

/// resourceVersions are numbers that grow (Kubernetes KEP-5504).
fn number(version: Option<&str>) -> u64 {
    version.and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// Objects of a kind, in a namespace where one is named.
pub(super) fn api(client: &Client, kind: Kind, namespace: Option<&str>) -> Api<DynamicObject> {
    let (group, version, plural) = match kind {
        Kind::Service => ("", "v1", "services"),
        Kind::Slice => ("discovery.k8s.io", "v1", "endpointslices"),
        Kind::Node => ("", "v1", "nodes"),
        Kind::NodeAgent => ("purelb.io", "v2", "lbnodeagents"),
        Kind::ServiceGroup => ("purelb.io", "v2", "servicegroups"),
        Kind::Lease => ("coordination.k8s.io", "v1", "leases"),
    };
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.name()), plural);
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

fn key(kind: Kind, object: &DynamicObject) -> Key {
    let name = object.metadata.name.clone().unwrap_or_default();
    match &object.metadata.namespace {
        Some(namespace) => (kind, format!("{namespace}/{name}")),
        None => (kind, name),
    }
}

/// Only what [`object`] reads of it is kept.
#[must_use]
pub fn seen(kind: Kind, raw: DynamicObject) -> News {
    let key = key(kind, &raw);
    let DynamicObject { metadata: meta, mut data, .. } = raw;
    let annotations = meta.annotations.unwrap_or_default();
    let ours: BTreeMap<_, _> = annotations.into_iter().filter(|(key, _)| key.starts_with("purelb.io/")).collect();
    // Of a Node all labels may be selected by; of the rest only a slice's lead somewhere.
    let labels =
        if matches!(kind, Kind::Node | Kind::Slice) { meta.labels.unwrap_or_default() } else { BTreeMap::new() };
    if let Value::Object(fields) = &mut data {
        let created = meta.creation_timestamp.map(|time| time.0.to_string()).unwrap_or_default();
        let meta = json!({
            "name": meta.name.unwrap_or_default(),
            "namespace": meta.namespace.unwrap_or_default(),
            "uid": meta.uid.unwrap_or_default(),
            "creationTimestamp": created,
            "generation": if kind == Kind::ServiceGroup { meta.generation.unwrap_or_default() } else { 0 },
            "labels": labels,
            "annotations": ours,
        });
        fields.insert("metadata".to_owned(), meta);
    }
    without_nulls(&mut data);
    let version = meta.resource_version.unwrap_or_default();
    let found = object(kind, data).map(|object| Arc::new(Found { object, origin: String::new() }));
    News::Seen(key, version, found)
}

/// To Kubernetes a field that is null is one that is not there.
pub fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// None where the watch is only begun anew, as for a resourceVersion that the API server has forgotten.
fn fault(error: &watcher::Error) -> Option<Fault> {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status),
        _ => None,
    };
    match status.map(|status| (status.code, &status.message)) {
        Some((404, _)) => Some(Fault::Unknown),
        Some((401 | 403, message)) => Some(Fault::Forbidden(message.clone())),
        Some((410, _)) => None,
        _ => Some(Fault::Away(chain(error))),
    }
}

/// What went wrong, down to the cause.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
