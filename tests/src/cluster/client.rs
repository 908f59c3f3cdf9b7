//! The API as a test uses it: JSON in, JSON out, on a runtime that lives in the cluster's namespace.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::config::AuthInfo;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::objects::{path, path_of};
use crate::netns::Netns;
use crate::sys;

/// One user's client.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    client: Inner,
}

struct Inner(kube::Client);

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

/// The API server said no.
#[derive(Debug, thiserror::Error)]
#[error("{code} {reason}: {message}")]
pub struct Refused {
    /// HTTP
    pub code: u16,
    /// As `Conflict`.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Client {
    /// `headers` go with every request, as those of an impersonation.
    pub(super) fn new(netns: &Netns, token: &str, headers: &[(&'static str, String)]) -> Result<Self> {
        // Its threads are made inside, so its sockets are inside.
        let runtime =
            netns.enter(|| Builder::new_multi_thread().worker_threads(1).enable_all().build())?.context("runtime")?;
        let client = Inner(connect(&runtime, Some(token), headers)?);
        Ok(Self { runtime, client })
    }

    /// A request; its answer as text.
    pub fn raw(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<String> {
        let mut request = http::Request::builder().method(method).uri(path);
        let bytes = match body {
            Some((kind, value)) => {
                request = request.header("content-type", kind);
                serde_json::to_vec(value)?
            }
            None => Vec::new(),
        };
        self.ask(request.body(bytes).context("request")?).with_context(|| format!("{method} {path}"))
    }

    fn ask(&self, request: http::Request<Vec<u8>>) -> Result<String> {
        let client = self.client.0.clone();
        let asked = self
            .runtime
            .spawn(async move { tokio::time::timeout(Duration::from_secs(30), client.request_text(request)).await });
        match self.runtime.block_on(asked).context("the client's thread")?.context("the API server did not answer")? {
            Ok(text) => Ok(text),
            Err(kube::Error::Api(status)) => {
                let (code, reason, message) = (status.code, status.reason.clone(), status.message.clone());
                Err(anyhow!(Refused { code, reason, message }))
            }
            Err(error) => Err(error).context("no answer"),
        }
    }

    fn json(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let text = self.raw(method, path, body)?;
        serde_json::from_str(&text).with_context(|| format!("{method} {path} gave no JSON"))
    }

    /// Server-side apply with strict validation.
    pub fn apply(&self, object: &Value) -> Result<Value> {
        let path = format!("{}?fieldManager=tests&force=true&fieldValidation=Strict", path_of(object)?);
        let applied = self.json("PATCH", &path, Some(("application/apply-patch+yaml", object)));
        applied.with_context(|| format!("apply {}", object["metadata"]["name"]))
    }

    /// Creates it.
    pub fn create(&self, object: &Value) -> Result<Value> {
        let whole = path_of(object)?;
        let of_kind = whole.rsplit_once('/').map_or(whole.as_str(), |(of_kind, _)| of_kind);
        self.json("POST", &format!("{of_kind}?fieldValidation=Strict"), Some(("application/json", object)))
    }

    /// Makes it what is said, if it is still the version that is named in it.
    pub fn replace(&self, object: &Value) -> Result<Value> {
        self.json("PUT", &path_of(object)?, Some(("application/json", object)))
    }

    /// An object.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Result<Value> {
        self.json("GET", &path(kind, namespace, name)?, None)
    }

    /// All objects of a kind, in a namespace where one is named.
    pub fn list(&self, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let list = self.json("GET", &path(kind, namespace, "")?, None)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// What `kubectl get` shows of a path.
    pub fn table(&self, path: &str) -> Result<Value> {
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
        let text = self.ask(http::Request::get(path).header("accept", accept).body(Vec::new())?)?;
        serde_json::from_str(&text).context("no JSON")
    }

    /// A merge patch.
    pub fn patch(&self, kind: &str, namespace: &str, name: &str, patch: &Value) -> Result<Value> {
        let path = path(kind, namespace, name)?;
        self.json("PATCH", &path, Some(("application/merge-patch+json", patch)))
    }

    /// A merge patch of its status.
    pub fn patch_status(&self, kind: &str, namespace: &str, name: &str, status: &Value) -> Result<Value> {
        let path = format!("{}/status", path(kind, namespace, name)?);
        self.json("PATCH", &path, Some(("application/merge-patch+json", &json!({"status": status}))))
    }

    /// Deletes it.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.raw("DELETE", &path(kind, namespace, name)?, None).map(drop)
    }

    /// Waits until an object is as `wanted` says; the last version goes into the error.
    pub fn wait(
        &self,
        kind: &str,
        (namespace, name): (&str, &str),
        what: &str,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = Value::Null;
        let waited = sys::wait_for(&format!("{kind} {namespace}/{name} {what}"), Duration::from_secs(60), || {
            last = self.get(kind, namespace, name)?;
            Ok(wanted(&last))
        });
        waited.map(|()| last.clone()).with_context(|| format!("it is {last}"))
    }
}

/// A client on a runtime, of whom that token is.
pub(super) fn connect(
    runtime: &Runtime,
    token: Option<&str>,
    headers: &[(&'static str, String)],
) -> Result<kube::Client> {
    let mut config = kube::Config::new("https://127.0.0.1:6443".parse().context("address")?);
    config.accept_invalid_certs = true;
    config.default_retry = false;
    for (name, value) in headers {
        config.headers.push((http::HeaderName::from_static(name), value.parse().context("header")?));
    }
    config.auth_info = AuthInfo { token: token.map(|token| token.to_owned().into()), ..AuthInfo::default() };
    let _inside = runtime.enter();
    kube::Client::try_from(config).context("client")
}

/// What the API server refused, and why; an error where it did not.
pub fn refusal<T>(answer: Result<T>) -> Result<Refused> {
    match answer {
        Ok(_) => Err(anyhow!("it was accepted")),
        Err(error) => error.downcast::<Refused>(),
    }
}
