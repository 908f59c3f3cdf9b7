//! A lab that was killed half-way leaves nothing that the next one does not remove.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::{agent, leftovers, sys};

/// A demo in a process of its own, killed when this is dropped.
struct Demo(Child);

impl Demo {
    fn start() -> Result<Self> {
        let demo = Command::new(env!("CARGO_BIN_EXE_purelb-demo"))
            .arg("--keep")
            .env("PURELB_AGENT_BIN", agent::binary()?)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Ok(Self(demo.context("start the demo")?))
    }

    fn prefix(&self) -> String {
        format!("{}{}_", leftovers::PREFIX, self.0.id())
    }

    fn things(&self) -> Vec<String> {
        leftovers::of(&self.prefix()).iter().map(|path| path.display().to_string()).collect()
    }

    /// What it had called goes on for a moment and may still make a namespace: that is waited out.
    fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        let prefix = self.prefix();
        sys::wait_for("its last command has ended", Duration::from_secs(5), || {
            Ok(!processes(&prefix)?.iter().any(|line| line.starts_with("ip ")))
        })
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.kill());
    }
}

/// Processes whose command line names a lab of that process.
fn processes(prefix: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(prefix) {
            found.push(line);
        }
    }
    Ok(found)
}

/// Killed as soon as one of these is there: a namespace, the agent's pins, its status file.
#[test]
fn killed_half_way() -> Result<()> {
    for place in ["/run/netns/", "/sys/fs/bpf/", "/run/purelb-agent/"] {
        let mut demo = Demo::start()?;
        sys::wait_for(&format!("something of the demo in {place}"), Duration::from_secs(20), || {
            Ok(demo.things().iter().any(|path| path.starts_with(place)))
        })?;
        demo.kill()?;
        // Beside a living one, which keeps everything.
        let lab = Lab::build(Options::new("tcx").pods(1))?;
        let left = demo.things();
        ensure!(left.is_empty(), "the next lab left of the killed one: {left:?}");
        let running = processes(&demo.prefix())?;
        ensure!(running.is_empty(), "of the killed lab there still run {running:?}");
        ensure!(Path::new("/run/netns").join(lab.client.name()).exists(), "the next lab swept itself away");
    }
    Ok(())
}

/// A living lab keeps everything when another one begins, and a lab that ends leaves nothing.
#[test]
fn neighbours() -> Result<()> {
    let first = Lab::start(Options::new("tcx").pods(1))?;
    let of = |lab: &Lab| leftovers::of(lab.client.name().trim_end_matches("client"));
    let before = of(&first);
    ensure!(before.len() >= 7, "namespaces, pins, folder and status file, but found {before:?}");
    let second = Lab::build(Options::new("tcx").pods(1))?;
    ensure!(of(&first) == before, "the second lab changed the first: {:?}, before: {before:?}", of(&first));
    let prefix = second.client.name().trim_end_matches("client").to_owned();
    drop(second);
    ensure!(leftovers::of(&prefix).is_empty(), "the second lab left {:?}", leftovers::of(&prefix));
    ensure!(of(&first) == before, "the second lab took with it: {:?}, before: {before:?}", of(&first));
    let prefix = first.client.name().trim_end_matches("client").to_owned();
    drop(first);
    ensure!(leftovers::of(&prefix).is_empty(), "the first lab left {:?}", leftovers::of(&prefix));
    Ok(())
}
