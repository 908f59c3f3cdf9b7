//! The tables of one family as the decision sees them, filled by chance.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use purelb_common::decide::{Flow, Tables};
use purelb_common::hash::Address;
use purelb_common::table::{
    Affinity, AffinityKey, Config, Endpoint, FIRST_ENDPOINT, FlowKey, Pin, RangeKey, Reply, ReplyKey, Rev, RevKey,
    SERVICE_RANGES, Service, ServiceKey, Slot,
};

use crate::chance::Chance;

/// Slots of the one service.
const LENGTH: u32 = 4;
/// Endpoints.
const ENDPOINTS: u16 = 4;

/// The maps; one service has every port.
#[derive(Debug)]
pub struct Maps<A: Address> {
    service: Option<Service>,
    in_range: bool,
    slots: RefCell<Vec<Slot>>,
    endpoints: Vec<Endpoint<A>>,
    pins: RefCell<BTreeMap<FlowKey<A>, Pin>>,
    affinity: RefCell<BTreeMap<AffinityKey<A>, Affinity>>,
    half_open: RefCell<BTreeMap<ReplyKey<A>, Reply<A>>>,
    replies: RefCell<BTreeMap<ReplyKey<A>, Reply<A>>>,
    reverse: Option<Rev<A>>,
    direct: bool,
    in_cluster: bool,
    budget: Cell<u8>,
}

/// An endpoint, or kube-proxy, or nobody.
fn id(chance: &mut Chance) -> u16 {
    chance.below(u64::from(FIRST_ENDPOINT + ENDPOINTS)) as u16
}

/// A tick near `now`, on both sides.
fn near(chance: &mut Chance, now: u32) -> u32 {
    let ages = [0, 1, 2, 59, 61, 299, 301, 1001, u32::MAX, u32::MAX / 2, 1 << 24];
    now.wrapping_sub(chance.pick(&ages).unwrap_or(0))
}

impl<A: Address> Maps<A> {
    /// Tables around a flow: some of its own entries may be there.
    #[must_use]
    pub fn new(chance: &mut Chance, flow: &Flow<A>, proto: u32, tick: u32, pods: &[A]) -> Self {
        let epoch = near(chance, tick);
        let service = Service {
            id: 7,
            flags: if chance.permille(100) { SERVICE_RANGES } else { 0 },
            base: 1024,
            mask: LENGTH - 1,
            epoch,
            changed: near(chance, tick),
            affinity: chance.pick(&[0, 1, 300, u32::MAX]).unwrap_or(0),
            // A service is settled, or in the middle of it.
            settled: epoch.wrapping_sub(chance.below(2) as u32),
        };
        let slot = |chance: &mut Chance| {
            // The agent leaves a slot that is settled with one owner.
            let (cur, prev, changed) = (id(chance), id(chance), chance.permille(500));
            let half = Slot::half(cur, if changed { prev } else { cur }, changed);
            let marked = chance.permille(400);
            let mark = if marked { Slot::stamp_half(near(chance, tick), near(chance, epoch)) } else { 0 };
            Slot(u64::from(half) | u64::from(mark) << 32)
        };
        let slots = (0..LENGTH).map(|_| slot(chance)).collect();
        let endpoint = |chance: &mut Chance, index: u16| Endpoint {
            addr: pods.get(usize::from(index) % pods.len().max(1)).copied().unwrap_or(flow.vip),
            port: 8080 + index / pods.len().max(1) as u16,
            state: chance.below(4) as u16,
            generation: 1 + chance.below(2) as u32,
        };
        let endpoints: Vec<_> = (0..ENDPOINTS).map(|index| endpoint(chance, index)).collect();
        let mut maps = Self {
            service: chance.permille(950).then_some(service),
            in_range: chance.permille(500),
            slots: RefCell::new(slots),
            endpoints,
            pins: RefCell::default(),
            affinity: RefCell::default(),
            half_open: RefCell::default(),
            replies: RefCell::default(),
            reverse: None,
            direct: chance.permille(300),
            in_cluster: chance.permille(300),
            budget: Cell::new(chance.pick(&[255, 0, 1]).unwrap_or(255)),
        };
        maps.fill(chance, flow, proto, tick, &service);
        maps
    }

