//! One network namespace: made by `ip netns add`, entered by threads and processes, removed by `leftovers`.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::sys;

/// A namespace, or a name for it: the lab's drop takes it away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it and brings `lo` up.
    pub fn create(name: &str) -> Result<Self> {
        sys::run(&format!("ip netns add {name}"))?;
        let made = Self { name: name.to_owned() };
        made.ip("link set lo up")?;
        Ok(made)
    }

    /// Its name as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ip -n NAME ARGS`
    pub fn ip(&self, args: &str) -> Result<String> {
        sys::run(&format!("ip -n {} {args}", self.name))
    }

    /// A command inside; unlike `ip netns exec` this leaves /sys (and so bpffs) as it is.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs a command line inside.
    pub fn exec(&self, line: &str) -> Result<String> {
        sys::run(&format!("nsenter --net={} -- {line}", self.path().display()))
    }

    /// Sets a sysctl inside.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        let value = value.to_owned();
        self.enter(move || std::fs::write(&path, value).with_context(|| format!("write {}", path.display())))?
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<Result<T>>> {
        let path = self.path();
        thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
                setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("setns {}", path.display()))?;
                Ok(work())
            })
            .context("start a thread")
    }

    /// Runs `work` on a thread inside and waits. Sockets opened there stay inside, wherever they are used.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        self.spawn(work)?.join().map_err(|_| anyhow!("a thread in {} panicked", self.name))?
    }

    /// A page that some process inside serves on loopback, with its status.
    pub fn page(&self, port: u16, path: &str) -> Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
        let answer = self.enter(move || -> Result<String> {
            let mut stream =
                TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("connect to port {port}"))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })??;
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status line")?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((code, body.to_owned()))
    }

    /// What holds remote addresses here: a dummy device, which every distribution's kernel has, else an ifb.
    pub fn vip_device(&self) -> Result<&'static str> {
        let made = self.ip("link add purelb-probe type dummy");
        if made.is_err() {
            return Ok("ifb");
        }
        self.ip("link del purelb-probe")?;
        Ok("dummy")
    }

    /// Transmit checksum offload of a device, and with it TSO: off, the kernel completes what it sends.
    pub fn offload(&self, device: &str, on: bool) -> Result<()> {
        self.exec(&format!("ethtool -K {device} tx {}", if on { "on" } else { "off" })).map(drop)
    }
}
