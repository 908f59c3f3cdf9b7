//! An installation of its own in a shared control plane: a namespace with the roles of `deploy/base`, a class of
//! Services, and allocators that run under those roles.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::objects::manifests;
use super::proxy::Proxy;
use super::{Client, Cluster};
use crate::agent::binary;
use crate::sys;

/// Where the manifests install to.
pub const INSTALL: &str = "purelb-system";

/// An installation.
#[derive(Debug)]
pub struct Tenant<'a> {
    /// The control plane.
    pub cluster: &'a Cluster,
    /// Its namespace, which its Services are in too.
    pub namespace: String,
    /// All rights.
    pub admin: Client,
}

/// A running allocator.
#[derive(Debug)]
pub struct Allocator {
    child: Option<Child>,
    log: PathBuf,
}

impl<'a> Tenant<'a> {
    /// In a namespace of that name.
    pub fn new(cluster: &'a Cluster, name: &str) -> Result<Self> {
        let admin = cluster.admin()?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        admin.create(&namespace).context("a namespace of its own: is the name another test's?")?;
        for object in manifests("deploy/base")? {
            let kind = object["kind"].as_str().unwrap_or_default();
            if kind.contains("Role") || kind == "ServiceAccount" {
                admin.apply(&moved(&object, name)?)?;
            }
        }
        Ok(Self { cluster, namespace: name.to_owned(), admin })
    }

    /// Its class of Services.
    #[must_use]
    pub fn class(&self) -> String {
        format!("purelb.io/{}", self.namespace)
    }

    /// Starts an allocator of its class.
    pub fn allocator(&self, more: &[&str]) -> Result<Allocator> {
        let class = self.class();
        let mut all = vec!["--default-announcer", "none", "--load-balancer-class", &class];
        all.extend(more);
        Allocator::start(self.cluster, &self.namespace, &all)
    }

    /// One of our commands, with all rights: its exit code and what it says.
    pub fn command(&self, args: &[&str]) -> Result<(i32, String)> {
        let mut command = self.cluster.netns.command(binary()?);
        command.args(args).args(["--namespace", &self.namespace, "--kubeconfig"]).arg(self.cluster.kubeconfig());
        let output = command.output().context("start purelb-agent by nsenter")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code().unwrap_or(-1), text))
    }

    /// The same behind a proxy.
    pub fn allocator_behind(&self, proxy: &Proxy, more: &[&str]) -> Result<Allocator> {
        let class = self.class();
        let mut all = vec!["--default-announcer", "none", "--load-balancer-class", &class];
        all.extend(more);
        let config = proxy.before(&self.cluster.account("127.0.0.1", &self.namespace, "allocator")?)?;
        Allocator::start_with(self.cluster, &self.namespace, &config, &all)
    }

    /// Makes so many Services.
    pub fn create_many(&self, prefix: &str, count: usize) -> Result<()> {
        (0..count).try_for_each(|number| self.create(&format!("{prefix}{number}"), json!({}), json!({})).map(drop))
    }

    /// Who has what. An error where two have the same.
    pub fn given(&self) -> Result<BTreeMap<String, String>> {
        given(&self.admin, &self.namespace)
    }

    /// Waits until so many have an address: who has what.
    pub fn all_served(&self, count: usize) -> Result<BTreeMap<String, String>> {
        sys::wait_for(&format!("{count} Services have an address"), Duration::from_secs(180), || {
            let found = self.given()?.len();
            ensure!(found == count, "{found} have one");
            Ok(true)
        })?;
        self.given()
    }

    /// Makes a ServiceGroup.
    pub fn group(&self, name: &str, spec: Value) -> Result<Value> {
        self.admin.apply(&json!({
            "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
            "metadata": {"name": name, "namespace": self.namespace}, "spec": spec,
        }))
    }

    /// A Service of its class, whose `spec` and annotations are more than the default.
    #[must_use]
    pub fn service(&self, name: &str, annotations: Value, spec: Value) -> Value {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": self.namespace, "annotations": annotations},
            "spec": {
                "type": "LoadBalancer", "loadBalancerClass": self.class(), "allocateLoadBalancerNodePorts": false,
                "ports": [{"name": "http", "port": 80, "protocol": "TCP"}], "selector": {"app": name},
            },
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            object["spec"][key] = value.clone();
        }
        object
    }

    /// Makes one.
    pub fn create(&self, name: &str, annotations: Value, spec: Value) -> Result<Value> {
        self.admin.create(&self.service(name, annotations, spec))
    }

    /// Makes one and waits for the condition; its addresses with spaces, or the reason why it has none.
    pub fn asks(&self, name: &str, annotations: Value, spec: Value) -> Result<String> {
        self.create(name, annotations, spec)?;
        self.answer(name)
    }

    /// What a Service got: its addresses with spaces, or the reason why it has none.
    pub fn answer(&self, name: &str) -> Result<String> {
        let service = self.wait(name, "has the condition", |service| condition(service).is_some())?;
        Ok(said(&service))
    }

    /// Waits until a Service is as `wanted` says.
    pub fn wait(&self, name: &str, what: &str, wanted: impl FnMut(&Value) -> bool) -> Result<Value> {
        self.admin.wait("Service", (&self.namespace, name), what, wanted)
    }

    /// A Service as it is.
    pub fn get(&self, name: &str) -> Result<Value> {
        self.admin.get("Service", &self.namespace, name)
    }

    /// Deletes one.
    pub fn delete(&self, name: &str) -> Result<()> {
        self.admin.delete("Service", &self.namespace, name)
    }

    /// What its allocators wrote last.
    #[must_use]
    pub fn log(&self) -> String {
        let entries = std::fs::read_dir(self.cluster.folder()).into_iter().flatten().flatten();
        let own = format!("{}-allocator-", self.namespace);
        let mut logs: Vec<_> =
            entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(&own)).collect();
        logs.sort();
        logs.iter().filter_map(|log| std::fs::read_to_string(log).ok()).collect()
    }

    /// Who leads, by its identity.
    pub fn leader(&self) -> Result<String> {
        let lease = self.admin.get("Lease", &self.namespace, "purelb-allocator")?;
        Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        eprintln!("{}", lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n"));
    }
}

