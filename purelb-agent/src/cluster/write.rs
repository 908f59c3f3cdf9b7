//! What the allocator writes: a Service's status and annotations in one conditional patch, status of ServiceGroups, events.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{self, EventType, Recorder, Reporter};
use kube::{Api, Client};
use purelb_plan::alloc::claim::{Claim, Decision, Event};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::watch::api;
use crate::source::claim::ALLOCATED;
use crate::source::parse::Kind;

/// Whose fields the status of ServiceGroups is, as PureLB's allocator names itself.
pub const MANAGER: &str = "purelb-allocator";
/// No request takes longer.
const LIMIT: Duration = Duration::from_secs(10);
/// Events a second; a burst waits.
const EVENTS: u32 = 20;
/// So many wait at most.
const WAITING: usize = 2_000;

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The object is another version, or gone: it never comes true.
    Outdated,
    /// The API server refuses it, and it never comes true.
    Refused(String),
    /// Nobody knows.
    Unknown(String),
}

/// Makes a Service what was decided, if it is still that version. `now` in RFC 3339.
#[must_use]
pub fn patch(claim: &Claim, version: &str, decision: &Decision, now: &str) -> Value {
    let mut status = Map::new();
    if decision.ingress != claim.ingress {
        let entries: Vec<_> =
            decision.ingress.iter().map(|ip| json!({"ip": ip.to_string(), "ipMode": "VIP"})).collect();
        let ingress = if entries.is_empty() { Value::Null } else { Value::Array(entries) };
        status.insert("loadBalancer".to_owned(), json!({"ingress": ingress}));
    }
    if decision.condition != claim.condition {
        let condition = match &decision.condition {
            None => json!({"type": ALLOCATED, "$patch": "delete"}),
            Some(new) => {
                let mut entry = json!({
                    "type": ALLOCATED,
                    "status": if new.status { "True" } else { "False" },
                    "reason": new.reason,
                    "message": new.message,
                });
                if claim.condition.as_ref().is_none_or(|old| old.status != new.status) {
                    entry["lastTransitionTime"] = now.into();
                }
                entry
            }
        };
        status.insert("conditions".to_owned(), json!([condition]));
    }
    let mut metadata = Map::new();
    metadata.insert("uid".to_owned(), claim.uid.as_str().into());
    metadata.insert("resourceVersion".to_owned(), version.into());
    let annotated = |(key, value): &(&&str, &Option<String>)| claim.annotations.get(**key) != value.as_ref();
    let annotations: Map<_, _> =
        decision.annotations.iter().filter(annotated).map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    if !annotations.is_empty() {
        metadata.insert("annotations".to_owned(), Value::Object(annotations));
    }
    json!({"metadata": metadata, "status": status})
}

/// Writes such a patch.
pub async fn service(client: Client, name: &str, patch: Value) -> Outcome {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let api: Api<Service> = Api::namespaced(client, namespace);
    // Strategic: the conditions of others stay.
    let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
    outcome(tokio::time::timeout(LIMIT, api.patch_status(name, &params, &patch)).await)
}

/// Writes the status of a ServiceGroup, all of it ours.
pub async fn group(client: Client, namespace: &str, name: &str, status: &Value) -> Outcome {
    let api = api(&client, Kind::ServiceGroup, Some(namespace));
    let object =
        json!({"apiVersion": "purelb.io/v2", "kind": "ServiceGroup", "metadata": {"name": name}, "status": status});
    let (params, patch) = (PatchParams::apply(MANAGER).force(), Patch::Apply(object));
    outcome(tokio::time::timeout(LIMIT, api.patch_status(name, &params, &patch)).await)
}

fn outcome<T>(answer: Result<kube::Result<T>, tokio::time::error::Elapsed>) -> Outcome {
    match answer {
        Ok(Ok(_)) => Outcome::Done,
        Ok(Err(kube::Error::Api(status))) => match status.code {
            404 | 409 => Outcome::Outdated,
            // These are said before anything is written.
            429 => Outcome::Refused(status.message.clone()),
            500 if status.message.contains("failed calling webhook") => Outcome::Refused(status.message.clone()),
            500.. => Outcome::Unknown(status.message.clone()),
            _ => Outcome::Refused(status.message.clone()),
        },
        Ok(Err(error)) => Outcome::Unknown(error.to_string()),
        Err(_) => Outcome::Unknown(format!("no answer in {LIMIT:?}")),
    }
}

