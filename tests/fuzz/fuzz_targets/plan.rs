//! Arbitrary worlds, deaths between two writes and foreign hands into the planner: a plan that was carried out leaves
//! nothing to plan, and what a planner remembers changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use purelb_fuzz::chance::Chance;
use purelb_fuzz::laws::{self, SETTINGS};
use purelb_fuzz::world;
use purelb_plan::apply::Twin;
use purelb_plan::plan::{Planner, Settings, in_use, plan, release};

// Steps at most: every look of a new planner reads all ids.
const STEPS: usize = 10;

fuzz_target!(|data: &[u8]| {
    let mut chance = Chance::new(data);
    let mut world = world::any(&mut chance);
    let mut twin = Twin::new(chance.pick(&[1 << 17, 1 << 14, 1 << 11]).unwrap_or(1 << 17));
    twin.observed.range_capacity = chance.pick(&[100, 3]).unwrap_or(100);
    let (mut planner, mut meddled) = (Planner::default(), false);
    let mut now: u32 = chance.pick(&[100, u32::MAX - 2000]).unwrap_or(100);
    for _ in 0..STEPS {
        if chance.is_empty() {
            break;
        }
        now = now.wrapping_add(chance.pick(&[0, 1, 300, 1001, 1 << 24]).unwrap_or(0));
        world::change(&mut world, &mut chance);
        world::use_slots(&mut twin, now, &mut chance);
        if chance.permille(100) {
            world::meddle(&mut twin, &mut chance);
            planner.forget();
            meddled = true;
        }
        // A planner that adopted what nobody names knows more than a stranger, and one that read all slots before somebody
        // else wrote the maps takes no id for named that is gone.
        let comparable = !world.unread && !meddled && chance.permille(150);
        let settings = if comparable { Settings { settle: u32::MAX / 2, ..SETTINGS } } else { SETTINGS };
        let mut mine = planner.plan(&world, &twin.observed, &twin, &settings, now);
        if comparable {
            let stranger = plan(&world, &twin.observed, &twin, &settings, now);
            assert_eq!(mine.actions, stranger.actions, "what it remembers changes the plan");
        }
        if chance.permille(150) {
            // It dies half-way, or a write is refused.
            mine.actions.truncate(chance.below(mine.actions.len() as u64 + 1) as usize);
            if chance.permille(500) { planner = Planner::default() } else { planner.forget() }
        }
        laws::apply(&mut twin, &mine);
    }
    if chance.permille(100) {
        let released = release(&twin.observed, &twin, now);
        laws::apply(&mut twin, &released);
        let _ = in_use(&twin.observed, &twin, now, 3);
    }
    // As long as not all is read, what nobody names stays as it is found.
    if meddled && world.unread {
        laws::rest(&world, &mut twin, now)
    } else {
        laws::come_to_rest(&world, &mut twin, now)
    }
});
