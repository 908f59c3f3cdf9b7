//! Reads and rewrites packets: bounds-checked, the only place besides `maps.rs` that touches
//! pointers. [`Xdp`] updates checksums itself (RFC 1624); [`Skb`] leaves it to the kernel's
//! helpers, which know about partial and complete checksums and segmentation.

use core::ffi::c_void;
use core::mem::size_of;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{__sk_buff, bpf_sock_tuple};
use aya_ebpf::helpers::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_pull_data,
    bpf_skb_store_bytes, bpf_xdp_get_buff_len,
};
use aya_ebpf::programs::{TcContext, XdpContext};
use purelb_common::csum;
use purelb_common::parse::{Frame, Ip, TCP};

use crate::maps::{silent, uplink_mac};

/// An address and port before and after, host-order ports.
#[repr(C, align(8))]
pub struct Change<A> {
    /// As it came.
    pub old: A,
    /// As it shall be.
    pub new: A,
    /// As it came.
    pub old_port: u16,
    /// As it shall be.
    pub new_port: u16,
}

/// Which end of the flow changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Replies: the source.
    Source,
    /// Requests: the destination.
    Destination,
}

/// A packet in a program's context.
pub trait Packet: Frame {
    /// Changes one end of the flow with all checksums. `at`: network header, `transport`: its payload.
    fn rewrite<A: Ip, const PROTO: u16>(
        &self,
        at: usize,
        transport: usize,
        side: Side,
        change: &Change<A>,
    ) -> Option<()>;
    /// The context, for helpers.
    fn context(&self) -> *mut c_void;
    /// The uplink.
    fn ifindex(&self) -> u32;
    /// The frame is for another host (promiscuous mode).
    fn other_host(&self) -> bool;
}

#[inline(always)]
fn read<const N: usize>(data: usize, end: usize, offset: usize) -> Option<[u8; N]> {
    Some(*at::<N>(data, end, offset)?)
}

#[inline(always)]
fn at<'a, const N: usize>(data: usize, end: usize, offset: usize) -> Option<&'a mut [u8; N]> {
    // The verifier wants the offset bounded before it is added to a packet pointer.
    if offset > 2048 || data + offset + N > end {
        return None;
    }
    // SAFETY: the bytes lie between data and data_end, checked just above.
    Some(unsafe { &mut *((data + offset) as *mut [u8; N]) })
}

/// Stores a word, as it is in memory, at a constant offset.
#[inline(always)]
fn put<T, const N: usize>(header: &mut [u8; N], offset: usize, word: T) {
    if offset + size_of::<T>() <= N {
        // SAFETY: inside the array, by the line above.
        unsafe { header.as_mut_ptr().add(offset).cast::<T>().write_unaligned(word) };
    }
}

#[inline(always)]
fn get<const N: usize>(header: &[u8; N], offset: usize) -> u16 {
    if offset + 2 > N {
        return 0;
    }
    // SAFETY: inside the array, by the line above.
    unsafe { header.as_ptr().add(offset).cast::<u16>().read_unaligned() }
}

/// Updates a checksum and gives it back.
#[inline(always)]
fn update<const N: usize>(header: &mut [u8; N], offset: usize, delta: u64) -> u16 {
    let sum = csum::apply(get(header, offset), delta);
    put(header, offset, sum);
    sum
}

const fn address_offset(family: u16, side: Side) -> usize {
    match (family, side) {
        (4, Side::Source) => 12,
        (4, Side::Destination) => 16,
        (_, Side::Source) => 8,
        (_, Side::Destination) => 24,
    }
}

const fn checksum_offset(proto: u16) -> usize {
    if proto == TCP as u16 { 16 } else { 6 }
}

/// XDP: the driver's buffer.
pub struct Xdp(pub XdpContext);

/// Both ends of the packet. Volatile, or LLVM loads them in a caller and passes them on, and a
/// function the verifier looks at must get them from the context itself.
macro_rules! bounds {
    ($context:expr) => {{
        // SAFETY: the program's context, valid for the whole run.
        let data = unsafe { core::ptr::read_volatile(&raw const (*$context).data) };
        // SAFETY: as above.
        let end = unsafe { core::ptr::read_volatile(&raw const (*$context).data_end) };
        (data as usize, end as usize)
    }};
}

