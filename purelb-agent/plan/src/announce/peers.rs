//! What is known of the other nodes, from their Leases: whether they live, what they assert, and what of it may still be
//! true although the Lease is gone.
//!
//! Clocks of two nodes are never compared. A node is silent when its Lease did not change for its duration, by our clock
//! since we saw the last change. That proves nothing yet: our watch may stand still. Only a Lease that is revoked, or
//! released, or was seen deleted for as long as it ran, is over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::election::Lots;
use super::lease::{Lease, Mark, Statement, Strength};

/// PureLB's agents take their addresses away about this long after the Lease is deleted, in milliseconds.
const PURELB_LEAVES: u64 = 2500;

/// The other nodes.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    nodes: BTreeMap<String, Peer>,
    ips: BTreeSet<IpAddr>,
}

/// Another node.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The newest version that was seen; older ones come late and count for nothing.
    version: u64,
    uid: String,
    says: Arc<Statement>,
    /// When its last change was seen.
    since: u64,
    state: State,
    /// What was asserted by Leases that were deleted, and until when it may be true.
    ghosts: Vec<(Arc<Statement>, u64)>,
    lots: Lots,
}

/// What has become of a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is there.
    Present,
    /// Its holder answers for nothing: released, revoked.
    Over,
    /// It was deleted.
    Deleted,
}

/// What an observation told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing: an old version.
    Nothing,
    /// It lives, and says what it said before.
    Alive,
    /// Something else than before.
    Changed,
}

impl Peers {
    /// A version of a Lease was seen.
    pub fn observe(&mut self, lease: &Lease, now: u64) -> News {
        let state = if lease.says.is_over() { State::Over } else { State::Present };
        let Some(peer) = self.nodes.get_mut(&lease.node) else {
            let mut lots = Lots::new(&lease.node);
            lots.remember(&self.ips);
            let (version, uid, says) = (lease.version, lease.uid.clone(), lease.says.clone());
            self.nodes
                .insert(lease.node.clone(), Peer { version, uid, says, since: now, state, ghosts: Vec::new(), lots });
            return News::Changed;
        };
        if lease.version <= peer.version {
            return News::Nothing;
        }
        let was_silent = peer.is_silent(now);
        if lease.uid != peer.uid {
            // Deleted meanwhile, unseen.
            peer.haunt(now);
        }
        let same = peer.state == state && peer.uid == lease.uid && peer.says == lease.says && !was_silent;
        (peer.version, peer.since, peer.state) = (lease.version, now, state);
        if same {
            return News::Alive;
        }
        (peer.uid, peer.says) = (lease.uid.clone(), lease.says.clone());
        News::Changed
    }

    /// A Lease was deleted; its last version was not newer than `version`.
    pub fn delete(&mut self, node: &str, version: u64, now: u64) {
        if let Some(peer) = self.nodes.get_mut(node).filter(|peer| version >= peer.version) {
            peer.haunt(now);
            (peer.version, peer.state) = (version, State::Deleted);
        }
    }

    /// We revoked a Lease: that write made this version.
    pub fn revoked(&mut self, node: &str, version: u64) {
        if let Some(peer) = self.nodes.get_mut(node).filter(|peer| version > peer.version) {
            (peer.version, peer.state) = (version, State::Over);
        }
    }

    /// All Leases that were there at `version`, by one consistent list.
    pub fn list(&mut self, leases: &[Lease], version: u64, now: u64) {
        for lease in leases {
            self.observe(lease, now);
        }
        let listed: BTreeSet<&String> = leases.iter().map(|lease| &lease.node).collect();
        let missing = self.nodes.iter().filter(|(node, peer)| !listed.contains(node) && peer.state != State::Deleted);
        let missing: Vec<String> = missing.map(|(node, _)| node.clone()).collect();
        for node in missing {
            self.delete(&node, version, now);
        }
    }

    /// Time passed: what cannot be true any more is forgotten.
    pub fn pass(&mut self, now: u64) {
        for peer in self.nodes.values_mut() {
            peer.ghosts.retain(|(_, until)| *until > now);
            // It knows no revocation, so silence is the best proof there is.
            if peer.is_purelbs() && peer.is_silent(now) {
                peer.state = State::Over;
            }
        }
    }

    /// Our clock cannot be trusted for what was before `now`: all waiting begins anew.
    pub fn forget_times(&mut self, now: u64) {
        for peer in self.nodes.values_mut() {
            peer.since = now;
            peer.ghosts.iter_mut().for_each(|(says, until)| *until = now.saturating_add(says.duration));
        }
    }

    /// These addresses are asked for often.
    pub fn remember(&mut self, ips: &BTreeSet<IpAddr>) {
        if self.ips != *ips {
            self.ips.clone_from(ips);
            self.nodes.values_mut().for_each(|peer| peer.lots.remember(ips));
        }
    }

