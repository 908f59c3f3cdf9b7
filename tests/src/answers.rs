//! Asks a network all the time who has an address, by ARP and neighbour solicitations, and keeps what is answered: by
//! whom, when, and how long by nobody.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::socket::{AddressFamily, LinkAddr, SockaddrLike as _, bind};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IPV6_LINK_LOCAL_ALL_NODES, Icmpv6Message, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Address, Ipv6Packet, Ipv6Repr,
    NdiscNeighborFlags, NdiscRepr,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// All protocols, big-endian as packet sockets want it.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
/// A question of each address this often.
const PACE: Duration = Duration::from_millis(10);

/// One answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// When it came.
    pub at: Instant,
    /// About which address.
    pub ip: IpAddr,
    /// Whose it is.
    pub mac: [u8; 6],
    /// Nobody had asked for it: gratuitous ARP, or an unsolicited advertisement.
    pub unasked: bool,
}

/// Asks in the background.
#[derive(Debug)]
pub struct Asker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Answer>>>,
    begun: Instant,
}

/// What was answered.
#[derive(Debug)]
pub struct Answers {
    /// In the order of their coming.
    pub all: Vec<Answer>,
    begun: Instant,
    ended: Instant,
}

impl Asker {
    /// From a device that has an address in the network, about these addresses.
    pub fn start(netns: &Netns, device: &str, of: &[IpAddr]) -> Result<Self> {
        let (device, of) = (device.to_owned(), of.to_vec());
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let (opens, opened) = mpsc::channel();
        let thread = netns.spawn(move || ask(&device, &of, &flag, &opens))?;
        // From here on nothing is missed. Where the socket cannot be opened `finish` says why.
        let _ = opened.recv();
        let thread = thread::spawn(move || thread.join().map_err(|_| anyhow!("the asker panicked"))??);
        Ok(Self { stop, thread, begun: Instant::now() })
    }

    /// Ends it.
    pub fn finish(self) -> Result<Answers> {
        let ended = Instant::now();
        self.stop.store(true, Ordering::Relaxed);
        let all = self.thread.join().map_err(|_| anyhow!("the asker panicked"))??;
        Ok(Answers { all, begun: self.begun, ended })
    }
}

impl Answers {
    fn of(&self, ip: IpAddr) -> impl Iterator<Item = &Answer> {
        self.all.iter().filter(move |answer| answer.ip == ip && !answer.unasked)
    }

    /// Who answered, in order; each as often as it came to answer.
    #[must_use]
    pub fn owners(&self, ip: IpAddr) -> Vec<[u8; 6]> {
        let mut owners: Vec<[u8; 6]> = self.of(ip).map(|answer| answer.mac).collect();
        owners.dedup();
        owners
    }

    /// Times that one answered between two answers of another that lie closer together than this: both had it.
    #[must_use]
    pub fn overlaps(&self, ip: IpAddr, closer: Duration) -> usize {
        let mut last: BTreeMap<[u8; 6], Instant> = BTreeMap::new();
        let mut before: Option<[u8; 6]> = None;
        let mut count = 0;
        for answer in self.of(ip) {
            if before.is_some_and(|before| before != answer.mac)
                && last.get(&answer.mac).is_some_and(|last| answer.at.duration_since(*last) < closer)
            {
                count += 1;
            }
            last.insert(answer.mac, answer.at);
            before = Some(answer.mac);
        }
        count
    }

    /// The longest time without an answer.
    #[must_use]
    pub fn longest_silence(&self, ip: IpAddr) -> Duration {
        let times = std::iter::once(self.begun).chain(self.of(ip).map(|answer| answer.at)).chain([self.ended]);
        let times: Vec<_> = times.collect();
        times.windows(2).map(|two| two[1].saturating_duration_since(two[0])).max().unwrap_or_default()
    }
}

/// Says in the network of that device that an address is at `mac`, as a host does that takes it: by gratuitous ARP, or by an
/// unsolicited advertisement.
pub fn claim(netns: &Netns, device: &str, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
    let device = device.to_owned();
    netns.enter(move || {
        let (mut socket, _, _) = open(&device)?;
        let bytes = announcement(ip, EthernetAddress(mac)).context("no such frame")?;
        socket.write_all(&bytes).context("send it")
    })?
}

fn announcement(ip: IpAddr, mac: EthernetAddress) -> Option<Vec<u8>> {
    match ip {
        IpAddr::V4(ip) => request(mac, ip, ip),
        IpAddr::V6(ip) => {
            let advert = NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::OVERRIDE,
                target_addr: ip,
                lladdr: Some(mac.into()),
            };
            Some(discovery(mac, ip, IPV6_LINK_LOCAL_ALL_NODES, advert))
        }
    }
}

/// A message of neighbour discovery to a multicast group.
fn discovery(mac: EthernetAddress, source: Ipv6Address, group: Ipv6Address, message: NdiscRepr<'_>) -> Vec<u8> {
    let message = Icmpv6Repr::Ndisc(message);
    let ip = Ipv6Repr {
        src_addr: source,
        dst_addr: group,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.buffer_len(),
        hop_limit: 255,
    };
    let [.., a, b, c, d] = group.octets();
    let to = EthernetAddress([0x33, 0x33, a, b, c, d]);
    let mut bytes = frame(mac, to, EthernetProtocol::Ipv6, 40 + message.buffer_len());
    let (_, packet) = bytes.split_at_mut(14);
    ip.emit(&mut Ipv6Packet::new_unchecked(&mut *packet));
    let (_, body) = packet.split_at_mut(40);
    message.emit(&source, &group, &mut Icmpv6Packet::new_unchecked(body), &ChecksumCapabilities::default());
    bytes
}

