//! Addresses from IPAM sidecars (section 4.3 of PureLB's behaviour): a real allocator under its roles, a
//! real socket. Invariant I17.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use purelb_tests::agent::binary;
use purelb_tests::cluster::proxy::Proxy;
use purelb_tests::cluster::tenant::{Allocator, condition, said};
use purelb_tests::cluster::{Cluster, Tenant, manifests, path};
use purelb_tests::sidecar::{Impostor, Mood, Sidecar};
use purelb_tests::sys;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

/// An installation with a group of ranges and one of a sidecar.
struct Case {
    tenant: Tenant<'static>,
    sidecar: Sidecar,
    _folder: TempDir,
}

impl Case {
    fn new(name: &str, range: &str, v4: &[&str], v6: &[&str]) -> Result<Self> {
        let tenant = Tenant::new(Cluster::shared()?, name)?;
        let folder = TempDir::with_prefix("purelb-sidecar-")?;
        let socket = folder.path().join("ipam.sock");
        let external = json!({"provider": "lab", "socket": socket, "announce": "remote"});
        tenant.group("default", json!({"local": {"v4pool": {"pool": range, "subnet": "10.0.0.0/8"}}}))?;
        tenant.group("far", json!({"external": external}))?;
        let sidecar = Sidecar::start(&socket, v4, v6)?;
        Ok(Self { tenant, sidecar, _folder: folder })
    }

    fn asks(&self, name: &str, spec: Value) -> Result<String> {
        self.tenant.asks(name, far(), spec)
    }

    fn becomes(&self, name: &str, wanted: &str) -> Result<Value> {
        self.tenant.wait(name, &format!("says {wanted}"), |service| said(service) == wanted)
    }

    fn message(&self, name: &str) -> Result<String> {
        let service = self.tenant.get(name)?;
        Ok(condition(&service).and_then(|c| c["message"].as_str()).unwrap_or_default().to_owned())
    }

    /// What the sidecar says that a Service has.
    fn has(&self, name: &str) -> String {
        self.sidecar.given("far", &format!("{}/{name}", self.tenant.namespace))
    }

    fn has_soon(&self, name: &str, wanted: &str) -> Result<()> {
        sys::wait_for(&format!("the sidecar has {wanted:?} for {name}"), Duration::from_secs(30), || {
            let found = self.has(name);
            ensure!(found == wanted, "it has {found:?}; {:?}", self.sidecar.calls());
            Ok(true)
        })
    }
}

fn far() -> Value {
    json!({"purelb.io/service-group": "far"})
}

fn dual() -> Value {
    json!({"ipFamilyPolicy": "RequireDualStack"})
}

