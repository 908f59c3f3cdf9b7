//! Change upon change while connections run: modes that are switched to and fro, agents that die half-way, mounted
//! ConfigMaps that are swapped, links whose address changes.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::lab::{Lab, Options};
use purelb_tests::load::LongLived;
use purelb_tests::{each_hook, manifests, sys};

fn long_lived(lab: &Lab) -> Result<Vec<LongLived>> {
    lab.targets(80)?.into_iter().map(|to| LongLived::start(&lab.client, to, 4)).collect()
}

fn set_mode(lab: &Lab, mode: &str) -> Result<()> {
    let mut settings = manifests::node_agent(&["eth0"], lab.hook());
    settings["spec"]["datapath"]["mode"] = mode.into();
    lab.write_objects("lbnodeagent.yaml", &[settings]).map(drop)
}

/// The agent dies while `datapath.mode: off` hands over, and its successor goes on with that, a broken file beside it.
fn killed_while_it_drains(options: Options) -> Result<()> {
    let (mut lab, web) = Lab::serving(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let before = long_lived(&lab)?;
    sys::pause(500);
    set_mode(&lab, "off")?;
    sys::pause(700);
    lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let meanwhile = long_lived(&lab)?;
    lab.write("broken.yaml", "kind: Service\n  apiVersion: v1\n")?;
    lab.nodes[0].agent.start()?;
    lab.nodes[0].agent.wait_ready()?;
    sys::pause(1_500);
    for one in before.into_iter().chain(meanwhile) {
        one.finish().context("during the drain")?;
    }
    let links = lab.nodes[0].agent.bpf_root().join("links");
    sys::wait_for("nothing to hang", Duration::from_secs(20), || Ok(std::fs::read_dir(&links)?.count() == 0))?;
    let without = long_lived(&lab)?;
    set_mode(&lab, "auto")?;
    lab.nodes[0].agent.wait_uplink("eth0", &format!("{} attached", lab.hook()))?;
    sys::pause(1_500);
    for one in without {
        one.finish().context("switched on again")?;
    }
    Ok(())
}

/// The mode is switched several times, faster than it can be followed.
fn mode_flaps(options: Options) -> Result<()> {
    let (lab, web) = Lab::serving(Options { agent_args: vec!["--kube-proxy", "yes"], ..options })?;
    lab.proxy_rules(&lab.nodes[0].netns, &web)?;
    let mut running = Vec::new();
    for pause in [50, 700, 200, 1_500, 20, 900] {
        running.extend(long_lived(&lab)?);
        set_mode(&lab, "off")?;
        sys::pause(pause);
        running.extend(long_lived(&lab)?);
        set_mode(&lab, "auto")?;
        sys::pause(pause);
    }
    sys::pause(1_000);
    running.into_iter().try_for_each(|one| one.finish().map(drop))
}

/// A ConfigMap as kubelet mounts it: files are links through `..data`, which is swapped to a new folder.
fn mounted_config_map(options: Options) -> Result<()> {
    let (lab, mut web) = Lab::serving(options)?;
    let folder = lab.manifests();
    let swap = |version: u32, web: &manifests::Service| -> Result<()> {
        let new = folder.join(format!("..v{version}"));
        std::fs::create_dir(&new)?;
        for entry in std::fs::read_dir(&folder)?.flatten() {
            let name = entry.file_name();
            if entry.path().extension().is_some_and(|e| e == "yaml") {
                std::fs::copy(entry.path(), new.join(&name))?;
            }
        }
        let objects = std::iter::once(web.service()).chain(web.slices());
        let text: Vec<_> = objects.map(|object| serde_yaml_ng::to_string(&object)).collect::<Result<_, _>>()?;
        std::fs::write(new.join("web.yaml"), text.join("---\n"))?;
        let link = folder.join("..data_tmp");
        symlink(Path::new(&format!("..v{version}")), &link)?;
        std::fs::rename(&link, folder.join("..data"))?;
        Ok(())
    };
    swap(0, &web)?;
    for entry in std::fs::read_dir(folder.join("..v0"))?.flatten() {
        let (name, link) = (entry.file_name(), folder.join("next"));
        symlink(Path::new("..data").join(&name), &link)?;
        std::fs::rename(&link, folder.join(&name))?;
    }
    let running = long_lived(&lab)?;
    for version in 1..12 {
        let mut next = web.clone();
        next.endpoints[version as usize % 3].ready = version % 2 == 0;
        swap(version, &next)?;
        std::fs::remove_dir_all(folder.join(format!("..v{}", version - 1)))?;
        lab.wait_programmed(&next).with_context(|| format!("version {version}"))?;
        web = next;
    }
    running.into_iter().try_for_each(|one| one.finish().map(drop))
}

/// The uplink gets another MAC address and another MTU: what is for this host is judged on.
fn the_link_changes(options: Options) -> Result<()> {
    let (lab, _) = Lab::serving(options)?;
    let node = &lab.nodes[0];
    let mut running = long_lived(&lab)?;
    for change in ["link set eth0 mtu 1400", "link set eth0 mtu 1500", "link set eth0 address 02:00:00:00:77:01"] {
        if change.contains("address") {
            // Until the agent has heard of it, XDP takes frames to the new address for another host's.
            for one in running.drain(..) {
                one.finish()?;
            }
        }
        node.netns.ip(change)?;
        lab.router.ip("neigh flush all")?;
        sys::pause(700);
        // What a closed connection still sends comes to an address that is not the host's yet, or not any more.
        let before = node.agent.dropped("passed-other-host")?;
        for one in long_lived(&lab)? {
            sys::pause(200);
            one.finish().with_context(|| change.to_owned())?;
        }
        let others = node.agent.dropped("passed-other-host")? - before;
        ensure!(others == 0, "{change}: {others} packets are taken for another host's");
    }
    Ok(())
}

each_hook! { killed_while_it_drains mode_flaps mounted_config_map the_link_changes }
