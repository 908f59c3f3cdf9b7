//! Running commands and waiting for conditions, with errors that name the command.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs a command line (split at spaces) and gives back its stdout.
pub fn run(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("empty command line")?;
    output(Command::new(program).args(words)).with_context(|| format!("run `{line}`"))
}

/// Runs a prepared command and gives back its stdout; its stderr goes into the error.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command.output().with_context(|| {
        format!("start `{program}`: is it installed? (apt-get install iproute2 nftables ethtool iperf3)")
    })?;
    if !out.status.success() {
        bail!(
            "`{program}` ended with {}: {}{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim(),
            String::from_utf8_lossy(&out.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Asks `check` every 30 ms until it says `Ok(true)`; the last answer goes into the error.
pub fn wait_for(what: &str, limit: Duration, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    loop {
        let last = match check() {
            Ok(true) => return Ok(()),
            Ok(false) => "not yet".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() > limit {
            bail!("waited {limit:?} for: {what}; last answer: {last}");
        }
        thread::sleep(Duration::from_millis(30));
    }
}

/// Sleeps that many milliseconds.
pub fn pause(milliseconds: u64) {
    thread::sleep(Duration::from_millis(milliseconds));
}
