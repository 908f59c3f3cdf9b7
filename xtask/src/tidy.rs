//! The project's own rules, which no linter knows.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The only files that may say `unsafe`.
/// Invariant I8.
const UNSAFE_FILES: &[&str] = &[
    "purelb-common/src/pod.rs",
    "purelb-ebpf/src/maps.rs",
    "purelb-ebpf/src/packet.rs",
    "purelb-ebpf/src/main.rs",
    "purelb-ebpf/src/bench.rs",
    "purelb-agent/src/bpf/sys.rs",
    "tests/src/sys.rs",
];

/// Lines of a file without its unit tests.
const MAX_LINES: usize = 500;

/// A rule gives one line for each place that breaks it.
pub type Rule = fn(&Tree) -> Vec<String>;

/// Name and rule.
pub const RULES: &[(&str, Rule)] = &[
    ("tidy: every file starts with //!", doc_line),
    ("tidy: at most 500 lines", length),
    ("tidy: no mod.rs", no_mod_rs),
    ("tidy: unsafe only in listed files", no_unsafe),
    ("tidy: no path of one machine", no_machine_paths),
    ("tidy: every invariant is tested", invariants),
    ("tidy: every reason is tested", reasons),
    ("tidy: tests/README.md names tests", named_tests),
];

/// Text files of the project by path relative to the root.
pub struct Tree(Vec<(String, String)>);

impl Tree {
    /// Reads what git would keep: no build results, no hidden folders but `.ci` and `.cargo`.
    fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for item in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = item.with_context(|| format!("list {}", folder.display()))?.path();
                if path.is_symlink() || skipped(&path) {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(text) = fs::read_to_string(&path) {
                    files.push((relative(root, &path), text));
                }
            }
        }
        files.sort();
        Ok(Self(files))
    }

    fn rust(&self) -> impl Iterator<Item = (&str, &str)> {
        self.all().filter(|(path, _)| path.ends_with(".rs"))
    }

    fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(path, text)| (path.as_str(), text.as_str()))
    }

    fn text(&self, wanted: &str) -> Option<&str> {
        self.all().find(|(path, _)| *path == wanted).map(|(_, text)| text)
    }
}

/// Applies one rule to the files below `root`.
pub fn check(root: &Path, rule: Rule) -> Result<()> {
    let broken = rule(&Tree::read(root)?);
    if !broken.is_empty() {
        bail!("\n  {}", broken.join("\n  "));
    }
    Ok(())
}

fn skipped(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name == "target" || (name.starts_with('.') && name != ".ci" && name != ".cargo")
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).map(PathBuf::from).unwrap_or_default().to_string_lossy().into_owned()
}

fn doc_line(tree: &Tree) -> Vec<String> {
    let missing = tree.rust().filter(|(_, text)| !text.starts_with("//!"));
    missing.map(|(path, _)| format!("{path}: begin the file with a `//!` line that says what it is for")).collect()
}

fn length(tree: &Tree) -> Vec<String> {
    let counted = tree.rust().map(|(path, text)| (path, without_tests(text).lines().count()));
    let long = counted.filter(|(_, lines)| *lines > MAX_LINES);
    long.map(|(path, lines)| format!("{path}: {lines} lines without tests, split it ({MAX_LINES} at most)")).collect()
}

fn no_mod_rs(tree: &Tree) -> Vec<String> {
    let named = tree.rust().filter(|(path, _)| path.ends_with("/mod.rs"));
    named.map(|(path, _)| format!("{path}: name the file after its folder, beside it")).collect()
}

fn no_unsafe(tree: &Tree) -> Vec<String> {
    let others = tree.rust().filter(|(path, _)| !UNSAFE_FILES.contains(path));
    let lines = others.flat_map(|(path, text)| text.lines().enumerate().map(move |(at, line)| (path, at + 1, line)));
    lines
        .filter(|(_, _, line)| code(line).split(|c: char| !is_word(c)).any(|word| word == "unsafe"))
        .map(|(path, at, _)| format!("{path}:{at}: `unsafe` belongs in one of {}", UNSAFE_FILES.join(", ")))
        .collect()
}

fn no_machine_paths(tree: &Tree) -> Vec<String> {
    // Put together here, or this file would break its own rule.
    let needles = ["work", "root", "home"].map(|top| format!("/{top}/"));
    let lines =
        tree.all().flat_map(|(path, text)| text.lines().enumerate().map(move |(at, line)| (path, at + 1, line)));
    lines
        .filter(|(_, _, line)| needles.iter().any(|needle| starts_path(line, needle)))
        .map(|(path, at, _)| format!("{path}:{at}: names a folder of one machine, use a relative path or a variable"))
        .collect()
}

/// True when `needle` begins an absolute path, so `src/home/x` is none.
fn starts_path(line: &str, needle: &str) -> bool {
    line.match_indices(needle).any(|(at, _)| {
        let before = line.get(..at).and_then(|head| head.chars().next_back());
        !before.is_some_and(|c| is_word(c) || "./}-~".contains(c))
    })
}

