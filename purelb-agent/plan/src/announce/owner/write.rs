//! The calls that are under way, and what the own Lease should say and when it is written.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Effect, Owner, Phase, Stop, Written};
use crate::announce::lease::{Mark, Ours, Statement};
use crate::announce::peers::State;

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Put,
    Delete,
}

/// A write of the own Lease that is not answered yet.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub kind: Kind,
    /// When it was sent.
    pub stamp: u64,
    pub says: Statement,
    /// Whatever the answer is, it means nothing any more.
    pub void: bool,
}

/// Everything that was asked and is not answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Calls {
    flight: Option<Flight>,
    /// What the own Lease says, as far as it was acknowledged or sent last.
    sent: Option<Statement>,
    acknowledged: Option<Statement>,
    /// The next write at the latest.
    next: u64,
    /// Nothing is written, listed or read before.
    wait: u64,
    listing: bool,
    /// By node the version known when it was asked for.
    reads: BTreeMap<String, u64>,
    /// Under way.
    revoking: BTreeMap<String, u64>,
}

impl Calls {
    pub fn list(&mut self, now: u64, out: &mut Vec<Effect>) {
        if !self.listing && now >= self.wait {
            self.listing = true;
            out.push(Effect::List);
        }
    }

    pub fn list_done(&mut self, now: u64, pause: u64, good: bool) {
        self.listing = false;
        if !good {
            self.wait(now, pause);
        }
    }

    pub fn read(&mut self, node: String, version: u64, out: &mut Vec<Effect>) {
        if let Entry::Vacant(entry) = self.reads.entry(node) {
            out.push(Effect::Read { node: entry.key().clone() });
            entry.insert(version);
        }
    }

    pub fn read_done(&mut self, node: &str) -> Option<u64> {
        self.reads.remove(node)
    }

    pub fn revoke(&mut self, node: &str, version: u64, out: &mut Vec<Effect>) {
        if !self.revoking.contains_key(node) && !self.reads.contains_key(node) {
            self.revoking.insert(node.to_owned(), version);
            out.push(Effect::Revoke { node: node.to_owned(), version });
        }
    }

    pub fn delete(&mut self, version: u64, now: u64, out: &mut Vec<Effect>) {
        let says = self.acknowledged.clone().unwrap_or_default();
        self.flight = Some(Flight { kind: Kind::Delete, stamp: now, says, void: false });
        out.push(Effect::Delete { version });
    }

    /// The answer to the write under way.
    pub fn landed(&mut self, result: &Written) -> Option<Flight> {
        let flight = self.flight.take()?;
        match (flight.void, result) {
            (false, Written::Done { .. }) => self.acknowledged = Some(flight.says.clone()),
            // What the Lease says is not known: say it again.
            _ => self.sent = None,
        }
        Some(flight)
    }

    pub fn is_writing(&self) -> bool {
        self.flight.is_some()
    }

    pub fn acknowledged(&self) -> Option<&Statement> {
        self.acknowledged.as_ref()
    }

    /// Nothing is asked before.
    pub const fn wait_until(&self) -> u64 {
        self.wait
    }

    /// Nothing before `now` plus the pause.
    pub fn wait(&mut self, now: u64, pause: u64) {
        self.wait = now.saturating_add(pause);
        self.next = self.wait;
    }

    /// The next write need not wait.
    pub fn at_once(&mut self, now: u64) {
        (self.next, self.wait) = (now, now);
        (self.sent, self.acknowledged) = (None, None);
    }

    /// The own Lease is lost: the write under way means nothing.
    pub fn disown(&mut self) {
        (self.sent, self.acknowledged, self.wait) = (None, None, 0);
        self.reads.clear();
        self.flight.iter_mut().for_each(|flight| flight.void = true);
    }
}

/// What the own Lease says.
pub(super) fn statement(owner: &Owner) -> Statement {
    let leaving = matches!(owner.phase, Phase::Leaving(Stop::HandOver, _));
    let released = leaving && owner.on_link.is_empty();
    let holding = matches!(owner.phase, Phase::Leaving(Stop::Hold, _));
    let scope = &owner.mine.scope;
    Statement {
        duration: if holding { owner.settings.hold } else { owner.settings.duration },
        subnets: if released { [].into() } else { scope.subnets.clone() },
        instance: owner.me.instance.clone(),
        ours: Some(Ours {
            place: owner.me.place.clone(),
            session: owner.me.session.clone(),
            epoch: owner.mine.epoch.clone(),
            settled: owner.mine.settled,
            claims: if released { [].into() } else { scope.claims.clone() },
            yields: owner.marks(),
            released,
        }),
        revoked: None,
        odd: None,
    }
}

