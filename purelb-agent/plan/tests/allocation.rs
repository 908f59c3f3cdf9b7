//! Allocation: its laws against a random model, and PureLB's rules one by one. Invariants I12, I13 and I17.

use purelb_plan::alloc::claim::{Claim, annotation};
use purelb_plan::alloc::group::{Announce, External, Spec};
use purelb_plan::observed::Family::{V4, V6};

use chance::Chance;
use model::{Count, Model, PAUSE};
use rules::{Cluster, families, pools, set, shared};

#[path = "laws/chance.rs"]
mod chance;
#[path = "allocation/external.rs"]
mod external;
#[path = "allocation/model.rs"]
mod model;
#[path = "allocation/rules.rs"]
mod rules;
#[path = "allocation/sidecar.rs"]
mod sidecar;

#[test]
fn no_address_twice_and_nothing_moves() {
    let mut sum = Count::default();
    for seed in 0..1500 {
        let mut model = Model::new(Chance(seed), &[]);
        for round in 0..4 {
            println!("seed {seed} round {round}");
            (0..150).for_each(|_| model.step());
            model.rest();
        }
        let Count { landed, lost, given, shared, refused, restarts, asked, external } = model.count;
        sum.landed += landed;
        sum.lost += lost;
        sum.given += given;
        sum.shared += shared;
        sum.refused += refused;
        sum.restarts += restarts;
        sum.asked += asked;
        sum.external += external;
    }
    println!("{sum:?}");
    assert!(sum.external > 5_000 && sum.asked < 100 * sum.external, "sidecars are too tame, or pestered: {sum:?}");
    let tame = sum.given < 10_000 || sum.shared < 300 || sum.restarts < 1000 || sum.lost < 1000 || sum.refused < 1000;
    assert!(!tame, "the model is too tame: {sum:?}");
}

#[test]
fn the_first_free_address_in_order_of_the_pools() {
    let mut c = Cluster::of(&["10.0.0.9-10.0.0.10", "10.0.0.1/32", "2001:db8::/127"]);
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.9");
    assert_eq!(c.apply("x/b", |_| {}), "10.0.0.10");
    assert_eq!(c.apply("x/c", |_| {}), "10.0.0.1");
    assert_eq!(c.apply("x/d", |_| {}), "PoolExhausted");
    assert_eq!(c.apply("x/e", families(&[V6, V4])), "PoolExhausted", "all families or none");
    assert_eq!(c.apply("x/f", families(&[V6])), "2001:db8::", "and nothing of it is kept back");
    c.remove("x/b");
    assert_eq!((c.said("x/d"), c.said("x/e")), ("10.0.0.10".to_owned(), "PoolExhausted".to_owned()), "the elder first");
    let want = [
        (annotation::ALLOCATED_BY, "PureLB"),
        (annotation::ALLOCATED_FROM, "default"),
        (annotation::POOL_TYPE, "local"),
    ];
    assert_eq!(c.annotations("x/a"), want.into());
}

#[test]
fn a_freed_address_rests() {
    let mut c = Cluster::of(&["10.0.0.0/30"]);
    assert_eq!((c.apply("x/a", |_| {}), c.apply("x/b", |_| {})), ("10.0.0.0".to_owned(), "10.0.0.1".to_owned()));
    c.remove("x/a");
    assert_eq!(c.apply("x/c", |_| {}), "10.0.0.2", "used last");
    c.now += PAUSE;
    assert_eq!(c.apply("x/d", |_| {}), "10.0.0.0", "like any other again");
    c.remove("x/b");
    c.now += 1;
    c.remove("x/c");
    assert_eq!(c.apply("x/e", |_| {}), "10.0.0.3");
    assert_eq!(c.apply("x/f", |_| {}), "10.0.0.1", "the one that rests longest, when there is no other");
    assert_eq!(c.apply("x/g", set(annotation::ADDRESSES, "10.0.0.2")), "10.0.0.2", "whoever asks for it");
}

