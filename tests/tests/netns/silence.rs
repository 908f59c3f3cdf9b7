//! Flows on which nothing is said for a while, though nothing but their reply entries leads the answers back.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use purelb_tests::clients::{Conn, any};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::manifests::Port;
use purelb_tests::sys;

/// Seconds; the sweep comes every 30.
const SILENCE: u64 = 95;

/// A TCP client that says nothing after the handshake, and a UDP server that takes its time.
#[test]
fn minutes_of_silence() -> Result<()> {
    let lab = Lab::start(Options::new("tcx"))?;
    let mut web = lab.web()?;
    // A second way to the same socket of the pod: its port alone says nothing.
    web.ports.push(Port::new("https", 443, 8080, "TCP"));
    lab.apply(&web)?;
    let mut flows = Vec::new();
    for to in lab.targets(80)? {
        let socket = lab.client.enter(move || UdpSocket::bind(any(to)))??;
        socket.send_to(format!("LATER {SILENCE}").as_bytes(), to)?;
        flows.push((to, Conn::open(&lab.client, to)?, socket));
    }
    sys::pause(SILENCE * 1_000);
    for (to, mut conn, socket) in flows {
        conn.ask("NAME").with_context(|| format!("the first words on a connection to {to}"))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let (_, from) = socket.recv_from(&mut [0; 100]).with_context(|| format!("a late UDP answer of {to}"))?;
        ensure!(from == to, "the late UDP answer came from {from}, not from {to}");
    }
    Ok(())
}
