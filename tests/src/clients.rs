//! Clients: sockets opened in a client's namespace.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(5);

/// A TCP connection to a pod's server; the peer's address is the address that was dialled (a reply
/// from another source would never complete the handshake).
#[derive(Debug)]
pub struct Conn {
    reader: BufReader<TcpStream>,
}

/// Any address and free port of the target's family.
#[must_use]
pub fn any(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

impl Conn {
    /// Connects from any free port.
    pub fn open(netns: &Netns, to: SocketAddr) -> Result<Self> {
        Self::open_from(netns, any(to), to)
    }

    /// Connects from that address and port.
    pub fn open_from(netns: &Netns, from: SocketAddr, to: SocketAddr) -> Result<Self> {
        Self::open_within(netns, from, to, PATIENCE)
    }

    /// Connects, with a limit of its own.
    pub fn open_within(netns: &Netns, from: SocketAddr, to: SocketAddr, limit: Duration) -> Result<Self> {
        let stream = netns.enter(move || -> std::io::Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if from.port() != 0 {
                socket.set_reuse_address(true)?;
            }
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), limit)?;
            Ok(socket.into())
        })?;
        let stream = stream.with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// This side's address and port.
    pub fn local(&self) -> Result<SocketAddr> {
        Ok(self.reader.get_ref().local_addr()?)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.reader.get_mut().write_all(bytes).context("send")
    }

    pub(crate) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line).context("receive")? > 0, "the peer closed the connection");
        Ok(line.trim_end().to_owned())
    }

    /// One command, one line back (`NAME`, `PEER`).
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.send(format!("{command}\n").as_bytes())?;
        self.line()
    }

    /// The same with a limit of its own.
    pub fn ask_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.set_patience(limit)?;
        let answer = self.ask(command);
        self.set_patience(PATIENCE)?;
        answer
    }

    /// How long it waits for bytes from now on.
    pub fn set_patience(&self, limit: Duration) -> Result<()> {
        self.reader.get_ref().set_read_timeout(Some(limit)).context("set a timeout")
    }

    /// Sends that many bytes and wants the same back.
    pub fn echo(&mut self, length: usize) -> Result<()> {
        let mut sent = format!("ECHO {length}\n").into_bytes();
        let header = sent.len();
        sent.extend((0_u8..251).cycle().take(length));
        self.send(&sent)?;
        let mut back = vec![0; length];
        self.reader.read_exact(&mut back).context("receive the echo")?;
        ensure!(sent.get(header..) == Some(back.as_slice()), "the echo of {length} bytes differs");
        Ok(())
    }

    /// Moves that many bytes up, then down.
    pub fn bulk(&mut self, length: usize) -> Result<()> {
        self.send(format!("RECV {length}\n").as_bytes())?;
        self.send(&vec![b'y'; length])?;
        ensure!(self.line()? == "OK", "bulk upload was not confirmed");
        self.send(format!("SEND {length}\n").as_bytes())?;
        let mut back = vec![0; length];
        self.reader.read_exact(&mut back).context("receive bulk")?;
        ensure!(back.iter().all(|byte| *byte == b'x'), "bulk download differs");
        Ok(())
    }

    /// One HTTP request on the open connection: the body's line.
    pub fn http(&mut self) -> Result<String> {
        self.send(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        ensure!(self.line()?.contains("200"), "HTTP status is not 200");
        while !self.line()?.is_empty() {}
        self.line()
    }
}

/// Opens `count` connections and counts which pod answered.
pub fn spread(netns: &Netns, to: SocketAddr, count: usize) -> Result<BTreeMap<String, usize>> {
    let mut found = BTreeMap::new();
    for number in 0..count {
        let name = Conn::open(netns, to)
            .and_then(|mut conn| conn.ask("NAME"))
            .with_context(|| format!("client {number} of {count} to {to}"))?;
        *found.entry(name).or_default() += 1;
    }
    Ok(found)
}

/// One UDP question: pod's name and the client address it saw.
pub fn udp(netns: &Netns, to: SocketAddr, length: usize) -> Result<(String, IpAddr)> {
    let socket = netns.enter(move || UdpSocket::bind(any(to)))??;
    udp_on(&socket, to, length)
}

/// The same on an open socket, which may stay bound for the next question.
pub fn udp_on(socket: &UdpSocket, to: SocketAddr, length: usize) -> Result<(String, IpAddr)> {
    udp_within(socket, to, length, Duration::from_secs(2))
}

/// The same with a limit of its own.
pub fn udp_within(socket: &UdpSocket, to: SocketAddr, length: usize, limit: Duration) -> Result<(String, IpAddr)> {
    socket.set_read_timeout(Some(limit))?;
    let payload = vec![b'u'; length];
    socket.send_to(&payload, to).with_context(|| format!("send to {to}"))?;
    let mut buffer = vec![0; 65_536];
    let (size, from) = socket.recv_from(&mut buffer).with_context(|| format!("no UDP answer from {to}"))?;
    ensure!(from == to, "the answer came from {from}, not from {to}");
    let text = String::from_utf8_lossy(buffer.get(..size).unwrap_or_default()).into_owned();
    let mut words = text.splitn(3, ' ');
    let (name, peer, echo) = (words.next(), words.next(), words.next());
    ensure!(echo.map(str::as_bytes) == Some(&payload), "the UDP echo differs");
    Ok((name.unwrap_or_default().to_owned(), peer.unwrap_or_default().parse()?))
}
