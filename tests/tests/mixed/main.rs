//! Clusters in which PureLB's own agent runs on some nodes and ours on others, as while one takes the other's place.
//!
//! Elections come to the same there, and addresses are where they were elected to. That one node alone answers is likely, not
//! proven: PureLB's agents leave no marks, wait for nobody's, and what one of them had when it was killed goes on answering.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_plan::announce::election::score;
use purelb_tests::answers::Asker;
use purelb_tests::lab::kube::set_ready;
use purelb_tests::lan::{TAKE_OVER, TOGETHER};
use purelb_tests::purelb::agent::{Upstream, binary};
use purelb_tests::scenario::{Scene, targets};
use purelb_tests::sys;
use serde_json::json;

/// Longer than a Lease of PureLB's.
const SETTLED: u64 = 9_000;

/// A scene, more local addresses than it has, and PureLB's agents at some nodes.
struct Mixed {
    scene: Scene,
    vips: Vec<IpAddr>,
    theirs: [Option<Upstream>; 3],
    pods: u32,
    /// Nodes whose pods are ready.
    up: Vec<usize>,
}

impl Mixed {
    fn new() -> Result<Self> {
        binary()?;
        let scene = Scene::new("nftables", "xdp")?;
        scene.ready(&[0, 1])?;
        let mut vips = scene.near.vips.clone();
        for name in ["near2", "near3", "near4", "near5", "near6"] {
            let spec = json!({"externalTrafficPolicy": "Cluster", "selector": {"app": "web"}});
            vips.extend(scene.lab.service_of(&scene.admin, name, "default", spec)?);
        }
        Ok(Self { scene, vips, theirs: [None, None, None], pods: 0, up: vec![0, 1, 2] })
    }

    /// Our agent is at that node, and no other.
    fn ours(&mut self, at: usize) -> Result<()> {
        if let Some(mut agent) = self.theirs[at].take() {
            agent.stop(Signal::SIGTERM)?;
        }
        self.scene.lab.nodes[at].agent.start()?;
        self.scene.wait_agent(at)
    }

    /// PureLB's agent is at that node, and nothing of ours is left there.
    fn theirs(&mut self, at: usize) -> Result<()> {
        let node = &mut self.scene.lab.nodes[at];
        node.agent.stop(Signal::SIGTERM)?;
        node.agent.command(&["cleanup"], false)?;
        self.start_theirs(at)
    }

    fn start_theirs(&mut self, at: usize) -> Result<()> {
        self.pods += 1;
        // This kernel may lack the dummy device that PureLB would make, and takes away when it ends.
        let netns = &self.scene.lab.nodes[at].netns;
        if netns.ip("link show kube-lb0").is_err() {
            netns.ip("link add kube-lb0 type ifb")?;
        }
        let agent = Upstream::start(&self.scene.lab, &self.scene.lab.nodes[at], &format!("pod-{}", self.pods))?;
        self.theirs[at] = Some(agent);
        Ok(())
    }

    /// Each local address is at the node of these whose lot wins, and at no other; remote ones are at each of these.
    fn elected(&self, live: &[usize]) -> Result<()> {
        let nodes: Vec<_> = live.iter().map(|at| self.scene.lab.nodes[*at].name.as_str()).collect();
        for ip in &self.vips {
            let wins = nodes.iter().min_by_key(|node| score(node, *ip)).context("a node")?;
            sys::wait_for(&format!("{wins} alone has {ip}"), TAKE_OVER, || {
                let all = self.scene.having("lan0", *ip);
                ensure!(all.iter().filter(|node| nodes.contains(&node.as_str())).eq([wins]), "{all:?} have it");
                Ok(true)
            })?;
        }
        for ip in &self.scene.cluster.vips {
            sys::wait_for(&format!("{nodes:?} have {ip}"), TAKE_OVER, || {
                let all = self.scene.having("kube-lb0", *ip);
                ensure!(nodes.iter().all(|node| all.iter().any(|one| one == node)), "{all:?} have it");
                Ok(true)
            })?;
        }
        Ok(())
    }

    /// Asks for all local addresses while something happens, until all is where it is elected to: how often two answered.
    fn watched(&mut self, what: &str, live: &[usize], work: impl FnOnce(&mut Self) -> Result<()>) -> Result<usize> {
        let asker = Asker::start(&self.scene.lab.router, "lan", &self.vips)?;
        sys::pause(500);
        let done = work(self).and_then(|()| self.elected(live)).with_context(|| what.to_owned());
        done.with_context(|| self.logs())?;
        sys::pause(SETTLED);
        self.elected(live).with_context(|| format!("later, {what}")).with_context(|| self.logs())?;
        let answers = asker.finish()?;
        let silence = self.vips.iter().map(|ip| answers.longest_silence(*ip)).max().unwrap_or_default();
        let moved = self.vips.iter().filter(|ip| answers.owners(**ip).len() > 1).count();
        let both: usize = self.vips.iter().map(|ip| answers.overlaps(*ip, TOGETHER)).sum();
        println!("{what}: {moved} of {} moved, {silence:.1?} without an answer, {both} times two", self.vips.len());
        ensure!(silence < TAKE_OVER, "{what}: nobody answered for {silence:?}");
        self.served()?;
        Ok(both)
    }

