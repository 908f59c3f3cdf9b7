//! [`plan`]: what to write so that the maps are what the world wants, in an order that never gives a
//! wrong answer in between; [`release`]: hand everything back to kube-proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use purelb_common::table::{self, FIRST_ENDPOINT, PASS, SERVICE_IDS, SERVICE_RANGES, Slot};
use serde::Serialize;

use crate::blocks::Blocks;
use crate::desired::{Desired, Front, desired, rank};
use crate::ids::Ids;
use crate::observed::{Action, Backend, Frontend, Observed};
use crate::problem::Problem;
use crate::world::{Protocol, World};
use crate::{maglev, slots};

/// Times, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// A service settles this long after its last change and its last packet to anything but `cur`.
    pub settle: u32,
    /// Thousandths of a tick per second.
    pub milliticks: u32,
}

/// What to do, what is wrong, what people see.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// In this order.
    pub actions: Vec<Action>,
    /// Faults of the input.
    pub problems: Vec<Problem>,
    /// One for each VIP, port and protocol.
    pub services: Vec<View>,
}

/// A VIP, port and protocol as people see it.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// `namespace/name`.
    pub service: String,
    /// Address.
    pub vip: IpAddr,
    /// Port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where it was read.
    pub origin: String,
    /// `endpoints`, or what happens without: `pass` or `drop`.
    pub answer: &'static str,
    /// Every slot has one answer.
    pub settled: bool,
    /// Endpoints of this node.
    pub endpoints: Vec<EndpointView>,
}

/// One endpoint of a [`View`].
#[derive(Clone, Debug, Serialize)]
pub struct EndpointView {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// ready, unready, terminating.
    pub state: &'static str,
    /// Share of new flows, 0 to 1.
    pub share: f64,
    /// Its id in the maps.
    pub id: u16,
}

/// What a Maglev table depends on: the endpoints that take new flows, and its length.
type Table = (Vec<(IpAddr, u16)>, u32);

/// Plans.
#[must_use]
pub fn plan(world: &World, observed: &Observed, settings: &Settings, now: u32) -> Plan {
    let Desired { fronts, vips, problems } = desired(world, observed);
    let mut plan = Plan { problems, ..Plan::default() };
    let ids = Ids::assign(observed, &wanted(&fronts));
    plan.actions.extend(ids.puts.iter().cloned());
    let used = observed.services.values().map(|s| (s.base, s.mask + 1));
    let mut blocks = Blocks::new(observed.capacity, used);
    let mut service_ids = ServiceIds::new(observed);
    let mut tables: BTreeMap<Table, Vec<u16>> = BTreeMap::new();
    let mut ranges = BTreeSet::new();
    let mut full = BTreeSet::new();
    for (frontend, front) in &fronts {
        let old = observed.services.get(frontend);
        let Some(id) = service_ids.of(old) else {
            full.insert(frontend.vip);
            plan.problems.push(no_room(front, frontend));
            continue;
        };
        let need = maglev::slots_for(front.usable.len());
        let length = old.map_or(need, |s| need.max(s.mask + 1));
        let grow = old.is_none_or(|s| s.mask + 1 < length);
        let place = if grow { blocks.take(length) } else { old.map(|s| s.base) };
        let (base, length) = match (place, old) {
            (Some(base), _) => (base, length),
            (None, Some(s)) => {
                plan.problems.push(no_room(front, frontend));
                (s.base, s.mask + 1)
            }
            (None, None) => {
                full.insert(frontend.vip);
                plan.problems.push(no_room(front, frontend));
                continue;
            }
        };
        ranges.extend(front.ranges.iter().map(|r| (id, *r)));
        for range in front.ranges.iter().filter(|r| !observed.ranges.contains_key(&(id, **r))) {
            plan.actions.push(Action::PutRange(id, *range));
        }
        let owners =
            tables.entry((front.usable.clone(), length)).or_insert_with(|| maglev::table(&front.usable, length));
        let want: Vec<u16> = if owners.is_empty() {
            vec![front.fallback; length as usize]
        } else {
            let of: Vec<u16> = front.usable.iter().map(|(a, p)| ids.get(*a, *p).unwrap_or(front.fallback)).collect();
            owners.iter().map(|o| of.get(usize::from(*o)).copied().unwrap_or(front.fallback)).collect()
        };
        let alive: BTreeSet<u16> = front.endpoints.keys().filter_map(|(a, p)| ids.get(*a, *p)).collect();
        let job = Job { frontend, front, world, observed, settings, now, id, base, want, alive };
        let halves = job.run(old, &mut plan);
        plan.services.push(view(frontend, front, &ids, &halves));
    }
    let vips =
        vips.into_iter().map(|(v, flags)| (v, if full.contains(&v) { flags | table::VIP_UNKNOWN_PASS } else { flags }));
    let vips: BTreeMap<IpAddr, u32> = vips.collect();
    for (vip, flags) in vips.iter().filter(|(v, f)| observed.vips.get(v) != Some(f)) {
        plan.actions.push(Action::PutVip(*vip, *flags));
    }
    for vip in observed.vips.keys().filter(|v| !vips.contains_key(v)) {
        plan.actions.push(Action::DeleteVip(*vip));
    }
    for frontend in observed.services.keys().filter(|f| !fronts.contains_key(f)) {
        plan.actions.push(Action::DeleteService(*frontend));
    }
    for (id, range) in observed.ranges.keys().filter(|k| !ranges.contains(k)) {
        plan.actions.push(Action::DeleteRange(*id, *range));
    }
    reverse(world, &fronts, observed, &mut plan.actions);
    plan.actions.extend(ids.purges.iter().cloned());
    plan.problems.sort();
    plan
}

