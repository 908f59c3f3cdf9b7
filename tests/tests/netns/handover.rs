//! Coming to a node that kube-proxy serves, and going from it again: no connection breaks either way.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::{LongLived, Newcomers};
use purelb_tests::manifests::{Port, Service};
use purelb_tests::{clients, each_hook, each_hook_and_rules, sys};

fn long_lived(lab: &Lab) -> Result<Vec<LongLived>> {
    lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 4)).collect()
}

fn newcomers(lab: &Lab) -> Result<Vec<Newcomers>> {
    Ok(lab.targets(80)?.into_iter().map(|to| Newcomers::start(&lab.client, to)).collect())
}

fn objects(service: &Service) -> Vec<serde_json::Value> {
    let mut objects = vec![service.service()];
    objects.extend(service.slices());
    objects
}

fn served(lab: &Lab) -> Result<()> {
    lab.targets(80)?.into_iter().try_for_each(|to| clients::spread(&lab.client, to, 5).map(drop))
}

fn nothing_is_left(lab: &Lab, ids: &[u64]) -> Result<()> {
    let agent = &lab.nodes[0].agent;
    let left = std::fs::read_dir(agent.bpf_root()).map(Iterator::count).unwrap_or(0);
    ensure!(left == 0, "cleanup left {left} pins in {}", agent.bpf_root().display());
    for id in ids {
        ensure!(sys::run(&format!("bpftool link show id {id}")).is_err(), "the link {id} is still there");
    }
    Ok(())
}

/// The ids of the agent's links.
fn links(lab: &Lab) -> Result<Vec<u64>> {
    let folder = lab.nodes[0].agent.bpf_root().join("links");
    let id = |entry: std::fs::DirEntry| -> Result<u64> {
        let text = sys::run(&format!("bpftool -j link show pinned {}", entry.path().display()))?;
        let value: serde_json::Value = serde_json::from_str(&text)?;
        value.get("id").and_then(serde_json::Value::as_u64).context("a link without an id")
    };
    let ids = std::fs::read_dir(folder)?.flatten().map(id).collect::<Result<Vec<_>>>()?;
    ensure!(ids.len() >= 2, "only {} links before the cleanup", ids.len());
    Ok(ids)
}

/// `cleanup` under load: new connections go to kube-proxy's rules at once, running ones stay where they are
/// until the deadline, then all of it is gone and new ones are served on.
fn cleanup_under_load(options: Options) -> Result<()> {
    let (mut lab, web) = Lab::serving(options)?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let running = long_lived(&lab)?;
    let coming = newcomers(&lab)?;
    let ids = links(&lab)?;
    let before = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
    ensure!(before == 0, "kube-proxy's rules saw {before} connections while the data path was there");
    lab.nodes[0].agent.stop(Signal::SIGTERM)?;
    let began = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let cleanup = scope.spawn(|| lab.nodes[0].agent.command(&["cleanup", "--deadline", "10s"], false));
        sys::wait_for("new connections reach kube-proxy's rules", Duration::from_secs(5), || {
            Ok(lab.counter(&lab.nodes[0].netns, "proxy", "vip")? > 0)
        })?;
        for to in lab.targets(80)? {
            clients::spread(&lab.client, to, 10)?;
        }
        sys::pause(1_000);
        ensure!(running.iter().all(|one| one.ended() == 0), "a running connection broke before the deadline");
        ensure!(!cleanup.is_finished(), "cleanup ended after {:?} though connections run", began.elapsed());
        for one in running {
            one.finish()?;
        }
        cleanup.join().map_err(|_| anyhow!("cleanup's thread panicked"))??;
        Ok(())
    })?;
    ensure!(began.elapsed() < Duration::from_secs(20), "cleanup took {:?}, its deadline was 10 s", began.elapsed());
    for to in lab.targets(80)? {
        ensure!(clients::spread(&lab.client, to, 40)?.len() == 3, "kube-proxy's rules alone do not spread");
        clients::udp(&lab.client, to, 100)?;
    }
    for one in coming {
        one.finish()?;
    }
    nothing_is_left(&lab, &ids)
}

/// Without running connections `cleanup` waits for nothing; a second time is fine.
fn cleanup_when_idle(options: Options) -> Result<()> {
    let (mut lab, _) = Lab::serving(options)?;
    for to in lab.targets(80)? {
        clients::spread(&lab.client, to, 3)?;
    }
    let ids = links(&lab)?;
    let agent = &mut lab.nodes[0].agent;
    agent.stop(Signal::SIGTERM)?;
    sys::pause(1_000);
    let began = Instant::now();
    agent.command(&["cleanup", "--deadline", "60s"], false)?;
    ensure!(began.elapsed() < Duration::from_secs(30), "cleanup waited {:?} for nobody", began.elapsed());
    agent.command(&["cleanup"], false).context("cleanup again")?;
    nothing_is_left(&lab, &ids)
}

