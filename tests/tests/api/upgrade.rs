//! From PureLB to us and back, in place: its objects as a release of it makes them (`purelb_tests::purelb`), ours applied
//! over them and its own again over ours. Whoever has an address keeps it, and what either wrote the other can read.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::cluster::tenant::{Allocator, INSTALL, condition, ingress, said};
use purelb_tests::cluster::{Client, Cluster, manifests, path, refusal};
use purelb_tests::{purelb, sys};
use serde_json::{Value, json};

/// Where the Services are.
const SHOP: &str = "default";

/// PureLB's two processes, as far as they write.
struct Purelb<'a> {
    admin: &'a Client,
    allocator: Client,
    agent: Client,
}

impl<'a> Purelb<'a> {
    fn new(cluster: &Cluster, admin: &'a Client) -> Result<Self> {
        let allocator = cluster.pod_on(INSTALL, "allocator", "node1")?;
        Ok(Self { admin, allocator, agent: cluster.pod_on(INSTALL, "lbnodeagent", "node1")? })
    }

    /// Gives these addresses by its two writes, status first, and announces the first one.
    fn gives(&self, name: &str, ips: &[&str], pool: &str, kind: &str) -> Result<()> {
        let mut service = self.allocator.get("Service", SHOP, name)?;
        let entries: Vec<_> = ips.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        service["status"]["loadBalancer"] = json!({"ingress": entries});
        let status = format!("{}/status", path("Service", SHOP, name)?);
        let written = self.allocator.raw("PUT", &status, Some(("application/json", &service)))?;
        let mut service: Value = serde_json::from_str(&written)?;
        service["metadata"]["annotations"]["purelb.io/allocated-by"] = "PureLB".into();
        service["metadata"]["annotations"]["purelb.io/allocated-from"] = pool.into();
        service["metadata"]["annotations"]["purelb.io/pool-type"] = kind.into();
        self.allocator.replace(&service)?;
        if kind == "local" {
            self.announces(name, ips)?;
        }
        Ok(())
    }

    fn announces(&self, name: &str, ips: &[&str]) -> Result<()> {
        let mut service = self.agent.get("Service", SHOP, name)?;
        for ip in ips {
            let key = if ip.contains(':') { "purelb.io/announcing-IPv6" } else { "purelb.io/announcing-IPv4" };
            service["metadata"]["annotations"][key] = format!("node1,eth0,{ip}").into();
        }
        self.agent.replace(&service).map(drop)
    }

    /// What it says of a group.
    fn tells(&self, group: &str, used: [u64; 2]) -> Result<()> {
        let object = json!({
            "apiVersion": "purelb.io/v2", "kind": "ServiceGroup", "metadata": {"name": group},
            "status": {
                "announce": "Local", "ipam": "Cluster", "addresses": ["192.0.2.0/28"], "allocatedIPv4": used[0],
                "allocatedIPv6": used[1], "availableIPv4": 16 - used[0],
            },
        });
        let path = format!("{}/status?fieldManager=purelb-allocator&force=true", path("ServiceGroup", INSTALL, group)?);
        let told = self.allocator.raw("PATCH", &path, Some(("application/apply-patch+yaml", &object)))?;
        let told: Value = serde_json::from_str(&told)?;
        ensure!(told["status"] == object["status"], "{told}");
        Ok(())
    }

    /// Its manifests, over whatever is there.
    fn applied(&self, cluster: &Cluster) -> Result<()> {
        cluster.install(&purelb::crds())?;
        in_force(self.admin, false)?;
        purelb::installation().iter().try_for_each(|object| self.admin.apply(object).map(drop))?;
        let service = format!("{}?dryRun=All", path("Service", SHOP, "kubernetes")?);
        sys::wait_for("the roles are in force", Duration::from_secs(30), || {
            for one in [&self.allocator, &self.agent] {
                let now = one.get("Service", SHOP, "kubernetes")?;
                one.raw("PUT", &service, Some(("application/json", &now)))?;
            }
            Ok(true)
        })
    }
}

/// Ours, as the README says.
fn ours_applied(cluster: &Cluster, admin: &Client) -> Result<()> {
    cluster.install(&manifests("deploy/crds")?)?;
    in_force(admin, true)?;
    manifests("deploy/base")?.iter().try_for_each(|object| admin.apply(object).map(drop))
}