/// `cur = PASS` everywhere: what `cleanup` writes before it waits and detaches.
#[must_use]
pub fn release(observed: &Observed, now: u32) -> Plan {
    let mut plan = Plan::default();
    for (frontend, service) in &observed.services {
        let Some(block) = observed.blocks.get(&service.base) else { continue };
        let halves: Vec<u32> = block.iter().map(|s| slots::next(*s, PASS, service.epoch, |_| true)).collect();
        let writes = slots::writes(service.base, block, &halves);
        if !writes.is_empty() {
            plan.actions.push(Action::PutService(*frontend, table::Service { changed: now, ..*service }));
            plan.actions.extend(writes);
        }
    }
    plan
}

struct Job<'a> {
    frontend: &'a Frontend,
    front: &'a Front,
    world: &'a World,
    observed: &'a Observed,
    settings: &'a Settings,
    now: u32,
    id: u32,
    base: u32,
    want: Vec<u16>,
    alive: BTreeSet<u16>,
}

impl Job<'_> {
    /// Slots first, then the service's value that makes them visible.
    fn run(&self, old: Option<&table::Service>, plan: &mut Plan) -> Vec<u32> {
        let mask = self.want.len() as u32 - 1;
        let affinity = self
            .front
            .affinity
            .map_or(0, |s| (u64::from(s) * u64::from(self.settings.milliticks) / 1000).max(1) as u32);
        let flags = if self.front.ranges.is_empty() { 0 } else { SERVICE_RANGES };
        let mut value = table::Service { id: self.id, flags, base: self.base, mask, affinity, ..Default::default() };
        let Some(old) = old else {
            value.changed = self.now;
            let first = |w: &u16| if self.world.live && *w != PASS { (PASS, true) } else { (*w, false) };
            let halves: Vec<u32> = self
                .want
                .iter()
                .map(|w| {
                    let (p, u) = first(w);
                    Slot::half(*w, p, u)
                })
                .collect();
            let slots = halves.iter().map(|h| Slot(u64::from(*h))).collect();
            plan.actions.push(Action::CopySlots { base: self.base, slots });
            plan.actions.push(Action::PutService(*self.frontend, value));
            return halves;
        };
        (value.epoch, value.changed) = (old.epoch, old.changed);
        let empty = Vec::new();
        let block = self.observed.blocks.get(&old.base).unwrap_or(&empty);
        let slot = |i: usize| block.get(i & old.mask as usize).copied().unwrap_or_default();
        let mut halves: Vec<u32> = self
            .want
            .iter()
            .enumerate()
            .map(|(i, w)| slots::next(slot(i), *w, old.epoch, |id| self.alive.contains(&id)))
            .collect();
        let moved = self.want.iter().enumerate().any(|(i, w)| slot(i).cur() != *w);
        if moved {
            value.changed = self.now;
        } else if slots::may_settle(block, old.epoch, old.changed, self.now, self.settings.settle) {
            value.epoch = old.epoch.wrapping_add(1);
            value.changed = self.now;
            halves = self.want.iter().map(|w| Slot::half(*w, *w, false)).collect();
        }
        if self.base == old.base {
            // The time of the change first: UDP that PASS owned stays with kube-proxy for a while after it.
            if moved {
                plan.actions.push(Action::PutService(*self.frontend, value));
            }
            plan.actions.extend(slots::writes(self.base, block, &halves));
            if !moved && value != *old {
                plan.actions.push(Action::PutService(*self.frontend, value));
            }
        } else {
            let copy = halves.iter().enumerate().map(|(i, h)| Slot(slot(i).0 & !0xffff_ffff | u64::from(*h))).collect();
            plan.actions.push(Action::CopySlots { base: self.base, slots: copy });
            plan.actions.push(Action::PutService(*self.frontend, value));
            plan.actions.push(Action::Synchronize);
        }
        halves
    }
}