/// The agent comes to a node that carries connections by kube-proxy (`--live`): they stay there, new ones
/// are ours.
fn adoption(options: Options) -> Result<()> {
    let mut lab = Lab::build(Options { agent_args: vec!["--live", "yes", "--kube-proxy", "yes"], ..options })?;
    let web = lab.web()?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let running = long_lived(&lab)?;
    let coming = newcomers(&lab)?;
    lab.write_objects("web.yaml", &objects(&web))?;
    lab.run()?;
    lab.wait_programmed(&web)?;
    sys::pause(300);
    let before = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
    for to in lab.targets(80)? {
        let found = clients::spread(&lab.client, to, 40)?;
        ensure!(found.len() == 3, "after the adoption clients met {found:?}");
    }
    let after = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
    ensure!(before == after, "{} new connections went to kube-proxy's rules", after - before);
    for one in coming {
        one.finish()?;
    }
    for one in running {
        one.finish()?;
    }
    Ok(())
}

/// The same, found out by the agent itself; but its first start is killed when its maps are pinned and nothing is
/// in them yet. The next one still finds connections that kube-proxy carries.
fn killed_at_the_adoption(options: Options) -> Result<()> {
    let mut lab = Lab::build(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    let web = lab.web()?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let running = long_lived(&lab)?;
    lab.write_objects("web.yaml", &objects(&web))?;
    let agent = &mut lab.nodes[0].agent;
    let maps = agent.bpf_root().join("SLOTS");
    agent.start()?;
    sys::wait_for("the maps", Duration::from_secs(5), || Ok(maps.exists()))?;
    agent.stop(Signal::SIGKILL)?;
    lab.run()?;
    lab.wait_programmed(&web)?;
    sys::pause(300);
    for one in running {
        one.finish()?;
    }
    Ok(())
}

/// What an agent leaves that died in its first seconds, or somebody else of the pins, goes too.
#[test]
fn cleanup_of_half_the_pins() -> Result<()> {
    for gone in ["prog_clock", "SERVICES4", "links"] {
        let (mut lab, _) = Lab::serving(Options::new("tcx").pods(1))?;
        lab.nodes[0].agent.stop(Signal::SIGKILL)?;
        let ids = links(&lab)?;
        let path = lab.nodes[0].agent.bpf_root().join(gone);
        if path.is_dir() {
            std::fs::remove_dir_all(path)?
        } else {
            std::fs::remove_file(path)?
        }
        lab.nodes[0].agent.command(&["cleanup", "--deadline", "1s"], false).with_context(|| gone.to_owned())?;
        nothing_is_left(&lab, &ids)?;
    }
    Ok(())
}

/// `cleanup` hears the client that speaks once a second too.
fn cleanup_hears_the_slow(options: Options) -> Result<()> {
    let (mut lab, _) = Lab::serving(options)?;
    let open = |to| clients::Conn::open(&lab.client, to);
    let mut slow = lab.targets(80)?.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    lab.nodes[0].agent.stop(Signal::SIGTERM)?;
    thread::scope(|scope| -> Result<()> {
        let cleanup = scope.spawn(|| lab.nodes[0].agent.command(&["cleanup", "--deadline", "8s"], false));
        for second in 0..6 {
            sys::pause(1_000);
            for one in &mut slow {
                one.ask("NAME").with_context(|| format!("in second {second}"))?;
            }
        }
        ensure!(!cleanup.is_finished(), "cleanup did not wait for those who speak once a second");
        cleanup.join().map_err(|_| anyhow!("cleanup's thread panicked"))??;
        Ok(())
    })
}

/// While the agent is silent new connections go to kube-proxy, and stay there when it is back.
fn silence(options: Options) -> Result<()> {
    let agent_args = vec!["--kube-proxy", "yes", "--heartbeat", "1s"];
    let (mut lab, web) = Lab::serving(Options { agent_args, ..options })?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let before = long_lived(&lab)?;
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    sys::pause(3_000);
    let meanwhile = long_lived(&lab)?;
    let seen = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
    ensure!(seen > 0, "kube-proxy got nothing while the agent was silent");
    lab.run()?;
    let after = long_lived(&lab)?;
    sys::pause(2_000);
    for one in before.into_iter().chain(meanwhile).chain(after) {
        one.finish()?;
    }
    Ok(())
}

/// `datapath.mode: off` and back beside kube-proxy: a change of mode is a change of slots and breaks nothing,
/// neither before the programs are taken down nor after it.
fn mode_changes(options: Options) -> Result<()> {
    let (lab, web) = Lab::serving(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let set = |mode: &str| {
        let mut settings = purelb_tests::manifests::node_agent(&["eth0"], lab.hook());
        settings["spec"]["datapath"]["mode"] = mode.into();
        lab.write_objects("lbnodeagent.yaml", &[settings])
    };
    let links = lab.nodes[0].agent.bpf_root().join("links");
    let hang = || std::fs::read_dir(&links).map(Iterator::count);
    for (mode, detached) in [("off", false), ("auto", false), ("off", true), ("auto", false)] {
        let running = long_lived(&lab)?;
        set(mode)?;
        sys::pause(2_000);
        ensure!(hang()? > 0, "detached though connections run");
        for one in running {
            one.finish().with_context(|| format!("mode {mode}"))?;
        }
        let before = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
        for to in lab.targets(80)? {
            ensure!(clients::spread(&lab.client, to, 40)?.len() == 3, "mode {mode}: not spread over all endpoints");
        }
        let after = lab.counter(&lab.nodes[0].netns, "proxy", "vip")?;
        // A client's port that was used before goes where it went: few of them.
        ensure!((mode == "off") == (after > before + 5), "mode {mode}: kube-proxy saw {} connections", after - before);
        if detached {
            sys::wait_for("nothing to hang", Duration::from_secs(8), || Ok(hang()? == 0))?;
        }
    }
    Ok(())
}

/// Beside kube-proxy a Service is not balanced here any more: new connections are kube-proxy's, running ones stay.
fn policy_changes(options: Options) -> Result<()> {
    let (lab, mut web) = Lab::serving(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let running = long_lived(&lab)?;
    let coming = newcomers(&lab)?;
    web.local = false;
    lab.apply(&web)?;
    sys::wait_for("new connections reach kube-proxy's rules", Duration::from_secs(5), || {
        Ok(lab.counter(&lab.nodes[0].netns, "proxy", "vip")? > 0)
    })?;
    sys::pause(500);
    for one in running {
        one.finish()?;
    }
    for one in coming {
        one.finish()?;
    }
    Ok(())
}

/// A Service for which there was no room is kube-proxy's; when there is room its connections stay there.
#[test]
fn room_comes_late() -> Result<()> {
    let options = Options { agent_args: vec!["--kube-proxy", "yes", "--live", "no"], ..Options::new("tcx") };
    let lab = Lab::start(options)?;
    let web = lab.web()?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let filler = (0..33_u16).map(|n| {
        let ports = (0..250).map(|port| Port::new(&format!("p{port}"), 1000 + port, 8080, "TCP")).collect();
        let vips = vec![format!("203.0.113.{}", 10 + n).parse()?];
        Ok(Service { name: format!("filler{n}"), vips, ports, endpoints: Vec::new(), ..web.clone() }.service())
    });
    lab.write_objects("filler.yaml", &filler.collect::<Result<Vec<_>>>()?)?;
    lab.nodes[0].agent.wait_problem(&["no room in the tables"])?;
    lab.write_objects("web.yaml", &objects(&web))?;
    lab.nodes[0].agent.wait_problem(&["no room in the tables", "203.0.113.1 port 80"])?;
    sys::pause(500);
    let running = long_lived(&lab).context("without room kube-proxy serves")?;
    std::fs::remove_file(lab.manifests().join("filler.yaml"))?;
    lab.wait_programmed(&web)?;
    sys::pause(500);
    running.into_iter().try_for_each(|one| one.finish().map(drop))
}

/// The same of a Service whose file could not be read when the agent came to the node.
fn read_late(options: Options) -> Result<()> {
    let mut lab = Lab::build(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    let web = lab.web()?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    lab.write("web.yaml", "apiVersion: v1\n\tkind: Service\n")?;
    lab.run()?;
    let running = long_lived(&lab)?;
    lab.apply(&web)?;
    sys::pause(500);
    running.into_iter().try_for_each(|one| one.finish().map(drop))
}

/// kube-proxy's process ends, and so does the agent's: to the next one the node is still kube-proxy's too.
#[test]
fn kube_proxy_restarts_too() -> Result<()> {
    let mut lab = Lab::build(Options::new("tcx"))?;
    let health = lab.nodes[0].netns.enter(|| TcpListener::bind("127.0.0.1:10256"))??;
    lab.run()?;
    let mut web = lab.web()?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    web.local = false;
    web.endpoints.iter_mut().for_each(|endpoint| endpoint.node = "elsewhere".to_owned());
    lab.apply(&web)?;
    served(&lab).context("by kube-proxy")?;
    // The beat tells the tables.
    sys::pause(1_500);
    drop(health);
    lab.nodes[0].agent.stop(Signal::SIGTERM)?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    served(&lab).context("by its rules, while it is not there")
}

each_hook_and_rules! { cleanup_under_load adoption }
each_hook! {
    cleanup_when_idle cleanup_hears_the_slow killed_at_the_adoption policy_changes mode_changes silence read_late
}
