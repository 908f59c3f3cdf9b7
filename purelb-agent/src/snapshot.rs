//! What the agent last knew, as a file, so that the commands answer while it is down too.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use purelb_plan::problem::Problem;
use purelb_plan::view::View;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

/// An uplink and its hook.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Uplink {
    /// Interface.
    pub name: String,
    /// xdp, xdp-generic, tcx or none.
    pub hook: String,
    /// Why this hook.
    pub why: String,
    /// Programs run there.
    pub attached: bool,
}

/// The device for remote addresses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VipDevice {
    /// Interface.
    pub name: String,
    /// `dummy`, or `ifb` where the kernel has no dummy devices.
    pub kind: String,
    /// Ours on it, with their prefix lengths.
    pub addresses: Vec<String>,
}

/// Local addresses, and the election of who answers for them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Election {
    /// How far this node is: looking, entering, in, leaving, refused.
    pub phase: String,
    /// Nodes that live, this one among them.
    pub members: usize,
    /// Those of them that run PureLB's agent.
    pub purelbs: usize,
    /// Networks in which this node stands.
    pub subnets: Vec<String>,
    /// What it has, with the interface.
    pub addresses: BTreeMap<String, String>,
}

/// One moment of the agent.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Snapshot {
    /// Node name.
    pub node: String,
    /// A complete list was seen and programmed.
    pub ready: bool,
    /// Process id.
    pub pid: u32,
    /// Uplinks.
    pub uplinks: Vec<Uplink>,
    /// The device for remote addresses, if there is one.
    pub vip_device: Option<VipDevice>,
    /// Local addresses.
    pub election: Option<Election>,
    /// Faults.
    pub problems: Vec<Problem>,
    /// Services.
    pub services: Vec<Arc<View>>,
}

/// Where the snapshot of an instance lies: beside no other instance's.
#[must_use]
pub fn path(bpf_root: &Path) -> PathBuf {
    let root = std::path::absolute(bpf_root).unwrap_or_else(|_| bpf_root.to_owned());
    let parts = root.components().filter(|part| matches!(part, Component::Normal(_)));
    let parts: Vec<_> = parts.map(|part| part.as_os_str().to_string_lossy().replace('%', "%25")).collect();
    Path::new("/run/purelb-agent").join(format!("{}.json", parts.join("%2F")))
}

/// Writes it by rename.
///
/// # Errors
/// The file cannot be written.
pub fn write(bpf_root: &Path, snapshot: &Snapshot) -> io::Result<()> {
    replace(bpf_root, &serde_json::to_vec(snapshot)?)
}

/// Keeps the file current beside the agent's work: once a second at most, less often where it takes long (that of
/// thousands of services does), and on another thread.
#[derive(Debug)]
pub struct Publisher {
    root: PathBuf,
    next: Instant,
    waiting: bool,
    job: Option<JoinHandle<Written>>,
    written: Written,
}

/// What was written, and how long it took.
#[derive(Debug, Default)]
struct Written {
    text: Vec<u8>,
    took: Duration,
}

const PACE: Duration = Duration::from_secs(1);
/// It rests so many times as long as it worked.
const REST: u32 = 50;

impl Publisher {
    /// Of an instance.
    #[must_use]
    pub fn new(bpf_root: &Path) -> Self {
        let written = Written::default();
        Self { root: bpf_root.to_owned(), next: Instant::now(), waiting: false, job: None, written }
    }

    /// Something may have changed.
    pub fn offer(&mut self, snapshot: &Snapshot) {
        self.waiting = true;
        self.flush(snapshot);
    }

    /// Writes what waits, if it may by now.
    pub fn flush(&mut self, snapshot: &Snapshot) {
        if let Some(job) = self.job.take_if(|job| job.is_finished()) {
            self.written = job.now_or_never().and_then(Result::ok).unwrap_or_default();
            self.next += self.written.took * REST;
        }
        if self.waiting && self.job.is_none() && Instant::now() >= self.next {
            self.begin(snapshot);
        }
    }

    fn begin(&mut self, snapshot: &Snapshot) {
        self.waiting = false;
        self.next = Instant::now() + PACE;
        let (root, snapshot, before) = (self.root.clone(), snapshot.clone(), std::mem::take(&mut self.written));
        self.job = Some(tokio::task::spawn_blocking(move || {
            let begin = Instant::now();
            let text = write_if_new(&root, &snapshot, &before.text);
            Written { text, took: begin.elapsed() }
        }));
    }

    /// Writes what waits, now.
    pub async fn end(&mut self, snapshot: &Snapshot) {
        if let Some(job) = self.job.take() {
            self.written = job.await.unwrap_or_default();
        }
        if self.waiting {
            self.begin(snapshot);
        }
        if let Some(job) = self.job.take() {
            drop(job.await);
        }
    }
}

fn write_if_new(root: &Path, snapshot: &Snapshot, written: &[u8]) -> Vec<u8> {
    let text = serde_json::to_vec(snapshot).unwrap_or_default();
    if text != written
        && let Err(error) = replace(root, &text)
    {
        tracing::warn!(op = "writeSnapshot", %error, "cannot write the status file");
        return Vec::new();
    }
    text
}

fn replace(bpf_root: &Path, text: &[u8]) -> io::Result<()> {
    let path = path(bpf_root);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let next = path.with_extension("next");
    fs::write(&next, text)?;
    fs::rename(next, path)
}

/// An agent starts: the last one's snapshot keeps its names, but nothing is ready until the new one says so.
///
/// # Errors
/// The file cannot be written.
pub fn begin(bpf_root: &Path) -> io::Result<()> {
    match read(bpf_root) {
        Some(serde_json::Value::Object(mut fields)) => {
            fields.insert("ready".to_owned(), false.into());
            fields.insert("pid".to_owned(), std::process::id().into());
            replace(bpf_root, &serde_json::to_vec(&fields)?)
        }
        _ => Ok(()),
    }
}

/// Reads it; `None` when no agent ever ran with that root.
#[must_use]
pub fn read(bpf_root: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&fs::read(path(bpf_root)).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_root_has_a_file_of_its_own() {
        let roots = ["/sys/fs/bpf/a-b", "/sys/fs/bpf/a/b", "/sys/fs/bpf/a%2Fb", "/sys/fs/bpf/a%b"];
        let paths: std::collections::BTreeSet<_> = roots.iter().map(|root| path(Path::new(root))).collect();
        assert_eq!(paths.len(), roots.len(), "{paths:?}");
        assert_eq!(path(Path::new("/sys//fs/bpf/./a-b/")), path(Path::new(roots[0])), "one root, one file");
    }

    #[test]
    fn a_new_agent_is_not_ready_by_the_old_ones_word() {
        let root = PathBuf::from(format!("/snapshot-test-{}", std::process::id()));
        assert!(begin(&root).is_ok() && read(&root).is_none(), "nothing is made of nothing");
        write(&root, &Snapshot { node: "node1".to_owned(), ready: true, ..Snapshot::default() }).unwrap();
        begin(&root).unwrap();
        let seen = read(&root).unwrap();
        fs::remove_file(path(&root)).unwrap();
        assert_eq!(seen.get("ready"), Some(&false.into()));
        assert_eq!(seen.get("node"), Some(&"node1".into()));
        assert_eq!(seen.get("pid"), Some(&std::process::id().into()));
    }
}
