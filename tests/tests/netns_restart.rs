//! The agent is killed, stopped and started under load, breaks nothing (invariant I7), and cleans up.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::clients::{self, LongLived};
use purelb_tests::lab::{Lab, Options};
use purelb_tests::sys;

/// Long-lived connections of both families through the end of the agent and its return.
fn agent_ends(hook: &str, nft: bool, signal: Signal) -> Result<()> {
    let mut lab = Lab::start(Options::new(hook).nft(nft))?;
    lab.apply(&lab.web()?)?;
    let running =
        lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 6)).collect::<Result<Vec<_>>>()?;
    sys::pause(300);
    lab.nodes[0].agent.stop(signal)?;
    sys::pause(500);
    // The data path lives on without its agent, and the commands work from the pins.
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "without the agent not every endpoint got clients: {found:?}");
    }
    ensure!(
        lab.nodes[0].agent.query(&["services"])?.as_array().is_some_and(|all| !all.is_empty()),
        "services is empty"
    );
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.wait_programmed(&lab.web()?)?;
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 20)?;
    }
    for held in running {
        held.finish()?;
    }
    Ok(())
}

#[test]
fn kill_xdp() -> Result<()> {
    agent_ends("xdp", false, Signal::SIGKILL)
}

#[test]
fn kill_xdp_beside_conntrack() -> Result<()> {
    agent_ends("xdp", true, Signal::SIGKILL)
}

#[test]
fn kill_tcx() -> Result<()> {
    agent_ends("tcx", false, Signal::SIGKILL)
}

#[test]
fn kill_tcx_beside_conntrack() -> Result<()> {
    agent_ends("tcx", true, Signal::SIGKILL)
}

#[test]
fn stop_xdp() -> Result<()> {
    agent_ends("xdp", false, Signal::SIGTERM)
}

#[test]
fn stop_tcx() -> Result<()> {
    agent_ends("tcx", false, Signal::SIGTERM)
}

fn cleanup(hook: &str) -> Result<()> {
    let mut lab = Lab::start(Options::new(hook))?;
    lab.apply(&lab.web()?)?;
    clients::spread(&lab.client, lab.targets(80)?[0], 3)?;
    let agent = &mut lab.nodes[0].agent;
    agent.stop(Signal::SIGTERM)?;
    agent.command(&["cleanup", "--deadline", "1s"], false)?;
    let left = std::fs::read_dir(agent.bpf_root()).map(Iterator::count).unwrap_or(0);
    ensure!(left == 0, "cleanup left {left} pins in {}", agent.bpf_root().display());
    let links = lab.nodes[0].netns.exec("bpftool net show dev eth0")?;
    ensure!(!links.contains("purelb"), "cleanup left programs: {links}");
    Ok(())
}

#[test]
fn cleanup_xdp() -> Result<()> {
    cleanup("xdp")
}

#[test]
fn cleanup_tcx() -> Result<()> {
    cleanup("tcx")
}
