//! Frames as they come over a link, and whether their checksums are right.
//!
//! A packet socket sees unfinished checksums where the sender left them to the next device; so the link's
//! sending end must have transmit offload off (`Netns::offload`), then the kernel completes every frame from
//! what the programs made of it.

use std::fmt;
use std::io::Read as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// All protocols, big-endian as packet sockets want it.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
/// The longest frame of an Ethernet link.
const FRAME: usize = 1514;

/// What was seen.
#[derive(Clone, Default)]
pub struct Tally {
    /// TCP segments.
    pub tcp: usize,
    /// UDP datagrams.
    pub udp: usize,
    /// Frames that no wire could carry: segments that were never cut.
    pub giants: usize,
    /// Every frame with a wrong checksum, in words.
    pub wrong: Vec<String>,
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tcp, udp, giants, wrong } = self;
        write!(f, "{tcp} TCP, {udp} UDP, {giants} longer than a frame, {} wrong", wrong.len())?;
        wrong.iter().take(5).try_for_each(|one| write!(f, "\n  {one}"))
    }
}

impl Tally {
    /// Looks at one Ethernet frame if it is for one of `to`.
    pub fn add(&mut self, frame: &[u8], to: &[IpAddr]) {
        let Some((network, source, destination, protocol, payload)) = ip(frame) else { return };
        if !to.contains(&destination.into()) {
            return;
        }
        let transport = match protocol {
            IpProtocol::Tcp => {
                self.tcp += 1;
                TcpPacket::new_checked(payload).is_ok_and(|tcp| tcp.verify_checksum(&source, &destination))
            }
            IpProtocol::Udp => {
                self.udp += 1;
                // None at all would be allowed in IPv4, but no sender here leaves it out.
                let good = |udp: UdpPacket<&[u8]>| udp.checksum() != 0 && udp.verify_checksum(&source, &destination);
                UdpPacket::new_checked(payload).is_ok_and(good)
            }
            _ => return,
        };
        self.giants += usize::from(frame.len() > FRAME);
        if !network || !transport {
            let part = if network { "transport" } else { "IP" };
            self.wrong.push(format!("{part} checksum, {protocol} {source} to {destination}, {} bytes", frame.len()));
        }
    }

    /// All were right, and there were at least that many of each.
    pub fn check(&self, tcp: usize, udp: usize) -> Result<()> {
        ensure!(self.wrong.is_empty() && self.giants == 0, "on the wire: {self:?}");
        ensure!(self.tcp >= tcp && self.udp >= udp, "fewer frames than {tcp} TCP and {udp} UDP: {self:?}");
        Ok(())
    }
}

/// IP header's checksum is right, source, destination, protocol, payload; nothing for what is no IP.
fn ip(frame: &[u8]) -> Option<(bool, IpAddress, IpAddress, IpProtocol, &[u8])> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
            Some((ip.verify_checksum(), ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload()))
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            Some((true, ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload()))
        }
        _ => None,
    }
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Tally>,
}

impl Capture {
    /// Looks at every frame in the namespace whose destination is one of `to`.
    pub fn start(netns: &Netns, to: &[IpAddr]) -> Result<Self> {
        let socket = netns.enter(|| -> std::io::Result<Socket> {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ETH_P_ALL))))?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            Ok(socket)
        })?;
        let mut socket = socket.context("open a packet socket")?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, to) = (Arc::clone(&stop), to.to_vec());
        let thread = thread::spawn(move || {
            let (mut tally, mut buffer) = (Tally::default(), vec![0; 1 << 17]);
            loop {
                match socket.read(&mut buffer) {
                    Ok(length) => tally.add(buffer.get(..length).unwrap_or_default(), &to),
                    // What had come before the stop was read.
                    Err(_) if flag.load(Ordering::Relaxed) => return tally,
                    Err(_) => {}
                }
            }
        });
        Ok(Self { stop, thread })
    }

    /// Ends it.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture's thread panicked"))
    }
}
