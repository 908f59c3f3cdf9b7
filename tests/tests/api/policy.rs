//! `deploy/base` in a real API server: everything in it is valid, and an agent that lies is refused. Invariant I15.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use purelb_tests::cluster::tenant::INSTALL;
use purelb_tests::cluster::{Client, Cluster, manifests, path, refusal};
use purelb_tests::sys;
use serde_json::{Value, json};

/// Applies everything and waits until the policies are in force.
fn install(admin: &Client) -> Result<()> {
    manifests("deploy/base")?.iter().try_for_each(|object| admin.apply(object).map(drop))?;
    let agent = Cluster::shared()?.pod_on(INSTALL, "lbnodeagent", "nowhere")?;
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{INSTALL}/leases?dryRun=All");
    let service = format!("{}?dryRun=All", path("Service", "default", "kubernetes")?);
    let lies = [
        ("leases", "POST", leases, "application/json", lease("purelb-node-elsewhere")),
        ("services", "PATCH", service, "application/merge-patch+json", json!({"metadata": {"labels": {"a": "b"}}})),
    ];
    // The API server takes up one policy after the other, and roles before them.
    sys::wait_for("the policies are in force", Duration::from_secs(30), || {
        Ok(lies.iter().all(|(policy, method, path, kind, lie)| {
            refusal(agent.raw(method, path, Some((kind, lie))))
                .is_ok_and(|refused| refused.message.contains(&format!("purelb-lbnodeagent-{policy}")))
        }))
    })
}

fn lease(name: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name, "namespace": INSTALL},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 10},
    })
}

/// Strict validation knows every field, and nobody may do more than the role says.
#[test]
fn manifests_are_valid() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    install(&admin)?;
    let deployment = admin.get("Deployment", INSTALL, "allocator")?;
    ensure!(deployment["spec"]["replicas"] == 2 && deployment["spec"]["strategy"]["type"] == "Recreate");
    let labels = json!({"app": "purelb", "component": "allocator"});
    ensure!(deployment["spec"]["selector"]["matchLabels"] == labels, "PureLB's, so that ours takes its place");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    ensure!(container["capabilities"]["drop"] == json!(["ALL"]) && container["readOnlyRootFilesystem"] == true);
    let daemons = admin.get("DaemonSet", INSTALL, "lbnodeagent")?;
    ensure!(daemons["spec"]["template"]["spec"]["containers"][0]["name"] == "lbnodeagent", "{daemons}");
    let allocator = Cluster::shared()?.pod_on(INSTALL, "allocator", "node1")?;
    for (kind, namespace) in [("Node", ""), ("Pod", "default"), ("ConfigMap", "default"), ("Lease", "default")] {
        let refused = refusal(allocator.list(kind, namespace))?;
        ensure!(refused.code == 403, "the allocator may list {kind}s: {refused}");
    }
    let refused = refusal(allocator.create(&lease("purelb-allocator-2")).and_then(|_| {
        allocator.patch("Lease", INSTALL, "purelb-allocator-2", &json!({"spec": {"holderIdentity": "x"}}))
    }))?;
    ensure!(refused.code == 403, "{refused}");
    let agent = Cluster::shared()?.pod_on(INSTALL, "lbnodeagent", "node1")?;
    agent.get("DaemonSet", INSTALL, "lbnodeagent").context("what runs it")?;
    for refused in [agent.list("DaemonSet", INSTALL).map(drop), agent.get("DaemonSet", INSTALL, "other").map(drop)] {
        ensure!(refusal(refused)?.code == 403, "the agent may read other DaemonSets");
    }
    Ok(())
}