#[test]
fn it_rests_under_the_next_leader() {
    let mut c = Cluster::of(&["10.0.0.0/29"]);
    assert_eq!((c.apply("x/a", |_| {}), c.apply("x/b", |_| {})), ("10.0.0.0".to_owned(), "10.0.0.1".to_owned()));
    c.remove("x/a");
    c.now += PAUSE / 2;
    c.restart();
    assert_eq!(c.apply("x/c", |_| {}), "10.0.0.2", "used last");
    c.now += PAUSE / 2;
    assert_eq!(c.apply("x/d", |_| {}), "10.0.0.0", "no longer than under the former one");
    c.remove("x/b");
    c.allocator.rest([("10.0.0.3".parse().unwrap(), u64::MAX), ("10.0.0.0".parse().unwrap(), PAUSE)], c.now);
    assert_eq!(c.apply("x/e", |_| {}), "10.0.0.4", "10.0.0.1 and 10.0.0.3 rest");
    c.now += PAUSE;
    assert_eq!(c.apply("x/f", |_| {}), "10.0.0.1", "and never longer than that");
    assert_eq!((c.apply("x/g", |_| {}), c.said("x/d")), ("10.0.0.3".to_owned(), "10.0.0.0".to_owned()));
}

#[test]
fn families_come_and_go() {
    let mut c = Cluster::of(&["10.0.0.0/29", "2001:db8::/64"]);
    assert_eq!(c.apply("x/a", families(&[V6])), "2001:db8::");
    assert_eq!(c.apply("x/a", families(&[V6, V4])), "2001:db8:: 10.0.0.0", "what it has stays");
    c.restart();
    assert_eq!(c.said("x/a"), "2001:db8:: 10.0.0.0");
    assert_eq!(c.apply("x/a", families(&[V4])), "10.0.0.0");
    assert_eq!(c.events, ["AddressAssigned", "AddressAssigned", "AddressReleased"]);
    assert_eq!(c.apply("x/b", families(&[])), "10.0.0.1", "no family is named: one address");
    assert_eq!(c.apply("x/b", set("purelb.io/allow-local", "")), "10.0.0.1");
    let mut six = Cluster::of(&["2001:db8::/64"]);
    assert_eq!(six.apply("x/b", families(&[])), "2001:db8::", "of a family that the group has");
}

/// Section 11.2: no address is named twice, families are asked for, nothing is left of what failed.
#[test]
fn asked_for_by_address() {
    let mut c = Cluster::of(&["10.0.0.0/29", "2001:db8::/64"]);
    let pin = |list| set(annotation::ADDRESSES, list);
    assert_eq!(c.apply("x/a", pin("10.0.0.5")), "10.0.0.5");
    assert_eq!(c.apply("x/b", pin("10.0.0.5")), "SharingKeyConflict");
    assert_eq!(c.apply("x/c", pin("10.1.0.5")), "AddressOutsidePools");
    assert_eq!(c.apply("x/d", pin("")), "InvalidRequest");
    assert_eq!(c.apply("x/e", pin("2001:db8::5")), "InvalidRequest", "PureLB gives it on every sync");
    assert_eq!(c.apply("x/f", pin("10.0.0.6, 10.0.0.6")), "10.0.0.6", "PureLB would name it twice");
    assert_eq!(c.apply("x/a", pin("10.0.0.7")), "10.0.0.5", "only as long as it has nothing");
    // PureLB appends the address again on every sync.
    let both = |claim: &mut Claim| {
        families(&[V4, V6])(claim);
        pin("10.0.0.1")(claim);
    };
    assert_eq!(c.apply("x/g", both), "10.0.0.1");
    assert_eq!(c.apply("x/g", set("purelb.io/allow-local", "")), "10.0.0.1");
    // At a fault of the second nothing of the first is left.
    assert_eq!(c.apply("x/h", pin("10.0.0.2,10.0.0.5")), "SharingKeyConflict");
    assert_eq!(c.apply("x/i", pin("10.0.0.2")), "10.0.0.2");
    c.events.clear();
    assert_eq!(c.apply("x/j", |claim| claim.load_balancer_ip = Some("10.0.0.3".to_owned())), "10.0.0.3");
    assert_eq!(c.events, ["DeprecationWarning", "AddressAssigned"]);
    c.events.clear();
    let named = |claim: &mut Claim| {
        set(annotation::SERVICE_GROUP, "other")(claim);
        pin("10.0.0.4")(claim);
    };
    assert_eq!(c.apply("x/k", named), "10.0.0.4");
    assert_eq!(c.events, ["ConfigurationWarning", "AddressAssigned"]);
}

