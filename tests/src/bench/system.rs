//! The agent on a big folder: how long it takes to serve all of it, what it holds, and how soon a
//! changed file is in the tables.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use indicatif::ProgressBar;
use nix::sys::signal::Signal;
use serde_json::json;

use super::folder::{self, ENDPOINTS, Folder, NODE};
use super::pins::Pins;
use super::report::{Row, Section};
use crate::agent::Agent;
use crate::lab;
use crate::leftovers::{self, Owner};
use crate::netns::Netns;
use crate::process;
use crate::random::Random;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Services on the folder.
    pub services: u32,
    /// Starts of the agent.
    pub starts: u32,
    /// Changed files.
    pub changes: u32,
    /// How long nothing happens.
    pub idle: Duration,
}

/// Between two looks at the tables: short beside what is measured, and it leaves the CPU to the agent.
const LOOK: Duration = Duration::from_micros(200);
/// The agent does nothing more, it seems.
const STUCK: Duration = Duration::from_secs(8);

/// A namespace of its own with one uplink, a folder, an agent.
struct Bench {
    agent: Agent,
    folder: Folder,
    bpf_root: PathBuf,
}

/// One start.
struct Start {
    seconds: f64,
    first: f64,
    programmed: u32,
}

/// Measures it all.
///
/// # Errors
/// The agent does not start, or stops doing anything.
pub fn measure(options: &Options, bar: &ProgressBar) -> Result<Section> {
    ensure!(options.services > 0 && options.starts > 0, "--services and --starts must be above 0");
    bar.set_length(u64::from(options.starts) + u64::from(options.changes) + options.idle.as_secs());
    bar.set_message("writing the folder");
    let mut bench = Bench::build(options.services)?;
    let mut starts = Vec::new();
    for number in 1..=options.starts {
        bar.set_message(format!("start {number}"));
        if number > 1 {
            bench.reset()?;
        }
        starts.push(bench.start(options.services)?);
        bar.inc(1);
    }
    let programmed = starts.iter().map(|start| start.programmed).min().unwrap_or(0);
    let memory = bench.memory()?;
    bar.set_message("nothing changes");
    let cpu = bench.idle(options.idle, bar)?;
    bar.set_message("changing files");
    let delays = bench.changes(options, programmed, bar)?;
    let rows = vec![
        Row {
            name: "services not programmed".to_owned(),
            value: f64::from(options.services - programmed),
            unit: "",
            limit: Some(0.0),
            detail: format!("of {}", options.services),
            more: json!({"services": options.services}),
        },
        cold_start(&starts),
        memory,
        delay_row(&delays),
        Row {
            name: "CPU of the agent, nothing changes".to_owned(),
            value: cpu,
            unit: "%",
            limit: None,
            detail: format!("of one CPU, over {} s", options.idle.as_secs()),
            more: json!({"seconds": options.idle.as_secs()}),
        },
    ];
    let method = format!(
        "{} Services with {ENDPOINTS} endpoints and a VIP each, a file each; tables read from the pins",
        options.services
    );
    Ok(Section { name: "system", method, rows })
}

