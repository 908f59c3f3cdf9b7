//! The agent's process of one node, and its commands.

use std::fs::{File, OpenOptions};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::netns::Netns;
use crate::sys;

/// An agent that can be stopped and started again; what it pinned stays until `cleanup` or the lab's end.
#[derive(Debug)]
pub struct Agent {
    netns: Netns,
    role: &'static str,
    node: String,
    source: Vec<String>,
    bpf_root: PathBuf,
    state: PathBuf,
    log: PathBuf,
    more: Vec<String>,
    capabilities: Option<String>,
    clock: Option<String>,
    child: Option<Child>,
}

/// The agent's binary: `PURELB_AGENT_BIN`, else beside this program's target folder, else the workspace's.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PURELB_AGENT_BIN") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("path of this program")?;
    let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("purelb-agent"));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/purelb-agent");
    beside
        .chain([workspace])
        .find(|path| path.is_file())
        .context("no purelb-agent binary: `cargo xtask test` builds it, or set PURELB_AGENT_BIN")
}

impl Agent {
    /// Prepares it; nothing runs yet.
    #[must_use]
    pub fn new(netns: &Netns, node: &str, source: &Path, bpf_root: PathBuf, folder: &Path) -> Self {
        Self {
            netns: netns.clone(),
            role: "node",
            node: node.to_owned(),
            source: vec!["--source".to_owned(), format!("dir:{}", source.display())],
            bpf_root,
            state: folder.join(format!("state-{node}")),
            log: folder.join(format!("{node}.log")),
            more: Vec::new(),
            capabilities: None,
            clock: None,
            child: None,
        }
    }

    /// It gives addresses too, and shares the state with others.
    pub fn allocate(&mut self, state: &Path) {
        self.role = "standalone";
        self.state = state.to_owned();
    }

    /// It reads a Kubernetes API instead of a folder.
    pub fn read_cluster(&mut self, kubeconfig: &Path) {
        self.source = vec!["--kubeconfig".to_owned(), kubeconfig.display().to_string()];
    }

    /// From the next start on it has these capabilities alone, as `BPF`.
    pub fn confine(&mut self, capabilities: &[&str]) {
        let names: Vec<_> = capabilities.iter().map(|name| format!("+{}", name.to_lowercase())).collect();
        self.capabilities = Some(format!("-all,{}", names.join(",")));
    }

    /// From the next start on its wall clock is off by so much, as `+30s`, and no other of its clocks.
    pub fn shift_clock(&mut self, by: &str) {
        self.clock = Some(by.to_owned());
    }

    /// Further arguments from the next start on.
    pub fn add_args(&mut self, more: &[&str]) {
        self.more.extend(more.iter().map(|arg| (*arg).to_owned()));
    }