    fn fill(&mut self, chance: &mut Chance, flow: &Flow<A>, proto: u32, tick: u32, service: &Service) {
        let Flow { client, vip, client_port, port, .. } = *flow;
        let entry = |chance: &mut Chance| {
            let endpoint = u32::from(FIRST_ENDPOINT) + chance.below(u64::from(ENDPOINTS)) as u32;
            (endpoint, 1 + chance.below(2) as u32, near(chance, tick))
        };
        if chance.permille(400) {
            let (_, generation, _) = entry(chance);
            let endpoint = u32::from(id(chance));
            let epoch = near(chance, service.epoch);
            self.pins
                .get_mut()
                .insert(FlowKey { client, vip, client_port, port, proto }, Pin { endpoint, generation, epoch });
        }
        if chance.permille(300) {
            let (endpoint, generation, used) = entry(chance);
            let key = AffinityKey { client, service: service.id };
            self.affinity.get_mut().insert(key, Affinity { endpoint, generation, used });
        }
        for at in 0..self.endpoints.len() {
            let e = self.endpoints[at];
            let key = ReplyKey { pod: e.addr, client, pod_port: e.port, client_port, proto };
            for half_open in [true, false] {
                if chance.permille(300) {
                    let (endpoint, generation, used) = entry(chance);
                    let port = if chance.permille(700) { port } else { port.wrapping_add(1) };
                    let state = chance.below(4) as u16;
                    let map = if half_open { &mut self.half_open } else { &mut self.replies };
                    // Whoever made a half-open entry in this tick has looked at the other one.
                    let used = if half_open && used == tick { tick.wrapping_sub(1) } else { used };
                    map.get_mut().insert(key, Reply { vip, port, state, used, endpoint, generation });
                }
            }
        }
        self.reverse = chance.permille(300).then_some(Rev { vip, port, pad: 0 });
    }

    /// The endpoint of an id that may be answered.
    #[must_use]
    pub fn alive(&self, id: u32) -> Option<Endpoint<A>> {
        let index = id.checked_sub(u32::from(FIRST_ENDPOINT))?;
        self.endpoints.get(index as usize).copied().filter(|e| { e.state } != purelb_common::table::GONE)
    }
}

impl<A: Address> Tables<A> for Maps<A> {
    type Service = Box<Service>;
    type Endpoint = Box<Endpoint<A>>;
    fn service(&self, _: &ServiceKey<A>) -> Option<Box<Service>> {
        self.service.map(Box::new)
    }
    fn in_range(&self, _: &RangeKey<A>) -> bool {
        self.in_range
    }
    fn slot(&self, index: u32) -> Slot {
        self.slots.borrow()[index as usize - 1024]
    }
    fn stamp(&self, index: u32, half: u32) {
        let slot = &mut self.slots.borrow_mut()[index as usize - 1024];
        slot.0 = slot.0 & 0xffff_ffff | u64::from(half) << 32;
    }
    fn endpoint(&self, id: u32) -> Option<Box<Endpoint<A>>> {
        let index = id.checked_sub(u32::from(FIRST_ENDPOINT))?;
        self.endpoints.get(index as usize).copied().map(Box::new)
    }
    fn pin(&self, key: &FlowKey<A>) -> Option<Pin> {
        self.pins.borrow().get(key).copied()
    }
    fn put_pin(&self, key: &FlowKey<A>, pin: &Pin) {
        self.pins.borrow_mut().insert(*key, *pin);
    }
    fn affinity(&self, key: &AffinityKey<A>) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }
    fn put_affinity(&self, key: &AffinityKey<A>, value: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *value);
    }
    fn half_open(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        self.half_open.borrow().get(key).copied()
    }
    fn put_half_open(&self, key: &ReplyKey<A>, value: &Reply<A>) {
        self.half_open.borrow_mut().insert(*key, *value);
    }
    fn remove_half_open(&self, key: &ReplyKey<A>) {
        self.half_open.borrow_mut().remove(key);
    }
    fn reply<const PROTO: u16>(&self, key: &ReplyKey<A>) -> Option<Reply<A>> {
        self.replies.borrow().get(key).copied()
    }
    fn put_reply<const PROTO: u16>(&self, key: &ReplyKey<A>, value: &Reply<A>) {
        self.replies.borrow_mut().insert(*key, *value);
    }
    fn mark_reply<const PROTO: u16>(&self, key: &ReplyKey<A>, state: u16, used: u32) {
        if let Some(reply) = self.replies.borrow_mut().get_mut(key) {
            (reply.state, reply.used) = (state, used);
        }
    }
    fn remove_reply<const PROTO: u16>(&self, key: &ReplyKey<A>) {
        self.replies.borrow_mut().remove(key);
    }
    fn reverse(&self, _: &RevKey<A>) -> Option<Rev<A>> {
        self.reverse
    }
    fn direct(&self, _: &ReplyKey<A>) -> bool {
        self.direct
    }
    fn in_cluster(&self, _: A) -> bool {
        self.in_cluster
    }
    fn budget(&self, _: &Config, _: u16, _: u32) -> bool {
        let left = self.budget.get();
        self.budget.set(left.saturating_sub(1));
        left > 0
    }
}
