//! What the leader writes down in its Lease before it does it: addresses that it is about to give, and what sidecars have
//! to take back. A successor reads it and so overlooks nothing that may still come true. Beside it stands what was let go
//! of lately, as of the last renewal.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use purelb_plan::alloc::external::Debt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Annotation that holds the [`Grants`].
const GRANTS: &str = "purelb.io/grants";
/// Annotation that holds what sidecars owe us.
const RELEASES: &str = "purelb.io/releases";
/// So many of those at most: a Lease has room for 256 KiB of annotations.
pub const DEBTS: usize = 300;
/// Annotation that holds what rests, and for how many milliseconds still.
const RESTS: &str = "purelb.io/resting";
/// So many of those, the last ones.
const RESTING: usize = 250;

/// Addresses that are about to be written to a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Of the Service.
    pub uid: String,
    /// The write is bound to this resourceVersion: once the Service has another one, it cannot come true any more.
    pub version: String,
    /// The addresses.
    pub ips: BTreeSet<IpAddr>,
}

/// By `namespace/name`.
pub type Grants = BTreeMap<String, Grant>;

/// All that is written down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// What may still be given.
    pub grants: Grants,
    /// What sidecars may have and should not.
    pub debts: BTreeSet<Debt>,
    /// What is only given when there is no other, and for how many milliseconds still. Of no clock but the reader's.
    pub resting: BTreeMap<IpAddr, u64>,
}

impl Journal {
    /// The same after so long.
    #[must_use]
    pub fn aged(mut self, time: Duration) -> Self {
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.resting.values_mut().for_each(|rest| *rest = rest.saturating_sub(time));
        self.resting.retain(|_, rest| *rest > 0);
        self
    }

    /// What a Lease says. What cannot be read counts as not said.
    #[must_use]
    pub fn read(lease: &Lease) -> Self {
        Self { grants: parsed(lease, GRANTS), debts: parsed(lease, RELEASES), resting: parsed(lease, RESTS) }
    }

    /// Writes it into a Lease.
    ///
    /// # Errors
    /// It has no form in JSON.
    pub fn write(&self, lease: &mut Lease) -> serde_json::Result<()> {
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert(GRANTS.to_owned(), serde_json::to_string(&self.grants)?);
        let debts: Vec<_> = self.debts.iter().take(DEBTS).collect();
        let mut resting: Vec<_> = self.resting.iter().collect();
        resting.sort_by_key(|(_, rest)| Reverse(**rest));
        resting.truncate(RESTING);
        let resting: BTreeMap<_, _> = resting.into_iter().collect();
        for (key, text) in [
            (RELEASES, (!debts.is_empty()).then(|| serde_json::to_string(&debts))),
            (RESTS, (!resting.is_empty()).then(|| serde_json::to_string(&resting))),
        ] {
            match text {
                Some(text) => annotations.insert(key.to_owned(), text?),
                None => annotations.remove(key),
            };
        }
        Ok(())
    }
}

fn parsed<T: DeserializeOwned + Default>(lease: &Lease, key: &str) -> T {
    let text = lease.metadata.annotations.as_ref().and_then(|all| all.get(key));
    match text.map(|text| serde_json::from_str(text)) {
        Some(Ok(parsed)) => parsed,
        Some(Err(error)) => {
            tracing::error!(op = "readJournal", %error, "{key} of the allocator's Lease cannot be read: what it names is not held");
            T::default()
        }
        None => T::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let ip = |n: usize| IpAddr::from([192, 0, u8::try_from(n / 256).unwrap(), u8::try_from(n % 256).unwrap()]);
        let grant = Grant { uid: "u".to_owned(), version: "7".to_owned(), ips: [ip(1)].into() };
        let mut journal = Journal { grants: [("a/b".to_owned(), grant)].into(), ..Journal::default() };
        journal.resting = (0..RESTING + 50).map(|n| (ip(n), 1_000 + n as u64)).collect();
        let mut lease = Lease::default();
        journal.write(&mut lease).unwrap();
        let read = Journal::read(&lease);
        assert_eq!((&read.grants, read.resting.len()), (&journal.grants, RESTING));
        assert!(!read.resting.contains_key(&ip(49)) && read.resting[&ip(50)] == 1_050, "the last ones: {read:?}");
        let aged = read.aged(Duration::from_millis(1_060)).resting;
        assert!(!aged.contains_key(&ip(60)) && aged[&ip(61)] == 1, "{aged:?}");
        journal.resting.clear();
        journal.write(&mut lease).unwrap();
        assert_eq!(Journal::read(&lease), journal);
        lease.metadata.annotations.as_mut().unwrap().insert(RESTS.to_owned(), "[1]".to_owned());
        assert_eq!(Journal::read(&lease), journal, "what cannot be read takes nothing else with it");
    }
}