    /// Starts the process.
    pub fn start(&mut self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).context("open the agent's log")?;
        let mut command = match &self.capabilities {
            None => self.netns.command(binary()?),
            Some(set) => {
                let mut command = self.netns.command("setpriv");
                command.arg(format!("--bounding-set={set}")).arg("--inh-caps=-all").arg(binary()?);
                command
            }
        };
        if let Some(by) = &self.clock {
            command.env("LD_PRELOAD", fake_clock()?).env("FAKETIME", by).env("DONT_FAKE_MONOTONIC", "1");
        }
        let child = command
            .arg(self.role)
            .args(&self.source)
            .args(["--node-name", &self.node])
            .arg("--bpf-root")
            .arg(&self.bpf_root)
            .arg("--state")
            .arg(&self.state)
            .args(&self.more)
            .env("RUST_LOG", "info,kube_client=off,kube_runtime=off")
            .stdin(Stdio::null())
            .stdout(copy(&log)?)
            .stderr(log)
            .spawn()
            .context("start purelb-agent by nsenter")?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until it says that all is programmed and every uplink is attached.
    pub fn wait_ready(&mut self) -> Result<()> {
        let result = sys::wait_for("the agent is ready", Duration::from_secs(60), || {
            if let Some(status) = self.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!(sys::Ended("the agent".to_owned(), status));
            }
            let status = self.query(&["status"])?;
            let attached = status.get("uplinks").and_then(Value::as_array).is_some_and(|uplinks| {
                !uplinks.is_empty() && uplinks.iter().all(|uplink| uplink.get("attached") == Some(&Value::Bool(true)))
            });
            // What the last agent left says ready too, until this one has the lock.
            let runs = status.pointer("/agent/alive") == Some(&Value::Bool(true));
            Ok(runs && attached && status.get("ready") == Some(&Value::Bool(true)))
        });
        result.with_context(|| format!("agent of {}, its log ends so:\n{}", self.node, self.log_tail()))
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(child.id())?), signal).context("signal the agent")?;
        let ended = sys::wait_for("the agent ends", Duration::from_secs(30), || Ok(child.try_wait()?.is_some()));
        if ended.is_err() {
            drop(child.kill());
            drop(child.wait());
        }
        ended
    }

    /// One of its commands, `-o json`.
    pub fn query(&self, args: &[&str]) -> Result<Value> {
        let text = match args {
            // It answers, and then says by its exit code whether the agent is ready.
            ["status", ..] => {
                let output = self.prepare(args, true)?.output().context("start purelb-agent by nsenter")?;
                String::from_utf8_lossy(&output.stdout).into_owned()
            }
            _ => self.command(args, true)?,
        };
        serde_json::from_str(&text).with_context(|| format!("`purelb-agent {}` wrote no JSON: {text}", args.join(" ")))
    }

    /// One of its commands as people see it, or as JSON.
    pub fn command(&self, args: &[&str], json: bool) -> Result<String> {
        sys::output(&mut self.prepare(args, json)?)
    }

    fn prepare(&self, args: &[&str], json: bool) -> Result<Command> {
        let mut command: Command = self.netns.command(binary()?);
        command.args(args).arg("--bpf-root").arg(&self.bpf_root);
        if json {
            command.args(["-o", "json"]);
        }
        Ok(command)
    }

    /// `HOOK attached` or `HOOK refused` of an uplink; empty when `status` does not know it.
    pub fn uplink(&self, name: &str) -> Result<String> {
        let status = self.query(&["status"])?;
        let uplinks = status.get("uplinks").and_then(Value::as_array).context("status: no `uplinks`")?;
        let found = uplinks.iter().find(|uplink| uplink.get("name").and_then(Value::as_str) == Some(name));
        Ok(found.map_or_else(String::new, |uplink| {
            let hook = uplink.get("hook").and_then(Value::as_str).unwrap_or_default();
            let attached = uplink.get("attached") == Some(&Value::Bool(true));
            format!("{hook} {}", if attached { "attached" } else { "refused" })
        }))
    }

    /// Waits until an uplink is as `wanted` says, in the words of [`Agent::uplink`].
    pub fn wait_uplink(&self, name: &str, wanted: &str) -> Result<()> {
        let what = format!("uplink {name} is {wanted:?}");
        let result = sys::wait_for(&what, Duration::from_secs(20), || {
            let found = self.uplink(name)?;
            anyhow::ensure!(found == wanted, "it is {found:?}");
            Ok(true)
        });
        result.with_context(|| self.log_tail())
    }

    /// The problems that `status` names, as one JSON text.
    pub fn problems(&self) -> Result<String> {
        Ok(self.query(&["status"])?.get("problems").context("status: no `problems`")?.to_string())
    }

    /// Waits until `status` names a problem with all of these words.
    pub fn wait_problem(&self, words: &[&str]) -> Result<()> {
        sys::wait_for(&format!("status names a problem with {words:?}"), Duration::from_secs(60), || {
            let status = self.query(&["status"])?;
            let problems = status.get("problems").and_then(Value::as_array).context("status: no `problems`")?;
            let found = problems.iter().any(|one| words.iter().all(|word| one.to_string().contains(word)));
            anyhow::ensure!(found, "the problems are {problems:?}");
            Ok(true)
        })
    }

    /// A page of its, with its status: `/metrics`, `/readyz`.
    pub fn page(&self, path: &str) -> Result<(u16, String)> {
        self.netns.page(7472, path)
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How many packets that reason has counted.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let drops = self.query(&["drops"])?;
        let reasons = drops.get("reasons").and_then(Value::as_array).context("drops: no `reasons`")?;
        let found = reasons.iter().find(|row| row.get("reason").and_then(Value::as_str) == Some(reason));
        found.and_then(|row| row["packets"].as_u64()).with_context(|| format!("drops: no reason {reason}"))
    }

    /// Endpoints of a VIP's port as `(address, state)`, sorted; empty when the service is not there.
    pub fn endpoints(&self, vip: &str, port: u16) -> Result<Vec<(String, String)>> {
        endpoints(&self.query(&["services"])?, vip, port)
    }

    /// Packets that its programs brought to endpoints of these addresses.
    pub fn packets(&self, vips: &[IpAddr]) -> Result<u64> {
        let all = self.query(&["services"])?;
        let vips: Vec<_> = vips.iter().map(ToString::to_string).collect();
        let mine = all.as_array().into_iter().flatten();
        let mine = mine.filter(|row| row["vip"].as_str().is_some_and(|vip| vips.iter().any(|one| one == vip)));
        Ok(mine.filter_map(|row| row["packets"].as_u64()).sum())
    }

    /// Where its maps are pinned.
    #[must_use]
    pub fn bpf_root(&self) -> &Path {
        &self.bpf_root
    }

    /// All that it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A counter or gauge without labels of its metrics.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let page = self.page("/metrics")?.1;
        let found = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.with_context(|| format!("no {name} in {page}"))?.parse().context("a number")
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        sys::tail(&self.log, 30)
    }
}

/// The same out of what `services` said.
pub fn endpoints(all: &Value, vip: &str, port: u16) -> Result<Vec<(String, String)>> {
    let mut found: Vec<_> = all
        .as_array()
        .context("services: not an array")?
        .iter()
        .filter(|row| row.get("vip").and_then(Value::as_str) == Some(vip))
        .filter(|row| row.get("port").and_then(Value::as_u64) == Some(u64::from(port)))
        .filter_map(|row| row.get("endpoints").and_then(Value::as_array))
        .flatten()
        .map(|endpoint| {
            let text = |key| endpoint.get(key).and_then(Value::as_str).unwrap_or_default().to_lowercase();
            (text("addr"), text("state"))
        })
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The library of Debian's libfaketime, whose folder has the name of the architecture.
fn fake_clock() -> Result<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib")?.flatten();
    let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    paths.find(|path| path.is_file()).context("no libfaketime (apt-get install faketime)")
}

fn copy(file: &File) -> Result<File> {
    file.try_clone().context("share the agent's log")
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop(Signal::SIGKILL));
    }
}
