//! Leases that no agent wrote, on a real API server: garbage, and nodes that are none. An agent's role lets it write its own
//! node's Lease alone (`api_policy`); these come of an administrator, another program, or a node in strange hands.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use nix::sys::signal::Signal;
use purelb_plan::announce::election::score;
use purelb_tests::answers::Answers;
use purelb_tests::cluster::refusal;
use purelb_tests::cluster::tenant::INSTALL;
use purelb_tests::lan::scene::Scene;
use purelb_tests::lan::{TAKE_OVER, TOGETHER, has, never_two};
use purelb_tests::sys;
use serde_json::{Value, json};

/// The network of the nodes, both families.
const SUBNETS: &str = "198.18.50.0/24,2001:db8:50::/64";

/// The Lease of a node that need not be there.
fn lease(node: &str, seconds: i32, annotations: Value) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {
            "name": format!("purelb-node-{node}"), "namespace": INSTALL, "annotations": annotations,
            "labels": {"app.kubernetes.io/name": "purelb", "app.kubernetes.io/component": "lbnodeagent"},
        },
        "spec": {"holderIdentity": node, "leaseDurationSeconds": seconds, "renewTime": now()},
    })
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// Who of the nodes has each address.
fn placed(scene: &Scene) -> Result<Vec<usize>> {
    scene.vips.iter().map(|ip| scene.index(*ip)).collect()
}

/// Each odd Lease is a problem that names it, and a line of the log; no address moves; and whoever begins anew beside them
/// comes in.
fn odd_ones(scene: &mut Scene) -> Result<()> {
    let many: Vec<_> = (0..10_000).map(|i| format!("10.{}.{}.0/24", i / 256, i % 256)).collect();
    let garbage = json!({
        "purelb.io/subnets": "{\"subnets\": [\"198.18.50.0", "purelb.io/instance": "\u{1}", "purelb.io/session": "////",
        "purelb.io/epoch": "a,node1=b,node2=c settled", "purelb.io/claims": "198.18.50.999,,x", "purelb.io/yield": "=,~,=~",
        "purelb.io/released": "maybe",
    });
    let long = json!({"purelb.io/session": "p/s", "purelb.io/epoch": "x".repeat(200_000)});
    let mut other = lease("other", 10, json!({"purelb.io/subnets": "192.0.2.0/24"}));
    other["spec"]["holderIdentity"] = "node1".into();
    let bare = json!({"metadata": lease("bare", 1, json!({}))["metadata"], "apiVersion": other["apiVersion"], "kind": "Lease"});
    let all = [
        ("many", "names 10000 networks", lease("many", 10, json!({"purelb.io/subnets": many.join(",")}))),
        ("garbage", "which is no network", lease("garbage", 10, garbage)),
        ("long", "purelb.io/epoch", lease("long", 10, long)),
        ("forever", "24855 days", lease("forever", i32::MAX, json!({"purelb.io/subnets": "192.0.2.0/24"}))),
        ("short", "it runs for 1 s", lease("short", 1, json!({"purelb.io/subnets": "192.0.2.0/24"}))),
        ("other", "its holder is node1", other),
        ("bare", "it runs for 0 s", bare),
    ];
    for seconds in [0, -5] {
        let refused = refusal(scene.admin.create(&lease("none", seconds, json!({}))))?;
        ensure!(refused.message.contains("leaseDurationSeconds"), "{refused}");
    }
    let before = placed(scene)?;
    let asker = scene.ask()?;
    for (_, _, object) in &all {
        scene.admin.create(object)?;
    }
    for node in &scene.lab.nodes {
        for (name, words, _) in &all {
            // Those that run for a moment are gone from `status` as soon.
            let line = format!("purelb-node-{name}");
            sys::wait_for(&format!("{} logs {line} and {words}", node.name), TAKE_OVER, || {
                Ok(node.agent.log().lines().any(|one| one.contains(&line) && one.contains(words)))
            })?;
        }
        node.agent.wait_problem(&["purelb-node-forever", "24855 days"])?;
    }
    // While all of that is there.
    let new = scene.others(before[0]).into_iter().find(|node| !before.contains(node)).context("a node without any")?;
    let name = scene.lab.nodes[new].name.clone();
    let epoch = |scene: &Scene| -> Result<String> {
        let lease = scene.lease(&name)?;
        Ok(lease["metadata"]["annotations"]["purelb.io/epoch"].as_str().unwrap_or_default().to_owned())
    };
    let old = epoch(scene)?;
    scene.lab.nodes[new].agent.stop(Signal::SIGKILL)?;
    // Or it would go on with what it has.
    scene.admin.delete("Lease", INSTALL, &format!("purelb-node-{name}"))?;
    scene.lab.nodes[new].agent.start()?;
    scene.lab.nodes[new].agent.wait_ready()?;
    // Those that leave no marks are in its way until they were silent for long enough to be revoked.
    sys::wait_for("everybody has yielded to the new one", TAKE_OVER * 2, || {
        let now = epoch(scene)?;
        ensure!(now != old && now.ends_with(" settled"), "{now}");
        Ok(true)
    })?;
    sys::pause(3_000);
    ensure!(placed(scene)? == before, "an address moved");
    let answers = asker.finish()?;
    undisturbed(&answers, &scene.vips)?;
    for (name, ..) in &all {
        scene.admin.delete("Lease", INSTALL, &format!("purelb-node-{name}"))?;
    }
    for node in &scene.lab.nodes {
        sys::wait_for("nothing is odd any more", TAKE_OVER, || Ok(!node.agent.problems()?.contains("purelb-node-")))?;
    }
    Ok(())
}

