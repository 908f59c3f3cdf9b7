//! [`Planner::plan`]: what to write so that the maps are what the world wants, in an order that never
//! gives a wrong answer in between; [`release`]: hand everything back to kube-proxy.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use purelb_common::table::{self, PASS, SERVICE_IDS, Slot};

use crate::blocks::Blocks;
use crate::desired::{Desired, Front};
use crate::ids::{Ids, Named, Writes};
use crate::job::Job;
use crate::observed::{Action, Frontend, Observed, Slots};
use crate::problem::Problem;
use crate::ranges::Room;
use crate::reverse::Leads;
use crate::slots::Step;
use crate::unproven::Unproven;
use crate::view::View;
use crate::world::World;
use crate::{maglev, ranges, slots};

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
    pub services: Vec<Arc<View>>,
}

/// What a Maglev table depends on: the endpoints that take new flows, and its length.
type Table = (Vec<(IpAddr, u16)>, u32);

/// A service as the last look left it.
#[derive(Debug)]
struct Known {
    front: Arc<Front>,
    value: table::Service,
    view: Arc<View>,
    problems: Vec<Problem>,
}

/// Plans look after look. It remembers how it left things, so that a look costs what changed; a planner that
/// remembers nothing plans the same, while nothing is unproven. Whoever could not carry out a plan must make it forget.
#[derive(Debug, Default)]
pub struct Planner {
    desired: Desired,
    known: BTreeMap<Frontend, Known>,
    ids: Ids,
    leads: Leads,
    unproven: Unproven,
    /// Ids of services that found no room in the last look; their endpoints have ids.
    refused: BTreeSet<u32>,
    /// `ids` and `leads` are those of `known`.
    remembers: bool,
    /// Every block was read once: no slot names an id that is gone.
    adopted: bool,
}

/// Plans once.
#[must_use]
pub fn plan(world: &World, observed: &Observed, slots: &dyn Slots, settings: &Settings, now: u32) -> Plan {
    Planner::default().plan(world, observed, slots, settings, now)
}

/// What a look works on.
struct Look<'a> {
    world: &'a World,
    observed: &'a Observed,
    slots: &'a dyn Slots,
    settings: &'a Settings,
    now: u32,
    /// Services whose front is another one than the last look left.
    changed: BTreeMap<Frontend, (u32, Arc<Front>)>,
    /// Services that are to go.
    gone: Vec<Frontend>,
    writes: Writes,
    /// VIPs of which not every port found room.
    full: BTreeSet<IpAddr>,
    plan: Plan,
}

impl Planner {
    /// Looks at everything next time: after somebody else may have written the maps, a write was refused, or
    /// time has passed.
    pub fn forget(&mut self) {
        self.known.clear();
        self.remembers = false;
    }

