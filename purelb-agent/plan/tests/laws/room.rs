//! Source ranges that find no room: the Service is left to kube-proxy, which judges them; nobody else notices.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use purelb_common::table::{FIRST_ENDPOINT, SERVICE_RANGES};
use purelb_plan::observed::Slots as _;
use purelb_plan::plan::Planner;
use purelb_plan::world::{Protocol, Service, World};

use crate::any_world;
use crate::chance::Chance;
use crate::model::{SETTINGS, empty};

const ROOM: u32 = 12;

#[test]
fn without_room_for_ranges_kube_proxy_judges() {
    let (mut refused, mut served) = (0, 0);
    for seed in 0..60 {
        let mut chance = Chance(seed);
        let (mut planner, mut twin) = (Planner::default(), empty());
        twin.observed.range_capacity = ROOM;
        let mut world = any_world(&mut chance);
        for now in 100..120 {
            for (name, mut service) in any_world(&mut chance).services {
                let many = chance.below(6) as u8;
                Arc::make_mut(&mut service).source_ranges =
                    (0..many).map(|i| IpNet::from(IpAddr::from([198, 51, i, chance.below(3) as u8]))).collect();
                world.services.insert(name, service);
            }
            // What went makes room for the next look.
            let mut last = None;
            for look in 0.. {
                let plan = planner.plan(&world, &twin.observed, &twin, &SETTINGS, now);
                for action in &plan.actions {
                    twin.apply(action);
                    let count = twin.observed.ranges.len();
                    assert!(count <= ROOM as usize, "seed {seed} at {now}: {count} ranges, the kernel would refuse");
                }
                let done = plan.actions.is_empty();
                last = Some(plan);
                if done {
                    break;
                }
                assert!(look < 6, "seed {seed} at {now}: comes to no rest");
            }
            let problems = last.map(|plan| plan.problems).unwrap_or_default();
            for (vip, port, ranges) in wanted(&world) {
                let found = twin.observed.services.iter().find(|(f, _)| f.vip == vip && f.port == port);
                let Some((_, value)) = found else { continue };
                let at = format!("seed {seed} at {now}: {vip} port {port}");
                let of = twin.observed.ranges.keys().filter(|(service, _)| *service == value.id);
                let there: BTreeSet<IpNet> = of.map(|(_, net)| *net).collect();
                if value.flags & SERVICE_RANGES != 0 {
                    served += 1;
                    assert_eq!(there, ranges, "{at}");
                } else if !ranges.is_empty() {
                    refused += 1;
                    let open = twin.block(value).iter().any(|slot| slot.cur() >= FIRST_ENDPOINT);
                    assert!(!open, "{at} is open to everybody");
                    let text = format!("{vip} port {port}:");
                    assert!(problems.iter().any(|p| p.message.contains(&text)), "{at}: {problems:?}");
                }
            }
        }
    }
    assert!(refused > 100 && served > 100, "{refused} without room, {served} with it");
}

/// VIPs and ports, and who may come; of Services that do not contest one.
fn wanted(world: &World) -> Vec<(IpAddr, u16, BTreeSet<IpNet>)> {
    let alone = |service: &&Arc<Service>| {
        let same = |other: &&Arc<Service>| !other.vips.is_disjoint(&service.vips);
        world.services.values().filter(same).count() == 1
    };
    let mut wanted = Vec::new();
    for service in world.services.values().filter(alone) {
        for (vip, port) in service.vips.iter().flat_map(|vip| service.ports.iter().map(move |port| (*vip, port))) {
            let ranges = service.source_ranges.iter().filter(|net| net.addr().is_ipv4() == vip.is_ipv4());
            if port.protocol == Some(Protocol::Tcp) {
                wanted.push((vip, port.port, ranges.copied().collect()));
            }
        }
    }
    wanted
}
