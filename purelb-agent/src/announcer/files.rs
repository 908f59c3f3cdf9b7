//! The Leases in a folder, one file a node, for agents of one machine.
//!
//! A lock file beside each makes a write a compare-and-swap; it holds the last version there ever was, and stays. So does how
//! a Lease was that its node deleted, until the node makes it anew: who looks later must know that it was released. Files
//! change by rename, so a reader never waits. On a network file system such locks mean little: refused.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::coordination::v1::Lease as Object;
use nix::sys::statfs::{self, FsType, statfs};
use notify::{RecursiveMode, Watcher as _};
use purelb_plan::announce::lease::{Lease, REVOKED, Statement};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use super::registry::{Fault, PREFIX, Seen, patch, read};
use crate::source::look::LEASES;

/// Nobody holds a lock longer than a write takes.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);
/// Looked at this often even without a notice.
const POLL: Duration = Duration::from_millis(500);
/// How the name of a Lease ends that its node deleted.
const GONE: &str = "gone";

/// The folder.
#[derive(Clone, Debug)]
pub struct Files {
    folder: PathBuf,
    node: String,
}

impl Files {
    /// Makes the folder.
    pub fn open(state: &Path, node: &str) -> Result<Self, String> {
        let folder = state.join(LEASES);
        let cannot = |error: &dyn std::fmt::Display| format!("{}: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(|error| cannot(&error))?;
        let kind = statfs(&folder).map_err(|error| cannot(&error))?.filesystem_type();
        if is_remote(kind) {
            return Err(cannot(&"a network file system; nobody can prove there who has a local address"));
        }
        Ok(Self { folder, node: node.to_owned() })
    }

    fn path(&self, node: &str) -> PathBuf {
        self.folder.join(format!("{PREFIX}{}.json", node.replace('/', "_")))
    }

    /// The version is that of the newest write before it began.
    pub fn list(&self) -> Result<(u64, Vec<Lease>), Fault> {
        let (mut version, mut leases) = (0, Vec::new());
        let paths =
            || -> io::Result<Vec<PathBuf>> { fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.path())).collect() };
        for lock in paths().map_err(away)?.iter().filter(|path| path.extension().is_some_and(|e| e == "lock")) {
            version = version.max(last_version(lock));
        }
        for path in paths().map_err(away)?.iter().filter(|path| path.extension().is_some_and(|e| e == "json")) {
            leases.extend(load(path)?.as_ref().and_then(read));
        }
        Ok((version, leases))
    }

    /// Leases that their nodes deleted, as they were last.
    fn deleted(&self) -> Result<Vec<Lease>, Fault> {
        let mut leases = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(away)? {
            let path = entry.map_err(away)?.path();
            if path.extension().is_some_and(|extension| extension == GONE) {
                leases.extend(load(&path)?.as_ref().and_then(read));
            }
        }
        Ok(leases)
    }

    pub fn read(&self, node: &str) -> Result<Option<Lease>, Fault> {
        Ok(load(&self.path(node))?.as_ref().and_then(read))
    }

    pub fn create(&self, says: &Statement) -> Result<Lease, Fault> {
        let changes = patch(&self.node, says);
        let uid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(away)?;
        self.swap(&self.node, None, |object| {
            object["metadata"] = json!({"name": format!("{PREFIX}{}", self.node), "uid": uid.trim()});
            merge(object, &changes);
        })
    }

    pub fn renew(&self, says: &Statement, version: u64) -> Result<Lease, Fault> {
        let changes = patch(&self.node, says);
        self.swap(&self.node, Some(version), |object| merge(object, &changes))
    }

    pub fn revoke(&self, node: &str, version: u64) -> Result<Lease, Fault> {
        let changes = json!({"metadata": {"annotations": {REVOKED: self.node}}});
        self.swap(node, Some(version), |object| merge(object, &changes))
    }

    pub fn delete(&self, version: u64) -> Result<Lease, Fault> {
        let path = self.path(&self.node);
        let lock = lock(&path)?;
        let lease = load(&path)?.as_ref().and_then(read).ok_or(Fault::Gone)?;
        if lease.version != version {
            return Err(Fault::Conflict);
        }
        let next = next_version(&lock.1);
        fs::write(&lock.1, next.to_string()).map_err(away)?;
        fs::rename(&path, path.with_extension(GONE)).map_err(away)?;
        Ok(Lease { version: next, ..lease })
    }

    /// Changes a Lease that is this version, or there not at all.
    fn swap(&self, node: &str, version: Option<u64>, change: impl FnOnce(&mut Value)) -> Result<Lease, Fault> {
        let path = self.path(node);
        let lock = lock(&path)?;
        let found = load(&path)?;
        let known = found.as_ref().and_then(read).map(|lease| lease.version);
        match (version, known) {
            (Some(_), None) => return Err(Fault::Gone),
            (version, known) if version != known => return Err(Fault::Conflict),
            _ => {}
        }
        let mut object = match &found {
            Some(object) => serde_json::to_value(object).map_err(away)?,
            None => json!({}),
        };
        change(&mut object);
        // Whoever removes the Lease of a node that stands does not release it.
        match fs::remove_file(path.with_extension(GONE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(away(error)),
            _ => {}
        }
        let next = next_version(&lock.1);
        object["metadata"]["resourceVersion"] = next.to_string().into();
        // Whoever lists meanwhile must not take the list for newer than it is.
        let temporary = path.with_extension("next");
        fs::write(&temporary, serde_json::to_vec(&object).map_err(away)?).map_err(away)?;
        fs::rename(&temporary, &path).map_err(away)?;
        fs::write(&lock.1, next.to_string()).map_err(away)?;
        let object: Object = serde_json::from_value(object).map_err(away)?;
        read(&object).ok_or_else(|| Fault::Away("a Lease that cannot be read".to_owned()))
    }

    /// Watches until nobody listens.
    pub async fn follow(self, seen: mpsc::Sender<Seen>, _quiet: Duration) {
        let news = Arc::new(Notify::new());
        let told = Arc::clone(&news);
        let watcher = notify::recommended_watcher(move |_: notify::Result<notify::Event>| told.notify_one());
        let _watcher = watcher.ok().and_then(|mut watcher| {
            let watched = watcher.watch(&self.folder, RecursiveMode::NonRecursive);
            watched.is_ok().then_some(watcher)
        });
        let mut last = None;
        loop {
            // In this order: one that is not in the list left how it was, unless it was made anew since.
            let found = self.list().and_then(|list| Ok((list, self.deleted()?)));
            let mut news_of = Vec::new();
            match found {
                Ok(((version, leases), deleted)) if last.as_ref() != Some(&leases) => {
                    // How they were when they went; a list says only that they are not there.
                    let is_there = |node: &String| leases.iter().any(|lease| lease.node == *node);
                    let gone = deleted.into_iter().filter(|gone| gone.node != self.node && !is_there(&gone.node));
                    news_of.extend(gone.map(|gone| Seen::Gone(gone.node.clone(), gone.version + 1, Some(gone))));
                    last = Some(leases.clone());
                    news_of.push(Seen::All(version, leases));
                }
                Ok(_) | Err(Fault::Conflict | Fault::Gone) => {}
                Err(Fault::Away(why)) => news_of.push(Seen::Away(why)),
            }
            for news in news_of {
                if seen.send(news).await.is_err() {
                    return;
                }
            }
            if seen.is_closed() {
                return;
            }
            // A file that is read is news too; those of a change come together.
            let _ = tokio::time::timeout(POLL, news.notified()).await;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// File systems whose locks another machine does not see, or sees late.
fn is_remote(kind: FsType) -> bool {
    // SMB2, CIFS, Ceph, 9P, AFS, GFS2, Lustre, FUSE (s3, sshfs), VirtualBox, OCFS2, GPFS: include/uapi/linux/magic.h.
    const OTHERS: [i64; 11] = [
        0xfe53_4d42,
        0xff53_4d42,
        0x00c3_6400,
        0x0102_1997,
        0x5346_414f,
        0x0116_1970,
        0x0bd0_0bd0,
        0x6573_5546,
        0x786f_4256,
        0x7461_636f,
        0x4750_4653,
    ];
    let number = |kind: FsType| kind.0 & 0xffff_ffff;
    kind == statfs::NFS_SUPER_MAGIC || kind == statfs::SMB_SUPER_MAGIC || OTHERS.contains(&number(kind))
}

fn away(error: impl std::fmt::Display) -> Fault {
    Fault::Away(error.to_string())
}

/// A Lease that cannot be read is none: it is written anew.
fn load(path: &Path) -> Result<Option<Object>, Fault> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(away(error)),
    }
}

/// The lock of a Lease and its path.
fn lock(path: &Path) -> Result<(File, PathBuf), Fault> {
    let path = path.with_extension("lock");
    let file = File::options().create(true).append(true).open(&path).map_err(away)?;
    for _ in 0..TRIES {
        match file.try_lock() {
            Ok(()) => return Ok((file, path)),
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) => return Err(away(error)),
        }
    }
    let holder =
        crate::lock::pid(&file).map_or_else(|| "a process elsewhere".to_owned(), |pid| format!("process {pid}"));
    Err(Fault::Away(format!("{} is locked by {holder}, which may be stopped", path.display())))
}

