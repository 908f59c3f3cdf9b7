//! Load that runs beside a change and tells what it broke: long-lived connections, numbered
//! datagrams, newcomers.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use crate::clients::{Conn, any};
use crate::netns::Netns;
use crate::sys;

/// What a long-lived connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing until it is asked at the end.
    Idle,
    /// The client sends all the time.
    ClientPush,
    /// The server sends all the time.
    ServerPush,
}

/// Connections that run beside a change; [`LongLived::finish`] says whether any broke or moved.
#[derive(Debug)]
pub struct LongLived {
    stop: Arc<AtomicBool>,
    running: Vec<(String, SocketAddr, Kind, JoinHandle<Result<u64>>)>,
}

impl LongLived {
    /// Opens `each` connections of every kind.
    pub fn start(netns: &Netns, to: SocketAddr, each: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for kind in [Kind::Idle, Kind::ClientPush, Kind::ServerPush] {
            for _ in 0..each {
                let mut conn = Conn::open(netns, to)?;
                let (name, local, flag) = (conn.ask("NAME")?, conn.local()?, Arc::clone(&stop));
                let expected = name.clone();
                running.push((name, local, kind, thread::spawn(move || live(conn, kind, &expected, &flag))));
            }
        }
        Ok(Self { stop, running })
    }

    /// How many connections each pod has.
    #[must_use]
    pub fn pods(&self) -> BTreeMap<String, usize> {
        self.running.iter().fold(BTreeMap::new(), |mut found, (name, ..)| {
            *found.entry(name.clone()).or_default() += 1;
            found
        })
    }

    /// How many have ended early, which none should.
    #[must_use]
    pub fn ended(&self) -> usize {
        self.running.iter().filter(|(_, _, _, thread)| thread.is_finished()).count()
    }

    /// Ends all: how many held, and pod and fault of each that broke.
    #[must_use]
    pub fn end(mut self) -> (usize, Vec<(String, String)>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut broken = Vec::new();
        let mut held = 0;
        for (name, local, kind, thread) in self.running.drain(..) {
            let outcome = thread.join().map_err(|_| anyhow!("its thread panicked")).and_then(|result| result);
            match outcome {
                Ok(_) => held += 1,
                Err(error) => broken.push((name.clone(), format!("{kind:?} from {local} at {name}: {error:#}"))),
            }
        }
        (held, broken)
    }

    /// Ends all; connections to the pods in `doomed` may have broken. Gives back how many held.
    pub fn finish_except(self, doomed: &[&str]) -> Result<usize> {
        let (held, mut broken) = self.end();
        broken.retain(|(pod, _)| !doomed.contains(&pod.as_str()));
        let broken: Vec<_> = broken.into_iter().map(|(_, fault)| fault).collect();
        if !broken.is_empty() {
            bail!("{} connections broke, {held} held:\n  {}", broken.len(), broken.join("\n  "));
        }
        Ok(held)
    }

    /// Ends all; none may have broken.
    pub fn finish(self) -> Result<usize> {
        self.finish_except(&[])
    }
}

impl Drop for LongLived {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A connection that gets no answer for so long is broken, though TCP would go on trying.
const STALLED: Duration = Duration::from_secs(2);

fn live(mut conn: Conn, kind: Kind, expected: &str, stop: &AtomicBool) -> Result<u64> {
    let mut rounds = 0;
    conn.set_patience(STALLED)?;
    if kind == Kind::ServerPush {
        conn.send(b"PUSH\n")?;
    }
    loop {
        // Read once more after the stop: an idle connection speaks only now.
        let last = stop.load(Ordering::Relaxed);
        match kind {
            Kind::Idle if !last => thread::sleep(Duration::from_millis(20)),
            Kind::Idle | Kind::ClientPush => {
                conn.echo(1_000)?;
                let name = conn.ask("NAME")?;
                ensure!(name == expected, "answered by {name} now, by {expected} before");
                thread::sleep(Duration::from_millis(10));
            }
            Kind::ServerPush => {
                let line = conn.line()?;
                ensure!(line == format!("{rounds} {expected}"), "got {line:?} in round {rounds}");
            }
        }
        rounds += 1;
        if last {
            return Ok(rounds);
        }
    }
}

/// UDP flows of numbered datagrams; [`Datagrams::finish`] says whether one was lost or answered by another pod.
#[derive(Debug)]
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    flows: Vec<JoinHandle<Result<usize>>>,
}