/// Sections 11.8 and 11.18: at a port conflict nothing is searched, and affinity beside sharing is told.
#[test]
fn shared_by_a_key() {
    let mut c = Cluster::of(&["10.0.0.0/29"]);
    assert_eq!(c.apply("x/a", shared("k", 80)), "10.0.0.0");
    assert_eq!(c.apply("y/b", shared("k", 443)), "10.0.0.0", "whatever their namespaces");
    assert_eq!(c.apply("x/c", shared("k", 443)), "PortConflict", "and never another address");
    assert_eq!(c.apply("x/d", shared("l", 443)), "10.0.0.1");
    assert_eq!(c.apply("x/e", |_| {}), "10.0.0.2");
    c.remove("x/a");
    c.remove("y/b");
    assert_eq!(c.said("x/c"), "10.0.0.3", "the key is free with its last user");
    assert_eq!(c.apply("x/e", shared("k", 80)), "10.0.0.2", "a key that comes later moves nothing");
    // PureLB ignores the affinity and says nothing.
    c.events.clear();
    c.apply("x/f", |claim| {
        shared("m", 80)(claim);
        set(annotation::NODE_AFFINITY, "service-endpoints")(claim);
    });
    assert_eq!(c.events, ["AddressAssigned", "ConfigurationWarning"]);
    // PureLB walks through the whole pool at a port conflict; 2^64 addresses would never end.
    let mut six = Cluster::of(&["2001:db8::/64"]);
    for name in ["x/a", "x/b"] {
        six.apply(name, |claim| {
            families(&[V6])(claim);
            shared("k", 80)(claim);
        });
    }
    assert_eq!((six.said("x/a"), six.said("x/b")), ("2001:db8::".to_owned(), "PortConflict".to_owned()));
}