    /// Plans. `slots` reads the blocks of `observed.services`.
    pub fn plan(
        &mut self,
        world: &World,
        observed: &Observed,
        slots: &dyn Slots,
        settings: &Settings,
        now: u32,
    ) -> Plan {
        self.desired.update(world, observed, slots);
        self.unproven.look(world.unread && !world.detached, observed, &mut self.desired);
        let mut plan = Plan { problems: self.desired.problems.clone(), ..Plan::default() };
        plan.problems.extend(self.unproven.problem());
        let stays = |f: &&Frontend| self.desired.fronts.contains_key(f) || self.unproven.has(f);
        let gone = observed.services.keys().filter(|f| !stays(f)).copied().collect();
        let (changed, writes, full) = (BTreeMap::new(), Writes::default(), BTreeSet::new());
        let mut look = Look { world, observed, slots, settings, now, changed, gone, writes, full, plan };
        let all = !self.remembers;
        if all {
            let named = if self.adopted { Named::none() } else { Named::by_slots(observed, slots) };
            self.ids = Ids::read(observed, &named, &mut look.writes);
            self.leads = Leads::default();
            self.leads.touch(observed);
        } else {
            self.ids.next();
        }
        self.find_changed(&mut look);
        self.assign(&mut look, all);
        look.plan.actions.append(&mut look.writes.puts);
        self.services(&mut look);
        self.vips(&mut look);
        let Look { gone, writes, mut plan, changed, .. } = look;
        plan.actions.extend(gone.iter().map(|frontend| Action::DeleteService(*frontend)));
        let unproven = all.then(|| self.unproven.services().collect());
        ranges::unwanted(observed, &changed, &gone, unproven, &mut plan.actions);
        self.leads.actions(observed, self.unproven.any(), &mut plan.actions);
        cluster(world, observed, self.unproven.any(), &mut plan.actions);
        let taken = !gone.is_empty() || !writes.purges.is_empty();
        let mut purges = writes.purges;
        purges.sort_by_key(|purge| match purge {
            Action::PutEndpoint(family, id, _) => Some((*family, *id)),
            _ => None,
        });
        plan.actions.extend(purges);
        if taken {
            // Their blocks and ids are free for the next look.
            plan.actions.push(Action::Synchronize);
        }
        plan.problems.extend(self.known.values().flat_map(|known| known.problems.iter().cloned()));
        plan.services = self.known.values().map(|known| Arc::clone(&known.view)).collect();
        plan.problems.sort();
        (self.adopted, self.remembers) = (true, true);
        plan
    }

    /// Services that are not as the last look left them, with their ids: those that they have, or free ones.
    fn find_changed(&mut self, look: &mut Look<'_>) {
        let observed = look.observed;
        let same = |known: &Known, frontend: &Frontend, front: &Arc<Front>| {
            Arc::ptr_eq(&known.front, front) && observed.services.get(frontend) == Some(&known.value)
        };
        let mut fresh = Vec::new();
        for (frontend, front) in &self.desired.fronts {
            if self.known.get(frontend).is_some_and(|known| same(known, frontend, front)) {
                continue;
            }
            match observed.services.get(frontend) {
                Some(service) => drop(look.changed.insert(*frontend, (service.id, Arc::clone(front)))),
                None => fresh.push((*frontend, Arc::clone(front))),
            }
        }
        let used: BTreeSet<u32> = match fresh[..] {
            [] => BTreeSet::new(),
            _ => observed.services.values().map(|s| s.id).collect(),
        };
        let mut free = (0..SERVICE_IDS).filter(|id| !used.contains(id));
        for (frontend, front) in fresh {
            match free.next() {
                Some(id) => drop(look.changed.insert(frontend, (id, front))),
                None => {
                    look.full.insert(frontend.vip);
                    look.plan.problems.push(no_room(&front, &frontend));
                }
            }
        }
        let mut room: Option<Room> = None;
        for (frontend, (id, front)) in &mut look.changed {
            let needs = ranges::missing(*id, front, observed).next().is_some();
            if needs && !room.get_or_insert_with(|| Room::new(observed)).take(*id, front, observed) {
                look.plan.problems.push(no_room_for_ranges(front, frontend));
                *front = ranges::passed(front);
            }
        }
    }

    /// Endpoint ids and leads of what changed.
    fn assign(&mut self, look: &mut Look<'_>, all: bool) {
        let outdated =
            |frontend: &Frontend| !self.desired.fronts.contains_key(frontend) || look.changed.contains_key(frontend);
        let old: Vec<Frontend> = self.known.keys().filter(|f| outdated(f)).copied().collect();
        for frontend in old {
            if let Some(known) = self.known.remove(&frontend) {
                self.leads.remove(&frontend, &known.front);
            }
        }
        for (frontend, (id, front)) in &look.changed {
            let held = self.held(frontend, *id, front, look);
            self.ids.assign(*id, &held, look.observed, &mut look.writes);
            self.leads.add(frontend, front, &look.world.node_addresses);
        }
        let mut there: BTreeSet<u32> = look.changed.values().map(|(id, _)| *id).collect();
        let refused = std::mem::take(&mut self.refused);
        if all {
            there.extend(self.unproven.services());
            self.ids.keep(&there, look.observed, &mut look.writes);
        } else {
            let gone = look.gone.iter().filter_map(|f| look.observed.services.get(f)).map(|s| s.id);
            for id in gone.chain(refused.difference(&there).copied()) {
                self.ids.assign(id, &BTreeMap::new(), look.observed, &mut look.writes);
            }
        }
    }

