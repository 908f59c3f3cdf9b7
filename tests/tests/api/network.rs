//! Requests that hang, are lost or are answered falsely on their way (`cluster::proxy`): no address twice, no busy loop,
//! and all is well afterwards. Invariants I12 and I14.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use purelb_tests::cluster::proxy::{Fate, Proxy, Rule};
use purelb_tests::cluster::tenant::{ingress, said};
use purelb_tests::cluster::{Cluster, Tenant};
use purelb_tests::sys;
use serde_json::{Value, json};

/// Watches of Services.
const WATCH: &str = "GET /api/v1/services\\?.*watch=true";

fn pool(pool: &str) -> Value {
    json!({"local": {"v4pool": {"pool": pool, "subnet": "10.0.0.0/8"}}})
}

/// The watch of Services goes silent, and a Service was changed since in what is nothing to us: its write is outdated and
/// stays so, until the watch says more. In a cluster of its own: nothing else that happens makes the allocator look again.
#[test]
fn outdated_and_silent() -> Result<()> {
    let cluster = Cluster::start()?;
    let tenant = Tenant::new(&cluster, "silent")?;
    let proxy = Proxy::start(tenant.cluster)?;
    let _allocator = tenant.allocator_behind(&proxy, &[])?;
    ensure!(tenant.asks("web", json!({"purelb.io/service-group": "late"}), json!({}))? == "UnknownGroup");
    sys::pause(3_000);
    proxy.rules(&[Rule(WATCH, Fate::Silence)])?;
    tenant.admin.patch("Service", &tenant.namespace, "web", &json!({"metadata": {"labels": {"a": "b"}}}))?;
    sys::pause(500);
    let before = proxy.asked();
    tenant.group("late", pool("10.20.0.0/24"))?;
    sys::pause(8_000);
    let asked = proxy.asked() - before;
    proxy.rules(&[])?;
    tenant.wait("web", "is served", |service| !ingress(service).is_empty())?;
    ensure!(asked < 60, "{asked} requests in 8 s: a busy loop");
    Ok(())
}

/// The API server asks for patience: for writes, then for everything.
#[test]
fn too_many_requests() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "throttled")?;
    tenant.group("default", pool("10.29.0.0/24"))?;
    let proxy = Proxy::start(tenant.cluster)?;
    let _allocator = tenant.allocator_behind(&proxy, &[])?;
    tenant.create_many("first", 3)?;
    tenant.all_served(3)?;
    for (round, requests) in ["PATCH /api/v1", "."].into_iter().enumerate() {
        proxy.rules(&[Rule(requests, Fate::Answer(429))])?;
        tenant.create_many(&format!("round-{round}-"), 3)?;
        let before = proxy.asked();
        sys::pause(8_000);
        let asked = proxy.asked() - before;
        ensure!(asked < 150, "{asked} requests in 8 s though the API server asks for patience");
        proxy.rules(&[])?;
        tenant.all_served(6 + 3 * round)?;
    }
    Ok(())
}

/// Every request takes half a second: fifty Services have addresses soon, each by one write, and whoever leads goes on.
#[test]
fn half_a_second_each() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "slow")?;
    tenant.group("default", pool("10.42.0.0/24"))?;
    let proxy = Proxy::start(tenant.cluster)?;
    proxy.rules(&[Rule(".", Fate::Delay(Duration::from_millis(500)))])?;
    let _allocators = [tenant.allocator_behind(&proxy, &[])?, tenant.allocator_behind(&proxy, &[])?];
    tenant.create_many("first", 1)?;
    tenant.all_served(1)?;
    let term = || -> Result<Value> {
        let lease = tenant.admin.get("Lease", &tenant.namespace, "purelb-allocator")?;
        Ok(json!([lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"], lease["spec"]["acquireTime"]]))
    };
    let (before, began) = (term()?, Instant::now());
    tenant.create_many("web", 49)?;
    let given = tenant.all_served(50)?;
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(20), "it took {took:?}");
    // Longer than a term lasts without being renewed.
    sys::pause(20_000);
    ensure!(term()? == before, "{before} led, and {} now", term()?);
    ensure!(tenant.given()? == given, "an address moved");
    let writes = proxy.count("PATCH /api/v1/namespaces/slow/services/");
    ensure!(writes == 50, "{writes} writes of 50 Services");
    Ok(())
}

/// A write hangs on its way while the Lease is deleted; another Service asks for the same address meanwhile.
#[test]
fn lease_deleted_with_a_write_under_way() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "leaseless")?;
    tenant.group("default", pool("10.30.0.0/24"))?;
    let proxy = Proxy::start(tenant.cluster)?;
    let _allocator = tenant.allocator_behind(&proxy, &[])?;
    tenant.create_many("first", 1)?;
    tenant.all_served(1)?;
    let late = Fate::Delay(Duration::from_secs(8));
    proxy.rules(&[Rule("PATCH /api/v1/namespaces/leaseless/services/zz", late)])?;
    tenant.create("zz", json!({}), json!({}))?;
    sys::wait_for("its write is on its way", Duration::from_secs(20), || {
        Ok(proxy.count("PATCH /api/v1/namespaces/leaseless/services/zz") > 0)
    })?;
    tenant.create("aa", json!({"purelb.io/addresses": "10.30.0.1"}), json!({}))?;
    sys::pause(1_000);
    tenant.admin.delete("Lease", "leaseless", "purelb-allocator")?;
    sys::pause(12_000);
    proxy.rules(&[])?;
    tenant.wait("zz", "has its address", |service| said(service) == "10.30.0.1")?;
    tenant.given().map(drop)
}

