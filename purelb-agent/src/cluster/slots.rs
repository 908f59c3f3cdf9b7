//! Writes into Services which node says that it announces what, and on which interface: PureLB's annotations, for people
//! and tools (`purelb_plan::announce::slots`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use purelb_plan::alloc::claim::Event;
use purelb_plan::announce::slots::{ANNOUNCING_V4, ANNOUNCING_V6, reconcile};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::write::Events;

/// A write that failed is tried again after so long, ...
const AGAIN: Duration = Duration::from_secs(1);
/// ... and where it fails again and again after so long at most.
const LATE: Duration = Duration::from_secs(60);
/// No request takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// What this node has of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Won {
    /// Addresses that it answers for, and their interfaces.
    pub on: Vec<(IpAddr, String)>,
    /// Those among them that it came to have since it began.
    pub fresh: BTreeSet<IpAddr>,
    /// Those that it should have and has not, and why.
    pub failed: Vec<(IpAddr, String)>,
}

/// Writes in the background, the newest word about each Service.
#[derive(Clone, Debug)]
pub struct Slots {
    jobs: mpsc::UnboundedSender<(String, Won)>,
}

impl Slots {
    /// Must be called inside a tokio runtime; ends with its last clone.
    #[must_use]
    pub fn new(client: Client, node: &str) -> Self {
        let (jobs, queue) = mpsc::unbounded_channel();
        let events = Events::new(client.clone(), "purelb-lbnodeagent", node);
        let writer = Writer { client, node: node.to_owned(), events };
        tokio::spawn(writer.run(queue));
        Self { jobs }
    }

    /// Of a Service, by `namespace/name`.
    pub fn say(&self, service: &str, won: Won) {
        // Nobody listens only when everything ends.
        let _ = self.jobs.send((service.to_owned(), won));
    }
}

struct Writer {
    client: Client,
    node: String,
    events: Events,
}

impl Writer {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<(String, Won)>) {
        let mut waiting: BTreeMap<String, Won> = BTreeMap::new();
        let (mut failed, mut rest) = (BTreeMap::new(), AGAIN);
        loop {
            // What was said meanwhile counts, not what was said first: another node may have the address by now.
            while let Ok((service, won)) = queue.try_recv() {
                failed.remove(&service);
                waiting.insert(service, won);
            }
            if let Some((service, won)) = waiting.pop_first() {
                match self.write(&service, &won).await {
                    Ok(()) => rest = AGAIN,
                    Err(error) => {
                        tracing::warn!(
                            op = "writeSlots",
                            svc = service,
                            error,
                            "what announces it is not written; tried again"
                        );
                        failed.insert(service, won);
                    }
                }
                continue;
            }
            let more = async {
                if failed.is_empty() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(rest).await;
            };
            tokio::select! {
                said = queue.recv() => match said {
                    Some((service, won)) => {
                        failed.remove(&service);
                        waiting.insert(service, won);
                    }
                    None => return,
                },
                () = more => {
                    waiting.append(&mut failed);
                    rest = (rest * 2).min(LATE);
                }
            }
        }
    }

    /// One Service, bound to the version that it was decided by: two nodes may write one annotation.
    async fn write(&self, name: &str, won: &Won) -> Result<(), String> {
        let (namespace, short) = name.split_once('/').unwrap_or(("default", name));
        let api: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let late = |_| "no answer".to_owned();
        let found = tokio::time::timeout(LIMIT, api.get_opt(short)).await.map_err(late)?;
        let Some(service) = found.map_err(|error| error.to_string())? else { return Ok(()) };
        let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let ingress = status.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten();
        let ingress: BTreeSet<IpAddr> = ingress.filter_map(|entry| entry.ip.as_deref()?.parse().ok()).collect();
        let (mut annotations, mut stolen) = (Map::new(), Vec::new());
        for (key, v4) in [(ANNOUNCING_V4, true), (ANNOUNCING_V6, false)] {
            let of: Vec<_> =
                won.on.iter().filter(|(ip, _)| ip.is_ipv4() == v4 && ingress.contains(ip)).cloned().collect();
            let text = service.annotations().get(key).map(String::as_str);
            if let Some(change) = reconcile(text, &self.node, &of, &ingress) {
                annotations.insert(key.to_owned(), change.text.map_or(Value::Null, Value::from));
                stolen.extend(change.stolen_from);
            }
        }
        let uid = service.uid().unwrap_or_default();
        let say = |warning, reason, message| self.events.service(name, &uid, &Event { warning, reason, message });
        let fail = || {
            for (ip, why) in won.failed.iter().filter(|(ip, _)| ingress.contains(ip)) {
                say(true, "AnnouncementFailed", format!("{ip} on node {}: {why}", self.node));
            }
        };
        if annotations.is_empty() {
            fail();
            return Ok(());
        }
        let version = service.resource_version().unwrap_or_default();
        let patch = json!({"metadata": {"resourceVersion": version, "annotations": annotations}});
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        tokio::time::timeout(LIMIT, api.patch(short, &params, &patch))
            .await
            .map_err(late)?
            .map_err(|error| error.to_string())?;
        fail();
        // Kubernetes takes events with one reason for one that is repeated, so all of it is in one.
        if won.on.iter().any(|(ip, _)| won.fresh.contains(ip) && ingress.contains(ip)) {
            let all: Vec<_> = won.on.iter().map(|(ip, iface)| format!("{ip} on {iface}")).collect();
            say(false, "AnnouncingLocal", format!("node {} announces {}", self.node, all.join(", ")));
        }
        for (ip, from) in stolen {
            say(false, "AnnounceSlotSteal", format!("{ip} went from node {from} to node {}", self.node));
        }
        Ok(())
    }
}
