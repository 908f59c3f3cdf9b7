//! Build system of the workspace: `cargo xtask --help`.

mod build;
mod debian;
mod fuzz;
mod kube;
mod lint;
mod report;
mod setup;
mod sh;
mod source;
mod test;
mod tidy;
mod tools;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, checks, tests and shows the load balancer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = "Example: cargo xtask test dp")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing: linker, core's source, test tools, bpffs
    #[command(after_help = "Example: cargo xtask setup")]
    Setup,
    /// Build the kernel programs into target/purelb-ebpf.o
    #[command(after_help = "Example: cargo xtask build-ebpf && bpftool btf dump file target/purelb-ebpf.o")]
    BuildEbpf,
    /// Write what is generated: the CustomResourceDefinitions in deploy/crds
    #[command(after_help = "Example: cargo xtask codegen && git diff deploy")]
    Codegen {
        /// Write nothing; fail if something differs
        #[arg(long)]
        check: bool,
    },
    /// Check format, clippy and the project's own rules
    #[command(after_help = "Example: cargo xtask lint")]
    Lint,
    /// Run the tests; a tier that cannot run here fails and says why
    #[command(after_help = "Example: cargo xtask test dp --filter fragment")]
    Test {
        /// Which tests
        #[arg(value_enum, default_value_t = test::Tier::All)]
        tier: test::Tier,
        /// Only tests whose name contains this
        #[arg(long)]
        filter: Option<String>,
    },
    /// Run tests again under other kernels: Debian's, in guests that qemu emulates
    #[command(after_help = "Examples: cargo xtask vm\n          cargo xtask vm --kernel 6.12 --filter on_every_node")]
    Vm(vm::Options),
    /// Fuzz with libFuzzer, as long as is wanted; new inputs and findings go to target/fuzz
    #[command(after_help = "Examples: cargo xtask fuzz plan --seconds 3600\n          \
                            cargo xtask fuzz plan -- target/fuzz/plan/crash-da39a3")]
    Fuzz(fuzz::Options),
    /// Show the load balancer at work in network namespaces
    #[command(after_help = "Example: cargo xtask demo --keep")]
    Demo {
        /// Leave the namespaces up to look around
        #[arg(long)]
        keep: bool,
        /// Passed to the demo
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Measure the data path and the agent, beside the limits of BENCHMARKS.md
    #[command(after_help = "Example: cargo xtask bench -- packet --filter SYN")]
    Bench {
        /// Passed to the benchmark
        #[arg(last = true)]
        args: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Task::Setup => setup::all(),
        Task::BuildEbpf => build::describe(&build::ebpf()?),
        Task::Codegen { check } => build::generate(check),
        Task::Lint => lint::all(),
        Task::Test { tier, filter } => test::run(tier, filter.as_deref()),
        Task::Vm(options) => vm::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Demo { keep, args } => {
            let keep = keep.then(|| "--keep".to_owned());
            test::demo(&keep.into_iter().chain(args).collect::<Vec<_>>())
        }
        Task::Bench { args } => test::bench(&args),
    }
}