fn last_version(lock: &Path) -> u64 {
    fs::read_to_string(lock).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

/// Versions grow over all files, since they are times; and in each, whatever becomes of the clock.
fn next_version(lock: &Path) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default().max(last_version(lock) + 1)
}

/// A merge patch (RFC 7396).
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, change) in changes {
        if change.is_null() {
            into.as_object_mut().map(|object| object.remove(key));
        } else {
            merge(&mut into[key], change);
        }
    }
}

#[cfg(test)]
mod tests {
    use purelb_plan::announce::lease::Ours;

    use super::*;

    fn says(subnet: &str) -> Statement {
        Statement { duration: 10_000, subnets: [subnet.parse().unwrap()].into(), ..Statement::default() }
    }

    #[test]
    fn every_write_is_a_compare_and_swap() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Files::open(folder.path(), "a").unwrap(), Files::open(folder.path(), "b").unwrap());
        let first = a.create(&says("192.0.2.0/24")).unwrap();
        assert!(matches!(a.create(&says("192.0.2.0/24")), Err(Fault::Conflict)));
        let (version, all) = b.list().unwrap();
        assert_eq!((version, all), (first.version, vec![first.clone()]));
        let second = a.renew(&says("192.0.2.128/25"), first.version).unwrap();
        assert!(second.version > first.version && second.uid == first.uid);
        assert!(matches!(b.revoke("a", first.version), Err(Fault::Conflict)), "a renewal slipped in");
        let revoked = b.revoke("a", second.version).unwrap();
        assert_eq!(revoked.says.revoked.as_deref(), Some("b"));
        assert!(matches!(a.renew(&says("192.0.2.0/24"), second.version), Err(Fault::Conflict)));
        let again = a.renew(&says("192.0.2.0/24"), revoked.version).unwrap();
        assert_eq!(again.says.revoked, None, "what its holder writes is not revoked");
        let gone = a.delete(again.version).unwrap();
        assert!(matches!(a.renew(&says("192.0.2.0/24"), again.version), Err(Fault::Gone)));
        let (version, all) = b.list().unwrap();
        assert!(version >= gone.version && all.is_empty());
        assert!(a.create(&says("192.0.2.0/24")).unwrap().version > gone.version, "also after it was deleted");
    }

    /// Released and deleted between two looks: only how it was last says that nobody needs to wait for it.
    #[test]
    fn how_it_was_when_it_was_deleted_is_seen_later() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Files::open(folder.path(), "a").unwrap(), Files::open(folder.path(), "b").unwrap());
        let first = a.create(&says("192.0.2.0/24")).unwrap();
        let ours = Some(Ours { epoch: "x".into(), released: true, ..Ours::default() });
        let released = a.renew(&Statement { ours, ..says("192.0.2.0/24") }, first.version).unwrap();
        a.delete(released.version).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (sender, mut seen) = mpsc::channel(9);
            let follows = tokio::spawn(b.clone().follow(sender, Duration::ZERO));
            let Some(Seen::Gone(node, version, Some(last))) = seen.recv().await else { panic!("it is unknown") };
            assert!(node == "a" && version > last.version && last == released && last.says.is_over());
            assert!(matches!(seen.recv().await, Some(Seen::All(_, all)) if all.is_empty()));
            follows.abort();
        });
        a.create(&says("192.0.2.0/24")).unwrap();
        fs::remove_file(a.path("a")).unwrap();
        assert!(b.deleted().unwrap().is_empty(), "removed by somebody else it proves nothing");
    }

    /// A process that was stopped half-way has its Lease's lock: nobody can tell whether it goes on to write.
    #[test]
    fn a_lock_that_is_held_is_waited_for_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Files::open(folder.path(), "a").unwrap(), Files::open(folder.path(), "b").unwrap());
        let lease = a.create(&says("192.0.2.0/24")).unwrap();
        let held = lock(&a.path("a")).unwrap();
        let begin = std::time::Instant::now();
        let Err(Fault::Away(why)) = b.revoke("a", lease.version) else { panic!("it was revoked") };
        assert!(begin.elapsed() < Duration::from_secs(5), "it is not waited for for ever");
        assert!(why.contains("purelb-node-a.lock") && why.contains(&std::process::id().to_string()), "{why}");
        assert_eq!(b.list().unwrap().1, vec![lease.clone()], "and readers do not wait");
        drop(held);
        assert!(b.revoke("a", lease.version).is_ok());
    }

    #[test]
    fn garbage_is_no_lease() {
        let folder = tempfile::tempdir().unwrap();
        let a = Files::open(folder.path(), "a").unwrap();
        fs::write(a.path("b"), "{\"metadata\":").unwrap();
        fs::write(a.path("c"), "{\"metadata\": {\"name\": \"purelb-node-c\", \"resourceVersion\": \"x\"}}").unwrap();
        assert_eq!(a.list().unwrap().1, []);
        assert!(a.create(&says("192.0.2.0/24")).is_ok());
    }
}
