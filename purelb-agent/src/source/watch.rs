//! Inotify on the folders; without it the poll alone notices changes.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::look::Look;

/// A change of a file, or that some were lost.
pub type Notice = notify::Result<notify::Event>;

/// How many file events wait at most; when more come everything is looked at.
const NOTICES: usize = 4096;
/// Events of one change come together.
const BURST: Duration = Duration::from_millis(3);

/// Which folder it is: device, inode, and when it was made, since inodes are used again.
type Identity = Option<(u64, u64, Option<SystemTime>)>;

/// Watches the manifests, and the state where it lies elsewhere.
#[derive(Debug)]
pub struct Watch {
    folders: Vec<(PathBuf, Identity)>,
    news: mpsc::Sender<Notice>,
    notices: mpsc::Receiver<Notice>,
    lost: Arc<AtomicBool>,
    watcher: Option<notify::RecommendedWatcher>,
}

impl Watch {
    /// Begins to watch.
    #[must_use]
    pub fn new(folder: &Path, state: &Path) -> Self {
        let (news, notices) = mpsc::channel(NOTICES);
        let outside = (!state.starts_with(folder)).then_some(state);
        let folders = std::iter::once(folder).chain(outside).map(|path| (path.to_owned(), None)).collect();
        let mut watch = Self { folders, news, notices, lost: Arc::default(), watcher: None };
        watch.follow();
        watch
    }

    /// Inotify watches a folder, not its path: one that was made later, replaced or linked to elsewhere is another.
    /// Whether one is another now; then everything must be looked at.
    pub fn follow(&mut self) -> bool {
        let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino(), m.created().ok()));
        let mut other = false;
        for (path, seen) in &mut self.folders {
            let now = identity(path);
            other |= now != *seen;
            *seen = now;
        }
        if other {
            self.watcher = self.start();
        }
        other
    }

    fn start(&self) -> Option<notify::RecommendedWatcher> {
        let (news, lost) = (self.news.clone(), Arc::clone(&self.lost));
        let notice = move |event: Notice| {
            if let Err(mpsc::error::TrySendError::Full(_)) = news.try_send(event) {
                lost.store(true, Ordering::Relaxed);
            }
        };
        let mut watcher = notify::recommended_watcher(notice).ok()?;
        for (path, _) in self.folders.iter().filter(|(_, seen)| seen.is_some()) {
            if let Err(error) = watcher.watch(path, RecursiveMode::Recursive) {
                tracing::warn!(op = "watchFolder", path = %path.display(), %error, "no notices of file changes: the folder is polled");
            }
        }
        Some(watcher)
    }

    /// The next notice. Loses none when it is dropped half-way.
    pub async fn notice(&mut self) -> Option<Notice> {
        self.notices.recv().await
    }

    /// All of the burst that a notice begins, as one look.
    pub async fn burst(&mut self, first: Notice) -> Look {
        let mut look = Look::default();
        look.notice(first);
        tokio::time::sleep(BURST).await;
        while let Ok(notice) = self.notices.try_recv() {
            look.notice(notice);
        }
        if self.lost.swap(false, Ordering::Relaxed) { Look::All } else { look }
    }
}