/// Addresses by Service of a namespace. An error where two have the same.
pub fn given(admin: &Client, namespace: &str) -> Result<BTreeMap<String, String>> {
    let (mut names, mut ips) = (BTreeMap::new(), BTreeMap::new());
    for service in admin.list("Service", namespace)? {
        let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        for ip in ingress(&service) {
            if let Some(other) = ips.insert(ip.clone(), name.clone()) {
                bail!("{ip} was given to {other} and to {name}");
            }
            names.insert(name.clone(), ip);
        }
    }
    Ok(names)
}

/// The condition of a Service.
#[must_use]
pub fn condition(service: &Value) -> Option<&Value> {
    let all = service["status"]["conditions"].as_array()?;
    all.iter().find(|condition| condition["type"] == "purelb.io/Allocated")
}

/// Its addresses with spaces, or the reason why it has none.
#[must_use]
pub fn said(service: &Value) -> String {
    match condition(service) {
        Some(found) if found["status"] != "True" => found["reason"].as_str().unwrap_or_default().to_owned(),
        _ => ingress(service).join(" "),
    }
}

/// Its addresses.
#[must_use]
pub fn ingress(service: &Value) -> Vec<String> {
    let entries = service["status"]["loadBalancer"]["ingress"].as_array();
    entries.into_iter().flatten().filter_map(|entry| entry["ip"].as_str().map(str::to_owned)).collect()
}

/// The same for an installation in another namespace.
fn moved(object: &Value, namespace: &str) -> Result<Value> {
    let mut object: Value = serde_json::from_str(&object.to_string().replace(INSTALL, namespace))?;
    if object["kind"].as_str().is_some_and(|kind| kind.starts_with("Cluster")) {
        for place in ["/metadata/name", "/roleRef/name"] {
            if let Some(Value::String(name)) = object.pointer_mut(place) {
                name.push(':');
                name.push_str(namespace);
            }
        }
    }
    Ok(object)
}

impl Allocator {
    /// Starts one, as the service account of that namespace.
    pub fn start(cluster: &Cluster, namespace: &str, more: &[&str]) -> Result<Self> {
        Self::start_with(cluster, namespace, &cluster.account("127.0.0.1", namespace, "allocator")?, more)
    }

    fn start_with(cluster: &Cluster, namespace: &str, kubeconfig: &Path, more: &[&str]) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = cluster.folder().join(format!("{namespace}-allocator-{number}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log)?;
        let child = cluster
            .netns
            .command(binary()?)
            .args(["allocator", "--namespace", namespace])
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(more)
            .args(if more.contains(&"--port") { &[][..] } else { &["--port", "0"] })
            .env("RUST_LOG", "info,kube_client=off,kube_runtime=off")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("start the allocator by nsenter")?;
        Ok(Self { child: Some(child), log })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.child.as_ref().map(Child::id).context("it does not run")?;
        kill(Pid::from_raw(i32::try_from(id)?), signal).context("signal the allocator")
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signal the allocator")?;
        let ended = sys::wait_for("the allocator ends", Duration::from_secs(15), || Ok(child.try_wait()?.is_some()));
        if ended.is_err() {
            drop(child.kill());
            drop(child.wait());
        }
        ended
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it calls itself in the Lease.
    #[must_use]
    pub fn identity(&self) -> String {
        let log = self.log();
        let found = log.split_once("identity=\"").and_then(|(_, rest)| rest.split_once('"'));
        found.map_or_else(String::new, |(identity, _)| identity.to_owned())
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        drop(self.stop(Signal::SIGKILL));
    }
}
