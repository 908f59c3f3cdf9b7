//! A small IPAM sidecar: PureLB's sample in behaviour, that can be away, slow, forgetful or wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use purelb_ipam::v1::allocate_request::Selector;
use purelb_ipam::v1::ipam_server::{Ipam, IpamServer};
use purelb_ipam::v1::release_request::Target;
use purelb_ipam::v1::{
    AllocateRequest, AllocateResponse, AllocatedIp, ReleaseRequest, ReleaseResponse, StatsRequest, StatsResponse,
};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, async_trait};

/// How it behaves.
#[derive(Clone, Debug, Default)]
pub enum Mood {
    /// By its contract.
    #[default]
    Good,
    /// It takes calls and does not answer.
    Silent,
    /// It gives these, whatever is asked.
    Gives(Vec<String>),
    /// It refuses everything.
    Refuses(Code),
    /// It refuses to give anything new, and knows what it gave.
    GivesNothing(Code),
    /// It takes nothing back.
    Keeps(Code),
}

#[derive(Debug, Default)]
struct State {
    mood: Mood,
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    given: BTreeMap<(String, String), BTreeSet<IpAddr>>,
    calls: Vec<String>,
}

/// A sidecar on a socket; it ends with this.
#[derive(Debug)]
pub struct Sidecar {
    /// Its socket.
    pub socket: PathBuf,
    state: Arc<Mutex<State>>,
    runtime: Option<Runtime>,
}

impl Sidecar {
    /// Begins to serve; `v4` and `v6` are all that it has.
    pub fn start(socket: &Path, v4: &[&str], v6: &[&str]) -> Result<Self> {
        let parse = |list: &[&str]| list.iter().map(|ip| ip.parse()).collect::<Result<Vec<IpAddr>, _>>();
        let state = State { v4: parse(v4)?, v6: parse(v6)?, ..State::default() };
        let mut out = Self { socket: socket.to_owned(), state: Arc::new(Mutex::new(state)), runtime: None };
        out.serve()?;
        Ok(out)
    }