/// The API server goes by ours, or by PureLB's, from then on.
fn in_force(admin: &Client, ours: bool) -> Result<()> {
    let settings = json!({
        "apiVersion": "purelb.io/v2", "kind": "LBNodeAgent", "metadata": {"name": "probe"},
        "spec": {"datapath": {"mode": "auto"}},
    });
    for probe in [settings, group("probe", json!({"local": {}, "exclude": []}))] {
        let kind = probe["kind"].as_str().unwrap_or_default();
        let path = format!("{}?dryRun=All&fieldValidation=Strict", path(kind, SHOP, "")?);
        let known = || admin.raw("POST", &path, Some(("application/json", &probe))).is_ok();
        sys::wait_for("the CRDs are in force", Duration::from_secs(20), || Ok(known() == ours))?;
    }
    Ok(())
}

fn group(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "purelb.io/v2", "kind": "ServiceGroup", "metadata": {"name": name, "namespace": SHOP}, "spec": spec})
}

fn in_install(mut object: Value) -> Value {
    object["metadata"]["namespace"] = INSTALL.into();
    object
}

fn service(name: &str, annotations: Value, spec: Value) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": SHOP, "annotations": annotations},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80, "protocol": "TCP"}], "selector": {"app": name}},
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    object
}

fn local(pool: &str) -> Value {
    json!({"local": {"v4pool": {"pool": pool, "subnet": "192.0.2.0/24", "aggregation": "default"}}})
}

/// What PureLB's users made: groups, and Services that have addresses (`settled`), wait for them, or are not its own.
const SETTLED: [&str; 7] = ["web", "dual", "pinned", "by-field", "shared-a", "shared-b", "homeless"];
const OTHERS: [&str; 4] = ["plain", "foreign", "was", "headless"];

fn users(admin: &Client, purelb: &Purelb<'_>) -> Result<()> {
    let v6 = json!({"pool": "2001:db8::8/126", "subnet": "2001:db8::/64"});
    let both = json!({
        "v4pools": [{"pool": "192.0.2.0/28", "subnet": "192.0.2.0/24"}], "v6pools": [v6], "skipIPv6DAD": false,
    });
    admin.create(&in_install(group("default", json!({"local": both}))))?;
    let remote = json!({"remote": {
        "v4pool": {"pool": "198.51.100.8 - 198.51.100.9", "subnet": "198.51.100.0/24", "aggregation": "/32"},
    }});
    admin.create(&in_install(group("far", remote)))?;
    let garp = json!({"spec": {"local": {"garpConfig": {"enabled": true, "count": 5}}}});
    admin.patch("LBNodeAgent", INSTALL, "default", &garp)?;
    let far = json!({"purelb.io/service-group": "far", "purelb.io/allow-shared-ip": "k"});
    let dual = json!({"ipFamilyPolicy": "RequireDualStack", "externalTrafficPolicy": "Cluster"});
    let class = |name: &str| json!({"loadBalancerClass": name});
    let port = |port: u16| json!({"ports": [{"port": port, "protocol": "TCP"}]});
    admin.create(&service("web", json!({}), class("purelb.io/purelbv2")))?;
    admin.create(&service("dual", json!({}), dual))?;
    admin.create(&service("pinned", json!({"purelb.io/addresses": "192.0.2.5"}), json!({})))?;
    admin.create(&service("by-field", json!({}), json!({"loadBalancerIP": "192.0.2.6"})))?;
    admin.create(&service("shared-a", far.clone(), port(80)))?;
    admin.create(&service("shared-b", far, port(81)))?;
    admin.create(&service("homeless", json!({}), json!({})))?;
    purelb.gives("web", &["192.0.2.1"], "default", "local")?;
    purelb.gives("dual", &["192.0.2.0", "2001:db8::8"], "default", "local")?;
    purelb.gives("pinned", &["192.0.2.5"], "default", "local")?;
    purelb.gives("by-field", &["192.0.2.6"], "default", "local")?;
    purelb.gives("shared-a", &["198.51.100.8"], "far", "remote")?;
    purelb.gives("shared-b", &["198.51.100.8"], "far", "remote")?;
    // Its group was deleted since.
    purelb.gives("homeless", &["203.0.113.77"], "gone", "local")?;
    admin.create(&service("waiting", json!({}), json!({})))?;
    admin.create(&service("unknown", json!({"purelb.io/service-group": "nobody"}), json!({})))?;
    admin.create(&service("plain", json!({}), json!({"type": "ClusterIP"})))?;
    admin.create(&service("foreign", json!({}), class("example.com/lb")))?;
    // What PureLB leaves behind when the type changes.
    admin.create(&service("was", json!({"purelb.io/pool-type": "local"}), json!({"type": "ClusterIP"})))?;
    admin.create(&service("headless", json!({}), json!({"type": "ClusterIP", "clusterIP": "None"})))?;
    purelb.tells("default", [5, 1])?;
    purelb.agent.create(&json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {
            "name": "purelb-node-node1", "namespace": INSTALL,
            "labels": {"app.kubernetes.io/name": "purelb", "app.kubernetes.io/component": "lbnodeagent"},
            "annotations": {"purelb.io/subnets": "192.0.2.0/24", "purelb.io/instance": "a-pod"},
        },
        "spec": {"holderIdentity": "node1", "leaseDurationSeconds": 10, "renewTime": "2126-01-01T00:00:00.000000Z"},
    }))?;
    Ok(())
}

