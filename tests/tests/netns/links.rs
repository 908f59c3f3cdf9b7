//! Uplinks that appear, vanish, come back, are renamed, go down, belong to others, or get another hook; running
//! connections notice none of it (I11).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::{Load, LongLived};
use purelb_tests::sys::{self, Kind};
use purelb_tests::{clients, each_hook};

fn with_interfaces(options: Options, interfaces: &[&str]) -> Options {
    Options { interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(), ..options }
}

fn serves(lab: &Lab, what: &str) -> Result<()> {
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 45).with_context(|| what.to_owned())?;
        ensure!(found.len() == 3, "{what}: clients met {found:?}");
    }
    Ok(())
}

/// An uplink that the settings name is made later, vanishes and is made again, beside load on another.
fn comes_and_goes(options: Options) -> Result<()> {
    let hook = options.hook.clone();
    let mut lab = Lab::build(with_interfaces(options, &["eth0", "eth1"]))?;
    lab.run()?;
    lab.apply(&lab.web()?)?;
    let node = &lab.nodes[0];
    node.agent.wait_problem(&["interface eth1", "no such interface"])?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    let links = node.agent.bpf_root().join("links");
    let pins = || -> Result<Vec<PathBuf>> {
        let all = std::fs::read_dir(&links)?.flatten().map(|entry| entry.path());
        Ok(all.filter(|path| path.to_string_lossy().contains("eth1")).collect())
    };
    for round in ["made", "made again"] {
        lab.add_uplink(1, 1)?;
        node.agent.wait_uplink("eth1", &format!("{hook} attached"))?;
        ensure!(!node.agent.problems()?.contains("eth1"), "eth1 is there, and still a problem");
        lab.arrive_by(1, 1)?;
        serves(&lab, &format!("by an uplink that was {round}"))?;
        lab.arrive_by(1, 0)?;
        node.netns.ip("link del eth1")?;
        node.agent.wait_problem(&["interface eth1", "no such interface"])?;
        sys::wait_for("the pins of what vanished are gone", Duration::from_secs(5), || Ok(pins()?.is_empty()))?;
    }
    serves(&lab, "by the uplink that stayed")?;
    load.finish()
}

/// The only uplink gets another name that the settings know too.
fn is_renamed(options: Options) -> Result<()> {
    let hook = options.hook.clone();
    let (lab, _) = Lab::serving(with_interfaces(options, &["/(eth|wan)[0-9]+/"]))?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    let node = &lab.nodes[0];
    for (from, to) in [("eth0", "wan0"), ("wan0", "eth0")] {
        node.netns.ip(&format!("link set {from} name {to}"))?;
        node.agent.wait_uplink(to, &format!("{hook} attached"))?;
        ensure!(node.agent.uplink(from)?.is_empty(), "{from} is still shown");
        serves(&lab, &format!("{from} is called {to} now"))?;
    }
    load.finish()
}

/// Two uplinks change their names, unseen in between: both keep their programs.
fn names_change_places(options: Options) -> Result<()> {
    let options = Options { uplinks: 2, ..with_interfaces(options, &["/eth[01]/"]) };
    let (lab, _) = Lab::serving(options)?;
    let node = &lab.nodes[0];
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    let pid = Pid::from_raw(i32::try_from(node.agent.pid().context("the agent runs")?)?);
    for _ in 0..3 {
        kill(pid, Signal::SIGSTOP)?;
        for (from, to) in [("eth0", "other"), ("eth1", "eth0"), ("other", "eth1")] {
            node.netns.ip(&format!("link set {from} name {to}"))?;
        }
        kill(pid, Signal::SIGCONT)?;
        sys::pause(1_000);
    }
    load.finish()
}

/// Somebody removes pins under the agent: programs hang on, and nobody finds other tables than those that are used.
fn pins_are_removed(options: Options) -> Result<()> {
    let (mut lab, web) = Lab::serving(options)?;
    let root = lab.nodes[0].agent.bpf_root().to_owned();
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    for what in ["links", "maps", "all"] {
        let files = |folder: &std::path::Path| -> Result<Vec<PathBuf>> {
            let all = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path());
            Ok(all.filter(|path| !path.is_dir()).collect())
        };
        let maps = files(&root)?.len();
        match what {
            "links" => files(&root.join("links"))?.iter().try_for_each(std::fs::remove_file)?,
            "maps" => files(&root)?.iter().try_for_each(std::fs::remove_file)?,
            _ => std::fs::remove_dir_all(&root)?,
        }
        lab.nodes[0].agent.wait_uplink("eth0", &format!("{} attached", lab.hook())).context(what)?;
        sys::wait_for("it is ready", Duration::from_secs(20), || {
            Ok(lab.nodes[0].agent.query(&["status"])?["agent"]["alive"] == true)
        })?;
        serves(&lab, &format!("{what} were removed"))?;
        sys::wait_for("all is pinned again", Duration::from_secs(20), || {
            let (links, found) = (files(&root.join("links"))?.len(), files(&root)?.len());
            ensure!(links >= 2 && found == maps, "{links} links and {found} of {maps} maps");
            Ok(true)
        })?;
    }
    // All is as before for the next agent, and connections outlive it.
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    lab.wait_programmed(&web)?;
    load.finish()
}

