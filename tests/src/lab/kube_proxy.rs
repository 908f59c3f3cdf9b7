//! The real kube-proxy in a node's namespace, beside our agent.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Lab, Node};
use crate::cluster::{Cluster, program};
use crate::lab::wire::API;
use crate::sys;

/// Where it says how it is.
const HEALTH: u16 = 10_256;
/// The pods of all nodes: what comes from elsewhere is external traffic to it.
const PODS: &str = "198.19.0.0/16,2001:db8:200::/40";

/// A process, which ends when this is dropped. Its rules stay, as they do on a node.
#[derive(Debug)]
pub struct KubeProxy {
    child: Child,
    log: PathBuf,
}

impl KubeProxy {
    /// Starts it in that mode: `nftables` or `iptables`.
    pub fn start(cluster: &Cluster, node: &Node, mode: &str, folder: &Path) -> Result<Self> {
        let own = folder.join(format!("kube-proxy-{}", node.name));
        std::fs::create_dir_all(&own)?;
        let log = own.join("log");
        let file = OpenOptions::new().create(true).append(true).open(&log)?;
        let config = cluster.user(API, "system:kube-proxy")?;
        let child = node
            .netns
            .command(program("kube-proxy")?)
            .arg("--kubeconfig")
            .arg(config)
            .args(["--proxy-mode", mode, "--hostname-override", &node.name, "--cluster-cidr", PODS])
            // Limits of the machine's conntrack table are not its own.
            .args(["--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0s"])
            .args(["--conntrack-tcp-timeout-close-wait", "0s"])
            .current_dir(&own)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("start kube-proxy by nsenter")?;
        Ok(Self { child, log })
    }

    /// Waits until it is healthy. It is silent for as long as its Node has no InternalIP.
    pub fn wait_healthy(&mut self, node: &Node) -> Result<()> {
        let waited = sys::wait_for("kube-proxy is healthy", Duration::from_secs(60), || {
            if let Some(status) = self.child.try_wait()? {
                bail!(sys::Ended("kube-proxy".to_owned(), status));
            }
            let (code, said) = node.netns.page(HEALTH, "/healthz")?;
            ensure!(code == 200, "{code}: {said}");
            Ok(true)
        });
        waited.with_context(|| self.log_tail())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        sys::tail(&self.log, 20)
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Lab {
    /// Kills those of all nodes; what they wrote into the kernel stays.
    pub fn kill_kube_proxies(&mut self) {
        self.kube_proxies.clear();
    }

    /// Starts them again.
    pub fn restart_kube_proxies(&mut self) -> Result<()> {
        let mode = self.options.kube_proxy.context("a lab without kube-proxy")?;
        let cluster = self.cluster.take().context("a lab without a cluster")?;
        let started = self.start_kube_proxies(&cluster, mode);
        self.cluster = Some(cluster);
        started
    }

    /// One on every node, healthy.
    pub(super) fn start_kube_proxies(&mut self, cluster: &Cluster, mode: &str) -> Result<()> {
        for at in 0..self.nodes.len() {
            let node = self.nodes.get(at).context("a node")?;
            let proxy = KubeProxy::start(cluster, node, mode, self.folder.path())?;
            self.kube_proxies.push(proxy);
        }
        let all = self.kube_proxies.iter_mut().zip(&self.nodes);
        all.into_iter().try_for_each(|(proxy, node)| proxy.wait_healthy(node))
    }
}
