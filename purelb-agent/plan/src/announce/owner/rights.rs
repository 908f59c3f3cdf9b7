//! What the node may answer for, and what it leaves to others (rule 4). Nothing here trusts an election: that only says
//! what is worth asserting.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Effect, Owner, Phase, Scope, Want};
use crate::announce::election::elect;
use crate::announce::lease::{MOST_CLAIMS, Rank, Strength, covers};
use crate::announce::peers::Peer;

/// Who should have an address, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Elected {
    winner: Option<String>,
    /// It is us, and not by our lot alone.
    by_preference: bool,
}

impl Owner {
    /// Lets go, asserts, takes, and revokes what is in the way.
    pub(super) fn tend(&mut self, now: u64, out: &mut Vec<Effect>) {
        self.remember();
        let informed = self.phase == Phase::In && self.ready && self.subnets.is_some();
        let elected = match &self.wants {
            Some(wants) if informed => {
                Some(wants.iter().map(|(ip, want)| (*ip, self.elected(*ip, want, now))).collect::<BTreeMap<_, _>>())
            }
            _ => None,
        };
        let held: Vec<_> = self.on_link.iter().filter(|(_, leaving)| !**leaving).map(|(ip, _)| *ip).collect();
        for ip in held {
            if self.yields(ip, now) || elected.as_ref().is_some_and(|elected| self.lets_go(ip, elected.get(&ip), now)) {
                self.withdraw(ip, out);
            }
        }
        let Some(elected) = elected else {
            self.settle(now);
            return;
        };
        self.assert_less(&elected);
        self.count_unclaimed(&elected);
        self.settle(now);
        self.assert_more(&elected, now);
        let mut in_the_way = self.unmarked(now);
        if self.is_fresh(now) && now >= self.free_from && self.purge.is_empty() {
            for (ip, outcome) in &elected {
                if outcome.winner.as_ref() == Some(&self.me.node) && !self.on_link.contains_key(ip) {
                    match self.blockers(*ip) {
                        Some(blockers) if blockers.is_empty() => {
                            self.on_link.insert(*ip, false);
                            out.push(Effect::Hold(*ip));
                        }
                        Some(blockers) => in_the_way.extend(blockers),
                        None => {}
                    }
                }
            }
        }
        self.revoke(&in_the_way, now, out);
    }

    /// How strongly we assert an address, as far as others have yielded to it.
    pub(super) fn strength(&self, ip: IpAddr) -> Option<Strength> {
        let (mine, firm) = (&self.mine.scope, &self.firm);
        let settled = self.mine.settled;
        let rank = if mine.claims.contains(&ip) && (settled || firm.claims.contains(&ip)) {
            Rank::Claim
        } else if covers(&mine.subnets, ip)
            && (settled
                || covers(&firm.subnets, ip)
                || (self.inherited.contains(&ip) && self.on_link.contains_key(&ip)))
        {
            Rank::Subnet
        } else {
            return None;
        };
        Some((rank, self.lots.of(ip)))
    }

    /// How strongly our Lease asserts it, whether or not others have yielded. Of two that do, this says who gives way.
    pub(super) fn asserted(&self, ip: IpAddr) -> Option<Strength> {
        let Scope { subnets, claims } = &self.mine.scope;
        let rank = if claims.contains(&ip) { Rank::Claim } else { Rank::Subnet };
        (rank == Rank::Claim || covers(subnets, ip)).then(|| (rank, self.lots.of(ip)))
    }

    /// When PureLB's agents, which say nothing, have had time to see what we assert.
    pub(super) fn purelbs_yield(&self) -> Option<u64> {
        self.mine.written.filter(|_| !self.mine.settled).map(|written| written.saturating_add(self.pace()))
    }

    pub(super) fn next_epoch(&mut self) -> String {
        self.epochs += 1;
        format!("{}.{}", self.me.session, self.epochs)
    }

    fn remember(&mut self) {
        let ips: BTreeSet<IpAddr> =
            self.wants.iter().flat_map(BTreeMap::keys).chain(self.on_link.keys()).copied().collect();
        self.peers.remember(&ips);
        self.lots.remember(&ips);
    }