impl Datagrams {
    /// Starts that many flows, each of 200 datagrams a second.
    pub fn start(netns: &Netns, to: SocketAddr, flows: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let flows = (0..flows).map(|_| {
            let socket = netns.enter(move || UdpSocket::bind(any(to)))??;
            socket.connect(to)?;
            // A moment without the CPU must not look like a lost packet.
            setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20))?;
            let flag = Arc::clone(&stop);
            Ok(thread::spawn(move || numbered(&socket, to, &flag)))
        });
        let flows = flows.collect::<Result<Vec<_>>>()?;
        Ok(Self { stop, flows })
    }

    /// Ends all: how many datagrams there were. An error when any was lost.
    pub fn finish(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.flows.drain(..).map(|flow| flow.join().map_err(|_| anyhow!("a flow's thread panicked"))?).sum()
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn numbered(socket: &UdpSocket, to: SocketAddr, stop: &AtomicBool) -> Result<usize> {
    let mut answers = BTreeMap::new();
    let mut sent = 0_usize;
    let mut last_word = None;
    loop {
        if stop.load(Ordering::Relaxed) {
            let end = *last_word.get_or_insert_with(|| Instant::now() + Duration::from_secs(1));
            if answers.len() == sent || Instant::now() > end {
                break;
            }
        } else {
            // A refusal (ICMP) of an earlier one is reported here: it shows as a missing answer.
            drop(socket.send(sent.to_string().as_bytes()));
            sent += 1;
        }
        socket.set_read_timeout(Some(Duration::from_millis(5)))?;
        let mut buffer = [0; 256];
        let next = Instant::now() + Duration::from_millis(5);
        while Instant::now() < next
            && let Ok(length) = socket.recv(&mut buffer)
        {
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            let mut words = text.split(' ');
            let (pod, number) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
            answers.insert(number.parse::<usize>().context("a datagram that nobody sent")?, pod.to_owned());
        }
    }
    let lost: Vec<_> = (0..sent).filter(|number| !answers.contains_key(number)).collect();
    ensure!(
        lost.is_empty(),
        "UDP to {to}: {} of {sent} lost: {:?}",
        lost.len(),
        lost.iter().take(20).collect::<Vec<_>>()
    );
    let mut pods: Vec<_> = answers.into_values().collect();
    pods.dedup();
    ensure!(pods.len() <= 1, "UDP to {to} was answered by one after the other: {pods:?}");
    Ok(sent)
}

/// New connections one after the other, each of which must open at the first SYN.
#[derive(Debug)]
pub struct Newcomers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<BTreeMap<String, usize>>>,
}

impl Newcomers {
    /// Starts them.
    pub fn start(netns: &Netns, to: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, netns) = (Arc::clone(&stop), netns.clone());
        let thread = thread::spawn(move || {
            let mut found = BTreeMap::new();
            while !flag.load(Ordering::Relaxed) {
                let number: usize = found.values().sum();
                // A SYN is sent again after a second.
                let conn = Conn::open_within(&netns, any(to), to, Duration::from_millis(950));
                let name = conn.and_then(|mut conn| conn.ask("NAME")).with_context(|| format!("newcomer {number}"))?;
                *found.entry(name).or_default() += 1;
                sys::pause(5);
            }
            Ok(found)
        });
        Self { stop, thread }
    }

    /// Ends them: which pod answered how many.
    pub fn finish(self) -> Result<BTreeMap<String, usize>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the newcomers' thread panicked"))?
    }
}

/// All kinds of load on both families at once.
#[derive(Debug)]
pub struct Load {
    connections: Vec<LongLived>,
    datagrams: Vec<Datagrams>,
    newcomers: Vec<Newcomers>,
}

impl Load {
    /// Starts six connections of each kind, two flows and newcomers to every target.
    pub fn start(netns: &Netns, targets: &[SocketAddr]) -> Result<Self> {
        let mut load = Self { connections: Vec::new(), datagrams: Vec::new(), newcomers: Vec::new() };
        for to in targets {
            load.connections.push(LongLived::start(netns, *to, 6)?);
            load.datagrams.push(Datagrams::start(netns, *to, 2)?);
            load.newcomers.push(Newcomers::start(netns, *to));
        }
        Ok(load)
    }

    /// Ends all of it; nothing may have been lost, moved or refused.
    pub fn finish(self) -> Result<()> {
        let mut faults = Vec::new();
        let mut note = |result: Result<()>| faults.extend(result.err().map(|error| format!("{error:#}")));
        for newcomers in self.newcomers {
            note(newcomers.finish().and_then(|found| {
                let all: usize = found.values().sum();
                ensure!(all > 10, "hardly a newcomer: {found:?}");
                Ok(())
            }));
        }
        for datagrams in self.datagrams {
            note(datagrams.finish().and_then(|all| {
                ensure!(all > 10, "hardly a datagram: {all}");
                Ok(())
            }));
        }
        for connections in self.connections {
            note(connections.finish().and_then(|held| {
                ensure!(held == 18, "{held} of 18 connections held");
                Ok(())
            }));
        }
        ensure!(faults.is_empty(), "under load:\n{}", faults.join("\n"));
        Ok(())
    }
}