/// Addresses, marks, figures and metrics; what is let go of is given back.
#[test]
fn given_and_given_back() -> Result<()> {
    let case = Case::new("external", "10.11.0.0/29", &["10.20.30.1", "10.20.30.2"], &["2001:db8:20::1"])?;
    let _allocator = case.tenant.allocator(&["--port", "7491"])?;
    ensure!(case.asks("web", dual())? == "10.20.30.1 2001:db8:20::1");
    let web = case.tenant.get("web")?;
    let notes = &web["metadata"]["annotations"];
    ensure!(notes["purelb.io/allocated-by"] == "PureLB" && notes["purelb.io/allocated-from"] == "far", "{notes}");
    ensure!(notes["purelb.io/pool-type"] == "remote", "{notes}");
    ensure!(case.asks("six", json!({"ipFamilies": ["IPv6"]}))? == "SidecarFailed", "all families or none");
    ensure!(case.message("six")?.contains("answers ResourceExhausted: nothing is free"), "{}", case.message("six")?);
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.11.0.0");
    let pin = json!({"purelb.io/addresses": "10.20.30.2"});
    ensure!(case.tenant.asks("pinned", pin, json!({}))? == "AddressOutsidePools", "as with PureLB");
    let group = case.tenant.admin.wait("ServiceGroup", (&case.tenant.namespace, "far"), "has figures", |group| {
        group["status"]["allocatedIPv4"] == 1 && group["status"]["allocatedIPv6"] == 1
    })?;
    let status = &group["status"];
    ensure!(status["announce"] == "Remote" && status["ipam"] == "lab" && status["availableIPv4"] == 1, "{status}");
    ensure!(status["addresses"][2] == "2001:db8:20::1" && status["conditions"][0]["status"] == "True", "{status}");
    let socket = case.sidecar.socket.display();
    let allocate = format!("socket=\"{socket}\",method=\"/purelb.ipam.v1.IPAM/Allocate\"");
    let lines = [
        format!("purelb_allocator_sidecar_rpc_total{{{allocate},code=\"OK\"}} 1"),
        format!("purelb_allocator_sidecar_rpc_duration_seconds_count{{{allocate}}} "),
        "purelb_address_pool_size{pool=\"far\"} 3".to_owned(),
        "purelb_address_pool_addresses_in_use{pool=\"far\"} 2".to_owned(),
    ];
    sys::wait_for("the metrics", Duration::from_secs(10), || {
        let (_, metrics) = case.tenant.cluster.netns.page(7491, "/metrics")?;
        let missing = lines.iter().find(|line| !metrics.lines().any(|found| found.starts_with(*line)));
        ensure!(missing.is_none(), "{missing:?} is missing of {metrics}");
        Ok(true)
    })?;
    // A family that goes, another type, the end.
    let patch = |spec: Value| case.tenant.admin.patch("Service", &case.tenant.namespace, "web", &json!({"spec": spec}));
    patch(json!({"ipFamilyPolicy": "SingleStack"}))?;
    case.becomes("web", "10.20.30.1")?;
    case.has_soon("web", "10.20.30.1")?;
    case.becomes("six", "2001:db8:20::1")?;
    patch(json!({"type": "ClusterIP", "loadBalancerClass": null, "allocateLoadBalancerNodePorts": null}))?;
    case.has_soon("web", "")?;
    case.tenant.delete("six")?;
    case.has_soon("six", "")?;
    ensure!(case.asks("last", dual())? == "10.20.30.1 2001:db8:20::1");
    // PureLB asks for what is not there before every allocation; of a pool of ranges no sidecar hears.
    let calls = case.sidecar.calls();
    ensure!(!calls.iter().any(|call| call.contains("/near") || call.contains("/pinned")), "{calls:?}");
    Ok(())
}

/// PureLB's [DEFECT]: one sidecar that is away keeps all new Services waiting, of every group.
#[test]
fn defect_an_outage_delays_only_its_own() -> Result<()> {
    let mut case = Case::new("outage", "10.12.0.0/28", &["10.20.31.1", "10.20.31.2", "10.20.31.3"], &[])?;
    let mut allocator = case.tenant.allocator(&[])?;
    ensure!(case.asks("held", json!({}))? == "10.20.31.1");
    ensure!(case.asks("gone", json!({}))? == "10.20.31.2");
    case.sidecar.stop();
    ensure!(case.asks("waits", json!({}))? == "SidecarFailed");
    ensure!(case.message("waits")?.contains("Unavailable"), "{}", case.message("waits")?);
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.12.0.0");
    case.tenant.delete("near")?;
    case.tenant.delete("gone")?;
    ensure!(case.tenant.asks("next", json!({}), json!({}))? == "10.12.0.1");
    case.tenant.admin.wait("ServiceGroup", (&case.tenant.namespace, "far"), "says that it is away", |group| {
        let ready = &group["status"]["conditions"][0];
        ready["status"] == "False" && ready["reason"] == "SidecarFailed" && group["status"]["ipam"] == "lab"
    })?;
    // What has to be given back is written down: the next allocator does it.
    allocator.stop(Signal::SIGKILL)?;
    case.sidecar.forget();
    case.sidecar.serve()?;
    let _allocator = case.tenant.allocator(&[])?;
    // It forgot everything, and hears what is held before it is asked for more.
    case.becomes("waits", "10.20.31.2")?;
    ensure!(case.has("held") == "10.20.31.1", "{:?}", case.sidecar.calls());
    let calls = case.sidecar.calls();
    let at = |what: &str| calls.iter().rposition(|call| call.starts_with(what)).with_context(|| format!("{calls:?}"));
    ensure!(at("Allocate far outage/held 10.20.31.1")? < at("Allocate far outage/waits 10")?, "{calls:?}");
    at("Release far outage/gone all").map(drop)
}

