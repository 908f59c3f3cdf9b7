//! Debian's kernels, extracted into the cache.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::Suite;
use crate::sh::{self, cache_dir, quiet};
use crate::tools::{KERNEL_PACKAGE, Kernel};

/// A kernel that can be booted.
pub struct Bootable {
    /// As `uname -r` says.
    pub release: String,
    /// The kernel.
    pub vmlinuz: PathBuf,
    /// Folder of its modules, with their index.
    pub modules: PathBuf,
}

/// The kernel of the cache, downloaded when it is not there: its suite's newest then.
pub fn ensure(kernel: &Kernel) -> Result<Bootable> {
    let root = cache_dir()?.join(format!("linux-{}-{}", kernel.name, kernel.suite));
    if let Ok(found) = find(&root) {
        return Ok(found);
    }
    let _lock = sh::lock()?;
    let suite = Suite::read(kernel.suite, &root)?;
    let mut packages = suite.needs(KERNEL_PACKAGE)?;
    packages.retain(|name| is_part(name));
    if packages.is_empty() {
        bail!("{KERNEL_PACKAGE} of {} depends on no package with a kernel", kernel.suite);
    }
    suite.extract(&packages, &root)?;
    // Newer packages have a merged /usr; depmod looks at the old place.
    if !root.join("lib").exists() {
        symlink("usr/lib", root.join("lib")).with_context(|| format!("make a link in {}", root.display()))?;
    }
    let release = release(&root)?;
    if !release.starts_with(kernel.name) {
        bail!("{} has Linux {release} by now: change the list in xtask/src/tools.rs", kernel.suite);
    }
    let depmod = sh::find("depmod").context("no depmod: install kmod")?;
    quiet(
        &format!("indexing the modules of Linux {release}"),
        Command::new(depmod).arg("-b").arg(&root).arg(&release),
    )?;
    find(&root)
}

/// `linux-image-6.1.0-50-cloud-amd64`; newer suites have it in two parts. Not the packages that only name them.
fn is_part(package: &str) -> bool {
    let rest = ["linux-base-", "linux-image-", "linux-binary-", "linux-modules-"]
        .iter()
        .find_map(|part| package.strip_prefix(part));
    rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

fn release(root: &Path) -> Result<String> {
    let folder = root.join("lib/modules");
    let mut all = fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?.flatten();
    let one = all.next().with_context(|| format!("{} is empty", folder.display()))?;
    Ok(one.file_name().to_string_lossy().into_owned())
}

fn find(root: &Path) -> Result<Bootable> {
    let release = release(root)?;
    let modules = root.join("lib/modules").join(&release);
    let places = [modules.join("vmlinuz"), root.join(format!("boot/vmlinuz-{release}"))];
    let vmlinuz = places.into_iter().find(|path| path.is_file());
    let vmlinuz = vmlinuz.with_context(|| format!("no kernel in {}: remove it and repeat", root.display()))?;
    // The index is written last.
    if !modules.join("modules.dep.bin").is_file() {
        bail!("{} has no index", modules.display());
    }
    Ok(Bootable { release, vmlinuz, modules })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_with_a_kernel() {
        let all = [
            "linux-image-cloud-amd64",
            "linux-base-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-modules-cloud-amd64",
            "linux-modules-7.3.4+deb13-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "kmod",
        ];
        let found: Vec<_> = all.into_iter().filter(|name| is_part(name)).collect();
        assert_eq!(found, [all[1], all[2], all[4], all[5]]);
    }
}
