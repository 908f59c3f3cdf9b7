//! The map `FENCE`: until when the programs let neighbours ask for local addresses. Opened by its pin, so that whoever keeps
//! the Lease writes it from a thread of its own, whatever holds up the rest of the agent.

use std::path::{Path, PathBuf};

use purelb_common::table;

use super::BpfError;
use super::maps::open_map;
use super::sys::Words;

/// Its writer. Times are nanoseconds of `CLOCK_BOOTTIME`.
#[derive(Debug)]
pub struct Fence {
    words: Words,
    path: PathBuf,
}

impl Fence {
    /// Opens the pin, which is there once the programs were loaded.
    ///
    /// # Errors
    /// There is none, or it is of another version.
    pub fn open(root: &Path) -> Result<Self, BpfError> {
        let path = root.join("FENCE");
        let (fd, _) = open_map(&path, 4, size_of::<table::Fence>())?;
        let words = size_of::<table::Fence>() / 8;
        Ok(Self { words: Words::new(fd, words as u32), path })
    }

    /// Local addresses are answered for until `until_ns`, and are nobody's of ours any more from `over_ns` on.
    ///
    /// Each time is one aligned store, so no program ever sees half of one. It may see one before the other: a packet is then
    /// judged as by the fence before or after this call, or dropped though both let it pass, which the next question mends.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set(&self, until_ns: u64, over_ns: u64) -> Result<(), BpfError> {
        self.words.store(0, [until_ns, over_ns].into_iter()).map_err(|e| BpfError::syscall("mmap", &self.path, e))
    }

    /// Both times as they were set last, by an earlier process too; zeros: never.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn get(&self) -> Result<(u64, u64), BpfError> {
        let words = self.words.load(0, 2).map_err(|e| BpfError::syscall("mmap", &self.path, e))?;
        Ok((words.first().copied().unwrap_or_default(), words.get(1).copied().unwrap_or_default()))
    }
}
