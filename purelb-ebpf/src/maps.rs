//! The maps, and safe access to them: the only place besides `packet.rs` that touches pointers.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key};
use aya_ebpf::helpers::bpf_jiffies64;
use aya_ebpf::macros::btf_map;
use purelb_common::decide::Tables;
use purelb_common::hash::{self, Address};
use purelb_common::table::{
    Affinity, AffinityKey, Clock, Config, ENDPOINT_IDS, Endpoint, Event, FlowKey, Pin, RangeKey, Reply, ReplyKey, Rev,
    RevKey, SERVICE_IDS, SLOTS as SLOT_COUNT, SLOTS_PER_ELEMENT, Service, ServiceKey, Slot, Stats, TICK_SHIFT,
    VIP_BITS, Vip,
};
use purelb_common::verdict::{REASONS as REASON_COUNT, Reason};

type V4 = [u8; 4];
type V6 = [u8; 16];

/// `BPF_F_MMAPABLE`: the agent stores slots by single aligned stores.
const MMAPABLE: usize = 1 << 10;
const FLOWS: usize = 1 << 18;
const UDP_FLOWS: usize = 1 << 17;
const FEW: usize = 1 << 16;

/// What a CPU spent of its insert budget.
#[repr(C)]
pub struct Budget {
    tick: u32,
    used: u32,
}

#[btf_map]
static CONFIG: Array<Config, 1, 0> = Array::new();
#[btf_map]
static CLOCK: Array<Clock, 1, 0> = Array::new();
#[btf_map]
static BUDGET: PerCpuArray<Budget, 1, 0> = PerCpuArray::new();
#[btf_map]
static DROPS: PerCpuArray<u32, 1, 0> = PerCpuArray::new();
#[btf_map]
static VIP_BITMAP: Array<u64, { VIP_BITS as usize / 64 }, 0> = Array::new();
#[btf_map]
static SLOTS: Array<[u64; 16], { (SLOT_COUNT / SLOTS_PER_ELEMENT) as usize }, MMAPABLE> = Array::new();
#[btf_map]
static STATS: PerCpuArray<Stats, { SERVICE_IDS as usize }, 0> = PerCpuArray::new();
#[btf_map]
static REASONS: PerCpuArray<u64, REASON_COUNT, 0> = PerCpuArray::new();
#[btf_map]
static EVENTS: RingBuf<(), { 1 << 18 }, 0> = RingBuf::new();