/// The Lease of its own node, and a revocation of another one; nothing else.
#[test]
fn an_agent_and_leases() -> Result<()> {
    let cluster = Cluster::shared()?;
    let admin = cluster.admin()?;
    install(&admin)?;
    let agent = cluster.pod_on(INSTALL, "lbnodeagent", "node1")?;
    let own = agent.create(&lease("purelb-node-node1"))?;
    let mut renewed = own.clone();
    renewed["spec"]["leaseDurationSeconds"] = 20.into();
    renewed["metadata"]["annotations"] = json!({"purelb.io/subnets": "192.0.2.0/24"});
    agent.replace(&renewed)?;
    admin.create(&lease("purelb-node-node2"))?;
    for name in ["purelb-node-node2x", "purelb-allocator-x", "purelb-node-node"] {
        let refused = refusal(agent.create(&lease(name)))?;
        ensure!(refused.message.contains("node1"), "{name}: {refused}");
    }
    let other = admin.get("Lease", INSTALL, "purelb-node-node2")?;
    let change = |spec: Value, annotations: Value| {
        let mut lease = other.clone();
        for (key, value) in spec.as_object().into_iter().flatten() {
            lease["spec"][key] = value.clone();
        }
        lease["metadata"]["annotations"] = annotations;
        lease
    };
    let lies = [
        change(json!({"holderIdentity": "node1"}), json!({})),
        change(json!({}), json!({"purelb.io/subnets": "192.0.2.0/24"})),
        change(json!({"holderIdentity": "node1"}), json!({"purelb.io/revoked": "node1"})),
        change(json!({}), json!({"purelb.io/revoked": "node1", "purelb.io/subnets": ""})),
    ];
    for lie in &lies {
        let refused = refusal(agent.replace(lie))?;
        ensure!(refused.message.contains("purelb-node-node1"), "{lie}: {refused}");
    }
    // Nor what has it collected as garbage, kept for ever, or overlooked by the allocator.
    for (field, value) in [
        ("labels", json!({"app.kubernetes.io/name": "other"})),
        ("finalizers", json!(["example.com/x"])),
        ("ownerReferences", json!([{"apiVersion": "v1", "kind": "Node", "name": "gone", "uid": "gone"}])),
    ] {
        let mut lie = change(json!({}), json!({"purelb.io/revoked": "node1"}));
        lie["metadata"][field] = value;
        ensure!(refusal(agent.replace(&lie)).with_context(|| field.to_owned())?.code == 403, "{field}");
    }
    ensure!(refusal(agent.delete("Lease", INSTALL, "purelb-node-node2"))?.message.contains("node1"));
    agent.replace(&change(json!({}), json!({"purelb.io/revoked": "node1"}))).context("a revocation")?;
    // A token that names no node may write none.
    let nobody = cluster.pod_on(INSTALL, "lbnodeagent", "")?;
    ensure!(refusal(nobody.create(&lease("purelb-node-none")))?.code == 403);
    agent.delete("Lease", INSTALL, "purelb-node-node1").context("its own")
}

/// What it says of announcements, and nothing else of a Service.
#[test]
fn an_agent_and_services() -> Result<()> {
    let cluster = Cluster::shared()?;
    let admin = cluster.admin()?;
    install(&admin)?;
    let agent = cluster.pod_on(INSTALL, "lbnodeagent", "node1")?;
    admin.create(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "announced", "namespace": "default", "annotations": {"purelb.io/allocated-by": "PureLB"}},
        "spec": {"ports": [{"port": 80}]},
    }))?;
    let patch = |patch: Value| agent.patch("Service", "default", "announced", &patch);
    let annotate = |key: &str, value: Value| patch(json!({"metadata": {"annotations": {key: value}}}));
    annotate("purelb.io/announcing-IPv4", json!("node1,eth0,192.0.2.1"))?;
    annotate("purelb.io/announcing-IPv4", Value::Null)?;
    let lies = [
        annotate("purelb.io/allocated-by", json!("me")),
        annotate("purelb.io/allocated-by", Value::Null),
        annotate("purelb.io/addresses", json!("192.0.2.1")),
        patch(json!({"spec": {"externalTrafficPolicy": "Cluster", "type": "LoadBalancer"}})),
        patch(json!({"spec": {"externalIPs": ["192.0.2.1"]}})),
        patch(json!({"spec": {"selector": {"app": "mine"}}})),
        patch(json!({"metadata": {"labels": {"a": "b"}}})),
        patch(json!({"metadata": {"finalizers": ["example.com/x"]}})),
        agent.patch_status(
            "Service",
            "default",
            "announced",
            &json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}),
        ),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        ensure!(refusal(lie).with_context(|| format!("lie {number}"))?.code == 403, "lie {number}");
    }
    Ok(())
}
