//! A real control plane in a network namespace of its own: etcd, kube-apiserver with RBAC, kube-controller-manager.
//!
//! The API answers at 127.0.0.1:6443 inside. One is shared by the tests of a program; whoever kills parts of it
//! starts its own. It goes with the process, or with the next lab.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lab::tear_down_on_signal;
use crate::leftovers::{self, Owner};
use crate::netns::Netns;
use crate::sys;

mod client;
mod objects;
pub mod proxy;
pub mod tenant;
pub mod witness;

pub use client::{Client, Refused, refusal};
pub use objects::{manifests, path};
pub use tenant::Tenant;

/// The parts, in the order in which they start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// etcd
    Etcd,
    /// kube-apiserver
    Api,
    /// kube-controller-manager
    Controllers,
}

impl Part {
    const fn program(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Api => "kube-apiserver",
            Self::Controllers => "kube-controller-manager",
        }
    }
}

/// A control plane.
#[derive(Debug)]
pub struct Cluster {
    /// Where it runs.
    pub netns: Netns,
    children: Mutex<Vec<(Part, Child)>>,
    prefix: String,
    folder: TempDir,
}

impl Cluster {
    /// The one of this process, with our CRDs and what `deploy/base` gives the roles.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<Cluster, String>> = OnceLock::new();
        let made = SHARED.get_or_init(|| {
            sys::at_exit(|| leftovers::remove(Owner::This));
            Self::start().map_err(|error| format!("{error:#}"))
        });
        made.as_ref().map_err(|error| anyhow!("no control plane: {error}"))
    }

    /// Starts one with our CRDs and waits until it serves.
    pub fn start() -> Result<Self> {
        let cluster = Self::bare()?;
        cluster.install(&manifests("deploy/crds")?)?;
        Ok(cluster)
    }

    /// The same without any CRDs.
    pub fn bare() -> Result<Self> {
        tear_down_on_signal();
        leftovers::remove(Owner::Dead);
        let prefix = leftovers::next_prefix()?;
        let folder = TempDir::with_prefix(format!("{prefix}-"))?;
        let netns = Netns::create(&format!("{prefix}-api"))?;
        let cluster = Self { netns, children: Mutex::default(), prefix, folder };
        cluster.write_users()?;
        cluster.run_all()?;
        Ok(cluster)
    }

    /// Starts a part; it need not answer yet.
    pub fn run(&self, part: Part) -> Result<()> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let log = OpenOptions::new().create(true).append(true).open(path(&format!("{}.log", part.program())))?;
        let mut command = self.netns.command(program(part.program())?);
        match part {
            Part::Etcd => command.args(["--unsafe-no-fsync", "--data-dir", &path("etcd")]),
            Part::Api => command
                .args(["--etcd-servers=http://127.0.0.1:2379", "--cert-dir", &path("certs")])
                .args(["--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC"])
                .args(["--service-account-key-file", &path("sa.key"), "--service-account-signing-key-file"])
                .args([&path("sa.key"), "--token-auth-file", &path("tokens.csv")])
                .args(["--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112", "--secure-port=6443"])
                .args(["--advertise-address=198.18.250.2", "--bind-address=0.0.0.0", "--allow-privileged=true"]),
            Part::Controllers => command
                .args(["--kubeconfig", &path("admin"), "--controllers=*", "--leader-elect=false"])
                .args(["--allocate-node-cidrs=false", "--service-account-private-key-file", &path("sa.key")])
                // No kubelet tells that its node lives.
                .arg("--node-monitor-grace-period=24h")
                .args(["--kube-api-qps=500", "--kube-api-burst=1000", "--concurrent-service-endpoint-syncs=20"]),
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", part.program()))?;
        self.children()?.push((part, child));
        Ok(())
    }

    /// Kills a part, as a crash would.
    pub fn kill(&self, part: Part) -> Result<()> {
        let mut children = self.children()?;
        let at = children.iter().position(|(one, _)| *one == part).context("it does not run")?;
        let (_, mut child) = children.remove(at);
        child.kill().context("kill it")?;
        child.wait().context("wait for its end").map(drop)
    }

    /// Sends a signal to a part.
    pub fn signal(&self, part: Part, signal: Signal) -> Result<()> {
        let children = self.children()?;
        let (_, child) = children.iter().find(|(one, _)| *one == part).context("it does not run")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signal it")
    }

    /// Stops etcd and what stands on it, does something with etcd's folder, and starts all of it.
    pub fn restart_etcd(&self, work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        for part in [Part::Controllers, Part::Api, Part::Etcd] {
            self.kill(part)?;
        }
        work(&self.folder.path().join("etcd"))?;
        self.run_all()
    }

    /// The controllers last: they give up when the API server is not healthy within ten seconds.
    fn run_all(&self) -> Result<()> {
        self.run(Part::Etcd)?;
        self.run(Part::Api)?;
        self.wait_served()?;
        self.run(Part::Controllers)
    }

    /// Waits until the API server is ready.
    pub fn wait_served(&self) -> Result<()> {
        let served = sys::wait_for("the API server is ready", Duration::from_secs(60), || {
            self.ended()?;
            let client = self.admin()?;
            client.raw("GET", "/readyz", None).map(|_| true)
        });
        served.with_context(|| self.logs())
    }

    fn ended(&self) -> Result<()> {
        for (part, child) in self.children()?.iter_mut() {
            if let Some(status) = child.try_wait()? {
                bail!(sys::Ended(part.program().to_owned(), status));
            }
        }
        Ok(())
    }

    /// Applies CRDs of PureLB's kinds and waits until they are served.
    pub fn install(&self, crds: &[Value]) -> Result<()> {
        let admin = self.admin()?;
        for object in crds {
            admin.apply(object)?;
        }
        for crd in ["servicegroups", "lbnodeagents"] {
            sys::wait_for("the CRD is served", Duration::from_secs(20), || {
                admin.raw("GET", &format!("/apis/purelb.io/v2/{crd}"), None).map(|_| true)
            })?;
        }
        sys::wait_for("both CRDs are discovered", Duration::from_secs(20), || {
            let all: Value = serde_json::from_str(&admin.raw("GET", "/apis/purelb.io/v2", None)?)?;
            let names =
                |name: &str| all["resources"].as_array().is_some_and(|all| all.iter().any(|one| one["name"] == name));
            Ok(names("servicegroups") && names("lbnodeagents"))
        })
    }

    /// Whose token the API knows; everybody else is impersonated.
    fn write_users(&self) -> Result<()> {
        let folder = self.folder.path();
        std::fs::write(folder.join("tokens.csv"), "admin,admin,admin,\"system:masters\"\n")?;
        std::fs::write(folder.join("admin"), kubeconfig("admin", "127.0.0.1").to_string())?;
        sys::output(Command::new("openssl").args(["genrsa", "-out"]).arg(folder.join("sa.key"))).map(drop)
    }

    /// A kubeconfig with all rights.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("admin")
    }

    /// A kubeconfig of a service account, for the API at that address.
    pub fn account(&self, address: &str, namespace: &str, account: &str) -> Result<PathBuf> {
        let user = format!("system:serviceaccount:{namespace}:{account}");
        self.config_as(&format!("{namespace}-{account}"), address, &user, &["system:serviceaccounts"])
    }

    /// A kubeconfig of that user, for the API at that address.
    pub fn user(&self, address: &str, name: &str) -> Result<PathBuf> {
        self.config_as(&name.replace(':', "-"), address, name, &[])
    }

    fn config_as(&self, file: &str, address: &str, name: &str, groups: &[&str]) -> Result<PathBuf> {
        let path = self.folder.path().join(file);
        let mut config = kubeconfig("admin", address);
        let user = &mut config["users"][0]["user"];
        user["as"] = name.into();
        user["as-groups"] = json!([groups, &["system:authenticated"]].concat());
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// A kubeconfig of the agent on a node: its token says on which node its pod runs, as kubelets ask for it.
    pub fn agent_on(&self, admin: &Client, address: &str, node: &str) -> Result<PathBuf> {
        let (namespace, account) = (tenant::INSTALL, "lbnodeagent");
        let pod = admin.create(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("{account}-{node}"), "namespace": namespace},
            "spec": {
                "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
                "containers": [{"name": account, "image": account}],
            },
        }))?;
        let object =
            json!({"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]});
        let asked = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": [], "expirationSeconds": 7200, "boundObjectRef": object},
        });
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer: Value = serde_json::from_str(&admin.raw("POST", &path, Some(("application/json", &asked)))?)?;
        let token = answer["status"]["token"].as_str().context("no token")?;
        let file = self.folder.path().join(format!("{account}-{node}"));
        std::fs::write(&file, kubeconfig(token, address).to_string())?;
        Ok(file)
    }

    /// A folder for the files of tests.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the API is asked by, with all rights.
    pub fn admin(&self) -> Result<Client> {
        Client::new(&self.netns, "admin", &[])
    }

    /// A client without any rights that works on that runtime, whose threads must be inside.
    fn nobody_on(&self, runtime: &tokio::runtime::Runtime) -> Result<kube::Client> {
        client::connect(runtime, None, &[])
    }

    /// The same as a service account whose token says that its pod runs on that node.
    pub fn pod_on(&self, namespace: &str, account: &str, node: &str) -> Result<Client> {
        let headers = [
            ("impersonate-user", format!("system:serviceaccount:{namespace}:{account}")),
            ("impersonate-group", "system:authenticated".to_owned()),
            ("impersonate-extra-authentication.kubernetes.io%2fnode-name", node.to_owned()),
        ];
        Client::new(&self.netns, "admin", &headers)
    }

    fn children(&self) -> Result<std::sync::MutexGuard<'_, Vec<(Part, Child)>>> {
        self.children.lock().map_err(|_| anyhow!("a test panicked while it held the control plane"))
    }

    /// The last lines of all logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for part in [Part::Etcd, Part::Api, Part::Controllers] {
            let name = format!("{}.log", part.program());
            let tail = sys::tail(&self.folder.path().join(&name), 15);
            all.push_str(&format!("--- {name} ---\n{tail}\n"));
        }
        all
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The API server hangs on SIGTERM once etcd is gone, and nothing of it is needed any more.
        for (_, child) in self.children.lock().iter_mut().flat_map(|children| children.iter_mut()) {
            drop(child.kill());
            drop(child.wait());
        }
        leftovers::remove(Owner::Lab(&self.prefix));
    }
}

fn kubeconfig(token: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": format!("https://{address}:6443"), "insecure-skip-tls-verify": true}}],
        "users": [{"name": "lab", "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
    })
}

/// Where a program of Kubernetes is.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let named = ["PURELB_KUBE_BIN", "KUBEBUILDER_ASSETS"].into_iter().find_map(std::env::var_os);
    let folder = named.context("no Kubernetes: `cargo xtask test api` builds it, or set KUBEBUILDER_ASSETS")?;
    Ok(PathBuf::from(folder).join(name))
}
