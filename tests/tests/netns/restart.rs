//! The agent is killed, stopped and started under load and loses nothing (invariant I7).

use std::time::Duration;

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

/// Killed, and started beside a file that is broken now: what the tables held of it is served on, and goes when
/// the file does.
fn broken_file(options: Options) -> Result<()> {
    let (mut lab, web) = Lab::serving(options)?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.write("web.yaml", "apiVersion: v1\n\tkind: Service\n")?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_problem(&["tables", "were never read"])?;
    // The resync of the tables comes after half of the time to settle at the latest.
    sys::pause(6_000);
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "beside the broken file clients met {found:?}");
    }
    lab.apply(&web)?;
    sys::wait_for("nothing is said of the tables any more", Duration::from_secs(20), || {
        Ok(!lab.nodes[0].agent.problems()?.contains("tables"))
    })?;
    load.finish()?;
    std::fs::remove_file(lab.manifests().join("web.yaml"))?;
    sys::wait_for("the Service is gone", Duration::from_secs(3), || {
        Ok(lab.nodes[0].agent.query(&["services"])?.as_array().is_some_and(Vec::is_empty))
    })
}

/// The same with the file that says which uplinks and hook it shall be: programs stay where they hang.
fn broken_settings(options: Options) -> Result<()> {
    let options = Options { uplinks: 2, interfaces: vec!["eth1".to_owned()], ..options };
    let (mut lab, _) = Lab::serving(options)?;
    lab.arrive_by(1, 1)?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.write("lbnodeagent.yaml", "kind: [\n")?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_problem(&["lbnodeagent.yaml"])?;
    sys::pause(1_000);
    load.finish()?;
    lab.set_datapath(&["eth0"], lab.hook())?;
    lab.nodes[0].agent.wait_uplink("eth0", &format!("{} attached", lab.hook()))?;
    let pin = lab.nodes[0].agent.bpf_root().join("links");
    sys::wait_for("nothing hangs at eth1 any more", Duration::from_secs(5), || {
        let mut left = std::fs::read_dir(&pin)?.flatten().map(|entry| entry.file_name());
        Ok(!left.any(|name| name == "eth1-xdp" || name == "eth1-ingress"))
    })
}

each_hook_and_rules! { kill stop }
each_hook! { killed_while_it_starts broken_file broken_settings }
