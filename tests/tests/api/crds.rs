//! Our CustomResourceDefinitions in a real API server: fields, defaults, rules, columns, and PureLB's own manifests.

use anyhow::{Context as _, Result, ensure};
use purelb_tests::cluster::{Client, Cluster, refusal};
use serde_json::{Value, json};

fn group(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "ServiceGroup",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    })
}

fn agent(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "purelb.io/v2",
        "kind": "LBNodeAgent",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    })
}

fn pools() -> Value {
    json!({"v4pool": {"pool": "192.0.2.0/28", "subnet": "192.0.2.0/24"}})
}

/// Each of these is refused, with a message that says why.
#[test]
fn rules() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    let remote_and_local = json!({"local": pools(), "remote": pools()});
    let long: Vec<_> = (0..1025).map(|n| format!("n{n}")).collect();
    let pool = |aggregation: &str| json!({"remote": {"v4pool": {"pool": "192.0.2.0/28", "subnet": "192.0.2.0/24", "aggregation": aggregation}}});
    let rows = [
        ("none", json!({}), "exactly one"),
        ("two", remote_and_local, "exactly one"),
        ("enforce", json!({"local": pools(), "enforceNamespaces": true}), "namespaces"),
        ("default", json!({"local": pools(), "namespaceDefault": true}), "namespaces"),
        ("namespace", json!({"local": pools(), "namespaces": ["Not_A_Name"]}), "namespaces"),
        ("many", json!({"local": pools(), "namespaces": long}), "1024"),
        ("aggregation", pool("24"), "aggregation"),
        ("aggregation129", pool("/129"), "aggregation"),
        ("nopool", json!({"local": {"v4pool": {"subnet": "192.0.2.0/24"}}}), "pool"),
        ("nosubnet", json!({"local": {"v4pool": {"pool": "192.0.2.0/28"}}}), "subnet"),
        ("announce", json!({"external": {"provider": "x", "announce": "everywhere"}}), "announce"),
        ("provider", json!({"external": {"provider": "", "announce": "local"}}), "provider"),
        ("unknown", json!({"local": pools(), "colour": "red"}), "colour"),
    ];
    for (name, spec, word) in rows {
        let refused = refusal(admin.create(&group(name, spec))).with_context(|| name.to_owned())?;
        ensure!(refused.message.contains(word), "{name}: {refused}");
    }
    let garp = |garp: Value| json!({"local": {"garpConfig": garp}});
    let rows = [
        ("count0", garp(json!({"count": 0})), "count"),
        ("count11", garp(json!({"count": 11})), "count"),
        ("lifetime", json!({"local": {"addressConfig": {"localInterface": {"validLifetime": -1}}}}), "validLifetime"),
        ("hook", json!({"datapath": {"hook": "fastest"}}), "hook"),
        ("mode", json!({"datapath": {"mode": "wild"}}), "mode"),
    ];
    for (name, spec, word) in rows {
        let refused = refusal(admin.create(&agent(name, spec))).with_context(|| name.to_owned())?;
        ensure!(refused.message.contains(word), "{name}: {refused}");
    }
    Ok(())
}

/// What is left out is filled in as PureLB's CRDs do.
#[test]
fn defaults() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    let made = admin.create(&group("defaults", json!({"local": pools()})))?;
    let local = &made["spec"]["local"];
    ensure!(local["skipIPv6DAD"] == false && local["multiPool"] == false && local["balancePools"] == false, "{made}");
    let made =
        admin.create(&group("defaults-external", json!({"external": {"provider": "x", "announce": "local"}})))?;
    ensure!(made["spec"]["external"]["socket"] == "/var/run/purelb/ipam.sock", "{made}");
    let made = admin.create(&agent("defaults", json!({"local": {"garpConfig": {}}})))?;
    let local = &made["spec"]["local"];
    ensure!(local["localInterface"] == "default" && local["dummyInterface"] == "kube-lb0", "{made}");
    let garp =
        json!({"enabled": true, "initialDelay": "100ms", "count": 3, "interval": "500ms", "verifyBeforeSend": true});
    ensure!(local["garpConfig"] == garp, "{made}");
    Ok(())
}

