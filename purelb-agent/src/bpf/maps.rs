//! The pinned maps, opened with every size checked against the types of `purelb_common::table`.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use aya::maps::MapData;
use bytemuck::Pod;
use purelb_common::hash::Address;
use purelb_common::table::{self as t, Config};
use purelb_common::verdict::{REASONS, Reason};

use super::sys::{self, RawMap, TrieKey, Words};
use super::{BpfError, Events};

/// A map with typed keys and values.
#[derive(Debug)]
pub struct Table<K, V> {
    raw: RawMap,
    path: PathBuf,
    entries: u32,
    kind: PhantomData<(K, V)>,
}

/// The maps of one address family.
#[derive(Debug)]
pub struct Tables<A: Address> {
    pub(super) vips: Table<A, t::Vip>,
    pub(super) index: Table<u32, t::VipAt<A>>,
    pub(super) services: Table<t::ServiceKey<A>, t::Service>,
    pub(super) endpoints: Table<u32, t::Endpoint<A>>,
    pub(super) reverse: Table<t::RevKey<A>, t::Rev<A>>,
    pub(super) ranges: Table<TrieKey<t::RangeKey<A>>, u32>,
    pub(super) cluster: Table<TrieKey<A>, u32>,
    pub(super) owners: Table<u32, t::Owner>,
}

/// All pinned maps.
#[derive(Debug)]
pub struct Maps {
    pub(super) root: PathBuf,
    pub(super) v4: Tables<[u8; 4]>,
    pub(super) v6: Tables<[u8; 16]>,
    pub(super) bitmap: Table<u32, u64>,
    pub(super) slots: Words,
    config: Table<u32, Config>,
    clock: Table<u32, t::Clock>,
    uplinks: Table<u32, t::Uplink>,
    stats: Table<u32, t::Stats>,
    pub(super) reasons: Table<u32, u64>,
    clock_program: Option<OwnedFd>,
    hz: OnceLock<u32>,
}

/// The kernel's clock as the programs see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// `jiffies64 >> TICK_SHIFT`.
    pub tick: u32,
    /// Jiffies a second.
    pub hz: u32,
}

impl Maps {
    /// Opens the pins under `root`; loads nothing.
    pub fn open(root: &Path) -> Result<Self, BpfError> {
        let slots_path = root.join("SLOTS");
        let (fd, slots) = open_map(&slots_path, 4, 8 * t::SLOTS_PER_ELEMENT as usize)?;
        let slots = Words::new(fd, slots.saturating_mul(t::SLOTS_PER_ELEMENT));
        let maps = Self {
            root: root.to_path_buf(),
            v4: Tables::open(root)?,
            v6: Tables::open(root)?,
            bitmap: Table::open(root, "VIP_BITMAP")?,
            slots,
            config: Table::open(root, "CONFIG")?,
            clock: Table::open(root, "CLOCK")?,
            uplinks: Table::open(root, "UPLINKS")?,
            stats: Table::open_per_cpu(root, "STATS")?,
            reasons: Table::open_per_cpu(root, "REASONS")?,
            clock_program: sys::get(&root.join("prog_clock")).ok(),
            hz: OnceLock::new(),
        };
        let schema = maps.config()?.schema;
        if schema != 0 && schema != purelb_common::SCHEMA {
            let what = format!("schema {schema}, we need {}", purelb_common::SCHEMA);
            return Err(BpfError::Layout { path: root.join("CONFIG"), what });
        }
        Ok(maps)
    }

    /// What the programs were told.
    pub fn config(&self) -> Result<Config, BpfError> {
        Ok(self.config.get(&0)?.unwrap_or_default())
    }

    /// Tells the programs.
    pub fn set_config(&self, config: &Config) -> Result<(), BpfError> {
        self.config.set(&0, config)
    }

    /// Tells the programs the MAC address of an uplink, or that none is to be asked for.
    pub fn set_uplink(&self, ifindex: u32, mac: Option<[u8; 6]>) -> Result<(), BpfError> {
        let entry = match mac {
            Some([a, b, c, d, e, f]) => {
                t::Uplink { mac: u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), ifindex, pad: 0 }
            }
            None => t::Uplink::default(),
        };
        let key = ifindex % t::UPLINKS;
        if self.uplinks.get(&key)? == Some(entry) { Ok(()) } else { self.uplinks.set(&key, &entry) }
    }

    /// Tick and HZ; the first call takes 80 ms, which HZ is measured in.
    pub fn clock(&self) -> Result<ClockReading, BpfError> {
        let first = self.read_clock()?;
        let hz = match self.hz.get() {
            Some(hz) => *hz,
            None => {
                std::thread::sleep(Duration::from_millis(80));
                let second = self.read_clock()?;
                let jiffies = second.jiffies.saturating_sub(first.jiffies);
                let nanoseconds = second.nanoseconds.saturating_sub(first.nanoseconds).max(1);
                *self.hz.get_or_init(|| nearest_hz(jiffies.saturating_mul(1_000_000_000) / nanoseconds))
            }
        };
        Ok(ClockReading { tick: tick_of(first.jiffies), hz })
    }

    fn read_clock(&self) -> Result<t::Clock, BpfError> {
        let path = self.root.join("prog_clock");
        let program = self.clock_program.as_ref().ok_or_else(|| BpfError::Missing { path: path.clone() })?;
        sys::test_run(program.as_fd()).map_err(|e| BpfError::syscall("BPF_PROG_TEST_RUN", &path, e))?;
        Ok(self.clock.get(&0)?.unwrap_or_default())
    }

    /// Packets by the reason they left for, summed over all CPUs.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, BpfError> {
        let mut sums = Vec::with_capacity(REASONS);
        for reason in Reason::ALL {
            let sum = self.reasons.get_per_cpu(&(reason as u32))?.iter().fold(0u64, |sum, n| sum.wrapping_add(*n));
            sums.push((reason, sum));
        }
        Ok(sums)
    }

    /// Counters of a service, summed over all CPUs.
    pub fn stats(&self, service_id: u32) -> Result<t::Stats, BpfError> {
        Ok(self.stats.get_per_cpu(&service_id)?.iter().fold(t::Stats::default(), |sum, s| t::Stats {
            packets: sum.packets.wrapping_add(s.packets),
            bytes: sum.bytes.wrapping_add(s.bytes),
            new_flows: sum.new_flows.wrapping_add(s.new_flows),
            drops: sum.drops.wrapping_add(s.drops),
        }))
    }

    /// Sampled drops. Only one reader gets them.
    pub fn events(&self) -> Result<Events, BpfError> {
        Events::open(&self.root.join("EVENTS"))
    }
}

