//! The one unsafe file of the agent: raw bpf(2) calls and the mapped slots.
//!
//! aya has no map batches, falls back to netlink attachments that die with the process, and cannot
//! map an array; everything else of aya is used as it is.
#![expect(unsafe_code, reason = "bpf(2), mmap(2) and membarrier(2) have no safe wrapper; this file is that wrapper")]
#![allow(clippy::multiple_bound_locations, reason = "derives on a packed type need the bound that bytemuck repeats")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya::maps::{MapData, RingBuf};
use bytemuck::{Pod, Zeroable};
use tokio::io::unix::AsyncFd;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Where a program hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP in the driver.
    Xdp,
    /// XDP in the stack.
    XdpGeneric,
    /// tcx ingress.
    Ingress,
    /// tcx egress.
    Egress,
}

/// Key of an LPM trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, packed)]
pub struct TrieKey<D: Pod> {
    /// Significant bits of `data`, counted from its first byte.
    pub bits: u32,
    /// A network, or service and network.
    pub data: D,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct Element {
    fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct ObjectInfo {
    fd: u32,
    length: u32,
    info: u64,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// Calls bpf(2). The pointers inside `attr` must be valid for what the command reads and writes;
/// every caller in this file takes them from slices whose lengths it has compared.
fn bpf<T: Pod>(command: libc::c_int, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is plain data of the size we say, exclusively borrowed; see above for its pointers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn path_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// A map with the sizes the kernel reported, so that no buffer is ever too small.
#[derive(Debug)]
pub struct RawMap {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

impl RawMap {
    /// `key` and `value` are the sizes of the kernel's copies (per-CPU values: of all CPUs together).
    pub const fn new(fd: OwnedFd, key: usize, value: usize) -> Self {
        Self { fd, key, value }
    }

    /// Bytes of one value.
    pub const fn value_size(&self) -> usize {
        self.value
    }

    fn element(&self, key: &[u8], value: u64) -> io::Result<Element> {
        if key.len() != self.key {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Element { fd: number(self.fd.as_fd()), pad: 0, key: key.as_ptr() as u64, value, flags: 0 })
    }

    /// Reads the value of a key into `value`; false: no such key.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        if value.len() != self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = self.element(key, value.as_mut_ptr() as u64)?;
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Sets a key.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if value.len() != self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = self.element(key, value.as_ptr() as u64)?;
        bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
    }

    /// Removes a key; false: it was not there.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        let mut attr = self.element(key, 0)?;
        match bpf(BPF_MAP_DELETE_ELEM, &mut attr) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Calls `each` with every key and value, some thousand per system call.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut room: usize = 4096;
        // The position is a bucket number for hashes and a key for arrays and tries.
        let mut position = vec![0u8; self.key.max(8)];
        let mut next = position.clone();
        let mut first = true;
        loop {
            let mut keys = vec![0u8; room * self.key];
            let mut values = vec![0u8; room * self.value];
            let mut attr = Batch {
                in_batch: if first { 0 } else { position.as_ptr() as u64 },
                out_batch: next.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(room).unwrap_or(u32::MAX),
                fd: number(self.fd.as_fd()),
                elem_flags: 0,
                flags: 0,
            };
            let end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
                Ok(_) => false,
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket of the hash holds more entries than there is room for.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => {
                    room *= 2;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let count = attr.count as usize;
            for (key, value) in keys.chunks_exact(self.key).zip(values.chunks_exact(self.value)).take(count) {
                each(key, value);
            }
            if end {
                return Ok(());
            }
            std::mem::swap(&mut position, &mut next);
            first = false;
        }
    }
}

/// Opens a pinned object.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let name = path_of(path)?;
    let mut attr = Object { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    owned(bpf(BPF_OBJ_GET, &mut attr)?)
}

/// Pins an object.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = path_of(path)?;
    let mut attr = Object { path: name.as_ptr() as u64, fd: number(fd), flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Attaches a program by a bpf link; tcx programs go in front of all others.
pub fn link_create(program: BorrowedFd<'_>, ifindex: u32, hook: Hook) -> io::Result<OwnedFd> {
    let (attach_type, flags) = match hook {
        Hook::Xdp => (37, XDP_FLAGS_DRV_MODE),
        Hook::XdpGeneric => (37, XDP_FLAGS_SKB_MODE),
        Hook::Ingress => (46, BPF_F_BEFORE),
        Hook::Egress => (47, BPF_F_BEFORE),
    };
    let mut attr = LinkCreate {
        prog_fd: number(program),
        ifindex,
        attach_type,
        flags,
        relative_fd: 0,
        pad: 0,
        expected_revision: 0,
    };
    owned(bpf(BPF_LINK_CREATE, &mut attr)?)
}

/// Swaps the program of a link at once.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate { link_fd: number(link), prog_fd: number(program), flags: 0, old_prog_fd: 0 };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link now; to unlink its pin alone lets the kernel do it some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut number(link)).map(drop)
}

/// Index of the interface that a link hangs on; 0 when the interface is gone.
pub fn link_ifindex(link: BorrowedFd<'_>) -> io::Result<u32> {
    // struct bpf_link_info: type, id, prog_id, padding, then the ifindex for both XDP and tcx.
    let mut info = [0u32; 16];
    let mut attr = ObjectInfo { fd: number(link), length: 64, info: info.as_mut_ptr() as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let [_, _, _, _, ifindex, ..] = info;
    Ok(ifindex)
}

/// Runs a program once on an empty packet.
pub fn test_run(program: BorrowedFd<'_>) -> io::Result<u32> {
    let packet = [0u8; 64];
    let mut attr = TestRun {
        prog_fd: number(program),
        retval: 0,
        data_size_in: 64,
        data_size_out: 0,
        data_in: packet.as_ptr() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Waits until every program that runs now has ended (an RCU grace period).
pub fn synchronize() {
    // SAFETY: membarrier takes three integers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Not there with nohz_full; no program runs that long.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Whether a path lies on a bpf file system.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    let name = path_of(path)?;
    // SAFETY: all-zero bytes are a valid statfs.
    let mut buffer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `name` ends with a zero byte and `buffer` is exclusively borrowed.
    if unsafe { libc::statfs(name.as_ptr(), &raw mut buffer) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(buffer.f_type & 0xffff_ffff == BPF_FS_MAGIC)
}

/// Registers a ring buffer with tokio.
pub fn watch(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: the ring owns its map's descriptor and returns the same one as long as it lives.
    unsafe { AsyncFd::register(ring) }.map_err(Into::into)
}

/// Registers a socket or a timer with tokio.
pub fn watch_descriptor(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same one as long as it lives.
    unsafe { AsyncFd::register(descriptor) }.map_err(Into::into)
}

/// CPUs that per-CPU maps have a value for.
pub fn possible_cpus() -> io::Result<usize> {
    aya::util::nr_cpus().map_err(|(_, e)| e)
}

/// A map of words that programs read while we store them, each at once: `FENCE`, and `SLOTS`, where they store halves of the
/// same words. Blocks are mapped into memory for as long as they are read or written; all of `SLOTS` at once would count
/// as 64 MiB of ours.
#[derive(Debug)]
pub struct Words {
    fd: OwnedFd,
    count: u32,
    page: u64,
}

/// Some words in memory.
struct Window {
    base: *mut libc::c_void,
    bytes: usize,
    words: *const AtomicU64,
    count: usize,
}

impl Words {
    /// `count` words of 8 bytes.
    pub fn new(fd: OwnedFd, count: u32) -> Self {
        // SAFETY: sysconf takes a number and touches no memory.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        Self { fd, count, page: u64::try_from(page).unwrap_or(4096).max(1) }
    }

    /// Number of words.
    pub const fn len(&self) -> u32 {
        self.count
    }

    fn window(&self, first: u32, count: u32) -> io::Result<Window> {
        if first.checked_add(count).is_none_or(|end| end > self.count) || count == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = u64::from(first) * 8;
        let start = from - from % self.page;
        let end = (from + u64::from(count) * 8).next_multiple_of(self.page);
        let bytes = usize::try_from(end - start).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(start).map_err(io::Error::other)?;
        let skip = usize::try_from(from - start).map_err(io::Error::other)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = self.fd.as_raw_fd();
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: inside the mapping: `skip` and the slots end before `bytes`.
        let words = unsafe { base.cast::<u8>().add(skip) }.cast::<AtomicU64>().cast_const();
        Ok(Window { base, bytes, words, count: count as usize })
    }

    /// Each word by one load.
    pub fn load(&self, first: u32, count: u32) -> io::Result<Vec<u64>> {
        Ok(self.window(first, count)?.words().iter().map(|w| w.load(Ordering::Acquire)).collect())
    }

    /// Stores whole words, the first one first; slots only in blocks that no program reads yet.
    pub fn store(&self, first: u32, values: impl ExactSizeIterator<Item = u64>) -> io::Result<()> {
        let window = self.window(first, u32::try_from(values.len()).map_err(io::Error::other)?)?;
        window.words().iter().zip(values).for_each(|(w, value)| w.store(value, Ordering::Release));
        Ok(())
    }

    /// Stores the agent's halves; the program's (stamps) stay.
    pub fn store_halves(&self, first: u32, halves: &[u32]) -> io::Result<()> {
        const { assert!(cfg!(target_endian = "little"), "the agent's half is the first one in memory") };
        let window = self.window(first, u32::try_from(halves.len()).map_err(io::Error::other)?)?;
        for (word, half) in window.words().iter().zip(halves) {
            // SAFETY: the first half of an aligned word inside the mapping. The halves are stored by
            // different writers on purpose; neither side ever stores the other's.
            unsafe { AtomicU32::from_ptr(word.as_ptr().cast::<u32>()) }.store(*half, Ordering::Release);
        }
        Ok(())
    }
}

impl Window {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `count` aligned words inside the mapping, which lives as long as `self` and is shared with
        // the kernel: only ever touched atomically.
        unsafe { std::slice::from_raw_parts(self.words, self.count) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `window`, and nobody borrows from it any more.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}
