//! The object of `purelb-ebpf/src/bench.rs` round a loaded [`World`], and one timed run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};

use crate::packet::{Family, Packet};
use crate::world::World;

/// Names the object; its default is what `cargo xtask bench` builds.
pub const OBJECT: &str = "PURELB_BENCH_OBJECT";
/// Where the frame's second copy of its headers is, and how long it is.
const COPY: std::ops::Range<usize> = 80..154;
/// Bytes behind the headers that make room for the copy.
pub const PAYLOAD: usize = 100;
const PROGRAMS: [&str; 6] = ["trivial", "look_up", "measured4", "measured6", "empty4", "empty6"];

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Returns XDP_PASS.
    Trivial,
    /// One look-up in a flow table.
    LookUp,
    /// The wrapper round nothing.
    Empty(Family),
    /// The wrapper round the shipped program.
    Wrapped(Family),
    /// The shipped program as it is, for packets that it does not change.
    Bare,
}

/// Whose packets come, and in which order.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Packets so far.
    pub packets: u64,
    /// How many flows take turns, a power of two.
    pub flows: u64,
    /// How far it is from one flow to the next (odd).
    pub step: u64,
}

impl Walk {
    /// The flow of a packet, as the wrapper computes it: what is xored to the client's last address
    /// byte and port.
    #[must_use]
    pub const fn flow(&self, packet: u64) -> (u8, u16) {
        let flow = packet.wrapping_mul(self.step) & (self.flows - 1);
        // The wrapper xors words as they lie in memory; ports are big-endian there.
        ((flow >> 16) as u8, u16::from_be(flow as u16))
    }
}

/// What a run took and did.
#[derive(Clone, Debug)]
pub struct Run {
    /// Nanoseconds a packet, rounded down by the kernel.
    pub nanoseconds: f64,
    /// Return code of the last packet.
    pub code: u32,
    /// The last packet as it left.
    pub frame: Vec<u8>,
}

/// The loaded wrappers.
pub struct Wrapper(Ebpf);

impl Wrapper {
    /// Loads them round a world's program.
    ///
    /// # Errors
    /// No object, or a kernel that refuses it.
    pub fn load(world: &World) -> Result<Self> {
        let mut ebpf = object()?;
        for name in PROGRAMS {
            let program: &mut Xdp = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
            program.load().with_context(|| format!("the kernel refuses {name}"))?;
        }
        let trivial: &Xdp = ebpf.program("trivial").with_context(|| missing("trivial"))?.try_into()?;
        let trivial = trivial.fd()?.try_clone()?;
        for (name, program) in [("MEASURED", world.xdp()?.fd()?), ("EMPTY", &trivial)] {
            let map = ebpf.map_mut(name).with_context(|| missing(name))?;
            ProgramArray::try_from(map)?.set(0, program, 0).with_context(|| format!("fill {name}"))?;
        }
        Ok(Self(ebpf))
    }

    /// Runs `repeat` packets and moves the walk on.
    ///
    /// # Errors
    /// The kernel refuses the frame.
    pub fn run(&mut self, world: &World, program: Program, frame: &[u8], walk: &mut Walk, repeat: u32) -> Result<Run> {
        self.walk()?.set(0, [walk.packets, walk.flows - 1, walk.step], 0)?;
        let mut out = vec![0; frame.len()];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), repeat, ..TestRunOptions::default() };
        let result = self.program(world, program)?.test_run(options).with_context(|| format!("run {program:?}"))?;
        [walk.packets, _, _] = self.walk()?.get(&0, 0)?;
        Ok(Run { nanoseconds: result.duration.as_nanos() as f64, code: result.return_value, frame: out })
    }

    fn walk(&mut self) -> Result<Array<&mut MapData, [u64; 3]>> {
        Ok(Array::try_from(self.0.map_mut("WALK").with_context(|| missing("WALK"))?)?)
    }

    fn program<'a>(&'a self, world: &'a World, program: Program) -> Result<&'a Xdp> {
        let name = match program {
            Program::Bare => return world.xdp(),
            Program::Trivial => "trivial",
            Program::LookUp => "look_up",
            Program::Empty(Family::V4) => "empty4",
            Program::Empty(Family::V6) => "empty6",
            Program::Wrapped(Family::V4) => "measured4",
            Program::Wrapped(Family::V6) => "measured6",
        };
        Ok(self.0.program(name).with_context(|| missing(name))?.try_into()?)
    }
}

fn missing(name: &str) -> String {
    format!("the benchmark's object has no {name}; build it anew with `cargo xtask bench`")
}

fn object() -> Result<Ebpf> {
    let path = match std::env::var_os(OBJECT) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/purelb-bench.o")),
    };
    ensure!(path.is_file(), "{}: no such object; run `cargo xtask bench`, which builds it", path.display());
    EbpfLoader::new().load_file(&path).with_context(|| format!("load {}", path.display()))
}

/// Sends live frames out of a device of this thread's network namespace; how long it takes.
///
/// # Errors
/// The kernel refuses the frame or the device.
pub fn send(frame: &[u8], flows: u64, ifindex: u32, frames: u32) -> Result<Duration> {
    let mut ebpf = object()?;
    let program: &mut Xdp = ebpf.program_mut("send4").with_context(|| missing("send4"))?.try_into()?;
    program.load().context("the kernel refuses send4")?;
    let mut walk: Array<_, [u64; 3]> = Array::try_from(ebpf.map_mut("WALK").with_context(|| missing("WALK"))?)?;
    walk.set(0, [0, flows - 1, 1], 0)?;
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, u32::try_from(frame.len())?, 0, ifindex, 0, 0].map(u32::to_ne_bytes).concat();
    let program: &Xdp = ebpf.program("send4").with_context(|| missing("send4"))?.try_into()?;
    let run = |repeat| -> Result<Duration> {
        let attrs = TestRunAttrs::new().xdp_live_frames(64);
        let options =
            TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat, attrs, ..TestRunOptions::default() };
        let start = Instant::now();
        program.test_run(options).context("send live frames")?;
        Ok(start.elapsed())
    };
    // What a call costs before its first frame is no part of a frame's cost.
    let set_up = run(1)?;
    Ok(run(frames)?.saturating_sub(set_up))
}

/// The bytes of a packet with the second copy of its headers where the wrappers look for it.
///
/// # Errors
/// A packet that no frame can hold.
pub fn frame(packet: &Packet, family: Family) -> Result<Vec<u8>> {
    with_copy(Packet { payload: PAYLOAD, ..packet.clone() }.bytes(family)?)
}

/// A frame with the second copy of its headers.
///
/// # Errors
/// A frame without room for it.
pub fn with_copy(mut frame: Vec<u8>) -> Result<Vec<u8>> {
    let original = frame.get(..COPY.len()).context("a frame shorter than its headers")?.to_vec();
    // What is shorter than an IPv6 header with TCP's leaves out bytes that no wrapper reads.
    for (to, from) in frame.iter_mut().skip(COPY.start).zip(original) {
        *to = from;
    }
    Ok(frame)
}
