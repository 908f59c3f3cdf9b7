//! The Leases on an API server.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease as Object;
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams};
use kube::{Api, ResourceExt as _};
use purelb_plan::announce::lease::{Lease, REVOKED, Statement};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Settings;
use super::registry::{Fault, LABELS, PREFIX, Seen, patch, read};
use crate::args;
use crate::cluster::connect::{self, Connection};
use crate::cluster::watch::without_nulls;

/// After a fault it is watched again this soon, and with further ones at most so late.
const SOON: Duration = Duration::from_millis(100);
const LATE: Duration = Duration::from_secs(2);

/// The Leases of one namespace.
#[derive(Clone, Debug)]
pub struct KubeLeases {
    api: Api<Object>,
    nodes: Api<Node>,
    node: String,
    /// No request takes longer.
    limit: Duration,
}

impl KubeLeases {
    /// On a connection of its own.
    pub async fn open(args: &args::Kube, settings: &Settings) -> Result<Self, String> {
        let Connection { client, namespace, .. } = connect::connect(args).await.map_err(|error| error.to_string())?;
        Ok(Self {
            api: Api::namespaced(client.clone(), &namespace),
            nodes: Api::all(client),
            node: settings.node.clone(),
            // So that two more fit before the node has to withdraw.
            limit: Duration::from_millis(settings.duration / 5).max(Duration::from_millis(500)),
        })
    }

    fn name(&self) -> String {
        format!("{PREFIX}{}", self.node)
    }

    /// Consistent: without a resourceVersion the API server asks etcd. Our own is among them though somebody took its
    /// labels away: it would be made anew in vain.
    pub async fn list(&self) -> Result<(u64, Vec<Lease>), Fault> {
        let (version, mut leases) = self.list_labelled().await?;
        if !leases.iter().any(|lease| lease.node == self.node) {
            leases.extend(self.read(&self.node).await?);
        }
        Ok((version, leases))
    }

    async fn list_labelled(&self) -> Result<(u64, Vec<Lease>), Fault> {
        let list = self.timely(self.api.list(&ListParams::default().labels(&labels()))).await?;
        let version = list.metadata.resource_version.as_deref().and_then(|version| version.parse().ok());
        let version = version.ok_or_else(|| Fault::Away("a list without a version".to_owned()))?;
        Ok((version, list.items.iter().filter_map(read).collect()))
    }

    pub async fn read(&self, node: &str) -> Result<Option<Lease>, Fault> {
        let name = format!("{PREFIX}{node}");
        Ok(self.timely(self.api.get_opt(&name)).await?.as_ref().and_then(read))
    }

    pub async fn create(&self, says: &Statement) -> Result<Lease, Fault> {
        let mut value = patch(&self.node, says);
        value["metadata"]["name"] = self.name().into();
        // It goes with its Node. A cluster without that object has no Service of this node either.
        if let Some(node) = self.timely(self.nodes.get_metadata_opt(&self.node)).await? {
            let owner = json!({
                "apiVersion": "v1", "kind": "Node", "name": self.node, "uid": node.uid().unwrap_or_default(),
                "controller": false, "blockOwnerDeletion": false,
            });
            value["metadata"]["ownerReferences"] = json!([owner]);
        }
        // A merge patch says by null what is not there.
        without_nulls(&mut value);
        let object: Object = serde_json::from_value(value).map_err(|error| Fault::Away(error.to_string()))?;
        known(self.timely(self.api.create(&PostParams::default(), &object)).await)
    }

    pub async fn renew(&self, says: &Statement, version: u64) -> Result<Lease, Fault> {
        self.patch(&self.name(), version, patch(&self.node, says)).await
    }

    pub async fn revoke(&self, node: &str, version: u64) -> Result<Lease, Fault> {
        let patch = json!({"metadata": {"annotations": {REVOKED: self.node}}});
        self.patch(&format!("{PREFIX}{node}"), version, patch).await
    }

    pub async fn delete(&self, version: u64) -> Result<Lease, Fault> {
        let preconditions = Preconditions { resource_version: Some(version.to_string()), uid: None };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        self.timely(self.api.delete(&self.name(), &params)).await?;
        let says = std::sync::Arc::default();
        Ok(Lease { node: self.node.clone(), uid: String::new(), version, says })
    }

    async fn patch(&self, name: &str, version: u64, mut patch: Value) -> Result<Lease, Fault> {
        patch["metadata"]["resourceVersion"] = version.to_string().into();
        known(self.timely(self.api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await)
    }

    async fn timely<T>(&self, request: impl Future<Output = kube::Result<T>>) -> Result<T, Fault> {
        match tokio::time::timeout(self.limit, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Err(Fault::Conflict),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(Fault::Gone),
            Ok(Err(error)) => Err(Fault::Away(error.to_string())),
            Err(_) => Err(Fault::Away(format!("no answer in {:?}", self.limit))),
        }
    }

    /// Watches until nobody listens. A watch in which nothing comes for so long, not even this node's own renewals, has
    /// gone silent.
    pub async fn follow(self, seen: mpsc::Sender<Seen>, quiet: Duration) {
        let mut rest = SOON;
        loop {
            let begin = Instant::now();
            match self.watch(&seen, quiet).await {
                Ok(true) if begin.elapsed() > LATE => rest = SOON,
                // One that ends at once is no better than none.
                Ok(true) => {
                    tokio::time::sleep(rest).await;
                    rest = (rest * 2).min(LATE);
                }
                Ok(false) => return,
                Err(why) => {
                    if seen.send(Seen::Away(why)).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(rest).await;
                    rest = (rest * 2).min(LATE);
                }
            }
        }
    }

    /// One watch, from a list on; whether there is to be another.
    async fn watch(&self, seen: &mpsc::Sender<Seen>, quiet: Duration) -> Result<bool, String> {
        let (version, leases) = self.list_labelled().await.map_err(|fault| match fault {
            Fault::Away(why) => why,
            Fault::Conflict | Fault::Gone => "Leases are unknown".to_owned(),
        })?;
        if seen.send(Seen::All(version, leases)).await.is_err() {
            return Ok(false);
        }
        let params = WatchParams::default().labels(&labels());
        let begun = tokio::time::timeout(self.limit, self.api.watch(&params, &version.to_string())).await;
        let mut events = begun.map_err(|_| "the watch does not begin")?.map_err(|error| error.to_string())?.boxed();
        while let Ok(Some(event)) = tokio::time::timeout(quiet, events.next()).await {
            let news = match event.map_err(|error| error.to_string())? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => read(&object).map(Seen::One),
                WatchEvent::Deleted(object) => {
                    read(&object).map(|last| Seen::Gone(last.node.clone(), last.version, Some(last)))
                }
                WatchEvent::Bookmark(_) => None,
                // Too old a version above all: list anew.
                WatchEvent::Error(_) => return Ok(true),
            };
            if let Some(news) = news
                && seen.send(news).await.is_err()
            {
                return Ok(false);
            }
        }
        Ok(!seen.is_closed())
    }
}

fn labels() -> String {
    LABELS.map(|(key, value)| format!("{key}={value}")).join(",")
}

fn known(answer: Result<Object, Fault>) -> Result<Lease, Fault> {
    read(&answer?).ok_or_else(|| Fault::Away("an answer without a version".to_owned()))
}
