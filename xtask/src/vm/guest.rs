//! One boot of a guest: qemu, which ends with us whatever happens, and what its console says.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::kernel::Bootable;
use crate::sh::{self, print};
use crate::tools::QEMU;

/// Memory of a guest: the image lies in it twice while it is unpacked.
const MEMORY: &str = "4G";

/// Processors of a guest.
pub const PROCESSORS: u32 = 2;

/// Without cmpxchg16b: as qemu 7.2 emulates it on two processors, the kernel's allocator falls over its wrong flags (seen).
const CPU: &str = "max,-cx16";

/// Ends the guest when it is dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What was heard so far.
#[derive(Default)]
struct Heard {
    begun: Vec<String>,
    ended: usize,
    failed: Vec<String>,
    passed: u32,
    status: Option<bool>,
}

/// Boots it, passes on what it says, and fails unless it says in time that its tests ran and passed: how many.
pub fn boot(kernel: &Bootable, image: &Path, limit: Duration) -> Result<u32> {
    let setpriv = sh::find("setpriv").context("no setpriv: install util-linux")?;
    let mut command = Command::new(setpriv);
    // Killed as we may be, nothing is left running.
    command.args(["--pdeathsig", "KILL", "--", QEMU.program]);
    // Emulated: the same wherever it runs, also inside a virtual machine.
    command.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", &PROCESSORS.to_string(), "-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(image);
    // What is wrong in the kernel ends the guest at once.
    command.args(["-append", "console=ttyS0 rdinit=/init loglevel=4 panic=-1 oops=panic mitigations=off"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start qemu")?;
    let mut qemu = Qemu(child);
    let console = qemu.0.stdout.take().context("no console")?;
    let (lines, heard) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let begin = Instant::now();
    let mut said = Heard::default();
    loop {
        match heard.recv_timeout(limit.saturating_sub(begin.elapsed())) {
            Ok(line) => {
                print(&line);
                said.hear(&line);
            }
            Err(RecvTimeoutError::Disconnected) => return said.judge(),
            Err(RecvTimeoutError::Timeout) => {
                let last = said.begun.last().map_or("nothing", String::as_str);
                bail!("the guest was not done after {limit:?}; it began {last} last");
            }
        }
    }
}

impl Heard {
    /// `== begin NAME`, `== end NAME CODE`, `== status CODE`, and what Rust's test runner says.
    fn hear(&mut self, line: &str) {
        if let Some((_, rest)) = line.split_once("== ") {
            let words: Vec<_> = rest.split_whitespace().collect();
            match *words.as_slice() {
                ["begin", name] => self.begun.push(name.to_owned()),
                ["end", name, code] => {
                    self.ended += 1;
                    if code != "0" {
                        self.failed.push(name.to_owned());
                    }
                }
                ["status", code] => self.status = Some(code == "0"),
                _ => {}
            }
        }
        if let Some(rest) = line.split_once("test result: ok. ").map(|(_, rest)| rest) {
            self.passed += rest.split_whitespace().next().and_then(|word| word.parse::<u32>().ok()).unwrap_or(0);
        }
    }

    fn judge(self) -> Result<u32> {
        match self.status {
            None => {
                let last = self.begun.last().map_or("no test", String::as_str);
                bail!("the guest ended without a result: see the console above; it began {last} last")
            }
            Some(false) => bail!("failed: {}", self.failed.join(", ")),
            Some(true) if self.ended != self.begun.len() => bail!("not all that began has ended"),
            Some(true) if self.passed == 0 => bail!("no test ran"),
            Some(true) => Ok(self.passed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(lines: &[&str]) -> Result<u32> {
        let mut said = Heard::default();
        lines.iter().for_each(|line| said.hear(line));
        said.judge()
    }

    #[test]
    fn only_what_is_said_to_have_passed_counts() {
        let good = ["== begin a", "test result: ok. 3 passed; 0 failed", "== end a 0", "== status 0"];
        assert_eq!(judged(&good).unwrap(), 3);
        // A message of the kernel may come before, on the same line.
        assert_eq!(judged(&["== begin a", good[1], "== end a 0", "[    3.1] x== status 0"]).unwrap(), 3);
        let error = |lines: &[&str]| judged(lines).unwrap_err().to_string();
        assert!(error(&good[..3]).contains("without a result"));
        assert!(error(&["== begin a", "== end a 101", "== status 1"]).contains("failed: a"));
        assert!(error(&["== begin a", "== end a 0", "== status 0"]).contains("no test ran"));
        assert!(error(&["== begin a", good[1], "== status 0"]).contains("not all"));
        assert!(error(&["Kernel panic - not syncing"]).contains("it began no test last"));
    }
}
