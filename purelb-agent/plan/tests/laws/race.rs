//! Two CPUs on one flow.

use std::net::IpAddr;
use std::sync::Arc;

use purelb_common::table::Config;
use purelb_plan::world::{EndpointState, Service, World};

use crate::follow;
use crate::maps::Maps;
use crate::model::{empty, endpoint, tcp};

const VIP: [u8; 4] = [192, 0, 2, 1];
const POD: [u8; 4] = [10, 0, 0, 1];

/// The pod's first two packets after the handshake leave at once: its kernel's acknowledgement on one CPU, its server's
/// answer on another.
#[test]
fn both_first_replies_are_translated() {
    let service = Service {
        vips: [IpAddr::from(VIP)].into(),
        ports: vec![tcp(80)],
        prefer_local: true,
        endpoints: vec![endpoint(POD, EndpointState::Ready)],
        ..Service::default()
    };
    let world = World {
        node: "n".to_owned(),
        services: [("default/web".to_owned(), Arc::new(service))].into(),
        ..World::default()
    };
    let mut twin = empty();
    follow(&world, &mut twin, 100);
    let (maps, config, flow) = (Maps::default(), Config::default(), ([198, 51, 100, 1], 40_000, 80));
    maps.twin.replace(twin);
    assert_eq!(maps.packet(&config, VIP, flow, true, 100), Ok(Some(POD)));
    maps.raced.set(true);
    assert_eq!(maps.answer(&config, flow, POD, 100), Some(VIP));
}
