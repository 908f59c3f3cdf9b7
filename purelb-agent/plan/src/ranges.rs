//! Source ranges: who finds room for its own, and which ones go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use purelb_common::table::PASS;

use crate::desired::Front;
use crate::ids::family;
use crate::observed::{Action, Family, Frontend, Observed};

/// What is left of `SRC_RANGES4` and `SRC_RANGES6` in a look.
#[derive(Debug)]
pub struct Room {
    v4: usize,
    v6: usize,
}

impl Room {
    /// What goes in this look is no room yet: it goes last.
    #[must_use]
    pub fn new(observed: &Observed) -> Self {
        let capacity = observed.range_capacity as usize;
        let used = |of| observed.ranges.keys().filter(|(_, net)| family(net.addr()) == of).count();
        Self { v4: capacity.saturating_sub(used(Family::V4)), v6: capacity.saturating_sub(used(Family::V6)) }
    }

    /// Takes what the ranges of a service need that are not there yet, or nothing.
    pub fn take(&mut self, id: u32, front: &Front, observed: &Observed) -> bool {
        let (v4, v6): (Vec<_>, Vec<_>) = missing(id, front, observed).partition(|net| net.addr().is_ipv4());
        match (self.v4.checked_sub(v4.len()), self.v6.checked_sub(v6.len())) {
            (Some(v4), Some(v6)) => {
                *self = Self { v4, v6 };
                true
            }
            _ => false,
        }
    }
}

/// Ranges of a service that are to be written.
pub fn missing<'a>(id: u32, front: &'a Front, observed: &'a Observed) -> impl Iterator<Item = IpNet> + 'a {
    front.ranges.iter().copied().filter(move |net| !observed.ranges.contains_key(&(id, *net)))
}

/// The same service left to kube-proxy, which judges its ranges: without them here, everybody could come or nobody.
/// What runs through us goes on.
#[must_use]
pub fn passed(front: &Front) -> Arc<Front> {
    let kept = front.kept.iter().chain(&front.endpoints).map(|(endpoint, state)| (*endpoint, *state)).collect();
    let (endpoints, usable, ranges) = (BTreeMap::new(), Vec::new(), BTreeSet::new());
    Arc::new(Front { endpoints, kept, usable, balanced: false, fallback: PASS, ranges, ..front.clone() })
}

/// Ranges that nobody wants any more. `all`: of services that are not in `changed` or `unproven`, too.
pub fn unwanted(
    observed: &Observed,
    changed: &BTreeMap<Frontend, (u32, Arc<Front>)>,
    gone: &[Frontend],
    unproven: Option<BTreeSet<u32>>,
    actions: &mut Vec<Action>,
) {
    let wanted: BTreeMap<u32, &Front> = changed.values().map(|(id, front)| (*id, &**front)).collect();
    let gone: BTreeSet<u32> = gone.iter().filter_map(|f| observed.services.get(f)).map(|s| s.id).collect();
    for (id, range) in observed.ranges.keys() {
        let unwanted = match wanted.get(id) {
            Some(front) => !front.ranges.contains(range),
            None => unproven.as_ref().is_some_and(|kept| !kept.contains(id)) || gone.contains(id),
        };
        if unwanted {
            actions.push(Action::DeleteRange(*id, *range));
        }
    }
}
