//! What the kernel must allow before anything can be loaded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use purelb_plan::problem::Problem;

use super::problem;

/// The first kernel with tcx.
const OLDEST: (u32, u32) = (6, 6);
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the data path cannot be loaded here.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// Too old.
    #[error("Linux {release} is too old: replies need tcx, which came with Linux {}.{}; boot a newer kernel", OLDEST.0, OLDEST.1)]
    Kernel {
        /// Its release.
        release: String,
    },
    /// Not privileged enough.
    #[error("the capability {} is missing: run as root, or add {} to the container's securityContext.capabilities", .missing.join(" and "), .missing.join(", "))]
    Capabilities {
        /// Names without `CAP_`.
        missing: Vec<&'static str>,
    },
    /// The root is elsewhere.
    #[error(
        "{path} is not on a bpf file system: mount one (mount -t bpf bpf /sys/fs/bpf), or give the container the host's /sys/fs/bpf; or choose another --bpf-root"
    )]
    NotBpffs {
        /// The folder that should be.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot look at {path}: {source}; choose another --bpf-root")]
    Root {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Checks kernel, capabilities and the bpf file system under `root`; changes nothing.
///
/// # Errors
/// The first thing that would make loading fail, with its remedy.
pub fn preflight(root: &Path) -> Result<(), PreflightError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if version(&release).is_some_and(|found| found < OLDEST) {
        return Err(PreflightError::Kernel { release: release.trim().to_owned() });
    }
    let missing = missing(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    if !missing.is_empty() {
        return Err(PreflightError::Capabilities { missing });
    }
    on_bpffs(root)
}

/// The root itself is made later: what counts is the nearest folder that is there.
fn on_bpffs(root: &Path) -> Result<(), PreflightError> {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    for folder in root.ancestors() {
        match statfs(folder) {
            Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => return Ok(()),
            Ok(_) => return Err(PreflightError::NotBpffs { path: folder.to_owned() }),
            Err(nix::Error::ENOENT) => {}
            Err(error) => return Err(PreflightError::Root { path: folder.to_owned(), source: error.into() }),
        }
    }
    Err(PreflightError::NotBpffs { path: root })
}

/// What the kernel lacks that is not fatal.
pub(super) fn btf() -> Option<Problem> {
    let there = Path::new(BTF).exists();
    let message = "has no BTF: bpftool shows the maps as bytes, and the verifier may refuse the programs";
    (!there).then(|| problem("kernel", message, format!("boot a kernel built with CONFIG_DEBUG_INFO_BTF ({BTF})")))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Capabilities that `/proc/self/status` does not list as effective.
fn missing(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(bits) = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()) else { return Vec::new() };
    let has = |number: u32| bits & 1 << number != 0;
    let (net_admin, net_raw, sys_admin, perfmon, bpf) = (has(12), has(13), has(21), has(38), has(39));
    let of_bpf = [(bpf || sys_admin, "BPF"), (perfmon || sys_admin, "PERFMON")];
    let wanted = [(net_admin, "NET_ADMIN"), (net_raw, "NET_RAW")].into_iter().chain(of_bpf);
    wanted.filter_map(|(there, name)| (!there).then_some(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let rows = [
            ("6.18.0-arch1", Some((6, 18))),
            ("6.6.0", Some((6, 6))),
            ("5.15.0-91-generic", Some((5, 15))),
            ("", None),
            ("x", None),
        ];
        for (text, want) in rows {
            assert_eq!(version(text), want, "{text}");
        }
        assert!(version("6.5.13").unwrap() < OLDEST && version("6.18").unwrap() > OLDEST);
    }

    #[test]
    fn capabilities() {
        let rows = [
            ("000001ffffffffff", vec![]),
            ("0000000000203000", vec![]),
            ("000000c000003000", vec![]),
            ("0000008000003000", vec!["PERFMON"]),
            ("000000c000001000", vec!["NET_RAW"]),
            ("000000c000002000", vec!["NET_ADMIN"]),
            ("0000000000000000", vec!["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]),
        ];
        for (bits, want) in rows {
            assert_eq!(missing(&format!("Name:\tx\nCapEff:\t{bits}\n")), want, "{bits}");
        }
        let error = PreflightError::Capabilities { missing: vec!["BPF", "PERFMON"] };
        let text = "the capability BPF and PERFMON is missing: run as root, or add BPF, PERFMON to the \
                    container's securityContext.capabilities";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn another_file_system_is_refused_and_nothing_is_made() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("a/b");
        let error = on_bpffs(&root).unwrap_err();
        assert!(matches!(&error, PreflightError::NotBpffs { path } if path == temp.path()), "{error}");
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
        assert!(!temp.path().join("a").exists());
    }
}