    /// Endpoints that may be answered: those that are balanced, and of the others those that were, until all has
    /// settled elsewhere.
    fn held<'a>(
        &self,
        frontend: &Frontend,
        id: u32,
        front: &'a Front,
        look: &Look<'_>,
    ) -> Cow<'a, BTreeMap<(IpAddr, u16), u16>> {
        let mut held = Cow::Borrowed(&front.endpoints);
        let kept: Vec<_> = front.kept.iter().filter(|(e, _)| self.ids.get(id, **e).is_some()).collect();
        // None of it can be answered any more, or will not be when this look has settled the service.
        let elsewhere = |s: &table::Service| {
            let block = look.slots.block(s);
            let settles = || slots::step(&block, s, look.now, look.settings.settle) == Step::Settle;
            block.iter().all(|slot| !slot.unsettled(s) && slot.cur() < table::FIRST_ENDPOINT)
                || block.iter().all(|slot| slot.cur() == front.fallback) && settles()
        };
        if !kept.is_empty() && !look.observed.services.get(frontend).is_some_and(elsewhere) {
            held.to_mut().extend(kept);
        }
        held
    }

    /// Slots and values of what changed.
    fn services(&mut self, look: &mut Look<'_>) {
        let used = look.observed.services.values().map(|s| (s.base, s.mask + 1));
        let mut blocks: Option<Blocks> = None;
        let mut tables: BTreeMap<Table, Vec<u16>> = BTreeMap::new();
        for (frontend, (id, front)) in &look.changed {
            let old = look.observed.services.get(frontend);
            let mut problems = Vec::new();
            let need = maglev::slots_for(front.usable.len());
            let length = old.map_or(need, |s| need.max(s.mask + 1));
            let place = match old.filter(|s| s.mask + 1 == length) {
                Some(old) => Some(old.base),
                None => blocks.get_or_insert_with(|| Blocks::new(look.observed.capacity, used.clone())).take(length),
            };
            let (base, length) = match (place, old) {
                (Some(base), _) => (base, length),
                (None, Some(s)) => {
                    problems.push(no_room(front, frontend));
                    (s.base, s.mask + 1)
                }
                (None, None) => {
                    look.full.insert(frontend.vip);
                    look.plan.problems.push(no_room(front, frontend));
                    self.leads.remove(frontend, front);
                    self.refused.insert(*id);
                    continue;
                }
            };
            if look.writes.missing.contains(id) {
                problems.push(no_room(front, frontend));
            }
            let puts = ranges::missing(*id, front, look.observed).map(|range| Action::PutRange(*id, range));
            look.plan.actions.extend(puts);
            let owners =
                tables.entry((front.usable.clone(), length)).or_insert_with(|| maglev::table(&front.usable, length));
            let want: Vec<u16> = if owners.is_empty() {
                vec![front.fallback; length as usize]
            } else {
                let of: Vec<u16> =
                    front.usable.iter().map(|e| self.ids.get(*id, *e).unwrap_or(front.fallback)).collect();
                owners.iter().map(|o| of.get(usize::from(*o)).copied().unwrap_or(front.fallback)).collect()
            };
            let alive: BTreeSet<u16> =
                self.held(frontend, *id, front, look).keys().filter_map(|e| self.ids.get(*id, *e)).collect();
            let (settings, now, id) = (look.settings, look.now, *id);
            // What passed until now, for want of room or of a file, kube-proxy has connections of.
            let passed = look.observed.vips.get(&frontend.vip).is_some_and(|f| f & table::VIP_UNKNOWN_PASS != 0);
            let live = look.world.live || look.world.kube_proxy && passed;
            let job = Job { frontend, front, live, settings, now, id, base, want, alive };
            let (value, halves) = job.run(old, look.slots, &mut look.plan.actions);
            let view = Arc::new(View::new(frontend, front, |e| self.ids.get(id, e), &halves));
            self.known.insert(*frontend, Known { front: Arc::clone(front), value, view, problems });
        }
    }

    /// A VIP of which not every port found room passes what it does not know.
    fn vips(&self, look: &mut Look<'_>) {
        let observed = look.observed;
        for (vip, flags) in &self.desired.vips {
            let flags = if look.full.contains(vip) { flags | table::VIP_UNKNOWN_PASS } else { *flags };
            let flags = flags | self.unproven.flags(vip);
            if observed.vips.get(vip) != Some(&flags) {
                look.plan.actions.push(Action::PutVip(*vip, flags));
            }
        }
        let stays = |v: &&IpAddr| self.desired.vips.contains_key(*v) || self.unproven.has_vip(v);
        let gone = observed.vips.keys().filter(|v| !stays(v));
        look.plan.actions.extend(gone.map(|vip| Action::DeleteVip(*vip)));
    }
}

