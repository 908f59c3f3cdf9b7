//! What a decision leaves in the tables: reply entries, pins, affinity, the slot's stamp.

use super::{Case, RST, SECOND_CHOICES, TCP, Tables, UDP, age};
use crate::hash::Address;
use crate::table::{
    Affinity, AffinityKey, CLOSED, CONFIG_KUBE_PROXY, DROP, Endpoint, FIN_CLIENT, OPEN, PASS, Pin, READY, Reply, Slot,
};
use crate::verdict::Reason;

/// What [`Case::claim`] answers.
pub(super) const FRESH: u32 = 0;
pub(super) const LIVE: u32 = 1;
pub(super) const TAKEN: u32 = 2;
pub(super) const OVER: u32 = 3;

impl<A: Address, T: Tables<A>> Case<'_, A, T> {
    /// Writes what un-NAT of the replies needs: [`FRESH`], or [`LIVE`] where the flow was known. But
    /// [`TAKEN`] when the endpoint already hears this client port through another VIP or port (4.3), and
    /// [`OVER`] when a UDP flow is new and the budget used up: without its entry no answer would find back.
    /// Looks before it writes: an insert into a full LRU costs six times a look-up.
    #[inline(always)]
    pub(super) fn claim<const PROTO: u16>(&self, id: u16, e: &Endpoint<A>) -> u32 {
        let key = self.reply_key::<PROTO>(e);
        let generation = e.generation;
        let mut answer = FRESH;
        let found = if PROTO == TCP { self.tables.half_open(&key) } else { self.tables.reply::<PROTO>(&key) };
        if let Some(r) = found {
            let (ours, live) = (self.same_front(&r), self.live::<PROTO>(&r));
            if !ours && live && { r.state } != CLOSED {
                return TAKEN;
            }
            let known = ours && live && { r.generation } == generation;
            if known && PROTO == UDP {
                answer = LIVE;
            }
            // What would be written is there already. For a SYN the rest was done a moment ago too: whatever
            // ends a flow removes this entry.
            if known && { r.used } == self.tick && { r.state } == OPEN && { r.endpoint } == u32::from(id) {
                return answer;
            }
        }
        if PROTO == TCP
            && let Some(r) = self.tables.reply::<PROTO>(&key)
        {
            let ours = self.same_front(&r);
            if !ours && { r.state } != CLOSED && age(self.tick, r.used) <= self.config.tcp_idle {
                return TAKEN;
            }
            // Another id that led to the same pod may be given away by now: then its entry is dead, and would hide ours.
            let same = { r.endpoint } == u32::from(id) && { r.generation } == generation;
            if !ours || { r.state } == CLOSED || !same {
                self.tables.remove_reply::<PROTO>(&key);
            }
        }
        if PROTO == UDP && answer == FRESH && !self.tables.budget(self.config, UDP, self.tick) {
            return OVER;
        }
        let (vip, port) = (self.flow.vip, self.flow.port);
        let value = Reply { vip, port, state: OPEN, used: self.tick, endpoint: u32::from(id), generation };
        if PROTO == UDP {
            self.tables.put_reply::<PROTO>(&key, &value);
        } else {
            self.tables.put_half_open(&key, &value);
        }
        answer
    }

    /// The same, once more, out of line.
    #[inline(never)]
    pub(super) fn claim_again<const PROTO: u16>(&self, id: u16, e: &Endpoint<A>) -> u32 {
        self.claim::<PROTO>(id, e)
    }

    /// An entry of `HALF_OPEN` or `UDP_REPLIES` still counts.
    #[inline(always)]
    pub(super) fn live<const PROTO: u16>(&self, r: &Reply<A>) -> bool {
        age(self.tick, r.used) <= if PROTO == TCP { self.config.half_open } else { self.config.udp_idle }
    }

    /// A fresh half-open entry says that this very SYN went to `id` before; or the flow runs there, and a SYN that
    /// comes late, or from somebody else, must not move it (RFC 5961, 4): a client that begins anew is told so.
    #[inline(always)]
    pub(super) fn began_at(&self, id: u16) -> bool {
        let Some(e) = self.usable(id) else { return false };
        let (key, generation) = (self.reply_key::<TCP>(&e), e.generation);
        if let Some(r) = self.tables.half_open(&key)
            && self.same_front(&r)
            && { r.generation } == generation
            && age(self.tick, r.used) <= self.config.half_open
        {
            return true;
        }
        let Some(r) = self.tables.reply::<TCP>(&key) else { return false };
        let open = { r.state } != CLOSED && age(self.tick, r.used) <= self.config.tcp_idle;
        open && { e.state } == READY && self.same_front(&r) && { r.generation } == generation
    }

    /// A reply entry says that the flow runs.
    #[inline(never)]
    pub(super) fn known<const PROTO: u16>(&self, e: &Endpoint<A>) -> bool {
        let key = self.reply_key::<PROTO>(e);
        self.tables.reply::<PROTO>(&key).is_some() || self.tables.half_open(&key).is_some()
    }

    /// The next different endpoint of the table, ready, or DROP.
    #[inline(never)]
    pub(super) fn second(&self, first: u16) -> u16 {
        let mut id = first;
        for step in 1..SECOND_CHOICES {
            let slot = self
                .tables
                .slot(self.found.service.base + (self.found.hash.wrapping_add(step) & self.found.service.mask));
            if slot.cur() != first {
                id = slot.cur();
                break;
            }
        }
        match self.usable(id) {
            Some(e) if id != first && { e.state } == READY => id,
            _ => DROP,
        }
    }

    /// Remembers where new flows of the client go.
    #[inline(never)]
    pub(super) fn stick(&self, id: u16, generation: u32) {
        let key = AffinityKey { service: self.found.service.id, client: self.flow.client };
        self.tables.put_affinity(&key, &Affinity { endpoint: u32::from(id), generation, used: self.tick });
    }

    /// FIN or RST of the client.
    #[inline(never)]
    pub(super) fn closing<const PROTO: u16>(&self, e: &Endpoint<A>) {
        let key = self.reply_key::<PROTO>(e);
        let Some(r) = self.tables.reply::<PROTO>(&key) else {
            // A client that gives up before any answer: its port is free for another VIP at once.
            if self.flow.flags & RST != 0
                && let Some(r) = self.tables.half_open(&key)
                && self.same_front(&r)
            {
                self.tables.remove_half_open(&key);
            }
            return;
        };
        let before = r.state;
        let state = if self.flow.flags & RST != 0 { CLOSED } else { before | FIN_CLIENT };
        if self.same_front(&r) && state != before {
            self.tables.mark_reply::<PROTO>(&key, state, self.tick);
            if state == CLOSED {
                self.tables.remove_half_open(&key);
            }
        }
    }

    /// A new flow that passes since the agent is silent. Where kube-proxy takes it, its pin keeps it there when the
    /// agent is back; elsewhere nobody has it, and a pin would keep the client port from being served.
    #[inline(never)]
    pub(super) fn passed_stale<const PROTO: u16>(&self) -> Reason {
        let kept = self.config.flags & CONFIG_KUBE_PROXY == 0 || self.pinned::<PROTO>() == Some((PASS, READY));
        if !kept && self.tables.budget(self.config, PROTO, self.tick) {
            self.pin::<PROTO>(PASS, 0);
            if PASS != self.found.slot.cur() {
                self.stamp();
            }
        }
        Reason::PassedStale
    }

    #[inline(never)]
    pub(super) fn pin<const PROTO: u16>(&self, id: u16, generation: u32) {
        let pin = Pin { endpoint: u32::from(id), generation, epoch: self.found.service.epoch };
        let key = self.flow_key::<PROTO>();
        if self.tables.pin(&key) != Some(pin) {
            self.tables.put_pin(&key, &pin);
        }
    }

    #[inline(always)]
    pub(super) fn stamp(&self) {
        let half = Slot::stamp_half(self.tick, self.found.service.epoch);
        if (self.found.slot.0 >> 32) as u32 != half {
            self.tables.stamp(self.found.index, half);
        }
    }
}
