//! Running commands, finding folders and saying what happens.

use std::env;
use std::fs::{self, File};
use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;

/// Root of the workspace.
pub fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// Folder that cargo builds into for the host: the caller's CARGO_TARGET_DIR or `target`.
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// `${XDG_CACHE_HOME:-~/.cache}/purelb-ebpf`, created.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set: set HOME or XDG_CACHE_HOME to a folder")?)
            .join(".cache"),
    };
    let dir = base.join("purelb-ebpf");
    fs::create_dir_all(&dir).with_context(|| format!("create the cache folder {}", dir.display()))?;
    Ok(dir)
}

/// Waits for every other run that changes the cache or the eBPF object; released when dropped.
pub fn lock() -> Result<File> {
    let path = cache_dir()?.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    if file.try_lock().is_err() {
        say("waiting for another `cargo xtask`");
        file.lock().with_context(|| format!("lock {}", path.display()))?;
    }
    Ok(file)
}

/// One line about what is being done; stdout stays for results.
pub fn say(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// One line of result.
pub fn print(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

/// cargo as it called us.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// Runs with the terminal passed through.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start `{}`", show(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", show(command));
    }
    Ok(())
}

/// Runs behind a spinner (a plain line without a terminal); its output is shown only when it fails.
pub fn quiet(label: &str, command: &mut Command) -> Result<()> {
    let spinner = if stderr().is_terminal() {
        let bar = ProgressBar::new_spinner().with_message(label.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Some(bar)
    } else {
        say(label);
        None
    };
    let output = command.stdin(Stdio::null()).output();
    if let Some(bar) = spinner {
        bar.finish_and_clear();
        say(label);
    }
    let output = output.with_context(|| format!("start `{}`", show(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}\n{}{}",
            show(command),
            output.status,
            tail(&String::from_utf8_lossy(&output.stdout)),
            tail(&String::from_utf8_lossy(&output.stderr))
        );
    }
    Ok(())
}

/// Standard output of a command that has to succeed.
pub fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start `{}`", show(command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}\n{}", show(command), output.status, tail(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// True when this process has every right.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The command with root's rights: itself, or through sudo; the error names what a person has to run.
pub fn as_root(args: &[&str]) -> Result<Command> {
    let (program, rest) = args.split_first().context("empty command")?;
    if is_root() {
        let mut command = Command::new(program);
        command.args(rest);
        return Ok(command);
    }
    if find("sudo").is_none() {
        bail!("this needs root and there is no sudo: run `{}` as root, then repeat", args.join(" "));
    }
    let mut command = Command::new("sudo");
    command.args(args);
    Ok(command)
}

/// A program in PATH or in the folders of system programs that a user's PATH leaves out (FRR's daemons have their own).
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/lib/frr"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// The last lines.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(40)).map(|line| format!("{line}\n")).collect()
}