/// What must not change, by Service.
fn kept(admin: &Client) -> Result<BTreeMap<String, Value>> {
    let all = admin.list("Service", SHOP)?;
    let kept = |service: &Value| json!([service["spec"], service["metadata"]["annotations"], ingress(service)]);
    Ok(all.iter().map(|service| (name(service), kept(service))).filter(|(name, _)| is_settled(name)).collect())
}

fn is_settled(name: &str) -> bool {
    SETTLED.contains(&name)
}

fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

fn versions(admin: &Client, kind: &str, namespace: &str) -> Result<BTreeMap<String, Value>> {
    let all = admin.list(kind, namespace)?;
    Ok(all.iter().map(|object| (name(object), object["metadata"]["resourceVersion"].clone())).collect())
}

/// So many Services were written.
fn writes(cluster: &Cluster) -> Result<u64> {
    let (_, metrics) = cluster.netns.page(7490, "/metrics")?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("purelb_k8s_client_updates_total "));
    line.and_then(|number| number.parse().ok()).context("no such metric")
}

/// The two workloads: who they are, and what runs in them.
fn workloads(admin: &Client) -> Result<[Value; 2]> {
    Ok([admin.get("Deployment", INSTALL, "allocator")?, admin.get("DaemonSet", INSTALL, "lbnodeagent")?])
}

/// Of a workload only what a manifest says counts, and all of it.
fn runs(workload: &Value, manifest: &Value) -> Result<()> {
    let (found, wanted) = (&workload["spec"]["template"]["spec"], &manifest["spec"]["template"]["spec"]);
    let container = |pod: &Value| pod["containers"][0].clone();
    ensure!(found["containers"].as_array().map(Vec::len) == Some(1), "{found}");
    for key in ["image", "args", "command", "env", "volumeMounts"] {
        let named = |value: &Value| -> Vec<Value> {
            let items = value.as_array().into_iter().flatten();
            items.map(|item| item.get("name").unwrap_or(item).clone()).collect()
        };
        let (found, wanted) = (&container(found)[key], &container(wanted)[key]);
        ensure!(named(found) == named(wanted) && (found.is_array() || found == wanted), "{key}: {found}, not {wanted}");
    }
    for key in ["priorityClassName", "terminationGracePeriodSeconds", "tolerations", "volumes", "affinity"] {
        let named = |value: &Value| value.as_array().map(Vec::len);
        let (found, wanted) = (&found[key], &wanted[key]);
        ensure!(found == wanted || found.is_array() && named(found) == named(wanted), "{key}: {found}, not {wanted}");
    }
    ensure!(container(found)["livenessProbe"].is_null() == container(wanted)["livenessProbe"].is_null(), "{found}");
    Ok(())
}

fn of_kind(manifests: &[Value], kind: &str) -> Result<Value> {
    manifests.iter().find(|object| object["kind"] == kind).cloned().context("not in the manifests")
}

