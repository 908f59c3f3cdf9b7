//! PureLB's own agent at a node, beside ours at others. It comes from no registry: whoever runs these tests has built it.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::tenant::INSTALL;
use crate::lab::{Lab, Node};
use crate::sys;

/// The binary of its `lbnodeagent`, which the caller's environment names.
pub fn binary() -> Result<PathBuf> {
    let named = std::env::var_os("PURELB_UPSTREAM_AGENT").map(PathBuf::from);
    named.context("PURELB_UPSTREAM_AGENT does not name PureLB's agent: build cmd/lbnodeagent of its source, and set it")
}

/// A process, which ends when this is dropped. The addresses that it has given stay, for as long as they are valid.
#[derive(Debug)]
pub struct Upstream {
    child: Option<Child>,
    log: PathBuf,
}

impl Upstream {
    /// Starts it as the Pod whose account our agent had there, its Lease five seconds long as PureLB has it. `instance` is the
    /// Pod's UID, by which it knows its Lease from another Pod's.
    pub fn start(lab: &Lab, node: &Node, instance: &str) -> Result<Self> {
        let cluster = lab.cluster.as_ref().context("a lab without a cluster")?;
        let log = lab.folder().join(format!("purelb-{}.log", node.name));
        let file = OpenOptions::new().create(true).append(true).open(&log)?;
        let child = node
            .netns
            .command(binary()?)
            .arg("--kubeconfig")
            .arg(cluster.folder().join(format!("lbnodeagent-{}", node.name)))
            .args(["--namespace", INSTALL, "--node-name", &node.name, "--pod-uid", instance])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("start PureLB's agent by nsenter")?;
        let mut this = Self { child: Some(child), log };
        let waited = sys::wait_for("PureLB's agent elects", Duration::from_secs(60), || {
            if let Some(status) = this.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!(sys::Ended("PureLB's agent".to_owned(), status));
            }
            let page = node.netns.page(7472, "/metrics")?.1;
            ensure!(page.lines().any(|line| line == "purelb_election_lease_healthy 1"), "no healthy Lease");
            Ok(true)
        });
        waited.with_context(|| this.log_tail())?;
        Ok(this)
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signal PureLB's agent")?;
        let ended = sys::wait_for("it ends", Duration::from_secs(20), || Ok(child.try_wait()?.is_some()));
        if ended.is_err() {
            drop(child.kill());
            drop(child.wait());
        }
        ended
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        sys::tail(&self.log, 40)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(self.stop(Signal::SIGKILL));
    }
}
