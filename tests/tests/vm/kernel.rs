//! What kernels of distributions have, and what is said where they lack something: for guests only.

use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::world::World;

/// With tcx.
const OLDEST: (u32, u32) = (6, 6);

/// `(6, 12)`
fn kernel() -> Result<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().context("a release has two numbers");
    Ok((next()??, next()??))
}

/// They have dummy devices, so what other tests find out for themselves is the real thing here.
#[test]
fn device_for_addresses_is_a_dummy() -> Result<()> {
    let lab = Lab::build(Options::new("xdp").pods(0))?;
    let said = lab.nodes[0].netns.ip("-d link show kube-lb0")?;
    ensure!(said.contains(" dummy "), "{said}");
    Ok(())
}

/// How many instructions of a program the verifier of this kernel may look at, of its million: new versions of it and of the
/// compiler want more or fewer.
const ROOM: u64 = 800_000;

/// The verifier is far from giving up.
#[test]
fn programs_are_verified_with_room() -> Result<()> {
    if kernel()? < OLDEST {
        return Ok(());
    }
    let _world = World::load()?;
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo")?.flatten() {
        // Those of the listing itself have gone.
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        all.extend(text.lines().find_map(|line| line.strip_prefix("verified_insns:")?.trim().parse::<u64>().ok()));
    }
    all.sort_unstable();
    // Past the runner, which keeps what tests print to itself: how it grows is worth to be seen.
    writeln!(std::io::stderr(), "instructions that the verifier looked at: {all:?}")?;
    let most = all.last().context("the kernel does not say")?;
    ensure!(all.len() >= 4 && (1_000..ROOM).contains(most), "{all:?}");
    Ok(())
}

/// An agent on a kernel without tcx ends at once and says what it needs; on others it runs.
#[test]
fn agents_run_or_say_why_not() -> Result<()> {
    let started = Lab::start(Options::new("xdp"));
    if kernel()? >= OLDEST {
        return started.map(drop);
    }
    let error = started.err().context("it runs without tcx")?;
    let said = format!("{error:#}");
    for words in ["the agent ended", "is too old: replies need tcx, which came with Linux 6.6"] {
        ensure!(said.contains(words), "it does not say {words:?}: {said}");
    }
    Ok(())
}
