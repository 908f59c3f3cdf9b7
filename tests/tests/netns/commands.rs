//! The commands for people: one agent per root, answers from the pins alone, `explain` beside the packet.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::agent::binary;
use purelb_tests::lab::{Lab, Options, VIPS};
use purelb_tests::{clients, sys};
use serde_json::Value;

/// Exit code and what was written, standard error last.
fn run(lab: &Lab, args: &[&str]) -> Result<(i32, String)> {
    let node = &lab.nodes[0];
    let mut command = node.netns.command(binary()?);
    let out = command.args(args).arg("--bpf-root").arg(node.agent.bpf_root()).output()?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Ok((out.status.code().context("ended by a signal")?, text))
}

#[test]
fn one_agent_per_root() -> Result<()> {
    let mut lab = Lab::start(Options::new("xdp"))?;
    let source = format!("dir:{}", lab.manifests().display());
    let second = ["node", "--node-name", "node1", "--source", &source];
    let status = lab.nodes[0].agent.query(&["status"])?;
    let pid = status.pointer("/agent/pid").and_then(Value::as_u64).context("status names no pid")?;
    ensure!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "{status}");
    for args in [&second[..], &["cleanup"]] {
        let (code, text) = run(&lab, args)?;
        ensure!(code == 1 && text.contains(&format!("the agent with pid {pid} serves")), "{args:?}: {code} {text}");
    }
    ensure!(lab.nodes[0].agent.query(&["status"])?.get("ready") == Some(&Value::Bool(true)), "the first one suffered");
    // The kernel lets go of a killed agent's lock.
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    // A root off the bpf file system is one line, and nothing is made there.
    let elsewhere = lab.manifests().join("root");
    let mut command = lab.nodes[0].netns.command(binary()?);
    let out = command.args(second).arg("--bpf-root").arg(&elsewhere).output()?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(!out.status.success() && text.contains("mount -t bpf"), "{text}");
    ensure!(!elsewhere.exists(), "the refused root was made");
    Ok(())
}

/// Without the agent and without its snapshot.
#[test]
fn answers_from_the_pins_alone() -> Result<()> {
    let mut lab = Lab::start(Options::new("tcx"))?;
    lab.apply(&lab.web()?)?;
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 20)?;
    }
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let (code, text) = run(&lab, &["status"])?;
    ensure!(code == 0 && text.contains("is down") && text.contains("node1: ready"), "{code} {text}");
    let root = lab.nodes[0].agent.bpf_root().display().to_string();
    std::fs::remove_file(format!("/run/purelb-agent/{}.json", root.trim_matches('/').replace('/', "%2F")))?;
    let (code, text) = run(&lab, &["status"])?;
    ensure!(code == 0 && text.contains("no snapshot") && text.contains("tcx"), "{code} {text}");
    let services = lab.nodes[0].agent.query(&["services"])?;
    let all = services.as_array().context("services: no array")?;
    for vip in VIPS {
        let row = all
            .iter()
            .find(|row| row.get("vip").and_then(Value::as_str) == Some(vip) && row.get("port") == Some(&80.into()));
        let row = row.with_context(|| format!("{vip} is missing: {services}"))?;
        let endpoints = row.get("endpoints").and_then(Value::as_array).context("no endpoints")?;
        let shares: f64 = endpoints.iter().filter_map(|e| e.get("share").and_then(Value::as_f64)).sum();
        ensure!(endpoints.len() == 3 && (shares - 1.0).abs() < 1e-6, "{row}");
        ensure!(row.get("new_flows").and_then(Value::as_u64) >= Some(20), "flows were not counted: {row}");
    }
    let (code, text) = run(&lab, &["explain", "tcp", "198.18.0.2:40000", &format!("{}:80", VIPS[0])])?;
    ensure!(code == 0 && text.contains("=> forwarded: to 198.19.1."), "{code} {text}");
    let (code, text) = run(&lab, &["cleanup", "--deadline", "1s"])?;
    ensure!(code == 0, "{text}");
    for (args, want) in
        [(vec!["services"], 2), (vec!["drops"], 2), (vec!["status"], 1), (vec!["status", "-o", "json"], 1)]
    {
        let (code, text) = run(&lab, &args)?;
        ensure!(code == want && !text.is_empty(), "{args:?} without pins: {code} {text}");
    }
    Ok(())
}