#[test]
fn one_of_every_range() {
    let mut spec =
        pools(&["10.0.1.0/31 of 10.0.1.0/24", "10.0.2.0/31 of 10.0.2.9/24", "2001:db8:1::/64 of 2001:db8:1::/64"]);
    spec.multi_pool = true;
    let mut c = Cluster::new(&[("default", Spec { local: Some(spec.clone()), ..Spec::default() })]);
    c.subnets(&["10.0.1.0/24", "2001:db8:1::/64"]);
    assert_eq!(c.apply("x/a", |_| {}), "10.0.1.0", "only where nodes are");
    c.subnets(&["10.0.1.0/24", "10.0.2.0/24", "2001:db8:1::/64"]);
    c.run();
    assert_eq!(c.said("x/a"), "10.0.1.0 10.0.2.0", "a new network, named by any of its addresses");
    c.subnets(&[]);
    c.run();
    assert_eq!(c.said("x/a"), "10.0.1.0 10.0.2.0", "never taken away");
    assert_eq!(c.apply("x/b", |_| {}), "PoolExhausted");
    c.subnets(&["10.0.1.0/24", "10.0.2.0/24", "2001:db8:1::/64"]);
    c.run();
    assert_eq!(c.said("x/b"), "10.0.1.1 10.0.2.1");
    assert_eq!(c.apply("x/c", set(annotation::MULTI_POOL, "false")), "PoolExhausted");
    assert_eq!(c.apply("x/d", shared("k", 80)), "MultiPoolRefused");
    assert_eq!(c.apply("x/e", families(&[V6, V4])), "2001:db8:1::", "what there is");
    c.remove("x/b");
    assert_eq!(c.said("x/c"), "10.0.1.1", "the elder first");
    assert_eq!(c.said("x/e"), "2001:db8:1:: 10.0.2.1");
    let tampered = set(annotation::ALLOCATED_FROM, "other");
    c.apply("x/a", tampered);
    assert_eq!(c.annotations("x/a")[annotation::ALLOCATED_FROM], "default");
    spec.balance_pools = true;
    c.group("default", Spec { local: Some(spec), ..Spec::default() });
    assert_eq!(c.apply("x/f", |_| {}), "MultiPoolRefused");
    let mut remote =
        Cluster::new(&[("default", Spec { remote: Some(pools(&["10.0.1.0/31", "10.0.2.0/31"])), ..Spec::default() })]);
    assert_eq!(remote.apply("x/a", set(annotation::MULTI_POOL, "true")), "10.0.1.0 10.0.2.0", "every node is there");
}

#[test]
fn the_emptiest_range_first() {
    let mut spec = pools(&["10.0.1.0/29", "10.0.2.0/29"]);
    spec.balance_pools = true;
    let mut c = Cluster::new(&[("default", Spec { local: Some(spec), ..Spec::default() })]);
    let names = ["x/a", "x/b", "x/c", "x/d"];
    let got: Vec<_> = names.iter().map(|name| c.apply(name, |_| {})).collect();
    assert_eq!(got, ["10.0.1.0", "10.0.2.0", "10.0.1.1", "10.0.2.1"]);
    c.remove("x/b");
    assert_eq!(c.apply("x/e", |_| {}), "10.0.2.2");
    assert_eq!(c.apply("x/f", shared("k", 80)), "10.0.1.2", "a key goes by the order");
}

/// Section 11.15: an address of ours without a brand is ours, where only the first of PureLB's two writes was done.
#[test]
fn whose_services() {
    let mut c = Cluster::of(&["10.0.0.0/29"]);
    let class = |name: &'static str| move |claim: &mut Claim| claim.class = Some(name.to_owned());
    assert_eq!(c.apply("x/a", class("purelb.io/purelb")), "");
    assert_eq!(c.apply("x/b", class("purelb.io/purelbv2")), "10.0.0.0");
    assert_eq!(c.apply("x/c", |claim| claim.unready = true), "");
    assert_eq!(c.apply("x/c", |claim| claim.unready = false), "10.0.0.1");
    // Somebody else's address, in our pool or not, is left alone and never given.
    let theirs = |claim: &mut Claim| claim.ingress = vec!["10.0.0.2".parse().unwrap()];
    assert_eq!(c.apply("x/d", theirs), "10.0.0.2 ForeignAddress");
    assert_eq!(c.apply("x/e", |claim| (theirs(claim), class("else")(claim)).0), "10.0.0.2");
    assert_eq!(c.apply("x/f", |_| {}), "10.0.0.3");
    // PureLB died between its two writes.
    let half = |claim: &mut Claim| {
        claim.ingress = vec!["10.0.0.7".parse().unwrap()];
        set(annotation::ALLOCATED_FROM, "default")(claim);
    };
    assert_eq!(c.apply("x/g", half), "10.0.0.7");
    assert_eq!(c.annotations("x/g")[annotation::ALLOCATED_BY], "PureLB");
}

