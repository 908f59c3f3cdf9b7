//! What was listed while part of the input could not be read yet, at an agent's start: only of that does
//! absence prove anything. The rest of the tables stays as an earlier agent left it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::{GONE, READY, TERMINATING};

use crate::desired::{Desired, Front};
use crate::observed::{EndpointEntry, Frontend, Observed};
use crate::problem::Problem;

/// VIPs and ports, and their endpoints.
#[derive(Debug, Default)]
pub struct Seen {
    fronts: BTreeSet<Frontend>,
    endpoints: BTreeSet<(Frontend, (IpAddr, u16))>,
}

impl Seen {
    /// All that is listed now.
    pub fn add(&mut self, desired: &Desired) {
        for (frontend, front) in &desired.fronts {
            self.fronts.insert(*frontend);
            self.endpoints.extend(front.endpoints.keys().map(|e| (*frontend, *e)));
        }
    }

    /// Whether it was ever listed.
    #[must_use]
    pub fn front(&self, frontend: &Frontend) -> bool {
        self.fronts.contains(frontend)
    }

    /// Adds to fronts, with their service ids, the endpoints that the maps have for them and that were never listed.
    pub fn complete(&self, fronts: &mut BTreeMap<Frontend, (u32, Arc<Front>)>, observed: &Observed) {
        let mut theirs: BTreeMap<u32, Vec<&EndpointEntry>> = BTreeMap::new();
        for entry in observed.endpoints.values().filter(|e| e.state != GONE) {
            theirs.entry(entry.service).or_default().push(entry);
        }
        for (frontend, (id, front)) in fronts {
            let unlisted = |e: &&&EndpointEntry| {
                let at = (e.addr, e.port);
                e.addr.is_ipv4() == frontend.vip.is_ipv4() && !self.endpoints.contains(&(*frontend, at))
            };
            let more = theirs.get(id).into_iter().flatten().filter(unlisted);
            let more: Vec<_> = more.map(|e| ((e.addr, e.port), e.state)).collect();
            if !more.is_empty() {
                add(Arc::make_mut(front), &more);
            }
        }
    }
}

fn add(front: &mut Front, more: &[((IpAddr, u16), u16)]) {
    front.endpoints.extend(more.iter().copied());
    let of = |wanted: u16| more.iter().filter(move |(_, state)| *state == wanted).map(|(at, _)| *at);
    front.usable.extend(of(READY));
    if front.usable.is_empty() {
        // Only such as serve while they terminate took new flows, if any did.
        front.usable.extend(of(TERMINATING));
    }
    front.usable.sort();
    front.usable.dedup();
}

/// What people must know of it.
#[must_use]
pub fn problem(kept: &[Frontend]) -> Option<Problem> {
    let first = kept.first()?;
    let message = format!(
        "{} VIP ports ({} port {}{}) are not listed and stay as they were: part of the input was not readable since the start",
        kept.len(),
        first.vip,
        first.port,
        if kept.len() > 1 { ", ..." } else { "" }
    );
    Some(Problem {
        object: "tables".to_owned(),
        field: String::new(),
        message,
        remedy: "mend or remove what `status` names as not readable".to_owned(),
        origin: String::new(),
    })
}