/// A sidecar that does not answer at all holds up nobody else; one that comes back in the life of an allocator is told again.
#[test]
fn silent_and_back() -> Result<()> {
    let mut case = Case::new("mute", "10.13.0.0/28", &["10.20.32.1", "10.20.32.2"], &[])?;
    let _allocator = case.tenant.allocator(&[])?;
    ensure!(case.asks("held", json!({}))? == "10.20.32.1");
    case.sidecar.mood(Mood::Silent);
    case.tenant.create("waits", far(), json!({}))?;
    for number in 0..4 {
        let name = format!("near{number}");
        ensure!(case.tenant.asks(&name, json!({}), json!({}))? == format!("10.13.0.{number}"));
    }
    ensure!(case.tenant.answer("waits")? == "SidecarFailed");
    ensure!(case.message("waits")?.contains("DeadlineExceeded"), "{}", case.message("waits")?);
    case.sidecar.stop();
    case.sidecar.forget();
    case.sidecar.mood(Mood::Good);
    case.sidecar.serve()?;
    case.becomes("waits", "10.20.32.2")?;
    ensure!(case.has("held") == "10.20.32.1", "{:?}", case.sidecar.calls());
    Ok(())
}

/// It loses its memory between two calls: what it gives then is another one's, so it is told whose.
#[test]
fn forgetful_unnoticed() -> Result<()> {
    let case = Case::new("forgetful", "10.20.0.0/28", &["10.20.41.1", "10.20.41.2"], &[])?;
    let _allocator = case.tenant.allocator(&[])?;
    ensure!(case.asks("held", json!({}))? == "10.20.41.1");
    case.sidecar.forget();
    case.tenant.create("waits", far(), json!({}))?;
    case.becomes("waits", "10.20.41.2")?;
    ensure!(case.has("held") == "10.20.41.1", "{:?}", case.sidecar.calls());
    Ok(())
}

/// Answers that nobody can use: each is said, and none is given.
#[test]
fn answers_that_nobody_can_use() -> Result<()> {
    let case = Case::new("mad", "10.14.0.0/28", &["10.20.33.1"], &["2001:db8:33::1"])?;
    let _allocator = case.tenant.allocator(&[])?;
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.14.0.0");
    ensure!(case.asks("held", json!({}))? == "10.20.33.1");
    let many: Vec<_> = (0..17).map(|n| format!("10.20.34.{n}")).collect();
    let rows: [(Mood, &str); 8] = [
        (Mood::Gives(Vec::new()), "InvalidAnswer: it has no address"),
        (Mood::Gives(many), "InvalidAnswer: it has 17 addresses"),
        (Mood::Gives(vec!["web".to_owned()]), "InvalidAnswer: \"web\" is no address"),
        (Mood::Gives(vec!["10.20.33.1".to_owned()]), "gave 10.20.33.1, which Service mad/held has"),
        (Mood::Gives(vec!["10.14.0.0".to_owned()]), "gave 10.14.0.0, which is of ServiceGroup default"),
        (Mood::Gives(vec!["2001:db8::1".to_owned()]), "gave 2001:db8::1, and was not asked for IPv6"),
        (Mood::Gives(vec!["127.0.0.1".to_owned()]), "gave 127.0.0.1, which no Service can have"),
        (Mood::Refuses(Code::FailedPrecondition), "answers FailedPrecondition: as it was told"),
    ];
    for (number, (mood, want)) in rows.into_iter().enumerate() {
        case.sidecar.mood(mood);
        let name = format!("bad{number}");
        ensure!(case.asks(&name, json!({}))? == "SidecarFailed", "{want}");
        ensure!(case.message(&name)?.contains(want), "{want}: {}", case.message(&name)?);
    }
    case.sidecar.mood(Mood::Good);
    let six = json!({"ipFamilies": ["IPv6"]});
    ensure!(case.asks("good", six)? == "2001:db8:33::1", "who asks now is not held up by them");
    // Refused ones were given back.
    sys::wait_for("what was refused is free", Duration::from_secs(20), || {
        Ok((0..8).all(|number| case.has(&format!("bad{number}")).is_empty()))
    })
}

