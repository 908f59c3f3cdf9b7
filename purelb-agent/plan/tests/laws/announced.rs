//! How each VIP is announced stands in its flags, which the programs judge neighbours' questions by.

use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::{VIP_LOCAL, VIP_OTHER_PROTOCOLS, VIP_REMOTE, VIP_UNKNOWN_PASS};
use purelb_plan::alloc::range::Range;
use purelb_plan::announce::remote::RemoteRange;
use purelb_plan::plan::Planner;
use purelb_plan::world::{Announcing, Service, World};

use crate::model::{SETTINGS, empty, tcp};

const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const REMOTE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1));

fn service(vips: &[IpAddr]) -> Service {
    Service { vips: vips.iter().copied().collect(), ports: vec![tcp(80)], ..Service::default() }
}

/// One planner sees what changes, as the agent's does.
#[test]
fn flags_follow_the_world() {
    let (mut planner, mut twin) = (Planner::default(), empty());
    let mut flags = |world: &World| {
        let plan = planner.plan(world, &twin.observed, &twin, &SETTINGS, 100);
        plan.actions.iter().for_each(|action| twin.apply(action));
        [LOCAL, REMOTE, OTHER].map(|vip| twin.observed.vips.get(&vip).copied())
    };
    let mut world = World { node: "n".to_owned(), ..World::default() };
    world.services.insert("x/a".into(), Arc::new(service(&[LOCAL, REMOTE, OTHER])));
    world.local_networks.insert("192.0.2.0/24".parse().unwrap());
    assert_eq!(flags(&world), [Some(0); 3], "nobody announces anything");
    let range = Range::parse("198.51.100.0/28").unwrap();
    let remote = vec![RemoteRange { range, prefix: 32 }];
    world.announcing = Some(Announcing { remote, ..Announcing::default() });
    assert_eq!(flags(&world), [Some(VIP_LOCAL), Some(VIP_REMOTE), Some(0)]);
    // No endpoint is here, yet the address is as remote as elsewhere.
    let policy = Service { local_policy: true, remote: true, ..service(&[LOCAL, REMOTE, OTHER]) };
    world.services.insert("x/a".into(), Arc::new(policy));
    assert_eq!(flags(&world), [Some(VIP_LOCAL), Some(VIP_REMOTE), Some(VIP_REMOTE)]);
    world.local_networks.insert("198.51.100.0/24".parse().unwrap());
    assert_eq!(flags(&world), [Some(VIP_LOCAL), Some(VIP_LOCAL), Some(VIP_REMOTE)], "local wins");
    world.local_networks.clear();
    assert_eq!(flags(&world), [Some(VIP_REMOTE); 3]);
    world.announcing = None;
    assert_eq!(flags(&world), [Some(0); 3]);
}

/// What an earlier agent left in the tables lets through a while longer, but says nothing of how an address is announced.
#[test]
fn unread_files_keep_no_kind() {
    let mut twin = empty();
    twin.observed.vips.insert(LOCAL, VIP_REMOTE | VIP_OTHER_PROTOCOLS | VIP_UNKNOWN_PASS);
    let mut world = World { node: "n".to_owned(), unread: true, ..World::default() };
    world.services.insert("x/a".into(), Arc::new(service(&[LOCAL])));
    let plan = purelb_plan::plan::plan(&world, &twin.observed, &twin, &SETTINGS, 100);
    plan.actions.iter().for_each(|action| twin.apply(action));
    assert_eq!(twin.observed.vips.get(&LOCAL), Some(&(VIP_OTHER_PROTOCOLS | VIP_UNKNOWN_PASS)));
}
