//! The agent is killed, stopped and started under load and loses nothing (invariant I7).

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::Load;
use purelb_tests::{clients, each_hook, each_hook_and_rules, sys};

/// Connections, numbered datagrams and newcomers of both families through the end of the agent and its return.
fn agent_ends(options: Options, signal: Signal) -> Result<()> {
    let (mut lab, web) = Lab::serving(options)?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    sys::pause(200);
    lab.nodes[0].agent.stop(signal)?;
    sys::pause(300);
    // The data path lives on without its agent, and the commands work from the pins.
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "without the agent not every endpoint got clients: {found:?}");
    }
    let services = lab.nodes[0].agent.query(&["services"])?;
    ensure!(services.as_array().is_some_and(|all| !all.is_empty()), "services is empty");
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.wait_programmed(&web)?;
    sys::pause(200);
    load.finish()
}

fn kill(options: Options) -> Result<()> {
    agent_ends(options, Signal::SIGKILL)
}

fn stop(options: Options) -> Result<()> {
    agent_ends(options, Signal::SIGTERM)
}

/// Killed at any moment of its start, again and again, then left to work.
fn killed_while_it_starts(options: Options) -> Result<()> {
    let (mut lab, web) = Lab::serving(options)?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    for after in [50, 400, 900, 1_400] {
        lab.nodes[0].agent.stop(Signal::SIGKILL)?;
        lab.nodes[0].agent.start()?;
        sys::pause(after);
    }
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.wait_programmed(&web)?;
    load.finish()
}

each_hook_and_rules! { kill stop }
each_hook! { killed_while_it_starts }
