//! Loads the object, adopting pinned maps; and removes everything again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use purelb_common::SCHEMA;
use purelb_common::verdict::REASONS;

use super::{BpfError, Maps, sys};

const FAMILY_MAPS: [&str; 14] = [
    "VIPS",
    "VIP_INDEX",
    "SERVICES",
    "ENDPOINTS",
    "PINS",
    "HALF_OPEN",
    "REPLIES",
    "UDP_REPLIES",
    "DIRECT",
    "AFFINITY",
    "REVSVC",
    "SRC_RANGES",
    "CLUSTER",
    "OWNERS",
];
const SHARED_MAPS: [&str; 9] =
    ["CONFIG", "FENCE", "CLOCK", "UPLINKS", "VIP_BITMAP", "SLOTS", "STATS", "REASONS", "EVENTS"];

/// The loaded programs and their maps.
pub struct Programs {
    pub(super) root: PathBuf,
    pub(super) xdp: OwnedFd,
    pub(super) ingress: OwnedFd,
    pub(super) egress: OwnedFd,
    maps: Maps,
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    clock: OwnedFd,
    /// The links by their pins, of which one alone would keep a link too.
    pub(super) held: RefCell<BTreeMap<PathBuf, OwnedFd>>,
    /// Keeps what is not pinned.
    ebpf: Ebpf,
}

/// Loads the programs of `object`; maps pinned under `root` are adopted, others are made and pinned.
pub fn load(root: &Path, object: &[u8]) -> Result<Programs, BpfError> {
    std::fs::create_dir_all(root).map_err(|e| BpfError::syscall("mkdir", root, e))?;
    if !sys::is_bpffs(root).map_err(|e| BpfError::syscall("statfs", root, e))? {
        return Err(BpfError::NotBpffs { path: root.to_path_buf() });
    }
    std::fs::create_dir_all(root.join("links")).map_err(|e| BpfError::syscall("mkdir", root, e))?;
    // Maps of another version would only show as an error of the verifier.
    match Maps::open(root) {
        // A version with fewer reasons made it: those that came since would be counted nowhere.
        Ok(maps) if maps.reasons.entries() < REASONS as u32 => unlink(&root.join("REASONS"))?,
        Ok(_) | Err(BpfError::Missing { .. }) => {}
        Err(e) => return Err(e),
    }
    let names = names();
    let mut loader = EbpfLoader::new();
    for name in &names {
        loader.map_pin_path(name.as_str(), root.join(name));
    }
    let mut ebpf = loader.load(object).map_err(|e| BpfError::Load(Box::new(e)))?;

    let xdp = load_xdp(&mut ebpf, "purelb_xdp")?;
    let ingress = load_classifier(&mut ebpf, "purelb_ingress")?;
    let egress = load_classifier(&mut ebpf, "purelb_egress")?;
    let clock = load_xdp(&mut ebpf, "clock")?;
    let pin = root.join("prog_clock");
    unlink(&pin)?;
    sys::pin(clock.as_fd(), &pin).map_err(|e| BpfError::syscall("BPF_OBJ_PIN", &pin, e))?;

    let maps = Maps::open(root)?;
    let mut config = maps.config()?;
    if config.schema != SCHEMA {
        config.schema = SCHEMA;
        maps.set_config(&config)?;
    }
    // What the kernel side has to say is rare: without it the data path is the same.
    let log = EbpfLogger::init(&mut ebpf)
        .inspect_err(|error| tracing::warn!(op = "readKernelLog", %error, "no words from the kernel side"));
    Ok(Programs {
        root: root.to_path_buf(),
        xdp,
        ingress,
        egress,
        maps,
        log: log.ok(),
        ebpf,
        clock,
        held: RefCell::default(),
    })
}

/// Of all maps that are pinned.
fn names() -> Vec<String> {
    let shared = SHARED_MAPS.iter().map(ToString::to_string);
    shared.chain(FAMILY_MAPS.iter().flat_map(|n| [format!("{n}4"), format!("{n}6")])).collect()
}

/// Detaches the programs and removes every pin under `root` and the folder. All is tried; the first error is told.
pub fn remove(root: &Path) -> Result<(), BpfError> {
    if !root.exists() {
        return Ok(());
    }
    if !sys::is_bpffs(root).map_err(|e| BpfError::syscall("statfs", root, e))? {
        return Err(BpfError::NotBpffs { path: root.to_path_buf() });
    }
    // Links first: while a program runs, its maps had better be there.
    let links = empty(&root.join("links"));
    let rest = empty(root);
    let folder = std::fs::remove_dir(root).map_err(|e| BpfError::syscall("rmdir", root, e));
    links.and(rest).and(folder)
}

impl Programs {
    /// Their maps.
    #[must_use]
    pub const fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Pins again what somebody unpinned, or what went with an unmounted file system: the maps live on with us, and
    /// whoever looks at the pins must see the ones that are used.
    pub fn pin_again(&self) -> Result<(), BpfError> {
        let links = self.root.join("links");
        std::fs::create_dir_all(&links).map_err(|e| BpfError::syscall("mkdir", &links, e))?;
        let mut pinned = 0;
        for (name, map) in self.ebpf.maps() {
            let path = self.root.join(name);
            if names().iter().any(|n| n == name) && !path.exists() {
                let fail = |e| BpfError::syscall("BPF_OBJ_PIN", &path, io::Error::other(e));
                map.pin(&path).map_err(fail)?;
                pinned += 1;
            }
        }
        let clock = self.root.join("prog_clock");
        if !clock.exists() {
            sys::pin(self.clock.as_fd(), &clock).map_err(|e| BpfError::syscall("BPF_OBJ_PIN", &clock, e))?;
            pinned += 1;
        }
        if pinned > 0 {
            tracing::warn!(event = "pinsRestored", pinned, "pins were missing and are there again");
        }
        Ok(())
    }

    /// Hands what the programs logged (by aya-log, see `clock`) to our own log.
    pub fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }
}

fn load_xdp(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, BpfError> {
    let program = ebpf.program_mut(name).ok_or_else(|| BpfError::NoProgram { name: name.to_owned() })?;
    let fd = <&mut Xdp>::try_from(program).and_then(|p| p.load().and_then(|()| clone(p.fd())));
    fd.map_err(|e| BpfError::program(name, &e))
}

fn load_classifier(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, BpfError> {
    let program = ebpf.program_mut(name).ok_or_else(|| BpfError::NoProgram { name: name.to_owned() })?;
    let fd = <&mut SchedClassifier>::try_from(program).and_then(|p| p.load().and_then(|()| clone(p.fd())));
    fd.map_err(|e| BpfError::program(name, &e))
}

fn clone(fd: Result<&aya::programs::ProgramFd, ProgramError>) -> Result<OwnedFd, ProgramError> {
    fd?.as_fd().try_clone_to_owned().map_err(ProgramError::IOError)
}

/// Removes the files of a folder, and its empty folders.
fn empty(folder: &Path) -> Result<(), BpfError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(BpfError::syscall("readdir", folder, e)),
    };
    let mut result = Ok(());
    for entry in entries.flatten() {
        let path = entry.path();
        let removed = if path.is_dir() {
            std::fs::remove_dir(&path).map_err(|e| BpfError::syscall("rmdir", &path, e))
        } else {
            unlink(&path)
        };
        result = result.and(removed);
    }
    result
}

fn unlink(path: &Path) -> Result<(), BpfError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BpfError::syscall("unlink", path, e)),
        _ => Ok(()),
    }
}
