//! The allocator on a real API server, under the roles of `deploy/base`: what Services get, what is said about it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::tenant::{condition, ingress, said};
use purelb_tests::cluster::{Cluster, Tenant};
use purelb_tests::sys;
use serde_json::{Value, json};

fn local(pools: &[(&str, &str)], more: Value) -> Value {
    let (v6, v4): (Vec<_>, Vec<_>) = pools.iter().partition(|(pool, _)| pool.contains(':'));
    let list = |of: Vec<(&str, &str)>| {
        of.iter().map(|(pool, subnet)| json!({"pool": pool, "subnet": subnet})).collect::<Vec<_>>()
    };
    let mut spec = json!({"v4pools": list(v4), "v6pools": list(v6)});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({"local": spec})
}

fn dual() -> Value {
    json!({"ipFamilyPolicy": "RequireDualStack"})
}

/// A Service gets its addresses, annotations, condition and event; the group says what is left; deleted, all is free.
#[test]
fn given_and_taken_back() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "given")?;
    tenant.group(
        "default",
        local(&[("192.0.2.8/30", "192.0.2.0/24"), ("2001:db8::8/126", "2001:db8::/64")], json!({})),
    )?;
    let _allocator = tenant.allocator(&["--cool-down", "0s", "--port", "7480"])?;
    ensure!(tenant.asks("web", json!({}), dual())? == "192.0.2.8 2001:db8::8");
    let web = tenant.get("web")?;
    let notes = &web["metadata"]["annotations"];
    ensure!(notes["purelb.io/allocated-by"] == "PureLB" && notes["purelb.io/allocated-from"] == "default", "{notes}");
    ensure!(notes["purelb.io/pool-type"] == "local", "{notes}");
    ensure!(web["status"]["loadBalancer"]["ingress"][0]["ipMode"] == "VIP", "{web}");
    ensure!(
        condition(&web).is_some_and(|c| c["reason"] == "Allocated" && c["lastTransitionTime"].is_string()),
        "{web}"
    );
    let group = tenant.admin.wait("ServiceGroup", (&tenant.namespace, "default"), "says what is used", |group| {
        group["status"]["allocatedIPv4"] == 1 && group["status"]["availableIPv4"] == 3
    })?;
    let status = &group["status"];
    ensure!(status["announce"] == "Local" && status["ipam"] == "Cluster" && status["allocatedIPv6"] == 1, "{status}");
    ensure!(status["conditions"][0]["type"] == "Ready" && status["conditions"][0]["status"] == "True", "{status}");
    sys::wait_for("the event", Duration::from_secs(10), || {
        let events = tenant.admin.list("Event", &tenant.namespace)?;
        let told = |event: &Value| {
            event["reason"] == "AddressAssigned"
                && event["involvedObject"]["name"] == "web"
                && event["message"].as_str().is_some_and(|text| text.contains("192.0.2.8"))
        };
        Ok(events.iter().any(told))
    })?;
    ensure!(tenant.cluster.netns.page(7480, "/readyz")?.0 == 200);
    let lines = [
        "purelb_address_pool_size{pool=\"default\"} 8",
        "purelb_address_pool_addresses_in_use{pool=\"default\"} 2",
        "purelb_allocator_sg_status_writes_total{outcome=\"success\"} ",
        "purelb_k8s_client_updates_total ",
        "purelb_k8s_client_config_loaded_bool 1",
    ];
    sys::wait_for("the metrics", Duration::from_secs(10), || {
        let (_, metrics) = tenant.cluster.netns.page(7480, "/metrics")?;
        let missing = lines.iter().find(|line| !metrics.lines().any(|found| found.starts_with(**line)));
        ensure!(missing.is_none(), "{missing:?} is missing");
        Ok(true)
    })?;
    tenant.delete("web")?;
    all_back(&tenant)?;
    ensure!(tenant.asks("next", json!({}), dual())? == "192.0.2.8 2001:db8::8", "what was freed is free");
    Ok(())
}

/// Waits until the allocator has seen that nothing of the default group is in use.
fn all_back(tenant: &Tenant<'_>) -> Result<()> {
    let unused = |group: &Value| group["status"]["allocatedIPv4"] == 0 && group["status"]["allocatedIPv6"] == 0;
    tenant.admin.wait("ServiceGroup", (&tenant.namespace, "default"), "has all of it back", unused).map(drop)
}

