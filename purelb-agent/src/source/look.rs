//! What to look at again in the folder: everything, or the paths that inotify named.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use notify::event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind, RemoveKind};

/// Folder of the nodes' Leases, in that of the state.
pub const LEASES: &str = ".leases";

/// What may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// Everything: the poll, lost events, folders that came, went or moved.
    All,
    /// These paths; none when nothing has.
    Paths(BTreeSet<PathBuf>),
}

impl Default for Look {
    fn default() -> Self {
        Self::Paths(BTreeSet::new())
    }
}

impl Look {
    /// Nothing to look at.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Paths(paths) if paths.is_empty())
    }

    /// Adds what a notice of the watcher says.
    pub fn notice(&mut self, notice: notify::Result<notify::Event>) {
        match notice {
            Ok(event) if !event.need_rescan() => self.event(event),
            // The queue ran over, or the watcher failed: anything may have happened.
            _ => *self = Self::All,
        }
    }

    fn event(&mut self, event: notify::Event) {
        match event.kind {
            // While a file is being written it may be half there; its end is an event of its own.
            EventKind::Modify(ModifyKind::Data(_)) => {}
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => self.paths(event.paths),
            EventKind::Access(_) => {}
            EventKind::Create(CreateKind::Folder) | EventKind::Remove(RemoveKind::Folder) => *self = Self::All,
            _ => self.paths(event.paths),
        }
    }

    fn paths(&mut self, more: Vec<PathBuf>) {
        if let Self::Paths(paths) = self {
            paths.extend(more.into_iter().filter(|path| !is_of_leases(path)));
        }
    }

    /// Adds another look.
    pub fn merge(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::Paths(paths), Self::Paths(more)) => paths.extend(more),
            (_, Self::All) => *self = Self::All,
            (Self::All, _) => {}
        }
    }
}

/// The Leases of nodes are renewed all the time, and nothing of the world is in them.
fn is_of_leases(path: &Path) -> bool {
    path.parent().and_then(Path::file_name).is_some_and(|folder| folder == LEASES)
}

#[cfg(test)]
mod tests {
    use notify::event::{DataChange, Flag, MetadataKind, RenameMode};

    use super::*;

    #[test]
    fn events_become_paths() {
        let file = || BTreeSet::from([PathBuf::from("/m/a.yaml")]);
        let rows = [
            ("written", EventKind::Access(AccessKind::Close(AccessMode::Write)), Look::Paths(file())),
            ("being written", EventKind::Modify(ModifyKind::Data(DataChange::Any)), Look::default()),
            ("read", EventKind::Access(AccessKind::Close(AccessMode::Read)), Look::default()),
            ("linked", EventKind::Create(CreateKind::File), Look::Paths(file())),
            ("renamed", EventKind::Modify(ModifyKind::Name(RenameMode::To)), Look::Paths(file())),
            ("chmod", EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any)), Look::Paths(file())),
            ("removed", EventKind::Remove(RemoveKind::File), Look::Paths(file())),
            ("folder", EventKind::Create(CreateKind::Folder), Look::All),
            ("folder gone", EventKind::Remove(RemoveKind::Folder), Look::All),
        ];
        for (name, kind, want) in rows {
            let mut look = Look::default();
            look.notice(Ok(notify::Event::new(kind).add_path(PathBuf::from("/m/a.yaml"))));
            assert_eq!(look, want, "{name}");
        }
        let mut look = Look::Paths(file());
        look.notice(Ok(notify::Event::new(EventKind::Other).set_flag(Flag::Rescan)));
        assert_eq!(look, Look::All, "overflow");
        look.notice(Ok(notify::Event::new(EventKind::Remove(RemoveKind::File)).add_path(PathBuf::from("/m/b"))));
        assert_eq!(look, Look::All, "all stays all");
    }
}
