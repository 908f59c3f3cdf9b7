//! Remote addresses: a router hears of them, and a node is drained.

use std::time::Instant;

use anyhow::Result;

use super::{count, row};
use crate::bench::report::Row;
use crate::load::LongLived;
use crate::routing::Kind::{Bird, Frr};
use crate::routing::arrivals::Arrivals;
use crate::routing::scene::{self, ALL, FAR, SOON, targets};
use crate::sys;

/// From the Service's file to three next hops of each family in the router's table; and what a drain under load costs.
pub fn rows() -> Result<Vec<Row>> {
    let (lab, routing) = scene::start(Frr, &[Bird, Frr], false)?;
    let mut web = scene::service(&lab, "web", "far", FAR)?;
    let begin = Instant::now();
    lab.place(&web)?;
    routing.wait_hops(&FAR, &ALL, SOON)?;
    let known = begin.elapsed();
    lab.wait_programmed(&web)?;
    let to = targets(FAR)?;
    let running = to.iter().map(|to| LongLived::start(&lab.client, *to, 5)).collect::<Result<Vec<_>>>()?;
    let coming = Arrivals::start(&lab.client, &to);
    sys::pause(300);
    let pods = ["node2-pod0", "node2-pod1"];
    scene::terminate(&mut web, &pods);
    lab.place(&web)?;
    routing.wait_hops(&FAR, &[1, 3], SOON)?;
    web.endpoints.retain(|endpoint| !pods.contains(&endpoint.pod.as_str()));
    lab.apply(&web)?;
    sys::pause(300);
    let seen = coming.finish(&routing.watch)?;
    let broken: usize = running.into_iter().map(|running| running.end().1.len()).sum();
    Ok(vec![
        row("remote address given: in the router's table", known.as_secs_f64(), 1.5),
        Row {
            detail: format!("of {}; {} were led away by the router", seen.count(), seen.led_away),
            ..count("drain of a node: new connections failed", seen.faults.len(), Some(0.0))
        },
        count("the same: long-lived ones the router led away (of 30)", broken, None),
    ])
}
