//! IPAM sidecars: what [`external`] wants asked and told is sent to their sockets, and what they answer taken in.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use purelb_ipam::v1::StatsResponse;
use purelb_plan::alloc::allocator::{Allocator, Estate};
use purelb_plan::alloc::external::{self, Answer, Call, Debt, Fault, What};
use tokio::task::{JoinError, JoinSet};
use tonic::transport::Channel;

use crate::cluster::journal::DEBTS;
use crate::metrics::Rpcs;

mod rpc;

/// The figures of a sidecar are asked for this often, ...
const STATS: Duration = Duration::from_secs(30);
/// ... and so long after something of it changed.
const SOON: Duration = Duration::from_millis(500);

/// What ended.
#[derive(Debug)]
pub enum Done {
    /// A call.
    Call(Call, Result<Vec<IpAddr>, Fault>),
    /// The question for a group's figures.
    Stats(String, Result<StatsResponse, Fault>),
}

/// Figures of a group, as its sidecar said last.
#[derive(Debug, Default)]
pub struct Figures {
    /// What it said.
    pub known: Option<StatsResponse>,
    /// Why it does not say any more.
    pub fault: Option<Fault>,
    next: Option<Instant>,
    running: bool,
}

/// All sidecars.
#[derive(Debug)]
pub struct Sidecars {
    plan: external::Sidecars,
    /// By socket, for good.
    channels: BTreeMap<String, Channel>,
    /// Calls that wait until what they may lead to is written down.
    waiting: Vec<Call>,
    running: JoinSet<Done>,
    written: BTreeSet<Debt>,
    figures: BTreeMap<String, Figures>,
    rpcs: Rpcs,
}

impl Sidecars {
    /// Knows only what a former allocator left to be given back.
    #[must_use]
    pub fn new(debts: BTreeSet<Debt>, rpcs: Rpcs) -> Self {
        Self {
            plan: external::Sidecars::new(debts.iter().cloned().collect()),
            channels: BTreeMap::new(),
            waiting: Vec::new(),
            running: JoinSet::new(),
            written: debts,
            figures: BTreeMap::new(),
            rpcs,
        }
    }

    /// For [`Estate::answers`].
    #[must_use]
    pub fn answers(&self) -> &BTreeMap<String, std::sync::Arc<Answer>> {
        self.plan.answers()
    }

    /// By group.
    #[must_use]
    pub const fn figures(&self) -> &BTreeMap<String, Figures> {
        &self.figures
    }

    /// Some group has one, or had.
    #[must_use]
    pub fn are_used(&self) -> bool {
        !self.figures.is_empty() || self.plan.are_used()
    }

    /// See [`external::Sidecars::look`].
    pub fn look(&mut self, estate: &Estate, allocator: &Allocator, now: u64) {
        self.waiting.extend(self.plan.look(estate, allocator, now));
        let groups = estate.catalog.groups();
        let sockets: BTreeMap<_, _> =
            groups.filter_map(|group| Some((group.name.as_str(), group.external.as_ref()?.socket.as_str()))).collect();
        self.rpcs.keep(|socket| sockets.values().any(|known| *known == socket));
        self.figures.retain(|group, _| sockets.contains_key(group.as_str()));
        for (group, socket) in sockets {
            let figures = self.figures.entry(group.to_owned()).or_default();
            if !figures.running && figures.next.is_none_or(|next| next <= Instant::now()) {
                figures.running = true;
                let (channel, rpcs) = (channel(&mut self.channels, socket), self.rpcs.clone());
                let (group, socket) = (group.to_owned(), socket.to_owned());
                self.running.spawn(async move {
                    let result = rpc::stats(channel, &group, &socket, &rpcs).await;
                    Done::Stats(group, result)
                });
            }
        }
    }

    /// What has to be written down.
    #[must_use]
    pub fn debts(&self) -> BTreeSet<Debt> {
        self.plan.debts().iter().take(DEBTS).cloned().collect()
    }

    /// Everything that has to be written down is.
    #[must_use]
    pub fn is_written_down(&self) -> bool {
        self.plan.debts().iter().take(DEBTS).all(|debt| self.written.contains(debt))
    }

