//! The decision of a packet for a VIP: which endpoint, or why not. The law it serves: a flow whose
//! endpoint is alive never moves, evicted pins apart.
//!
//! In the kernel [`Tables`] are the maps, in `explain` the pinned maps read-only, in the property
//! tests plain trees.

mod record;

use core::ops::Deref;

use record::{LIVE, OVER, TAKEN};

use crate::hash::{self, Address};
use crate::parse;
use crate::table::{
    Affinity, AffinityKey, Config, DROP, Endpoint, FIRST_ENDPOINT, FlowKey, GONE, PASS, Pin, READY, RangeKey, Reply,
    ReplyKey, Rev, RevKey, SERVICE_RANGES, Service, ServiceKey, Slot, TERMINATING, VIP_UNKNOWN_PASS,
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
    /// In the kernel a reference into the map: a copy would cost the stack that the program lacks.
    type Service: Deref<Target = Service>;
    /// Likewise.
    type Endpoint: Deref<Target = Endpoint<A>>;
    /// `SERVICES`
    fn service(&self, key: &ServiceKey<A>) -> Option<Self::Service>;
    /// `SRC_RANGES`: some range of the service holds the client.
    fn in_range(&self, key: &RangeKey<A>) -> bool;
    /// `SLOTS`, one 8-byte load.
    fn slot(&self, index: u32) -> Slot;
    /// Stores the program's half of a slot, one aligned 4-byte store.
    fn stamp(&self, index: u32, half: u32);
    /// `ENDPOINTS`
    fn endpoint(&self, id: u32) -> Option<Self::Endpoint>;
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
    /// `REPLIES` for TCP, `UDP_REPLIES` for UDP. The protocol of the key again, as a constant: the
    /// compiler forgets what it stored there once a helper has seen the key.
    fn reply<const PROTO: u16>(&self, key: &ReplyKey<A>) -> Option<Reply<A>>;
    /// The same.
    fn put_reply<const PROTO: u16>(&self, key: &ReplyKey<A>, value: &Reply<A>);
    /// The same: changes state and tick of an entry, if it is there.
    fn mark_reply<const PROTO: u16>(&self, key: &ReplyKey<A>, state: u16, used: u32);
    /// The same.
    fn remove_reply<const PROTO: u16>(&self, key: &ReplyKey<A>);
    /// `REVSVC`
    fn reverse(&self, key: &RevKey<A>) -> Option<Rev<A>>;
    /// `DIRECT`: the client speaks to the pod itself.
    fn direct(&self, key: &ReplyKey<A>) -> bool;
    /// `CLUSTER`: the address of a node or of a pod range of the cluster.
    fn in_cluster(&self, addr: A) -> bool;
    /// Takes one insert out of this CPU's budget of the tick, TCP's or UDP's; false when it is used up.
    fn budget(&self, config: &Config, proto: u16, tick: u32) -> bool;
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

/// What to do with it, beside the reason.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Verdict<A: Address> {
    /// [`Service::id`], or `u32::MAX` before one was found.
    pub service: u32,
    /// Slot the flow fell into, for `explain`.
    pub slot: u32,
    /// The endpoint's id.
    pub id: u32,
    /// 1 for the first packet of a flow.
    pub new: u32,
    /// Where to, when the reason is [`Reason::Forwarded`]: the endpoint's address.
    pub addr: A,
    /// Its port.
    pub port: u32,
}

impl<A: Address> Verdict<A> {
    /// Before the decision, which writes it in place: the kernel's stack is 512 bytes.
    #[must_use]
    #[inline(always)]
    pub const fn none(vip: A) -> Self {
        Self { service: u32::MAX, slot: u32::MAX, id: 0, new: 0, addr: vip, port: 0 }
    }
}

/// The service and slot of a flow.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Found<S> {
    /// Of the port.
    pub service: S,
    /// As it was read, once.
    pub slot: Slot,
    /// Where it is.
    pub index: u32,
    hash: u32,
}

struct Case<'a, A: Address, T: Tables<A>> {
    tables: &'a T,
    config: &'a Config,
    flow: &'a Flow<A>,
    found: &'a Found<T::Service>,
    tick: u32,
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

/// Decides a packet towards a VIP; `None`: no Service has the port. `PROTO` is 6 or 17, a constant
/// so that the verifier never meets a protocol it forgot.
#[inline(always)]
pub fn decide<A: Address, T: Tables<A>, const PROTO: u16>(
    tables: &T,
    config: &Config,
    flow: &Flow<A>,
    tick: u32,
    out: &mut Verdict<A>,
) -> Option<Reason> {
    let found = find(tables, config, flow, PROTO)?;
    (out.service, out.slot) = (found.service.id, found.index);
    if !allowed(tables, &found, flow) {
        return Some(Reason::SourceRange);
    }
    Some(decide_found::<A, T, PROTO>(tables, config, flow, &found, tick, out))
}

