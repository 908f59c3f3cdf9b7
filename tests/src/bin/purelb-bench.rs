//! `cargo xtask bench`: figures beside their limits. Exit code 1 when one is above its limit by more than 25 %.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args as ClapArgs, Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use purelb_tests::bench::report::{self, Section};
use purelb_tests::bench::{announce, cluster, live, rounds, system};

/// Measures the data path and the agent; see BENCHMARKS.md.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask bench --")]
struct Args {
    /// Which figures.
    #[arg(value_enum, default_value_t = What::All)]
    what: What,
    #[command(flatten)]
    packet: Packet,
    #[command(flatten)]
    system: System,
    #[command(flatten)]
    live: Live,
    /// The CPU that packets are run on [default: the last one]
    #[arg(long)]
    cpu: Option<usize>,
    /// How to print them.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Nanoseconds a packet, by BPF_PROG_TEST_RUN
    Packet,
    /// The agent on a folder of thousands of Services
    System,
    /// Forwarding to a pod, beside kube-proxy's way
    Live,
    /// Agent and allocator on a real API server with thousands of Services
    Cluster,
    /// How long nobody answers for a local address
    Announce,
    /// All of them
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Clone, Debug, ClapArgs)]
#[command(next_help_heading = "Packet rows")]
struct Packet {
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    filter: String,
    /// Loads of the object: where the JIT puts it matters
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    loads: u32,
    /// Rounds with each load
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Packets of a row in a round
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// From one flow to the next: 1 takes them in turn, another odd number mixes them
    #[arg(long, default_value_t = 1)]
    step: u64,
}

#[derive(Clone, Copy, Debug, ClapArgs)]
#[command(next_help_heading = "System rows")]
struct System {
    /// Services on the folder
    #[arg(long, default_value_t = 5000)]
    services: u32,
    /// Starts of the agent; the figure is their median
    #[arg(long, default_value_t = 5)]
    starts: u32,
    /// Files that are changed
    #[arg(long, default_value_t = 200)]
    changes: u32,
    /// Seconds in which nothing changes
    #[arg(long, default_value_t = 20)]
    idle: u64,
}

#[derive(Clone, Copy, Debug, ClapArgs)]
#[command(next_help_heading = "Live rows")]
struct Live {
    /// Rounds over all ways
    #[arg(long, default_value_t = 5)]
    live_rounds: u32,
    /// Frames of a way in a round
    #[arg(long, default_value_t = 1_000_000)]
    frames: u32,
    /// Flows that take turns
    #[arg(long, default_value_t = 64)]
    flows: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(sections) => {
            match args.output {
                Output::Table => println!("{}", report::table(&sections)),
                Output::Json => println!("{:#}", report::json(&sections)),
            }
            if report::good(&sections) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("purelb-bench: {}", shortened(&format!("{error:#}")));
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    let cpu = args.cpu.unwrap_or_else(last_cpu);
    let wanted = |what| args.what == what || args.what == What::All;
    if wanted(What::Packet) {
        let Packet { filter, loads, rounds, repeat, step } = args.packet.clone();
        let options = rounds::Options { loads, rounds, repeat, step: step | 1, cpu, filter };
        let bar = bar("packet");
        sections.push(rounds::measure(&options, &bar)?);
        bar.finish_and_clear();
    }
    if wanted(What::System) {
        let System { services, starts, changes, idle } = args.system;
        let options = system::Options { services, starts, changes, idle: Duration::from_secs(idle) };
        let bar = bar("system");
        sections.push(system::measure(&options, &bar)?);
        bar.finish_and_clear();
    }
    if wanted(What::Cluster) {
        let System { services, changes, idle, .. } = args.system;
        let options = cluster::Options { services, changes, idle: Duration::from_secs(idle) };
        let bar = bar("cluster");
        sections.push(cluster::measure(&options, &bar)?);
        bar.finish_and_clear();
    }
    if wanted(What::Announce) {
        let bar = bar("announce");
        sections.push(announce::measure(&bar)?);
        bar.finish_and_clear();
    }
    if wanted(What::Live) {
        let Live { live_rounds: rounds, frames, flows } = args.live;
        let bar = bar("live");
        sections.push(live::measure(&live::Options { rounds, frames, flows, cpu }, &bar)?);
        bar.finish_and_clear();
    }
    Ok(sections)
}

/// The first one has the interrupts.
fn last_cpu() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) - 1
}

/// A verifier's log has thousands of lines; what matters are the first and the last ones.
fn shortened(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let (head, tail) = (lines.len().min(4), lines.len().saturating_sub(20).max(4));
    let shown = lines.iter().take(head).chain(lines.iter().skip(tail));
    shown.map(|line| line.chars().take(200).collect::<String>()).collect::<Vec<_>>().join("\n")
}

/// Progress on a terminal, nothing elsewhere.
fn bar(name: &'static str) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {elapsed}");
    let bar = ProgressBar::with_draw_target(None, target).with_prefix(name);
    style.map_or(bar.clone(), |style| bar.with_style(style))
}