macro_rules! family {
    ($a:ty, $vips:ident, $services:ident, $endpoints:ident, $pins:ident, $half:ident, $replies:ident, $udp:ident, $rev:ident,
     $direct:ident, $affinity:ident, $ranges:ident) => {
        #[btf_map]
        static $vips: HashMap<$a, Vip, 4096, 0> = HashMap::new();
        #[btf_map]
        static $services: HashMap<ServiceKey<$a>, Service, { SERVICE_IDS as usize }, 0> = HashMap::new();
        #[btf_map]
        static $endpoints: Array<Endpoint<$a>, { ENDPOINT_IDS as usize }, 0> = Array::new();
        #[btf_map]
        static $pins: LruHashMap<FlowKey<$a>, Pin, FLOWS, 0> = LruHashMap::new();
        #[btf_map]
        static $half: LruHashMap<ReplyKey<$a>, Reply<$a>, UDP_FLOWS, 0> = LruHashMap::new();
        #[btf_map]
        static $replies: LruHashMap<ReplyKey<$a>, Reply<$a>, FLOWS, 0> = LruHashMap::new();
        #[btf_map]
        static $udp: LruHashMap<ReplyKey<$a>, Reply<$a>, UDP_FLOWS, 0> = LruHashMap::new();
        #[btf_map]
        static $rev: HashMap<RevKey<$a>, Rev<$a>, { ENDPOINT_IDS as usize }, 0> = HashMap::new();
        #[btf_map]
        static $direct: LruHashMap<ReplyKey<$a>, u32, FEW, 0> = LruHashMap::new();
        #[btf_map]
        static $affinity: LruHashMap<AffinityKey<$a>, Affinity, UDP_FLOWS, 0> = LruHashMap::new();
        #[btf_map]
        static $ranges: LpmTrie<RangeKey<$a>, u32, FEW> = LpmTrie::new();

        impl Family for $a {
            #[inline(always)]
            fn vip(self) -> Option<Vip> {
                // SAFETY: the value is copied at once; a VIP entry recycled meanwhile is only stale by a moment.
                unsafe { $vips.get(&self).copied() }
            }
            #[inline(always)]
            fn put_direct(key: &ReplyKey<Self>, tick: u32) {
                // SAFETY: as above.
                if unsafe { $direct.get(key).copied() } != Some(tick) {
                    let _ = $direct.insert(key, tick, 0);
                }
            }
        }

        impl Tables<$a> for Maps {
            #[inline(always)]
            fn service(&self, key: &ServiceKey<$a>) -> Option<Service> {
                // SAFETY: copied at once; entries live until an RCU grace period after removal.
                unsafe { $services.get(key).copied() }
            }
            #[inline(always)]
            fn in_range(&self, key: &RangeKey<$a>) -> bool {
                let mut at = Aligned(core::mem::MaybeUninit::<Key<RangeKey<$a>>>::uninit());
                let p = at.0.as_mut_ptr().cast::<u64>();
                let (bits, service) = (32 + 8 * size_of::<$a>() as u32, key.service);
                // SAFETY: the key is these twelve (or twenty-four) bytes: length, service, address. The first
                // eight go by one volatile store, or LLVM joins service and address into a misaligned one.
                unsafe {
                    write_volatile(p, u64::from(bits) | u64::from(service) << 32);
                    p.add(1).cast::<$a>().write(key.client);
                    $ranges.get(at.0.assume_init_ref()).is_some()
                }
            }
            #[inline(always)]
            fn slot(&self, index: u32) -> Slot {
                slot(index).map_or(Slot(0), |p| {
                    // SAFETY: `slot` returns a pointer into the map's element, 8-byte aligned.
                    Slot(unsafe { read_volatile(p) })
                })
            }
            #[inline(always)]
            fn stamp(&self, index: u32, half: u32) {
                if let Some(p) = slot(index) {
                    // SAFETY: the upper half of the slot is the program's own, 4-byte aligned (little endian).
                    unsafe { write_volatile(p.cast::<u32>().add(1), half) };
                }
            }
            #[inline(always)]
            fn endpoint(&self, id: u32) -> Option<Endpoint<$a>> {
                $endpoints.get(id).copied()
            }
            #[inline(always)]
            fn pin(&self, key: &FlowKey<$a>) -> Option<Pin> {
                // SAFETY: copied at once.
                unsafe { $pins.get(key).copied() }
            }
            #[inline(always)]
            fn put_pin(&self, key: &FlowKey<$a>, pin: &Pin) {
                let _ = $pins.insert(key, pin, 0);
            }
            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$a>) -> Option<Affinity> {
                // SAFETY: copied at once.
                unsafe { $affinity.get(key).copied() }
            }
            #[inline(always)]
            fn put_affinity(&self, key: &AffinityKey<$a>, value: &Affinity) {
                let _ = $affinity.insert(key, value, 0);
            }
            #[inline(always)]
            fn half_open(&self, key: &ReplyKey<$a>) -> Option<Reply<$a>> {
                // SAFETY: copied at once.
                unsafe { $half.get(key).copied() }
            }
            #[inline(always)]
            fn put_half_open(&self, key: &ReplyKey<$a>, value: &Reply<$a>) {
                let _ = $half.insert(key, value, 0);
            }
            #[inline(always)]
            fn remove_half_open(&self, key: &ReplyKey<$a>) {
                let _ = $half.remove(key);
            }
            #[inline(always)]
            fn reply(&self, key: &ReplyKey<$a>) -> Option<Reply<$a>> {
                // SAFETY: copied at once.
                unsafe { if key.proto == 6 { $replies.get(key).copied() } else { $udp.get(key).copied() } }
            }
            #[inline(always)]
            fn put_reply(&self, key: &ReplyKey<$a>, value: &Reply<$a>) {
                let _ = if key.proto == 6 { $replies.insert(key, value, 0) } else { $udp.insert(key, value, 0) };
            }
            #[inline(always)]
            fn remove_reply(&self, key: &ReplyKey<$a>) {
                let _ = if key.proto == 6 { $replies.remove(key) } else { $udp.remove(key) };
            }
            #[inline(always)]
            fn reverse(&self, key: &RevKey<$a>) -> Option<Rev<$a>> {
                // SAFETY: copied at once.
                unsafe { $rev.get(key).copied() }
            }
            #[inline(always)]
            fn direct(&self, key: &ReplyKey<$a>) -> bool {
                // SAFETY: only its presence counts.
                unsafe { $direct.get(key).is_some() }
            }
            #[inline(always)]
            fn budget(&self, config: &Config, tick: u32) -> bool {
                budget(config, tick)
            }
        }
    };
}
family!(
    V4,
    VIPS4,
    SERVICES4,
    ENDPOINTS4,
    PINS4,
    HALF_OPEN4,
    REPLIES4,
    UDP_REPLIES4,
    REVSVC4,
    DIRECT4,
    AFFINITY4,
    SRC_RANGES4
);
family!(
    V6,
    VIPS6,
    SERVICES6,
    ENDPOINTS6,
    PINS6,
    HALF_OPEN6,
    REPLIES6,
    UDP_REPLIES6,
    REVSVC6,
    DIRECT6,
    AFFINITY6,
    SRC_RANGES6
);