impl Frame for Xdp {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let (data, end) = bounds!(self.0.ctx);
        read(data, end, offset)
    }
    #[inline(always)]
    fn holds(&self, length: usize) -> bool {
        let (data, end) = bounds!(self.0.ctx);
        // SAFETY: a helper on the program's context. Only a frame of several buffers has more than the first.
        length <= end - data || length as u64 <= unsafe { bpf_xdp_get_buff_len(self.0.ctx) }
    }
}

impl Packet for Xdp {
    #[inline(always)]
    fn rewrite<A: Ip, const PROTO: u16>(
        &self,
        network: usize,
        transport: usize,
        side: Side,
        c: &Change<A>,
    ) -> Option<()> {
        let (data, end) = bounds!(self.0.ctx);
        let ((old0, old1), (new0, new1)) = (c.old.words(), c.new.words());
        let mut delta = csum::delta(old0, new0);
        let first = address_offset(A::FAMILY, side);
        // One check per header: the verifier forgets a range when a second pointer is made of the same offset.
        if A::FAMILY == 4 {
            let header: &mut [u8; 20] = at(data, end, network)?;
            update(header, 10, delta);
            put(header, first, new0 as u32);
        } else {
            delta += csum::delta(old1, new1);
            let header: &mut [u8; 40] = at(data, end, network)?;
            put(header, first, new0);
            put(header, first + 8, new1);
        }
        let new_port = c.new_port.to_be();
        delta += csum::delta(u64::from(c.old_port.to_be()), u64::from(new_port));
        let port = if side == Side::Source { 0 } else { 2 };
        if PROTO == TCP as u16 {
            let header: &mut [u8; 20] = at(data, end, transport)?;
            update(header, 16, delta);
            put(header, port, new_port);
        } else {
            let header: &mut [u8; 8] = at(data, end, transport)?;
            // A UDP checksum of 0 means none (RFC 768); a computed 0 is sent as all ones.
            if get(header, 6) != 0 && update(header, 6, delta) == 0 {
                put(header, 6, 0xffff_u16);
            }
            put(header, port, new_port);
        }
        Some(())
    }
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.0.as_ptr()
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.0.ingress_ifindex() as u32
    }
    #[inline(always)]
    fn other_host(&self) -> bool {
        let (Some(mac), Some([a, b, c, d, e, f])) = (uplink_mac(self.ifindex()), self.load(0)) else { return false };
        // Broadcast and multicast frames have the lowest bit of the first byte set.
        let other = a & 1 == 0 && u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) != mac;
        // Without an agent nobody would tell the program that the device has got this address.
        other && !silent()
    }
}

/// tcx: the kernel's buffer, headers made linear first.
pub struct Skb(pub TcContext);

/// The longest headers that are looked at: Ethernet with a tag, IPv6 with extensions, TCP.
const HEADERS: u32 = 192;
const BPF_F_RECOMPUTE_CSUM: u64 = 1;
const BPF_F_INVALIDATE_HASH: u64 = 2;
const BPF_F_PSEUDO_HDR: u64 = 16;
const BPF_F_MARK_MANGLED_0: u64 = 32;
const PACKET_OTHERHOST: u32 = 3;

impl Skb {
    /// Makes the headers readable by direct access.
    #[inline(always)]
    pub fn new(context: TcContext) -> Self {
        let (data, end) = bounds!(context.skb.skb);
        let linear = (end - data) as u32;
        let want = if context.len() < HEADERS { context.len() } else { HEADERS };
        if linear < want {
            // SAFETY: the context's own buffer. A failure leaves less to read, which parsing notices.
            unsafe { bpf_skb_pull_data(context.skb.skb, want) };
        }
        Self(context)
    }

    #[inline(always)]
    fn store<const N: usize>(&self, offset: usize, bytes: &[u8; N], flags: u64) -> Option<()> {
        #[repr(align(8))]
        struct Aligned<T>(T);
        // LLVM writes arrays as words, and the verifier wants those aligned on the stack.
        let aligned = Aligned(*bytes);
        // SAFETY: N bytes of a live array.
        let code =
            unsafe { bpf_skb_store_bytes(self.0.skb.skb, offset as u32, aligned.0.as_ptr().cast(), N as u32, flags) };
        (code == 0).then_some(())
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let (data, end) = bounds!(self.0.skb.skb);
        read(data, end, offset)
    }
    #[inline(always)]
    fn holds(&self, length: usize) -> bool {
        length <= self.0.len() as usize
    }
}

