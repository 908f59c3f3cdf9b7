//! The decision of a packet for a VIP: which endpoint, or why not. The law it serves: a flow whose
//! endpoint is alive never moves, evicted pins apart.
//!
//! In the kernel [`Tables`] are the maps, in `explain` the pinned maps read-only, in the property
//! tests plain trees.

use crate::hash::{self, Address};
use crate::parse;
use crate::table::{
    Affinity, AffinityKey, CLOSED, Config, DROP, Endpoint, FIN_CLIENT, FIRST_ENDPOINT, FlowKey, GONE, OPEN, PASS, Pin,
    READY, RangeKey, Reply, ReplyKey, Rev, RevKey, SERVICE_RANGES, Service, ServiceKey, Slot, TERMINATING,
};
use crate::verdict::Reason;

const FIN: u32 = parse::FIN as u32;
const SYN: u32 = parse::SYN as u32;
const RST: u32 = parse::RST as u32;
const ACK: u32 = parse::ACK as u32;
const TCP: u16 = 6;
const UDP: u16 = 17;
/// How many slots the second choice of 4.3 looks at.
const SECOND_CHOICES: u32 = 32;

/// The maps as the decision sees them; values are copies.
pub trait Tables<A: Address> {
    /// `SERVICES`
    fn service(&self, key: &ServiceKey<A>) -> Option<Service>;
    /// `SRC_RANGES`: some range of the service holds the client.
    fn in_range(&self, key: &RangeKey<A>) -> bool;
    /// `SLOTS`, one 8-byte load.
    fn slot(&self, index: u32) -> Slot;
    /// Stores the program's half of a slot, one aligned 4-byte store.
    fn stamp(&self, index: u32, half: u32);
    /// `ENDPOINTS`
    fn endpoint(&self, id: u32) -> Option<Endpoint<A>>;
    /// `PINS`
    fn pin(&self, key: &FlowKey<A>) -> Option<Pin>;
    /// `PINS`
    fn put_pin(&self, key: &FlowKey<A>, pin: &Pin);
    /// `AFFINITY`
    fn affinity(&self, key: &AffinityKey<A>) -> Option<Affinity>;
    /// `AFFINITY`
    fn put_affinity(&self, key: &AffinityKey<A>, value: &Affinity);
    /// `HALF_OPEN`
    fn half_open(&self, key: &ReplyKey<A>) -> Option<Reply<A>>;
    /// `HALF_OPEN`
    fn put_half_open(&self, key: &ReplyKey<A>, value: &Reply<A>);
    /// `HALF_OPEN`
    fn remove_half_open(&self, key: &ReplyKey<A>);
    /// `REPLIES` for TCP, `UDP_REPLIES` for UDP (by the key's protocol).
    fn reply(&self, key: &ReplyKey<A>) -> Option<Reply<A>>;
    /// The same.
    fn put_reply(&self, key: &ReplyKey<A>, value: &Reply<A>);
    /// The same.
    fn remove_reply(&self, key: &ReplyKey<A>);
    /// `REVSVC`
    fn reverse(&self, key: &RevKey<A>) -> Option<Rev<A>>;
    /// `DIRECT`: the client speaks to the pod itself.
    fn direct(&self, key: &ReplyKey<A>) -> bool;
    /// Takes one insert out of this CPU's budget of the tick; false when it is used up.
    fn budget(&self, config: &Config, tick: u32) -> bool;
}

/// A TCP or UDP packet towards a VIP, ports in host order.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Flow<A> {
    /// Source address.
    pub client: A,
    /// Destination address.
    pub vip: A,
    /// Source port.
    pub client_port: u16,
    /// Destination port.
    pub port: u16,
    /// TCP flags (0 for UDP), and [`FRAGMENT`].
    pub flags: u32,
}

/// `Flow.flags`: first of several fragments; is never balanced.
pub const FRAGMENT: u32 = 1 << 8;

/// What to do with it.
#[derive(Clone, Copy, Debug)]
pub struct Verdict<A: Address> {
    /// Why; [`Reason::Forwarded`]: to `endpoint`.
    pub reason: Reason,
    /// Where to.
    pub endpoint: Endpoint<A>,
    /// Its id.
    pub id: u16,
    /// [`Service::id`], or `u32::MAX` before one was found.
    pub service: u32,
    /// First packet of a flow.
    pub new: bool,
    /// Slot the flow fell into, for `explain`.
    pub slot: u32,
}

impl<A: Address> Verdict<A> {
    #[inline(always)]
    fn exit(reason: Reason, service: u32) -> Self {
        Self { reason, endpoint: bytemuck::Zeroable::zeroed(), id: DROP, service, new: false, slot: u32::MAX }
    }
}