/// Somebody may be waiting for the difference. That we are settled, and marks for others that are, can wait.
fn is_urgent(new: &Statement, old: &Statement) -> bool {
    let (Some(ours), Some(before)) = (&new.ours, &old.ours) else { return true };
    let says = |of: &Ours| (of.epoch.clone(), of.released);
    new.duration != old.duration
        || new.subnets != old.subnets
        || ours.claims != before.claims
        || says(ours) != says(before)
        || ours.yields.iter().any(|(node, mark)| before.yields.get(node) != Some(mark))
}

impl Owner {
    /// Renews in time, and at once when the Lease should say something else.
    pub(super) fn write(&mut self, now: u64, out: &mut Vec<Effect>) {
        let writes = match self.phase {
            Phase::Entering => true,
            Phase::Listing | Phase::In | Phase::Leaving(..) => self.version.is_some(),
            Phase::Looking | Phase::Refused(..) | Phase::Stopped => false,
        };
        if !writes || self.calls.is_writing() || now < self.calls.wait || self.calls.reads.contains_key(&self.me.node) {
            return;
        }
        let says = self.statement();
        let same = self.calls.sent.as_ref().is_some_and(|sent| !is_urgent(&says, sent));
        if same && now < self.calls.next {
            return;
        }
        // From when it is seen the others wait no longer than it says.
        let until = now.saturating_add(self.term(says.duration));
        self.granted = self.granted.min(until);
        if self.fence > until {
            self.set_fence(until, out);
        }
        self.calls.next = now.saturating_add(self.pace());
        self.calls.sent = Some(says.clone());
        self.calls.flight = Some(Flight { kind: Kind::Put, stamp: now, says: says.clone(), void: false });
        out.push(match self.version {
            Some(version) => Effect::Renew { says: Box::new(says), version },
            None => Effect::Create(Box::new(says)),
        });
    }

    /// The answer to a revocation.
    pub(super) fn revoked(&mut self, node: String, result: &Written, out: &mut Vec<Effect>) {
        let Some(asked) = self.calls.revoking.remove(&node) else { return };
        match result {
            Written::Done { version, .. } => self.peers.revoked(&node, *version),
            // It renewed, or somebody else was faster, or nobody knows: see which.
            Written::Conflict | Written::Gone | Written::Unknown => self.calls.read(node, asked, out),
        }
    }

    /// Our marks: one for each node that asserts what is not settled.
    pub(super) fn marks(&self) -> BTreeMap<String, Mark> {
        let present = self.peers.iter().filter(|(_, peer)| peer.state() == State::Present);
        let open = present.filter_map(|(node, peer)| {
            let ours = peer.says().ours.as_ref().filter(|ours| !ours.settled)?;
            let mine = |ip| self.strength(ip);
            let takes =
                self.on_link.keys().any(|ip| peer.strength(*ip).is_some_and(|s| mine(*ip).is_none_or(|m| s < m)));
            Some((node.to_owned(), Mark { epoch: ours.epoch.clone(), done: !takes }))
        });
        open.collect()
    }

    /// When time alone changes something.
    pub(super) fn next_change(&self, now: u64) -> u64 {
        let phase = match &self.phase {
            Phase::Stopped => return u64::MAX,
            Phase::Refused(lease, since) => since.saturating_add(lease.says.duration),
            Phase::Leaving(_, since) => since.saturating_add(super::PATIENCE),
            _ => u64::MAX,
        };
        let purelbs = self.purelbs_yield().unwrap_or(u64::MAX);
        let times = [phase, purelbs, self.peers.due(now), self.free_from, self.calls.wait];
        times.into_iter().filter(|time| *time > now).min().unwrap_or(u64::MAX)
    }

    /// When the own Lease is to be renewed, or what rests on it to be given up.
    pub(super) fn next_write(&self, now: u64) -> u64 {
        let calls = &self.calls;
        let mut times = [u64::MAX; 3];
        if !calls.is_writing() && self.version.is_some() {
            times[0] = calls.next.max(calls.wait);
        }
        if !self.on_link.is_empty() {
            let silence = self.settings.duration / 10 * 7;
            times[1] = self.stamp.map_or(self.fence, |stamp| stamp.saturating_add(silence));
            times[2] = self.granted.saturating_sub(self.pace());
        }
        times.into_iter().filter(|time| *time > now).min().unwrap_or(u64::MAX)
    }
}