#[repr(align(8))]
struct Aligned<T>(T);

/// What is per family besides [`Tables`].
pub trait Family: Address {
    /// `VIPS`
    fn vip(self) -> Option<Vip>;
    /// `DIRECT`
    fn put_direct(key: &ReplyKey<Self>, tick: u32);
}

/// The kernel's [`Tables`].
pub struct Maps;

#[inline(always)]
fn slot(index: u32) -> Option<*mut u64> {
    let element = SLOTS.get_ptr_mut(index / SLOTS_PER_ELEMENT)?;
    // SAFETY: the index is masked to the element's sixteen slots.
    Some(unsafe { element.cast::<u64>().add((index % SLOTS_PER_ELEMENT) as usize) })
}

#[inline(always)]
fn budget(config: &Config, tick: u32) -> bool {
    if config.insert_budget == 0 {
        return true;
    }
    let Some(p) = BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: per CPU, and a program is not preempted by another on its CPU (softirq).
    let b = unsafe { &mut *p };
    if b.tick != tick {
        b.tick = tick;
        b.used = 0;
    }
    b.used += 1;
    b.used <= config.insert_budget
}

/// `CONFIG`.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// The clock of all entries.
#[inline(always)]
pub fn tick() -> u32 {
    // SAFETY: a helper without arguments.
    (unsafe { bpf_jiffies64() } >> TICK_SHIFT) as u32
}

/// Stores both clocks in `CLOCK`.
#[inline(always)]
pub fn read_clock() {
    // SAFETY: helpers without arguments.
    let clock = unsafe { Clock { jiffies: bpf_jiffies64(), nanoseconds: aya_ebpf::helpers::bpf_ktime_get_ns() } };
    let _ = CLOCK.set(0, clock, 0);
}

/// Whether an address may be a VIP: one bit, so that other traffic leaves at once.
#[inline(always)]
pub fn maybe_vip<A: Address>(addr: A) -> bool {
    let bit = hash::vip_bit(addr);
    VIP_BITMAP.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 != 0)
}

/// Counts an exit.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(p) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: per CPU.
        unsafe { *p += 1 };
    }
}

/// Counts a packet of a service.
#[inline(always)]
pub fn count_service(id: u32, bytes: u32, new: bool, dropped: bool) {
    if let Some(p) = STATS.get_ptr_mut(id) {
        // SAFETY: per CPU.
        let s = unsafe { &mut *p };
        if dropped {
            s.drops += 1;
        } else {
            s.packets += 1;
            s.bytes += u64::from(bytes);
            s.new_flows += u64::from(new);
        }
    }
}

/// One in `every` (a power of two), by a counter of this CPU.
#[inline(always)]
pub fn sampled(every: u32) -> bool {
    let Some(p) = DROPS.get_ptr_mut(0) else { return false };
    // SAFETY: per CPU.
    let n = unsafe { &mut *p };
    *n = n.wrapping_add(1);
    *n & (every - 1) == 0
}

/// Samples a drop to the ring buffer; a full buffer loses it, never the packet path's time.
#[inline(always)]
pub fn sample(event: &Event) {
    if let Some(mut entry) = EVENTS.reserve_untyped::<Event>(0) {
        entry.write(*event);
        entry.submit(0);
    }
}