impl<A: Address> Tables<A> {
    fn open(root: &Path) -> Result<Self, BpfError> {
        let name = |base: &str| format!("{base}{}", A::FAMILY);
        Ok(Self {
            vips: Table::open(root, &name("VIPS"))?,
            index: Table::open(root, &name("VIP_INDEX"))?,
            services: Table::open(root, &name("SERVICES"))?,
            endpoints: Table::open(root, &name("ENDPOINTS"))?,
            reverse: Table::open(root, &name("REVSVC"))?,
            ranges: Table::open(root, &name("SRC_RANGES"))?,
            cluster: Table::open(root, &name("CLUSTER"))?,
            owners: Table::open(root, &name("OWNERS"))?,
        })
    }
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn open(root: &Path, name: &str) -> Result<Self, BpfError> {
        let path = root.join(name);
        let (fd, entries) = open_map(&path, size_of::<K>(), size_of::<V>())?;
        // Arrays hand out whole 8 bytes only inside the kernel; system calls copy the value's size.
        Ok(Self { raw: RawMap::new(fd, size_of::<K>(), size_of::<V>()), path, entries, kind: PhantomData })
    }

    fn open_per_cpu(root: &Path, name: &str) -> Result<Self, BpfError> {
        let path = root.join(name);
        let (fd, entries) = open_map(&path, size_of::<K>(), size_of::<V>())?;
        let cpus = sys::possible_cpus().map_err(|e| BpfError::syscall("reading the possible CPUs", &path, e))?;
        let stride = size_of::<V>().next_multiple_of(8);
        Ok(Self { raw: RawMap::new(fd, size_of::<K>(), stride.saturating_mul(cpus)), path, entries, kind: PhantomData })
    }

    /// How many it has room for.
    pub(super) const fn entries(&self) -> u32 {
        self.entries
    }

    fn fail(&self, call: &'static str) -> impl FnOnce(io::Error) -> BpfError {
        let path = self.path.clone();
        move |e| BpfError::syscall(call, path, e)
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, BpfError> {
        let mut value = V::zeroed();
        let found = self.raw.lookup(bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value));
        Ok(found.map_err(self.fail("look-up"))?.then_some(value))
    }

    fn get_per_cpu(&self, key: &K) -> Result<Vec<V>, BpfError> {
        let stride = size_of::<V>().next_multiple_of(8);
        let mut values = vec![0u8; self.raw.value_size()];
        self.raw.lookup(bytemuck::bytes_of(key), &mut values).map_err(self.fail("look-up"))?;
        Ok(values
            .chunks_exact(stride)
            .filter_map(|v| v.get(..size_of::<V>()))
            .map(bytemuck::pod_read_unaligned)
            .collect())
    }

    pub(super) fn set(&self, key: &K, value: &V) -> Result<(), BpfError> {
        self.raw.update(bytemuck::bytes_of(key), bytemuck::bytes_of(value)).map_err(self.fail("update"))
    }

    pub(super) fn remove(&self, key: &K) -> Result<bool, BpfError> {
        self.raw.delete(bytemuck::bytes_of(key)).map_err(self.fail("delete"))
    }

    pub(super) fn for_each(&self, mut each: impl FnMut(K, V)) -> Result<(), BpfError> {
        self.raw
            .for_each(|k, v| each(bytemuck::pod_read_unaligned(k), bytemuck::pod_read_unaligned(v)))
            .map_err(self.fail("batch look-up"))
    }
}

/// Opens a pinned map of these sizes; its descriptor and number of entries.
pub(super) fn open_map(path: &Path, key: usize, value: usize) -> Result<(OwnedFd, u32), BpfError> {
    let fd = sys::get(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => BpfError::Missing { path: path.to_path_buf() },
        _ => BpfError::syscall("BPF_OBJ_GET", path, e),
    })?;
    let copy = fd.try_clone().map_err(|e| BpfError::syscall("dup", path, e))?;
    let info = MapData::from_fd(copy)
        .and_then(|data| data.info())
        .map_err(|e| BpfError::Map { name: path.display().to_string(), source: Box::new(e) })?;
    if info.key_size() as usize != key || info.value_size() as usize != value {
        let what = format!("sizes {}/{}, we need {key}/{value}", info.key_size(), info.value_size());
        return Err(BpfError::Layout { path: path.to_path_buf(), what });
    }
    Ok((fd, info.max_entries()))
}

fn tick_of(jiffies: u64) -> u32 {
    (jiffies >> t::TICK_SHIFT & u64::from(u32::MAX)) as u32
}

fn nearest_hz(measured: u64) -> u32 {
    [100u32, 250, 300, 1000].into_iter().min_by_key(|hz| u64::from(*hz).abs_diff(measured)).unwrap_or(250)
}
