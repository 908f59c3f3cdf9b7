//! A port of a VIP that no Service has: is the packet a reply to the node itself?

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use purelb_common::decide::{self, Flow};
use purelb_common::hash::Address;
use purelb_common::verdict::Reason;
use purelb_plan::world::Protocol;

use super::Packet;

/// As the program decides it.
pub(super) fn reason<A: Address>(packet: &Packet<'_>, flow: &Flow<A>, flags: u32, steps: &mut Vec<String>) -> Reason {
    let (low, high) = (packet.config.local_port_min, packet.config.local_port_max);
    let place = if (low..=high).contains(&u32::from(flow.port)) { "in" } else { "outside of" };
    steps.push(format!("port {} is {place} the node's own range {low} to {high}", flow.port));
    let mut socket = None;
    let proto = if packet.protocol == Protocol::Tcp { 6 } else { 17 };
    let reason = decide::unknown(&packet.config, flags, flow, proto, || *socket.insert(own(packet)));
    match (reason, socket) {
        (Reason::PassedOwn, None) => {
            steps.push("the packet opens no connection: it may belong to one that the node opened".to_owned());
        }
        (_, Some(true)) => steps.push("a UDP socket of this network namespace takes it".to_owned()),
        (_, Some(false)) => steps.push("no UDP socket of this network namespace would take it".to_owned()),
        _ => {}
    }
    if reason == Reason::PassedUnknownPort {
        steps.push("unknown ports of this VIP are passed (unknownPorts: Pass, or no room in the tables)".to_owned());
    }
    reason
}

fn own(packet: &Packet<'_>) -> bool {
    let text = |name: &str| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
    socket(&text("udp"), packet.client, packet.vip) || socket(&text("udp6"), packet.client, packet.vip)
}

/// Whether a line of `/proc/net/udp` or `udp6` is a socket that takes packets from `client` to `vip`.
fn socket(lines: &str, client: SocketAddr, vip: SocketAddr) -> bool {
    lines.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1).map(address);
        let (Some(Some(local)), Some(Some(remote))) = (words.next(), words.next()) else { return false };
        let fits = |end: SocketAddr, wanted: SocketAddr| end.ip().is_unspecified() || end.ip() == wanted.ip();
        // A socket of one family never takes the other's, but for `::` that takes both.
        let family = local.is_ipv4() == vip.is_ipv4() || local.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
        let connected = remote.port() != 0;
        local.port() == vip.port()
            && family
            && fits(local, vip)
            && (!connected || remote.port() == client.port() && fits(remote, client))
    })
}

/// `0100007F:0035`: the words of the address as the host stores them, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (addr, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(addr.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match addr.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            IpAddr::from(<[u8; 16]>::try_from(words).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn sockets_of_this_process_are_found() {
        let read = |name: &str| fs::read_to_string(format!("/proc/net/{name}")).unwrap();
        let open = |addr: &str| UdpSocket::bind(addr).unwrap();
        let (bound, wild, v6) = (open("127.0.0.1:0"), open("0.0.0.0:0"), open("[::1]:0"));
        let connected = open("127.0.0.1:0");
        connected.connect("127.0.0.2:4242").unwrap();
        let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
        let client: SocketAddr = "127.0.0.2:4242".parse().unwrap();
        let other: SocketAddr = "127.0.0.3:4242".parse().unwrap();
        let to = |ip: &str, port: u16| SocketAddr::new(ip.parse().unwrap(), port);
        let rows = [
            ("bound", "udp", client, to("127.0.0.1", port(&bound)), true),
            ("another address", "udp", client, to("127.0.0.9", port(&bound)), false),
            ("any address", "udp", client, to("127.0.0.9", port(&wild)), true),
            ("connected to the client", "udp", client, to("127.0.0.1", port(&connected)), true),
            ("connected to another", "udp", other, to("127.0.0.1", port(&connected)), false),
            ("IPv6", "udp6", to("::2", 1), to("::1", port(&v6)), true),
            ("IPv6, another address", "udp6", to("::2", 1), to("::3", port(&v6)), false),
            ("IPv4 at an IPv6 socket", "udp6", client, to("127.0.0.1", port(&v6)), false),
        ];
        for (name, file, client, vip, want) in rows {
            assert_eq!(socket(&read(file), client, vip), want, "{name}");
        }
    }
}
