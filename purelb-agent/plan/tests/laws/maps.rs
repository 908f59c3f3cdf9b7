//! The maps of one family as trees.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;

use purelb_common::decide::{self, Flow, Tables, Verdict};
use purelb_common::reply;
use purelb_common::table::{
    Affinity, AffinityKey, Config, Endpoint, FlowKey, Pin, RangeKey, Reply, ReplyKey, Rev, RevKey, Service, ServiceKey,
    Slot,
};
use purelb_common::verdict::Reason;
use purelb_plan::apply::Twin;
use purelb_plan::observed::{Family, Frontend};
use purelb_plan::world::Protocol;

/// Address bytes.
pub type Addr = [u8; 4];

/// A flow as the client names it.
pub type Name = (Addr, u16, u16);

/// The maps; what the plan sees of them is in `twin`.
#[derive(Default)]
pub struct Maps {
    /// The agent's part.
    pub twin: RefCell<Twin>,
    /// The insert budgets are used up.
    pub starved: Cell<bool>,
    pins: RefCell<BTreeMap<FlowKey<Addr>, Pin>>,
    affinity: RefCell<BTreeMap<AffinityKey<Addr>, Affinity>>,
    half_open: RefCell<BTreeMap<ReplyKey<Addr>, Reply<Addr>>>,
    replies: RefCell<BTreeMap<ReplyKey<Addr>, Reply<Addr>>>,
    /// Another CPU promotes a half-open entry just before it is read.
    pub raced: Cell<bool>,
}

impl Maps {
    /// Where a TCP packet goes: an endpoint, `None` for kube-proxy, or the reason of the drop.
    pub fn packet(&self, config: &Config, vip: Addr, flow: Name, syn: bool, tick: u32) -> Result<Option<Addr>, Reason> {
        self.send::<6>(config, vip, flow, if syn { 0x02 } else { 0x10 }, tick)
    }

    /// The client's RST.
    pub fn reset(&self, config: &Config, vip: Addr, flow: Name, tick: u32) {
        let _ = self.send::<6>(config, vip, flow, 0x04, tick);
    }

    /// The endpoint's answer to a TCP packet: the VIP that it seems to come from, if it is translated.
    pub fn answer(&self, config: &Config, (client, client_port, _): Name, pod: Addr, tick: u32) -> Option<Addr> {
        let key = ReplyKey { pod, client, pod_port: 8080, client_port, proto: 6 };
        reply::reply::<Addr, _, 6>(self, config, &key, 0x10, tick).map(|(vip, ..)| vip)
    }

    /// The same for a UDP packet.
    pub fn datagram(&self, config: &Config, vip: Addr, flow: Name, tick: u32) -> Result<Option<Addr>, Reason> {
        self.send::<17>(config, vip, flow, 0, tick)
    }

    fn send<const PROTO: u16>(
        &self,
        config: &Config,
        vip: Addr,
        (client, client_port, port): Name,
        flags: u32,
        tick: u32,
    ) -> Result<Option<Addr>, Reason> {
        let flow = Flow { client, vip, client_port, port, flags };
        let mut to = Verdict::none(vip);
        match decide::decide::<Addr, _, PROTO>(self, config, &flow, tick, &mut to).ok_or(Reason::UnknownPort)? {
            Reason::Forwarded => Ok(Some(to.addr)),
            Reason::PassedToProxy => Ok(None),
            other => Err(other),
        }
    }
}

impl Tables<Addr> for Maps {
    type Service = Box<Service>;
    type Endpoint = Box<Endpoint<Addr>>;
    fn service(&self, key: &ServiceKey<Addr>) -> Option<Box<Service>> {
        let protocol = if key.proto == 6 { Protocol::Tcp } else { Protocol::Udp };
        let frontend = Frontend { vip: IpAddr::from(key.vip), port: key.port, protocol };
        self.twin.borrow().observed.services.get(&frontend).map(|s| Box::new(*s))
    }
    fn in_range(&self, _: &RangeKey<Addr>) -> bool {
        true
    }
    fn slot(&self, index: u32) -> Slot {
        self.twin.borrow().slot(index)
    }
    fn stamp(&self, index: u32, half: u32) {
        let mut twin = self.twin.borrow_mut();
        let slot = twin.slot(index).0 & 0xffff_ffff | u64::from(half) << 32;
        twin.put(index, Slot(slot));
    }
    fn endpoint(&self, id: u32) -> Option<Box<Endpoint<Addr>>> {
        let twin = self.twin.borrow();
        let e = twin.observed.endpoints.get(&(Family::V4, id as u16))?;
        let IpAddr::V4(addr) = e.addr else { return None };
        Some(Box::new(Endpoint { addr: addr.octets(), port: e.port, state: e.state, generation: e.generation }))
    }
    fn pin(&self, key: &FlowKey<Addr>) -> Option<Pin> {
        self.pins.borrow().get(key).copied()
    }
    fn put_pin(&self, key: &FlowKey<Addr>, pin: &Pin) {
        self.pins.borrow_mut().insert(*key, *pin);
    }
    fn affinity(&self, key: &AffinityKey<Addr>) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }
    fn put_affinity(&self, key: &AffinityKey<Addr>, value: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *value);
    }
    fn half_open(&self, key: &ReplyKey<Addr>) -> Option<Reply<Addr>> {
        if self.raced.get() {
            let promoted = self.half_open.borrow_mut().remove(key);
            self.replies.borrow_mut().extend(promoted.map(|reply| (*key, reply)));
        }
        self.half_open.borrow().get(key).copied()
    }
    fn put_half_open(&self, key: &ReplyKey<Addr>, value: &Reply<Addr>) {
        self.half_open.borrow_mut().insert(*key, *value);
    }
    fn remove_half_open(&self, key: &ReplyKey<Addr>) {
        self.half_open.borrow_mut().remove(key);
    }
    fn reply<const PROTO: u16>(&self, key: &ReplyKey<Addr>) -> Option<Reply<Addr>> {
        self.replies.borrow().get(key).copied()
    }
    fn put_reply<const PROTO: u16>(&self, key: &ReplyKey<Addr>, value: &Reply<Addr>) {
        self.replies.borrow_mut().insert(*key, *value);
    }
    fn mark_reply<const PROTO: u16>(&self, key: &ReplyKey<Addr>, state: u16, used: u32) {
        if let Some(r) = self.replies.borrow_mut().get_mut(key) {
            (r.state, r.used) = (state, used);
        }
    }
    fn remove_reply<const PROTO: u16>(&self, key: &ReplyKey<Addr>) {
        self.replies.borrow_mut().remove(key);
    }
    fn reverse(&self, _: &RevKey<Addr>) -> Option<Rev<Addr>> {
        None
    }
    fn direct(&self, _: &ReplyKey<Addr>) -> bool {
        false
    }
    fn in_cluster(&self, _: Addr) -> bool {
        false
    }
    fn budget(&self, _: &Config, _: u16, _: u32) -> bool {
        !self.starved.get()
    }
}