/// Two allocators that both think they lead, and a sidecar: no address twice, and it knows who has what.
#[test]
fn two_leaders_and_a_sidecar() -> Result<()> {
    let ips: Vec<_> = (0..60).map(|n| format!("10.20.35.{n}")).collect();
    let ips: Vec<_> = ips.iter().map(String::as_str).collect();
    let case = Case::new("two-ipam", "10.15.0.0/28", &ips, &[])?;
    let mut allocators = [case.tenant.allocator(&[])?, case.tenant.allocator(&[])?];
    let make = |prefix: &str, count: usize| {
        (0..count).try_for_each(|n| case.tenant.create(&format!("{prefix}{n}"), far(), json!({})).map(drop))
    };
    make("first-", 3)?;
    case.tenant.all_served(3)?;
    let leads = |one: &Allocator, leader: &str| one.identity() == leader;
    let leader = case.tenant.leader()?;
    let index = allocators.iter().position(|one| leads(one, &leader)).context("nobody leads")?;
    make("before-", 15)?;
    allocators[index].signal(Signal::SIGSTOP)?;
    make("after-", 15)?;
    let served = case.tenant.all_served(33)?;
    allocators[index].signal(Signal::SIGCONT)?;
    make("woken-", 5)?;
    let all = case.tenant.all_served(38)?;
    ensure!(served.iter().all(|(name, ip)| all.get(name) == Some(ip)), "an address moved");
    for (name, ip) in &all {
        case.has_soon(name, ip)?;
    }
    allocators.iter_mut().try_for_each(|one| one.stop(Signal::SIGTERM))
}

/// On a folder the same: an address comes, and is given back when the manifest goes, also while no allocator runs.
#[test]
fn on_a_folder() -> Result<()> {
    let folder = TempDir::with_prefix("purelb-sidecar-")?;
    let socket = folder.path().join("ipam.sock");
    let mut sidecar = Sidecar::start(&socket, &["10.20.36.1", "10.20.36.2"], &[])?;
    let manifests = folder.path().join("manifests");
    std::fs::create_dir(&manifests)?;
    let write = |name: &str, object: Value| -> Result<PathBuf> {
        let path = manifests.join(format!("{name}.yaml"));
        std::fs::write(&path, serde_yaml_ng::to_string(&object)?)?;
        Ok(path)
    };
    write(
        "group",
        json!({
            "apiVersion": "purelb.io/v2", "kind": "ServiceGroup", "metadata": {"name": "default", "namespace": "purelb-system"},
            "spec": {"external": {"provider": "lab", "socket": socket, "announce": "remote"}},
        }),
    )?;
    let service = |name: &str| {
        write(
            name,
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
                "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], "ipFamilies": ["IPv4"]},
            }),
        )
    };
    let start = || -> Result<Killed> {
        let mut command = std::process::Command::new(binary()?);
        command.args(["allocator", "--port", "0", "--source"]).arg(format!("dir:{}", manifests.display()));
        Ok(Killed(command.stderr(std::process::Stdio::null()).spawn()?))
    };
    let state = |name: &str| -> Result<Value> {
        let path = manifests.join("state/services").join(format!("default_{name}.json"));
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    };
    let has = |sidecar: &Sidecar, name: &str, want: &str| {
        sys::wait_for(&format!("{name} has {want:?}"), Duration::from_secs(20), || {
            let found = sidecar.given("default", &format!("default/{name}"));
            ensure!(found == want, "it has {found:?}");
            Ok(true)
        })
    };
    let allocator = start()?;
    let wait = |name: &str, ip: &str| {
        sys::wait_for(&format!("{name} has {ip}"), Duration::from_secs(20), || Ok(state(name)?["ingress"][0] == ip))
    };
    let first = service("a")?;
    wait("a", "10.20.36.1")?;
    let second = service("b")?;
    wait("b", "10.20.36.2")?;
    std::fs::remove_file(first)?;
    has(&sidecar, "a", "")?;
    sidecar.stop();
    std::fs::remove_file(second)?;
    sys::pause(1_500);
    drop(allocator);
    ensure!(state("b")?["ingress"][0] == "10.20.36.2", "it stays until it is given back");
    sidecar.serve()?;
    let allocator = start()?;
    has(&sidecar, "b", "")?;
    sys::wait_for("its state is gone", Duration::from_secs(20), || Ok(state("b").is_err()))?;
    // Its answer to the last question is lost with the allocator, and the Service goes before the next one begins.
    sidecar.mood(Mood::Silent);
    let third = service("c")?;
    let asked = || sidecar.calls().iter().any(|call| call.starts_with("Allocate default default/c"));
    sys::wait_for("it is asked for c", Duration::from_secs(20), || Ok(asked()))?;
    drop(allocator);
    sidecar.gives("default", "default/c", "10.20.36.1")?;
    std::fs::remove_file(third)?;
    sidecar.mood(Mood::Good);
    let _allocator = start()?;
    has(&sidecar, "c", "")?;
    let debts = manifests.join("state/sidecars.json");
    sys::wait_for("nothing is owed", Duration::from_secs(20), || {
        let text = std::fs::read_to_string(&debts)?;
        ensure!(text.trim() == "[]", "{text}");
        Ok(true)
    })
}

