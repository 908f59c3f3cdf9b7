//! What was listed while part of the input could not be read yet, at an agent's start: only of that does
//! absence prove anything. The rest of the tables stays as an earlier agent left it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::{GONE, READY, TERMINATING};

use crate::desired::{Desired, Front};
use crate::observed::{Frontend, Observed};
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

    /// Adds the endpoints that the maps have for it and that were never listed.
    pub fn complete(&self, frontend: &Frontend, id: u32, front: &mut Arc<Front>, observed: &Observed) {
        let unlisted = |at: &(IpAddr, u16)| !self.endpoints.contains(&(*frontend, *at));
        let theirs = observed.endpoints.values().filter(|e| e.service == id && e.state != GONE);
        let theirs = theirs.filter(|e| e.addr.is_ipv4() == frontend.vip.is_ipv4());
        let more: Vec<_> = theirs.map(|e| ((e.addr, e.port), e.state)).filter(|(at, _)| unlisted(at)).collect();
        if more.is_empty() {
            return;
        }
        let whole = Arc::make_mut(front);
        whole.endpoints.extend(more.iter().copied());
        let of = |wanted: u16| more.iter().filter(move |(_, state)| *state == wanted).map(|(at, _)| *at);
        whole.usable.extend(of(READY));
        if whole.usable.is_empty() {
            // Only such as serve while they terminate took new flows, if any did.
            whole.usable.extend(of(TERMINATING));
        }
        whole.usable.sort();
        whole.usable.dedup();
    }
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
