//! Objects as an API server has them, and spoilt ones: nothing panics, and none changes what another one means.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kube::api::DynamicObject;
use purelb_plan::alloc::allocator::{Allocator, Settings};
use purelb_plan::apply::Twin;
use purelb_plan::plan;
use serde_json::{Value, json};

use super::Cluster;
use super::store::Store;
use super::watch::{Fault, News, of_allocator, of_node, seen};
use crate::source::claim::Home;
use crate::source::estate::Register;
use crate::source::parse::Kind;
use crate::source::{Host, Objects as _};

fn meta(name: &str, more: Value) -> Value {
    let mut meta = json!({"name": name, "namespace": "default", "uid": name, "resourceVersion": "1"});
    for (key, value) in more.as_object().into_iter().flatten() {
        meta[key] = value.clone();
    }
    meta
}

fn service(name: &str, vip: &str) -> Value {
    json!({
        "metadata": meta(name, json!({"annotations": {"purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "g", "other": "x"}})),
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}},
            "loadBalancerSourceRanges": ["10.0.0.0/8"], "publishNotReadyAddresses": false,
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        },
        "status": {
            "loadBalancer": {"ingress": [{"ip": vip, "ipMode": "VIP"}]},
            "conditions": [{"type": "purelb.io/Allocated", "status": "True", "reason": "Allocated", "message": vip}],
        },
    })
}

fn slice(name: &str, of: &str, ip: &str) -> Value {
    json!({
        "metadata": meta(name, json!({"labels": {"kubernetes.io/service-name": of}})),
        "addressType": "IPv4",
        "endpoints": [{
            "addresses": [ip], "conditions": {"ready": true, "serving": true, "terminating": false}, "nodeName": "n1",
            "zone": "a", "hints": {"forZones": [{"name": "a"}]}, "deprecatedTopology": null,
        }],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
    })
}

fn group(name: &str, pool: &str) -> Value {
    json!({
        "metadata": meta(name, json!({"generation": 3})),
        "spec": {
            "local": {"v4pools": [{"pool": pool, "subnet": "192.0.2.0/24", "aggregation": "/32"}], "multiPool": false},
            "namespaces": ["default"], "exclude": ["192.0.2.9"],
        },
        "status": {"allocatedIPv4": 1, "allocatedIPv6": 0, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// One of each kind.
fn examples() -> Vec<(Kind, Value)> {
    vec![
        (Kind::Service, service("web", "192.0.2.1")),
        (Kind::Slice, slice("web-a", "web", "10.0.0.1")),
        (
            Kind::Node,
            json!({
                "metadata": {"name": "n1", "resourceVersion": "1", "labels": {"rack": "a"}},
                "spec": {"podCIDRs": ["10.0.0.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "198.51.100.1"}], "images": [{"names": ["x"]}]},
            }),
        ),
        (
            Kind::NodeAgent,
            json!({
                "metadata": meta("settings", json!({})),
                "spec": {
                    "nodeSelector": {"matchLabels": {"rack": "a"}}, "local": {"localInterface": "default"},
                    "datapath": {"interfaces": ["eth0"], "hook": "tcx", "unknownPorts": "Drop", "clusterTraffic": "PreferLocal"},
                },
            }),
        ),
        (Kind::ServiceGroup, group("spare", "192.0.2.64/28")),
        (
            Kind::Lease,
            json!({
                "metadata": meta("purelb-node-n1", json!({"annotations": {"purelb.io/subnets": "192.0.2.0/24"}})),
                "spec": {"holderIdentity": "n1", "leaseDurationSeconds": 10, "renewTime": "2026-01-01T00:00:00.000000Z"},
            }),
        ),
    ]
}

fn news(kind: Kind, object: &Value) -> News {
    seen(kind, serde_json::from_value::<DynamicObject>(object.clone()).unwrap())
}

/// xorshift
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as usize % limit.max(1)
    }
}

/// What may stand where it should not.
fn odd(random: &mut Random) -> Value {
    let odd = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(65_536),
        json!(u64::MAX),
        json!(1e300),
        json!(0.5),
        json!(""),
        json!("x"),
        json!("192.0.2.1"),
        json!("::ffff:10.0.0.1"),
        json!("10.0.0.0/40"),
        json!("2001:db8::/32"),
        json!("0.0.0.0/0"),
        json!("192.0.2.255-192.0.2.0"),
        json!("IPv6"),
        json!("SCTP"),
        json!("\u{0}\u{10ffff}"),
        json!("9".repeat(5_000)),
        json!([]),
        json!([[]]),
        json!([null]),
        json!(["a", 1]),
        json!({}),
        json!({"": {}}),
        json!({"ip": 5}),
        json!({"a": {"b": [{"c": null}]}}),
    ];
    odd[random.below(odd.len())].clone()
}

/// Changes one place of it, so deep; metadata itself is always in order, as the API server sees to.
fn spoil(value: &mut Value, random: &mut Random, depth: usize, top: bool) {
    let again = depth > 0;
    match value {
        Value::Object(map) if again && map.keys().any(|key| !top || key != "metadata") => {
            let keys: Vec<_> = map.keys().filter(|key| !top || *key != "metadata").cloned().collect();
            let key = keys[random.below(keys.len())].clone();
            match random.below(12) {
                0 => drop(map.remove(&key)),
                1 => drop(map.insert(format!("{key}s"), odd(random))),
                _ => spoil(map.entry(key).or_insert(Value::Null), random, depth - 1, false),
            }
        }
        Value::Array(items) if again && !items.is_empty() => {
            let index = random.below(items.len());
            if random.below(8) == 0 {
                let twice = items[index].clone();
                items.push(twice);
            } else {
                spoil(&mut items[index], random, depth - 1, false);
            }
        }
        other if !top => *other = odd(random),
        _ => {}
    }
}

/// What the good Service means, whatever stands beside it.
#[test]
fn one_spoilt_object_is_one_problem() {
    let good = [(Kind::Service, service("good", "192.0.2.7")), (Kind::Slice, slice("good-a", "good", "10.0.0.7"))];
    let mut unreadable = 0;
    for seed in 1..1_500_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut cluster = Cluster::new("n1", &of_node(), None);
        let (mut store, mut register) = (Store::new(&of_allocator("default")), Register::default());
        let mut all: Vec<_> = examples();
        for _ in 0..=random.below(3) {
            let index = random.below(all.len());
            let depth = 1 + random.below(6);
            spoil(&mut all[index].1, &mut random, depth, true);
        }
        let kinds = [Kind::Service, Kind::Slice, Kind::Node, Kind::NodeAgent, Kind::ServiceGroup, Kind::Lease];
        let objects = all.iter().chain(&good);
        let base = json!({"metadata": meta("base", json!({})), "spec": group("base", "192.0.2.0/28")["spec"]});
        let told: Vec<_> = objects.map(|(kind, object)| (*kind, object)).chain([(Kind::ServiceGroup, &base)]).collect();
        for kind in kinds {
            for target in [true, false] {
                let mut take = |news: News| match target {
                    true => cluster.hear(vec![news]),
                    false => store.take(news, Instant::now()),
                };
                take(News::Begun(kind));
                told.iter().filter(|(of, _)| *of == kind).for_each(|(kind, object)| take(news(*kind, object)));
                take(News::Listed(kind));
            }
        }
        cluster.look();
        cluster.converter.host(&[].into(), &[].into(), Host { kube_proxy: false, live: false, detached: false });
        let world = cluster.world().expect("everything was listed");
        let service = world.services.get("default/good").unwrap_or_else(|| panic!("seed {seed} took the good Service"));
        assert_eq!(service.endpoints.len(), 2, "seed {seed}");
        let twin = Twin::new(1 << 16);
        let settings = plan::Settings { settle: 1000, milliticks: 15_625 };
        let planned = plan::plan(world, &twin.observed, &twin, &settings, 100);
        assert!(planned.services.iter().any(|view| format!("{view:?}").contains("192.0.2.7")), "seed {seed}");
        unreadable += usize::from(!cluster.problems().is_empty());

        register.read_groups(&store, Some("default"));
        let names: Vec<_> = store.all(Kind::Service).map(|(key, _)| key.1.clone()).collect();
        names.iter().for_each(|name| register.read_service(&store, name, Home::Cluster, false));
        let settings = Settings { class: "c".to_owned(), default_announcer: true, cool_down: 0 };
        let mut allocator = Allocator::new(settings, BTreeMap::new());
        let decided = allocator.look(&register.estate, 0);
        let moved = decided
            .get("default/good")
            .is_some_and(|decision| decision.ingress != ["192.0.2.7".parse::<std::net::IpAddr>().unwrap()]);
        assert!(!moved, "seed {seed}: {decided:?}");
    }
    assert!(unreadable > 250, "the spoilt objects are too tame: {unreadable}");
}

/// An object that cannot be read any more keeps its last good version; one that is gone is gone.
#[test]
fn the_last_good_version() {
    let mut cluster = Cluster::new("n1", &of_node(), None);
    let hear = |cluster: &mut Cluster, all: Vec<News>| {
        cluster.hear(all);
        cluster.look();
    };
    let listed = |objects: Vec<News>, kind| {
        std::iter::once(News::Begun(kind)).chain(objects).chain([News::Listed(kind)]).collect::<Vec<_>>()
    };
    let good = || news(Kind::Service, &service("web", "192.0.2.1"));
    for kind in [Kind::Slice, Kind::Node, Kind::NodeAgent, Kind::ServiceGroup] {
        hear(&mut cluster, listed(Vec::new(), kind));
        assert!(cluster.world().is_none(), "Services were not listed yet");
    }
    hear(&mut cluster, listed(vec![good()], Kind::Service));
    assert_eq!(cluster.world().map(|world| world.services.len()), Some(1));
    let mut broken = service("web", "192.0.2.1");
    broken["spec"]["ports"] = json!("many");
    hear(&mut cluster, vec![news(Kind::Service, &broken)]);
    assert_eq!(cluster.world().map(|world| world.services.len()), Some(1), "its last good version counts");
    let problems = cluster.problems();
    assert!(
        problems.iter().any(|p| p.object == "Service default/web" && p.field.starts_with("spec.ports")),
        "{problems:?}"
    );
    hear(&mut cluster, vec![good()]);
    assert_eq!(cluster.problems(), []);
    // While the API server is away what was seen last is served; a list without it takes it away.
    hear(&mut cluster, vec![News::Failed(Kind::Service, Fault::Away("no".to_owned())), News::Begun(Kind::Service)]);
    assert_eq!(cluster.world().map(|world| world.services.len()), Some(1));
    assert!(cluster.problems()[0].message.contains("what was seen last is served"));
    hear(&mut cluster, vec![News::Listed(Kind::Service)]);
    assert_eq!(cluster.world().map(|world| world.services.len()), Some(0));
}

/// The allocator let go of it, and it is another controller's now: not ours, though the brand is still there.
#[test]
fn what_was_ours_once() {
    let mut cluster = Cluster::new("n1", &of_node(), None);
    let mut theirs = service("web", "192.0.2.1");
    theirs["metadata"]["annotations"].as_object_mut().map(|all| all.remove("purelb.io/allocated-from"));
    for kind in [Kind::Service, Kind::Slice, Kind::Node, Kind::NodeAgent, Kind::ServiceGroup] {
        let listed = [News::Begun(kind)].into_iter();
        let told = (kind == Kind::Service).then(|| news(kind, &theirs));
        cluster.hear(listed.chain(told).chain([News::Listed(kind)]).collect());
    }
    cluster.look();
    assert_eq!(cluster.world().map(|world| world.services.len()), Some(0));
}

/// A kind that is not needed holds nothing up once it is clear that it is denied; one that is needed does.
#[test]
fn kinds_that_are_denied() {
    let now = Instant::now();
    let mut store = Store::new(&of_node());
    for kind in [Kind::Service, Kind::Slice, Kind::Node, Kind::ServiceGroup] {
        store.take(News::Begun(kind), now);
        store.take(News::Listed(kind), now);
    }
    store.take(News::Failed(Kind::NodeAgent, Fault::Unknown), now);
    assert!(!store.is_listed(now), "an API server that starts knows no CRD for a moment");
    let later = now + Duration::from_secs(11);
    store.take(News::Failed(Kind::NodeAgent, Fault::Unknown), later);
    assert!(store.is_listed(later));
    assert!(
        store.problems(later)[0].message.contains("the rest is served without them"),
        "{:?}",
        store.problems(later)
    );
    // What is known of it does not depend on an API server that is away for a moment.
    for fault in [Fault::Away("no".to_owned()), Fault::Unknown] {
        store.take(News::Failed(Kind::NodeAgent, fault), later);
        assert!(store.is_listed(later));
    }
    store.take(News::Begun(Kind::NodeAgent), later);
    store.take(News::Listed(Kind::NodeAgent), later);
    assert_eq!(store.problems(later), []);
    let mut store = Store::new(&of_node());
    store.take(News::Failed(Kind::Service, Fault::Forbidden("no".to_owned())), now);
    assert!(!store.is_listed(later));
}
