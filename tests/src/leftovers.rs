//! Removes what labs leave in the machine: namespaces with the processes inside, pins, folders, status files.
//!
//! All of it is named after the process that made it (id and start time, so that a reused id is not
//! taken for it): a lab that was killed half-way is swept away by the next one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sys;

/// Every name of ours begins so; then comes the owner.
pub const PREFIX: &str = "purelb-lab-";

/// Whose things to remove.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    /// Of processes that have ended.
    Dead,
    /// Of this process.
    This,
    /// Of the lab with this prefix.
    Lab(&'a str),
}

/// How the names of this process's labs begin: `purelb-lab-PID_START`.
pub fn own_prefix() -> Result<String> {
    let pid = std::process::id();
    Ok(format!("{PREFIX}{pid}_{}", started(pid).context("no start time in /proc/self/stat")?))
}

/// How all names of a new lab of this process begin.
pub fn next_prefix() -> Result<String> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    Ok(format!("{}-{}", own_prefix()?, NUMBER.fetch_add(1, Ordering::Relaxed)))
}

/// When a process began, in clock ticks since boot.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields are counted after the command, which may hold spaces.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// `PID_START-…` of a living process; what is named otherwise is not ours to judge.
fn is_alive(rest: &str) -> bool {
    let owner = rest.split('-').next().unwrap_or_default();
    let Some((pid, start)) = owner.split_once('_') else { return true };
    pid.parse().ok().and_then(started).is_some_and(|found| start.parse() == Ok(found))
}

impl Owner<'_> {
    fn owns(self, name: &str) -> bool {
        let Some(rest) = name.strip_prefix(PREFIX) else { return false };
        match self {
            Owner::Dead => !is_alive(rest),
            Owner::This => own_prefix().is_ok_and(|own| name.starts_with(&format!("{own}-"))),
            Owner::Lab(prefix) => name.starts_with(&format!("{prefix}-")),
        }
    }
}

/// The things of labs: path, and its name without what the place adds to it.
fn things() -> Vec<(PathBuf, String)> {
    let places = [
        (PathBuf::from("/run/netns"), ""),
        (PathBuf::from("/sys/fs/bpf"), ""),
        (std::env::temp_dir(), ""),
        // The agent names its status file after its bpf root.
        (PathBuf::from("/run/purelb-agent"), "sys%2Ffs%2Fbpf%2F"),
    ];
    let mut found = Vec::new();
    for (folder, before) in places {
        // In this order: processes end with their namespace and can write no status file any more.
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(name) = name.strip_prefix(before).filter(|name| name.starts_with(PREFIX)) {
                found.push((entry.path(), name.to_owned()));
            }
        }
    }
    found
}

/// What is there with a name that begins so.
#[must_use]
pub fn of(prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = things().into_iter().filter(|(_, name)| name.starts_with(prefix)).collect();
    found.sort();
    found.into_iter().map(|(path, _)| path).collect()
}

/// Removes all of it; what is gone already is fine.
pub fn remove(owner: Owner) {
    for (path, name) in things().into_iter().filter(|(_, name)| owner.owns(name)) {
        if path.starts_with("/run/netns") {
            remove_namespace(&name);
        } else if path.is_dir() {
            drop(std::fs::remove_dir_all(path));
        } else {
            drop(std::fs::remove_file(path));
        }
    }
}

fn remove_namespace(name: &str) {
    let inside = sys::run(&format!("ip netns pids {name}")).unwrap_or_default();
    let own = Pid::this();
    let pids = inside.split_whitespace().filter_map(|word| word.parse().ok().map(Pid::from_raw));
    let pids: Vec<_> = pids.filter(|pid| *pid != own).collect();
    for pid in &pids {
        // It may have ended by itself.
        let _ = kill(*pid, Signal::SIGKILL);
    }
    for pid in pids {
        drop(sys::wait_for("the process ends", Duration::from_secs(2), || Ok(has_ended(pid))));
    }
    drop(sys::run(&format!("ip netns del {name}")));
}

/// Gone, or a zombie of another process than this.
fn has_ended(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.map_or(true, |stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
}
