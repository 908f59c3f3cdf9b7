//! `cargo xtask test`, `demo` and `bench`: set up, build, run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::report::Report;
use crate::{build, setup, sh};

/// A group of tests with the same needs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// The crates' own tests: no rights needed
    Unit,
    /// The programs in the kernel, packet by packet (root)
    Dp,
    /// Network namespaces with real traffic (root)
    Netns,
    /// All of them
    All,
}

/// Runs the tiers one after the other and prints each one's time.
pub fn run(tier: Tier, filter: Option<&str>) -> Result<()> {
    let object = build::ebpf()?;
    let mut report = Report::default();
    let wanted = |other| tier == other || tier == Tier::All;
    if wanted(Tier::Unit) {
        report.check("unit tests", || {
            let mut test = with_object(&object, "test");
            test.args(["-p", "purelb-common", "--features", "purelb-common/user"]);
            test.args(["-p", "purelb-plan", "-p", "purelb-agent", "-p", "xtask"]);
            sh::run(test.args(["--no-fail-fast", "--"]).args(filter))
        });
    }
    if wanted(Tier::Dp) {
        report.check("datapath tests", || kernel_tier("dp_*", &object, filter, &[]));
    }
    if wanted(Tier::Netns) {
        // Two at a time: much of a lab's time is waiting; more would miss each other's deadlines on few CPUs.
        report.check("namespace tests", || kernel_tier("netns_*", &object, filter, &["--test-threads", "2"]));
    }
    report.finish()
}

/// Runs the demo with the caller's arguments.
pub fn demo(args: &[String]) -> Result<()> {
    let object = build::ebpf()?;
    let agent = ready(&object, false)?;
    program(with_object(&object, "run").env("PURELB_AGENT_BIN", agent), "purelb-demo", args)
}

/// Runs the benchmark, the agent built as it ships, with the caller's arguments.
pub fn bench(args: &[String]) -> Result<()> {
    let object = build::ebpf()?;
    let around = build::bench()?;
    let agent = ready(&object, true)?;
    let mut run = with_object(&object, "run");
    run.arg("--release").env("PURELB_AGENT_BIN", agent).env("PURELB_BENCH_OBJECT", around);
    program(&mut run, "purelb-bench", args)
}

/// Builds and runs a program of the tests crate.
fn program(run: &mut Command, name: &str, args: &[String]) -> Result<()> {
    run.args(["--quiet", "-p", "purelb-tests", "--bin", name, "--"]);
    // Its exit code is ours: a demo that fails must say so to whoever called.
    let status = run.args(args).status()?;
    if !status.success() {
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}

fn kernel_tier(targets: &str, object: &Path, filter: Option<&str>, options: &[&str]) -> Result<()> {
    let agent = ready(object, false)?;
    let mut test = with_object(object, "test");
    test.env("PURELB_AGENT_BIN", agent).args(["-p", "purelb-tests", "--no-fail-fast", "--test", targets, "--"]);
    sh::run(test.args(filter).args(options))
}

/// Rights, tools, bpffs and the agent; fails rather than skips, with what to do.
fn ready(object: &Path, release: bool) -> Result<PathBuf> {
    if !sh::is_root() {
        bail!("needs root for BPF and network namespaces: run `sudo -E env PATH=\"$PATH\" cargo xtask …`");
    }
    setup::for_tests()?;
    if !setup::bpffs_is_mounted()? {
        bail!("{} is no bpffs: run `mount -t bpf bpf {}`", setup::BPFFS, setup::BPFFS);
    }
    let mut agent = with_object(object, "build");
    if release {
        agent.arg("--release");
    }
    sh::run(agent.args(["--quiet", "-p", "purelb-agent"]))?;
    Ok(sh::target_dir().join(if release { "release" } else { "debug" }).join("purelb-agent"))
}

fn with_object(object: &Path, verb: &str) -> Command {
    let mut cargo = sh::cargo();
    cargo.arg(verb).env("PURELB_EBPF_OBJECT", object);
    cargo
}
