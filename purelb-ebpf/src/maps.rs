//! The maps, and safe access to them: the only place besides `packet.rs` that touches pointers.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::btf_map;
use purelb_common::decide::{Tables, stale};
use purelb_common::hash::{self, Address};
use purelb_common::table::{
    Affinity, AffinityKey, Clock, Config, ENDPOINT_IDS, Endpoint, Event, Fence, FlowKey, Owner, Pin, RangeKey, Reply,
    ReplyKey, Rev, RevKey, SERVICE_IDS, SLOTS as SLOT_COUNT, SLOTS_PER_ELEMENT, Service, ServiceKey, Slot, Stats,
    TICK_SHIFT, UPLINKS as UPLINK_COUNT, Uplink, VIP_BITS, VIP_COUNT, VIP_HERE, Vip, VipAt,
};
use purelb_common::verdict::REASONS as REASON_COUNT;

type V4 = [u8; 4];
type V6 = [u8; 16];

/// `BPF_F_MMAPABLE`: the agent stores slots and the fence by single aligned stores.
const MMAPABLE: usize = 1 << 10;
const FLOWS: usize = 1 << 18;
const UDP_FLOWS: usize = 1 << 17;
const FEW: usize = 1 << 16;

/// What a CPU spent in a tick: of the insert budgets of TCP and UDP, and of the samples.
#[repr(C)]
pub struct Budget {
    tick: u32,
    used: u32,
}