/// The look-ups that every packet needs.
#[inline(always)]
pub fn find<A: Address, T: Tables<A>>(
    tables: &T,
    config: &Config,
    flow: &Flow<A>,
    proto: u16,
) -> Option<Found<T::Service>> {
    let service = tables.service(&ServiceKey { vip: flow.vip, port: flow.port, proto })?;
    let client_port = if service.affinity == 0 { flow.client_port } else { 0 };
    let hash = hash::flow(config.seed, flow.client, flow.vip, client_port, flow.port, proto);
    let index = service.base + (hash & service.mask);
    let slot = tables.slot(index);
    Some(Found { service, slot, index, hash })
}

/// The short way of most TCP packets: a running flow in a settled slot goes to `cur`, and nothing else is
/// looked at. `None`: [`decide_found`] has to say. It would say the same.
#[inline(always)]
pub fn settled<A: Address, T: Tables<A>>(
    tables: &T,
    config: &Config,
    flow: &Flow<A>,
    found: &Found<T::Service>,
    tick: u32,
) -> Option<T::Endpoint> {
    let plain = flow.flags & (SYN | FIN | RST | FRAGMENT) == 0;
    if !plain || found.slot.unsettled(&found.service) || stale(config, tick) || found.slot.cur() < FIRST_ENDPOINT {
        return None;
    }
    let e = tables.endpoint(u32::from(found.slot.cur()))?;
    if { e.state } == GONE { None } else { Some(e) }
}

/// Decides, the service and slot being known and the client allowed.
#[inline(always)]
pub fn decide_found<A: Address, T: Tables<A>, const PROTO: u16>(
    tables: &T,
    config: &Config,
    flow: &Flow<A>,
    found: &Found<T::Service>,
    tick: u32,
    out: &mut Verdict<A>,
) -> Reason {
    Case { tables, config, flow, found, tick }.run::<PROTO>(out)
}

/// Whether the agent has been silent for too long (D17): drops lapse, new flows pass.
#[must_use]
#[inline(always)]
pub const fn stale(config: &Config, tick: u32) -> bool {
    config.heartbeat_limit != 0 && age(tick, config.heartbeat) > config.heartbeat_limit
}

/// A port of a VIP that no Service has: dropped, unless the node itself asked from it (D5). `socket` says
/// whether a UDP socket of the node takes the packet; it is asked for UDP to a local port only.
#[inline(always)]
pub fn unknown<A: Address>(
    config: &Config,
    vip_flags: u32,
    flow: &Flow<A>,
    proto: u16,
    socket: impl FnOnce() -> bool,
) -> Reason {
    let port = u32::from(flow.port);
    let local = port >= config.local_port_min && port <= config.local_port_max;
    let own = local && if proto == TCP { flow.flags & (SYN | ACK) != SYN } else { socket() };
    if own {
        Reason::PassedOwn
    } else if vip_flags & VIP_UNKNOWN_PASS != 0 {
        Reason::PassedUnknownPort
    } else {
        Reason::UnknownPort
    }
}

/// The service's source ranges hold the client, or it has none.
#[inline(always)]
pub fn allowed<A: Address, T: Tables<A>>(tables: &T, found: &Found<T::Service>, flow: &Flow<A>) -> bool {
    found.service.flags & SERVICE_RANGES == 0 || in_range(tables, found.service.id, flow)
}

#[inline(always)]
fn in_range<A: Address, T: Tables<A>>(tables: &T, service: u32, flow: &Flow<A>) -> bool {
    tables.in_range(&RangeKey { service: service.to_be(), client: flow.client })
}

