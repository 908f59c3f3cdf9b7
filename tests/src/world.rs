//! A loaded object with maps of its own, and one run of one frame through one program of it:
//! verdict, frame and the reasons that were counted.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, lpm_trie};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use purelb_common::SCHEMA;
use purelb_common::hash;
use purelb_common::table::{
    Clock, Config, Endpoint, Fence, FlowKey, Pin, READY, RangeKey, Reply, ReplyKey, Rev, RevKey, SLOTS_PER_ELEMENT,
    Service, ServiceKey, Slot, TICK_SHIFT, Uplink, VIP_HERE, Vip, VipAt,
};
use purelb_common::verdict::{Action, Reason};

use crate::packet::{Family, Host, Packet};

/// Names the object under test; its default is what `cargo xtask build-ebpf` writes.
pub const OBJECT: &str = "PURELB_EBPF_OBJECT";
/// Slots of a test's map.
pub const SLOTS: u32 = 8192;

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `purelb_xdp`
    Xdp,
    /// `purelb_ingress`
    Tcx,
    /// `purelb_egress`
    Egress,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of the return code.
    pub action: Action,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Everything that was counted.
    pub reasons: Vec<Reason>,
}

/// Address bytes of a [`Host`].
pub trait Bytes {
    /// In this family.
    fn of(host: Host) -> Self;
}
impl Bytes for [u8; 4] {
    fn of(host: Host) -> Self {
        host.v4()
    }
}
impl Bytes for [u8; 16] {
    fn of(host: Host) -> Self {
        host.v6()
    }
}

/// The same code for the family of the moment.
macro_rules! by_family {
    ($family:expr, $a:ident => $body:expr) => {
        match $family {
            Family::V4 => {
                type $a = [u8; 4];
                $body
            }
            Family::V6 => {
                type $a = [u8; 16];
                $body
            }
        }
    };
}

mod tables;

/// A key as the pod sees the flow: pod, client, protocol.
pub type Seen = ((Host, u16), (Host, u16), u32);

/// All that were loaded, to be used again: the kernel verifies one for a second, in an emulated guest for half a minute.
static LOADED: Mutex<Vec<&Mutex<Loaded>>> = Mutex::new(Vec::new());

/// An object of the process.
struct Loaded {
    ebpf: Ebpf,
    /// Elements of `VIP_INDEX` that rows wrote.
    indexed: Vec<(Family, u32)>,
}

/// The loaded object, in the hands of one test.
pub struct World {
    loaded: MutexGuard<'static, Loaded>,
    /// Family that set-ups and runs are in.
    pub family: Family,
    /// Of `CONFIG`.
    pub config: Config,
}

impl World {
    /// The object and its programs, reset: loaded now, or one that a test before is done with.
    ///
    /// # Errors
    /// No object, no root, or a kernel that refuses it.
    pub fn load() -> Result<Self> {
        let all = LOADED.lock().map(|all| all.clone()).unwrap_or_default();
        // What a test had when it panicked nobody else gets.
        if let Some(loaded) = all.into_iter().find_map(|one| one.try_lock().ok()) {
            let mut world = Self::of(loaded);
            world.reset(Family::V4)?;
            return Ok(world);
        }
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("SLOTS", SLOTS / SLOTS_PER_ELEMENT);
        for name in LRU {
            loader.map_max_entries(name, 4096);
        }
        let one = load(&mut loader)?;
        let mut world = Self::of(one.lock().map_err(|_| anyhow!("nobody else had it"))?);
        LOADED.lock().map_err(|_| anyhow!("a test panicked at the list"))?.push(one);
        world.reset(Family::V4)?;
        Ok(world)
    }

    fn of(loaded: MutexGuard<'static, Loaded>) -> Self {
        Self { loaded, family: Family::V4, config: Config::default() }
    }

