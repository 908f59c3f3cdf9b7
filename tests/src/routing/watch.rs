//! What happens to a namespace's routes and addresses, as `ip monitor` tells it.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::netns::Netns;

/// A running `ip monitor`, which ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    seen: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Watch {
    /// Starts it and waits until it hears.
    pub fn start(netns: &Netns) -> Result<Self> {
        let mut command = netns.command("ip");
        command.args(["monitor", "route", "address"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start ip monitor")?;
        let lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&seen);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Ok(mut list) = list.lock() {
                    list.push((Instant::now(), line));
                }
            }
        });
        let watch = Self { child, seen };
        watch.wait_for_first(netns)?;
        Ok(watch)
    }

    /// It listens when it has seen a route of ours come.
    fn wait_for_first(&self, netns: &Netns) -> Result<()> {
        for _ in 0..100 {
            netns.ip("route replace unreachable 198.51.100.255")?;
            netns.ip("route del unreachable 198.51.100.255")?;
            if !self.changes("198.51.100.255")?.is_empty() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("ip monitor is silent")
    }

    /// When and how the routes and addresses changed that are told with these words.
    pub fn changes(&self, words: &str) -> Result<Vec<(Instant, String)>> {
        let seen = self.seen.lock().map_err(|_| anyhow!("the watch's thread panicked"))?;
        Ok(seen.iter().filter(|(_, line)| line.contains(words)).cloned().collect())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
