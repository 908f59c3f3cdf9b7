//! How a node comes to have its Lease, loses it, and leaves (rules 3 to 5).

use super::write::Kind;
use super::{Assertion, Effect, Found, Owner, PATIENCE, Phase, Scope, Stop, Written};
use crate::announce::lease::{Lease, Ours};

impl Owner {
    /// Goes one phase further where time allows.
    pub(super) fn advance(&mut self, now: u64, out: &mut Vec<Effect>) {
        match &self.phase {
            Phase::Looking | Phase::Listing => self.calls.list(now, out),
            Phase::Refused(lease, since) if now >= since.saturating_add(lease.says.duration) => {
                // Nobody there renews it. Written by compare-and-swap like a revocation, and as good a proof.
                let version = Some(lease.version);
                self.enter(version, None, now, out);
            }
            Phase::Leaving(how, since) => {
                let (how, since) = (*how, *since);
                self.leave(how, since, now, out);
            }
            _ => {}
        }
    }

    /// The own Lease was seen in a watch.
    pub(super) fn see_own(&mut self, lease: &Lease, now: u64, out: &mut Vec<Effect>) -> bool {
        match (&self.phase, self.version) {
            (Phase::Refused(known, _), _) if lease.version > known.version => {
                self.found_own(Some(lease), now, out);
                true
            }
            (Phase::In | Phase::Listing | Phase::Leaving(..), Some(version)) if lease.version > version => {
                self.still_mine(lease, now, out)
            }
            _ => false,
        }
    }

    /// The own Lease was deleted.
    pub(super) fn lost_own(&mut self, version: u64, now: u64, out: &mut Vec<Effect>) {
        if self.version.is_some_and(|known| version > known) {
            self.lose(out);
        } else if let Phase::Refused(lease, _) = &self.phase
            && version > lease.version
        {
            self.found_own(None, now, out);
        }
    }

    /// A read that we asked for after a conflict.
    pub(super) fn read(&mut self, node: &str, found: &Found, now: u64, out: &mut Vec<Effect>) {
        let Some(version) = self.calls.read_done(node) else { return };
        let own = node == self.me.node;
        match found {
            Found::Lease(lease) if own => {
                self.see_own(lease, now, out);
            }
            Found::Lease(lease) => {
                self.peers.observe(lease, now);
            }
            Found::Absent if own => {
                if self.version == Some(version) {
                    self.lose(out);
                }
            }
            // Whatever was seen meanwhile is newer than this.
            Found::Absent => self.peers.delete(node, version, now),
            Found::Failed => self.calls.wait(now, self.pace() / 4),
        }
    }

    /// All Leases.
    pub(super) fn listed(&mut self, list: Option<(u64, Vec<Lease>)>, now: u64, out: &mut Vec<Effect>) {
        self.calls.list_done(now, self.pace() / 4, list.is_some());
        let Some((version, mut leases)) = list else { return };
        let own = leases.iter().position(|lease| lease.node == self.me.node).map(|at| leases.swap_remove(at));
        self.peers.list(&leases, version, now);
        match self.phase {
            Phase::Looking => self.found_own(own.as_ref(), now, out),
            Phase::Listing => {
                match own {
                    Some(own) => {
                        self.see_own(&own, now, out);
                    }
                    None if self.version.is_some_and(|known| version >= known) => self.lose(out),
                    None => {}
                }
                if self.phase == Phase::Listing {
                    self.phase = Phase::In;
                    self.free_from = now.saturating_add(self.settings.duration);
                }
            }
            _ => {}
        }
    }

    /// What became of a write of the own Lease. False when it only was renewed.
    pub(super) fn written(&mut self, result: &Written, now: u64, out: &mut Vec<Effect>) -> bool {
        let Some(flight) = self.calls.landed(result) else { return false };
        if flight.void {
            return true;
        }
        if flight.kind == Kind::Delete {
            self.end(out);
            return true;
        }
        match result {
            Written::Done { version, .. } => {
                if self.stamp.is_some() && !self.is_fresh(now) {
                    // We were deaf ourselves: whoever seems silent gets the time to be heard.
                    self.peers.forget_times(now);
                }
                let routine = self.is_fresh(now) && self.mine.written.is_some() && self.phase == Phase::In;
                self.version = Some(*version);
                self.stamp = Some(flight.stamp);
                self.granted = flight.stamp.saturating_add(self.term(flight.says.duration)).max(self.granted);
                let ours = flight.says.ours.as_ref();
                if self.mine.written.is_none() && ours.is_some_and(|ours| ours.epoch == self.mine.epoch) {
                    self.mine.written = Some(now);
                }
                if self.phase == Phase::Entering {
                    self.phase = Phase::Listing;
                }
                return !routine;
            }
            _ if self.phase == Phase::Entering => {
                (self.phase, self.version) = (Phase::Looking, None);
                self.calls.wait(now, self.pace() / 4);
            }
            Written::Conflict => {
                let version = self.version.unwrap_or_default();
                self.calls.read(self.me.node.clone(), version, out);
            }
            Written::Gone => self.lose(out),
            Written::Unknown => self.calls.wait(now, self.pace() / 4),
        }
        true
    }