    /// Serves again.
    pub fn serve(&mut self) -> Result<()> {
        drop(std::fs::remove_file(&self.socket));
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let path = self.socket.clone();
        let listener = runtime.block_on(async move { UnixListener::bind(path) }).context("listen on the socket")?;
        let service = IpamServer::new(Desk(Arc::clone(&self.state)));
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(UnixListenerStream::new(listener)));
        self.runtime = Some(runtime);
        Ok(())
    }

    /// It is away; it remembers what it gave.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
        drop(std::fs::remove_file(&self.socket));
    }

    /// It forgets what it gave.
    pub fn forget(&self) {
        state(&self.state).given.clear();
    }

    /// From now on it behaves like this.
    pub fn mood(&self, mood: Mood) {
        state(&self.state).mood = mood;
    }

    /// It gives something by itself, as when nobody hears the answer.
    pub fn gives(&self, pool: &str, service: &str, ip: &str) -> Result<()> {
        let entry = (pool.to_owned(), service.to_owned());
        state(&self.state).given.entry(entry).or_default().insert(ip.parse()?);
        Ok(())
    }

    /// What a Service has of a pool, with spaces.
    #[must_use]
    pub fn given(&self, pool: &str, service: &str) -> String {
        let state = state(&self.state);
        let ips = state.given.get(&(pool.to_owned(), service.to_owned())).into_iter().flatten();
        ips.map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
    }

    /// Calls so far, `Allocate pool service what`.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        state(&self.state).calls.clone()
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes every connection at a socket, says something and hangs up; it ends with this.
#[derive(Debug)]
pub struct Impostor {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Impostor {
    /// Begins.
    pub fn start(socket: &Path, words: &[u8]) -> Result<Self> {
        drop(std::fs::remove_file(socket));
        let listener = std::os::unix::net::UnixListener::bind(socket).context("listen on the socket")?;
        listener.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        let (ended, words) = (Arc::clone(&end), words.to_owned());
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok((mut stream, _)) = listener.accept() {
                    drop(stream.write_all(&words));
                }
                crate::sys::pause(10);
            }
        });
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn state(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Desk(Arc<Mutex<State>>);

impl Desk {
    /// `asks`: for something new.
    async fn noted(&self, call: String, asks: bool) -> Result<Option<Vec<String>>, Status> {
        let mood = {
            let mut state = state(&self.0);
            state.calls.push(call.clone());
            state.mood.clone()
        };
        match mood {
            Mood::Good => Ok(None),
            Mood::Silent => std::future::pending().await,
            Mood::Gives(ips) => Ok(Some(ips)),
            Mood::Refuses(code) => Err(Status::new(code, "as it was told")),
            Mood::GivesNothing(code) if asks => Err(Status::new(code, "as it was told")),
            Mood::Keeps(code) if call.starts_with("Release") => Err(Status::new(code, "as it was told")),
            Mood::GivesNothing(_) | Mood::Keeps(_) => Ok(None),
        }
    }
}

impl State {
    fn is_free(&self, pool: &str, ip: IpAddr) -> bool {
        !self.given.iter().any(|((of, _), ips)| of == pool && ips.contains(&ip))
    }

    /// One of each family that is wanted, of any when none is; all or nothing.
    fn give(&mut self, pool: &str, service: &str, wants: [bool; 2]) -> Result<Vec<IpAddr>, Status> {
        let own = self.given.get(&(pool.to_owned(), service.to_owned())).cloned().unwrap_or_default();
        let wants = if wants == [false, false] { [!self.v4.is_empty(), self.v4.is_empty()] } else { wants };
        let mut out = Vec::new();
        for (all, _) in [&self.v4, &self.v6].into_iter().zip(wants).filter(|(_, wanted)| *wanted) {
            if all.is_empty() {
                return Err(Status::failed_precondition("no pool of this family"));
            }
            let same = all.iter().find(|ip| own.contains(*ip));
            let free = || all.iter().find(|ip| self.is_free(pool, **ip));
            out.push(*same.or_else(free).ok_or_else(|| Status::resource_exhausted("nothing is free"))?);
        }
        Ok(out)
    }

    fn hold(&mut self, pool: &str, service: &str, ips: &[String]) -> Result<Vec<IpAddr>, Status> {
        let own = self.given.get(&(pool.to_owned(), service.to_owned())).cloned().unwrap_or_default();
        let mut out = Vec::new();
        for text in ips {
            let ip: IpAddr = text.parse().map_err(|_| Status::invalid_argument("no address"))?;
            if !self.v4.contains(&ip) && !self.v6.contains(&ip) {
                return Err(Status::invalid_argument("outside the pool"));
            }
            if !own.contains(&ip) && !self.is_free(pool, ip) {
                return Err(Status::already_exists("another one has it"));
            }
            out.push(ip);
        }
        Ok(out)
    }
}

#[async_trait]
impl Ipam for Desk {
    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let AllocateRequest { pool, service, sharing_key, selector } = request.into_inner();
        let what = match &selector {
            None => "nothing".to_owned(),
            Some(Selector::Explicit(explicit)) => explicit.ips.join(","),
            Some(Selector::Families(of)) => format!("{}{}", u8::from(of.want_ipv4), u8::from(of.want_ipv6)),
        };
        let key = if sharing_key.is_empty() { String::new() } else { format!(" {sharing_key}") };
        let asks = matches!(selector, Some(Selector::Families(_)));
        if let Some(ips) = self.noted(format!("Allocate {pool} {service} {what}{key}"), asks).await? {
            let ips = ips.into_iter().map(|ip| AllocatedIp { ip }).collect();
            return Ok(Response::new(AllocateResponse { ips }));
        }
        let mut state = state(&self.0);
        let ips = match selector {
            None => return Err(Status::invalid_argument("no selector")),
            Some(Selector::Explicit(explicit)) => state.hold(&pool, &service, &explicit.ips)?,
            Some(Selector::Families(of)) => state.give(&pool, &service, [of.want_ipv4, of.want_ipv6])?,
        };
        state.given.entry((pool, service)).or_default().extend(&ips);
        let ips = ips.iter().map(|ip| AllocatedIp { ip: ip.to_string() }).collect();
        Ok(Response::new(AllocateResponse { ips }))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let ReleaseRequest { pool, service, target } = request.into_inner();
        let what = match &target {
            None => "nothing",
            Some(Target::Ip(ip)) => ip,
            Some(Target::All(_)) => "all",
        };
        self.noted(format!("Release {pool} {service} {what}"), false).await?;
        let mut state = state(&self.0);
        let pair = (pool, service);
        match target {
            None => return Err(Status::invalid_argument("no target")),
            Some(Target::All(_)) => drop(state.given.remove(&pair)),
            Some(Target::Ip(ip)) => {
                if let (Some(own), Ok(ip)) = (state.given.get_mut(&pair), ip.parse()) {
                    own.remove(&ip);
                }
            }
        }
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let StatsRequest { pool } = request.into_inner();
        self.noted(format!("Stats {pool}"), false).await?;
        let state = state(&self.0);
        let used = |v4: bool| {
            let own = state.given.iter().filter(|((of, _), _)| *of == pool).flat_map(|(_, ips)| ips);
            own.filter(|ip| ip.is_ipv4() == v4).count() as u64
        };
        let list = [&state.v4, &state.v6].into_iter().flatten().map(IpAddr::to_string);
        Ok(Response::new(StatsResponse {
            in_use_v4: used(true),
            in_use_v6: used(false),
            size_v4: state.v4.len() as u64,
            size_v6: state.v6.len() as u64,
            has_known_capacity: true,
            display_addresses: list.collect(),
        }))
    }
}
