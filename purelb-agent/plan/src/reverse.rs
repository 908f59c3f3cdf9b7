//! `REVSVC`: which VIP and port a pod's port alone leads back to, where exactly one does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::desired::Front;
use crate::observed::{Action, Backend, Frontend, Observed};

/// Who leads to each pod port.
#[derive(Debug, Default)]
pub struct Leads {
    by_backend: BTreeMap<Backend, BTreeSet<Frontend>>,
    /// Whose answer may have changed.
    touched: BTreeSet<Backend>,
}

impl Leads {
    /// A front leads to its endpoints. Those on the node's own addresses are left out: what the host itself
    /// sends from there is no pod's reply.
    pub fn add(&mut self, frontend: &Frontend, front: &Front, node_addresses: &BTreeSet<IpAddr>) {
        for backend in backends(frontend, front).filter(|b| !node_addresses.contains(&b.vip)) {
            self.by_backend.entry(backend).or_default().insert(*frontend);
            self.touched.insert(backend);
        }
    }

    /// It does not any more.
    pub fn remove(&mut self, frontend: &Frontend, front: &Front) {
        for backend in backends(frontend, front) {
            if let Some(all) = self.by_backend.get_mut(&backend) {
                all.remove(frontend);
                if all.is_empty() {
                    self.by_backend.remove(&backend);
                }
                self.touched.insert(backend);
            }
        }
    }

    /// Looks at everything that is there, too.
    pub fn touch(&mut self, observed: &Observed) {
        self.touched.extend(observed.reverse.keys());
    }

    /// What to write. `unproven`: who seems to lead nowhere may still do.
    pub fn actions(&mut self, observed: &Observed, unproven: bool, actions: &mut Vec<Action>) {
        for backend in std::mem::take(&mut self.touched) {
            let only = match self.by_backend.get(&backend) {
                Some(all) if all.len() == 1 => all.first().map(|f| (f.vip, f.port)),
                _ => None,
            };
            match (only, observed.reverse.get(&backend)) {
                (Some(to), seen) if seen != Some(&to) => actions.push(Action::PutReverse(backend, to.0, to.1)),
                (None, Some(_)) if unproven && !self.by_backend.contains_key(&backend) => {}
                (None, Some(_)) => actions.push(Action::DeleteReverse(backend)),
                _ => {}
            }
        }
    }
}

fn backends(frontend: &Frontend, front: &Front) -> impl Iterator<Item = Backend> {
    let protocol = frontend.protocol;
    front.endpoints.keys().map(move |(addr, port)| Backend { vip: *addr, port: *port, protocol })
}