    fn elected(&self, ip: IpAddr, want: &Want, now: u64) -> Elected {
        let stands = |peer: &Peer| peer.is_alive(now) && peer.says().covers(ip);
        let others = self.peers.iter().filter(|(_, peer)| stands(peer)).map(|(node, peer)| (node, peer.lots().of(ip)));
        let stays = self.subnets.as_ref().is_some_and(|subnets| covers(subnets, ip));
        let me = (stays && covers(&self.mine.scope.subnets, ip)).then(|| (self.me.node.as_str(), self.lots.of(ip)));
        let outcome = elect(others.chain(me), &want.preference);
        Elected {
            winner: outcome.winner.map(str::to_owned),
            by_preference: outcome.winner == Some(&self.me.node) && outcome.plain != outcome.winner,
        }
    }

    /// Somebody asserts the address more strongly, and all others left their marks for it.
    fn yields(&self, ip: IpAddr, now: u64) -> bool {
        let mine = self.asserted(ip);
        self.peers.iter().filter(|(_, peer)| peer.is_alive(now)).any(|(node, peer)| {
            let stronger = peer.strength(ip).is_some_and(|theirs| mine.is_none_or(|mine| theirs < mine));
            stronger && self.is_next(node, peer)
        })
    }

    /// The address should be another's, who is able to take it, or nobody's.
    fn lets_go(&self, ip: IpAddr, elected: Option<&Elected>, now: u64) -> bool {
        let stays = self.subnets.as_ref().is_some_and(|subnets| covers(subnets, ip));
        let Some(winner) = elected.and_then(|elected| elected.winner.as_deref()).filter(|_| stays) else { return true };
        let Some(peer) = self.peers.get(winner).filter(|peer| peer.is_alive(now)) else { return false };
        if peer.is_purelbs() {
            return true;
        }
        let Some(theirs) = peer.strength(ip) else { return false };
        // What is left of ours without the claim.
        let ours = covers(&self.mine.scope.subnets, ip).then(|| (Rank::Subnet, self.lots.of(ip)));
        let others = self.peers.iter().filter(|(node, peer)| *node != winner && !peer.is_gone());
        let strongest = others.filter_map(|(_, peer)| peer.strength(ip)).chain(ours).min();
        strongest.is_none_or(|strongest| theirs < strongest) && self.is_next(winner, peer)
    }

    /// Nobody but us keeps the node from what it asserts.
    fn is_next(&self, node: &str, peer: &Peer) -> bool {
        let Some(ours) = &peer.says().ours else { return true };
        ours.settled
            || self.peers.iter().all(|(other, third)| {
                let marked = third.mark(node).is_some_and(|mark| mark.epoch == ours.epoch);
                other == node || third.is_purelbs() || third.is_gone() || (marked && !third.is_ghost())
            })
    }

    /// Takes back what is not wanted any more. It is withdrawn already.
    fn assert_less(&mut self, elected: &BTreeMap<IpAddr, Elected>) {
        let Some(subnets) = &self.subnets else { return };
        let mine = &self.mine.scope;
        let wanted = |ip: &IpAddr| elected.get(ip).and_then(|elected| elected.winner.as_ref()) == Some(&self.me.node);
        let claims: BTreeSet<_> =
            mine.claims.iter().filter(|ip| self.on_link.contains_key(ip) || wanted(ip)).copied().collect();
        let kept: BTreeSet<_> = mine.subnets.intersection(subnets).copied().collect();
        let stays = |ip: &IpAddr| covers(&mine.subnets, *ip) == covers(&kept, *ip);
        let free = self.on_link.keys().all(stays);
        if free && kept != mine.subnets {
            self.mine.scope.subnets = kept;
        }
        if claims != self.mine.scope.claims {
            self.mine.scope.claims = claims;
        }
        let Scope { subnets, claims } = &self.mine.scope;
        self.firm.subnets.retain(|net| subnets.contains(net));
        self.firm.claims.retain(|ip| claims.contains(ip));
    }