/// Section 11.7. PureLB's size of a /64 wraps to 0 and that of more is less than nothing, which its own CRD refuses.
#[test]
fn more_addresses_than_can_be_counted() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "uncounted")?;
    let pools = [("2001:db8:70::/64", "2001:db8:70::/64"), ("2001:db8:71::/48", "2001:db8:71::/48")];
    tenant.group("default", local(&pools, json!({})))?;
    let _allocator = tenant.allocator(&["--port", "7481"])?;
    let six = json!({"ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"});
    ensure!(tenant.asks("web", json!({}), six)? == "2001:db8:70::");
    tenant.admin.wait("ServiceGroup", (&tenant.namespace, "default"), "says what is left", |group| {
        group["status"]["allocatedIPv6"] == 1 && group["status"]["availableIPv6"] == i64::MAX - 1
    })?;
    let (_, metrics) = tenant.cluster.netns.page(7481, "/metrics")?;
    let size = format!("purelb_address_pool_size{{pool=\"default\"}} {}", i64::MAX);
    ensure!(metrics.lines().any(|line| line == size), "{metrics}");
    Ok(())
}

/// What is asked for by name, key, group and family; and refusals with their reasons.
#[test]
fn what_is_asked_for() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "asked")?;
    tenant.group("default", local(&[("192.0.2.32/30", "192.0.2.0/24")], json!({})))?;
    tenant.group("other", json!({"remote": {"v4pool": {"pool": "198.51.100.0/31", "subnet": "198.51.100.0/24"}}}))?;
    let _allocator = tenant.allocator(&[])?;
    let note = |key: &str, value: &str| json!({format!("purelb.io/{key}"): value});
    ensure!(tenant.asks("pinned", note("addresses", "192.0.2.34"), json!({}))? == "192.0.2.34");
    ensure!(tenant.asks("twice", note("addresses", "192.0.2.34"), json!({}))? == "SharingKeyConflict");
    ensure!(tenant.asks("outside", note("addresses", "192.0.2.99"), json!({}))? == "AddressOutsidePools");
    ensure!(tenant.asks("nonsense", note("addresses", "x"), json!({}))? == "InvalidRequest");
    ensure!(tenant.asks("by-field", json!({}), json!({"loadBalancerIP": "192.0.2.35"}))? == "192.0.2.35");
    ensure!(tenant.asks("group", note("service-group", "other"), json!({}))? == "198.51.100.0");
    ensure!(tenant.get("group")?["metadata"]["annotations"]["purelb.io/pool-type"] == "remote");
    ensure!(tenant.asks("unknown", note("service-group", "none"), json!({}))? == "UnknownGroup");
    ensure!(
        tenant.asks("six", json!({}), json!({"ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"}))?
            == "PoolExhausted"
    );
    let key = note("allow-shared-ip", "k");
    ensure!(tenant.asks("shared-a", key.clone(), json!({}))? == "192.0.2.32");
    let port = |port: u16| json!({"ports": [{"name": "p", "port": port, "protocol": "TCP"}]});
    ensure!(tenant.asks("shared-b", key.clone(), port(81))? == "192.0.2.32");
    ensure!(tenant.asks("shared-c", key, port(81))? == "PortConflict");
    ensure!(tenant.asks("last", json!({}), json!({}))? == "192.0.2.33");
    ensure!(tenant.asks("none-left", json!({}), json!({}))? == "PoolExhausted");
    // It is waited for, and served once there is room.
    tenant.group("default", local(&[("192.0.2.32/29", "192.0.2.0/24")], json!({})))?;
    tenant.wait("none-left", "has an address", |service| said(service) == "192.0.2.36")?;
    Ok(())
}

/// Section 11.12. Families that come and go; another type releases, although the API server clears the ingress itself.
#[test]
fn changes() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "changes")?;
    tenant.group(
        "default",
        local(&[("192.0.2.64/31", "192.0.2.0/24"), ("2001:db8::40/127", "2001:db8::/64")], json!({})),
    )?;
    let _allocator = tenant.allocator(&["--cool-down", "0s"])?;
    ensure!(tenant.asks("web", json!({}), json!({"ipFamilyPolicy": "SingleStack"}))? == "192.0.2.64");
    let patch = |spec: Value| tenant.admin.patch("Service", &tenant.namespace, "web", &json!({"spec": spec}));
    patch(dual())?;
    tenant.wait("web", "has both families", |service| said(service) == "192.0.2.64 2001:db8::40")?;
    patch(json!({"ipFamilyPolicy": "SingleStack"}))?;
    tenant.wait("web", "has one family", |service| said(service) == "192.0.2.64")?;
    patch(json!({"type": "ClusterIP", "loadBalancerClass": null, "allocateLoadBalancerNodePorts": null}))?;
    let web = tenant.wait("web", "is not marked", |service| {
        service["metadata"]["annotations"].get("purelb.io/allocated-from").is_none()
    })?;
    ensure!(ingress(&web).is_empty() && condition(&web).is_none(), "{web}");
    all_back(&tenant)?;
    ensure!(tenant.asks("next", json!({}), json!({}))? == "192.0.2.64", "free again");
    Ok(())
}

