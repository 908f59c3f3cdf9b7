//! New connections while routes change. One that cannot open is a fault: its SYN met a node that did not serve. One that
//! opened, and was led to another node before it ended, is the router's doing, and counted apart.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::clients::{Conn, any};
use crate::netns::Netns;
use crate::sys;

use super::watch::Watch;

/// A SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_millis(950);
/// So late a busy machine may hear of a change of routes.
const LATE: Duration = Duration::from_millis(500);

/// One after the other to each target.
#[derive(Debug)]
pub struct Arrivals {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Arrival>>>,
}

#[derive(Debug)]
struct Arrival {
    to: SocketAddr,
    begin: Instant,
    end: Instant,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    /// The pod that answered.
    Served(String),
    /// It could not open.
    Refused(String),
    /// It opened and got no answer.
    Broken(String),
}

/// What became of them.
#[derive(Debug, Default)]
pub struct Seen {
    /// Those that were served, by pod.
    pub served: BTreeMap<String, usize>,
    /// Those that the router led away after they had opened.
    pub led_away: usize,
    /// The first and the last that failed.
    pub failed: Option<(Instant, Instant)>,
    /// All that failed, in words.
    pub faults: Vec<String>,
}

impl Seen {
    /// How many were served.
    #[must_use]
    pub fn count(&self) -> usize {
        self.served.values().sum()
    }

    /// None may have failed, and there must have been some.
    pub fn check(&self) -> Result<()> {
        let faults = &self.faults;
        ensure!(faults.is_empty(), "{} of {} failed:\n  {}", faults.len(), self.count(), faults.join("\n  "));
        ensure!(self.count() > 20, "hardly a new connection: {:?}", self.served);
        Ok(())
    }
}

impl Arrivals {
    /// Starts them.
    #[must_use]
    pub fn start(netns: &Netns, targets: &[SocketAddr]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let one = |to: &SocketAddr| {
            let (stop, netns, to) = (Arc::clone(&stop), netns.clone(), *to);
            thread::spawn(move || {
                let mut all = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    let outcome = arrive(&netns, to);
                    all.push(Arrival { to, begin, end: Instant::now(), outcome });
                    sys::pause(5);
                }
                all
            })
        };
        let threads = targets.iter().map(one).collect();
        Self { stop, threads }
    }

    /// Ends them.
    pub fn finish(mut self, routes: &Watch) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = Seen::default();
        // Of FRR (`bgp`) or BIRD (`bird`).
        let changes = routes.changes("proto b")?;
        for thread in self.threads.drain(..) {
            let all = thread.join().map_err(|_| anyhow!("a client's thread panicked"))?;
            let first = all.first().map(|one| one.begin).context("no new connection")?;
            for one in all {
                let meanwhile = |when: &Instant| (one.begin..one.end + LATE).contains(when);
                let changed =
                    changes.iter().any(|(when, line)| line.contains(':') == one.to.is_ipv6() && meanwhile(when));
                let why = match one.outcome {
                    Outcome::Served(pod) => {
                        *seen.served.entry(pod).or_default() += 1;
                        continue;
                    }
                    Outcome::Broken(_) if changed => {
                        seen.led_away += 1;
                        continue;
                    }
                    Outcome::Broken(why) => format!("opened, then: {why}"),
                    Outcome::Refused(why) => why,
                };
                let (from, until) = seen.failed.unwrap_or((one.begin, one.begin));
                seen.failed = Some((from.min(one.begin), until.max(one.begin)));
                seen.faults.push(format!("{} after {:?}: {why}", one.to, one.begin - first));
            }
        }
        Ok(seen)
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn arrive(netns: &Netns, to: SocketAddr) -> Outcome {
    let mut conn = match Conn::open_within(netns, any(to), to, PATIENCE) {
        Ok(conn) => conn,
        Err(error) => return Outcome::Refused(format!("{error:#}")),
    };
    match conn.ask_within("NAME", PATIENCE) {
        Ok(pod) => Outcome::Served(pod),
        Err(error) => Outcome::Broken(format!("{error:#}")),
    }
}
