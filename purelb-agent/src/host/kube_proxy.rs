//! Is kube-proxy here? It answers health checks on port 10256 of every address or of loopback.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::args::Choice;

const PORT: u16 = 10_256;
/// A loopback address answers at once or never.
const LIMIT: Duration = Duration::from_millis(200);
/// How often it is looked for until it is found.
const EVERY: Duration = Duration::from_secs(5);

/// Whether kube-proxy serves this node. Once found it stays found, by the next agent too: its rules outlive
/// its process.
#[derive(Debug)]
pub struct KubeProxy {
    choice: Choice,
    found: bool,
    looked: Option<Instant>,
}

impl KubeProxy {
    /// As the command line says; `found`: an agent before this one found it.
    #[must_use]
    pub const fn new(choice: Choice, found: bool) -> Self {
        Self { choice, found, looked: None }
    }

    /// It is here, or was. Cheap enough for every look; blocks for a moment where packets to loopback are lost.
    pub fn here(&mut self) -> bool {
        match self.choice {
            Choice::Yes => true,
            Choice::No => false,
            Choice::Auto => {
                if !self.found && self.looked.is_none_or(|looked| looked.elapsed() >= EVERY) {
                    self.found = answers(PORT);
                    self.looked = Some(Instant::now());
                }
                self.found
            }
        }
    }
}

fn answers(port: u16) -> bool {
    let loopback: [SocketAddr; 2] = [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
    loopback.iter().any(|addr| TcpStream::connect_timeout(addr, LIMIT).is_ok())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_is_found_and_stays_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(answers(port));
        drop(listener);
        assert!(!answers(port));
        let mut found = KubeProxy { choice: Choice::Auto, found: true, looked: None };
        assert!(found.here());
        assert!(KubeProxy::new(Choice::Yes, false).here());
        assert!(KubeProxy::new(Choice::Auto, true).here(), "it restarts beside us");
        assert!(!KubeProxy { choice: Choice::No, found: true, looked: None }.here());
    }
}