struct Case<'a, A: Address, T: Tables<A>> {
    tables: &'a T,
    config: &'a Config,
    flow: &'a Flow<A>,
    service: Service,
    slot: Slot,
    index: u32,
    tick: u32,
    hash: u32,
}

struct Choice {
    id: u16,
    pin: bool,
    new: bool,
    over: bool,
}

/// Age of a tick, tolerant of an entry a moment ahead.
#[inline(always)]
pub(crate) const fn age(now: u32, then: u32) -> u32 {
    let age = now.wrapping_sub(then);
    if age > u32::MAX / 2 { 0 } else { age }
}

/// Decides a packet towards a VIP. `PROTO` is 6 or 17, a constant so that the verifier never
/// meets a protocol it forgot.
#[inline(always)]
pub fn decide<A: Address, T: Tables<A>, const PROTO: u16>(
    tables: &T,
    config: &Config,
    flow: &Flow<A>,
    tick: u32,
) -> Option<Verdict<A>> {
    let key = ServiceKey { vip: flow.vip, port: flow.port, proto: PROTO };
    let service = tables.service(&key)?;
    if service.flags & SERVICE_RANGES != 0 && !allowed(tables, service.id, flow) {
        return Some(Verdict::exit(Reason::SourceRange, service.id));
    }
    let client_port = if service.affinity == 0 { flow.client_port } else { 0 };
    let hash = hash::flow(config.seed, flow.client, flow.vip, client_port, flow.port, PROTO);
    let index = service.base + (hash & service.mask);
    let slot = tables.slot(index);
    let case = Case { tables, config, flow, service, slot, index, tick, hash };
    Some(case.run::<PROTO>())
}

#[inline(never)]
fn allowed<A: Address, T: Tables<A>>(tables: &T, service: u32, flow: &Flow<A>) -> bool {
    tables.in_range(&RangeKey { service: service.to_be(), client: flow.client })
}

