//! `cargo xtask vm`: tests again under Debian's kernels, in guests that qemu emulates.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::report::Report;
use crate::sh::{self, say};
use crate::tools::{CONTROL_PLANE, KERNELS, Kernel, TEST_TOOLS, VM_TOOLS};
use crate::{build, kube, setup, test};

mod guest;
mod image;
mod kernel;

use image::Image;

/// Where a guest has what is ours.
const OURS: &str = "/purelb";
/// How much longer than on the machine itself everything may take in a guest.
const PATIENCE: &str = "10";
/// A guest that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(1800);

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Under which kernel, again for several (default: all)
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(KERNELS.iter().map(|kernel| kernel.name)))]
    kernel: Vec<String>,
    /// Of all tests in the files that guests run, those whose name contains this
    #[arg(long)]
    filter: Option<String>,
}

/// A program of tests, and which of them a guest runs.
struct Run {
    /// Its name.
    file: &'static str,
    /// All when it is empty.
    only: &'static [&'static str],
    /// Not those with this in their name, unless they are asked for.
    skip: Option<&'static str>,
    /// The kernel has to be one that agents run on.
    serves: bool,
    /// How many tests at a time: loading programs is what tests of packets wait for; labs have deadlines.
    threads: u32,
}

/// What depends on the kernel: every packet, and the device for remote addresses. To load the programs takes an agent some ten
/// seconds there, and a control plane minutes: others are for `--filter`.
const RUNS: &[Run] = &[
    Run { file: "vm", only: &[], skip: Some("ipvs::"), serves: false, threads: 1 },
    Run { file: "vm", only: &["ipvs::beside_kube_proxy"], skip: None, serves: true, threads: 1 },
    Run { file: "dp", only: &[], skip: Some("pins::"), serves: true, threads: guest::PROCESSORS },
    Run { file: "netns", only: &["remote::on_every_node", "remote::left_over"], skip: None, serves: true, threads: 1 },
];

/// Programs of this machine in a guest, beside those of the tests.
const PROGRAMS: &[&str] = &[
    "sh",
    "mount",
    "mkdir",
    "chmod",
    "sleep",
    "cat",
    "ls",
    "cp",
    "rm",
    "uname",
    "birdc",
    "vtysh",
    // Beside iptables-restore; kube-proxy's.
    "iptables",
    "iptables-save",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// What they read.
const FILES: &[&str] = &[
    "/etc/group",
    "/etc/iproute2",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/openssl.cnf",
    "/usr/lib/ssl/openssl.cnf",
    "/usr/lib/x86_64-linux-gnu/xtables",
];

/// Boots the kernels and prints how it went.
pub fn run(options: &Options) -> Result<()> {
    let object = build::ebpf()?;
    let mut report = Report::default();
    let named = |kernel: &&Kernel| options.kernel.is_empty() || options.kernel.iter().any(|name| name == kernel.name);
    tests_under(&KERNELS.iter().filter(named).collect::<Vec<_>>(), &object, options.filter.as_deref(), &mut report)?;
    report.finish()
}

/// The same as a tier of `cargo xtask test`.
pub fn tier(object: &Path, filter: Option<&str>, report: &mut Report) -> Result<()> {
    tests_under(&KERNELS.iter().collect::<Vec<_>>(), object, filter, report)
}

fn tests_under(kernels: &[&Kernel], object: &Path, filter: Option<&str>, report: &mut Report) -> Result<()> {
    setup::for_guests()?;
    let folder = sh::target_dir().join("vm");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let lock = File::create(folder.join("lock")).context("create a lock")?;
    lock.lock().context("wait for another `cargo xtask vm`")?;
    sh::run(test::with_object(object, "build").args(["--quiet", "-p", "purelb-agent"]))?;
    let agent = stripped(&sh::target_dir().join("debug/purelb-agent"), &folder)?;
    let guest = Guest { tests: tests(object, &folder)?, agent, object, folder: &folder, kube: kube::control_plane()? };
    let mut any = false;
    for kernel in kernels {
        let runs = runs(kernel, filter, &guest.tests)?;
        // A filter may name what only newer kernels run.
        if !runs.is_empty() {
            any = true;
            report.check(&format!("tests under Linux {}", kernel.name), || guest.boot(kernel, &runs));
        }
    }
    if !any {
        bail!("no test of guests has {:?} in its name", filter.unwrap_or_default());
    }
    Ok(())
}

/// What goes into a guest.
struct Guest<'a> {
    tests: Vec<(String, PathBuf)>,
    agent: PathBuf,
    kube: PathBuf,
    object: &'a Path,
    folder: &'a Path,
}

