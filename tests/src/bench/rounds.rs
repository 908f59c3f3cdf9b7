//! Timing: every case in turn, round after round, over several loads of the object, since the place
//! that the JIT gives a program and the clock of the machine both move figures by a quarter.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, ensure};
use indicatif::ProgressBar;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;

use super::cases::{self, Case};
use super::report::{Row, Section};
use super::wrapper::{Program, Walk, Wrapper};
use crate::packet::Family;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Loads of the object.
    pub loads: u32,
    /// Rounds with each load.
    pub rounds: u32,
    /// Packets of a case in a round.
    pub repeat: u32,
    /// From one flow to the next, odd; 1: in turn.
    pub step: u64,
    /// The CPU that everything runs on.
    pub cpu: usize,
    /// Only cases whose name contains this.
    pub filter: String,
}

/// The kernel gives whole nanoseconds, rounded down. Differences lose nothing by that.
const ROUNDED_DOWN: f64 = 0.5;

/// Nanoseconds by what was run, in the order of the rounds.
type Samples = BTreeMap<String, Vec<f64>>;

const TRIVIAL: &str = "trivial";

/// Measures the packet table.
///
/// # Errors
/// A kernel that refuses something, or a case that does not take the way it claims.
pub fn measure(options: &Options, bar: &ProgressBar) -> Result<Section> {
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&options.filter)).collect();
    ensure!(!cases.is_empty(), "no packet row contains {:?} (--filter)", options.filter);
    bar.set_length(u64::from(options.loads) * u64::from(options.rounds));
    let mut samples = Samples::new();
    for load in 1..=options.loads {
        bar.set_message(format!("load {load}: filling and proving"));
        // A thread of its own: what is measured next may use all CPUs again.
        let load_once = || pin(options.cpu).and_then(|()| one_load(&cases, options, &mut samples, bar));
        let done = std::thread::scope(|scope| scope.spawn(load_once).join());
        done.map_err(|_| anyhow!("a thread panicked"))?.with_context(|| format!("load {load}"))?;
    }
    let trivial = samples.get(TRIVIAL).context("no round was run")?;
    let rows = cases.iter().map(|case| row(case, &samples, trivial)).collect::<Result<_>>()?;
    Ok(Section { name: "packet", method: method(options, best(trivial)), rows })
}

fn method(options: &Options, trivial: f64) -> String {
    let Options { loads, rounds, repeat, cpu, .. } = options;
    let order = if options.step == 1 { "in turn" } else { "mixed" };
    format!(
        "x = multiple of an empty XDP program, {trivial:.1} ns; {loads} loads x {rounds} rounds x {repeat} packets \
         on CPU {cpu}, flows {order}; the figure is the mean of the lowest 10 %"
    )
}

fn one_load(cases: &[Case], options: &Options, samples: &mut Samples, bar: &ProgressBar) -> Result<()> {
    let mut world = cases::world()?;
    let mut wrapper = Wrapper::load(&world)?;
    let mut walks = Vec::new();
    for case in cases {
        let mut walk = case.walk();
        case.prove(&mut world, &mut wrapper, &mut walk).with_context(|| case.name.to_owned())?;
        // The tables were filled in turn: any other order meets their entries all over the memory.
        walk.step = options.step;
        walks.push((case, case.frame()?, walk));
    }
    bar.set_message("rounds");
    for _ in 0..options.rounds {
        // A sign of life, or the tables count as stale one day.
        let tick = world.tick()?;
        world.configure(|config| config.heartbeat = tick)?;
        let mut note = |name: &str, nanoseconds| samples.entry(name.to_owned()).or_default().push(nanoseconds);
        let (_, frame, walk) = walks.first().context("no case")?;
        let mut once = Walk { flows: 1, ..*walk };
        let run = wrapper.run(&world, Program::Trivial, frame, &mut once, options.repeat)?;
        note(TRIVIAL, run.nanoseconds);
        for family in [Family::V4, Family::V6] {
            let Some((_, frame, walk)) = walks.iter_mut().find(|(case, ..)| case.family == family) else { continue };
            let run = wrapper.run(&world, Program::Empty(family), frame, walk, options.repeat)?;
            note(empty(family), run.nanoseconds);
        }
        for (case, frame, walk) in &mut walks {
            note(case.name, wrapper.run(&world, case.program, frame, walk, options.repeat)?.nanoseconds);
        }
        bar.inc(1);
    }
    Ok(())
}

const fn empty(family: Family) -> &'static str {
    match family {
        Family::V4 => "empty4",
        Family::V6 => "empty6",
    }
}

/// From here on this thread stays on one CPU.
pub(super) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("--cpu {cpu}: no such CPU"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("--cpu {cpu}: this process may not run there"))
}

fn row(case: &Case, samples: &Samples, trivial: &[f64]) -> Result<Row> {
    let all = samples.get(case.name).context("no sample")?;
    // What the wrapper adds to the trivial program, which stays in every figure.
    let wrapper: Vec<f64> = match case.program {
        Program::Wrapped(family) => samples.get(empty(family)).context("no sample of the wrapper")?.clone(),
        _ => trivial.to_vec(),
    };
    let net = |all: f64, wrapper: f64, trivial: f64| all - wrapper + trivial + ROUNDED_DOWN;
    let nanoseconds = net(best(all), best(&wrapper), best(trivial));
    let rounds = all.iter().zip(&wrapper).zip(trivial);
    let mut ratios: Vec<f64> = rounds.map(|((all, w), t)| net(*all, *w, *t) / (t + ROUNDED_DOWN)).collect();
    ratios.sort_by(f64::total_cmp);
    let median = ratios.get(ratios.len() / 2).copied().unwrap_or_default();
    Ok(Row {
        name: case.name.to_owned(),
        value: nanoseconds / (best(trivial) + ROUNDED_DOWN),
        unit: "x",
        limit: case.limit,
        detail: format!("{nanoseconds:.1} ns, median {median:.2} x"),
        more: json!({"nanoseconds": nanoseconds, "median": median}),
    })
}

/// Mean of the lowest tenth.
pub(super) fn best(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let tenth = sorted.get(..sorted.len().div_ceil(10)).unwrap_or_default();
    tenth.iter().sum::<f64>() / tenth.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_is_the_mean_of_the_lowest_tenth() {
        let samples: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!(best(&samples), 1.5);
        assert_eq!(best(&[7.0, 3.0]), 3.0);
    }
}
