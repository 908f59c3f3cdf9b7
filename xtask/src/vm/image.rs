//! A guest's file system as an initramfs: programs of this machine with the libraries that they load, tests, modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;

const FOLDER: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive of the form that kernels unpack ("newc"), being written.
pub struct Image {
    out: BufWriter<File>,
    count: u32,
    names: BTreeSet<PathBuf>,
}

impl Image {
    /// Begins it, with the folders that a merged `/usr` has.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut image = Self { out: BufWriter::new(file), count: 0, names: BTreeSet::new() };
        for top in ["bin", "sbin", "lib", "lib64"] {
            image.folder(&Path::new("/usr").join(top))?;
            image.entry(&Path::new("/").join(top), LINK, format!("usr/{top}").as_bytes())?;
        }
        for mount in ["/dev", "/proc", "/sys", "/run", "/tmp", "/var"] {
            image.folder(Path::new(mount))?;
        }
        Ok(image)
    }

    /// A file with this content.
    pub fn content(&mut self, at: impl AsRef<Path>, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(&merged(at.as_ref()), REGULAR | mode, content)
    }

    /// A file of this machine.
    pub fn file(&mut self, at: impl AsRef<Path>, from: &Path) -> Result<()> {
        let mode = fs::metadata(from).with_context(|| format!("look at {}", from.display()))?.permissions().mode();
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.content(at, mode & 0o777, &content)
    }

    /// A file of this machine at its own place, or the folder and all below it; what is not there is left out.
    pub fn tree(&mut self, at: &Path, from: &Path) -> Result<()> {
        if from.is_file() {
            return self.file(at, from);
        }
        for item in fs::read_dir(from).into_iter().flatten().flatten() {
            self.tree(&at.join(item.file_name()), &item.path())?;
        }
        Ok(())
    }

    /// A program, with the libraries that it loads.
    pub fn program(&mut self, at: impl AsRef<Path>, from: &Path) -> Result<()> {
        self.file(at, from)?;
        for library in libraries(from) {
            self.file(&library, &library)?;
        }
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry(Path::new("/TRAILER!!!"), 0, &[])?;
        self.out.flush().context("write the image")
    }

    fn folder(&mut self, path: &Path) -> Result<()> {
        self.entry(path, FOLDER, &[])
    }

    /// One entry, after the folders it is in. What is there already stays.
    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if path == Path::new("/") || !self.names.insert(path.to_path_buf()) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        self.count += 1;
        let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy().into_owned();
        let size = u32::try_from(content.len()).with_context(|| format!("{} is too large", path.display()))?;
        let named = u32::try_from(name.len() + 1).context("a name is too long")?;
        let header = [self.count, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, named, 0];
        let header: String = header.iter().map(|field| format!("{field:08x}")).collect();
        // Header and name, and then the content, are filled up to multiples of four.
        let head = format!("070701{header}{name}\0");
        self.out.write_all(head.as_bytes())?;
        self.fill(head.len())?;
        self.out.write_all(content)?;
        self.fill(content.len())
    }

    fn fill(&mut self, length: usize) -> Result<()> {
        let zeros = [0; 3];
        self.out
            .write_all(zeros.get(..length.next_multiple_of(4) - length).unwrap_or_default())
            .context("write the image")
    }
}

/// The place of a file where `/bin`, `/sbin`, `/lib` and `/lib64` are links into `/usr`.
fn merged(path: &Path) -> PathBuf {
    let first = path.components().nth(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
    match first.as_deref() {
        Some("bin" | "sbin" | "lib" | "lib64") => Path::new("/usr").join(path.strip_prefix("/").unwrap_or(path)),
        _ => path.to_path_buf(),
    }
}

/// What `ldd` finds; nothing for a static program.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let text = sh::read(Command::new("ldd").arg(program)).unwrap_or_default();
    text.lines().filter_map(library).collect()
}

/// `libc.so.6 => /lib/…/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`
fn library(line: &str) -> Option<PathBuf> {
    let line = line.split_once("=>").map_or(line, |(_, place)| place);
    line.split_whitespace().next().filter(|word| word.starts_with('/')).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_is_what_kernels_unpack() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut image = Image::create(&path).unwrap();
        image.content("/lib/x/file", 0o644, b"abcde").unwrap();
        image.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("070701"));
        // Its folder comes first, at the place behind the link, and each entry begins at a multiple of four.
        let at = |name: &str| text.find(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(at("usr\0") < at("usr/lib/x\0") && at("usr/lib/x\0") < at("usr/lib/x/file\0"));
        assert!(text.contains("abcde\0\0\x00070701"));
        assert!(text.match_indices("070701").all(|(at, _)| at % 4 == 0));
        assert!(at("TRAILER!!!\0") > at("abcde"));
    }

    #[test]
    fn places_and_libraries() {
        assert_eq!(merged(Path::new("/sbin/ip")), Path::new("/usr/sbin/ip"));
        assert_eq!(merged(Path::new("/etc/passwd")), Path::new("/etc/passwd"));
        assert_eq!(library("\tlibc.so.6 => /lib/libc.so.6 (0x1)"), Some(PathBuf::from("/lib/libc.so.6")));
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x1)"), Some(PathBuf::from("/lib64/ld-linux-x86-64.so.2")));
        assert_eq!(library("\tlinux-vdso.so.1 (0x1)"), None);
        assert_eq!(library("\tlibx.so => not found"), None);
    }
}
