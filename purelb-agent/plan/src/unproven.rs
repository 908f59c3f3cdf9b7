//! What the maps held when the agent started and the source has not named since, while it could not read
//! something: absence proves nothing then, and what is served stays.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::{GONE, READY, VIP_OTHER_PROTOCOLS, VIP_UNKNOWN_PASS};

use crate::desired::{Desired, Front};
use crate::observed::{Frontend, Observed};
use crate::problem::Problem;

type Endpoints = BTreeMap<(IpAddr, u16), u16>;

/// Only ever shrinks: what was named once counts by what the source says.
#[derive(Debug, Default)]
pub struct Unproven {
    begun: bool,
    /// Nothing but what the source says counts.
    proven: bool,
    /// No Service has named them.
    frontends: BTreeMap<Frontend, u32>,
    /// Of frontends that were there, in the states they had.
    endpoints: BTreeMap<Frontend, Endpoints>,
    /// Flags that they had, and whether a Service has named them.
    vips: BTreeMap<IpAddr, (u32, bool)>,
}

impl Unproven {
    /// The source says what is desired; `unread`: something of it was never read. Puts what may be meant beside it.
    pub fn look(&mut self, unread: bool, observed: &Observed, desired: &mut Desired) {
        if !unread {
            if self.begun && !self.proven {
                desired.gather();
            }
            *self = Self { begun: true, proven: true, ..Self::default() };
            return;
        }
        if !self.begun {
            self.adopt(observed);
        }
        if self.proven {
            return;
        }
        desired.gather();
        for (vip, (_, named)) in &mut self.vips {
            *named |= desired.vips.contains_key(vip);
        }
        for (frontend, front) in &mut desired.fronts {
            self.frontends.remove(frontend);
            let Some(endpoints) = self.endpoints.get_mut(frontend) else { continue };
            endpoints.retain(|e, _| !front.endpoints.contains_key(e) && !front.kept.contains_key(e));
            if !endpoints.is_empty() {
                *front = Arc::new(with(front, endpoints));
            }
        }
    }

    fn adopt(&mut self, observed: &Observed) {
        self.begun = true;
        self.vips = observed.vips.iter().map(|(vip, flags)| (*vip, (*flags, false))).collect();
        let mut of: BTreeMap<(bool, u32), Endpoints> = BTreeMap::new();
        for entry in observed.endpoints.values().filter(|e| e.state != GONE) {
            let endpoints = of.entry((entry.addr.is_ipv4(), entry.service)).or_default();
            endpoints.insert((entry.addr, entry.port), entry.state);
        }
        for (frontend, service) in &observed.services {
            self.frontends.insert(*frontend, service.id);
            let endpoints = of.remove(&(frontend.vip.is_ipv4(), service.id)).unwrap_or_default();
            self.endpoints.insert(*frontend, endpoints);
        }
    }

    /// Absence proves nothing now.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.begun && !self.proven
    }

    /// No Service has named it, and it stays.
    #[must_use]
    pub fn has(&self, frontend: &Frontend) -> bool {
        self.frontends.contains_key(frontend)
    }

    /// The ids of the services that stay though nothing names them.
    pub fn services(&self) -> impl Iterator<Item = u32> + '_ {
        self.frontends.values().copied()
    }

    /// The VIP was there, and nothing proves that it went.
    #[must_use]
    pub fn has_vip(&self, vip: &IpAddr) -> bool {
        let named = self.vips.get(vip).is_none_or(|(_, named)| *named);
        !named || self.frontends.keys().any(|f| f.vip == *vip)
    }

    /// Flags that it had, of those that let through: to drop them could break what runs.
    #[must_use]
    pub fn flags(&self, vip: &IpAddr) -> u32 {
        self.vips.get(vip).map_or(0, |(flags, _)| *flags & (VIP_UNKNOWN_PASS | VIP_OTHER_PROTOCOLS))
    }

    /// For people.
    #[must_use]
    pub fn problem(&self) -> Option<Problem> {
        let fronts = self.frontends.len();
        let rest = self.endpoints.iter().filter(|(f, _)| !self.frontends.contains_key(f));
        let endpoints: usize = rest.map(|(_, e)| e.len()).sum();
        (fronts + endpoints > 0).then(|| Problem {
            object: "tables".to_owned(),
            field: String::new(),
            message: format!(
                "{fronts} addresses and ports and {endpoints} endpoints were there before this start and stay, since \
                 files that may name them were never read"
            ),
            remedy: "correct or remove the files named here as broken".to_owned(),
            origin: String::new(),
        })
    }
}

/// New flows go to what the source names, if it names any that takes them.
fn with(front: &Front, endpoints: &Endpoints) -> Front {
    let mut front = front.clone();
    if front.balanced && front.usable.is_empty() {
        front.usable = endpoints.iter().filter(|(_, state)| **state == READY).map(|(e, _)| *e).collect();
    }
    front.kept.extend(endpoints.iter().map(|(e, state)| (*e, *state)));
    front
}
