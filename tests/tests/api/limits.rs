//! What is too much, too long or somebody else's: a journal larger than an object may be, requests without end, CRDs and
//! webhooks that are not as ours, an API server that stops with writes under way. Invariants I12 and I14.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::tenant::{condition, ingress};
use purelb_tests::cluster::{Cluster, Part, Tenant, manifests};
use purelb_tests::sys;
use serde_json::{Value, json};

fn pool(pool: &str) -> Value {
    json!({"local": {"v4pool": {"pool": pool, "subnet": "10.0.0.0/8"}}})
}

/// So many addresses at once that an object could not hold them: multi-pool with forty ranges of each family.
#[test]
fn journal_larger_than_an_object() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "huge-journal")?;
    let range = |pool: String, subnet: String| json!({"pool": pool, "subnet": subnet});
    let four = |n: u32| range(format!("10.{}.0.0/22", 50 + n), format!("10.{}.0.0/16", 50 + n));
    let six = |n: u32| range(format!("2001:db8:ffff:{n:x}::1000:0/112"), format!("2001:db8:ffff:{n:x}::/64"));
    let (v4, v6): (Vec<_>, Vec<_>) = ((0..40).map(four).collect(), (0..40).map(six).collect());
    tenant.group("default", json!({"remote": {"v4pools": v4, "v6pools": v6, "multiPool": true}}))?;
    let dual = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"]});
    for number in 0..130 {
        tenant.create(&format!("a-service-{number}"), json!({}), dual.clone())?;
    }
    let _allocator = tenant.allocator(&[])?;
    sys::wait_for("all have addresses", Duration::from_secs(180), || {
        let list = tenant.admin.list("Service", &tenant.namespace)?;
        let found = list.iter().filter(|service| ingress(service).len() == 80).count();
        ensure!(found == 130, "{found} have them");
        Ok(true)
    })
}

/// PureLB's own CRD is there, whose status has no conditions.
#[test]
fn groups_without_conditions() -> Result<()> {
    let cluster = Cluster::start()?;
    let admin = cluster.admin()?;
    for mut crd in manifests("deploy/crds")? {
        if crd["metadata"]["name"] == "servicegroups.purelb.io" {
            let status = &mut crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"];
            let gone = status["properties"].as_object_mut().and_then(|p| p.remove("conditions"));
            ensure!(gone.is_some(), "{status}");
            admin.apply(&crd)?;
        }
    }
    sys::pause(2_000);
    let tenant = Tenant::new(&cluster, "conditionless")?;
    tenant.group("default", pool("10.22.0.0/30"))?;
    let _allocator = tenant.allocator(&[])?;
    ensure!(tenant.asks("web", json!({}), json!({}))? == "10.22.0.0");
    let name = (tenant.namespace.as_str(), "default");
    let group =
        tenant.admin.wait("ServiceGroup", name, "has a status", |group| group["status"]["allocatedIPv4"] == 1)?;
    sys::pause(6_000);
    let later = tenant.admin.get("ServiceGroup", &tenant.namespace, "default")?;
    ensure!(
        group["metadata"]["resourceVersion"] == later["metadata"]["resourceVersion"],
        "it is written again and again"
    );
    Ok(())
}

fn webhook(namespace: &str) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "away"},
        "webhooks": [{
            "name": "away.example.com", "sideEffects": "None", "admissionReviewVersions": ["v1"], "failurePolicy": "Fail",
            "timeoutSeconds": 2,
            "clientConfig": {"url": "https://127.0.0.1:1/"},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["services/status"]}],
        }],
    })
}

fn hook_path(name: &str) -> String {
    format!("/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations{name}")
}

/// A webhook of one namespace is away, and many Services are in it: those of another one are served.
#[test]
fn a_webhook_that_is_away() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "hooked")?;
    tenant.group("default", pool("10.23.0.0/20"))?;
    tenant.admin.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "not-hooked"}}))?;
    tenant.admin.raw("POST", &hook_path(""), Some(("application/json", &webhook("hooked"))))?;
    tenant.create("one", json!({}), json!({}))?;
    sys::wait_for("the webhook is in force", Duration::from_secs(30), || {
        Ok(tenant.admin.patch_status("Service", "hooked", "one", &json!({"conditions": []})).is_err())
    })?;
    tenant.create_many("a", 270)?;
    let _allocator = tenant.allocator(&[])?;
    sys::pause(8_000);
    let mut other = tenant.service("other", json!({}), json!({}));
    other["metadata"]["namespace"] = "not-hooked".into();
    tenant.admin.create(&other)?;
    let done = sys::wait_for("that of another namespace is served", Duration::from_secs(90), || {
        Ok(!ingress(&tenant.admin.get("Service", "not-hooked", "other")?).is_empty())
    });
    tenant.admin.raw("DELETE", &hook_path("/away"), None)?;
    done?;
    tenant.all_served(271).map(drop)
}

/// What is asked for is as long as annotations may be.
#[test]
fn a_request_without_end() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "endless")?;
    tenant.group("default", pool("10.25.0.0/24"))?;
    let allocator = tenant.allocator(&[])?;
    let rows = [
        ("a", "purelb.io/addresses", "x".repeat(200_000), "InvalidRequest"),
        ("b", "purelb.io/addresses", "\u{1}".repeat(250_000), "InvalidRequest"),
        ("c", "purelb.io/service-group", "\u{1}".repeat(250_000), "UnknownGroup"),
        ("d", "purelb.io/allow-shared-ip", "k".repeat(200_000), "10.25.0.0"),
        ("e", "purelb.io/addresses", vec!["10.25.0.9"; 20_000].join(","), "10.25.0.9"),
    ];
    for (name, key, text, want) in rows {
        let found = tenant.asks(name, json!({key: text}), json!({}))?;
        ensure!(found == want, "{name}: {found}");
        let service = tenant.get(name)?;
        let message = condition(&service).and_then(|c| c["message"].as_str()).unwrap_or_default();
        ensure!(message.chars().count() < 1_100, "{name}: a message of {} bytes", message.len());
    }
    ensure!(allocator.log().len() < 200_000, "a log of {} bytes", allocator.log().len());
    Ok(())
}

/// The API server stops with writes under way, longer than a term is sure.
#[test]
fn api_server_frozen() -> Result<()> {
    let cluster = Cluster::start()?;
    let tenant = Tenant::new(&cluster, "frozen")?;
    tenant.group("default", pool("10.27.0.0/23"))?;
    let _allocators = [tenant.allocator(&[])?, tenant.allocator(&[])?];
    tenant.create_many("before-", 2)?;
    let mut before = tenant.all_served(2)?;
    for (round, pause) in [3_000, 20_000].into_iter().enumerate() {
        tenant.create_many(&format!("z{round}-"), 40)?;
        cluster.signal(Part::Api, Signal::SIGSTOP)?;
        sys::pause(pause);
        cluster.signal(Part::Api, Signal::SIGCONT)?;
        tenant.create_many(&format!("a{round}-"), 40)?;
        let after = tenant.all_served(before.len() + 80)?;
        ensure!(before.iter().all(|(name, ip)| after.get(name) == Some(ip)), "an address moved");
        before = after;
    }
    Ok(())
}