/// One answered for each of these all the time.
fn undisturbed(answers: &Answers, vips: &[IpAddr]) -> Result<()> {
    never_two(answers, vips, TOGETHER)?;
    for ip in vips {
        let (owners, silence) = (answers.owners(*ip), answers.longest_silence(*ip));
        ensure!(owners.len() == 1 && silence < Duration::from_secs(5), "{ip}: {owners:x?}, silent for {silence:?}");
    }
    Ok(())
}

/// A node that does not exist stands for election in everybody's network and wins the first address. PureLB's rule knows no
/// proof that a winner answers, and an agent that held on to what another one won would be the second answer: so the owner gives
/// way, and nobody answers for that address as long as the lie is renewed, and one Lease longer. No other address is touched.
fn liar(scene: &Scene, kind: &str, says: Value) -> Result<()> {
    let (lost, kept) = (scene.vips[0], scene.vips[1]);
    let least = |ip: IpAddr| scene.lab.nodes.iter().map(|node| score(&node.name, ip)).min();
    let wins = |name: &String, ip: IpAddr| least(ip).is_some_and(|least| score(name, ip) < least);
    let mut names = (0..1_000).map(|n| format!("liar{n}"));
    let name = names.find(|name| wins(name, lost) && !wins(name, kept)).context("no such name")?;
    let before = placed(scene)?;
    let asker = scene.ask()?;
    sys::pause(300);
    let begin = Instant::now();
    // Longer than this test is ever held up between two lies.
    scene.admin.create(&lease(&name, 8, says))?;
    let lie = || {
        let renewed = json!({"spec": {"renewTime": now()}});
        scene.admin.patch("Lease", INSTALL, &format!("purelb-node-{name}"), &renewed)
    };
    sys::wait_for("nobody has what the liar won", TAKE_OVER, || {
        lie()?;
        Ok(!scene.lab.nodes.iter().any(|node| has(node, lost)))
    })?;
    println!("{kind}: the owner gave way after {:.1?}", begin.elapsed());
    for _ in 0..12 {
        lie()?;
        sys::pause(500);
        ensure!(!scene.lab.nodes.iter().any(|node| has(node, lost)), "somebody answers beside a winner that lives");
    }
    for node in &scene.lab.nodes {
        let status = node.agent.query(&["status"])?;
        let purelbs = usize::from(kind == "PureLB's");
        ensure!(status["election"]["members"] == 4 && status["election"]["purelbs"] == purelbs, "{status}");
    }
    let begin = Instant::now();
    scene.owner(lost, &[])?;
    println!("{kind}: one node has it again {:.1?} after the last lie", begin.elapsed());
    scene.served()?;
    ensure!(placed(scene)? == before, "it is another one than before");
    scene.admin.delete("Lease", INSTALL, &format!("purelb-node-{name}"))?;
    let answers = asker.finish()?;
    never_two(&answers, &[lost], TOGETHER)?;
    undisturbed(&answers, &[kept])
}

/// One lab for all of it.
#[test]
fn leases_of_strangers() -> Result<()> {
    let mut scene = Scene::new("Cluster")?;
    scene.settle()?;
    odd_ones(&mut scene)?;
    liar(&scene, "PureLB's", json!({"purelb.io/subnets": SUBNETS}))?;
    let ours = json!({
        "purelb.io/subnets": SUBNETS, "purelb.io/session": "nowhere/liar", "purelb.io/epoch": "liar.1 settled",
    });
    liar(&scene, "ours", ours)
}
