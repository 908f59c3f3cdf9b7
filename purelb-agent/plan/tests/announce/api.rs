//! An API server with Leases: versions, compare-and-swap, deletion.
#![expect(clippy::unwrap_used, reason = "a model in a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::sync::Arc;

use purelb_plan::announce::lease::Lease;
use purelb_plan::announce::owner::{Effect, Event, Found, Written};

#[derive(Default)]
pub struct Api {
    pub objects: BTreeMap<String, Lease>,
    pub version: u64,
    uids: u64,
    last: BTreeMap<String, Lease>,
    pub revoked: u64,
    pub conflicts: u64,
}

impl Api {
    /// Carries out what `node` asks: the answer, and whose Lease changed.
    pub fn serve(&mut self, node: &str, call: &Effect) -> (Event, Option<String>) {
        match call {
            Effect::List => (Event::Listed(Some((self.version, self.objects.values().cloned().collect()))), None),
            Effect::Read { node } => {
                let found = self.objects.get(node).map_or(Found::Absent, |lease| Found::Lease(lease.clone()));
                (Event::Read { node: node.clone(), found }, None)
            }
            Effect::Create(says) => {
                if self.objects.contains_key(node) {
                    return (Event::Written(self.conflict()), None);
                }
                self.uids += 1;
                let lease = Lease {
                    node: node.to_owned(),
                    uid: format!("{}", self.uids),
                    version: 0,
                    says: Arc::new((**says).clone()),
                };
                (Event::Written(self.put(lease)), Some(node.to_owned()))
            }
            Effect::Renew { says, version } => match self.find(node, *version) {
                Ok(lease) => {
                    let same = *lease.says == **says;
                    let says = if same { lease.says } else { Arc::new((**says).clone()) };
                    (Event::Written(self.put(Lease { says, ..lease })), Some(node.to_owned()))
                }
                Err(result) => (Event::Written(result), None),
            },
            Effect::Revoke { node: other, version } => match self.find(other, *version) {
                Ok(mut lease) => {
                    self.revoked += 1;
                    let mut says = (*lease.says).clone();
                    says.revoked = Some(node.to_owned());
                    lease.says = Arc::new(says);
                    let result = self.put(lease);
                    (Event::Revoked { node: other.clone(), result }, Some(other.clone()))
                }
                Err(result) => (Event::Revoked { node: other.clone(), result }, None),
            },
            Effect::Delete { version } => match self.find(node, *version) {
                Ok(lease) => {
                    self.delete(node);
                    (Event::Written(Written::Done { version: self.version, uid: lease.uid }), Some(node.to_owned()))
                }
                Err(result) => (Event::Written(result), None),
            },
            Effect::Hold(_) | Effect::Withdraw(_) | Effect::Fence(_) | Effect::Stopped => unreachable!("no call"),
        }
    }

    pub fn delete(&mut self, node: &str) {
        self.version += 1;
        self.last.insert(node.to_owned(), self.objects.remove(node).unwrap());
    }

    /// What a watch says of a Lease.
    pub fn event(&self, node: &str) -> Event {
        match self.objects.get(node) {
            Some(lease) => Event::Observed(lease.clone()),
            None => {
                let last = self.last.get(node).cloned();
                Event::Deleted { node: node.to_owned(), version: self.version, last }
            }
        }
    }

    fn put(&mut self, mut lease: Lease) -> Written {
        self.version += 1;
        lease.version = self.version;
        let uid = lease.uid.clone();
        self.objects.insert(lease.node.clone(), lease);
        Written::Done { version: self.version, uid }
    }

    fn find(&mut self, node: &str, version: u64) -> Result<Lease, Written> {
        match self.objects.get(node) {
            None => Err(Written::Gone),
            Some(lease) if lease.version != version => Err(self.conflict()),
            Some(lease) => Ok(lease.clone()),
        }
    }

    fn conflict(&mut self) -> Written {
        self.conflicts += 1;
        Written::Conflict
    }
}

/// The answer to a call of which nobody knows what became.
pub fn unknown(call: &Effect) -> Event {
    match call {
        Effect::List => Event::Listed(None),
        Effect::Read { node } => Event::Read { node: node.clone(), found: Found::Failed },
        Effect::Revoke { node, .. } => Event::Revoked { node: node.clone(), result: Written::Unknown },
        _ => Event::Written(Written::Unknown),
    }
}
