//! One agent at a time per bpf root: a lock on the folder of the pins, which the kernel lets go of with
//! the process, however it ends.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// A command that asks who holds the lock has it for a moment itself.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// Held until dropped.
#[derive(Debug)]
#[must_use = "the lock is let go of with its value"]
pub struct Lock {
    folder: File,
}

impl Lock {
    /// The folder is still the one that others would lock. Not when somebody removed or unmounted it.
    #[must_use]
    pub fn holds(&self, root: &Path) -> bool {
        same(&self.folder, root)
    }
}

/// Who has the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process, unless that is out of sight (another container).
    pub pid: Option<u32>,
}

/// Why the lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} serves {root}; stop it first, or choose another --bpf-root", who(.holder))]
    Held {
        /// The root.
        root: PathBuf,
        /// By whom.
        holder: Holder,
    },
    /// The folder cannot be made, opened or locked.
    #[error("cannot lock {root}: {source}")]
    Io {
        /// The root.
        root: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn who(holder: &Holder) -> String {
    holder.pid.map_or_else(|| "an agent of another container".to_owned(), |pid| format!("the agent with pid {pid}"))
}

/// Takes the lock of a bpf root, whose folder is made where it is missing.
///
/// # Errors
/// Another process has it, or the folder cannot be used.
pub fn take(root: &Path) -> Result<Lock, LockError> {
    let fail = |source| LockError::Io { root: root.to_owned(), source };
    let mut tries = 0;
    loop {
        fs::create_dir_all(root).map_err(fail)?;
        let folder = File::open(root).map_err(fail)?;
        match folder.try_lock() {
            // `cleanup` may have removed the folder in between: then it is the lock of nothing.
            Ok(()) if same(&folder, root) => return Ok(Lock { folder }),
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(fail(error)),
            Err(TryLockError::WouldBlock) if tries == TRIES => {
                return Err(LockError::Held { root: root.to_owned(), holder: Holder { pid: pid(&folder) } });
            }
            Err(TryLockError::WouldBlock) => thread::sleep(PAUSE),
        }
        tries = (tries + 1).min(TRIES);
    }
}

/// Who holds the lock of a bpf root, if somebody does.
#[must_use]
pub fn holder(root: &Path) -> Option<Holder> {
    let folder = File::open(root).ok()?;
    match folder.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(Holder { pid: pid(&folder) }),
        _ => None,
    }
}

fn same(folder: &File, root: &Path) -> bool {
    let id = |meta: io::Result<fs::Metadata>| meta.ok().map(|m| (m.dev(), m.ino()));
    id(folder.metadata()) == id(fs::metadata(root))
}

/// Who has a file locked, unless that is out of sight. From `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 15604 00:27:648486 0 EOF`, the device in hexadecimal.
pub(crate) fn pid(folder: &File) -> Option<u32> {
    let meta = folder.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    let file = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    (0..TRIES).find_map(|_| {
        let locks = locks().ok()?;
        let mut lines = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.find_map(|words| match words[..] {
            [_, "FLOCK", _, "WRITE", pid, at, ..] if at == file => pid.parse().ok(),
            _ => None,
        })
    })
}

/// The text of `/proc/locks`, in reads as long as the kernel gives. Between two reads it counts lines, so that a lock
/// that somebody lets go of meanwhile makes it skip one; `fs::read_to_string` begins with a read of 32 bytes.
fn locks() -> io::Result<String> {
    let mut file = File::open("/proc/locks")?;
    let (mut text, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            n => text.extend_from_slice(buffer.get(..n).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_the_holder_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("purelb");
        assert_eq!(holder(&root), None, "no folder, no holder");
        let lock = take(&root).unwrap();
        assert_eq!(holder(&root).unwrap().pid, Some(std::process::id()));
        let text = take(&root).unwrap_err().to_string();
        let want = format!("the agent with pid {} serves {}; stop it first", std::process::id(), root.display());
        assert!(text.starts_with(&want), "{text}");
        drop(lock);
        assert_eq!(holder(&root), None);
        drop(take(&root).unwrap());
    }

    #[test]
    fn the_holder_is_named_while_others_come_and_go() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("purelb");
        let _lock = take(&root).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for other in 0..3 {
                let (path, over) = (temp.path().join(format!("other-{other}")), &over);
                scope.spawn(move || {
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        drop(take(&path));
                    }
                });
            }
            let missed = (0..2000).filter(|_| holder(&root).and_then(|holder| holder.pid).is_none()).count();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(missed, 0);
        });
    }

    #[test]
    fn a_folder_that_was_made_anew_has_a_lock_of_its_own() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("purelb");
        let old = take(&root).unwrap();
        fs::remove_dir(&root).unwrap();
        assert!(!old.holds(&root), "gone");
        let new = take(&root).unwrap();
        assert!(holder(&root).is_some() && new.holds(&root) && !old.holds(&root));
    }
}