/// The uplink loses its carrier's other side and comes back: connections wait and go on.
fn goes_down(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    let running =
        lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 3)).collect::<Result<Vec<_>>>()?;
    let node = &lab.nodes[0];
    for _ in 0..2 {
        node.netns.ip("link set eth0 down")?;
        sys::pause(200);
        node.netns.ip("link set eth0 up")?;
        lab.restore_uplink(1, 0, "eth0")?;
        node.agent.wait_uplink("eth0", &format!("{} attached", lab.hook()))?;
        sys::pause(300);
        serves(&lab, "after down and up")?;
    }
    for one in running {
        one.finish()?;
    }
    Ok(())
}

/// The settings ask for another hook while load runs: never none is there, never a packet is lost.
fn hook_changes(from: &str, to: &str) -> Result<()> {
    let (lab, _) = Lab::serving(Options::new("xdp"))?;
    lab.set_datapath(&["eth0"], from)?;
    lab.nodes[0].agent.wait_uplink("eth0", &format!("{from} attached"))?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    sys::pause(100);
    lab.set_datapath(&["eth0"], to)?;
    lab.nodes[0].agent.wait_uplink("eth0", &format!("{to} attached"))?;
    sys::pause(100);
    load.finish()
}

#[test]
fn hook_changes_xdp_to_tcx() -> Result<()> {
    hook_changes("xdp", "tcx")
}

#[test]
fn hook_changes_tcx_to_xdp() -> Result<()> {
    hook_changes("tcx", "xdp")
}

#[test]
fn hook_changes_xdp_to_generic() -> Result<()> {
    hook_changes("xdp", "xdp-generic")
}

#[test]
fn hook_changes_generic_to_xdp() -> Result<()> {
    hook_changes("xdp-generic", "xdp")
}

/// Another XDP program owns the uplink: asked for xdp the agent names that and keeps what it had; auto and tcx
/// work beside it; when the other has gone, xdp is taken up without being asked again.
#[test]
fn foreign_xdp_program() -> Result<()> {
    let mut lab = Lab::build(Options::new("xdp"))?;
    let program = PathBuf::from(format!("{}-foreign", lab.nodes[0].agent.bpf_root().display()));
    sys::pin_program(Kind::XdpPass, &program)?;
    // `ip -n` would hide the bpf file system.
    let foreign = format!("ip link set eth0 xdpdrv pinned {}", program.display());
    lab.nodes[0].netns.exec(&foreign)?;
    lab.write_base()?;
    lab.nodes[0].agent.start()?;
    let agent = &lab.nodes[0].agent;
    agent.wait_uplink("eth0", "xdp refused")?;
    agent.wait_problem(&["interface eth0", "another XDP program", "tcx"])?;
    for hook in ["auto", "tcx"] {
        lab.set_datapath(&["eth0"], hook)?;
        agent.wait_uplink("eth0", "tcx attached")?;
        ensure!(!agent.problems()?.contains("eth0"), "{hook}: the problem stays");
    }
    lab.apply(&lab.web()?)?;
    serves(&lab, "by tcx beside another's XDP program")?;
    let load = Load::start(&lab.client, &lab.targets(80)?)?;
    lab.set_datapath(&["eth0"], "xdp")?;
    agent.wait_problem(&["interface eth0", "another XDP program"])?;
    sys::pause(200);
    let shown = lab.nodes[0].netns.ip("-d link show dev eth0")?;
    ensure!(shown.contains("prog/xdp"), "the other's program was thrown out: {shown}");
    lab.nodes[0].netns.ip("link set eth0 xdpdrv off")?;
    agent.wait_uplink("eth0", "xdp attached")?;
    ensure!(!agent.problems()?.contains("eth0"), "the problem stays");
    sys::pause(200);
    load.finish()
}

/// A veth whose peer has an MTU beyond a page: with XDP multi-buffer nothing is refused and long frames pass.
fn long_frames(options: Options) -> Result<()> {
    let mut lab = Lab::build(options)?;
    let node = lab.nodes[0].netns.clone();
    for (netns, device) in [(&lab.client, "eth0"), (&lab.router, "client"), (&lab.router, "node1"), (&node, "eth0")] {
        netns.ip(&format!("link set {device} mtu 9000"))?;
    }
    for (pod, number) in lab.nodes[0].pods.iter().zip(0..) {
        pod.netns.ip("link set eth0 mtu 9000")?;
        node.ip(&format!("link set pod{number} mtu 9000"))?;
    }
    lab.run()?;
    lab.apply(&lab.web()?)?;
    for to in lab.targets(80)? {
        clients::udp(&lab.client, to, 8_900).context("a frame of 9,000 bytes")?;
        let mut conn = clients::Conn::open(&lab.client, to)?;
        conn.echo(50_000)?;
        conn.bulk(4_000_000)?;
    }
    Ok(())
}

each_hook! { comes_and_goes is_renamed names_change_places pins_are_removed goes_down long_frames }
