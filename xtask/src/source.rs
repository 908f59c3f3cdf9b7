//! core's source for `-Z build-std`: from rustup, or from Debian where rustup cannot fetch it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

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

/// Extracts Debian's rust-src of this version into the cache; the machine's own apt sources and lists stay as they are.
fn from_debian(version: &str) -> Result<PathBuf> {
    let root = cache_dir()?.join(format!("rust-src-{version}"));
    let tree = root.join(format!("usr/src/rustc-{version}"));
    if tree.join("library/core/src/lib.rs").is_file() {
        return Ok(tree);
    }
    let state = root.join("apt");
    for dir in ["lists/partial", "cache/archives/partial"] {
        let dir = state.join(dir);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let entry = own_entry()?;
    let list = state.join("purelb.list");
    fs::write(&list, entry.for_suite(RUST_SRC_SUITE)).with_context(|| format!("write {}", list.display()))?;

    let apt = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(&root).arg("-o").arg(format!("Dir::Etc::sourcelist={}", list.display()));
        for option in ["Dir::Etc::sourceparts=/dev/null", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="] {
            command.args(["-o", option]);
        }
        command.arg("-o").arg(format!("Dir::State::lists={}", state.join("lists").display()));
        command.arg("-o").arg(format!("Dir::Cache={}", state.join("cache").display()));
        // Otherwise apt drops to a user who may not enter this folder.
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    };
    quiet(&format!("reading the package list of {RUST_SRC_SUITE}"), apt("apt-get").arg("update"))?;
    let offered = read(apt("apt-cache").args(["madison", "rust-src"]))?;
    let Some(package) = matching_version(&offered, version) else {
        bail!("{RUST_SRC_SUITE} offers no rust-src {version}; it offers:\n{offered}");
    };
    quiet(
        &format!("downloading rust-src {package}"),
        apt("apt-get").arg("download").arg(format!("rust-src={package}")),
    )?;
    let deb = fs::read_dir(&root)
        .with_context(|| format!("list {}", root.display()))?
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|path| path.extension().is_some_and(|end| end == "deb"))
        .with_context(|| format!("apt-get download left no package in {}", root.display()))?;
    quiet("extracting core's source", Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
    fs::remove_file(&deb).with_context(|| format!("remove {}", deb.display()))?;
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

/// A Debian mirror that this machine already trusts.
#[derive(Debug, PartialEq)]
struct Entry {
    uri: String,
    signed_by: Option<String>,
}

impl Entry {
    fn for_suite(&self, suite: &str) -> String {
        let options = self.signed_by.as_ref().map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
        format!("deb {options}{} {suite} main\n", self.uri)
    }
}

fn own_entry() -> Result<Entry> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.filter_map(|file| Some(file.ok()?.path())));
    }
    files.sort();
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|text| deb822_entry(&text).or_else(|| one_line_entry(&text)))
        .context("no Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d")
}

/// The first mirror of the main archive in a `.sources` file.
fn deb822_entry(text: &str) -> Option<Entry> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().to_owned())
        };
        let uri = field("URIs")?.split_whitespace().next()?.to_owned();
        is_main_archive(&uri).then(|| Entry { uri, signed_by: field("Signed-By").filter(|key| key.starts_with('/')) })
    })
}

/// The same in the older one-line form.
fn one_line_entry(text: &str) -> Option<Entry> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']')?,
            None => ("", rest),
        };
        let uri = rest.split_whitespace().next()?.to_owned();
        let signed_by =
            options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
        is_main_archive(&uri).then_some(Entry { uri, signed_by })
    })
}

/// `…/debian`: not the security archive, not somebody else's repository.
fn is_main_archive(uri: &str) -> bool {
    uri.trim_end_matches('/').ends_with("/debian")
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

    #[test]
    fn both_forms_of_apt_sources_are_read() {
        let key = "/usr/share/keyrings/k.gpg".to_owned();
        let entry = Entry { uri: "http://deb.example/debian".to_owned(), signed_by: Some(key) };
        let stanzas = "Types: deb\nURIs: https://other.example/x\n\nTypes: deb\n# old\nURIs: http://deb.example/debian\n\
                       Suites: a\nSigned-By: /usr/share/keyrings/k.gpg\n";
        assert_eq!(deb822_entry(stanzas).as_ref(), Some(&entry));
        let line = "deb http://s.example/debian-security a main\n\
                    deb [signed-by=/usr/share/keyrings/k.gpg] http://deb.example/debian a main\n";
        assert_eq!(one_line_entry(line).as_ref(), Some(&entry));
        assert_eq!(
            entry.for_suite("s"),
            "deb [signed-by=/usr/share/keyrings/k.gpg] http://deb.example/debian s main\n"
        );
    }
}