fn cold_start(starts: &[Start]) -> Row {
    let mut seconds: Vec<f64> = starts.iter().map(|start| start.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let first = starts.iter().map(|start| start.first).fold(f64::INFINITY, f64::min);
    let (best, worst) = (at(&seconds, 0.0), at(&seconds, 1.0));
    Row {
        name: "cold start to all programmed".to_owned(),
        value: at(&seconds, 0.5),
        unit: "s",
        limit: Some(2.0),
        detail: format!("median of {}; {best:.2} to {worst:.2} s; first Service {first:.2} s", seconds.len()),
        more: json!({"seconds": seconds, "first_service": first}),
    }
}

fn delay_row(delays: &[f64]) -> Row {
    let mut sorted = delays.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (p50, p99, worst) = (at(&sorted, 0.5), at(&sorted, 0.99), at(&sorted, 1.0));
    Row {
        name: "file renamed to slots stored, p99".to_owned(),
        value: p99,
        unit: "ms",
        limit: Some(60.0),
        detail: format!("p50 {p50:.1} ms, worst {worst:.1} ms, {} changes", sorted.len()),
        more: json!({"p50": p50, "p99": p99, "worst": worst, "changes": sorted.len()}),
    }
}

/// A quantile of sorted figures (nearest rank).
pub(super) fn at(sorted: &[f64], quantile: f64) -> f64 {
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

impl Bench {
    fn build(services: u32) -> Result<Self> {
        lab::tear_down_on_signal();
        leftovers::remove(Owner::Dead);
        let name = format!("{}-bench", leftovers::own_prefix()?);
        let root = std::env::temp_dir().join(&name);
        let bpf_root = Path::new("/sys/fs/bpf").join(&name);
        let netns = Netns::create(&name)?;
        netns.ip("link add up0 type veth peer name wire")?;
        for link in ["up0", "wire"] {
            netns.ip(&format!("link set {link} up"))?;
        }
        netns.ip("addr add 198.51.100.1/24 dev up0")?;
        netns.ip("route add default via 198.51.100.254")?;
        netns.sysctl("net.ipv4.ip_forward", "1")?;
        let folder = Folder::write(&root, services, "up0", [198, 51, 100, 1].into())?;
        let agent = Agent::new(&netns, NODE, folder.path(), bpf_root.clone(), &root);
        Ok(Self { agent, folder, bpf_root })
    }

    /// Starts the agent and waits until the kernel has everything, or nothing more happens.
    fn start(&mut self, services: u32) -> Result<Start> {
        let start = Instant::now();
        self.agent.start()?;
        let (mut found, mut pins, mut progress, mut first) = (0, None, start, None);
        while found < services || !self.attached() {
            if pins.is_none() {
                pins = Pins::open(&self.bpf_root);
            }
            // A Service's slots are stored before its entry; they are read later, not to take the agent's CPU.
            while let Some(pins) = &pins
                && found < services
                && pins.service(found)?.is_some()
            {
                found += 1;
                progress = Instant::now();
                first.get_or_insert(start.elapsed());
            }
            if progress.elapsed() > STUCK {
                break;
            }
            thread::sleep(LOOK);
        }
        if found == services {
            progress = Instant::now();
        }
        let pins = pins.filter(|_| first.is_some());
        let pins =
            pins.with_context(|| format!("no Service within {STUCK:?}; the log ends:\n{}", self.agent.log_tail()))?;
        let mut programmed = 0;
        for number in 0..services {
            programmed += u32::from(pins.programmed(number)?);
        }
        let first = first.unwrap_or_default().as_secs_f64();
        Ok(Start { seconds: (progress - start).as_secs_f64(), first, programmed })
    }

    fn attached(&self) -> bool {
        let links = fs::read_dir(self.bpf_root.join("links"));
        links.is_ok_and(|links| links.flatten().any(|link| link.file_name().to_string_lossy().starts_with("up0-")))
    }

    /// As before the first start.
    fn reset(&mut self) -> Result<()> {
        self.agent.stop(Signal::SIGKILL)?;
        fs::remove_dir_all(&self.bpf_root).context("remove the pins")
    }

    fn pid(&self) -> Result<u32> {
        self.agent.pid().context("the agent does not run")
    }

    fn memory(&self) -> Result<Row> {
        let pid = self.pid()?;
        let megabytes =
            |key| process::megabytes(pid, key).with_context(|| format!("its log ends so:\n{}", self.agent.log_tail()));
        let (own, file, shared) = (megabytes("RssAnon")?, megabytes("RssFile")?, megabytes("RssShmem")?);
        let peak = megabytes("VmHWM")?;
        Ok(Row {
            name: "resident memory of the agent".to_owned(),
            value: megabytes("VmRSS")?,
            unit: "MB",
            limit: Some(100.0),
            detail: format!(
                "its own {own:.0} MB, program and mapped tables {:.0} MB; peak {peak:.0} MB",
                file + shared
            ),
            more: json!({"anonymous": own, "file": file, "shared": shared, "peak": peak}),
        })
    }

    /// CPU time so far, seconds.
    fn cpu(&self) -> Result<f64> {
        process::cpu(self.pid()?)
    }

    /// Percent of one CPU.
    fn idle(&self, time: Duration, bar: &ProgressBar) -> Result<f64> {
        thread::sleep(Duration::from_secs(3));
        let (start, before) = (Instant::now(), self.cpu()?);
        while start.elapsed() < time {
            thread::sleep(Duration::from_secs(1).min(time));
            bar.inc(1);
        }
        Ok((self.cpu()? - before) / start.elapsed().as_secs_f64() * 100.0)
    }

    /// Milliseconds from the rename to the last slot, for one change after the other.
    fn changes(&self, options: &Options, programmed: u32, bar: &ProgressBar) -> Result<Vec<f64>> {
        let pins = Pins::open(&self.bpf_root).context("the agent's pins are gone")?;
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        let mut delays = Vec::new();
        for _ in 0..options.changes.min(programmed) {
            // At any moment of whatever rhythm the agent has.
            thread::sleep(Duration::from_millis(20 + random.below(280)));
            // Each Service once: its three endpoints are ready before.
            let number = loop {
                let number = random.below(u64::from(options.services)) as u32;
                if pins.programmed(number)? && self.all_serve(&pins, number)? {
                    break number;
                }
            };
            delays.push(self.change(&pins, number, random.below(u64::from(ENDPOINTS)) as u32)?);
            bar.inc(1);
        }
        Ok(delays)
    }

    fn all_serve(&self, pins: &Pins, number: u32) -> Result<bool> {
        let service = pins.service(number)?.context("the Service is gone")?;
        let mut ids = pins.currents(&service)?;
        ids.sort_unstable();
        ids.dedup();
        Ok(ids.len() == ENDPOINTS as usize)
    }

    fn change(&self, pins: &Pins, number: u32, unready: u32) -> Result<f64> {
        let service = pins.service(number)?.context("the Service is gone")?;
        let leaving = folder::pod(number, unready).octets();
        let mut ids = pins.currents(&service)?;
        ids.sort_unstable();
        ids.dedup();
        let mut id = None;
        for candidate in ids {
            if pins.address(candidate)? == leaving {
                id = Some(candidate);
            }
        }
        let id = id.context("no slot names the endpoint that shall leave")?;
        self.folder.service(number, Some(unready))?;
        let renamed = Instant::now();
        // A change that never comes counts as that long: the row shows it.
        while renamed.elapsed() < STUCK && pins.currents(&service)?.contains(&id) {
            thread::sleep(LOOK);
        }
        Ok(renamed.elapsed().as_secs_f64() * 1000.0)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Best effort: the next run removes what is left.
        drop(self.agent.stop(Signal::SIGKILL));
        leftovers::remove(Owner::This);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let sorted: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|q| at(&sorted, q)), [1.0, 100.0, 198.0, 200.0]);
    }
}
