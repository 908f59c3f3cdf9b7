//! Tables that tell what the decision looks at and would write: the steps of `explain` come from the
//! program's own look-ups, not from a second telling of them.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};

use purelb_common::decide::Tables;
use purelb_common::hash::Address;
use purelb_common::table::{
    Affinity, AffinityKey, CLOSED, Config, FIN_CLIENT, FIN_ENDPOINT, FlowKey, Pin, RangeKey, Reply, ReplyKey, Rev,
    RevKey, Service, ServiceKey, Slot,
};
use purelb_plan::observed::Family;

use super::Packet;
use crate::commands::live::seconds;

/// The tables of a family under observation; nothing is written.
pub(super) struct Traced<'a, T> {
    tables: &'a T,
    packet: &'a Packet<'a>,
    service: Service,
    steps: RefCell<Vec<String>>,
}

impl<'a, T> Traced<'a, T> {
    pub(super) fn new(tables: &'a T, packet: &'a Packet<'a>, service: Service) -> Self {
        Self { tables, packet, service, steps: RefCell::new(Vec::new()) }
    }

    /// What was looked at, each thing once.
    pub(super) fn into_steps(self) -> Vec<String> {
        self.steps.into_inner()
    }

    fn tell(&self, step: String) {
        let mut steps = self.steps.borrow_mut();
        if !steps.contains(&step) {
            steps.push(step);
        }
    }

    fn name<A: Address>(&self, id: u32) -> String {
        let family = if A::FAMILY == 4 { Family::V4 } else { Family::V6 };
        self.packet.live.endpoint_name(family, u16::try_from(id).unwrap_or(u16::MAX))
    }

    /// `3 s ago`
    fn ago(&self, tick: u32) -> String {
        let age = self.packet.clock.tick.wrapping_sub(tick);
        let age = if age > u32::MAX / 2 { 0 } else { age };
        format!("{:.0} s ago", seconds(age, self.packet.clock.hz))
    }

    fn entry<A: Address>(&self, map: &str, key: &ReplyKey<A>, found: Option<&Reply<A>>) {
        let pod = SocketAddr::new(ip(key.pod), key.pod_port);
        let client = self.packet.client;
        self.tell(match found {
            None => format!("{map}: nothing is known of {client} at {pod}"),
            Some(r) => {
                let front = SocketAddr::new(ip(r.vip), r.port);
                let state = match r.state {
                    CLOSED => "closed",
                    FIN_CLIENT => "the client has finished",
                    FIN_ENDPOINT => "the endpoint has finished",
                    _ => "open",
                };
                format!("{map}: {client} speaks to {pod} through {front} ({state}, last packet {})", self.ago(r.used))
            }
        });
    }
}

/// An address for people.
pub(super) fn ip<A: Address>(addr: A) -> IpAddr {
    match (A::FAMILY, addr.wide()) {
        (4, [a, b, c, d, ..]) => IpAddr::from([a, b, c, d]),
        (_, wide) => IpAddr::from(wide),
    }
}