    /// What should be written down, if something else is.
    #[must_use]
    pub fn unwritten(&self) -> Option<BTreeSet<Debt>> {
        Some(self.debts()).filter(|debts| *debts != self.written)
    }

    /// These are written down.
    pub fn written_down(&mut self, debts: BTreeSet<Debt>) {
        self.written = debts;
    }

    /// A Service that is gone had this, as its state says.
    pub fn owe(&mut self, debt: Debt) {
        self.plan.owe(debt);
    }

    /// A sidecar may have something of this Service.
    #[must_use]
    pub fn owes(&self, service: &str) -> bool {
        self.plan.owes(service)
    }

    /// Begins what waits. Must be called inside a tokio runtime.
    pub fn begin(&mut self) {
        for call in std::mem::take(&mut self.waiting) {
            let (channel, rpcs) = (channel(&mut self.channels, &call.socket), self.rpcs.clone());
            self.running.spawn(async move {
                let result = rpc::call(channel, &call, &rpcs).await;
                Done::Call(call, result)
            });
        }
    }

    /// Waits for the end of something. Loses nothing when it is dropped half-way.
    pub async fn next(&mut self) -> Done {
        loop {
            match self.running.join_next().await {
                Some(Ok(done)) => return done,
                Some(Err(error)) => broken(&error),
                None => return pending().await,
            }
        }
    }

    /// Takes in what ended, and what did since: one look and one write for all. The allocator should look again. `now` as
    /// in [`look`](Self::look).
    pub fn take(&mut self, done: Done, now: u64) {
        self.take_one(done, now);
        while let Some(ended) = self.running.try_join_next() {
            match ended {
                Ok(done) => self.take_one(done, now),
                Err(error) => broken(&error),
            }
        }
    }

    fn take_one(&mut self, done: Done, now: u64) {
        match done {
            Done::Call(call, result) => {
                let fault = result.as_ref().err().cloned();
                told(&call, fault.as_ref());
                let news = self.plan.done(&call, result, now);
                tell(&call.group, news, fault.as_ref());
                if let Some(figures) = self.figures.get_mut(&call.group) {
                    let soon = Instant::now() + SOON;
                    figures.next = Some(figures.next.map_or(soon, |next| next.min(soon)));
                }
            }
            Done::Stats(group, result) => {
                let figures = self.figures.entry(group.clone()).or_default();
                (figures.running, figures.next) = (false, Some(Instant::now() + STATS));
                let fault = result.as_ref().err().cloned();
                if let Ok(known) = result {
                    figures.known = Some(known);
                }
                // It says nothing about calls: a sidecar may count without its database, or take long for that alone.
                figures.fault = fault;
            }
        }
    }
}

fn channel(channels: &mut BTreeMap<String, Channel>, socket: &str) -> Channel {
    channels.entry(socket.to_owned()).or_insert_with(|| rpc::channel(socket)).clone()
}

fn broken(error: &JoinError) {
    tracing::error!(op = "askSidecar", %error, "a call to a sidecar ended without an answer");
}

/// It went away, or came back.
fn tell(pool: &str, news: bool, fault: Option<&Fault>) {
    match (news, fault) {
        (true, Some(fault)) => {
            tracing::warn!(
                pool,
                code = fault.code,
                "the sidecar does not answer; its Services wait: {}",
                fault.message
            );
        }
        (true, None) => tracing::info!(event = "sidecarBack", pool, "the sidecar answers again"),
        (false, _) => {}
    }
}

/// What no condition of a Service says.
fn told(call: &Call, fault: Option<&Fault>) {
    let Call { service: svc, group, what, .. } = call;
    match (what, fault) {
        (_, Some(fault)) if fault.is_outage() => {}
        (What::Hold { ip, .. }, Some(fault)) => {
            tracing::warn!(op = "holdAddress", svc, pool = group, %ip, code = fault.code, error = fault.message, "the sidecar does not accept who has it");
        }
        (What::Release(ip), Some(fault)) => {
            tracing::warn!(
                op = "releaseAddress",
                svc,
                pool = group,
                ?ip,
                code = fault.code,
                error = fault.message,
                "not given back"
            );
        }
        (What::Release(ip), None) => {
            tracing::info!(event = "addressReleased", svc, pool = group, ?ip, "given back to the sidecar")
        }
        _ => {}
    }
}