    /// A new one with the sizes that the loader was told; of the rest, those that ship.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_by(loader: &mut EbpfLoader<'_>) -> Result<Self> {
        Ok(Self::of(load(loader)?.lock().map_err(|_| anyhow!("nobody else had it"))?))
    }

    /// The program of the uplink.
    ///
    /// # Errors
    /// An object without it.
    pub fn xdp(&self) -> Result<&Xdp> {
        Ok(self.loaded.ebpf.program("purelb_xdp").with_context(|| missing("purelb_xdp"))?.try_into()?)
    }

    /// Empties every map that rows fill and starts over in a family.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn reset(&mut self, family: Family) -> Result<()> {
        for f in [Family::V4, Family::V6] {
            self.family = f;
            by_family!(f, A => {
                self.clear::<A, Vip>("VIPS")?;
                self.clear::<ServiceKey<A>, Service>("SERVICES")?;
                self.clear::<FlowKey<A>, Pin>("PINS")?;
                self.clear::<ReplyKey<A>, Reply<A>>("HALF_OPEN")?;
                self.clear::<ReplyKey<A>, Reply<A>>("REPLIES")?;
                self.clear::<ReplyKey<A>, Reply<A>>("UDP_REPLIES")?;
                self.clear::<ReplyKey<A>, u32>("DIRECT")?;
                let name = self.name("CLUSTER");
                let mut cluster: LpmTrie<&mut MapData, A, u32> = LpmTrie::try_from(self.map(&name)?)?;
                let keys: Vec<_> = cluster.keys().collect::<Result<_, _>>()?;
                for key in keys {
                    cluster.remove(&key)?;
                }
                self.clear::<RevKey<A>, Rev<A>>("REVSVC")?;
                self.clear::<purelb_common::table::AffinityKey<A>, purelb_common::table::Affinity>("AFFINITY")?;
                let name = self.name("SRC_RANGES");
                let mut ranges: LpmTrie<&mut MapData, RangeKey<A>, u32> = LpmTrie::try_from(self.map(&name)?)?;
                let keys: Vec<_> = ranges.keys().collect::<Result<_, _>>()?;
                for key in keys {
                    ranges.remove(&key)?;
                }
            });
        }
        self.slots(0, 4096, Slot(0))?;
        self.put_uplink(Uplink::default())?;
        self.fence(0, 0)?;
        for (f, bit) in std::mem::take(&mut self.loaded.indexed) {
            self.family = f;
            let name = self.name("VIP_INDEX");
            by_family!(f, A => {
                Array::try_from(self.map(&name)?)?.set(bit, <VipAt<A> as bytemuck::Zeroable>::zeroed(), 0)?;
            });
        }
        self.family = family;
        self.config = Config {
            schema: SCHEMA,
            seed: 7,
            half_open: 400,
            udp_idle: 400,
            tcp_idle: 4000,
            udp_pass: 700,
            local_port_min: 32768,
            local_port_max: 60999,
            heartbeat: self.tick()?,
            heartbeat_limit: 4000,
            ..Config::default()
        };
        self.configure(|_| ())
    }

    fn name(&self, name: &str) -> String {
        format!("{name}{}", if self.family == Family::V4 { 4 } else { 6 })
    }

    fn map(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.loaded.ebpf.map_mut(name).with_context(|| missing(name))
    }

    fn clear<K: Pod, V: Pod>(&mut self, name: &str) -> Result<()> {
        let name = self.name(name);
        let mut map: HashMap<&mut MapData, K, V> = HashMap::try_from(self.map(&name)?)?;
        let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
        for key in keys {
            map.remove(&key)?;
        }
        Ok(())
    }

    fn insert<K: Pod, V: Pod>(&mut self, name: &str, key: &K, value: &V) -> Result<()> {
        let name = self.name(name);
        let mut map: HashMap<&mut MapData, K, V> = HashMap::try_from(self.map(&name)?)?;
        map.insert(key, value, 0).with_context(|| format!("map {name}"))
    }

    fn get<K: Pod, V: Pod>(&mut self, name: &str, key: &K) -> Result<Option<V>> {
        let name = self.name(name);
        let map: HashMap<&mut MapData, K, V> = HashMap::try_from(self.map(&name)?)?;
        match map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("map {name}")),
        }
    }

    /// Changes `CONFIG`.
    ///
    /// # Errors
    /// A map that the kernel does not let write.
    pub fn configure(&mut self, change: impl FnOnce(&mut Config)) -> Result<()> {
        change(&mut self.config);
        let config = self.config;
        Ok(Array::try_from(self.map("CONFIG")?)?.set(0, config, 0)?)
    }

    /// The kernel's clock, jiffies.
    ///
    /// # Errors
    /// The program `clock` does not run.
    pub fn jiffies(&mut self) -> Result<u64> {
        let program: &Xdp = self.loaded.ebpf.program("clock").with_context(|| missing("clock"))?.try_into()?;
        program.test_run(TestRunOptions { data_in: Some(&[0; 64]), ..TestRunOptions::default() })?;
        let clock: Array<&mut MapData, Clock> = Array::try_from(self.map("CLOCK")?)?;
        Ok(clock.get(&0, 0)?.jiffies)
    }

    /// The tick of the programs.
    ///
    /// # Errors
    /// As [`Self::jiffies`].
    pub fn tick(&mut self) -> Result<u32> {
        Ok((self.jiffies()? >> TICK_SHIFT) as u32)
    }

    /// How often each reason was counted, in the order of [`Reason::ALL`].
    ///
    /// # Errors
    /// A map that the kernel does not let read.
    pub fn counted(&mut self) -> Result<Vec<u64>> {
        let map: PerCpuArray<&mut MapData, u64> = PerCpuArray::try_from(self.map("REASONS")?)?;
        let mut sums = Vec::new();
        for reason in Reason::ALL {
            let values: PerCpuValues<u64> = map.get(&(reason as u32), 0)?;
            sums.push(values.iter().sum());
        }
        Ok(sums)
    }

    /// One run; `None` when the kernel builds no packet out of so short a frame.
    ///
    /// # Errors
    /// Return codes that no program of ours has.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Result<Option<Outcome>> {
        let before = self.counted()?;
        let mut out = vec![0; frame.len() + 64];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let name = match hook {
            Hook::Xdp => "purelb_xdp",
            Hook::Tcx => "purelb_ingress",
            Hook::Egress => "purelb_egress",
        };
        let program = self.loaded.ebpf.program(name).with_context(|| missing(name))?;
        let result = match hook {
            Hook::Xdp => TestRun::test_run(<&Xdp>::try_from(program)?, options),
            _ => TestRun::test_run(<&SchedClassifier>::try_from(program)?, options),
        };
        let result = match result {
            Ok(result) => result,
            Err(aya::programs::ProgramError::SyscallError(e))
                if e.io_error.raw_os_error() == Some(nix::libc::EINVAL) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("running {name}")),
        };
        let action = match (hook, result.return_value as i32) {
            (Hook::Xdp, 2) | (Hook::Tcx | Hook::Egress, -1) => Action::Pass,
            (Hook::Xdp, 1) | (Hook::Tcx, 2) => Action::Drop,
            (_, code) => bail!("{name} returned {code}"),
        };
        out.truncate(result.data_size_out as usize);
        let after = self.counted()?;
        let mut reasons = Vec::new();
        for ((reason, before), after) in Reason::ALL.into_iter().zip(before).zip(after) {
            for _ in before..after {
                reasons.push(reason);
            }
        }
        Ok(Some(Outcome { action, frame: out, reasons }))
    }

    /// One packet must leave for one reason, as `expected` in every byte.
    ///
    /// # Errors
    /// What differs.
    pub fn expect(&mut self, hook: Hook, packet: &Packet, reason: Reason, expected: &Packet) -> Result<()> {
        let frame = packet.bytes(self.family)?;
        let out = self.run(hook, &frame)?.context("the kernel refuses the frame")?;
        ensure!(out.reasons == [reason], "counted {:?} instead of {reason:?}", out.reasons);
        ensure!(out.action == reason.action(), "the verdict is {:?} though the reason is {reason:?}", out.action);
        let expected = expected.bytes(self.family)?;
        ensure!(out.frame == expected, "the frame is\n{:02x?}, not\n{expected:02x?}", out.frame);
        Ok(())
    }
}