/// `status` of a ServiceGroup is a subresource: a write of the object leaves it alone, and the other way round.
#[test]
fn status_is_apart() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    let mut object = group("status", json!({"remote": pools()}));
    object["status"] = json!({"allocatedIPv4": 7, "allocatedIPv6": 0});
    let made = admin.create(&object)?;
    ensure!(made.get("status").is_none_or(|status| status["allocatedIPv4"] != 7), "{made}");
    let status = json!({
        "announce": "Remote", "ipam": "Cluster", "allocatedIPv4": 3, "allocatedIPv6": 0, "availableIPv4": 13,
        "availableIPv6": 0, "boundNamespaces": ["a"], "addresses": ["192.0.2.0/28"],
    });
    let made = admin.patch_status("ServiceGroup", "default", "status", &status)?;
    ensure!(made["status"] == status, "{made}");
    let negative = json!({"availableIPv4": -1});
    let refused = refusal(admin.patch_status("ServiceGroup", "default", "status", &negative))?;
    ensure!(refused.message.contains("availableIPv4"), "{refused}");
    Ok(())
}

fn columns(client: &Client, plural: &str) -> Result<Vec<(String, u64)>> {
    let text = client.table(&format!("/apis/purelb.io/v2/{plural}"))?;
    let columns = text["columnDefinitions"].as_array().context("no columns")?;
    let name = |column: &Value| column["name"].as_str().unwrap_or_default().to_owned();
    Ok(columns.iter().map(|c| (name(c), c["priority"].as_u64().unwrap_or_default())).collect())
}

/// `kubectl get sg` shows PureLB's columns.
#[test]
fn columns_and_short_names() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    let shown: Vec<_> = columns(&admin, "servicegroups")?;
    let narrow: Vec<_> = shown.iter().filter(|(_, priority)| *priority == 0).map(|(name, _)| name.as_str()).collect();
    ensure!(narrow == ["Name", "Announce", "IPAM", "Allocated-V4", "Allocated-V6", "Age"], "{narrow:?}");
    let wide: Vec<_> = shown.iter().filter(|(_, priority)| *priority == 1).map(|(name, _)| name.as_str()).collect();
    ensure!(wide == ["Addresses", "Available-V4", "Available-V6", "Namespaces", "Enforced", "Bound"], "{wide:?}");
    let text = admin.raw("GET", "/apis/purelb.io/v2", None)?;
    let found: Value = serde_json::from_str(&text)?;
    let names = |plural: &str| {
        let all = found["resources"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|r| r["name"] == plural).map(|r| r["shortNames"].clone()).unwrap_or_default()
    };
    ensure!(
        names("servicegroups") == json!(["sg", "sgs"]) && names("lbnodeagents") == json!(["lbna", "lbnas"]),
        "{found}"
    );
    Ok(())
}

/// Objects as PureLB's own bundle, samples and documents have them are accepted as they are.
#[test]
fn purelb_objects() -> Result<()> {
    let admin = Cluster::shared()?.admin()?;
    let groups = [
        json!({"local": {
            "v4pools": [
                {"subnet": "192.168.254.0/24", "pool": "192.168.254.230/32", "aggregation": "default"},
                {"subnet": "192.168.254.0/24", "pool": "192.168.254.231-192.168.254.240", "aggregation": "default"},
            ],
            "v6pools": [{"subnet": "fd53:9ef0:8683::/120", "pool": "fd53:9ef0:8683::-fd53:9ef0:8683::3", "aggregation": "default"}],
        }}),
        json!({"remote": {
            "v4pool": {"subnet": "172.32.100.0/24", "pool": "172.32.100.225 - 172.32.100.229", "aggregation": "/32"},
            "v6pool": {"subnet": "fd53:9ef0:8683:100::/120", "pool": "fd53:9ef0:8683:100::/126", "aggregation": "/128"},
        }, "namespaces": ["team-a", "team-a"], "enforceNamespaces": true, "namespaceDefault": true}),
        json!({"external": {"provider": "netbox", "announce": "remote"}}),
        json!({"local": {"v4pool": {"subnet": "192.0.2.0/24", "pool": "192.0.2.1/32"}, "skipIPv6DAD": true, "multiPool": true}}),
    ];
    for (number, spec) in groups.into_iter().enumerate() {
        admin.create(&group(&format!("purelb-{number}"), spec))?;
    }
    let agents = [
        json!({"local": {"localInterface": "default", "dummyInterface": "kube-lb0"}}),
        json!({
            "nodeSelector": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]},
            "local": {
                "localInterface": "^ens[0-9]+$", "interfaces": ["bond0", "eth1"],
                "garpConfig": {"enabled": true, "initialDelay": "1s", "count": 5, "interval": "1s", "verifyBeforeSend": false},
                "addressConfig": {"localInterface": {"validLifetime": 0, "noPrefixRoute": true}, "dummyInterface": {"preferredLifetime": 60}},
            },
        }),
        json!({}),
    ];
    for (number, spec) in agents.into_iter().enumerate() {
        admin.create(&agent(&format!("purelb-{number}"), spec))?;
    }
    Ok(())
}
