//! What the leader writes down in its Lease before it does it: addresses that it is about to give, and what sidecars have
//! to take back. A successor reads it and so overlooks nothing that may still come true.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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
}

impl Journal {
    /// What a Lease says. What cannot be read counts as not said.
    #[must_use]
    pub fn read(lease: &Lease) -> Self {
        Self { grants: parsed(lease, GRANTS), debts: parsed(lease, RELEASES) }
    }

    /// Writes it into a Lease.
    ///
    /// # Errors
    /// It has no form in JSON.
    pub fn write(&self, lease: &mut Lease) -> serde_json::Result<()> {
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert(GRANTS.to_owned(), serde_json::to_string(&self.grants)?);
        if self.debts.is_empty() {
            annotations.remove(RELEASES);
        } else {
            let debts: Vec<_> = self.debts.iter().take(DEBTS).collect();
            annotations.insert(RELEASES.to_owned(), serde_json::to_string(&debts)?);
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
