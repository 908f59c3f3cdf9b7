//! The allocator while things go wrong: leaders that are stopped in the middle, a stolen Lease, writes that are
//! refused or overtaken, an API server and an etcd that die, or forget. Invariant I14.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::tenant::{condition, said};
use purelb_tests::cluster::{Cluster, Part, Tenant, manifests};
use purelb_tests::sys;
use serde_json::{Value, json};

fn pool(pool: &str) -> Value {
    json!({"local": {"v4pool": {"pool": pool, "subnet": "10.0.0.0/8"}}})
}

/// A leader is stopped in the middle of its work, another one takes over, and the first one wakes: both think that they
/// lead. No address twice, none moves, and one that was let go of rests under the other one too.
#[test]
fn two_leaders() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "two-leaders")?;
    tenant.group("default", pool("10.1.0.0/24"))?;
    let mut allocators = [tenant.allocator(&[])?, tenant.allocator(&[])?];
    tenant.create_many("first-", 3)?;
    let (mut count, mut before) = (3, tenant.all_served(3)?);
    for round in 0..2 {
        let identity = tenant.leader()?;
        let leader = allocators.iter().position(|one| one.identity() == identity).context("nobody leads")?;
        let gone = format!("first-{round}");
        tenant.delete(&gone)?;
        let freed = before.remove(&gone).context("it had an address")?;
        tenant.admin.wait("Lease", (&tenant.namespace, "purelb-allocator"), "names what rests", |lease| {
            lease["metadata"]["annotations"]["purelb.io/resting"]
                .as_str()
                .is_some_and(|text| text.contains(&format!("\"{freed}\"")))
        })?;
        tenant.create_many(&format!("round-{round}-"), 20)?;
        allocators[leader].signal(Signal::SIGSTOP)?;
        tenant.create_many(&format!("stopped-{round}-"), 20)?;
        count += 39;
        let found = tenant.all_served(count)?;
        ensure!(found.values().all(|ip| *ip != freed), "{freed} was let go of a moment ago");
        ensure!(before.iter().all(|(name, ip)| found.get(name) == Some(ip)), "an address moved");
        allocators[leader].signal(Signal::SIGCONT)?;
        tenant.create_many(&format!("woken-{round}-"), 5)?;
        count += 5;
        before = tenant.all_served(count)?;
        ensure!(found.iter().all(|(name, ip)| before.get(name) == Some(ip)), "an address moved");
    }
    allocators.iter_mut().try_for_each(|one| one.stop(Signal::SIGTERM))
}

/// Somebody writes himself into the Lease and goes: nothing is given as long as he may lead, and all of it then.
#[test]
fn stolen_lease() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "stolen")?;
    tenant.group("default", pool("10.2.0.0/24"))?;
    let _allocator = tenant.allocator(&[])?;
    tenant.create_many("before-", 2)?;
    let before = tenant.all_served(2)?;
    let thief = json!({"spec": {"holderIdentity": "thief", "leaseDurationSeconds": 15}});
    tenant.admin.patch("Lease", &tenant.namespace, "purelb-allocator", &thief)?;
    // What it may have begun by now is written down, so it may still come true.
    sys::pause(2_500);
    tenant.create_many("after-", 2)?;
    sys::pause(5_000);
    ensure!(tenant.given()? == before, "an address was given by somebody who does not lead");
    let after = tenant.all_served(4)?;
    ensure!(before.iter().all(|(name, ip)| after.get(name) == Some(ip)));
    // Deleted it is made anew.
    tenant.admin.delete("Lease", &tenant.namespace, "purelb-allocator")?;
    tenant.create_many("third-", 2)?;
    tenant.all_served(6).map(drop)
}

/// Somebody changes every Service all the time: each write is overtaken now and then, and all come through.
#[test]
fn conflicts() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "conflicts")?;
    tenant.group("default", pool("10.3.0.0/24"))?;
    let _allocator = tenant.allocator(&[])?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let busy = scope.spawn(|| -> Result<usize> {
            let (admin, mut rounds) = (tenant.cluster.admin()?, 0);
            while !stop.load(Ordering::Relaxed) {
                for service in admin.list("Service", &tenant.namespace)? {
                    let name = service["metadata"]["name"].as_str().unwrap_or_default();
                    let change = json!({"metadata": {"labels": {"round": rounds.to_string()}}});
                    admin.patch("Service", &tenant.namespace, name, &change)?;
                }
                rounds += 1;
            }
            Ok(rounds)
        });
        let served = tenant.create_many("busy-", 30).and_then(|()| tenant.all_served(30));
        stop.store(true, Ordering::Relaxed);
        busy.join().map_err(|_| anyhow::anyhow!("the busy one panicked"))??;
        served.map(drop)
    })
}

/// An admission policy refuses what is written to one Service: the others are served, and that one as soon as it may be.
#[test]
fn refused_by_admission() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "refused")?;
    tenant.group("default", pool("10.4.0.0/30"))?;
    let policy = |kind: &str, spec: Value| {
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind,
            "metadata": {"name": "refuse-one"}, "spec": spec,
        })
    };
    let rule =
        json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["services/status"]});
    tenant.admin.apply(&policy("ValidatingAdmissionPolicy", json!({
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [{"name": "one", "expression": "request.namespace == 'refused' && request.name == 'one'"}],
        "validations": [{"expression": "false", "message": "not this one"}],
    })))?;
    let binding = json!({"policyName": "refuse-one", "validationActions": ["Deny"]});
    tenant.admin.apply(&policy("ValidatingAdmissionPolicyBinding", binding))?;
    tenant.create("one", json!({}), json!({}))?;
    let status = json!({"conditions": []});
    sys::wait_for("the policy is in force", Duration::from_secs(30), || {
        Ok(tenant.admin.patch_status("Service", "refused", "one", &status).is_err())
    })?;
    let _allocator = tenant.allocator(&[])?;
    tenant.create_many("other-", 3)?;
    tenant.all_served(3)?;
    sys::wait_for("the refusal is told", Duration::from_secs(10), || Ok(tenant.log().contains("not this one")))?;
    tenant.admin.delete("ValidatingAdmissionPolicyBinding", "", "refuse-one")?;
    tenant.all_served(4).map(drop)
}