impl Guest<'_> {
    fn boot(&self, kernel: &Kernel, runs: &str) -> Result<()> {
        let bootable = kernel::ensure(kernel)?;
        let path = self.folder.join(format!("{}.cpio", kernel.name));
        let mut image = Image::create(&path)?;
        machine(&mut image)?;
        image.tree(&Path::new("/lib/modules").join(&bootable.release), &bootable.modules)?;
        image.program(format!("{OURS}/purelb-agent"), &self.agent)?;
        image.file(format!("{OURS}/purelb-ebpf.o"), self.object)?;
        // The tests know it by this path.
        let deploy = sh::workspace().join("deploy");
        image.tree(&deploy, &deploy)?;
        for program in CONTROL_PLANE.iter().filter(|_| kernel.serves) {
            image.program(format!("{OURS}/kube/{}", program.name), &self.kube.join(program.name))?;
        }
        for (name, program) in &self.tests {
            image.program(format!("{OURS}/tests/{name}"), program)?;
        }
        image.content(format!("{OURS}/runs"), 0o644, runs.as_bytes())?;
        image.content(format!("{OURS}/environment"), 0o644, environment().as_bytes())?;
        image.finish()?;
        say(format!("booting Linux {}", bootable.release));
        let passed = guest::boot(&bootable, &path, LIMIT);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        let passed = passed?;
        sh::print(format!("     Linux {}: {passed} tests passed", bootable.release));
        Ok(())
    }
}

/// One line for each file of tests that has any: its name and arguments.
fn runs(kernel: &Kernel, filter: Option<&str>, tests: &[(String, PathBuf)]) -> Result<String> {
    let mut lines = String::new();
    for run in RUNS.iter().filter(|run| kernel.serves || !run.serves) {
        for (name, program) in tests.iter().filter(|(name, _)| run.file == name) {
            let mut only: Vec<&str> = match filter {
                Some(filter) => vec![filter],
                None if run.only.is_empty() => Vec::new(),
                None => ["--exact"].iter().chain(run.only).copied().collect(),
            };
            only.extend(run.skip.iter().filter(|_| filter.is_none()).flat_map(|skip| ["--skip", skip]));
            let list = sh::read(Command::new(program).arg("--list").args(&only))?;
            let found = list.lines().filter(|line| line.ends_with(": test")).count();
            if filter.is_none() && found < run.only.len().max(1) {
                bail!("{name} has not all of {only:?}: change the list in xtask/src/vm.rs");
            }
            if filter.is_some() {
                // Whoever asks for a few wants to see how far they are.
                only.push("--nocapture");
            }
            let line = format!("{name} --color never --test-threads {} {}\n", run.threads, only.join(" "));
            // A filter may name one by two of the list.
            if found > 0 && !lines.contains(&line) {
                lines += &line;
            }
        }
    }
    Ok(lines)
}

fn environment() -> String {
    let all = [
        ("PURELB_EBPF_OBJECT", format!("{OURS}/purelb-ebpf.o")),
        ("PURELB_AGENT_BIN", format!("{OURS}/purelb-agent")),
        ("PURELB_KUBE_BIN", format!("{OURS}/kube")),
        ("PURELB_TEST_PATIENCE", PATIENCE.to_owned()),
        ("RUST_LIB_BACKTRACE", "0".to_owned()),
    ];
    all.iter().map(|(name, value)| format!("export {name}={value}\n")).collect()
}

/// What a guest has of this machine.
fn machine(image: &mut Image) -> Result<()> {
    let tools = TEST_TOOLS.iter().chain(VM_TOOLS).map(|tool| tool.program);
    let tools = tools.filter(|name| !["c++", "strip", "ldd"].contains(name) && !name.starts_with("qemu"));
    for name in tools.chain(PROGRAMS.iter().copied()) {
        let path = sh::find(name).with_context(|| format!("no program {name}"))?;
        image.program(&path, &path)?;
    }
    for file in FILES.iter().map(Path::new) {
        image.tree(file, file)?;
    }
    image.content("/etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
    image.content("/init", 0o755, include_bytes!("vm/init.sh"))
}

/// Builds the files of tests: their names and programs.
fn tests(object: &Path, folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = test::with_object(object, "test");
    cargo.args(["--no-run", "--message-format", "json-render-diagnostics", "-p", "purelb-tests"]);
    for run in RUNS {
        cargo.args(["--test", run.file]);
    }
    let text = sh::read(cargo.stderr(Stdio::inherit()))?;
    let built = text.lines().filter_map(executable);
    let mut tests = built.map(|(name, path)| Ok((name, stripped(&path, folder)?))).collect::<Result<Vec<_>>>()?;
    tests.sort();
    if let Some(run) = RUNS.iter().find(|run| !tests.iter().any(|(name, _)| run.file == name)) {
        bail!("cargo built no {}", run.file);
    }
    Ok(tests)
}

/// Name and program of a file of tests, out of a line of cargo's.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
    let path = message.get("executable")?.as_str().filter(|_| is_test)?;
    Some((target.get("name")?.as_str()?.to_owned(), PathBuf::from(path)))
}

/// The same program without what only debuggers read.
fn stripped(program: &Path, folder: &Path) -> Result<PathBuf> {
    let out = folder.join(program.file_name().context("a program without a name")?);
    sh::run(Command::new("strip").arg("-o").arg(&out).arg(program))?;
    Ok(out)
}
