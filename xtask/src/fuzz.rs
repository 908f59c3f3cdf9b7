//! `cargo xtask fuzz` and the fuzz tier: the targets of tests/fuzz under libFuzzer, for a while.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::report::Report;
use crate::{build, setup, sh, test};

/// What the tier gives a target at most: inputs, ...
const RUNS: &str = "-runs=300000";
/// ... and seconds, which come first for most.
const SECONDS: u64 = 12;

/// What to fuzz.
#[derive(Args)]
pub struct Options {
    /// Only targets whose name contains this
    target: Option<String>,
    /// For each target
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Passed to libFuzzer: options, or the file of a finding to run it again
    #[arg(last = true)]
    args: Vec<String>,
}

/// Runs targets by hand.
pub fn run(options: &Options) -> Result<()> {
    let wanted = targets(options.target.as_deref())?;
    if wanted.is_empty() {
        bail!("no target's name contains {:?}: they are {}", options.target, targets(None)?.join(", "));
    }
    build(&build::ebpf()?)?;
    for target in wanted {
        let mut fuzzer = fuzzer(&target)?;
        // Files are run instead of fuzzed with.
        if options.args.iter().all(|arg| arg.starts_with('-')) {
            fuzzer.arg(made(findings(&target)?.join("corpus"))?).arg(corpus(&target)?);
        }
        sh::run(fuzzer.arg(format!("-max_total_time={}", options.seconds)).args(&options.args))?;
    }
    Ok(())
}

/// The names of the targets that contain the filter.
pub fn targets(filter: Option<&str>) -> Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let mut names = Vec::new();
    for item in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = item.with_context(|| format!("list {}", folder.display()))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if filter.is_none_or(|filter| name.contains(filter)) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Each target for a moment, on its corpus first.
pub fn tier(object: &Path, filter: Option<&str>, report: &mut Report) -> Result<()> {
    let targets = targets(filter)?;
    if targets.is_empty() {
        return Ok(());
    }
    let mut built = false;
    report.check("fuzz targets", || build(object).inspect(|()| built = true));
    for target in targets.iter().filter(|_| built) {
        report.check(&format!("fuzz {target}"), || bounded(target));
    }
    Ok(())
}

fn bounded(target: &str) -> Result<()> {
    let mut fuzzer = fuzzer(target)?;
    // Not with what was gathered by hand: all of it is run before the time counts.
    let fresh = findings(target)?.join("moment");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
    }
    let output =
        fuzzer.arg(made(fresh)?).arg(corpus(target)?).args([RUNS, &format!("-max_total_time={SECONDS}")]).output();
    let output = output.with_context(|| format!("start the fuzz target {target}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let log = findings(target)?.join("log");
    fs::write(&log, &*text).with_context(|| format!("write {}", log.display()))?;
    let summary = text.lines().rfind(|line| line.starts_with("Done "));
    match summary.filter(|_| output.status.success()) {
        Some(done) => {
            let reached = text.lines().rfind(|line| line.contains("DONE")).unwrap_or_default();
            sh::print(format!("     {target}: {done}: {}", reached.split_whitespace().collect::<Vec<_>>().join(" ")));
            Ok(())
        }
        None => bail!("{}\n{}; all of it is in {}", output.status, sh::tail(&text), log.display()),
    }
}

/// Our own crates are built with libFuzzer's counters, everything else as for the unit tests.
fn build(object: &Path) -> Result<()> {
    setup::compiler()?;
    let mut cargo = test::with_object(object, "build");
    cargo.env("RUSTC_WORKSPACE_WRAPPER", folder().join("instrument"));
    sh::run(cargo.args(["-p", "purelb-fuzz", "--bins"]))
}

fn fuzzer(target: &str) -> Result<Command> {
    let mut fuzzer = Command::new(sh::target_dir().join("debug").join(target));
    fuzzer.current_dir(sh::workspace());
    let dictionary = folder().join(format!("{target}.dict"));
    if dictionary.exists() {
        fuzzer.arg(format!("-dict={}", dictionary.display()));
    }
    // Long inputs find nothing that short ones do not, and a slow one is a finding.
    fuzzer.args(["-max_len=4096", "-timeout=20", "-rss_limit_mb=3000"]);
    fuzzer.arg(format!("-artifact_prefix={}/", findings(target)?.display()));
    Ok(fuzzer)
}

/// The inputs of the repository; new ones go elsewhere. What is binary is written there as hexadecimal bytes.
fn corpus(target: &str) -> Result<PathBuf> {
    let own = folder().join("corpus").join(target);
    if !own.is_dir() {
        bail!("{} is missing: a target begins with a corpus", own.display());
    }
    let seeds = made(findings(target)?.join("seeds"))?;
    for item in fs::read_dir(&own).with_context(|| format!("list {}", own.display()))? {
        let path = item.with_context(|| format!("list {}", own.display()))?.path();
        let mut content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        if path.extension().is_some_and(|end| end == "hex") {
            let text = String::from_utf8(content).with_context(|| format!("read {}", path.display()))?;
            let bytes = text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16));
            content = bytes.collect::<Result<_, _>>().with_context(|| format!("read {}", path.display()))?;
        }
        let seed = seeds.join(path.file_name().unwrap_or_default());
        fs::write(&seed, content).with_context(|| format!("write {}", seed.display()))?;
    }
    Ok(seeds)
}

fn findings(target: &str) -> Result<PathBuf> {
    made(sh::target_dir().join("fuzz").join(target))
}

fn made(dir: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

fn folder() -> PathBuf {
    sh::workspace().join("tests/fuzz")
}