    /// The same, and at no time two answered.
    fn stage(&mut self, what: &str, live: &[usize], work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let both = self.watched(what, live, work)?;
        ensure!(both == 0, "{what}: two answered at once, {both} times");
        Ok(())
    }

    fn served(&self) -> Result<()> {
        let pods = self.up.iter().flat_map(|node| self.scene.pods(Some(*node), &[0, 1])).collect();
        let all = [&self.scene.near, &self.scene.cluster];
        targets(&all).into_iter().try_for_each(|to| self.scene.meets(&self.scene.lab.client, to, &pods).map(drop))
    }

    /// A node loses its link to the others, and its pods count no more; or all of it is back.
    fn link(&mut self, at: usize, up: bool) -> Result<()> {
        let (lab, word) = (&self.scene.lab, if up { "up" } else { "down" });
        lab.router.ip(&format!("link set lan-{} {word}", at + 1))?;
        self.up.retain(|node| *node != at);
        self.up.extend(up.then_some(at));
        let led: Vec<u16> = self.up.iter().map(|node| u16::try_from(node + 1)).collect::<Result<_, _>>()?;
        lab.route_vips(&led)?;
        let pods = lab.nodes[at].pods.iter().take(2);
        pods.into_iter().try_for_each(|pod| set_ready(&self.scene.admin, &pod.name, &pod.addresses, up))
    }

    fn logs(&self) -> String {
        let theirs = self.theirs.iter().flatten().map(|agent| format!("--- PureLB's ---\n{}\n", agent.log_tail()));
        theirs.fold(self.scene.logs(), |all, one| all + &one)
    }
}

/// One node of three runs PureLB's agent. It comes, leaves, is killed; one of ours is killed.
#[test]
fn one_of_three() -> Result<()> {
    let mut mixed = Mixed::new()?;
    mixed.elected(&[0, 1, 2])?;
    mixed.stage("ours leaves a node to PureLB's", &[0, 1, 2], |mixed| mixed.theirs(2))?;
    for at in [0, 1] {
        let status = mixed.scene.lab.nodes[at].agent.query(&["status"])?;
        ensure!(status["election"]["purelbs"] == 1 && status["election"]["members"] == 3, "{}", status["election"]);
    }
    mixed.stage("PureLB's ends", &[0, 1], |mixed| {
        let mut agent = mixed.theirs[2].take().context("it runs")?;
        agent.stop(Signal::SIGTERM)
    })?;
    mixed.stage("PureLB's comes", &[0, 1, 2], |mixed| mixed.start_theirs(2))?;
    mixed.stage("PureLB's dies with its node", &[0, 1], |mixed| {
        mixed.link(2, false)?;
        let mut agent = mixed.theirs[2].take().context("it runs")?;
        agent.stop(Signal::SIGKILL)
    })?;
    // What it had is still on its interface, without a fence: for a moment two answer.
    mixed.watched("PureLB's is back", &[0, 1, 2], |mixed| {
        mixed.link(2, true)?;
        mixed.start_theirs(2)
    })?;
    mixed.stage("one of ours is killed", &[1, 2], |mixed| mixed.scene.lab.nodes[0].agent.stop(Signal::SIGKILL))?;
    mixed.stage("it is back", &[0, 1, 2], |mixed| mixed.ours(0))
}

/// A DaemonSet's rollout from PureLB's agent to ours, and back: node after node, each served all the while.
#[test]
fn node_by_node() -> Result<()> {
    let mut mixed = Mixed::new()?;
    (0..3).try_for_each(|at| mixed.theirs(at)).with_context(|| mixed.logs())?;
    sys::pause(SETTLED);
    mixed.elected(&[0, 1, 2]).context("all are PureLB's").with_context(|| mixed.logs())?;
    mixed.served().with_context(|| mixed.logs())?;
    for at in 0..3 {
        mixed.stage(&format!("ours comes to node{}", at + 1), &[0, 1, 2], |mixed| mixed.ours(at))?;
    }
    for at in 0..3 {
        mixed.stage(&format!("PureLB's comes to node{}", at + 1), &[0, 1, 2], |mixed| mixed.theirs(at))?;
    }
    Ok(())
}
