//! Whether the API server is heard here, and whether others hear it: a node that alone is deaf does not know to whom its
//! remote addresses were given since, so it withdraws them, and those that hear serve.
//!
//! A node cannot tell an API server that is down from one that only it does not reach, so it asks other nodes' agents how
//! long ago they heard it (`/hearz`). One that heard it later than this one, by more than the whole time, is proof: when the
//! API server goes down for all, last answers differ by a pace and a time-out at most, which together are half of that.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::http::Request;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use purelb_plan::problem::Problem;
use tokio::time::timeout;

use crate::source::parse::fault;

/// Where an agent says how many milliseconds ago it heard the API server.
pub const PAGE: &str = "/hearz";
/// So many others are asked at a time.
const ASKED: usize = 5;
/// The longest time between two questions, and the longest time for an answer.
const SLOWEST: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(5));

/// How this node hears the API server. Clones are of the same.
#[derive(Clone, Debug)]
pub struct Hearing(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    begun: Instant,
    /// When it was heard last, in milliseconds since `begun`.
    heard: AtomicU64,
    /// When it was proven that others hear it, likewise; 0: it is not.
    alone: AtomicU64,
    /// Addresses of nodes.
    others: Mutex<BTreeSet<IpAddr>>,
}

impl Hearing {
    /// Listens in the background: after so long others are asked, at `port`. Must be called inside a tokio runtime.
    #[must_use]
    pub fn start(client: Client, after: Duration, port: u16) -> Self {
        let hearing = Self::new();
        let listening = hearing.clone();
        tokio::spawn(async move { listening.listen(&client, after, port).await });
        hearing
    }

    fn new() -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            alone: AtomicU64::new(0),
            others: Mutex::default(),
        }))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long ago it was heard.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.0.heard.load(Ordering::Relaxed)))
    }

    /// Others hear it and this node does not, or does again and has not listed everything since.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.0.alone.load(Ordering::Relaxed) > 0
    }

    /// It is heard again: time to list everything anew, and [`Self::recover`] when that is done.
    #[must_use]
    pub fn is_back(&self) -> bool {
        self.is_alone() && self.0.heard.load(Ordering::Relaxed) > self.0.alone.load(Ordering::Relaxed)
    }

    /// What this node knows is no older any more than what others know.
    pub fn recover(&self) {
        self.0.alone.store(0, Ordering::Relaxed);
        tracing::info!(event = "apiServerHeardAgain", "the API server is heard again");
    }

    /// Addresses of nodes, whose agents may be asked.
    pub fn others(&self, addresses: &BTreeSet<IpAddr>) {
        let mut others = self.0.others.lock().unwrap_or_else(PoisonError::into_inner);
        if *others != *addresses {
            others.clone_from(addresses);
        }
    }

    /// That it alone is deaf.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let text = "other nodes hear the API server and this one does not: its remote addresses are withdrawn";
        let remedy = "see why the API server does not answer from this node";
        self.is_alone().then(|| fault("API server", "", text.to_owned(), remedy))
    }

    async fn listen(self, client: &Client, after: Duration, port: u16) {
        let (pace, patience) = (SLOWEST.0.min(after / 4), SLOWEST.1.min(after / 4));
        let http: Http<HttpConnector, Body> = Http::builder(TokioExecutor::new()).build_http();
        for round in 0_usize.. {
            if is_heard(client, patience).await {
                self.0.heard.store(self.now(), Ordering::Relaxed);
            } else if self.silence() >= after
                && !self.is_alone()
                && let Some(other) = self.witness(&http, after, patience, port, round).await
            {
                self.0.alone.store(self.now(), Ordering::Relaxed);
                let silence = self.silence();
                tracing::warn!(event = "aloneDeaf", %other, ?silence, "other nodes hear the API server and this one does not: remote addresses are withdrawn");
            }
            tokio::time::sleep(pace).await;
        }
    }

    /// One of some others that proves it.
    async fn witness(
        &self,
        http: &Http<HttpConnector, Body>,
        after: Duration,
        patience: Duration,
        port: u16,
        round: usize,
    ) -> Option<SocketAddr> {
        let all: Vec<IpAddr> = self.0.others.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let some = all.iter().cycle().skip(round.wrapping_mul(ASKED) % all.len().max(1)).take(ASKED.min(all.len()));
        let mut answers: FuturesUnordered<_> = some
            .map(|ip| async move {
                let other = SocketAddr::new(*ip, port);
                let silence = timeout(patience, ask(http, other)).await.ok().flatten()?;
                proves(self.silence(), silence, after).then_some(other)
            })
            .collect();
        while let Some(answer) = answers.next().await {
            if answer.is_some() {
                return answer;
            }
        }
        None
    }
}

/// Whatever it answers, but for an error of its own.
async fn is_heard(client: &Client, patience: Duration) -> bool {
    match timeout(patience, client.apiserver_version()).await {
        Ok(Ok(_)) => true,
        Ok(Err(kube::Error::Api(status))) => status.code < 500,
        _ => false,
    }
}

/// How long another agent has not heard it.
async fn ask(http: &Http<HttpConnector, Body>, other: SocketAddr) -> Option<Duration> {
    let request = Request::get(format!("http://{other}{PAGE}")).body(Body::empty()).ok()?;
    let body = Body::new(http.request(request).await.ok()?.into_body());
    let text = to_bytes(body, 32).await.ok()?;
    std::str::from_utf8(&text).ok()?.trim().parse().ok().map(Duration::from_millis)
}

/// The other one heard it later, by more than a pause of the API server explains.
fn proves(own: Duration, other: Duration, after: Duration) -> bool {
    own >= other.saturating_add(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(60);

    #[test]
    fn what_an_api_server_that_is_down_for_all_looks_like_proves_nothing() {
        let seconds = Duration::from_secs;
        // The latest and the earliest last answer, at any time after that.
        for after_that in 0..1_000 {
            let (own, other) = (seconds(after_that + 20), seconds(after_that));
            assert!(!proves(own, other, AFTER), "{own:?} {other:?}");
        }
        assert!(proves(seconds(75), seconds(15), AFTER));
        assert!(!proves(seconds(75), seconds(16), AFTER));
        assert!(!proves(AFTER, Duration::MAX, AFTER));
    }

    #[test]
    fn once_proven_it_stays_so_until_everything_is_listed() {
        let hearing = Hearing::new();
        assert!(!hearing.is_alone() && !hearing.is_back() && hearing.problem().is_none());
        hearing.0.alone.store(5, Ordering::Relaxed);
        assert!(hearing.is_alone() && !hearing.is_back() && hearing.problem().is_some());
        hearing.0.heard.store(6, Ordering::Relaxed);
        assert!(hearing.is_alone() && hearing.is_back());
        hearing.recover();
        assert!(!hearing.is_alone() && !hearing.is_back());
    }
}