/// Services of other classes and without a class are nobody's here; what others put into a status is left alone.
#[test]
fn whose() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "whose")?;
    tenant.group("default", local(&[("192.0.2.96/30", "192.0.2.0/24")], json!({})))?;
    let _allocator = tenant.allocator(&[])?;
    tenant.create("other", json!({}), json!({"loadBalancerClass": "example.com/lb"}))?;
    let mut unclassed = tenant.service("unclassed", json!({}), json!({}));
    unclassed["spec"].as_object_mut().map(|spec| spec.remove("loadBalancerClass"));
    tenant.admin.create(&unclassed)?;
    tenant.create("foreign", json!({}), json!({}))?;
    ensure!(tenant.answer("foreign")? == "192.0.2.96");
    // Ours first, so the others were seen.
    ensure!(tenant.asks("ours", json!({}), json!({}))? == "192.0.2.97");
    for name in ["other", "unclassed"] {
        let service = tenant.get(name)?;
        ensure!(condition(&service).is_none() && ingress(&service).is_empty(), "{service}");
    }
    Ok(())
}

/// An allocator that dies at any time gives the same as before, and a second one takes over.
#[test]
fn another_takes_over() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "takeover")?;
    tenant.group("default", local(&[("192.0.2.128/27", "192.0.2.0/24")], json!({})))?;
    let mut first = tenant.allocator(&[])?;
    for name in ["a", "b", "c"] {
        tenant.asks(name, json!({}), json!({}))?;
    }
    let before: Vec<_> = ["a", "b", "c"].iter().map(|name| tenant.get(name)).collect::<Result<_>>()?;
    let mut second = tenant.allocator(&[])?;
    // It stands by.
    sys::pause(1_500);
    first.stop(Signal::SIGTERM)?;
    ensure!(tenant.asks("d", json!({}), json!({}))? == "192.0.2.131", "after a release at once");
    first = tenant.allocator(&[])?;
    second.stop(Signal::SIGKILL)?;
    ensure!(tenant.asks("e", json!({}), json!({}))? == "192.0.2.132", "after the end of the lease");
    let after: Vec<_> = ["a", "b", "c"].iter().map(|name| tenant.get(name)).collect::<Result<_>>()?;
    ensure!(before == after, "nothing is written that did not change");
    first.stop(Signal::SIGTERM)
}

/// Multi-pool: one address of each range whose network some living node has, as its Lease says; more when there are more.
#[test]
fn multi_pool() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "multi-pool")?;
    let lease = |subnets: &str| {
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {
                "name": "purelb-node-node1", "namespace": tenant.namespace,
                "labels": {"app.kubernetes.io/name": "purelb", "app.kubernetes.io/component": "lbnodeagent"},
                "annotations": {"purelb.io/subnets": subnets},
            },
            "spec": {"holderIdentity": "node1", "leaseDurationSeconds": 3600, "renewTime": "2126-01-01T00:00:00.000000Z"},
        })
    };
    tenant.admin.apply(&lease("192.0.2.0/24"))?;
    let pools = [("192.0.2.160/30", "192.0.2.0/24"), ("198.51.100.8/30", "198.51.100.0/24")];
    tenant.group("default", local(&pools, json!({"multiPool": true})))?;
    let _allocator = tenant.allocator(&[])?;
    ensure!(tenant.asks("web", json!({}), json!({}))? == "192.0.2.160");
    ensure!(tenant.asks("plain", json!({"purelb.io/multi-pool": "false"}), json!({}))? == "192.0.2.161");
    tenant.admin.apply(&lease("192.0.2.0/24,198.51.100.0/24"))?;
    tenant.wait("web", "has one of each", |service| said(service) == "192.0.2.160 198.51.100.8")?;
    tenant.admin.delete("Lease", &tenant.namespace, "purelb-node-node1")?;
    let note = json!({"metadata": {"annotations": {"purelb.io/re-evaluate": "true"}}});
    tenant.admin.patch("Service", &tenant.namespace, "web", &note)?;
    let web = tenant.wait("web", "is looked at again", |service| {
        service["metadata"]["annotations"].get("purelb.io/re-evaluate").is_none()
    })?;
    ensure!(said(&web) == "192.0.2.160 198.51.100.8", "what it has stays: {web}");
    Ok(())
}