#[test]
fn over_purelb_and_back() -> Result<()> {
    let cluster = Cluster::bare()?;
    let admin = cluster.admin()?;
    let purelb = Purelb::new(&cluster, &admin)?;
    purelb.applied(&cluster)?;
    users(&admin, &purelb)?;
    let (before, theirs) = (kept(&admin)?, workloads(&admin)?);
    let others = versions(&admin, "Service", SHOP)?;
    let leases = versions(&admin, "Lease", INSTALL)?;

    ours_applied(&cluster, &admin)?;
    let ours = workloads(&admin)?;
    for (now, before) in ours.iter().zip(&theirs) {
        ensure!(now["metadata"]["uid"] == before["metadata"]["uid"], "made anew and not changed: {now}");
    }
    let base = manifests("deploy/base")?;
    runs(&ours[0], &of_kind(&base, "Deployment")?)?;
    runs(&ours[1], &of_kind(&base, "DaemonSet")?)?;
    let garp = admin.get("LBNodeAgent", INSTALL, "default")?["spec"]["local"]["garpConfig"]["count"].clone();
    ensure!(garp == 5, "what the user set is {garp}");

    let mut allocator = Allocator::start(&cluster, INSTALL, &["--port", "7490"])?;
    let wait = |name: &str, what: &str, is: &dyn Fn(&Value) -> bool| {
        let found = admin.wait("Service", (SHOP, name), what, is);
        found.with_context(|| allocator.log())
    };
    ensure!(said(&wait("waiting", "has an address", &|s| !ingress(s).is_empty())?) == "192.0.2.2");
    ensure!(said(&wait("unknown", "is told why not", &|s| condition(s).is_some())?) == "UnknownGroup");
    for name in SETTLED {
        wait(name, "has the condition", &|s| condition(s).is_some())?;
    }
    ensure!(kept(&admin)? == before, "{:?} was {before:?}", kept(&admin)?);
    admin.create(&service("new", json!({}), json!({"ipFamilyPolicy": "RequireDualStack"})))?;
    let new = wait("new", "has addresses", &|s| ingress(s).len() == 2)?;
    ensure!(said(&new) == "192.0.2.3 2001:db8::9", "{new}");
    admin.wait("ServiceGroup", (INSTALL, "default"), "says what is used", |group| {
        let status = &group["status"];
        status["allocatedIPv4"] == 6 && status["allocatedIPv6"] == 2 && status["conditions"][0]["status"] == "True"
    })?;
    admin.wait("ServiceGroup", (INSTALL, "far"), "has a status of ours", |group| {
        group["status"]["conditions"][0]["status"] == "True"
    })?;
    // Each of its own Services by one write, for the condition or the address; nothing else, and nothing again.
    let settled = (versions(&admin, "Service", SHOP)?, versions(&admin, "ServiceGroup", INSTALL)?);
    sys::pause(5_000);
    ensure!(
        (versions(&admin, "Service", SHOP)?, versions(&admin, "ServiceGroup", INSTALL)?) == settled,
        "written again"
    );
    ensure!(writes(&cluster)? == SETTLED.len() as u64 + 3, "{} writes", writes(&cluster)?);
    for name in OTHERS {
        ensure!(settled.0.get(name) == others.get(name), "{name} was written");
    }
    let node = versions(&admin, "Lease", INSTALL)?;
    ensure!(node.get("purelb-node-node1") == leases.get("purelb-node-node1"), "the Lease of a node was written");

    // Under ours somebody uses what PureLB does not know.
    let mut excluding = in_install(group("excluding", local("192.0.2.64/28")));
    excluding["spec"]["exclude"] = json!(["192.0.2.64"]);
    admin.create(&excluding)?;
    let spec = json!({
        "nodeSelector": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]},
        "local": {"localInterface": "^ens"}, "datapath": {"mode": "auto", "interfaces": ["ens3"]},
    });
    let mut fast = json!({"apiVersion": "purelb.io/v2", "kind": "LBNodeAgent", "metadata": {"name": "fast", "namespace": INSTALL}});
    fast["spec"] = spec;
    admin.create(&fast)?;
    admin.create(&service("late", json!({"purelb.io/service-group": "excluding"}), json!({})))?;
    ensure!(said(&wait("late", "has an address", &|s| !ingress(s).is_empty())?) == "192.0.2.65");
    admin
        .wait("ServiceGroup", (INSTALL, "excluding"), "has a status", |group| group["status"]["allocatedIPv4"] == 1)?;
    allocator.stop(Signal::SIGTERM)?;
    let given = versions(&admin, "Service", SHOP)?;

    purelb.applied(&cluster)?;
    ensure!(versions(&admin, "Service", SHOP)? == given, "applying manifests writes no Service");
    back(&purelb)?;
    for (now, before) in workloads(&admin)?.iter().zip(&theirs) {
        ensure!(now["metadata"]["uid"] == before["metadata"]["uid"], "made anew and not changed: {now}");
    }
    ensure!(kept(&admin)? == before, "{:?} was {before:?}", kept(&admin)?);
    purelb_goes_on(&purelb)?;

    // And to us once more.
    ours_applied(&cluster, &admin)?;
    let allocator = Allocator::start(&cluster, INSTALL, &["--port", "7490"])?;
    admin.create(&service("once-more", json!({}), json!({})))?;
    let again = admin.wait("Service", (SHOP, "once-more"), "has an address", |s| !ingress(s).is_empty());
    ensure!(said(&again.with_context(|| allocator.log())?) == "192.0.2.7");
    ensure!(kept(&admin)? == before, "{:?} was {before:?}", kept(&admin)?);
    Ok(())
}

