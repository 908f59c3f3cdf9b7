//! Servers of a pod: threads inside its namespace, TCP and UDP, IPv4 and IPv6 on one socket.
//!
//! TCP speaks lines: `NAME` answers the pod's name, `PEER` the client's address, `ECHO n` + n bytes
//! the same bytes, `RECV n` + n bytes `OK`, `SEND n` n bytes, `PUSH` a line every 20 ms for ever,
//! `GET …` an HTTP/1.1 keep-alive response with the name. UDP answers `NAME PEER payload`, to `LATER n` after
//! n seconds.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use crate::netns::Netns;

/// Running servers of one pod; they end when this is dropped.
#[derive(Debug)]
pub struct Servers {
    stop: Arc<AtomicBool>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Starts TCP and UDP servers at `ports` and returns when all are bound.
pub fn start(netns: &Netns, name: &str, ports: &[u16]) -> Result<Servers> {
    let stop = Arc::new(AtomicBool::new(false));
    for &port in ports {
        let bound = netns.enter(move || -> io::Result<(TcpListener, UdpSocket)> {
            let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?))
        })?;
        let (tcp, udp) = bound.with_context(|| format!("bind port {port} in {}", netns.name()))?;
        tcp.set_nonblocking(true)?;
        // Bursts of several clients wait here while the thread has no CPU.
        setsockopt(&udp, sockopt::RcvBufForce, &(4 << 20))?;
        udp.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (tcp_name, tcp_stop) = (name.to_owned(), Arc::clone(&stop));
        thread::spawn(move || accept(&tcp, &tcp_name, &tcp_stop));
        let (udp_name, udp_stop) = (name.to_owned(), Arc::clone(&stop));
        thread::spawn(move || answer(&udp, &udp_name, &udp_stop));
    }
    Ok(Servers { stop })
}

fn accept(listener: &TcpListener, name: &str, stop: &Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, peer)) => {
                let (name, stop) = (name.to_owned(), Arc::clone(stop));
                // A client that goes away is the client's business.
                thread::spawn(move || drop(serve(&stream, peer, &name, &stop)));
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn serve(stream: &TcpStream, peer: SocketAddr, name: &str, stop: &AtomicBool) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    let mut line = String::new();
    while !stop.load(Ordering::Relaxed) {
        match reader.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // What has come of the line so far stays in `line`.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(error) => return Err(error),
        }
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let count: usize = rest.parse().unwrap_or(0);
        match word {
            "NAME" => writeln!(writer, "{name}")?,
            "PEER" => writeln!(writer, "{}", peer.ip().to_canonical())?,
            "ECHO" => {
                let mut bytes = vec![0; count];
                reader.read_exact(&mut bytes)?;
                writer.write_all(&bytes)?;
            }
            "RECV" => {
                io::copy(&mut (&mut reader).take(count as u64), &mut io::sink())?;
                writeln!(writer, "OK")?;
            }
            "SEND" => {
                io::copy(&mut io::repeat(b'x').take(count as u64), &mut writer)?;
            }
            "PUSH" => {
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    writeln!(writer, "{number} {name}")?;
                    number += 1;
                    thread::sleep(Duration::from_millis(20));
                }
            }
            "GET" => http(&mut reader, writer, name)?,
            _ => return Ok(()),
        }
        line.clear();
    }
    Ok(())
}

fn http(reader: &mut impl BufRead, mut writer: impl Write, name: &str) -> io::Result<()> {
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let response =
        format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{name}\n", name.len() + 1);
    writer.write_all(response.as_bytes())
}

fn answer(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let mut reply = format!("{name} {} ", peer.ip().to_canonical()).into_bytes();
        let payload = buffer.get(..length).unwrap_or_default();
        reply.extend(payload);
        let later = payload.strip_prefix(b"LATER ").and_then(|n| str::from_utf8(n).ok()?.parse().ok());
        match (later, socket.try_clone()) {
            (Some(seconds), Ok(socket)) => drop(thread::spawn(move || {
                thread::sleep(Duration::from_secs(seconds));
                drop(socket.send_to(&reply, peer));
            })),
            _ => drop(socket.send_to(&reply, peer)),
        }
    }
}
