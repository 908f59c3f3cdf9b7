//! core's source for `-Z build-std`: from rustup, or from Debian where rustup cannot fetch it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::Suite;
use crate::sh::{cache_dir, quiet, read, say};
use crate::tools::RUST_SRC_SUITE;

/// Makes sure that the sysroot has the source of exactly this rustc.
pub fn ensure() -> Result<()> {
    let sysroot = PathBuf::from(read(Command::new("rustc").args(["--print", "sysroot"]))?);
    let place = sysroot.join("lib/rustlib/src/rust");
    if place.join("library/core/src/lib.rs").is_file() {
        return Ok(());
    }
    let version = rustc_release(&read(Command::new("rustc").arg("-Vv"))?)
        .context("`rustc -Vv` prints no release line: check which rustc is in PATH")?;
    let rustup = quiet("fetching rust-src with rustup", Command::new("rustup").args(["component", "add", "rust-src"]));
    if rustup.is_ok() && place.join("library/core/src/lib.rs").is_file() {
        return Ok(());
    }
    say("rustup cannot fetch rust-src here; taking Debian's package");
    let tree = from_debian(&version).with_context(|| {
        format!("no source of core for rustc {version}: run `rustup component add rust-src` where rustup has a network")
    })?;
    link(&tree, &place)
}

/// Extracts Debian's rust-src of this version into the cache.
fn from_debian(version: &str) -> Result<PathBuf> {
    let root = cache_dir()?.join(format!("rust-src-{version}"));
    let tree = root.join(format!("usr/src/rustc-{version}"));
    if tree.join("library/core/src/lib.rs").is_file() {
        return Ok(tree);
    }
    let suite = Suite::read(RUST_SRC_SUITE, &root)?;
    let offered = suite.offers("rust-src")?;
    let Some(package) = matching_version(&offered, version) else {
        bail!("{RUST_SRC_SUITE} offers no rust-src {version}; it offers:\n{offered}");
    };
    suite.extract(&[format!("rust-src={package}")], &root)?;
    if !tree.join("library/core/src/lib.rs").is_file() {
        bail!("rust-src {package} has no {}: remove {} and repeat", tree.display(), root.display());
    }
    Ok(tree)
}

fn link(tree: &Path, place: &Path) -> Result<()> {
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}: is the sysroot writable?", parent.display()))?;
    }
    if place.is_symlink() {
        fs::remove_file(place).with_context(|| format!("replace the stale link {}", place.display()))?;
    }
    symlink(tree, place).with_context(|| {
        format!("link {} to {}: move away what is there and repeat", place.display(), tree.display())
    })?;
    say(format!("core's source: {}", tree.display()));
    Ok(())
}

/// `1.95.0` out of `rustc -Vv`.
fn rustc_release(text: &str) -> Option<String> {
    let release = text.lines().find_map(|line| line.strip_prefix("release: "))?;
    Some(release.split('-').next()?.trim().to_owned())
}

/// The package version whose upstream part is this rustc's; the suite also keeps newer ones.
fn matching_version(madison: &str, version: &str) -> Option<String> {
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|offer| offer.split(['+', '-', '~']).next() == Some(version))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_line_gives_the_version() {
        let text = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nrelease: 1.95.0\nLLVM version: 22.1.2";
        assert_eq!(rustc_release(text), Some("1.95.0".to_owned()));
        assert_eq!(rustc_release("release: 1.97.0-nightly"), Some("1.97.0".to_owned()));
        assert_eq!(rustc_release("nothing"), None);
    }

    #[test]
    fn only_the_exact_version_matches() {
        let text = " rust-src | 1.96.1+dfsg1-2~bpo13+1 | http://m trixie-backports/main\n \
                    rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m trixie-backports/main\n";
        assert_eq!(matching_version(text, "1.95.0"), Some("1.95.0+dfsg1-2~bpo13+1".to_owned()));
        assert_eq!(matching_version(text, "1.95"), None);
        assert_eq!(matching_version(text, "1.94.0"), None);
    }
}