impl Packet for Skb {
    /// A frame of its own: the helpers want what they store on the stack.
    #[inline(never)]
    fn rewrite<A: Ip, const PROTO: u16>(
        &self,
        network: usize,
        transport: usize,
        side: Side,
        c: &Change<A>,
    ) -> Option<()> {
        let skb = self.0.skb.skb;
        let sum = (transport + checksum_offset(PROTO)) as u32;
        let udp = if PROTO == TCP as u16 { 0 } else { BPF_F_MARK_MANGLED_0 };
        let ((old0, old1), (new0, new1)) = (c.old.words(), c.new.words());
        let words = [(old0, new0), (old0 >> 32, new0 >> 32), (old1, new1), (old1 >> 32, new1 >> 32)];
        for (from, to) in words.into_iter().take(size_of::<A>() / 4) {
            let (from, to) = (u64::from(from as u32), u64::from(to as u32));
            if A::FAMILY == 4 {
                // SAFETY: helper on the context's own buffer; it checks the offset.
                unsafe { bpf_l3_csum_replace(skb, (network + 10) as u32, from, to, 4) };
            }
            // SAFETY: as above.
            unsafe { bpf_l4_csum_replace(skb, sum, from, to, BPF_F_PSEUDO_HDR | udp | 4) };
        }
        let (old_port, new_port) = (c.old_port.to_be(), c.new_port.to_be());
        // SAFETY: as above.
        unsafe { bpf_l4_csum_replace(skb, sum, u64::from(old_port), u64::from(new_port), udp | 2) };
        let offset = network + address_offset(A::FAMILY, side);
        if A::FAMILY == 4 {
            self.store(offset, &(new0 as u32).to_ne_bytes(), BPF_F_INVALIDATE_HASH)?;
        } else {
            // IPv6 has no header checksum that would cancel the address in a complete checksum: the
            // pseudo-header update above took the difference out of skb->csum, this puts it back.
            self.store(offset, &c.new.wide(), BPF_F_INVALIDATE_HASH | BPF_F_RECOMPUTE_CSUM)?;
        }
        self.store(
            transport + if side == Side::Source { 0 } else { 2 },
            &c.new_port.to_be_bytes(),
            BPF_F_INVALIDATE_HASH,
        )
    }
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.0.as_ptr()
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        let skb: *mut __sk_buff = self.0.skb.skb;
        // SAFETY: the program's context.
        unsafe { (*skb).ifindex }
    }
    #[inline(always)]
    fn other_host(&self) -> bool {
        let skb: *mut __sk_buff = self.0.skb.skb;
        // SAFETY: the program's context.
        let other = unsafe { (*skb).pkt_type == PACKET_OTHERHOST };
        // A port of a bridge gets frames for the bridge's address: the agent says where it counts.
        other && uplink_mac(self.ifindex()).is_some()
    }
}

/// A UDP socket of the node takes packets of this flow (the node's own query from the VIP).
#[inline(never)]
pub fn own_udp_socket<A: Ip, P: Packet>(packet: &P, client: A, vip: A, client_port: u16, port: u16) -> bool {
    #[repr(align(8))]
    struct Aligned(bpf_sock_tuple);
    // SAFETY: all zero is a valid tuple; it is filled below.
    let mut aligned: Aligned = unsafe { core::mem::zeroed() };
    let tuple = &mut aligned.0;
    let (source, destination) = (client.wide(), vip.wide());
    let size = if A::FAMILY == 4 {
        tuple.__bindgen_anon_1.ipv4.saddr = u32::from_ne_bytes([source[0], source[1], source[2], source[3]]);
        tuple.__bindgen_anon_1.ipv4.daddr =
            u32::from_ne_bytes([destination[0], destination[1], destination[2], destination[3]]);
        tuple.__bindgen_anon_1.ipv4.sport = client_port.to_be();
        tuple.__bindgen_anon_1.ipv4.dport = port.to_be();
        12
    } else {
        let words = |b: [u8; 16]| {
            let n = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
            [n(0), n(4), n(8), n(12)]
        };
        tuple.__bindgen_anon_1.ipv6.saddr = words(source);
        tuple.__bindgen_anon_1.ipv6.daddr = words(destination);
        tuple.__bindgen_anon_1.ipv6.sport = client_port.to_be();
        tuple.__bindgen_anon_1.ipv6.dport = port.to_be();
        36
    };
    // SAFETY: the tuple lives through the call; -1 is the context's own namespace.
    let socket = unsafe { bpf_sk_lookup_udp(packet.context(), tuple, size, u64::MAX, 0) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the reference that the look-up took.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