fn frame(from: EthernetAddress, to: EthernetAddress, kind: EthernetProtocol, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; 14 + length];
    let ethernet = EthernetRepr { src_addr: from, dst_addr: to, ethertype: kind };
    ethernet.emit(&mut EthernetFrame::new_unchecked(&mut bytes));
    bytes
}

/// A packet socket on a device of this namespace, its MAC address and its addresses.
fn open(device: &str) -> Result<(Socket, EthernetAddress, Vec<IpAddr>)> {
    let mut addresses = Vec::new();
    let mut link = None;
    for found in nix::ifaddrs::getifaddrs()?.filter(|found| found.interface_name == device) {
        let Some(address) = found.address else { continue };
        match address.family() {
            Some(AddressFamily::Packet) => link = address.as_link_addr().copied(),
            Some(AddressFamily::Inet) => addresses.extend(address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()))),
            Some(AddressFamily::Inet6) => addresses.extend(address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()))),
            _ => {}
        }
    }
    let link: LinkAddr = link.with_context(|| format!("no device {device}"))?;
    let mac = EthernetAddress(link.addr().context("no MAC address")?);
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ETH_P_ALL))))?;
    bind(socket.as_raw_fd(), &link).context("bind a packet socket")?;
    Ok((socket, mac, addresses))
}

fn ask(device: &str, of: &[IpAddr], stop: &AtomicBool, opens: &mpsc::Sender<()>) -> Result<Vec<Answer>> {
    let (mut socket, mac, addresses) = open(device)?;
    socket.set_nonblocking(true)?;
    let _ = opens.send(());
    let questions: Vec<Vec<u8>> = of.iter().filter_map(|ip| question(*ip, mac, &addresses)).collect();
    let (mut answers, mut next, mut buffer) = (Vec::new(), Instant::now(), vec![0; 2048]);
    loop {
        if Instant::now() >= next {
            if stop.load(Ordering::Relaxed) {
                return Ok(answers);
            }
            for question in &questions {
                // A link that is down takes nothing, which is what shall be seen.
                drop(socket.write(question));
            }
            next = Instant::now() + PACE;
        }
        match socket.read(&mut buffer) {
            Ok(length) => {
                let frame = buffer.get(..length).unwrap_or_default();
                let at = Instant::now();
                let answer = answer(frame).filter(|(_, from, _)| *from != mac.0);
                answers.extend(answer.map(|(ip, mac, unasked)| Answer { at, ip, mac, unasked }));
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// An ARP request; for the sender's own address it is an announcement.
fn request(mac: EthernetAddress, source: Ipv4Addr, target: Ipv4Addr) -> Option<Vec<u8>> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: mac,
        source_protocol_addr: source,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut bytes = frame(mac, EthernetAddress::BROADCAST, EthernetProtocol::Arp, arp.buffer_len());
    arp.emit(&mut ArpPacket::new_unchecked(bytes.get_mut(14..)?));
    Some(bytes)
}

fn question(ip: IpAddr, mac: EthernetAddress, own: &[IpAddr]) -> Option<Vec<u8>> {
    match ip {
        IpAddr::V4(target) => {
            let source = own.iter().find_map(|ip| match ip {
                IpAddr::V4(ip) => Some(*ip),
                IpAddr::V6(_) => None,
            })?;
            request(mac, source, target)
        }
        IpAddr::V6(target) => {
            let source = own.iter().find_map(|ip| match ip {
                IpAddr::V6(ip) if !ip.is_unicast_link_local() => Some(*ip),
                _ => None,
            })?;
            let message = NdiscRepr::NeighborSolicit { target_addr: target, lladdr: Some(mac.into()) };
            Some(discovery(mac, source, solicited(target), message))
        }
    }
}

/// RFC 4291, 2.7.1
fn solicited(ip: Ipv6Address) -> Ipv6Address {
    let low = ip.octets();
    Ipv6Address::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(low[13]), u16::from(low[14]) << 8 | u16::from(low[15]))
}

/// Which address, whose, and whether nobody asked.
fn answer(frame: &[u8]) -> Option<(IpAddr, [u8; 6], bool)> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    match ethernet.ethertype() {
        EthernetProtocol::Arp => {
            let arp = ArpPacket::new_checked(ethernet.payload()).ok()?;
            let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, .. } =
                ArpRepr::parse(&arp).ok()?
            else {
                return None;
            };
            let unasked = ethernet.dst_addr().is_broadcast();
            let counts = operation == ArpOperation::Reply || unasked && source_protocol_addr == target(&arp);
            counts.then_some((source_protocol_addr.into(), source_hardware_addr.0, unasked))
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            let packet =
                (ip.next_header() == IpProtocol::Icmpv6).then(|| Icmpv6Packet::new_checked(ip.payload()))?.ok()?;
            (packet.msg_type() == Icmpv6Message::NeighborAdvert).then(|| {
                let unasked = ip.dst_addr().is_multicast();
                (packet.target_addr().into(), ethernet.src_addr().0, unasked)
            })
        }
        _ => None,
    }
}

fn target(arp: &ArpPacket<&[u8]>) -> std::net::Ipv4Addr {
    let bytes: [u8; 4] = arp.target_protocol_addr().try_into().unwrap_or_default();
    bytes.into()
}