/// The Lease must have room for what is written down about a socket, or nobody leads any more.
#[test]
fn a_path_that_no_socket_has() -> Result<()> {
    let case = Case::new("long-path", "10.16.0.0/28", &["10.20.37.1"], &[])?;
    let external = json!({"provider": "lab", "socket": format!("/{}", "x".repeat(90_000)), "announce": "remote"});
    case.tenant.group("long", json!({"external": external}))?;
    let _allocator = case.tenant.allocator(&[])?;
    for name in ["a", "b", "c", "d"] {
        case.tenant.create(name, json!({"purelb.io/service-group": "long"}), json!({}))?;
    }
    ensure!(case.tenant.answer("a")? == "NoUsableGroup");
    sys::pause(15_000);
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.16.0.0");
    ensure!(case.asks("far", json!({}))? == "10.20.37.1");
    Ok(())
}

/// It answers, and cannot give anything now: it did not forget what it gave, and is not told again and again.
#[test]
fn unavailable_is_an_answer() -> Result<()> {
    let ips: Vec<_> = (0..30).map(|n| format!("10.20.38.{n}")).collect();
    let ips: Vec<_> = ips.iter().map(String::as_str).collect();
    let case = Case::new("backend", "10.17.0.0/28", &ips, &[])?;
    let _allocator = case.tenant.allocator(&[])?;
    (0..20).try_for_each(|n| case.tenant.create(&format!("held{n}"), far(), json!({})).map(drop))?;
    case.tenant.all_served(20)?;
    case.sidecar.mood(Mood::GivesNothing(Code::Unavailable));
    let before = case.sidecar.calls().len();
    ensure!(case.asks("waits", json!({}))? == "SidecarFailed");
    sys::pause(12_000);
    let calls = case.sidecar.calls().split_off(before);
    let told = calls.iter().filter(|call| call.contains("/held")).count();
    ensure!(told <= 20, "{told}: {calls:?}");
    case.sidecar.mood(Mood::Good);
    case.becomes("waits", "10.20.38.20").map(drop)
}

/// What it does not take back, it cannot give again: who waits for that is told so.
#[test]
fn a_sidecar_takes_nothing_back() -> Result<()> {
    let case = Case::new("keeps", "10.18.0.0/28", &["10.20.39.1", "10.20.39.2"], &[])?;
    let _allocator = case.tenant.allocator(&[])?;
    ensure!(case.asks("web", json!({}))? == "10.20.39.1");
    case.sidecar.mood(Mood::Keeps(Code::FailedPrecondition));
    case.tenant.delete("web")?;
    ensure!(case.asks("web", json!({}))? == "SidecarFailed");
    ensure!(case.message("web")?.contains("FailedPrecondition"), "{}", case.message("web")?);
    case.sidecar.mood(Mood::Good);
    case.becomes("web", "10.20.39.1").map(drop)
}