/// PureLB's manifests are over ours; what of ours stands in its agents' way is told by the README.
fn back(purelb: &Purelb<'_>) -> Result<()> {
    let all = purelb::installation();
    let [deployment, daemons] = workloads(purelb.admin)?;
    runs(&deployment, &of_kind(&all, "Deployment")?)?;
    runs(&daemons, &of_kind(&all, "DaemonSet")?)?;
    ensure!(deployment["spec"]["replicas"] == 1, "PureLB's allocators know no lease: {deployment}");
    // Its agents announce at once; they change Services' policies as soon as our admission policies are deleted.
    purelb.announces("new", &["192.0.2.3"])?;
    let mut web = purelb.agent.get("Service", SHOP, "web")?;
    web["spec"]["externalTrafficPolicy"] = "Local".into();
    sys::wait_for("our policies are in force", Duration::from_secs(20), || {
        let code = refusal(purelb.agent.replace(&web)).map(|refused| refused.code);
        Ok(code.is_ok_and(|code| code == 403 || code == 422))
    })?;
    for object in manifests("deploy/base")? {
        let kind = object["kind"].as_str().unwrap_or_default();
        if kind.starts_with("ValidatingAdmissionPolicy") {
            purelb.admin.delete(kind, "", &name(&object))?;
        }
    }
    sys::wait_for("the policies are gone", Duration::from_secs(20), || {
        let mut web = purelb.agent.get("Service", SHOP, "web")?;
        let policy = if web["spec"]["externalTrafficPolicy"] == "Local" { "Cluster" } else { "Local" };
        web["spec"]["externalTrafficPolicy"] = policy.into();
        purelb.agent.replace(&web)?;
        Ok(policy == "Cluster")
    })
}

/// Under PureLB's CRDs and roles everything that ours made loads, and its allocator finds and may write what it needs.
fn purelb_goes_on(purelb: &Purelb<'_>) -> Result<()> {
    let mut loaded = Vec::new();
    for kind in ["ServiceGroup", "LBNodeAgent"] {
        for object in purelb.allocator.list(kind, INSTALL)? {
            let has = |pointer: &str| object.pointer(pointer).is_some();
            ensure!(!has("/spec/exclude") && !has("/spec/datapath") && !has("/status/conditions"), "{object}");
            // As its user edits it, and as a new one.
            let mut edited = object.clone();
            edited["apiVersion"] = "purelb.io/v2".into();
            edited["kind"] = kind.into();
            purelb.admin.replace(&edited).with_context(|| format!("{kind} {}", name(&object)))?;
            let copy = json!({
                "apiVersion": "purelb.io/v2", "kind": kind, "spec": object["spec"],
                "metadata": {"name": format!("copy-of-{}", name(&object)), "namespace": SHOP},
            });
            purelb.admin.create(&copy).with_context(|| format!("{kind} {}", name(&object)))?;
            loaded.push(name(&object));
        }
    }
    loaded.sort();
    ensure!(loaded == ["default", "default", "excluding", "far", "fast"], "{loaded:?}");
    purelb.tells("default", [6, 2])?;
    purelb.tells("excluding", [1, 0])?;
    for service in purelb.allocator.list("Service", SHOP)? {
        let (name, notes) = (name(&service), &service["metadata"]["annotations"]);
        let ips = ingress(&service);
        if ips.is_empty() {
            continue;
        }
        let pool = match name.as_str() {
            "shared-a" | "shared-b" => ("far", "remote"),
            "homeless" => ("gone", "local"),
            "late" => ("excluding", "local"),
            _ => ("default", "local"),
        };
        ensure!(notes["purelb.io/allocated-by"] == "PureLB", "{name}: {notes}");
        ensure!(
            notes["purelb.io/allocated-from"] == pool.0 && notes["purelb.io/pool-type"] == pool.1,
            "{name}: {notes}"
        );
        let entries = service["status"]["loadBalancer"]["ingress"].as_array();
        ensure!(entries.into_iter().flatten().all(|entry| entry["ipMode"] == "VIP"), "{service}");
    }
    // A family goes, as PureLB does it: status first, then the object; our condition stands in nobody's way.
    let mut dual = purelb.allocator.get("Service", SHOP, "new")?;
    dual["status"]["loadBalancer"]["ingress"].as_array_mut().map(Vec::pop);
    let status = format!("{}/status", path("Service", SHOP, "new")?);
    let written: Value =
        serde_json::from_str(&purelb.allocator.raw("PUT", &status, Some(("application/json", &dual)))?)?;
    ensure!(ingress(&written) == ["192.0.2.3"] && condition(&written).is_some(), "{written}");
    // And what is given anew bears the same marks as ever.
    purelb.gives("unknown", &["192.0.2.4"], "default", "local")?;
    Ok(())
}
