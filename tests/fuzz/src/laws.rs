//! What holds of every plan and of every decision about addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use purelb_agent::source::Objects;
use purelb_agent::source::claim::Home;
use purelb_agent::source::estate::Register;
use purelb_agent::source::parse::Kind;
use purelb_common::table::{FIRST_ENDPOINT, GONE};
use purelb_plan::alloc::allocator::{Allocator, Settings};
use purelb_plan::alloc::claim::{Decision, annotation};
use purelb_plan::announce::remote::{self, Present, Step};
use purelb_plan::apply::Twin;
use purelb_plan::ids::family;
use purelb_plan::observed::{Action, Slots as _};
use purelb_plan::plan::{self, Plan, plan};
use purelb_plan::world::World;

/// Settings with a tick per second.
pub const SETTINGS: plan::Settings = plan::Settings { settle: 1000, milliticks: 1000 };

/// Carries out a plan.
pub fn apply(twin: &mut Twin, plan: &Plan) {
    plan.actions.iter().for_each(|action| twin.apply(action));
}

/// One look says it all, and further ones settle what it began to settle and use the room that it made; then nothing is
/// left, and the tables are in order.
pub fn come_to_rest(world: &World, twin: &mut Twin, now: u32) {
    rest(world, twin, now);
    in_order(twin);
    announced(world);
}

/// On the device for remote addresses is what is wanted, after one round of steps.
fn announced(world: &World) {
    let wanted = remote::wanted(world);
    let mut present = BTreeSet::new();
    for step in remote::steps(&present, &wanted) {
        let Step::Add(ip, prefix) = step else { panic!("{step:?} of nothing") };
        present.insert(Present { ip, prefix, ours: true });
    }
    assert_eq!(remote::steps(&present, &wanted), [], "there is more to announce");
    assert!(present.iter().all(|p| p.prefix <= if p.ip.is_ipv4() { 32 } else { 128 }), "{present:?}");
    assert!(!present.iter().any(|p| world.node_addresses.contains(&p.ip)), "a node's address is announced");
}

/// The same, whatever the tables were before.
pub fn rest(world: &World, twin: &mut Twin, now: u32) {
    let (mut begun, mut full) = (false, false);
    for looks in 0.. {
        let plan = plan(world, &twin.observed, twin, &SETTINGS, now);
        if plan.actions.is_empty() {
            // Who finds no room for its slots has ids already.
            if !is_full(&plan) {
                nothing_left(twin);
            }
            return;
        }
        let allowed = 1 + u32::from(begun) + 2 * u32::from(full);
        assert!(looks < allowed, "look {looks} finds more: {:?}", plan.actions);
        let begins = |action: &Action| matches!(action, Action::PutService(_, service) if service.span() != 0);
        begun |= plan.actions.iter().any(begins);
        full |= is_full(&plan);
        apply(twin, &plan);
    }
}

fn is_full(plan: &Plan) -> bool {
    plan.problems.iter().any(|problem| problem.message.contains("no room"))
}

/// No table names what another one has not.
pub fn in_order(twin: &Twin) {
    let observed = &twin.observed;
    let mut ids = BTreeSet::new();
    let mut end = 0;
    let mut blocks: Vec<_> = observed.services.values().map(|s| (s.base, s.mask)).collect();
    blocks.sort_unstable();
    for (base, mask) in blocks {
        assert!(base >= end && base + mask < observed.capacity, "the block at {base} has no room of its own");
        end = base + mask + 1;
    }
    for (frontend, service) in &observed.services {
        assert!(ids.insert(service.id), "{frontend:?} has another's id");
        assert!(observed.vips.contains_key(&frontend.vip), "{frontend:?} is no VIP");
        for slot in twin.block(service) {
            for id in [slot.cur(), slot.prev()].into_iter().filter(|id| *id >= FIRST_ENDPOINT) {
                let entry = observed.endpoints.get(&(family(frontend.vip), id));
                let sound = entry.is_some_and(|e| e.state != GONE && e.service == service.id);
                assert!(sound, "{frontend:?} leads to {id}, which is {entry:?}");
            }
        }
    }
}

fn nothing_left(twin: &Twin) {
    let observed = &twin.observed;
    let ids: BTreeSet<u32> = observed.services.values().map(|service| service.id).collect();
    let live = observed.endpoints.values().filter(|e| e.state != GONE);
    assert!(live.into_iter().all(|e| ids.contains(&e.service)), "an endpoint of a service that is gone");
    assert!(observed.ranges.keys().all(|(id, _)| ids.contains(id)), "ranges of a service that is gone");
}

/// Decides about all Services of a source as a new allocator, and judges it. What is left of `inherited` may come true.
pub fn allocate(objects: &dyn Objects, home: Home, inherited: BTreeMap<String, (String, BTreeSet<IpAddr>)>) {
    let mut register = Register::default();
    register.read_groups(objects, None);
    let names: Vec<_> = objects.all(Kind::Service).map(|(key, _)| key.1.clone()).collect();
    names.iter().for_each(|name| register.read_service(objects, name, home, false));
    let settings = Settings { class: "purelb.io/purelbv2".to_owned(), default_announcer: true, cool_down: 0 };
    let mut allocator = Allocator::new(settings, inherited.clone());
    let decided = allocator.look(&register.estate, 0).clone();
    judge(&register, &decided, &inherited);
    assert_eq!(&decided, allocator.look(&register.estate, 1), "looking again finds something else");
    let _ = (register.problems(), register.ledger());
}

fn judge(
    register: &Register,
    decided: &BTreeMap<String, Decision>,
    inherited: &BTreeMap<String, (String, BTreeSet<IpAddr>)>,
) {
    let estate = &register.estate;
    for (name, decision) in decided {
        let claim = &estate.services[name];
        let distinct: BTreeSet<_> = decision.ingress.iter().collect();
        assert_eq!(distinct.len(), decision.ingress.len(), "{name} has an address twice");
        if claim.load_balancer {
            for ip in claim.ingress.iter().filter(|ip| !decision.ingress.contains(ip)) {
                let asked = claim.families.is_empty() || claim.families.contains(&family(*ip));
                assert!(!asked, "{name} loses {ip}");
            }
        }
        let key = |of: &str| {
            let claim = &estate.services[of];
            claim.annotations.get(annotation::SHARING_KEY).filter(|key| !key.is_empty()).cloned()
        };
        let shares = |other: &String| {
            key(name).is_some() && key(name) == key(other) && estate.services[other].ports.is_disjoint(&claim.ports)
        };
        for ip in decision.ingress.iter().filter(|ip| !claim.ingress.contains(ip)) {
            let group = estate.catalog.of(*ip).unwrap_or_else(|| panic!("{ip} of {name} is in no group"));
            assert!(!group.excluded.contains(*ip), "{ip} is excluded");
            for (other, theirs) in estate.services.iter().filter(|(other, _)| *other != name) {
                let has = theirs.ingress.contains(ip)
                    || decided.get(other).is_some_and(|decision| decision.ingress.contains(ip))
                    || inherited
                        .get(other)
                        .is_some_and(|(uid, ips)| theirs.load_balancer && *uid == theirs.uid && ips.contains(ip));
                assert!(!has || shares(other), "{ip} of {other} is given to {name} too");
            }
        }
    }
}
