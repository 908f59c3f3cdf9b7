//! Where the Leases of the nodes are kept, and what a Lease looks like there.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease as Object;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use purelb_plan::announce::lease::{Lease, Statement};
use purelb_plan::announce::owner::{Effect, Event, Found, Written};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::files::Files;
use super::kube_leases::KubeLeases;
use super::{Place, Settings};

/// What the names of the Leases begin with; the node's name follows (PureLB's behaviour, 5.3).
pub const PREFIX: &str = "purelb-node-";
/// Labels of the Leases (PureLB's).
pub const LABELS: [(&str, &str); 2] =
    [("app.kubernetes.io/name", "purelb"), ("app.kubernetes.io/component", "lbnodeagent")];

/// What a watch saw.
#[derive(Debug)]
pub enum Seen {
    /// All there are, and the version of the list.
    All(u64, Vec<Lease>),
    /// One of them.
    One(Lease),
    /// One was deleted: whose, the version of its deletion, and how it was last.
    Gone(String, u64, Option<Lease>),
    /// It does not work, for this reason.
    Away(String),
}

/// Why a write or a read was not answered as it should be.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The object is another version, or there already.
    Conflict,
    /// There is no such object.
    Gone,
    /// Nobody knows.
    Away(String),
}

/// Where they are kept.
#[derive(Clone, Debug)]
pub enum Registry {
    /// On an API server.
    Kube(Box<KubeLeases>),
    /// In a folder.
    Files(Files),
}

impl Registry {
    /// Must be called inside the runtime that will use it.
    ///
    /// # Errors
    /// What is missing, for people.
    pub async fn open(settings: &Settings) -> Result<Self, String> {
        match &settings.place {
            Place::Kube(args) => KubeLeases::open(args, settings).await.map(|leases| Self::Kube(Box::new(leases))),
            Place::Folder(state) => Files::open(state, &settings.node).map(Self::Files),
        }
    }

    /// Begins to watch. It ends with the receiver.
    #[must_use]
    pub fn watch(&self, quiet: Duration) -> mpsc::Receiver<Seen> {
        let (sender, seen) = mpsc::channel(256);
        match self {
            Self::Kube(leases) => drop(tokio::spawn((**leases).clone().follow(sender, quiet))),
            Self::Files(files) => drop(tokio::spawn(files.clone().follow(sender, quiet))),
        }
        seen
    }

    /// Does what the protocol asks of it: the answer, and why it was none.
    pub async fn call(self, effect: Effect) -> (Option<Event>, Option<String>) {
        let mut fault = None;
        let mut note = |found: Fault| match found {
            Fault::Away(why) => drop(fault.insert(why)),
            Fault::Conflict | Fault::Gone => {}
        };
        let event = match effect {
            Effect::List => Event::Listed(self.list().await.map_err(note).ok()),
            Effect::Read { node } => {
                let found = match self.read(&node).await {
                    Ok(Some(lease)) => Found::Lease(lease),
                    Ok(None) => Found::Absent,
                    Err(why) => {
                        note(why);
                        Found::Failed
                    }
                };
                Event::Read { node, found }
            }
            Effect::Create(says) => Event::Written(written(self.create(&says).await, &mut note)),
            Effect::Renew { says, version } => Event::Written(written(self.renew(&says, version).await, &mut note)),
            Effect::Delete { version } => Event::Written(written(self.delete(version).await, &mut note)),
            Effect::Revoke { node, version } => {
                Event::Revoked { result: written(self.revoke(&node, version).await, &mut note), node }
            }
            Effect::Hold(_) | Effect::Withdraw(_) | Effect::Fence(_) | Effect::Stopped => return (None, None),
        };
        (Some(event), fault)
    }

    async fn list(&self) -> Result<(u64, Vec<Lease>), Fault> {
        match self {
            Self::Kube(leases) => leases.list().await,
            Self::Files(files) => aside(files, |files| files.list()).await,
        }
    }

    async fn read(&self, node: &str) -> Result<Option<Lease>, Fault> {
        match self {
            Self::Kube(leases) => leases.read(node).await,
            Self::Files(files) => {
                let node = node.to_owned();
                aside(files, move |files| files.read(&node)).await
            }
        }
    }

    async fn create(&self, says: &Statement) -> Result<Lease, Fault> {
        match self {
            Self::Kube(leases) => leases.create(says).await,
            Self::Files(files) => {
                let says = says.clone();
                aside(files, move |files| files.create(&says)).await
            }
        }
    }

    async fn renew(&self, says: &Statement, version: u64) -> Result<Lease, Fault> {
        match self {
            Self::Kube(leases) => leases.renew(says, version).await,
            Self::Files(files) => {
                let says = says.clone();
                aside(files, move |files| files.renew(&says, version)).await
            }
        }
    }

    async fn revoke(&self, node: &str, version: u64) -> Result<Lease, Fault> {
        match self {
            Self::Kube(leases) => leases.revoke(node, version).await,
            Self::Files(files) => {
                let node = node.to_owned();
                aside(files, move |files| files.revoke(&node, version)).await
            }
        }
    }

    async fn delete(&self, version: u64) -> Result<Lease, Fault> {
        match self {
            Self::Kube(leases) => leases.delete(version).await,
            Self::Files(files) => aside(files, move |files| files.delete(version)).await,
        }
    }
}

/// On a thread of its own: somebody may hold a lock, and nothing waits for that but what needs it.
async fn aside<T: Send + 'static>(
    files: &Files,
    work: impl FnOnce(Files) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let files = files.clone();
    let done = tokio::task::spawn_blocking(move || work(files)).await;
    done.unwrap_or_else(|error| Err(Fault::Away(error.to_string())))
}

fn written(result: Result<Lease, Fault>, note: &mut impl FnMut(Fault)) -> Written {
    match result {
        Ok(lease) => Written::Done { version: lease.version, uid: lease.uid },
        Err(Fault::Conflict) => Written::Conflict,
        Err(Fault::Gone) => Written::Gone,
        Err(away @ Fault::Away(_)) => {
            note(away);
            Written::Unknown
        }
    }
}

/// What an object says; none where it is no node's.
#[must_use]
pub fn read(object: &Object) -> Option<Lease> {
    let node = object.metadata.name.as_deref()?.strip_prefix(PREFIX)?.to_owned();
    let spec = object.spec.as_ref();
    let seconds = spec.and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
    let mut says = Statement::parse(object.annotations(), seconds);
    // Whose it is its name says, to PureLB's agents too.
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| **holder != node);
    if let Some(holder) = holder {
        let odd = says.odd.take().map_or_else(String::new, |odd| format!("{odd}; "));
        says.odd = Some(format!("{odd}its holder is {holder}"));
    }
    let says = says.into();
    let version = object.metadata.resource_version.as_deref()?.parse().ok()?;
    Some(Lease { node, uid: object.metadata.uid.clone().unwrap_or_default(), version, says })
}

/// The fields that say it, as a merge patch: what others wrote into the object stays.
#[must_use]
pub fn patch(node: &str, says: &Statement) -> Value {
    let labels: BTreeMap<_, _> = LABELS.into();
    // RFC 3339 with microseconds. PureLB's agents compare it with their wall clocks; ours never look at it.
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
    json!({
        "metadata": {"labels": labels, "annotations": says.encode()},
        "spec": {
            "holderIdentity": node,
            "leaseDurationSeconds": says.duration.div_ceil(1000),
            "renewTime": now,
        },
    })
}