    /// SIGTERM.
    pub(super) fn stop(&mut self, how: Stop, now: u64, out: &mut Vec<Effect>) {
        let has_lease = self.version.is_some();
        match (&self.phase, how) {
            // What is released cannot be held any more.
            (Phase::Stopped | Phase::Leaving(Stop::HandOver, _), _) | (Phase::Leaving(..), Stop::Hold) => {}
            (_, Stop::Hold) if !has_lease => self.end(out),
            _ => self.phase = Phase::Leaving(how, now),
        }
    }

    /// What the own Lease is, for one that has none yet.
    fn found_own(&mut self, own: Option<&Lease>, now: u64, out: &mut Vec<Effect>) {
        let ours = own.and_then(|lease| lease.says.ours.as_ref());
        match own {
            None => self.enter(None, None, now, out),
            Some(lease) if lease.says.is_over() => self.enter(Some(lease.version), None, now, out),
            Some(lease) if ours.is_some_and(|ours| ours.place == self.me.place) => {
                self.enter(Some(lease.version), ours.map(|ours| (lease, ours)), now, out);
            }
            Some(lease) => self.phase = Phase::Refused(lease.clone(), now),
        }
    }

    /// Writes the own Lease for the first time: goes on with what the process before asserted, or asserts nothing.
    fn enter(&mut self, version: Option<u64>, before: Option<(&Lease, &Ours)>, now: u64, out: &mut Vec<Effect>) {
        self.phase = Phase::Entering;
        self.version = version;
        self.firm = Scope::default();
        if let Some((lease, ours)) = before {
            let scope = Scope { subnets: lease.says.subnets.clone(), claims: ours.claims.clone() };
            self.mine = Assertion { scope, epoch: ours.epoch.clone(), settled: ours.settled, written: None };
            let of_nobody: Vec<_> = self.on_link.keys().filter(|ip| self.asserted(**ip).is_none()).copied().collect();
            of_nobody.iter().for_each(|ip| self.withdraw(*ip, out));
            self.purge.extend(of_nobody);
        } else {
            self.disown(out);
            self.mine = Assertion { epoch: self.next_epoch(), settled: true, ..Assertion::default() };
        }
        self.calls.at_once(now);
    }

    /// A newer version of the own Lease: is it still ours? False when nothing follows.
    fn still_mine(&mut self, lease: &Lease, now: u64, out: &mut Vec<Effect>) -> bool {
        let ours = lease.says.ours.as_ref().is_some_and(|ours| ours.session == self.me.session);
        if ours && lease.says.revoked.is_none() {
            self.version = Some(lease.version);
            return false;
        }
        self.lose(out);
        if self.phase == Phase::Looking && lease.says.revoked.is_none() {
            self.found_own(Some(lease), now, out);
        }
        true
    }

    /// The own Lease is gone or another's: all rights end here and now.
    fn lose(&mut self, out: &mut Vec<Effect>) {
        self.version = None;
        self.mine = Assertion::default();
        self.firm = Scope::default();
        self.calls.disown();
        self.disown(out);
        if !matches!(self.phase, Phase::Leaving(..) | Phase::Stopped) {
            self.phase = Phase::Looking;
        }
    }

    /// Nothing on an interface is ours by right.
    fn disown(&mut self, out: &mut Vec<Effect>) {
        (self.stamp, self.granted, self.free_from) = (None, 0, u64::MAX);
        self.inherited.clear();
        self.purge = self.on_link.keys().copied().collect();
        self.set_fence(0, out);
        self.withdraw_all(out);
    }

    fn leave(&mut self, how: Stop, since: u64, now: u64, out: &mut Vec<Effect>) {
        let late = now >= since.saturating_add(PATIENCE);
        let held = self.calls.acknowledged().is_some_and(|says| says.duration == self.settings.hold);
        match how {
            Stop::Hold if held || (late && self.version.is_some()) => {
                self.raise_fence(out);
                self.end(out);
            }
            Stop::Hold if self.version.is_some() => {}
            Stop::Hold | Stop::HandOver => {
                self.withdraw_all(out);
                let released = self.calls.acknowledged().and_then(|says| says.ours.as_ref());
                let released = released.is_some_and(|ours| ours.released);
                match self.version {
                    Some(version) if released && !self.calls.is_writing() => self.calls.delete(version, now, out),
                    Some(_) if !late => {}
                    _ if (self.on_link.is_empty() && !self.calls.is_writing()) || late => self.end(out),
                    _ => {}
                }
            }
        }
    }

    fn end(&mut self, out: &mut Vec<Effect>) {
        self.phase = Phase::Stopped;
        out.push(Effect::Stopped);
    }
}