#[btf_map]
static CONFIG: Array<Config, 1, 0> = Array::new();
#[btf_map]
static FENCE: Array<Fence, 1, MMAPABLE> = Array::new();
#[btf_map]
static CLOCK: Array<Clock, 1, 0> = Array::new();
#[btf_map]
static BUDGET: PerCpuArray<Budget, 3, 0> = PerCpuArray::new();
#[btf_map]
static UPLINKS: Array<Uplink, { UPLINK_COUNT as usize }, 0> = Array::new();
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
     $direct:ident, $affinity:ident, $ranges:ident, $cluster:ident, $owners:ident, $index:ident) => {
        #[btf_map]
        static $vips: HashMap<$a, Vip, { VIP_COUNT as usize }, 0> = HashMap::new();
        #[btf_map]
        static $index: Array<VipAt<$a>, { VIP_BITS as usize }, 0> = Array::new();
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
        #[btf_map]
        static $cluster: LpmTrie<$a, u32, FEW> = LpmTrie::new();
        #[btf_map]
        static $owners: Array<Owner, { ENDPOINT_IDS as usize }, 0> = Array::new();

        impl Family for $a {
            #[inline(always)]
            fn vip(self) -> Option<Vip> {
                if let Some(at) = $index.get(hash::vip_bit(self))
                    && at.flags & VIP_HERE != 0
                    && at.addr == self
                {
                    return Some(Vip { flags: at.flags });
                }
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
            type Service = &'static Service;
            type Endpoint = &'static Endpoint<$a>;
            #[inline(always)]
            fn service(&self, key: &ServiceKey<$a>) -> Option<&'static Service> {
                // SAFETY: the entry outlives the run of the program; one recycled meanwhile sends one packet astray.
                unsafe { $services.get(&aligned(key).0) }
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
            fn endpoint(&self, id: u32) -> Option<&'static Endpoint<$a>> {
                $endpoints.get(id)
            }
            #[inline(always)]
            fn pin(&self, key: &FlowKey<$a>) -> Option<Pin> {
                // SAFETY: copied at once.
                unsafe { $pins.get(key).copied() }
            }
            #[inline(always)]
            fn put_pin(&self, key: &FlowKey<$a>, pin: &Pin) {
                let _ = $pins.insert(key, &aligned(pin).0, 0);
            }
            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$a>) -> Option<Affinity> {
                // SAFETY: copied at once.
                unsafe { $affinity.get(&aligned(key).0).copied() }
            }
            #[inline(always)]
            fn put_affinity(&self, key: &AffinityKey<$a>, value: &Affinity) {
                let _ = $affinity.insert(&aligned(key).0, &aligned(value).0, 0);
            }
            #[inline(always)]
            fn half_open(&self, key: &ReplyKey<$a>) -> Option<Reply<$a>> {
                // SAFETY: copied at once.
                unsafe { $half.get(key).copied() }
            }
            #[inline(always)]
            fn put_half_open(&self, key: &ReplyKey<$a>, value: &Reply<$a>) {
                let _ = $half.insert(key, &aligned(value).0, 0);
            }
            #[inline(always)]
            fn remove_half_open(&self, key: &ReplyKey<$a>) {
                let _ = $half.remove(key);
            }
            #[inline(always)]
            fn reply<const PROTO: u16>(&self, key: &ReplyKey<$a>) -> Option<Reply<$a>> {
                // SAFETY: copied at once.
                unsafe { if PROTO == 6 { $replies.get(key).copied() } else { $udp.get(key).copied() } }
            }
            #[inline(always)]
            fn put_reply<const PROTO: u16>(&self, key: &ReplyKey<$a>, value: &Reply<$a>) {
                let _ = if PROTO == 6 {
                    $replies.insert(key, &by_words(value).0, 0)
                } else {
                    $udp.insert(key, &aligned(value).0, 0)
                };
            }
            #[inline(always)]
            fn mark_reply<const PROTO: u16>(&self, key: &ReplyKey<$a>, state: u16, used: u32) {
                let entry = if PROTO == 6 { $replies.get_ptr_mut(key) } else { $udp.get_ptr_mut(key) };
                if let Some(r) = entry {
                    // SAFETY: an entry of the map; one recycled meanwhile is marked for a flow it is not of, as
                    // any write to an LRU map may be.
                    unsafe { ((*r).state, (*r).used) = (state, used) };
                }
            }
            #[inline(always)]
            fn remove_reply<const PROTO: u16>(&self, key: &ReplyKey<$a>) {
                let _ = if PROTO == 6 { $replies.remove(key) } else { $udp.remove(key) };
            }
            #[inline(always)]
            fn reverse(&self, key: &RevKey<$a>) -> Option<Rev<$a>> {
                // SAFETY: copied at once.
                unsafe { $rev.get(&aligned(key).0).copied() }
            }
            #[inline(always)]
            fn direct(&self, key: &ReplyKey<$a>) -> bool {
                // SAFETY: only its presence counts.
                unsafe { $direct.get(key).is_some() }
            }
            #[inline(always)]
            fn in_cluster(&self, addr: $a) -> bool {
                let mut at = Aligned(core::mem::MaybeUninit::<Key<$a>>::uninit());
                let p = at.0.as_mut_ptr().cast::<u32>();
                // SAFETY: the key is the length and the address, four bytes by four as above.
                unsafe {
                    write_volatile(p, 8 * size_of::<$a>() as u32);
                    for (i, word) in addr.as_chunks::<4>().0.iter().enumerate() {
                        write_volatile(p.add(1 + i), u32::from_ne_bytes(*word));
                    }
                    $cluster.get(at.0.assume_init_ref()).is_some()
                }
            }
            #[inline(always)]
            fn budget(&self, config: &Config, proto: u16, tick: u32) -> bool {
                config.insert_budget == 0 || spend(u32::from(proto == 17), config.insert_budget, tick)
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
    SRC_RANGES4,
    CLUSTER4,
    OWNERS4,
    VIP_INDEX4
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
    SRC_RANGES6,
    CLUSTER6,
    OWNERS6,
    VIP_INDEX6
);

/// LLVM writes to the stack in words of eight bytes, and the verifier wants those aligned.
#[repr(align(8))]
struct Aligned<T>(T);

#[inline(always)]
fn aligned<T: Copy>(value: &T) -> Aligned<T> {
    Aligned(*value)
}

/// What is per family besides [`Tables`].
pub trait Family: Address {
    /// `VIP_INDEX`, else `VIPS`
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

/// The budget of drop samples; 0 and 1 are those of TCP's and UDP's inserts.
const SAMPLES: u32 = 2;

/// Takes one of `limit` a tick out of a budget of this CPU.
#[inline(always)]
fn spend(which: u32, limit: u32, tick: u32) -> bool {
    let Some(p) = BUDGET.get_ptr_mut(which) else { return false };
    // SAFETY: per CPU, and a program is not preempted by another on its CPU (softirq).
    let b = unsafe { &mut *p };
    if b.tick != tick {
        b.tick = tick;
        b.used = 0;
    }
    b.used = b.used.saturating_add(1);
    b.used <= limit
}

/// The same for a value whose words LLVM would pair wrongly: volatile stores stay what they are.
#[inline(always)]
fn by_words<T: Copy>(value: &T) -> Aligned<T> {
    let mut copy = Aligned(core::mem::MaybeUninit::<T>::uninit());
    let (from, to) = (core::ptr::from_ref(value).cast::<u32>(), copy.0.as_mut_ptr().cast::<u32>());
    for i in 0..size_of::<T>() / 4 {
        // SAFETY: plain data of whole words, in a buffer of its size.
        unsafe { write_volatile(to.add(i), from.add(i).read()) };
    }
    // SAFETY: written just above.
    Aligned(unsafe { copy.0.assume_init() })
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
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return };
    // SAFETY: helpers without arguments.
    let (jiffies, nanoseconds) = unsafe { (bpf_jiffies64(), aya_ebpf::helpers::bpf_ktime_get_ns()) };
    // SAFETY: the map's only element.
    unsafe { ((*clock).jiffies, (*clock).nanoseconds) = (jiffies, nanoseconds) };
}

/// The fence is down: nobody is answered who asks for a local VIP.
#[inline(always)]
pub fn fenced() -> bool {
    let Some(fence) = FENCE.get_ptr_mut(0) else { return false };
    // SAFETY: two aligned words of the map's only element, each of which the agent stores at once.
    let (until, over) = unsafe { (read_volatile(&raw const (*fence).until), read_volatile(&raw const (*fence).over)) };
    // SAFETY: a helper without arguments.
    Fence { until, over }.is_down(unsafe { bpf_ktime_get_boot_ns() })
}

/// The tables count as stale (D17).
#[inline(always)]
pub fn silent() -> bool {
    config().is_some_and(|config| stale(config, tick()))
}

/// Ticks of the agent's silence when the tables count as stale (D17); once for each silence.
#[inline(always)]
pub fn lapsed() -> Option<u32> {
    let (config, tick) = (config()?, tick());
    // SAFETY: nobody but the agent runs the program `clock`, and it holds its lock.
    let told = unsafe { &raw mut (*CLOCK.get_ptr_mut(0)?).told };
    // SAFETY: as above.
    if !stale(config, tick) || unsafe { *told } == u64::from(config.heartbeat) {
        return None;
    }
    // SAFETY: as above.
    unsafe { *told = u64::from(config.heartbeat) };
    Some(tick.wrapping_sub(config.heartbeat))
}

/// Whether an address may be a VIP: one bit, so that other traffic leaves at once.
#[inline(always)]
pub fn maybe_vip<A: Address>(addr: A) -> bool {
    let bit = hash::vip_bit(addr);
    VIP_BITMAP.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 != 0)
}

/// Counts an exit by the number of its reason.
#[inline(always)]
pub fn count(reason: u32) {
    if let Some(p) = REASONS.get_ptr_mut(reason) {
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

/// Whether this drop may go on the ring buffer.
#[inline(always)]
pub fn sampled(config: &Config, tick: u32) -> bool {
    config.sample != 0 && spend(SAMPLES, config.sample, tick)
}

/// The MAC address of an uplink, where the agent wrote it: see [`Uplink`].
#[inline(always)]
pub fn uplink_mac(ifindex: u32) -> Option<u64> {
    let uplink = UPLINKS.get(ifindex % UPLINK_COUNT)?;
    (uplink.ifindex == ifindex).then_some(uplink.mac)
}

/// Samples a drop to the ring buffer; a full buffer loses it, never the packet path's time.
#[inline(always)]
pub fn sample(event: &Event) {
    if let Some(mut entry) = EVENTS.reserve_untyped::<Event>(0) {
        entry.write(*event);
        entry.submit(0);
    }
}