/// It stays until the process ends.
fn load(loader: &mut EbpfLoader<'_>) -> Result<&'static Mutex<Loaded>> {
    let path = match std::env::var_os(OBJECT) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/purelb-ebpf.o")),
    };
    ensure!(
        path.is_file(),
        "{}: no such object; build it with `cargo xtask build-ebpf` or name it in {OBJECT}",
        path.display()
    );
    ensure!(
        nix::unistd::geteuid().is_root(),
        "loading {} needs root; run the tests with `cargo xtask test` as root",
        path.display()
    );
    let mut ebpf = loader.load_file(&path).with_context(|| format!("{}: loading", path.display()))?;
    for name in ["purelb_xdp", "clock"] {
        let program: &mut Xdp = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
        program.load().with_context(|| format!("the kernel refuses {name}"))?;
    }
    for name in ["purelb_ingress", "purelb_egress"] {
        let program: &mut SchedClassifier = ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
        program.load().with_context(|| format!("the kernel refuses {name}"))?;
    }
    Ok(Box::leak(Box::new(Mutex::new(Loaded { ebpf, indexed: Vec::new() }))))
}

fn missing(name: &str) -> String {
    format!("the object has no {name}; build it anew with `cargo xtask build-ebpf`")
}

const LRU: [&str; 12] = [
    "PINS4",
    "PINS6",
    "HALF_OPEN4",
    "HALF_OPEN6",
    "REPLIES4",
    "REPLIES6",
    "UDP_REPLIES4",
    "UDP_REPLIES6",
    "DIRECT4",
    "DIRECT6",
    "AFFINITY4",
    "AFFINITY6",
];