/// A write comes true and its answer is lost, the watch of Services is silent, and its group is made anew under another
/// name: the address belongs to who has it.
#[test]
fn came_true_unheard() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "unheard")?;
    tenant.group("other", pool("10.41.0.0/24"))?;
    let proxy = Proxy::start(tenant.cluster)?;
    let _allocator = tenant.allocator_behind(&proxy, &[])?;
    ensure!(tenant.asks("s", json!({"purelb.io/service-group": "first"}), json!({}))? == "UnknownGroup");
    ensure!(tenant.asks("t", json!({"purelb.io/addresses": "10.40.0.0"}), json!({}))? == "AddressOutsidePools");
    sys::pause(3_000);
    let of_s = "PATCH /api/v1/namespaces/unheard/services/s/";
    proxy.rules(&[Rule(of_s, Fate::Hold)])?;
    tenant.group("first", pool("10.40.0.0/30"))?;
    tenant.wait("t", "waits for s", |service| said(service) == "SharingKeyConflict")?;
    proxy.rules(&[Rule(WATCH, Fate::Silence), Rule(of_s, Fate::Death)])?;
    tenant.wait("s", "has it, whoever knows", |service| !ingress(service).is_empty())?;
    tenant.admin.delete("ServiceGroup", "unheard", "first")?;
    tenant.group("second", pool("10.40.0.0/30"))?;
    sys::pause(5_000);
    proxy.rules(&[Rule(WATCH, Fate::Silence)])?;
    sys::pause(8_000);
    tenant.given()?;
    proxy.rules(&[])?;
    sys::pause(3_000);
    tenant.given().map(drop)
}

/// Nothing changes: nothing is written but the Lease.
#[test]
fn odd_and_idle() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "idle")?;
    let v6 = json!({"pool": "2001:db8:28::/124", "subnet": "2001:db8:28::/64"});
    let both = json!({"v4pool": {"pool": "10.28.0.0/28", "subnet": "10.0.0.0/8"}, "v6pool": v6});
    tenant.group("default", json!({"local": both}))?;
    tenant.group("over", pool("10.28.0.0/30"))?;
    let _allocator = tenant.allocator(&["--cool-down", "0s"])?;
    let dual = json!({"ipFamilyPolicy": "PreferDualStack"});
    let long: serde_json::Map<_, _> =
        (0..2_000).map(|n| (format!("example.com/a{n}"), json!("x".repeat(50)))).collect();
    tenant.create("long", Value::Object(long), dual.clone())?;
    tenant.create("dual", json!({}), dual.clone())?;
    tenant.create("pinned", json!({"purelb.io/addresses": "10.28.0.9"}), dual.clone())?;
    tenant.create("pinned-out", json!({"purelb.io/addresses": "10.99.0.9,2001:db8::1"}), dual.clone())?;
    tenant.create("shared-a", json!({"purelb.io/allow-shared-ip": "k"}), dual.clone())?;
    tenant.create("shared-b", json!({"purelb.io/allow-shared-ip": "k"}), dual.clone())?;
    tenant.create("multi", json!({"purelb.io/multi-pool": "true"}), dual.clone())?;
    tenant.create("over", json!({"purelb.io/service-group": "over"}), dual.clone())?;
    tenant.create("again", json!({"purelb.io/re-evaluate": "true"}), dual.clone())?;
    tenant.create("type", json!({}), dual.clone())?;
    tenant.create("named", json!({}), dual.clone())?;
    let status = json!({
        "loadBalancer": {"ingress": [{"hostname": "a.example.com"}]},
        "conditions": [{"type": "example.com/Other", "status": "True", "reason": "Other", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    });
    tenant.wait("named", "has its addresses", |service| ingress(service).len() == 2)?;
    sys::pause(1_000);
    tenant.admin.patch_status("Service", "idle", "named", &status)?;
    tenant.admin.patch(
        "Service",
        "idle",
        "type",
        &json!({"spec": {"type": "ClusterIP", "loadBalancerClass": null, "allocateLoadBalancerNodePorts": null}}),
    )?;
    let mut last = tenant.get("dual")?;
    for policy in ["SingleStack", "PreferDualStack", "SingleStack", "RequireDualStack"] {
        let patch = match policy {
            "SingleStack" => {
                json!({"spec": {"ipFamilyPolicy": policy, "ipFamilies": ["IPv4"], "clusterIPs": [last["spec"]["clusterIPs"][0]]}})
            }
            _ => json!({"spec": {"ipFamilyPolicy": policy, "ipFamilies": ["IPv4", "IPv6"]}}),
        };
        tenant.admin.patch("Service", "idle", "dual", &patch)?;
        let want = if policy == "SingleStack" { 1 } else { 2 };
        last = tenant.wait("dual", policy, |s| ingress(s).len() == want)?;
    }
    let versions = || -> Result<BTreeMap<String, (String, String)>> {
        let mut out = BTreeMap::new();
        for kind in ["Service", "ServiceGroup"] {
            for object in tenant.admin.list(kind, "idle")? {
                let name = format!("{kind} {}", object["metadata"]["name"]);
                out.insert(name, (object["metadata"]["resourceVersion"].to_string(), said(&object)));
            }
        }
        Ok(out)
    };
    // What was asked for is done when nothing changes for a while; a busy machine takes longer.
    let mut before = versions()?;
    sys::wait_for("all is written", Duration::from_secs(180), || {
        sys::pause(10_000);
        let now = versions()?;
        Ok(std::mem::replace(&mut before, now.clone()) == now)
    })?;
    sys::pause(10_000);
    let after = versions()?;
    ensure!(before == after, "written while nothing changed: {before:?} then {after:?}");
    let named = tenant.get("named")?;
    let others = named["status"]["conditions"].as_array().map(Vec::len);
    ensure!(others == Some(2) && ingress(&named).len() == 2, "somebody else's condition is lost: {named}");
    Ok(())
}