/// Section 11.12: whatever the status says by then.
#[test]
fn another_type_releases() {
    let mut c = Cluster::of(&["10.0.0.0/32"]);
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.0");
    assert_eq!(c.apply("x/b", |_| {}), "PoolExhausted");
    // The API server has cleared the status by then, and PureLB releases nothing.
    c.events.clear();
    c.apply("x/a", |claim| (claim.load_balancer, claim.ingress) = (false, Vec::new()));
    assert_eq!(c.said("x/b"), "10.0.0.0");
    assert!(!c.annotations("x/a").contains_key(annotation::ALLOCATED_FROM));
    assert!(c.claim("x/a").condition.is_none() && c.events.contains(&"AddressReleased"), "{:?}", c.events);
    c.apply("x/b", |claim| claim.load_balancer = false);
    assert_eq!(c.said("x/b"), "", "or has not");
}

#[test]
fn what_is_in_use_never_moves() {
    let mut c = Cluster::of(&["10.0.0.0/31"]);
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.0");
    c.group("default", Spec { local: Some(pools(&["10.9.0.0/31"])), ..Spec::default() });
    c.restart();
    assert_eq!(c.said("x/a"), "10.0.0.0", "its pool is gone");
    assert_eq!(c.apply("x/a", set(annotation::SERVICE_GROUP, "default")), "10.0.0.0");
    assert_eq!(c.apply("x/a", set(annotation::RE_EVALUATE, "true")), "10.0.0.0");
    assert!(!c.annotations("x/a").contains_key(annotation::RE_EVALUATE));
    c.apply("x/a", |claim| claim.ingress.clear());
    assert_eq!(c.said("x/a"), "10.9.0.0", "what somebody wiped out is given from what there is");
    c.apply("x/a", |claim| claim.ingress.clear());
    assert_eq!(c.said("x/a"), "10.9.0.0", "the same again where that is still allowed");
}

#[test]
fn refused_by_the_group() {
    let local = |ranges: &[&str]| Spec { local: Some(pools(ranges)), ..Spec::default() };
    let fenced = Spec { namespaces: vec!["red".to_owned()], enforce_namespaces: true, ..local(&["10.0.1.0/29"]) };
    let announce = Announce::Remote;
    let external = External { provider: "netbox".to_owned(), socket: "/run/ipam.sock".to_owned(), announce };
    let mut c = Cluster::new(&[
        ("default", Spec { exclude: vec!["10.0.0.0-10.0.0.2".to_owned()], ..local(&["10.0.0.0/29"]) }),
        ("fenced", fenced),
        ("broken", local(&["10.0.2.9-10.0.2.1"])),
        ("far", Spec { external: Some(external), ..Spec::default() }),
    ]);
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.3", "excluded ones are left out");
    assert_eq!(c.apply("x/b", set(annotation::ADDRESSES, "10.0.0.1")), "AddressExcluded");
    assert_eq!(c.apply("x/c", set(annotation::SERVICE_GROUP, "none")), "UnknownGroup");
    assert_eq!(c.apply("x/d", set(annotation::SERVICE_GROUP, "broken")), "NoUsableGroup");
    assert_eq!(c.apply("x/e", set(annotation::SERVICE_GROUP, "fenced")), "NamespaceDenied");
    assert_eq!(c.apply("x/f", set(annotation::ADDRESSES, "10.0.1.1")), "NamespaceDenied", "by address neither");
    assert_eq!(c.apply("red/g", |_| {}), "10.0.1.0");
    assert_eq!(c.apply("red/h", set(annotation::SERVICE_GROUP, "default")), "NamespaceDenied");
    assert_eq!(c.apply("x/i", set(annotation::SERVICE_GROUP, "far")), "", "its sidecar is asked first");
    // Told once, not at every look.
    c.events.clear();
    c.apply("x/c", set("purelb.io/allow-local", ""));
    assert_eq!(c.events, [""; 0]);
    c.group("none", local(&["10.0.3.0/29"]));
    c.run();
    assert_eq!(c.said("x/c"), "10.0.3.0", "and given as soon as it can be");
}
