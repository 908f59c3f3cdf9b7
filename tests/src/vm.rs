//! A virtual machine behind a tap: a network stack of its own whose device is the tap's other end.
//!
//! What the kernel writes to a tap without a vnet header must be complete, so the frames that arrive here
//! show what became of checksums that their senders left unfinished.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TunTapInterface};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use crate::capture::Tally;
use crate::netns::Netns;

/// Where it serves.
pub const PORT: u16 = 8080;
/// How many TCP connections at a time.
const LISTENERS: usize = 16;

/// The tap's end, which looks at every frame on its way in.
struct Watched {
    tap: TunTapInterface,
    own: Vec<IpAddr>,
    tally: Tally,
}

/// A frame that was read.
struct Frame(Vec<u8>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl Device for Watched {
    type RxToken<'a> = Frame;
    type TxToken<'a> = <TunTapInterface as Device>::TxToken<'a>;

    fn receive(&mut self, timestamp: Instant) -> Option<(Frame, Self::TxToken<'_>)> {
        let (rx, tx) = self.tap.receive(timestamp)?;
        let frame = rx.consume(<[u8]>::to_vec);
        self.tally.add(&frame, &self.own);
        Some((Frame(frame), tx))
    }

    fn transmit(&mut self, timestamp: Instant) -> Option<Self::TxToken<'_>> {
        self.tap.transmit(timestamp)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.tap.capabilities()
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Vm {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Result<Tally>>>,
}

impl Vm {
    /// Makes the tap `device` in the node's namespace and starts the machine: TCP and UDP at [`PORT`], in the
    /// words of `servers` (`NAME` and `ECHO` of TCP).
    pub fn start(node: &Netns, device: &str, name: &str, addresses: (Ipv4Addr, Ipv6Addr)) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, device, name) = (Arc::clone(&stop), device.to_owned(), name.to_owned());
        let (ready, made) = mpsc::channel();
        let thread = node.spawn(move || {
            let tap = TunTapInterface::new(&device, Medium::Ethernet).context("make the tap")?;
            let own = vec![addresses.0.into(), addresses.1.into()];
            let mut machine = Machine::new(Watched { tap, own, tally: Tally::default() }, &name, addresses)?;
            // The starter waits for this; if it has gone, so will this thread soon.
            let _ = ready.send(());
            while !flag.load(Ordering::Relaxed) {
                if !machine.turn() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(machine.device.tally)
        })?;
        let machine = Self { stop, thread };
        match made.recv() {
            Ok(()) => Ok(machine),
            Err(_) => machine.finish().and_then(|_| bail!("the machine ended at once")),
        }
    }

    /// Switches it off: what it received.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the machine's thread panicked"))??
    }
}

struct Machine {
    device: Watched,
    interface: Interface,
    sockets: SocketSet<'static>,
    listeners: Vec<(SocketHandle, Speaker)>,
    udp: SocketHandle,
    name: String,
}

impl Machine {
    fn new(mut device: Watched, name: &str, (v4, v6): (Ipv4Addr, Ipv6Addr)) -> Result<Self> {
        let hardware = HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 0x77]));
        let mut interface = Interface::new(Config::new(hardware), &mut device, Instant::now());
        interface.update_ip_addrs(|all| {
            // Room for two is the least that the stack is built with.
            let _ = all.push(IpCidr::new(v4.into(), 24));
            let _ = all.push(IpCidr::new(v6.into(), 64));
        });
        let gateway = Ipv4Addr::new(v4.octets()[0], v4.octets()[1], v4.octets()[2], 1);
        interface.routes_mut().add_default_ipv4_route(gateway).map_err(|_| anyhow!("no room for a route"))?;
        let gateway = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        interface.routes_mut().add_default_ipv6_route(gateway).map_err(|_| anyhow!("no room for a route"))?;
        let mut sockets = SocketSet::new(Vec::new());
        let buffer = || vec![0; 1 << 16];
        let listeners = (0..LISTENERS)
            .map(|_| {
                let socket = tcp::Socket::new(tcp::SocketBuffer::new(buffer()), tcp::SocketBuffer::new(buffer()));
                (sockets.add(socket), Speaker::default())
            })
            .collect();
        let datagrams = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], buffer());
        let mut socket = udp::Socket::new(datagrams(), datagrams());
        socket.bind(PORT).map_err(|error| anyhow!("bind UDP: {error:?}"))?;
        let udp = sockets.add(socket);
        Ok(Self { device, interface, sockets, listeners, udp, name: name.to_owned() })
    }

    /// One round; false when there was nothing to do.
    fn turn(&mut self) -> bool {
        self.interface.poll(Instant::now(), &mut self.device, &mut self.sockets);
        let mut busy = false;
        for (handle, speaker) in &mut self.listeners {
            busy |= speaker.turn(self.sockets.get_mut(*handle), &self.name);
        }
        let socket: &mut udp::Socket = self.sockets.get_mut(self.udp);
        while let Ok((data, from)) = socket.recv() {
            let mut reply = format!("{} {} ", self.name, from.endpoint.addr).into_bytes();
            reply.extend(data);
            // A full buffer loses a datagram, as anywhere.
            let _ = socket.send_slice(&reply, from.endpoint);
            busy = true;
        }
        busy
    }
}

/// The server's side of one TCP connection.
#[derive(Default)]
struct Speaker {
    heard: Vec<u8>,
    /// Bytes of an `ECHO` that are still to come.
    echo: usize,
    answer: Vec<u8>,
}

impl Speaker {
    fn turn(&mut self, socket: &mut tcp::Socket, name: &str) -> bool {
        if !socket.is_open() {
            *self = Self::default();
            return socket.listen(PORT).is_ok();
        }
        let before = self.heard.len();
        while socket.can_recv() {
            let taken = socket.recv(|data| (data.len(), data.to_vec())).unwrap_or_default();
            if taken.is_empty() {
                break;
            }
            self.heard.extend(taken);
        }
        let busy = self.heard.len() > before;
        self.answer(name);
        if !self.answer.is_empty() {
            let sent = socket.send_slice(&self.answer).unwrap_or(0);
            self.answer.drain(..sent);
        } else if socket.state() == tcp::State::CloseWait {
            socket.close();
        }
        busy
    }

    fn answer(&mut self, name: &str) {
        loop {
            let echoed = self.echo.min(self.heard.len());
            self.answer.extend(self.heard.drain(..echoed));
            self.echo -= echoed;
            if self.echo > 0 {
                return;
            }
            let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') else { return };
            let line = String::from_utf8_lossy(&self.heard.drain(..=end).collect::<Vec<_>>()).trim().to_owned();
            match line.split_once(' ') {
                Some(("ECHO", count)) => self.echo = count.parse().unwrap_or(0),
                _ => self.answer.extend(format!("{name}\n").into_bytes()),
            }
        }
    }
}