impl<A: Address, T: Tables<A>> Case<'_, A, T> {
    #[inline(always)]
    fn run<const PROTO: u16>(&self, out: &mut Verdict<A>) -> Reason {
        let syn = PROTO == TCP && self.flow.flags & (SYN | ACK) == SYN;
        let stale = stale(self.config, self.tick);
        if stale && syn {
            return self.passed_stale::<PROTO>();
        }
        let unsettled = self.found.slot.unsettled(&self.found.service);
        let plain = !unsettled && self.found.service.affinity == 0;
        let choice = match (PROTO == TCP, syn, unsettled) {
            // For UDP, whether the flow is new shows when its reply entry is looked up to be written.
            (true, true, _) | (false, _, _) if plain && !stale => {
                Choice { id: self.found.slot.cur(), pin: false, new: true, over: false }
            }
            (true, false, false) => Choice { id: self.found.slot.cur(), pin: false, new: false, over: false },
            (true, false, true) => self.tcp_running(),
            (true, true, _) => self.tcp_syn(unsettled),
            (false, _, _) => self.udp(unsettled, stale),
        };
        if stale && choice.new {
            return self.passed_stale::<PROTO>();
        }
        if choice.over {
            return Reason::OverBudget;
        }
        let mut id = choice.id;
        let mut pin = choice.pin;
        if id == PASS {
            if pin {
                self.pin::<PROTO>(PASS, 0);
            }
            if PASS != self.found.slot.cur() {
                self.stamp();
            }
            return Reason::PassedToProxy;
        }
        let Some(mut endpoint) = self.usable(id) else {
            return if stale { Reason::PassedStale } else { Reason::NoEndpoint };
        };
        if self.flow.flags & FRAGMENT != 0 {
            return Reason::Fragment;
        }
        let mut new = choice.new;
        if syn || PROTO == UDP {
            let mut claim = self.claim::<PROTO>(id, &endpoint);
            if claim == TAKEN {
                id = self.second(id);
                let Some(other) = self.usable(id) else {
                    return Reason::TupleCollision;
                };
                claim = self.claim_again::<PROTO>(id, &other);
                if claim == TAKEN {
                    return Reason::TupleCollision;
                }
                (endpoint, pin) = (other, true);
            }
            if claim == OVER {
                return Reason::OverBudget;
            }
            new &= PROTO == TCP || claim != LIVE;
            if new && self.found.service.affinity != 0 {
                self.stick(id, endpoint.generation);
            }
        } else if stale && !self.known::<PROTO>(&endpoint) {
            return Reason::PassedStale;
        }
        if PROTO == TCP && self.flow.flags & (FIN | RST) != 0 {
            self.closing::<PROTO>(&endpoint);
        }
        if pin {
            self.pin::<PROTO>(id, endpoint.generation);
        }
        if id != self.found.slot.cur() {
            self.stamp();
        }
        (out.addr, out.port) = (endpoint.addr, u32::from(endpoint.port));
        out.id = u32::from(id);
        out.new = u32::from(new);
        Reason::Forwarded
    }

    /// Unsettled, no SYN: its pin, else `prev`.
    #[inline(always)]
    fn tcp_running(&self) -> Choice {
        let id = match self.pinned::<TCP>() {
            Some((id, _)) => id,
            None => self.found.slot.prev(),
        };
        Choice { id, pin: false, new: false, over: false }
    }

    #[inline(never)]
    fn tcp_syn(&self, unsettled: bool) -> Choice {
        let (cur, prev) = (self.found.slot.cur(), self.found.slot.prev());
        let mut id = cur;
        // As numbers: of an option the verifier sees a register that nobody wrote.
        let (pinned, state) = if unsettled { self.pinned::<TCP>().unwrap_or((DROP, GONE)) } else { (DROP, GONE) };
        if let Some(sticky) = self.sticky() {
            id = sticky;
        } else if state == READY {
            id = pinned;
        } else if unsettled && self.began_at(prev) {
            id = prev;
        }
        let pin = unsettled || id != cur;
        // A SYN that is repeated finds its pin: nothing is inserted.
        if pin && (state == GONE || pinned != id) && !self.tables.budget(self.config, TCP, self.tick) {
            // Where the packets that follow go: to the pin, else to `prev`.
            let (id, ready) = if state == GONE {
                (prev, self.usable(prev).is_some_and(|e| { e.state } == READY))
            } else {
                (pinned, state == READY)
            };
            return Choice { id, pin: false, new: true, over: !ready };
        }
        Choice { id, pin, new: true, over: false }
    }

    #[inline(never)]
    fn udp(&self, unsettled: bool, stale: bool) -> Choice {
        let cur = self.found.slot.cur();
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
        let prev = self.found.slot.prev();
        let keep = if prev == PASS {
            age(self.tick, self.found.service.changed) < self.config.udp_pass
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
        Choice { id, pin: true, new: true, over: false }
    }

    /// The endpoint of an id unless it is gone.
    #[inline(always)]
    fn usable(&self, id: u16) -> Option<T::Endpoint> {
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
        if !self.found.service.counts(pin.epoch) {
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
        if self.found.service.affinity == 0 {
            return None;
        }
        let entry = self.tables.affinity(&AffinityKey { service: self.found.service.id, client: self.flow.client })?;
        let e = self.usable(entry.endpoint as u16)?;
        let fresh = age(self.tick, entry.used) < self.found.service.affinity;
        if fresh && { e.state } == READY && { e.generation } == entry.generation {
            Some(entry.endpoint as u16)
        } else {
            None
        }
    }

    #[inline(always)]
    fn live_udp(&self, id: u16) -> bool {
        let Some(e) = self.usable(id) else { return false };
        if { e.state } != READY && { e.state } != TERMINATING && id != self.found.slot.cur() {
            return false;
        }
        let Some(r) = self.tables.reply::<UDP>(&self.reply_key::<UDP>(&e)) else { return false };
        self.same_front(&r) && { r.generation } == { e.generation } && age(self.tick, r.used) <= self.config.udp_idle
    }

    #[inline(always)]
    fn same_front(&self, r: &Reply<A>) -> bool {
        let (vip, port) = (r.vip, r.port);
        vip == self.flow.vip && port == self.flow.port
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
