//! What the agent last knew, as a file, so that the commands answer while it is down too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use purelb_plan::plan::View;
use purelb_plan::problem::Problem;
use serde::{Deserialize, Serialize};

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
    /// Faults.
    pub problems: Vec<Problem>,
    /// Services.
    pub services: Vec<View>,
}

/// Where the snapshot of an instance lies: beside no other instance's.
#[must_use]
pub fn path(bpf_root: &Path) -> PathBuf {
    let name: String = bpf_root.display().to_string().trim_matches('/').replace('/', "-");
    Path::new("/run/purelb-agent").join(format!("{name}.json"))
}

/// Writes it by rename.
///
/// # Errors
/// The file cannot be written.
pub fn write(bpf_root: &Path, snapshot: &Snapshot) -> io::Result<()> {
    let path = path(bpf_root);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let next = path.with_extension("next");
    fs::write(&next, serde_json::to_vec(snapshot)?)?;
    fs::rename(next, path)
}

/// Reads it; `None` when no agent ever ran with that root.
#[must_use]
pub fn read(bpf_root: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&fs::read(path(bpf_root)).ok()?).ok()
}
