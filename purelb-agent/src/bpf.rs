//! The kernel side as the agent sees it: pinned maps, programs, links. Only `bpf/sys.rs` is unsafe.

mod apply;
mod attach;
mod events;
mod explain;
mod fence;
mod load;
mod maps;
mod observe;
mod sweep;
mod sys;

use std::io;
use std::path::{Path, PathBuf};

pub use attach::{Links, UplinkStatus};
pub use events::Events;
pub use explain::ReadOnly;
pub use fence::Fence;
pub use load::{Programs, load, remove};
pub use maps::{ClockReading, Maps};
pub use sweep::{SWEEP, sweep};
pub(crate) use sys::watch_descriptor;

/// What can go wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The root is no bpffs.
    #[error("{path} is not on a bpf file system; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The root.
        path: PathBuf,
    },
    /// A pin is missing.
    #[error("{path} does not exist; start the agent first (or name its bpf root)")]
    Missing {
        /// The pin.
        path: PathBuf,
    },
    /// The pinned maps are of another version.
    #[error("the pinned map {path} does not fit this version ({what}); run `purelb-agent cleanup`, then start again")]
    Layout {
        /// The pin.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A system call failed.
    #[error("{call} of {object}: {source}")]
    Syscall {
        /// Which.
        call: &'static str,
        /// On what.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// A map could not be opened by aya.
    #[error("map {name}: {source}")]
    Map {
        /// Its name.
        name: String,
        /// Why.
        source: Box<aya::maps::MapError>,
    },
    /// The object could not be loaded.
    #[error("cannot load the eBPF object: {0}; a kernel of 6.6 or newer with BTF is needed")]
    Load(Box<aya::EbpfError>),
    /// A program could not be loaded.
    #[error("the kernel refuses the program {name}: {reason}")]
    Program {
        /// Its name.
        name: String,
        /// Why: the error and the end of the verifier's log.
        reason: String,
    },
    /// The object lacks a program.
    #[error("the eBPF object has no program {name}; build it again: cargo xtask build-ebpf")]
    NoProgram {
        /// Its name.
        name: String,
    },
}

impl BpfError {
    /// A verifier's log has thousands of lines; what matters are the first and the last ones.
    fn program(name: &str, error: &aya::programs::ProgramError) -> Self {
        let text = error.to_string();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.len().saturating_sub(20).max(1);
        let first = lines.first().map(ToString::to_string).unwrap_or_default();
        let last = lines.get(end..).unwrap_or_default().join("\n");
        Self::Program { name: name.to_owned(), reason: format!("{first}\n{last}") }
    }

    fn syscall(call: &'static str, object: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Syscall { call, object: object.as_ref().display().to_string(), source }
    }
}