impl<A: Address, T: Tables<A>> Tables<A> for Traced<'_, T> {
    type Service = T::Service;
    type Endpoint = T::Endpoint;
    fn service(&self, key: &ServiceKey<A>) -> Option<T::Service> {
        self.tables.service(key)
    }
    fn in_range(&self, key: &RangeKey<A>) -> bool {
        self.tables.in_range(key)
    }
    fn slot(&self, index: u32) -> Slot {
        let slot = self.tables.slot(index);
        let number = index.wrapping_sub(self.service.base);
        let (cur, prev) = (self.name::<A>(u32::from(slot.cur())), self.name::<A>(u32::from(slot.prev())));
        self.tell(if slot.unsettled(&self.service) {
            format!("slot {number} is unsettled: new flows go to {cur}; it was {prev}'s when it last settled")
        } else {
            format!("slot {number} is settled: all its flows go to {cur}")
        });
        slot
    }
    fn stamp(&self, index: u32, _half: u32) {
        let number = index.wrapping_sub(self.service.base);
        self.tell(format!("slot {number} stays unsettled for this packet's sake"));
    }
    fn endpoint(&self, id: u32) -> Option<T::Endpoint> {
        self.tables.endpoint(id)
    }
    fn pin(&self, key: &FlowKey<A>) -> Option<Pin> {
        let pin = self.tables.pin(key);
        self.tell(match pin {
            None => "PINS: the flow has no pin".to_owned(),
            Some(pin) => {
                let generation = self.tables.endpoint(pin.endpoint).map(|e| e.generation);
                let void = if !self.service.counts(pin.epoch) {
                    ", but the service has settled since: void"
                } else if pin.generation != 0 && generation.is_some_and(|g| g != pin.generation) {
                    ", but the id belongs to another endpoint since: void"
                } else {
                    ""
                };
                format!("PINS: the flow is pinned to {}{void}", self.name::<A>(pin.endpoint))
            }
        });
        pin
    }
    fn put_pin(&self, _key: &FlowKey<A>, pin: &Pin) {
        self.tell(format!("the flow is pinned to {}", self.name::<A>(pin.endpoint)));
    }
    fn affinity(&self, key: &AffinityKey<A>) -> Option<Affinity> {
        let found = self.tables.affinity(key);
        let client = self.packet.client.ip();
        self.tell(match found {
            None => format!("AFFINITY: nothing is known of {client}"),
            Some(a) => {
                let name = self.name::<A>(a.endpoint);
                format!("AFFINITY: {client} sticks to {name}, last new flow {}", self.ago(a.used))
            }
        });
        found
    }
    fn put_affinity(&self, _key: &AffinityKey<A>, value: &Affinity) {
        self.tell(format!("{} sticks to {} from now on", self.packet.client.ip(), self.name::<A>(value.endpoint)));
    }
    fn half_open(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        let found = self.tables.half_open(key);
        self.entry("HALF_OPEN", key, found.as_ref());
        found
    }
    fn put_half_open(&self, key: &ReplyKey<A>, _value: &Reply<A>) {
        let pod = SocketAddr::new(ip(key.pod), key.pod_port);
        self.tell(format!("replies of {pod} will be translated back: written to HALF_OPEN"));
    }
    fn remove_half_open(&self, _key: &ReplyKey<A>) {}
    fn reply<const PROTO: u16>(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        let found = self.tables.reply::<PROTO>(key);
        self.entry(if PROTO == 6 { "REPLIES" } else { "UDP_REPLIES" }, key, found.as_ref());
        found
    }
    fn mark_reply<const PROTO: u16>(&self, _key: &ReplyKey<A>, _state: u16, _used: u32) {}
    fn put_reply<const PROTO: u16>(&self, key: &ReplyKey<A>, _value: &Reply<A>) {
        let pod = SocketAddr::new(ip(key.pod), key.pod_port);
        let map = if PROTO == 6 { "REPLIES" } else { "UDP_REPLIES" };
        self.tell(format!("replies of {pod} will be translated back: written to {map}"));
    }
    fn remove_reply<const PROTO: u16>(&self, _key: &ReplyKey<A>) {
        self.tell("what an earlier flow left there is removed".to_owned());
    }
    fn reverse(&self, key: &RevKey<A>) -> Option<Rev<A>> {
        self.tables.reverse(key)
    }
    fn direct(&self, key: &ReplyKey<A>) -> bool {
        self.tables.direct(key)
    }
    fn in_cluster(&self, addr: A) -> bool {
        self.tables.in_cluster(addr)
    }
    fn budget(&self, config: &Config, proto: u16, tick: u32) -> bool {
        self.tell(format!("it counts as one of {} new entries that a CPU may make in a tick", config.insert_budget));
        self.tables.budget(config, proto, tick)
    }
}