impl<A: Address, T: Tables<A>> Case<'_, A, T> {
    #[inline(always)]
    fn run<const PROTO: u16>(&self) -> Verdict<A> {
        let syn = PROTO == TCP && self.flow.flags & (SYN | ACK) == SYN;
        let stale =
            self.config.heartbeat_limit != 0 && age(self.tick, self.config.heartbeat) > self.config.heartbeat_limit;
        if stale && syn {
            return self.exit(Reason::PassedStale);
        }
        let unsettled = self.slot.unsettled(self.service.epoch);
        let choice = match (PROTO == TCP, syn, unsettled) {
            (true, false, false) => Choice { id: self.slot.cur(), pin: false, new: false, over: false },
            (true, false, true) => self.tcp_running(),
            (true, true, _) => self.tcp_syn(unsettled),
            (false, _, _) => self.udp(unsettled, stale),
        };
        if choice.over {
            return self.exit(Reason::OverBudget);
        }
        let mut id = choice.id;
        let mut pin = choice.pin;
        if stale && choice.new {
            return self.exit(Reason::PassedStale);
        }
        if id == PASS {
            if pin {
                self.pin::<PROTO>(PASS, 0);
            }
            if PASS != self.slot.cur() {
                self.stamp();
            }
            return self.exit(Reason::PassedToProxy);
        }
        let Some(mut endpoint) = self.usable(id) else {
            return self.exit(if stale { Reason::PassedStale } else { Reason::NoEndpoint });
        };
        if self.flow.flags & FRAGMENT != 0 {
            return self.exit(Reason::Fragment);
        }
        if syn || PROTO == UDP {
            if self.taken::<PROTO>(&endpoint) {
                id = self.second::<PROTO>(id);
                let Some(other) = self.usable(id) else {
                    return self.exit(Reason::TupleCollision);
                };
                (endpoint, pin) = (other, true);
            }
            self.remember::<PROTO>(id, &endpoint);
            if choice.new && self.service.affinity != 0 {
                self.stick(id, endpoint.generation);
            }
        } else if stale && !self.known::<PROTO>(&endpoint) {
            return self.exit(Reason::PassedStale);
        }
        if PROTO == TCP && self.flow.flags & (FIN | RST) != 0 {
            self.closing::<PROTO>(&endpoint);
        }
        if pin {
            self.pin::<PROTO>(id, endpoint.generation);
        }
        if id != self.slot.cur() {
            self.stamp();
        }
        Verdict { reason: Reason::Forwarded, endpoint, id, service: self.service.id, new: choice.new, slot: self.index }
    }

    #[inline(always)]
    fn exit(&self, reason: Reason) -> Verdict<A> {
        Verdict { slot: self.index, ..Verdict::exit(reason, self.service.id) }
    }

    /// Unsettled, no SYN: its pin, else `prev`.
    #[inline(never)]
    fn tcp_running(&self) -> Choice {
        let id = match self.pinned::<TCP>() {
            Some((id, _)) => id,
            None => self.slot.prev(),
        };
        Choice { id, pin: false, new: false, over: false }
    }

    #[inline(never)]
    fn tcp_syn(&self, unsettled: bool) -> Choice {
        let cur = self.slot.cur();
        let mut id = cur;
        if let Some(sticky) = self.sticky() {
            id = sticky;
        } else if unsettled {
            match self.pinned::<TCP>() {
                Some((pinned, state)) if state == READY => id = pinned,
                _ => {
                    if self.half_open_names(self.slot.prev()) {
                        id = self.slot.prev();
                    }
                }
            }
        }
        let pin = unsettled || id != cur;
        if pin && !self.tables.budget(self.config, self.tick) {
            let prev = self.slot.prev();
            let ready = self.usable(prev).is_some_and(|e| { e.state } == READY);
            return Choice { id: prev, pin: false, new: true, over: !ready };
        }
        Choice { id, pin, new: true, over: false }
    }

    #[inline(never)]
    fn udp(&self, unsettled: bool, stale: bool) -> Choice {
        let cur = self.slot.cur();
        if !unsettled {
            if self.live_udp(cur) {
                return Choice { id: cur, pin: false, new: false, over: false };
            }
            let id = self.sticky().unwrap_or(cur);
            return Choice { id, pin: id != cur, new: true, over: false };
        }
        match self.pinned::<UDP>() {
            Some((id, state)) if state == READY || state == TERMINATING => {
                let new = stale && !self.live_udp(id);
                return Choice { id, pin: false, new, over: false };
            }
            _ => {}
        }
        let prev = self.slot.prev();
        let keep = if prev == PASS {
            age(self.tick, self.service.changed) < self.config.udp_pass
        } else {
            self.live_udp(prev)
        };
        if keep {
            return Choice { id: prev, pin: true, new: false, over: false };
        }
        if cur != prev && self.live_udp(cur) {
            return Choice { id: cur, pin: true, new: false, over: false };
        }
        let id = self.sticky().unwrap_or(cur);
        if !self.tables.budget(self.config, self.tick) {
            let ready = self.usable(prev).is_some_and(|e| { e.state } == READY);
            return Choice { id: prev, pin: false, new: true, over: !ready };
        }
        Choice { id, pin: true, new: true, over: false }
    }

    /// The endpoint of an id unless it is gone.
    #[inline(always)]
    fn usable(&self, id: u16) -> Option<Endpoint<A>> {
        if id < FIRST_ENDPOINT {
            return None;
        }
        let e = self.tables.endpoint(u32::from(id))?;
        if { e.state } == GONE { None } else { Some(e) }
    }

    /// The flow's pin of this epoch with its endpoint's state; PASS counts as ready.
    #[inline(always)]
    fn pinned<const PROTO: u16>(&self) -> Option<(u16, u16)> {
        let pin = self.tables.pin(&self.flow_key::<PROTO>())?;
        if pin.epoch != self.service.epoch {
            return None;
        }
        let id = pin.endpoint as u16;
        if id == PASS {
            return Some((PASS, READY));
        }
        let e = self.usable(id)?;
        if { e.generation } == pin.generation { Some((id, e.state)) } else { None }
    }

    /// Where ClientIP affinity sends new flows, when it still may.
    #[inline(always)]
    fn sticky(&self) -> Option<u16> {
        if self.service.affinity == 0 {
            return None;
        }
        let entry = self.tables.affinity(&AffinityKey { service: self.service.id, client: self.flow.client })?;
        let e = self.usable(entry.endpoint as u16)?;
        let fresh = age(self.tick, entry.used) < self.service.affinity;
        if fresh && { e.state } == READY && { e.generation } == entry.generation {
            Some(entry.endpoint as u16)
        } else {
            None
        }
    }

    /// A fresh half-open entry says that this very SYN went to `id` before.
    #[inline(always)]
    fn half_open_names(&self, id: u16) -> bool {
        let Some(e) = self.usable(id) else { return false };
        let Some(r) = self.tables.half_open(&self.reply_key::<TCP>(&e)) else { return false };
        self.same_front(&r) && { r.generation } == { e.generation } && age(self.tick, r.used) <= self.config.half_open
    }

    #[inline(always)]
    fn live_udp(&self, id: u16) -> bool {
        let Some(e) = self.usable(id) else { return false };
        if { e.state } != READY && { e.state } != TERMINATING && id != self.slot.cur() {
            return false;
        }
        let Some(r) = self.tables.reply(&self.reply_key::<UDP>(&e)) else { return false };
        self.same_front(&r) && { r.generation } == { e.generation } && age(self.tick, r.used) <= self.config.udp_idle
    }

    #[inline(always)]
    fn same_front(&self, r: &Reply<A>) -> bool {
        let (vip, port) = (r.vip, r.port);
        vip == self.flow.vip && port == self.flow.port
    }

    /// The endpoint already hears this client port through another VIP or port (4.3).
    #[inline(never)]
    fn taken<const PROTO: u16>(&self, e: &Endpoint<A>) -> bool {
        let key = &self.reply_key::<PROTO>(e);
        if PROTO == TCP
            && let Some(r) = self.tables.half_open(key)
            && !self.same_front(&r)
            && { r.state } != CLOSED
            && age(self.tick, r.used) <= self.config.half_open
        {
            return true;
        }
        let idle = if PROTO == TCP { self.config.tcp_idle } else { self.config.udp_idle };
        match self.tables.reply(key) {
            Some(r) => !self.same_front(&r) && { r.state } != CLOSED && age(self.tick, r.used) <= idle,
            None => false,
        }
    }

    /// A reply entry says that the flow runs.
    #[inline(never)]
    fn known<const PROTO: u16>(&self, e: &Endpoint<A>) -> bool {
        let key = self.reply_key::<PROTO>(e);
        self.tables.reply(&key).is_some() || self.tables.half_open(&key).is_some()
    }

    /// The next different endpoint of the table that is free for this client port, or DROP.
    #[inline(never)]
    fn second<const PROTO: u16>(&self, first: u16) -> u16 {
        let mut id = first;
        for step in 1..SECOND_CHOICES {
            let slot = self.tables.slot(self.service.base + (self.hash.wrapping_add(step) & self.service.mask));
            if slot.cur() != first {
                id = slot.cur();
                break;
            }
        }
        match self.usable(id) {
            Some(e) if id != first && { e.state } == READY && !self.taken::<PROTO>(&e) => id,
            _ => DROP,
        }
    }

    /// Writes what un-NAT of the replies needs.
    #[inline(never)]
    fn remember<const PROTO: u16>(&self, id: u16, e: &Endpoint<A>) {
        let key = self.reply_key::<PROTO>(e);
        let value = Reply {
            vip: self.flow.vip,
            port: self.flow.port,
            state: OPEN,
            used: self.tick,
            endpoint: u32::from(id),
            generation: e.generation,
        };
        let old = if PROTO == TCP { self.tables.half_open(&key) } else { self.tables.reply(&key) };
        // Look before writing: an insert into a full LRU costs six times a look-up.
        if old != Some(value) {
            if PROTO == TCP {
                self.tables.put_half_open(&key, &value);
            } else {
                self.tables.put_reply(&key, &value);
            }
        }
        if PROTO == TCP
            && let Some(r) = self.tables.reply(&key)
            && (!self.same_front(&r) || { r.state } == CLOSED || { r.generation } != { e.generation })
        {
            self.tables.remove_reply(&key);
        }
    }

    /// Remembers where new flows of the client go.
    #[inline(never)]
    fn stick(&self, id: u16, generation: u32) {
        let key = AffinityKey { service: self.service.id, client: self.flow.client };
        self.tables.put_affinity(&key, &Affinity { endpoint: u32::from(id), generation, used: self.tick });
    }

    /// FIN or RST of the client.
    #[inline(never)]
    fn closing<const PROTO: u16>(&self, e: &Endpoint<A>) {
        let key = self.reply_key::<PROTO>(e);
        let Some(mut r) = self.tables.reply(&key) else { return };
        let before = r.state;
        let state = if self.flow.flags & RST != 0 { CLOSED } else { before | FIN_CLIENT };
        if self.same_front(&r) && state != before {
            r.state = state;
            r.used = self.tick;
            self.tables.put_reply(&key, &r);
        }
    }

    #[inline(never)]
    fn pin<const PROTO: u16>(&self, id: u16, generation: u32) {
        let pin = Pin { endpoint: u32::from(id), generation, epoch: self.service.epoch };
        let key = self.flow_key::<PROTO>();
        if self.tables.pin(&key) != Some(pin) {
            self.tables.put_pin(&key, &pin);
        }
    }

    #[inline(always)]
    fn stamp(&self) {
        let half = Slot::stamp_half(self.tick, self.service.epoch);
        if (self.slot.0 >> 32) as u32 != half {
            self.tables.stamp(self.index, half);
        }
    }

    #[inline(always)]
    fn flow_key<const PROTO: u16>(&self) -> FlowKey<A> {
        let f = self.flow;
        FlowKey { client: f.client, vip: f.vip, client_port: f.client_port, port: f.port, proto: PROTO as u32 }
    }

    #[inline(always)]
    fn reply_key<const PROTO: u16>(&self, e: &Endpoint<A>) -> ReplyKey<A> {
        let f = self.flow;
        ReplyKey { pod: e.addr, client: f.client, pod_port: e.port, client_port: f.client_port, proto: PROTO as u32 }
    }
}