/// `cur = PASS` everywhere: what `cleanup` writes before it waits and detaches.
#[must_use]
pub fn release(observed: &Observed, slots: &dyn Slots, now: u32) -> Plan {
    let mut plan = Plan::default();
    for (frontend, service) in &observed.services {
        let block = slots.block(service);
        let halves: Vec<u32> = block.iter().map(|s| slots::next(*s, PASS, |_| true)).collect();
        if let Some(write) = slots::writes(service.base, &block, &halves) {
            // Who sticks to an endpoint lets go of it; yet 0 would put the client's port into the flow hash.
            let affinity = service.affinity.min(1);
            plan.actions.push(Action::PutService(*frontend, table::Service { changed: now, affinity, ..*service }));
            plan.actions.push(write);
        }
    }
    plan
}

/// Services of which something went elsewhere than to `cur` within `quiet` ticks before `now`: after [`release`],
/// flows that only the programs keep where they are.
#[must_use]
pub fn in_use(observed: &Observed, slots: &dyn Slots, now: u32, quiet: u32) -> usize {
    let used = |s: &&table::Service| {
        let age = |slot: &Slot| now.wrapping_sub(slot.stamp()) & 0x00ff_ffff;
        slots.block(s).iter().any(|slot| slot.program_unsettled(s) && age(slot) <= quiet)
    };
    observed.services.values().filter(used).count()
}

/// Whose traffic with a pod is never a reply to a client: nodes, and pods of other nodes.
fn cluster(world: &World, observed: &Observed, unproven: bool, actions: &mut Vec<Action>) {
    let nodes = world.node_addresses.iter().map(|a| IpNet::from(*a));
    let wanted: BTreeSet<IpNet> = nodes.chain(world.pod_ranges.iter().copied()).collect();
    actions.extend(wanted.difference(&observed.cluster).map(|net| Action::PutCluster(*net)));
    if unproven {
        return;
    }
    actions.extend(observed.cluster.difference(&wanted).map(|net| Action::DeleteCluster(*net)));
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

fn no_room_for_ranges(front: &Front, frontend: &Frontend) -> Problem {
    Problem {
        object: format!("Service {}", front.service),
        field: "spec.loadBalancerSourceRanges".to_owned(),
        message: format!(
            "no room in the tables for {} source ranges of {} port {}: left to kube-proxy",
            front.ranges.len(),
            frontend.vip,
            frontend.port
        ),
        remedy: "name fewer and wider ranges".to_owned(),
        origin: front.origin.clone(),
    }
}