/// The log as PureLB's readers want it: one flat object a line, the words that its events have.
#[test]
fn log_for_machines() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "logged")?;
    tenant.group("default", local(&[("192.0.2.224/32", "192.0.2.0/24")], json!({})))?;
    let allocator = tenant.allocator(&["--log-format", "json"])?;
    ensure!(tenant.asks("web", json!({}), json!({}))? == "192.0.2.224");
    ensure!(tenant.asks("none", json!({}), json!({}))? == "PoolExhausted");
    sys::wait_for("the refusal is logged", Duration::from_secs(10), || {
        Ok(allocator.log().contains("AllocationFailed"))
    })?;
    let log = allocator.log();
    let lines = log.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>();
    let lines = lines.with_context(|| log.clone())?;
    let first = lines.first().context("no line")?;
    let words = ["release", "commit", "git-branch", "log-level", "msg"];
    ensure!(words.iter().all(|word| first[word].is_string()), "{first}");
    for line in &lines {
        let flat = line.as_object().is_some_and(|fields| !fields.values().any(|v| v.is_object() || v.is_array()));
        ensure!(flat && (line["level"] == "info" || line["level"] == "debug"), "{line}");
        ensure!(
            line["caller"].as_str().is_some_and(|caller| caller.contains(".rs:")) && line["msg"].is_string(),
            "{line}"
        );
        ensure!(["time", "timestamp", "ts"].iter().all(|key| line.get(key).is_none()), "{line}");
        ensure!(line == first || line["op"].is_string() || line["event"].is_string(), "{line}");
    }
    let of = |svc: &str, event: &str| lines.iter().find(|line| line["svc"] == svc && line["event"] == event);
    let given = of("logged/web", "AddressAssigned").with_context(|| log.clone())?;
    ensure!(given["ip"] == "192.0.2.224" && given["pool"] == "default" && given.get("error").is_none(), "{given}");
    let refused = of("logged/none", "AllocationFailed").with_context(|| log.clone())?;
    ensure!(
        refused["error"] == refused["msg"] && refused["level"] == "info" && refused.get("ip").is_none(),
        "{refused}"
    );
    Ok(())
}

/// `pools` and `validate` read the cluster: what is in use, and what is wrong.
#[test]
fn commands() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "commands")?;
    tenant.group("default", local(&[("192.0.2.192/30", "192.0.2.0/24")], json!({})))?;
    tenant.group("inside", local(&[("192.0.2.194/32", "192.0.2.0/24")], json!({})))?;
    let _allocator = tenant.allocator(&[])?;
    ensure!(tenant.asks("web", json!({}), json!({}))? == "192.0.2.192");
    let group = tenant.admin.wait("ServiceGroup", (&tenant.namespace, "inside"), "is told why not", |group| {
        group["status"]["conditions"][1]["status"] == "True"
    })?;
    let conditions = &group["status"]["conditions"];
    ensure!(conditions[0]["status"] == "False" && conditions[0]["reason"] == "Conflicting", "{group}");
    ensure!(conditions[1]["message"].as_str().is_some_and(|text| text.contains("overlaps")), "{group}");
    let (code, text) = tenant.command(&["pools", "-o", "json"])?;
    let pools: Value = serde_json::from_str(&text)?;
    let range = pools["ranges"].as_array().and_then(|all| all.iter().find(|r| r["range"] == "192.0.2.192/30"));
    let range = range.with_context(|| text.clone())?;
    ensure!(code == 0 && range["used"] == 1 && range["available"] == 3 && range["group"] == "default", "{text}");
    let (code, text) = tenant.command(&["validate"])?;
    let told = |words: &[&str]| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(code == 1 && told(&["FAIL", "ServiceGroup commands/inside", "overlaps"]), "{text}");
    ensure!(told(&["PASS", "ServiceGroup commands/default"]), "{text}");
    Ok(())
}
