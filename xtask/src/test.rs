//! `cargo xtask test`, `demo` and `bench`: set up, build, run.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::report::Report;
use crate::{build, fuzz, kube, setup, sh, vm};

/// A group of tests with the same needs.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// The crates' own tests: no rights needed
    Unit,
    /// Every fuzz target for a moment, on its corpus first: no rights needed
    Fuzz,
    /// The programs in the kernel, packet by packet (root)
    Dp,
    /// Network namespaces with real traffic (root)
    Netns,
    /// A real Kubernetes control plane (root)
    Api,
    /// The packets and some of the labs under Debian's kernels in emulated guests, as `cargo xtask vm`
    Vm,
    /// Beside PureLB's own agent, of which PURELB_UPSTREAM_AGENT names the binary (root)
    Mixed,
    /// All of them but vm and mixed
    All,
}

/// Runs the tiers one after the other and prints each one's time.
pub fn run(tier: Tier, filter: Option<&str>) -> Result<()> {
    let object = build::ebpf()?;
    let mut report = Report::default();
    if tier == Tier::Vm {
        vm::tier(&object, filter, &mut report)?;
        return report.finish();
    }
    let tiers = match tier {
        Tier::All => vec![Tier::Unit, Tier::Fuzz, Tier::Dp, Tier::Netns, Tier::Api],
        one => vec![one],
    };
    if let Some(filter) = filter {
        named(&tiers, &object, filter)?;
    }
    for tier in tiers {
        if tier == Tier::Fuzz {
            fuzz::tier(&object, filter, &mut report)?;
            continue;
        }
        report.check(tier.title(), || {
            let mut test = tier.tests(&object);
            if tier != Tier::Unit {
                test.env("PURELB_AGENT_BIN", ready(&object, false)?);
            }
            if matches!(tier, Tier::Api | Tier::Mixed) {
                test.env("PURELB_KUBE_BIN", kube::control_plane()?);
            }
            // Two labs at a time: much of one's time is waiting; more would miss each other's deadlines on few CPUs.
            let labs = matches!(tier, Tier::Netns | Tier::Api | Tier::Mixed);
            let options: &[&str] = if labs { &["--test-threads", "2"] } else { &[] };
            sh::run(test.arg("--").args(filter).args(options))
        });
    }
    report.finish()
}

impl Tier {
    const fn title(self) -> &'static str {
        match self {
            Self::Dp => "datapath tests",
            Self::Netns => "namespace tests",
            Self::Api => "api tests",
            Self::Mixed => "tests beside PureLB's agent",
            Self::Unit | Self::Fuzz | Self::Vm | Self::All => "unit tests",
        }
    }

    /// cargo with the tests of a tier, up to the options of the tests themselves.
    fn tests(self, object: &Path) -> Command {
        let mut test = with_object(object, "test");
        match self {
            Self::Dp => test.args(["-p", "purelb-tests", "--test", "dp"]),
            Self::Netns => test.args(["-p", "purelb-tests", "--test", "netns"]),
            Self::Api => test.args(["-p", "purelb-tests", "--test", "api"]),
            Self::Mixed => test.args(["-p", "purelb-tests", "--test", "mixed"]),
            Self::Unit | Self::Fuzz | Self::Vm | Self::All => test
                .args(["-p", "purelb-common", "--features", "purelb-common/user"])
                .args(["-p", "purelb-plan", "-p", "purelb-agent", "-p", "xtask"]),
        };
        // An error of a test says where it is from; its backtrace would hide the output of the others.
        test.arg("--no-fail-fast").env("RUST_LIB_BACKTRACE", "0");
        test
    }
}

/// A filter that names no test is a mistake: nothing would run, and that would count as passed.
fn named(tiers: &[Tier], object: &Path, filter: &str) -> Result<()> {
    for tier in tiers {
        if *tier == Tier::Fuzz {
            if fuzz::targets(Some(filter))?.is_empty() {
                continue;
            }
            return Ok(());
        }
        let list = sh::read(tier.tests(object).args(["--", "--list"]).arg(filter))?;
        if list.lines().any(|line| line.ends_with(": test")) {
            return Ok(());
        }
    }
    bail!("no test's name contains {filter:?}: `cargo xtask test` runs them all");
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
    run.env("PURELB_KUBE_BIN", kube::control_plane()?);
    program(&mut run, "purelb-bench", args)
}

/// Builds and runs a program of the tests crate.
fn program(run: &mut Command, name: &str, args: &[String]) -> Result<()> {
    run.args(["--quiet", "-p", "purelb-tests", "--bin", name, "--"]);
    // In our place: its exit code is ours, and a signal to us reaches it, so that a lab is never left behind.
    Err(run.args(args).exec()).context("start cargo")
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

/// cargo, which puts this object into the agent.
pub fn with_object(object: &Path, verb: &str) -> Command {
    let mut cargo = sh::cargo();
    cargo.arg(verb).env("PURELB_EBPF_OBJECT", object);
    cargo
}