fn invariants(tree: &Tree) -> Vec<String> {
    let Some(text) = tree.text("ARCHITECTURE.md") else {
        return vec!["ARCHITECTURE.md: missing, write it with its numbered invariants".to_owned()];
    };
    let stated = numbers(text);
    if stated.is_empty() {
        return vec!["ARCHITECTURE.md: states no invariant I1, I2, …".to_owned()];
    }
    let held: BTreeSet<u32> = tree
        .rust()
        .filter(|(path, text)| path.contains("tests/") || text.contains("#[test]"))
        .flat_map(|(_, text)| numbers(text))
        .collect();
    let lints = tree.text("clippy.toml").map(numbers).unwrap_or_default();
    let open = stated.iter().filter(|number| !held.contains(number) && !lints.contains(number));
    open.map(|number| format!("ARCHITECTURE.md: I{number} is named in no test and not in clippy.toml")).collect()
}

/// The numbers of the words I1, I2, … of a text.
fn numbers(text: &str) -> BTreeSet<u32> {
    text.split(|c: char| !is_word(c)).filter_map(|word| word.strip_prefix('I')?.parse().ok()).collect()
}

fn reasons(tree: &Tree) -> Vec<String> {
    let variants = tree.text("purelb-common/src/verdict.rs").map(reason_variants).unwrap_or_default();
    if variants.is_empty() {
        return vec!["purelb-common/src/verdict.rs: `enum Reason` not found".to_owned()];
    }
    let tests: String =
        tree.rust().filter(|(path, _)| path.starts_with("tests/tests/dp/")).map(|(_, text)| text).collect();
    let words: BTreeSet<&str> = tests.split(|c: char| !is_word(c)).collect();
    let open = variants.iter().filter(|name| !words.contains(name.as_str()));
    open.map(|name| format!("Reason::{name}: named in no tests/tests/dp")).collect()
}

fn reason_variants(text: &str) -> Vec<String> {
    let body = text.split_once("enum Reason {").and_then(|(_, rest)| rest.split_once("\n}")).map(|(body, _)| body);
    let lines = body.unwrap_or_default().lines().map(code);
    lines.filter_map(|line| Some(line.split_once(" = ")?.0.trim().to_owned())).collect()
}

/// What its table names as `file: function` is there.
fn named_tests(tree: &Tree) -> Vec<String> {
    let table = tree.text("tests/README.md").unwrap_or_default();
    let named = table.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs: "));
    let missing = named.filter(|(file, name)| {
        let text = tree.text(&format!("{file}.rs")).unwrap_or_default();
        !text.contains(&format!("fn {name}("))
    });
    missing.map(|(file, name)| format!("tests/README.md: {file}.rs has no `{name}`")).collect()
}

/// The part of a file before its unit tests.
fn without_tests(text: &str) -> &str {
    text.split_once("#[cfg(test)]\nmod ").map_or(text, |(before, _)| before)
}

/// A line without its comment and without what stands in quotes.
fn code(line: &str) -> String {
    let line = line.split("//").next().unwrap_or_default();
    line.split('"').step_by(2).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(path: &str, text: &str) -> Tree {
        Tree(vec![(path.to_owned(), text.to_owned())])
    }

    #[test]
    fn a_file_needs_its_doc_line() {
        assert_eq!(doc_line(&tree("a.rs", "//! A.\n")).len(), 0);
        assert_eq!(doc_line(&tree("a.rs", "// A.\n")).len(), 1);
    }

    #[test]
    fn unit_tests_do_not_count_as_length() {
        let code = "x\n".repeat(400);
        assert!(length(&tree("a.rs", &format!("{code}#[cfg(test)]\nmod tests {{\n{code}}}"))).is_empty());
        assert_eq!(length(&tree("a.rs", &code.repeat(2))).len(), 1);
    }

    #[test]
    fn unsafe_is_found_in_code_only() {
        let text = "// unsafe\nlet a = \"unsafe\";\n#![forbid(unsafe_code)]\nunsafe { f() }\n";
        assert_eq!(no_unsafe(&tree("a.rs", text)).len(), 1);
        assert!(no_unsafe(&tree("tests/src/sys.rs", text)).is_empty());
    }

    #[test]
    fn machine_paths_are_absolute() {
        let path = ["", "work", "main"].join("/");
        assert_eq!(no_machine_paths(&tree("a.md", &format!("see {path}"))).len(), 1);
        assert!(no_machine_paths(&tree("a.md", &format!("see target{path}"))).is_empty());
    }

    #[test]
    fn tests_that_are_named_exist() {
        let tree = |table: &str| {
            let files = [("tests/README.md", table), ("a.rs", "fn is_there() {}")];
            Tree(files.map(|(path, text)| (path.to_owned(), text.to_owned())).to_vec())
        };
        assert!(named_tests(&tree("`a.rs: is_there` and `cargo test`")).is_empty());
        assert_eq!(named_tests(&tree("`a.rs: is_there` `a.rs: is_not` `b.rs: is_there`")).len(), 2);
    }

    #[test]
    fn reasons_and_invariants_are_listed() {
        let text = "pub enum Reason {\n    /// A = b\n    NotVip = 0,\n    Other = 1,\n}\n";
        assert_eq!(reason_variants(text), ["NotVip", "Other"]);
        assert_eq!(numbers("**I1** and I12, not I or IPv4 or xI3").into_iter().collect::<Vec<_>>(), [1, 12]);
    }
}
