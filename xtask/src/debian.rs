//! Packages of another Debian suite than the machine's own: looked up and extracted, never installed. The machine's own
//! sources and lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh::{quiet, read};

/// The package lists of a suite, in a folder of their own.
pub struct Suite {
    name: String,
    state: PathBuf,
}

impl Suite {
    /// Fetches the lists into a folder `apt` below `root`, from the mirror that this machine trusts.
    pub fn read(name: &str, root: &Path) -> Result<Self> {
        let state = root.join("apt");
        for dir in ["lists/partial", "cache/archives/partial", "packages"] {
            let dir = state.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let suite = Self { name: name.to_owned(), state };
        let list = suite.list();
        fs::write(&list, own_entry()?.for_suite(name)).with_context(|| format!("write {}", list.display()))?;
        quiet(&format!("reading the package list of {name}"), suite.apt("apt-get").arg("update"))?;
        Ok(suite)
    }

    /// The versions of a package, as `apt-cache madison` prints them.
    pub fn offers(&self, package: &str) -> Result<String> {
        read(self.apt("apt-cache").args(["madison", package]))
    }

    /// The package and all that it depends on, by name.
    pub fn needs(&self, package: &str) -> Result<Vec<String>> {
        let text = read(self.apt("apt-cache").args(["depends", "--recurse", "--important", package]))?;
        Ok(text.lines().filter(|line| !line.starts_with([' ', '|', '<'])).map(str::to_owned).collect())
    }

    /// Downloads packages and extracts them into `tree`.
    pub fn extract(&self, packages: &[String], tree: &Path) -> Result<()> {
        let folder = self.state.join("packages");
        let names = packages.join(", ");
        quiet(
            &format!("downloading {names} of {}", self.name),
            self.apt("apt-get").current_dir(&folder).arg("download").args(packages),
        )?;
        let mut count = 0;
        for file in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let deb = file.with_context(|| format!("list {}", folder.display()))?.path();
            quiet(&format!("extracting {}", deb.display()), Command::new("dpkg-deb").arg("-x").arg(&deb).arg(tree))?;
            fs::remove_file(&deb).with_context(|| format!("remove {}", deb.display()))?;
            count += 1;
        }
        if count < packages.len() {
            bail!("apt-get download left {count} packages of {names} in {}", folder.display());
        }
        Ok(())
    }

    fn list(&self) -> PathBuf {
        self.state.join("purelb.list")
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-o").arg(format!("Dir::Etc::sourcelist={}", self.list().display()));
        for option in ["Dir::Etc::sourceparts=/dev/null", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="] {
            command.args(["-o", option]);
        }
        command.arg("-o").arg(format!("Dir::State::lists={}", self.state.join("lists").display()));
        command.arg("-o").arg(format!("Dir::Cache={}", self.state.join("cache").display()));
        // Otherwise apt drops to a user who may not enter this folder.
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
