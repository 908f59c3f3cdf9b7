//! `cleanup`: new flows to kube-proxy, running ones until the deadline, then everything is removed.

use std::path::Path;
use std::time::{Duration, Instant};

use purelb_common::table::TICK_SHIFT;
use purelb_plan::plan::{in_use, release};
use serde_json::json;

use crate::args::{Cleanup, Output};
use crate::bpf::{self, Maps};
use crate::keeper::QUIET;
use crate::net::Netlink;
use crate::{lock, pulse};

use super::{complain, say};

/// Detaches and unpins; running twice is fine.
///
/// # Errors
/// An agent runs on that root, or the kernel refuses.
pub async fn run(args: &Cleanup) -> anyhow::Result<u8> {
    let root = &args.query.instance.bpf_root;
    // An agent that runs would write everything again.
    let _lock = if root.exists() { Some(lock::take(root)?) } else { None };
    // Nobody shall send here any more, before nobody answers.
    if let Err(error) = withdraw().await {
        complain(&format!("remote addresses are not taken away: {error:#}"));
    }
    let released = match Maps::open(root) {
        Ok(maps) => hand_back(&maps, args.deadline).await,
        Err(error) => Err(error.into()),
    };
    // What is left of an agent that was killed, or of another version, cannot be handed back, but must go.
    let in_use = released.inspect_err(|error| complain_of(root, error)).unwrap_or(0);
    bpf::remove(root)?;
    let file = crate::snapshot::path(root);
    if file.exists() {
        std::fs::remove_file(&file)?;
    }
    if args.query.output == Output::Json {
        say(&json!({"removed": root, "services_in_use": in_use}).to_string());
    } else {
        let flows = if in_use == 0 { String::new() } else { format!("; {in_use} services still had flows") };
        say(&format!("removed {}{flows}", root.display()));
    }
    Ok(0)
}

/// Takes away the remote addresses that agents gave to this host, and the device that they made.
async fn withdraw() -> anyhow::Result<()> {
    for problem in Netlink::new()?.retire().await? {
        complain(&format!("{}: {}", problem.object, problem.message));
    }
    Ok(())
}

fn complain_of(root: &Path, error: &anyhow::Error) {
    if root.exists() {
        complain(&format!("flows are not handed back: {error:#}"));
    }
}

/// `cur = PASS` everywhere, then waits for the flows that run; how many services still had some at the deadline.
async fn hand_back(maps: &Maps, deadline: u64) -> anyhow::Result<usize> {
    let end = Instant::now() + Duration::from_millis(deadline);
    let clock = maps.clock()?;
    let observed = maps.observe()?;
    for action in &release(&observed, maps, clock.tick).actions {
        maps.apply(action)?;
    }
    let quiet = pulse::ticks((u64::from(clock.hz) * 1000) >> TICK_SHIFT, QUIET.as_millis() as u64);
    // What kept its endpoint may have said nothing since.
    let mut next = QUIET;
    loop {
        tokio::time::sleep(next.min(end.saturating_duration_since(Instant::now()))).await;
        let in_use = in_use(&maps.observe()?, maps, maps.clock()?.tick, quiet);
        if in_use == 0 || Instant::now() >= end {
            return Ok(in_use);
        }
        next = Duration::from_millis(200);
    }
}
