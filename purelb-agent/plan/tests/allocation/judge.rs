//! The laws that the model holds allocators and sidecars to.

use std::collections::BTreeSet;

use purelb_plan::alloc::claim::{Claim, annotation};
use purelb_plan::alloc::external::What;
use purelb_plan::ids::family;
use purelb_plan::observed::Family;

use super::{Model, Write};
use crate::sidecar;

impl Model {
    /// The laws, at the moment of a write.
    pub(super) fn judge(&mut self, write: &Write, old: &Claim) {
        let (name, new) = (&write.name, &write.decision.ingress);
        let key = |claim: &Claim| claim.annotations.get(annotation::SHARING_KEY).cloned();
        for ip in new.iter().filter(|ip| !old.ingress.contains(ip)) {
            self.count.given += 1;
            for (other, object) in self.server.iter().filter(|(n, o)| *n != name && o.claim.ingress.contains(ip)) {
                let both = key(old).is_some() && key(old) == key(&object.claim);
                let apart = object.claim.ports.is_disjoint(&old.ports);
                assert!(both && apart, "{ip} of {other} is given to {name} too");
                self.count.shared += 1;
            }
            if sidecar::is_of(*ip) {
                self.count.external += 1;
                assert!(self.sidecar.forgot || self.sidecar.has(name, *ip), "{ip} of {name} is free at the sidecar");
                continue;
            }
            let group = write.catalog.of(*ip).unwrap_or_else(|| panic!("{ip} of {name} is in no group"));
            assert!(!group.excluded.contains(*ip), "{ip} is excluded");
        }
        for ip in old.ingress.iter().filter(|ip| !new.contains(ip)) {
            let asked = old.families.is_empty() || old.families.contains(&family(*ip));
            assert!(!old.load_balancer || !asked, "{name} loses {ip}");
        }
        let distinct: BTreeSet<_> = new.iter().collect();
        assert_eq!(distinct.len(), new.len(), "{name} has an address twice: {new:?}");
        let whole = !old.annotations.contains_key(annotation::ADDRESSES)
            && write.decision.refusal.is_none()
            && !new.is_empty()
            && !old.annotations.contains_key(annotation::MULTI_POOL);
        let multi = write.catalog.groups().any(|group| group.multi_pool);
        if whole && !multi {
            let has: BTreeSet<_> = new.iter().map(|ip| family(*ip)).collect();
            assert!(old.families.iter().all(|of| has.contains(of)), "{name} has {new:?} of {:?}", old.families);
        }
    }

    /// The sidecar holds what statuses name and nothing else, and nobody waits for what it has.
    pub(super) fn look_at_sidecar(&mut self) {
        self.look();
        assert!(self.calls.iter().all(|call| matches!(call.what, What::Allocate(_))), "never ends: {:?}", self.calls);
        for (name, ip) in self.sidecar.all() {
            let named = self.server.get(&name).is_some_and(|object| object.claim.ingress.contains(&ip));
            assert!(named, "the sidecar keeps {ip} for {name}");
        }
        for (name, ask) in self.allocator.asks() {
            let any = [Family::V4];
            let wanted = if ask.families.is_empty() { &any[..] } else { &ask.families };
            let free = wanted.iter().all(|of| self.sidecar.has_room(*of));
            let key = ask.key.is_some();
            assert!(self.sidecar.forgot || key || !free, "{name} asks, and there is room: {ask:?}");
        }
        while !self.calls.is_empty() {
            self.call();
        }
    }
}