/// The API server dies in the middle of it, and again.
#[test]
fn api_server_dies() -> Result<()> {
    let cluster = Cluster::start()?;
    let tenant = Tenant::new(&cluster, "dies")?;
    tenant.group("default", pool("10.5.0.0/24"))?;
    let _allocator = tenant.allocator(&[])?;
    tenant.create_many("before-", 2)?;
    let mut before = tenant.all_served(2)?;
    for round in 0..2 {
        tenant.create_many(&format!("killed-{round}-"), 15)?;
        cluster.kill(Part::Api)?;
        sys::pause(3_000);
        cluster.run(Part::Api)?;
        cluster.wait_served()?;
        let after = tenant.all_served(before.len() + 15)?;
        ensure!(before.iter().all(|(name, ip)| after.get(name) == Some(ip)), "an address moved");
        before = after;
    }
    Ok(())
}

/// etcd comes back as it was some time ago: what was made since is gone, and its addresses are free.
#[test]
fn etcd_forgets() -> Result<()> {
    let cluster = Cluster::start()?;
    let tenant = Tenant::new(&cluster, "forgets")?;
    tenant.group("default", pool("10.6.0.0/28"))?;
    let _allocator = tenant.allocator(&["--cool-down", "0s"])?;
    tenant.create_many("old-", 3)?;
    let old = tenant.all_served(3)?;
    cluster.restart_etcd(|data| copy(data, &data.with_extension("kept")))?;
    tenant.create_many("lost-", 5)?;
    tenant.all_served(8)?;
    cluster.restart_etcd(|data| {
        std::fs::remove_dir_all(data)?;
        copy(&data.with_extension("kept"), data)
    })?;
    ensure!(tenant.given()? == old, "etcd was not set back");
    tenant.create_many("new-", 13)?;
    let now = tenant.all_served(16).with_context(|| tenant.log())?;
    ensure!(old.iter().all(|(name, ip)| now.get(name) == Some(ip)), "an address moved");
    Ok(())
}

fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    let mut command = std::process::Command::new("cp");
    sys::output(command.arg("-a").arg(from).arg(to)).map(drop)
}

/// Section 11.15. PureLB's allocator was here: what it gave stays, is not written again but for the condition, and ours goes on.
#[test]
fn in_place_of_purelb() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "in-place")?;
    tenant.group("default", pool("10.7.0.0/30"))?;
    let marks = json!({
        "purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "default", "purelb.io/pool-type": "local",
        "purelb.io/announcing-IPv4": "node1,eth0,10.7.0.1",
    });
    tenant.create("theirs", marks.clone(), json!({}))?;
    let status = json!({"loadBalancer": {"ingress": [{"ip": "10.7.0.1", "ipMode": "VIP"}]}});
    tenant.admin.patch_status("Service", &tenant.namespace, "theirs", &status)?;
    // Only the first of its two writes was done.
    tenant.create("half", json!({"purelb.io/allocated-from": "default"}), json!({}))?;
    let status = json!({"loadBalancer": {"ingress": [{"ip": "10.7.0.0", "ipMode": "VIP"}]}});
    tenant.admin.patch_status("Service", &tenant.namespace, "half", &status)?;
    let _allocator = tenant.allocator(&[])?;
    ensure!(tenant.answer("theirs")? == "10.7.0.1" && tenant.answer("half")? == "10.7.0.0");
    ensure!(tenant.asks("next", json!({}), json!({}))? == "10.7.0.2");
    let theirs = tenant.get("theirs")?;
    ensure!(theirs["metadata"]["annotations"] == marks, "{theirs}");
    let version = theirs["metadata"]["resourceVersion"].clone();
    sys::pause(3_000);
    ensure!(tenant.get("theirs")?["metadata"]["resourceVersion"] == version, "it is written again and again");
    Ok(())
}

/// A CRD of an older version, whose ServiceGroups have no status: addresses are given, and what cannot be said is told.
/// It is said as soon as the CRD is ours.
#[test]
fn groups_without_status() -> Result<()> {
    let cluster = Cluster::start()?;
    let admin = cluster.admin()?;
    for mut crd in manifests("deploy/crds")? {
        if crd["metadata"]["name"] == "servicegroups.purelb.io" {
            crd["spec"]["versions"][0].as_object_mut().map(|version| version.remove("subresources"));
            admin.apply(&crd)?;
        }
    }
    let tenant = Tenant::new(&cluster, "statusless")?;
    tenant.group("default", pool("10.8.0.0/30"))?;
    let _allocator = tenant.allocator(&[])?;
    ensure!(tenant.asks("web", json!({}), json!({}))? == "10.8.0.0");
    sys::wait_for("it is told", Duration::from_secs(30), || Ok(tenant.log().contains("apply deploy/crds")))?;
    ensure!(condition(&tenant.get("web")?).is_some() && said(&tenant.get("web")?) == "10.8.0.0");
    cluster.install(&manifests("deploy/crds")?)?;
    sys::wait_for("the group has a status", Duration::from_secs(60), || {
        let group = admin.get("ServiceGroup", "statusless", "default")?;
        Ok(group["status"]["allocatedIPv4"] == 1 && group["status"]["conditions"][0]["status"] == "True")
    })
}
