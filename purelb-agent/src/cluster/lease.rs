//! One allocator at a time: a Lease that the leader renews, and in which it writes down what it is about to give.
//!
//! Every write of it carries the resourceVersion that was seen last, so of two that think they lead only one can go on.
//! A successor takes over by such a write, and so finds every grant that was written down before.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;

use super::journal::Journal;

/// Name of the Lease.
pub const NAME: &str = "purelb-allocator";
/// Without a sign of life for so long the leader is replaced.
pub const DURATION: Duration = Duration::from_secs(15);
/// A candidate looks this often, and the leader renews as often.
pub const PACE: Duration = Duration::from_secs(2);
/// No request takes longer.
const LIMIT: Duration = Duration::from_secs(4);

/// Why there is no term, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else leads.
    #[error("{0} leads")]
    Lost(String),
    /// Nobody knows whether the write was done.
    #[error("the API server did not answer: {0}")]
    Away(String),
}

/// Who stands for leader, and where.
#[derive(Clone, Debug)]
pub struct Candidate {
    api: Api<Lease>,
    identity: String,
}

/// From when to when a candidate leads.
#[derive(Debug)]
pub struct Term {
    candidate: Candidate,
    lease: Lease,
    /// When the last write that was acknowledged was begun.
    stamp: Instant,
    /// What the former leader had written down.
    pub inherited: Journal,
    /// There was no Lease, and none was seen before: whoever led until somebody deleted it may have writes under way.
    pub unproven: bool,
}

/// A Lease as a candidate saw it last, since when, and what was written down in it.
type Watched = Option<(String, Instant, Journal)>;

impl Candidate {
    /// `identity` must be this process's alone.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), identity }
    }

    /// Waits until nobody leads, and leads then.
    pub async fn lead(&self) -> Term {
        let (mut watched, mut said) = (None, String::new());
        loop {
            match self.stand(&mut watched).await {
                Ok(term) => return term,
                Err(error) => {
                    let text = error.to_string();
                    if said != text {
                        tracing::info!(
                            event = "standingBy",
                            lease = NAME,
                            identity = self.identity,
                            "standing by: {text}"
                        );
                        said = text;
                    }
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }

    async fn stand(&self, watched: &mut Watched) -> Result<Term, LeaseError> {
        let found = timely(self.api.get_opt(NAME)).await?;
        let stamp = Instant::now();
        let Some(mut lease) = found else {
            // Whoever led until it was deleted may have written down more than was seen, and needs it no longer than a term.
            if let Some((version, since, _)) = watched {
                if !version.is_empty() {
                    (*version, *since) = (String::new(), stamp);
                }
                if stamp.duration_since(*since) < DURATION {
                    return Err(LeaseError::Lost("whoever led until the Lease was deleted".to_owned()));
                }
            }
            let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
            let mut lease = Lease { metadata, spec: None };
            self.sign(&mut lease, true);
            let lease = timely(self.api.create(&PostParams::default(), &lease)).await?;
            tracing::info!(
                event = "leaseAcquired",
                lease = NAME,
                identity = self.identity,
                "leading; there was no Lease"
            );
            let unproven = watched.is_none();
            // Somebody may have deleted it, which ends no write.
            let inherited = watched.take().map(|(_, _, journal)| journal).unwrap_or_default();
            return Ok(Term { candidate: self.clone(), lease, stamp, inherited, unproven });
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let holder = holder(&lease).to_owned();
        let since = match watched {
            Some((known, since, _)) if *known == version => *since,
            _ => watched.insert((version, stamp, Journal::read(&lease))).1,
        };
        // Only our own clock counts, and only from what we saw ourselves.
        let theirs = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
        let wait = DURATION.max(Duration::from_secs(u64::try_from(theirs).unwrap_or_default()));
        if !holder.is_empty() && stamp.duration_since(since) < wait {
            return Err(LeaseError::Lost(holder));
        }
        let inherited = Journal::read(&lease);
        self.sign(&mut lease, true);
        let lease = timely(self.api.replace(NAME, &PostParams::default(), &lease)).await?;
        tracing::info!(
            event = "leaseAcquired",
            lease = NAME,
            identity = self.identity,
            after = holder,
            grants = inherited.grants.len(),
            "leading"
        );
        Ok(Term { candidate: self.clone(), lease, stamp, inherited, unproven: false })
    }

    fn sign(&self, lease: &mut Lease, new: bool) {
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        let now = MicroTime(Timestamp::now());
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
        spec.renew_time = Some(now.clone());
        if new {
            spec.acquire_time = Some(now);
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default().saturating_add(1));
        }
    }
}

impl Term {
    /// Nobody can have taken over yet.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        self.stamp.elapsed() < DURATION.mul_f64(0.7)
    }

    /// Renews it and writes down all that is open.
    ///
    /// # Errors
    /// Somebody else leads, or it is not known whether it was written.
    pub async fn renew(&mut self, journal: &Journal) -> Result<(), LeaseError> {
        let mut lease = self.lease.clone();
        journal.write(&mut lease).map_err(|error| LeaseError::Away(error.to_string()))?;
        self.candidate.sign(&mut lease, false);
        self.replace(lease).await
    }

    /// Nobody leads any more; what is written down stays open.
    pub async fn release(mut self, journal: &Journal) {
        let mut lease = self.lease.clone();
        if let Err(error) = journal.write(&mut lease) {
            tracing::error!(op = "writeJournal", %error, "what is open cannot be written down");
        }
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
        }
        if let Err(error) = self.replace(lease).await {
            tracing::warn!(op = "releaseLease", %error, "the lease was not released: the next allocator waits for its end");
        }
    }

    async fn replace(&mut self, lease: Lease) -> Result<(), LeaseError> {
        let stamp = Instant::now();
        let done = timely(self.candidate.api.replace(NAME, &PostParams::default(), &lease)).await;
        match done {
            Ok(lease) => {
                (self.lease, self.stamp) = (lease, stamp);
                Ok(())
            }
            Err(error @ LeaseError::Away(_)) => Err(error),
            // An earlier write of ours may have come true unheard.
            Err(LeaseError::Lost(_)) => {
                let now = timely(self.candidate.api.get_opt(NAME)).await?;
                match now {
                    Some(now) if holder(&now) == self.candidate.identity => {
                        self.lease = now;
                        Err(LeaseError::Away("an earlier write came true".to_owned()))
                    }
                    Some(now) => Err(LeaseError::Lost(holder(&now).to_owned())),
                    None => Err(LeaseError::Lost("nobody: the Lease is gone".to_owned())),
                }
            }
        }
    }
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

/// In time, or it counts as unknown.
async fn timely<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
    match tokio::time::timeout(LIMIT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 || status.code == 404 => {
            Err(LeaseError::Lost("another candidate".to_owned()))
        }
        Ok(Err(error)) => Err(LeaseError::Away(error.to_string())),
        Err(_) => Err(LeaseError::Away(format!("no answer in {LIMIT:?}"))),
    }
}
