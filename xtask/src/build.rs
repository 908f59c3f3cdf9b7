//! `cargo xtask build-ebpf` and the build of the agent around the object.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh::{self, cargo, workspace};
use crate::tools::BPF_TARGET;
use crate::{setup, source};

/// Builds the kernel programs and returns the object.
pub fn ebpf() -> Result<PathBuf> {
    object("purelb-ebpf", &[], "purelb-ebpf.o")
}

/// Builds what `cargo xtask bench` puts around the kernel programs, an object beside theirs.
pub fn bench() -> Result<PathBuf> {
    object("purelb-bench-ebpf", &["--features", "bench"], "purelb-bench.o")
}

fn object(bin: &str, options: &[&str], file: &str) -> Result<PathBuf> {
    let _lock = sh::lock()?;
    let linker = setup::linker()?;
    source::ensure()?;

    sh::run(ebpf_cargo("build", &linker).args(["--release", "-p", "purelb-ebpf", "--bin", bin]).args(options))?;
    let built = ebpf_target().join(BPF_TARGET).join("release").join(bin);
    let object = workspace().join("target").join(file);
    copy_if_changed(&built, &object)?;
    Ok(object)
}

/// Says where the object is and what is in it.
pub fn describe(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("read {}", object.display()))?;
    sh::print(format!("{}: {} bytes", object.display(), bytes.len()));
    Ok(())
}

/// cargo for the kernel's target: the flags and profile are complete here, nothing of the caller's reaches the object.
pub fn ebpf_cargo(verb: &str, linker: &Path) -> Command {
    let flags = [
        // Which registers bpf_target_arch's kprobe helpers would read; aya-ebpf does not build without one.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        // Without it an unaligned read becomes byte loads and shifts.
        "-Clink-arg=--cpu-features=+allows-misaligned-mem-access".to_owned(),
    ];
    let mut command = cargo();
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_BUILD_") || name.starts_with("CARGO_TARGET_") {
            command.env_remove(name);
        }
    }
    command
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // core is built from source with the stable compiler, which wants to be told that this is meant.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "thin")
        .env("CARGO_TARGET_DIR", ebpf_target())
        .args([verb, "--target", BPF_TARGET, "-Z", "build-std=core"]);
    command
}

/// Own folder: the flags differ from the host's, a shared one would rebuild at every change of command.
fn ebpf_target() -> PathBuf {
    workspace().join("target/ebpf")
}

/// Keeps the time stamp of an unchanged object, so the agent is not built again.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    // Renamed into place: an agent build beside us never reads half an object.
    let draft = to.with_extension("o.new");
    fs::write(&draft, new).with_context(|| format!("write {}", draft.display()))?;
    fs::rename(&draft, to).with_context(|| format!("rename {} to {}", draft.display(), to.display()))
}

/// Writes the CustomResourceDefinitions, or with `check` fails where they differ from their types.
pub fn generate(check: bool) -> Result<()> {
    let mut crds = sh::cargo();
    crds.args(["run", "--quiet", "-p", "purelb-api", "--bin", "crds", "--", "deploy/crds"]);
    sh::run(crds.args(check.then_some("--check")))
}