/// Whatever is at the other end of the path.
#[test]
fn no_sidecar_at_all() -> Result<()> {
    let mut case = Case::new("nobody", "10.19.0.0/28", &["10.20.40.1"], &[])?;
    let _allocator = case.tenant.allocator(&[])?;
    let socket = case.sidecar.socket.clone();
    let http: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    // An HTTP/2 frame of settings, and half of a frame of headers.
    let half: &[u8] = b"\0\0\0\x04\0\0\0\0\0\0\0\x40\x01\x04\0\0\0\x01\x88";
    let noise: Vec<u8> = (0..70_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    case.tenant.create("waits", far(), json!({}))?;
    case.becomes("waits", "10.20.40.1")?;
    for (number, words) in [&b""[..], http, half, &noise].into_iter().enumerate() {
        case.sidecar.stop();
        let impostor = Impostor::start(&socket, words)?;
        let name = format!("bad{number}");
        ensure!(case.asks(&name, json!({}))? == "SidecarFailed");
        ensure!(case.message(&name)?.contains("Unavailable"), "{number}: {}", case.message(&name)?);
        drop(impostor);
        case.tenant.delete(&name)?;
    }
    case.sidecar.stop();
    drop(std::fs::remove_file(&socket));
    std::fs::create_dir(&socket)?;
    ensure!(case.asks("folder", json!({}))? == "SidecarFailed");
    std::fs::remove_dir(&socket)?;
    std::fs::write(&socket, "no socket")?;
    ensure!(case.asks("file", json!({}))? == "SidecarFailed");
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.19.0.0");
    case.tenant.delete("folder")?;
    case.tenant.delete("waits")?;
    case.sidecar.serve()?;
    case.becomes("file", "10.20.40.1").map(drop)
}

/// The overlay puts a sidecar beside one allocator, as a real API server merges it.
#[test]
fn overlay() -> Result<()> {
    let tenant = Tenant::new(Cluster::shared()?, "overlay-ipam")?;
    let found = manifests("deploy/base")?.into_iter().find(|object| object["kind"] == "Deployment");
    let mut base = found.context("no Deployment in deploy/base")?;
    base["metadata"]["namespace"] = json!(tenant.namespace);
    tenant.admin.apply(&base)?;
    let mut patch: Value =
        serde_yaml_ng::from_str(include_str!("../../../deploy/overlays/ipam-sidecar/allocator.yaml"))?;
    patch["metadata"]["namespace"] = json!(tenant.namespace);
    let path = format!("{}?fieldValidation=Strict", path("Deployment", &tenant.namespace, "allocator")?);
    tenant.admin.raw("PATCH", &path, Some(("application/strategic-merge-patch+json", &patch)))?;
    let merged = tenant.admin.get("Deployment", &tenant.namespace, "allocator")?;
    let pod = &merged["spec"]["template"]["spec"];
    ensure!(merged["spec"]["replicas"] == 1 && pod["containers"].as_array().is_some_and(|all| all.len() == 2), "{pod}");
    ensure!(pod["securityContext"]["runAsUser"] == 65534, "the socket is the sidecar's user's alone: {pod}");
    for container in pod["containers"].as_array().into_iter().flatten() {
        ensure!(container["volumeMounts"][0]["mountPath"] == "/var/run/purelb", "{container}");
        ensure!(container["securityContext"]["capabilities"]["drop"][0] == "ALL", "{container}");
        // An outage of the sidecar is no reason to restart the allocator.
        let name = container["name"].as_str().unwrap_or_default();
        ensure!(container.get("livenessProbe").is_some() == (name == "allocator"), "{container}");
    }
    Ok(())
}

/// A process of this test; it ends with it.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Many at once, and many that wait: few requests, and nobody else is held up.
#[test]
fn many_at_once() -> Result<()> {
    let ips: Vec<_> = (0..800).map(|n| format!("10.20.{}.{}", 100 + n / 250, n % 250)).collect();
    let ips: Vec<_> = ips.iter().map(String::as_str).collect();
    let mut case = Case::new("many", "10.21.0.0/28", &ips, &[])?;
    let proxy = Proxy::start(case.tenant.cluster)?;
    let mut allocator = case.tenant.allocator_behind(&proxy, &[])?;
    let many = |prefix: &str, count: usize| {
        (0..count).try_for_each(|n| case.tenant.create(&format!("{prefix}{n}"), far(), json!({})).map(drop))
    };
    ensure!(case.tenant.asks("near", json!({}), json!({}))? == "10.21.0.0");
    allocator.signal(Signal::SIGSTOP)?;
    many("a", 500)?;
    let leases = proxy.count("PUT");
    allocator.signal(Signal::SIGCONT)?;
    case.tenant.all_served(501)?;
    let leases = proxy.count("PUT") - leases;
    eprintln!("{leases} writes of the Lease");
    ensure!(leases < 350, "{leases} writes of the Lease");
    case.sidecar.stop();
    many("b", 200)?;
    sys::pause(5_000);
    let before = proxy.asked();
    ensure!(case.tenant.asks("near2", json!({}), json!({}))? == "10.21.0.1");
    sys::pause(15_000);
    let requests = proxy.asked() - before;
    ensure!(requests < 100, "{requests} requests while everybody waits");
    case.sidecar.serve()?;
    case.tenant.all_served(702)?;
    allocator.stop(Signal::SIGTERM)
}