/// Each exit that addresses, ports and flags decide; where a packet can be sent, the counter agrees.
#[test]
fn explain_says_what_the_program_does() -> Result<()> {
    let lab = Lab::start(Options::new("xdp"))?;
    let mut web = lab.web()?;
    web.ranges = vec!["198.18.0.0/24".to_owned(), "2001:db8::/64".to_owned()];
    lab.apply(&web)?;
    let (low, unknown) = (40_500u16, 23u16);
    for (vip, client) in VIPS.into_iter().zip(["198.18.0.2", "2001:db8::2"]) {
        let (vip, client): (IpAddr, IpAddr) = (vip.parse()?, client.parse()?);
        let foreign: IpAddr = if vip.is_ipv4() { "192.0.2.9".parse()? } else { "2001:db8:9::9".parse()? };
        let from = SocketAddr::new(client, 40_001);
        // Bound to the VIP and connected to the client: only its packets are the node's own.
        let own = lab.nodes[0].netns.enter(move || {
            let socket = UdpSocket::bind(SocketAddr::new(vip, low)).ok()?;
            socket.connect(SocketAddr::new(client, 40_001)).ok()?;
            Some(socket)
        })?;
        let own = own.context("no UDP socket at the VIP")?;
        type Row<'a> = (&'a str, SocketAddr, u16, &'a [&'a str], i32, &'a str);
        let rows: Vec<Row<'_>> = vec![
            ("tcp", from, 80, &[], 0, "forwarded"),
            ("tcp", from, 80, &["--running"], 0, "forwarded"),
            ("tcp", from, 80, &["--flags", "fin,ack"], 0, "forwarded"),
            ("tcp", from, 80, &["--flags", "syn,fin"], 1, "tcp-flags"),
            ("tcp", from, 80, &["--flags", "none"], 1, "tcp-flags"),
            ("tcp", SocketAddr::new(foreign, 40_001), 80, &[], 1, "source-range"),
            ("tcp", from, unknown, &[], 1, "unknown-port"),
            ("tcp", from, unknown, &["--running"], 1, "unknown-port"),
            ("tcp", from, low, &[], 1, "unknown-port"),
            ("tcp", from, low, &["--flags", "syn,ack"], 0, "passed-own"),
            ("udp", from, low, &[], 0, "passed-own"),
            ("udp", SocketAddr::new(client, 40_002), low, &[], 1, "unknown-port"),
        ];
        for (protocol, from, port, more, want, verdict) in rows {
            let (from, to) = (from.to_string(), SocketAddr::new(vip, port).to_string());
            let mut args = vec!["explain", protocol, &from, &to];
            args.extend(more);
            let (code, text) = run(&lab, &args)?;
            ensure!(code == want && text.contains(&format!("=> {verdict}:")), "{args:?}: {code} {text}");
        }
        drop(own);
        let (code, text) = run(&lab, &["explain", "tcp", "[::ffff:198.18.0.2]:1", &format!("[{}]:80", VIPS[1])])?;
        ensure!(code == 1 && text.contains("mapped-address"), "{text}");
        let (code, text) = run(&lab, &["explain", "tcp", &from.to_string(), &SocketAddr::new(client, 80).to_string()])?;
        ensure!(code == 0 && text.contains("not-vip"), "{text}");
    }
    let (code, text) = run(&lab, &["explain", "tcp", "198.18.0.2:1", "[2001:db8::1]:80"])?;
    ensure!(code == 2 && text.contains("two families"), "{code} {text}");
    let (code, _) = run(&lab, &["explain", "tcp", "198.18.0.2:1", "nonsense"])?;
    ensure!(code == 2, "{code}");
    // The packet agrees: a SYN to an unknown port is counted under the reason that explain names.
    let before = lab.nodes[0].agent.dropped("unknown-port")?;
    let to = SocketAddr::new(VIPS[0].parse()?, unknown);
    let outcome =
        clients::Conn::open_within(&lab.client, "0.0.0.0:0".parse()?, to, std::time::Duration::from_millis(150));
    ensure!(outcome.is_err(), "{to} was answered");
    sys::wait_for("the drop is counted", std::time::Duration::from_secs(2), || {
        Ok(lab.nodes[0].agent.dropped("unknown-port")? > before)
    })?;
    // A running connection is found in the tables, and its Service by name.
    let mut conn = clients::Conn::open(&lab.client, SocketAddr::new(VIPS[0].parse()?, 80))?;
    conn.echo(100)?;
    let flow = [conn.local()?.to_string(), format!("{}:80", VIPS[0])];
    let (code, text) = run(&lab, &["explain", "tcp", &flow[0], &flow[1]])?;
    ensure!(code == 0 && text.contains("Service default/") && text.contains("REPLIES: 198.18.0.2"), "{text}");
    println!("{text}");
    let mut settings = purelb_tests::manifests::node_agent(&["eth0"], "xdp");
    settings["metadata"]["name"] = "a-first".into();
    settings["spec"]["datapath"]["unknownPorts"] = "Pass".into();
    lab.write_objects("settings.yaml", &[settings])?;
    sys::wait_for("unknown ports pass", std::time::Duration::from_secs(5), || {
        let (code, text) = run(&lab, &["explain", "tcp", "198.18.0.2:1", &to.to_string()])?;
        Ok(code == 0 && text.contains("=> passed-unknown-port:"))
    })?;
    for args in [vec!["status"], vec!["services"], vec!["drops"]] {
        println!("$ {args:?}\n{}", run(&lab, &args)?.1);
    }
    Ok(())
}

