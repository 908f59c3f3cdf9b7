//! `cargo xtask setup`: installs once what is missing, and says what it does.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh::{self, as_root, cache_dir, cargo, quiet, say};
use crate::source;
use crate::tools::{BPF_LINKER, TEST_TOOLS, Tool, UNWANTED_SERVICES, VM_TOOLS};

/// Where the agent and the tests pin maps.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Everything that building and testing need.
pub fn all() -> Result<()> {
    let _lock = sh::lock()?;
    linker()?;
    source::ensure()?;
    packages(TEST_TOOLS)?;
    packages(VM_TOOLS)?;
    bpffs()?;
    say("set-up complete");
    Ok(())
}

/// What the tests need beside the toolchain.
pub fn for_tests() -> Result<()> {
    let _lock = sh::lock()?;
    packages(TEST_TOOLS)?;
    bpffs()
}

/// What guests are made of.
pub fn for_guests() -> Result<()> {
    let _lock = sh::lock()?;
    packages(TEST_TOOLS)?;
    packages(VM_TOOLS)
}

/// bpf-linker of the pinned version, installed into the cache when it does not answer.
pub fn linker() -> Result<PathBuf> {
    let root = cache_dir()?.join(format!("bpf-linker-{BPF_LINKER}"));
    let bin = root.join("bin/bpf-linker");
    let answers = || sh::read(Command::new(&bin).arg("--version")).is_ok_and(|text| text.contains(BPF_LINKER));
    if answers() {
        return Ok(bin);
    }
    quiet(
        &format!("installing bpf-linker {BPF_LINKER} (1-2 minutes, once)"),
        cargo()
            .env_remove("CARGO_TARGET_DIR")
            .args(["install", "bpf-linker", "--locked", "--force", "--version", BPF_LINKER, "--root"])
            .arg(&root),
    )?;
    if !answers() {
        bail!("{} does not report version {BPF_LINKER}: remove {} and repeat", bin.display(), root.display());
    }
    Ok(bin)
}

/// A C++ compiler, for libFuzzer.
pub fn compiler() -> Result<()> {
    if std::env::var_os("CXX").is_some() || sh::find("c++").is_some() {
        return Ok(());
    }
    let _lock = sh::lock()?;
    packages(TEST_TOOLS)
}

/// The distribution's packages, only those whose program is missing.
fn packages(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| sh::find(tool.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    if sh::find("apt-get").is_none() {
        bail!("missing programs and no apt-get: install the equivalents of {}", names.join(", "));
    }
    // `sh -c SCRIPT sh PACKAGE...`
    let mut install = vec!["sh", "-c", INSTALL, "sh"];
    install.extend(&names);
    let label = format!("installing {}", names.join(", "));
    if quiet(&label, &mut as_root(&install)?).is_err() {
        quiet("refreshing the package lists", &mut as_root(&["apt-get", "update"])?)?;
        quiet(&label, &mut as_root(&install)?)?;
    }
    let services = UNWANTED_SERVICES.iter().filter(|(package, _)| names.contains(package));
    let disable: Vec<&str> = ["systemctl", "disable"].into_iter().chain(services.map(|(_, name)| *name)).collect();
    if disable.len() > 2 && sh::find("systemctl").is_some() {
        quiet("keeping new services from the next boot", &mut as_root(&disable)?)?;
    }
    Ok(())
}

/// Installs; a policy of Debian's kind keeps what is new from being started (a machine's own policy stays).
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if ! [ -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
fi
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
"#;

/// Mounts bpffs where everything expects it.
fn bpffs() -> Result<()> {
    if bpffs_is_mounted()? {
        return Ok(());
    }
    quiet(&format!("mounting bpffs at {BPFFS}"), &mut as_root(&["mount", "-t", "bpf", "bpf", BPFFS])?)
}

/// True when pins can be made.
pub fn bpffs_is_mounted() -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    Ok(mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    }))
}
