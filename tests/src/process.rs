//! What a process holds and what it has used, as the kernel counts it.

use std::fs;

use anyhow::{Context as _, Result};

/// `CLK_TCK`, the unit of /proc/PID/stat: part of the kernel's ABI.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time so far, seconds.
pub fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("it ended")?;
    // The name in brackets may hold anything; state is the first field behind it, utime and stime the 12th and 13th.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    Ok(ticks.sum::<f64>() / TICKS_PER_SECOND)
}

/// A row of /proc/PID/status, as `VmRSS`, `VmHWM`, `RssAnon`.
pub fn megabytes(pid: u32, key: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("it ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    // kB is KiB here.
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.map(|kib| kib * 1024.0 / 1e6).with_context(|| format!("no {key} in /proc/PID/status"))
}