/// The time as Kubernetes writes it.
#[must_use]
pub fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Publishes events in the background, so many a second; when too many wait they are dropped.
#[derive(Clone, Debug)]
pub struct Events {
    waiting: mpsc::Sender<(events::Event, ObjectReference)>,
}

impl Events {
    /// Must be called inside a tokio runtime; ends with its last clone.
    #[must_use]
    pub fn new(client: Client, controller: &str, identity: &str) -> Self {
        let reporter = Reporter { controller: controller.to_owned(), instance: Some(identity.to_owned()) };
        let recorder = Recorder::new(client, reporter);
        let (waiting, mut queue) = mpsc::channel::<(events::Event, ObjectReference)>(WAITING);
        tokio::spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_secs(1) / EVENTS);
            while let Some((event, about)) = queue.recv().await {
                pace.tick().await;
                if let Err(error) = recorder.publish(&event, &about).await {
                    tracing::warn!(op = "publishEvent", %error, reason = event.reason, "event not published");
                }
            }
        });
        Self { waiting }
    }

    /// About a Service.
    pub fn service(&self, name: &str, uid: &str, event: &Event) {
        self.publish(event, ("v1", "Service", name, uid));
    }

    /// About a ServiceGroup.
    pub fn group(&self, name: &str, uid: &str, event: &Event) {
        self.publish(event, ("purelb.io/v2", "ServiceGroup", name, uid));
    }

    fn publish(&self, event: &Event, about: (&str, &str, &str, &str)) {
        let Event { warning, reason, message } = event;
        let (version, kind, name, uid) = about;
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        let about = ObjectReference {
            api_version: Some(version.to_owned()),
            kind: Some(kind.to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(name.to_owned()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        let event = events::Event {
            type_: if *warning { EventType::Warning } else { EventType::Normal },
            reason: (*reason).to_owned(),
            // What is longer is refused.
            note: Some(message.chars().take(1000).collect()),
            action: if reason.starts_with("Announc") { "Announce" } else { "Allocate" }.to_owned(),
            secondary: None,
        };
        if self.waiting.try_send((event, about)).is_err() {
            tracing::debug!(op = "publishEvent", reason, name, "too many events: one is dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use purelb_plan::alloc::claim::Condition;

    use super::*;

    /// Section 11.15: addresses, annotations and condition by one patch.
    #[test]
    fn only_what_differs_is_written() {
        let condition = Condition { status: true, reason: "Allocated".to_owned(), message: "192.0.2.1".to_owned() };
        let claim = Claim { uid: "u".to_owned(), ..Claim::default() };
        let mut decision = Decision {
            ingress: vec!["192.0.2.1".parse().unwrap()],
            annotations: [("purelb.io/a", Some("1".to_owned())), ("purelb.io/b", None)].into(),
            condition: Some(condition.clone()),
            ..Decision::default()
        };
        let whole = json!({
            "metadata": {"uid": "u", "resourceVersion": "7", "annotations": {"purelb.io/a": "1"}},
            "status": {
                "loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "VIP"}]},
                "conditions": [{
                    "type": "purelb.io/Allocated", "status": "True", "reason": "Allocated", "message": "192.0.2.1",
                    "lastTransitionTime": "now",
                }],
            },
        });
        assert_eq!(patch(&claim, "7", &decision, "now"), whole);
        let claim = Claim {
            ingress: decision.ingress.clone(),
            annotations: [("purelb.io/a".to_owned(), "1".to_owned()), ("purelb.io/b".to_owned(), "x".to_owned())]
                .into(),
            condition: Some(Condition { message: "old".to_owned(), ..condition }),
            ..claim
        };
        let message = json!({
            "metadata": {"uid": "u", "resourceVersion": "8", "annotations": {"purelb.io/b": null}},
            "status": {"conditions": [{
                "type": "purelb.io/Allocated", "status": "True", "reason": "Allocated", "message": "192.0.2.1",
            }]},
        });
        assert_eq!(patch(&claim, "8", &decision, "now"), message, "the time of the transition stays");
        (decision.ingress, decision.condition) = (Vec::new(), None);
        let none = json!({
            "loadBalancer": {"ingress": null},
            "conditions": [{"type": "purelb.io/Allocated", "$patch": "delete"}],
        });
        assert_eq!(patch(&claim, "9", &decision, "now")["status"], none);
    }
}
