//! Around the program that is measured, never in what ships: BPF_PROG_TEST_RUN does not reset the
//! frame between repeats, and the program writes its endpoint over the destination. A wrapper
//! writes the header back with the next flow's source, then tail-calls the shipped program as it
//! is; the same wrapper round [`trivial`] is what to subtract.
//!
//! The frame brings its own original: a second copy of its headers at [`COPY`].
#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_PASS, XDP_TX};
use aya_ebpf::btf_maps::{Array, LruHashMap, ProgramArray};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;

/// Offset of the second copy of the headers.
const COPY: usize = 80;
/// Offset of an IPv4 header's addresses, which the program reads as one word, as they are written here.
const ADDRESSES4: usize = 14 + 12;
/// Offset of the ports behind an IPv4 header.
const PORTS4: usize = 14 + 20;
/// Ethernet, IPv4 and UDP headers, in whole words.
const HEADERS4: usize = 48;
/// Offset of an IPv6 header's addresses.
const ADDRESSES6: usize = 14 + 8;
/// Offset of the ports behind an IPv6 header.
const PORTS6: usize = 14 + 40;

/// Which flow the next packet is of: `[packets so far, flows - 1, step]`. Flows are a power of two
/// and the step is odd, so each is met once in a cycle.
#[btf_map]
static WALK: Array<[u64; 3], 1, 0> = Array::new();
/// The program that is measured. Its index is a constant, so the kernel makes the call a jump.
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();
/// [`trivial`]
#[btf_map]
static EMPTY: ProgramArray<1> = ProgramArray::new();

/// As big as `PINS4`, keys and values of the same length.
#[btf_map]
static FLOWS: LruHashMap<[u64; 2], [u32; 3], { 1 << 18 }, 0> = LruHashMap::new();

/// What everything is a multiple of.
#[xdp(frags)]
pub fn trivial(_context: XdpContext) -> u32 {
    XDP_PASS
}

/// A yardstick: what the kernel takes for one look-up in a flow table, and nothing else.
#[xdp(frags)]
pub fn look_up(_context: XdpContext) -> u32 {
    let Some(flow) = next_flow() else { return XDP_ABORTED };
    let key = [flow, 0];
    // SAFETY: only its presence counts.
    if unsafe { FLOWS.get(key) }.is_none() {
        let _ = FLOWS.insert(key, [0; 3], 0);
    }
    XDP_PASS
}

/// Sends the next flow's packet out of the device that it claims to come from. The frame's memory
/// comes back as the receiver left it, so all of the headers are written.
#[xdp(frags)]
pub fn send4(context: XdpContext) -> u32 {
    let Some(start) = frame(&context, COPY + HEADERS4) else { return XDP_ABORTED };
    for word in 0..HEADERS4 / 8 {
        copy::<u64>(start + 8 * word, 0);
    }
    if write4(&context).is_some() { XDP_TX } else { XDP_ABORTED }
}

macro_rules! wrapper {
    ($name:ident, $write:ident, $next:ident) => {
        /// Writes the header of the next flow, then hands the packet on.
        #[xdp(frags)]
        pub fn $name(context: XdpContext) -> u32 {
            if $write(&context).is_some() {
                // SAFETY: nothing of ours is left to drop.
                unsafe { $next.tail_call(&context, 0) };
            }
            XDP_ABORTED
        }
    };
}
wrapper!(measured4, write4, MEASURED);
wrapper!(measured6, write6, MEASURED);
wrapper!(empty4, write4, EMPTY);
wrapper!(empty6, write6, EMPTY);

/// Low 16 bits: what to xor to the client's port; the rest: to the last byte of its address.
#[inline(always)]
fn next_flow() -> Option<u64> {
    let walk = WALK.get_ptr_mut(0)?;
    // SAFETY: an element of the map; one CPU runs the benchmark.
    let [packets, last, step] = unsafe { &mut *walk };
    let flow = packets.wrapping_mul(*step) & *last;
    *packets += 1;
    Some(flow)
}

/// Where `length` bytes of the frame are.
#[inline(always)]
fn frame(context: &XdpContext, length: usize) -> Option<usize> {
    // SAFETY: the program's context.
    let md = unsafe { &*context.as_ptr().cast::<aya_ebpf::bindings::xdp_md>() };
    let (start, end) = (md.data as usize, md.data_end as usize);
    (start + length <= end).then_some(start)
}

#[inline(always)]
fn write4(context: &XdpContext) -> Option<()> {
    let start = frame(context, COPY + PORTS4 + 4)?;
    let flow = next_flow()?;
    copy::<u64>(start + ADDRESSES4, flow >> 16 << 24);
    copy::<u32>(start + PORTS4, flow as u16 as u32);
    Some(())
}

#[inline(always)]
fn write6(context: &XdpContext) -> Option<()> {
    let start = frame(context, COPY + PORTS6 + 4)?;
    let flow = next_flow()?;
    copy::<u64>(start + ADDRESSES6, 0);
    copy::<u64>(start + ADDRESSES6 + 8, flow >> 16 << 56);
    copy::<u64>(start + ADDRESSES6 + 16, 0);
    copy::<u64>(start + ADDRESSES6 + 24, 0);
    copy::<u32>(start + PORTS6, flow as u16 as u32);
    Some(())
}

/// Writes a word of the second copy over that of the header, with some bits changed.
#[inline(always)]
fn copy<T: core::ops::BitXor<Output = T>>(at: usize, change: T) {
    // SAFETY: `frame` has checked the last byte of the copy, and the header lies before it.
    unsafe {
        let word = ((at + COPY) as *const T).read_unaligned();
        (at as *mut T).write_unaligned(word ^ change);
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