/// `drops --watch` shows a drop as it happens, and Ctrl-C is a clean end.
fn watched(lab: &Lab) -> Result<()> {
    use std::io::{BufRead as _, BufReader};

    let node = &lab.nodes[0];
    let mut command = node.netns.command(binary()?);
    command.args(["drops", "--watch", "--bpf-root"]).arg(node.agent.bpf_root());
    let mut child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let to = SocketAddr::new(VIPS[0].parse()?, 23);
    let knock = std::time::Duration::from_millis(150);
    let outcome = clients::Conn::open_within(&lab.client, "0.0.0.0:0".parse()?, to, knock);
    ensure!(outcome.is_err(), "{to} was answered");
    let line = lines.next().context("nothing was sampled")??;
    ensure!(line.starts_with("unknown-port") && line.contains(&format!("-> {to} at interface eth0")), "{line}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(0), "Ctrl-C ended it with {status}");
    Ok(())
}

/// An agent that is silent for too long: said by `status`, and `explain` tells what the program does then.
#[test]
fn silence_and_samples() -> Result<()> {
    let mut lab = Lab::start(Options::new("xdp"))?;
    lab.apply(&lab.web()?)?;
    watched(&lab)?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let node = &lab.nodes[0];
    let mut command = node.netns.command(binary()?);
    command.args(["node", "--node-name", "node1", "--heartbeat", "1s", "--source"]);
    command.arg(format!("dir:{}", lab.manifests().display())).arg("--bpf-root").arg(node.agent.bpf_root());
    let mut agent = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let limit = std::time::Duration::from_secs(10);
    let alive = sys::wait_for("the second agent is ready", std::time::Duration::from_secs(60), || {
        let status = lab.nodes[0].agent.query(&["status"])?;
        let limit = status.pointer("/tables/heartbeat_limit").and_then(Value::as_f64).unwrap_or(f64::MAX);
        Ok(limit < 60.0 && status.get("ready") == Some(&Value::Bool(true)))
    });
    agent.kill()?;
    agent.wait()?;
    alive?;
    sys::wait_for("the tables are stale", limit, || Ok(run(&lab, &["status"])?.0 == 1))?;
    let (_, text) = run(&lab, &["status"])?;
    ensure!(text.contains("tables: stale") && text.contains("not ready"), "{text}");
    for port in ["80", "23"] {
        let (code, text) = run(&lab, &["explain", "tcp", "198.18.0.2:40000", &format!("{}:{port}", VIPS[0])])?;
        ensure!(code == 0 && text.contains("=> passed-stale"), "port {port}: {text}");
    }
    Ok(())
}
