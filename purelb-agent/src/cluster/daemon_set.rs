//! The DaemonSet that runs this agent: when it is deleted its pods end for good, and not for an upgrade.

use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet as Object;
use kube::{Api, Client};

/// The end waits no longer for an answer.
const PATIENCE: Duration = Duration::from_millis(800);

/// One DaemonSet.
#[derive(Clone, Debug)]
pub struct DaemonSet {
    api: Api<Object>,
    name: String,
}

impl DaemonSet {
    /// By its name.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), name: name.to_owned() }
    }

    /// It is gone, or to go. Not when nobody says so in time.
    pub async fn is_going(&self) -> bool {
        let answer = tokio::time::timeout(PATIENCE, self.api.get_metadata_opt(&self.name)).await;
        match answer {
            Ok(Ok(Some(found))) => found.metadata.deletion_timestamp.is_some(),
            Ok(Ok(None)) => true,
            Ok(Err(error)) => {
                tracing::warn!(op = "readDaemonSet", name = self.name, %error, "the end is taken for an upgrade");
                false
            }
            Err(_) => {
                tracing::warn!(op = "readDaemonSet", name = self.name, "no answer: the end is taken for an upgrade");
                false
            }
        }
    }
}