    /// Every node that was ever seen.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Peer)> {
        self.nodes.iter().map(|(node, peer)| (node.as_str(), peer))
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, node: &str) -> Option<&Peer> {
        self.nodes.get(node)
    }

    /// The next time at which one falls silent or a ghost is over.
    #[must_use]
    pub fn due(&self, now: u64) -> u64 {
        let times = self.nodes.values().flat_map(|peer| {
            let silent = (peer.state == State::Present).then(|| peer.silent_at());
            silent.into_iter().chain(peer.ghosts.iter().map(|(_, until)| *until))
        });
        times.filter(|time| *time > now).min().unwrap_or(u64::MAX)
    }
}

impl Peer {
    /// What it said last.
    #[must_use]
    pub fn says(&self) -> &Statement {
        &self.says
    }

    /// The version seen last.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// What has become of its Lease.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// It answers for nothing, and none of its earlier lives does.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        !matches!(self.state, State::Present) && self.ghosts.is_empty()
    }

    /// It may answer although its Lease is deleted.
    #[must_use]
    pub const fn is_ghost(&self) -> bool {
        !self.ghosts.is_empty()
    }

    /// Its Lease is there and did not change for as long as it runs.
    #[must_use]
    pub fn is_silent(&self, now: u64) -> bool {
        self.state == State::Present && now >= self.silent_at()
    }

    /// It stands for election.
    #[must_use]
    pub fn is_alive(&self, now: u64) -> bool {
        self.state == State::Present && now < self.silent_at()
    }

    /// It runs PureLB's agent, which leaves no marks: what is known of it is a good guess.
    #[must_use]
    pub fn is_purelbs(&self) -> bool {
        self.says.ours.is_none()
    }

    /// Its mark for a node.
    #[must_use]
    pub fn mark(&self, node: &str) -> Option<&Mark> {
        self.says.ours.as_ref().and_then(|ours| ours.yields.get(node))
    }

    /// Its lots.
    #[must_use]
    pub const fn lots(&self) -> &Lots {
        &self.lots
    }

    /// How strongly it asserts an address, or one of its earlier lives does.
    #[must_use]
    pub fn strength(&self, ip: IpAddr) -> Option<Strength> {
        let present = (self.state == State::Present).then_some(&self.says);
        let all = present.into_iter().chain(self.ghosts.iter().map(|(says, _)| says));
        all.filter_map(|says| says.rank(ip)).min().map(|rank| (rank, self.lots.of(ip)))
    }

    fn silent_at(&self) -> u64 {
        self.since.saturating_add(self.says.duration)
    }

    /// What its Lease asserted may be true for as long as it ran, from now on.
    fn haunt(&mut self, now: u64) {
        if self.state == State::Present {
            let long = if self.is_purelbs() { PURELB_LEAVES } else { self.says.duration };
            self.ghosts.push((self.says.clone(), now.saturating_add(long)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::lease::Ours;

    fn lease(uid: &str, version: u64, released: bool) -> Lease {
        let subnets = if released { [].into() } else { ["192.0.2.0/24".parse().unwrap()].into() };
        let ours = Some(Ours { released, ..Ours::default() });
        let says = Arc::new(Statement { duration: 10_000, subnets, ours, ..Statement::default() });
        Lease { node: "n".to_owned(), uid: uid.to_owned(), version, says }
    }

    fn asserts(peers: &Peers) -> bool {
        let peer = peers.get("n").unwrap();
        assert_eq!(peer.is_gone(), peer.strength("192.0.2.1".parse().unwrap()).is_none());
        !peer.is_gone()
    }

    #[test]
    fn silence_proves_nothing_and_a_revocation_does() {
        let mut peers = Peers::default();
        peers.observe(&lease("a", 1, false), 0);
        peers.observe(&lease("a", 2, false), 5000);
        assert!(peers.get("n").unwrap().is_alive(14_999) && peers.get("n").unwrap().is_silent(15_000));
        assert_eq!(peers.observe(&lease("a", 1, false), 15_000), News::Nothing, "an old version is no sign of life");
        peers.pass(1_000_000);
        assert!(asserts(&peers));
        peers.revoked("n", 3);
        assert!(!asserts(&peers));
        assert_eq!(peers.observe(&lease("a", 4, false), 1_000_000), News::Changed, "it is back");
        assert!(asserts(&peers));
    }

    #[test]
    fn a_deleted_lease_goes_on_unless_it_was_released() {
        let mut peers = Peers::default();
        peers.observe(&lease("a", 1, false), 0);
        peers.delete("n", 2, 7000);
        peers.pass(16_999);
        assert!(asserts(&peers));
        peers.pass(17_000);
        assert!(!asserts(&peers));
        peers.observe(&lease("b", 3, false), 20_000);
        peers.observe(&lease("b", 4, true), 20_001);
        peers.delete("n", 5, 20_002);
        assert!(!asserts(&peers));
    }

    /// Another agent of that name made it, and the first one may answer still.
    #[test]
    fn a_lease_made_anew_unseen_leaves_a_ghost() {
        let mut peers = Peers::default();
        peers.observe(&lease("a", 1, false), 0);
        peers.list(&[lease("b", 3, true)], 3, 7000);
        peers.pass(16_999);
        assert!(peers.get("n").unwrap().is_ghost() && asserts(&peers));
        peers.pass(17_000);
        assert!(!asserts(&peers));
    }
}
