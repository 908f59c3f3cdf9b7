//! The demo: about a minute, step by step, every step checked; exit code 0 only if all held.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nix::sys::signal::Signal;
use purelb_tests::clients::{self, Conn};
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::load::LongLived;
use purelb_tests::{agent, sys};
use serde_json::Value;

mod local;
mod routed;
mod screen;

use screen::Screen;

/// Shows the load balancer at work in a lab of network namespaces on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Leave the lab up at the end and say how to play in it.
    #[arg(long)]
    keep: bool,
    /// Which hook the uplink gets.
    #[arg(long, default_value = "xdp", value_parser = ["xdp", "xdp-generic", "tcx", "auto"])]
    hook: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut screen = Screen { colour: std::io::stdout().is_terminal(), step: 0, failed: Vec::new() };
    match demo(&args, &mut screen) {
        Ok(()) if screen.failed.is_empty() => {
            println!("\nAll {} steps held.", screen.step);
            ExitCode::SUCCESS
        }
        Ok(()) => {
            println!("\n{} of {} steps failed: {}", screen.failed.len(), screen.step, screen.failed.join("; "));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("\nThe lab could not be used: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args, screen: &mut Screen) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the demo makes network namespaces: run it as root (sudo)");
    println!(
        "client 198.18.0.2 - router - node1 (XDP on eth0) - pods 198.19.1.10 to .12; the pools begin with {} and {}",
        VIPS[0], VIPS[1]
    );
    let mut options = Options::new(&args.hook).nft(true);
    options.offload = args.hook == "auto";
    options.logs = false;
    options.standalone = true;
    let mut lab = Lab::start(options)?;
    let mut web = lab.web()?;
    let third = web.endpoints.pop().context("three pods")?;
    let targets = lab.targets(80)?;
    let root = lab.nodes[0].agent.bpf_root().display().to_string();

    screen.step("Ordinary Kubernetes objects go into a folder, and the Service gets addresses", |screen| {
        let group = lab.manifests().join("group.yaml");
        screen.command(&format!("cat {}", group.display()));
        screen.shown(&std::fs::read_to_string(&group)?, 20);
        let text = lab.apply(&web)?;
        screen.command(&format!("cat {}/web.yaml", lab.manifests().display()));
        screen.shown(&text, 45);
        let given = lab.state().join("services/default_web.json");
        screen.say("the Service names no address: the agent took one of each family from the ServiceGroup");
        screen.command(&format!("cat {}", given.display()));
        screen.shown(&std::fs::read_to_string(&given)?, 20);
        // It is written once a second.
        sys::wait_for("status to name the Service", Duration::from_secs(5), || {
            let status = lab.nodes[0].agent.query(&["status"])?;
            Ok(status.get("services").and_then(Value::as_u64).is_some_and(|services| services > 0))
        })?;
        screen.command(&format!("purelb-agent status --bpf-root {root}"));
        screen.shown(&lab.nodes[0].agent.command(&["status"], false)?, 20);
        let problems = lab.nodes[0].agent.query(&["status"])?;
        let none = problems.get("problems").and_then(Value::as_array).is_some_and(Vec::is_empty);
        ensure!(none, "status has problems: {problems}");
        Ok(())
    });
    screen.step("Sixty clients of each family find both endpoints, seen with their own address", |screen| {
        for to in &targets {
            screen.say(&format!("60 TCP connections to {to}"));
            let found = clients::spread(&lab.client, *to, 60)?;
            screen.bars(&found);
            ensure!(found.len() == 2, "not both endpoints got clients");
            let mut conn = Conn::open(&lab.client, *to)?;
            conn.echo(20_000)?;
            let (peer, own) = (conn.ask("PEER")?, conn.local()?.ip().to_string());
            screen.say(&format!("the pod sees the client as {peer}"));
            ensure!(peer == own, "the client's address was not kept: {own}");
            let (pod, _) = clients::udp(&lab.client, *to, 100)?;
            screen.say(&format!("UDP to {to} is answered by {pod}, from the VIP"));
        }
        Ok(())
    });
    let mut running = Vec::new();
    for to in &targets {
        running.push(LongLived::start(&lab.client, *to, 5)?);
    }
    let connections = running.len() * 15;
    screen.step("A third endpoint is added while connections run", |screen| {
        screen.say(&format!("{connections} connections are open: idle, client sending, server sending"));
        web.endpoints.push(third.clone());
        lab.apply(&web)?;
        for to in &targets {
            let found = clients::spread(&lab.client, *to, 60)?;
            screen.bars(&found);
            ensure!(found.len() == 3, "the new endpoint got no clients");
        }
        unbroken(screen, &running)
    });
    screen.step("It terminates and goes again", |screen| {
        if let Some(last) = web.endpoints.last_mut() {
            (last.ready, last.terminating) = (false, true);
        }
        lab.apply(&web)?;
        web.endpoints.pop();
        lab.apply(&web)?;
        for to in &targets {
            let found = clients::spread(&lab.client, *to, 40)?;
            screen.bars(&found);
            ensure!(found.len() == 2, "clients went elsewhere than to the two that are left");
        }
        unbroken(screen, &running)
    });
    screen.step("The agent is killed; the kernel goes on alone; the agent returns", |screen| {
        screen.command("kill -9 <pid of purelb-agent>");
        lab.nodes[0].agent.stop(Signal::SIGKILL)?;
        for to in &targets {
            let found = clients::spread(&lab.client, *to, 40)?;
            screen.bars(&found);
            ensure!(found.len() == 2, "without the agent clients did not spread");
        }
        lab.nodes[0].agent.start()?;
        lab.nodes[0].agent.wait_ready()?;
        lab.wait_programmed(&web)?;
        screen.say("started again: it adopted what was pinned");
        unbroken(screen, &running)
    });
    screen.step("All connections end now: none was broken or moved, in either direction", |screen| {
        let mut held = 0;
        for connections in running.drain(..) {
            held += connections.finish()?;
        }
        screen.say(&format!("{held} of {connections} held"));
        ensure!(held == connections, "some are missing");
        Ok(())
    });
    screen.step("A scan of ports that no Service has is dropped, with a reason", |screen| {
        let before = lab.nodes[0].agent.dropped("unknown-port")?;
        for to in &targets {
            for port in [22, 443, 6_443, 10_250] {
                let to = SocketAddr::new(to.ip(), port);
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let outcome = Conn::open_within(&lab.client, any.parse()?, to, Duration::from_millis(150));
                ensure!(outcome.is_err(), "{to} was answered");
            }
        }
        screen.command(&format!("purelb-agent drops --bpf-root {root}"));
        screen.shown(&lab.nodes[0].agent.command(&["drops"], false)?, 12);
        ensure!(lab.nodes[0].agent.dropped("unknown-port")? >= before + 8, "not all were counted as unknown-port");
        Ok(())
    });
    screen.step("`explain` says where a flow goes and why, and the packet agrees", |screen| {
        for to in &targets {
            let mut conn = Conn::open(&lab.client, *to)?;
            let (pod, from) = (conn.ask("NAME")?, conn.local()?);
            let flow = ["explain", "tcp", &from.to_string(), &to.to_string()];
            screen.command(&format!("purelb-agent {} --bpf-root {root}", flow.join(" ")));
            screen.shown(&lab.nodes[0].agent.command(&flow, false)?, 14);
            let answer = lab.nodes[0].agent.query(&flow)?;
            let said = answer.get("endpoint").and_then(Value::as_str).unwrap_or_default();
            let found = lab.nodes[0].pods.iter().find(|one| one.name == pod).context("unknown pod answered")?;
            let agrees = found
                .addresses
                .iter()
                .any(|addr| said.starts_with(&SocketAddr::new(*addr, 8080).to_string()) || said == addr.to_string());
            ensure!(agrees, "explain says {said:?}, the connection reached {pod}");
        }
        Ok(())
    });
    screen.step("The tables are ordinary pinned maps: bpftool alone can read them", |screen| {
        let command = format!("bpftool map dump pinned {root}/SERVICES4");
        screen.command(&command);
        let text = sys::run(&command)?;
        screen.shown(&text, 24);
        ensure!(text.contains("\"key\"") && text.contains("\"value\""), "the dump shows no typed fields");
        Ok(())
    });
    if !screen.failed.is_empty() {
        println!("{}", lab.logs());
    }
    // Its nodes wait for the first term of their Leases, while routes are shown.
    let near = local::prepare();
    let routed = routed::show(screen)?;
    local::show(near, screen)?;
    if args.keep {
        keep(&lab)?;
    }
    drop(routed);
    Ok(())
}

fn unbroken(screen: &Screen, running: &[LongLived]) -> Result<()> {
    let ended: usize = running.iter().map(LongLived::ended).sum();
    ensure!(ended == 0, "{ended} connections broke");
    screen.say("every open connection is still there");
    Ok(())
}

fn keep(lab: &Lab) -> Result<()> {
    let agent = agent::binary()?.display().to_string();
    let (client, node) = (lab.client.name().to_owned(), lab.nodes[0].netns.name().to_owned());
    let root = lab.nodes[0].agent.bpf_root().display().to_string();
    // The servers are threads of this program, so it must live as long as they are wanted.
    println!("\nThe lab stays up until you press Ctrl-C here, which removes all of it. In another terminal:");
    println!("  nsenter --net=/run/netns/{client} curl http://{}/          # which pod answers", VIPS[0]);
    println!("  nsenter --net=/run/netns/{client} curl 'http://[{}]/'", VIPS[1]);
    println!("  nsenter --net=/run/netns/{node} {agent} status --bpf-root {root}");
    println!("  nsenter --net=/run/netns/{node} {agent} drops --watch --bpf-root {root}");
    println!("  $EDITOR {}/web.yaml", lab.manifests().display());
    loop {
        std::thread::park();
    }
}
