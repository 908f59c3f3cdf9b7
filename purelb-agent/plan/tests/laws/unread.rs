//! A start beside a source of which something cannot be read.

use std::collections::BTreeSet;
use std::sync::Arc;

use purelb_common::table::{FIRST_ENDPOINT, GONE};
use purelb_plan::apply::Twin;
use purelb_plan::observed::{Family, Slots as _};
use purelb_plan::plan::Planner;
use purelb_plan::world::World;

use crate::chance::Chance;
use crate::model::{SETTINGS, empty};
use crate::{any_world, follow};

fn step(planner: &mut Planner, world: &World, twin: &mut Twin, now: u32) -> usize {
    let actions = planner.plan(world, &twin.observed, twin, &SETTINGS, now).actions;
    actions.iter().for_each(|a| twin.apply(a));
    actions.len()
}

/// Some Services and endpoints of it are missing.
fn part(world: &World, chance: &mut Chance) -> World {
    let mut part = World { unread: true, ..world.clone() };
    part.services.retain(|_, _| chance.permille(700));
    for service in part.services.values_mut().map(Arc::make_mut) {
        service.endpoints.retain(|_| chance.permille(700));
    }
    part
}

/// Every slot still leads where it led, for new flows or for those that run.
fn led(before: &Twin, after: &Twin, what: &str) {
    for (frontend, service) in &before.observed.services {
        let new = after.observed.services.get(frontend);
        assert!(new.is_some(), "{what}: {frontend:?} went");
        let Some(new) = new else { continue };
        let (old_block, new_block) = (before.block(service), after.block(new));
        for (index, slot) in new_block.iter().enumerate() {
            let was = old_block[index & service.mask as usize].cur();
            let leads = slot.cur() == was || slot.prev() == was && slot.unsettled(new);
            assert!(leads || was < FIRST_ENDPOINT, "{what}: {frontend:?} slot {index} led to {was}");
        }
    }
    let mut led = BTreeSet::new();
    for (frontend, service) in &before.observed.services {
        let family = if frontend.vip.is_ipv4() { Family::V4 } else { Family::V6 };
        led.extend(before.block(service).iter().map(|slot| (family, slot.cur())));
    }
    let alive = |twin: &Twin| -> BTreeSet<_> {
        let all = twin.observed.endpoints.iter().filter(|(at, e)| e.state != GONE && led.contains(at));
        all.map(|(at, e)| (*at, e.addr, e.port, e.generation)).collect()
    };
    assert!(alive(before).is_subset(&alive(after)), "{what}: an endpoint went");
    let keys = |twin: &Twin| (twin.observed.vips.keys().copied().collect(), twin.observed.cluster.clone());
    let ((vips, nets), (vips_after, nets_after)): ((BTreeSet<_>, BTreeSet<_>), (BTreeSet<_>, _)) =
        (keys(before), keys(after));
    assert!(vips.is_subset(&vips_after) && nets.is_subset(&nets_after), "{what}: a VIP or a net went");
}

#[test]
fn absence_proves_nothing_while_something_was_never_read() {
    let mut kept = 0;
    for seed in 0..40 {
        let mut chance = Chance(seed);
        let world = any_world(&mut chance);
        let mut twin = empty();
        follow(&world, &mut twin, 100);
        let before = twin.clone();
        let part = part(&world, &mut chance);
        let mut planner = Planner::default();
        step(&mut planner, &part, &mut twin, 200);
        led(&before, &twin, &format!("seed {seed}"));
        kept += planner.plan(&part, &twin.observed, &twin, &SETTINGS, 200).problems.len();
        assert_eq!(step(&mut planner, &part, &mut twin, 201), 0, "seed {seed}: it rests");
        planner.forget();
        assert_eq!(step(&mut planner, &part, &mut twin, 202), 0, "seed {seed}: it rests by the maps");
        // Another start, as blind as this one.
        step(&mut Planner::default(), &part, &mut twin, 203);
        led(&before, &twin, &format!("seed {seed}, once more"));
        // What is read at last says all.
        for (what, now, all) in [("all read", 300, world), ("the rest removed", 400, World { unread: false, ..part })] {
            step(&mut planner, &all, &mut twin, now);
            planner.forget();
            step(&mut planner, &all, &mut twin, now);
            let mut fresh = empty();
            follow(&all, &mut fresh, now);
            let fronts = |twin: &Twin| twin.observed.services.keys().copied().collect::<Vec<_>>();
            assert_eq!(fronts(&twin), fronts(&fresh), "seed {seed}, {what}");
            assert_eq!(twin.observed.vips, fresh.observed.vips, "seed {seed}, {what}");
            assert_eq!(twin.observed.reverse, fresh.observed.reverse, "seed {seed}, {what}");
        }
    }
    assert!(kept > 20, "only {kept} problems: nothing was unproven");
}

/// Only what was there at the start is unproven: what was named once goes when it is named no more.
#[test]
fn what_was_named_once_goes() {
    for seed in 0..20 {
        let mut chance = Chance(seed);
        let world = World { unread: true, ..any_world(&mut chance) };
        let mut twin = empty();
        follow(&world, &mut twin, 100);
        let mut planner = Planner::default();
        step(&mut planner, &world, &mut twin, 200);
        let none = World { services: [].into(), ..world };
        step(&mut planner, &none, &mut twin, 300);
        assert_eq!((twin.observed.services.len(), twin.observed.vips.len()), (0, 0), "seed {seed}");
    }
}
