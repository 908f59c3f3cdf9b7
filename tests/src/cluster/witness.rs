//! What everybody had, look by look: nobody has what another one has, and what was given stays.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::tenant::{Tenant, ingress};

/// Addresses by uid.
#[derive(Debug, Default)]
pub struct Witness {
    known: BTreeMap<String, Vec<String>>,
    /// Whose type or families were changed, by uid: those may lose addresses.
    changed: BTreeSet<String>,
}

impl Witness {
    /// From now on this Service may lose addresses.
    pub fn changed(&mut self, service: &Value) {
        self.changed.insert(service["metadata"]["uid"].as_str().unwrap_or_default().to_owned());
    }

    /// Looks at all Services of an installation.
    pub fn check(&mut self, tenant: &Tenant<'_>) -> Result<()> {
        let mut owners = BTreeMap::new();
        for service in tenant.admin.list("Service", &tenant.namespace)? {
            let text = |key: &str| service["metadata"][key].as_str().unwrap_or_default().to_owned();
            let (name, uid, now) = (text("name"), text("uid"), ingress(&service));
            for ip in &now {
                if let Some(other) = owners.insert(ip.clone(), name.clone()) {
                    bail!("{ip} is of {other} and of {name}");
                }
            }
            if let Some(before) = self.known.get(&uid).filter(|_| !self.changed.contains(&uid)) {
                ensure!(before.iter().all(|ip| now.contains(ip)), "{name} had {before:?} and has {now:?}");
            }
            self.known.insert(uid, now);
        }
        Ok(())
    }
}
