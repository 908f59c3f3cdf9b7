//! `cargo xtask lint`: format, clippy for both targets, and the project's own rules.

use anyhow::Result;

use crate::build::{self, ebpf_cargo};
use crate::report::Report;
use crate::{setup, sh, source, tidy};

/// Runs every check, also after one failed.
pub fn all() -> Result<()> {
    let mut report = Report::default();
    report.check("format", || sh::run(sh::cargo().args(["fmt", "--all", "--check"])));
    report.check("clippy", || {
        // What libFuzzer is built with.
        setup::compiler()?;
        let mut clippy = sh::cargo();
        clippy.args(["clippy", "--quiet", "--workspace", "--exclude", "purelb-ebpf", "--all-targets"]);
        sh::run(clippy.args(["--features", "purelb-common/user", "--", "-D", "warnings"]))
    });
    report.check("clippy for the kernel", || {
        let _lock = sh::lock()?;
        let linker = setup::linker()?;
        source::ensure()?;
        sh::run(ebpf_cargo("clippy", &linker).args([
            "--quiet",
            "--release",
            "-p",
            "purelb-ebpf",
            "--features",
            "bench",
            "--",
            "-D",
            "warnings",
        ]))
    });
    report.check("generated files are current", || build::generate(true));
    for (name, rule) in tidy::RULES {
        report.check(name, || tidy::check(&sh::workspace(), *rule));
    }
    report.finish()
}
