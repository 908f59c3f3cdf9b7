//! What becomes of a node's own objects on an API server, and what its agent makes of that. Invariants I15, I16.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::tenant::{Allocator, INSTALL};
use purelb_tests::cluster::{Client, manifests};
use purelb_tests::lab::{Lab, Node, Options};
use purelb_tests::lan::{TAKE_OVER, has};
use purelb_tests::sys;
use serde_json::{Value, json};

struct Scene {
    lab: Lab,
    admin: Client,
    _allocator: Allocator,
    ip: IpAddr,
}

impl Scene {
    /// Two nodes with a pod each, and a Service of both.
    fn new() -> Result<Self> {
        let interfaces = vec!["lan0".to_owned()];
        let agent_args = vec!["--lease-duration", "10s", "--lease-hold", "30s", "--daemonset", "lbnodeagent"];
        let options = Options { nodes: 2, pods: 1, lan: true, interfaces, agent_args, ..Options::new("xdp") };
        let (lab, admin, allocator) = Lab::on_cluster(options)?;
        for node in 0..lab.nodes.len() {
            lab.pod(&admin, node, 0, "web", true)?;
        }
        let vips = lab.service(&admin, "web", json!({"externalTrafficPolicy": "Cluster"}))?;
        let scene = Self { lab, admin, _allocator: allocator, ip: vips[0] };
        scene.settled().with_context(|| scene.lab.logs())?;
        Ok(scene)
    }

    /// Somebody has it, and stays its owner: where in the list of nodes that one stands.
    fn settled(&self) -> Result<usize> {
        self.owner()?;
        sys::pause(11_000);
        self.owner()
    }

    /// Where in the list of nodes the one that has the address stands.
    fn owner(&self) -> Result<usize> {
        let mut found = None;
        sys::wait_for("one node has it", TAKE_OVER, || {
            let having: Vec<_> =
                (0..self.lab.nodes.len()).filter(|index| has(&self.lab.nodes[*index], self.ip)).collect();
            ensure!(having.len() == 1, "{} have it", having.len());
            found = having.first().copied();
            Ok(true)
        })?;
        found.context("nobody")
    }

    fn lease(&self, index: usize) -> Result<Value> {
        self.admin.get("Lease", INSTALL, &format!("purelb-node-{}", self.lab.nodes[index].name))
    }

    /// Starts the agent of a node and waits until it has the Lease.
    fn start(&mut self, index: usize) -> Result<()> {
        let session = |scene: &Self| {
            // Handed over, it is deleted.
            let lease = scene.lease(index).unwrap_or_default();
            lease["metadata"]["annotations"]["purelb.io/session"].clone()
        };
        let before = session(self);
        self.lab.nodes[index].agent.start()?;
        self.lab.nodes[index].agent.wait_ready()?;
        sys::wait_for("it has its Lease", TAKE_OVER, || Ok(![before.clone(), Value::Null].contains(&session(self))))?;
        self.wait_in(&self.lab.nodes[index])
    }

    /// Stops who has the address: which that was. Where the API server did not say in time what becomes of the DaemonSet the
    /// agent holds on to it, so then it is begun anew.
    fn stopped_for_good(&mut self) -> Result<usize> {
        for _ in 0..3 {
            let index = self.settled()?;
            let agent = &mut self.lab.nodes[index].agent;
            let before = agent.log().len();
            agent.stop(Signal::SIGTERM)?;
            if !agent.log().get(before..).unwrap_or_default().contains("the end is taken for an upgrade") {
                return Ok(index);
            }
            self.start(index)?;
        }
        bail!("the API server never answers in time")
    }

    fn wait_in(&self, node: &Node) -> Result<()> {
        sys::wait_for("it is in the election", TAKE_OVER, || {
            let election = node.agent.query(&["status"])?["election"].clone();
            ensure!(election["phase"] == "in" && election["members"] == 2, "{election}");
            Ok(true)
        })
    }
}

/// An agent that is stopped holds what it has for the next one, also when nobody can say more; not when the DaemonSet that
/// runs it is deleted.
#[test]
fn daemon_set_is_deleted() -> Result<()> {
    let mut scene = Scene::new()?;
    let all = manifests("deploy/base")?;
    let mut daemons = all.into_iter().find(|object| object["kind"] == "DaemonSet").context("a DaemonSet")?;
    daemons["spec"]["template"]["spec"]["nodeSelector"] = json!({"nowhere": ""});
    daemons["metadata"]["finalizers"] = json!(["tests.purelb.io/held"]);
    scene.admin.apply(&daemons)?;
    let index = scene.owner()?;
    for cut in [false, true] {
        if cut {
            scene.lab.reach_api(u16::try_from(index)? + 1, false)?;
        }
        scene.lab.nodes[index].agent.stop(Signal::SIGTERM)?;
        sys::pause(1_000);
        ensure!(has(&scene.lab.nodes[index], scene.ip), "it was handed over; cut off: {cut}");
        if cut {
            scene.lab.reach_api(u16::try_from(index)? + 1, true)?;
        }
        scene.start(index)?;
    }
    scene.admin.delete("DaemonSet", INSTALL, "lbnodeagent")?;
    for gone in [false, true] {
        if gone {
            let free = json!({"metadata": {"finalizers": null}});
            scene.admin.patch("DaemonSet", INSTALL, "lbnodeagent", &free)?;
        }
        sys::wait_for(&format!("the DaemonSet is being deleted; gone: {gone}"), Duration::from_secs(20), || {
            let found = scene.admin.get("DaemonSet", INSTALL, "lbnodeagent");
            Ok(found.map_or(gone, |found| !gone && !found["metadata"]["deletionTimestamp"].is_null()))
        })?;
        let index = scene.stopped_for_good()?;
        ensure!(!has(&scene.lab.nodes[index], scene.ip), "it was held; gone: {gone}");
        let next = scene.owner()?;
        ensure!(next != index && scene.lab.nodes[next].agent.pid().is_some(), "nobody took it; gone: {gone}");
        scene.start(index)?;
    }
    Ok(())
}

/// Somebody takes the labels of a node's Lease away while its agent is not there: no list shows it, and it is there.
#[test]
fn lease_without_labels() -> Result<()> {
    let mut scene = Scene::new()?;
    let name = format!("purelb-node-{}", scene.lab.nodes[0].name);
    scene.lab.nodes[0].agent.stop(Signal::SIGKILL)?;
    let bare = json!({"metadata": {"labels": null}});
    scene.admin.patch("Lease", INSTALL, &name, &bare)?;
    scene.start(0)?;
    scene.wait_in(&scene.lab.nodes[1])?;
    let label = |lease: &Value| lease["metadata"]["labels"]["app.kubernetes.io/name"] == "purelb";
    ensure!(label(&scene.lease(0)?), "without a label still");
    // While it runs, too.
    scene.admin.patch("Lease", INSTALL, &name, &bare)?;
    scene.admin.wait("Lease", (INSTALL, &name), "has its labels again", label)?;
    scene.wait_in(&scene.lab.nodes[0])?;
    scene.wait_in(&scene.lab.nodes[1])
}