    fn count_unclaimed(&mut self, elected: &BTreeMap<IpAddr, Elected>) {
        let claims = &self.mine.scope.claims;
        let more = elected.iter().filter(|(ip, elected)| elected.by_preference && !claims.contains(ip)).count();
        self.unclaimed = (claims.len() + more).saturating_sub(MOST_CLAIMS);
    }

    /// Asserts what is wanted besides, under a new name.
    fn assert_more(&mut self, elected: &BTreeMap<IpAddr, Elected>, now: u64) {
        // Others would yield to what we could not take: a ghost leaves no mark.
        let haunted = self.peers.iter().any(|(_, peer)| peer.is_ghost());
        let may = self.mine.settled && self.is_fresh(now) && now >= self.free_from && !haunted;
        let Some(subnets) = self.subnets.as_ref().filter(|_| may) else { return };
        let mine = &self.mine.scope;
        let claims = elected.iter().filter(|(ip, elected)| elected.by_preference && !self.waits_for_slot(**ip, now));
        let claims = claims.map(|(ip, _)| *ip).filter(|ip| !mine.claims.contains(ip));
        let claims: Vec<_> = claims.take(MOST_CLAIMS.saturating_sub(mine.claims.len())).collect();
        if claims.is_empty() && subnets.is_subset(&mine.subnets) {
            return;
        }
        self.firm = mine.clone();
        self.mine.scope.subnets.extend(subnets.iter().copied());
        self.mine.scope.claims.extend(claims);
        self.mine.epoch = self.next_epoch();
        (self.mine.settled, self.mine.written) = (false, None);
    }

    /// An agent of PureLB's has the address, and its slot says so.
    fn waits_for_slot(&self, ip: IpAddr, now: u64) -> bool {
        let slot = self.wants.as_ref().and_then(|wants| wants.get(&ip)).and_then(|want| want.slot.as_deref());
        slot.and_then(|node| self.peers.get(node)).is_some_and(|peer| peer.is_purelbs() && peer.is_alive(now))
    }

    /// Has everybody left a mark for what we assert?
    fn settle(&mut self, now: u64) {
        if self.mine.settled || self.mine.written.is_none() {
            return;
        }
        let seen = self.purelbs_yield().is_some_and(|time| now >= time);
        self.mine.settled = self.peers.iter().all(|(_, peer)| {
            let marked = peer.mark(&self.me.node).is_some_and(|mark| mark.done && mark.epoch == self.mine.epoch);
            peer.is_gone() || (!peer.is_ghost() && (marked || (peer.is_purelbs() && seen)))
        });
    }

    /// Who keeps us from settling.
    fn unmarked(&self, now: u64) -> BTreeSet<String> {
        if self.mine.settled {
            return BTreeSet::new();
        }
        self.peers.iter().filter(|(_, peer)| peer.is_silent(now)).map(|(node, _)| node.to_owned()).collect()
    }

    /// Who asserts the address more strongly than we do; none when we do not assert it.
    fn blockers(&self, ip: IpAddr) -> Option<BTreeSet<String>> {
        let mine = self.strength(ip)?;
        let stronger = |peer: &Peer| !peer.is_gone() && peer.strength(ip).is_some_and(|theirs| theirs < mine);
        Some(self.peers.iter().filter(|(_, peer)| stronger(peer)).map(|(node, _)| node.to_owned()).collect())
    }

    /// Rule 3. PureLB's agents would not notice: after D they are taken for gone.
    fn revoke(&mut self, nodes: &BTreeSet<String>, now: u64, out: &mut Vec<Effect>) {
        if !self.is_fresh(now) || now < self.calls.wait_until() {
            return;
        }
        for node in nodes {
            let Some(peer) = self.peers.get(node).filter(|peer| peer.is_silent(now)) else { continue };
            if !peer.is_purelbs() {
                self.calls.revoke(node, peer.version(), out);
            }
        }
    }
}