/// The wanted state of every endpoint; where Services differ, the better one.
fn wanted(fronts: &BTreeMap<Frontend, Front>) -> BTreeMap<(IpAddr, u16), u16> {
    let mut out: BTreeMap<(IpAddr, u16), u16> = BTreeMap::new();
    for (key, state) in fronts.values().flat_map(|f| &f.endpoints) {
        let entry = out.entry(*key).or_insert(*state);
        if rank(*state) < rank(*entry) {
            *entry = *state;
        }
    }
    out
}

fn reverse(world: &World, fronts: &BTreeMap<Frontend, Front>, observed: &Observed, actions: &mut Vec<Action>) {
    let mut leads: BTreeMap<Backend, Option<(IpAddr, u16)>> = BTreeMap::new();
    for (f, front) in fronts {
        for (addr, port) in front.endpoints.keys().filter(|(a, _)| !world.node_addresses.contains(a)) {
            let backend = Backend { vip: *addr, port: *port, protocol: f.protocol };
            leads.entry(backend).and_modify(|e| *e = None).or_insert(Some((f.vip, f.port)));
        }
    }
    let only: BTreeMap<Backend, (IpAddr, u16)> = leads.into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
    for (backend, (vip, port)) in only.iter().filter(|(k, v)| observed.reverse.get(k) != Some(v)) {
        actions.push(Action::PutReverse(*backend, *vip, *port));
    }
    for backend in observed.reverse.keys().filter(|k| !only.contains_key(k)) {
        actions.push(Action::DeleteReverse(*backend));
    }
}

struct ServiceIds {
    used: BTreeSet<u32>,
    next: u32,
}

impl ServiceIds {
    fn new(observed: &Observed) -> Self {
        Self { used: observed.services.values().map(|s| s.id).collect(), next: 0 }
    }
    fn of(&mut self, old: Option<&table::Service>) -> Option<u32> {
        if let Some(old) = old {
            return Some(old.id);
        }
        while self.used.contains(&self.next) {
            self.next += 1;
        }
        let id = self.next;
        self.next += 1;
        (id < SERVICE_IDS).then_some(id)
    }
}

fn no_room(front: &Front, frontend: &Frontend) -> Problem {
    Problem {
        object: format!("Service {}", front.service),
        field: "spec.ports".to_owned(),
        message: format!("no room in the tables for {} port {}: left to kube-proxy", frontend.vip, frontend.port),
        remedy: "spread the Services over more nodes".to_owned(),
        origin: front.origin.clone(),
    }
}

fn view(frontend: &Frontend, front: &Front, ids: &Ids, halves: &[u32]) -> View {
    let mut shares: BTreeMap<u16, u32> = BTreeMap::new();
    let mut settled = true;
    for half in halves {
        let slot = Slot(u64::from(*half));
        *shares.entry(slot.cur()).or_insert(0) += 1;
        settled &= !slot.agent_unsettled();
    }
    let endpoint = |(&(addr, port), state): (&(IpAddr, u16), &u16)| {
        let id = ids.get(addr, port)?;
        let share = f64::from(shares.get(&id).copied().unwrap_or(0)) / halves.len().max(1) as f64;
        let state = match *state {
            table::READY => "ready",
            table::TERMINATING => "terminating",
            _ => "unready",
        };
        Some(EndpointView { addr, port, state, share, id })
    };
    let endpoints: Vec<_> = front.endpoints.iter().filter_map(endpoint).collect();
    let answer = match (shares.keys().any(|id| *id >= FIRST_ENDPOINT), front.fallback) {
        (true, _) => "endpoints",
        (false, PASS) => "pass",
        _ => "drop",
    };
    View {
        service: front.service.clone(),
        vip: frontend.vip,
        port: frontend.port,
        protocol: frontend.protocol,
        origin: front.origin.clone(),
        answer,
        settled,
        endpoints,
    }
}
