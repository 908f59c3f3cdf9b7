//! A packet socket on one interface, which hears nothing but ARP and neighbour discovery.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, MsgFlags, bind, recv, send};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::Mac;
use crate::bpf::watch_descriptor;

/// No frame of ARP or neighbour discovery that says something to us is longer.
const ROOM: usize = 1536;

/// By protocol (linux/if_ether.h): a socket for all of them would cost every packet that leaves a copy.
const PROTOCOLS: [u16; 2] = [0x0806, 0x86dd];

/// In the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Wire {
    arp: AsyncFd<OwnedFd>,
    ipv6: AsyncFd<OwnedFd>,
    mac: Mac,
}

impl Wire {
    /// Opens it, in a runtime of tokio, with the interface's MAC address of now.
    ///
    /// # Errors
    /// No such interface, or none with Ethernet; `CAP_NET_RAW` is missing.
    pub fn open(interface: &str) -> io::Result<Self> {
        let (address, mac) = link(interface)?;
        let [arp, ipv6] = PROTOCOLS.map(|protocol| open(protocol, &address));
        Ok(Self { arp: arp?, ipv6: ipv6?, mac })
    }

    /// The interface's MAC address when it was opened.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends a frame as it is.
    ///
    /// # Errors
    /// The interface is down or gone.
    pub async fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            let mut ready = self.arp.writable().await?;
            let sent = |fd: &AsyncFd<OwnedFd>| Ok(send(fd.get_ref().as_raw_fd(), frame, MsgFlags::empty())?);
            if let Ok(sent) = ready.try_io(sent) {
                return sent.map(drop);
            }
        }
    }

    /// The next frame that somebody else sent. Loses nothing when it is dropped half-way.
    ///
    /// # Errors
    /// The interface went down or is gone.
    pub async fn recv(&self) -> io::Result<Vec<u8>> {
        tokio::select! { frame = hear(&self.arp) => frame, frame = hear(&self.ipv6) => frame }
    }
}

fn open(protocol: u16, address: &LinkAddr) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(protocol.to_be()))))?;
    socket.set_nonblocking(true)?;
    socket.attach_filter(&filter())?;
    // Without a protocol in the address the socket's own one stays (packet(7)).
    bind(socket.as_raw_fd(), address)?;
    // Until it was bound it heard every interface.
    let mut heard = [0; 1];
    while recv(socket.as_raw_fd(), &mut heard, MsgFlags::empty()).is_ok() {}
    watch_descriptor(socket.into())
}

async fn hear(socket: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    loop {
        let mut frame = vec![0; ROOM];
        let mut ready = socket.readable().await?;
        let heard = |fd: &AsyncFd<OwnedFd>| Ok(recv(fd.get_ref().as_raw_fd(), &mut frame, MsgFlags::empty())?);
        if let Ok(length) = ready.try_io(heard) {
            frame.truncate(length?);
            return Ok(frame);
        }
    }
}

/// Address and MAC address of an interface.
fn link(interface: &str) -> io::Result<(LinkAddr, Mac)> {
    let all = getifaddrs()?.filter(|of| of.interface_name == interface).filter_map(|of| of.address);
    let address = all.into_iter().find_map(|address| address.as_link_addr().copied());
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no interface {interface}"));
    let address = address.ok_or_else(missing)?;
    let other = || io::Error::new(io::ErrorKind::Unsupported, format!("{interface} has no MAC address"));
    let mac = address.addr().filter(|_| address.halen() == 6).ok_or_else(other)?;
    Ok((address, mac))
}

/// ARP, solicitations and advertisements right behind IPv6's header, untagged; and nothing that this node sends itself.
fn filter() -> [SockFilter; 14] {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const EQUAL: u16 = 0x15;
    const GREATER: u16 = 0x25;
    const RETURN: u16 = 0x06;
    // What the kernel knows of the frame beside its bytes (linux/filter.h, linux/if_packet.h). Types above that of multicast
    // are another host's, as which frames with a tag that no device has come, too, and what leaves.
    const PACKET_TYPE: u32 = 0_u32.wrapping_sub(0x1000) + 4;
    const TAGGED: u32 = 0_u32.wrapping_sub(0x1000) + 48;
    const MULTICAST: u32 = 2;
    // Jumps are to the last line, which takes nothing, or to the one before.
    let op = SockFilter::new;
    [
        op(LOAD_WORD, 0, 0, PACKET_TYPE),
        op(GREATER, 11, 0, MULTICAST),
        op(LOAD_WORD, 0, 0, TAGGED),
        op(EQUAL, 0, 9, 0),
        op(LOAD_HALF, 0, 0, 12),
        op(EQUAL, 6, 0, 0x0806),
        op(EQUAL, 0, 6, 0x86dd),
        op(LOAD_BYTE, 0, 0, 14 + 6),
        op(EQUAL, 0, 4, 58),
        op(LOAD_BYTE, 0, 0, 14 + 40),
        op(GREATER, 0, 2, 134),
        op(GREATER, 1, 0, 136),
        op(RETURN, 0, 0, ROOM as u32),
        op(RETURN, 0, 0, 0),
    ]
}
