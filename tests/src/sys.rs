//! Running commands and waiting for conditions, with errors that name the command; small BPF programs of others.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::libc;

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

/// Names how many times as long as elsewhere everything may take: a guest whose processor is emulated is slow.
pub const PATIENCE: &str = "PURELB_TEST_PATIENCE";

/// As long as that on this machine.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    let times = std::env::var(PATIENCE).ok().and_then(|text| text.parse::<u32>().ok());
    limit.saturating_mul(times.unwrap_or(1))
}

/// What is waited for will never be: it ended.
#[derive(Debug, thiserror::Error)]
#[error("{0} ended with {1}")]
pub struct Ended(pub String, pub ExitStatus);

/// Asks `check` every 30 ms until it says `Ok(true)`, or [`Ended`]; the last answer goes into the error. The limit is
/// [`patient`].
pub fn wait_for(what: &str, limit: Duration, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let (start, limit) = (Instant::now(), patient(limit));
    loop {
        let last = match check() {
            Ok(true) => return Ok(()),
            Ok(false) => "not yet".to_owned(),
            Err(error) if error.is::<Ended>() => return Err(error.context(format!("wait for: {what}"))),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() > limit {
            bail!("waited {limit:?} for: {what}; last answer: {last}");
        }
        thread::sleep(Duration::from_millis(30));
    }
}

/// The last lines of a log, so many at most; nothing of one that is not there.
#[must_use]
pub fn tail(log: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

/// Sleeps that many milliseconds.
pub fn pause(milliseconds: u64) {
    thread::sleep(Duration::from_millis(milliseconds));
}

/// Does it when this process ends by itself, after `main`.
pub fn at_exit(work: fn()) {
    static WORK: Mutex<Vec<fn()>> = Mutex::new(Vec::new());
    extern "C" fn last() {
        for work in WORK.lock().map(|mut all| std::mem::take(&mut *all)).unwrap_or_default() {
            work();
        }
    }
    let first = WORK.lock().map(|mut all| {
        all.push(work);
        all.len() == 1
    });
    if first.unwrap_or_default() {
        // SAFETY: a function of this program that does not unwind.
        unsafe { libc::atexit(last) };
    }
}

/// A program of somebody else, two instructions long.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// XDP that passes everything.
    XdpPass,
    /// tc classifier that drops everything.
    TcDrop,
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD needs here; the kernel takes the rest for zero.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
}

/// The same of BPF_OBJ_PIN.
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Loads such a program and pins it.
pub fn pin_program(kind: Kind, path: &Path) -> Result<()> {
    // r0 = 2 (XDP_PASS, and TC_ACT_SHOT of tc); exit
    let code: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];
    let license = c"GPL";
    let load = Load {
        kind: match kind {
            Kind::XdpPass => 6,
            Kind::TcDrop => 3,
        },
        instructions: 2,
        code: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
    };
    let fd = bpf(5, &load).context("load a program")?;
    // SAFETY: BPF_PROG_LOAD gave back a new descriptor that nobody else has.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = CString::new(path.as_os_str().as_bytes())?;
    let pin = Pin { path: name.as_ptr() as u64, fd: u32::try_from(program.as_raw_fd())?, flags: 0 };
    bpf(6, &pin).with_context(|| format!("pin a program at {}", path.display()))?;
    Ok(())
}

fn bpf<T>(command: libc::c_long, attribute: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attribute`; what it points to lives in the caller.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(answer).map_err(io::Error::other) }
}
