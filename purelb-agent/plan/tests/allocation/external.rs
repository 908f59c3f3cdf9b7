//! Addresses of sidecars: what is asked, what of an answer counts, and what a sidecar is told.
#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use purelb_plan::alloc::claim::annotation;
use purelb_plan::alloc::external::{Call, Debt, Fault, Sidecars, What};
use purelb_plan::alloc::group::{Announce, External, Group, Spec};
use purelb_plan::observed::Family::{V4, V6};

use crate::rules::{Cluster, families, pools, set};

fn cluster() -> Cluster {
    let external = External { provider: "netbox".into(), socket: "/run/x.sock".into(), announce: Announce::Remote };
    let external = Spec { external: Some(external), exclude: vec!["10.9.0.9".into()], ..Spec::default() };
    let local = Spec { local: Some(pools(&["10.0.0.0/29"])), ..Spec::default() };
    Cluster::new(&[("default", local), ("x", external)])
}

fn of_x(families: &[purelb_plan::observed::Family]) -> impl FnOnce(&mut purelb_plan::alloc::claim::Claim) + use<> {
    let change = crate::rules::families(families);
    move |claim| {
        change(claim);
        set(annotation::SERVICE_GROUP, "x")(claim);
    }
}

/// What a sidecar says: addresses, or a code and why.
type Said<'a> = Result<&'a [&'a str], (&'static str, &'a str)>;

fn whats(calls: &[Call]) -> Vec<What> {
    calls.iter().map(|call| call.what.clone()).collect()
}

fn gone(code: &'static str) -> Fault {
    Fault { code, message: "no".to_owned(), answered: false }
}

fn no(code: &'static str) -> Fault {
    Fault { code, message: "no".to_owned(), answered: true }
}

fn release(service: &str, ip: Option<&str>) -> Call {
    let what = What::Release(ip.map(|ip| ip.parse().unwrap()));
    Call { service: service.into(), group: "x".into(), socket: "/run/x.sock".into(), what }
}

#[test]
fn a_sidecar_gives_all_families_or_none() {
    let mut c = cluster();
    assert_eq!(c.apply("x/a", of_x(&[V6, V4])), "", "nothing is said before the answer");
    assert_eq!(c.ask("x/a").unwrap().families, [V6, V4]);
    assert_eq!(c.answer("x/a", Ok(&["10.9.0.1"])), "SidecarFailed");
    assert_eq!(c.answer("x/a", Ok(&["10.9.0.1", "2001:db8::1", "10.9.0.1"])), "2001:db8::1 10.9.0.1", "in their order");
    let want = [("allocated-by", "PureLB"), ("allocated-from", "x"), ("pool-type", "remote"), ("service-group", "x")];
    let want = want.map(|(key, value)| (format!("purelb.io/{key}"), value));
    assert!(c.annotations("x/a").into_iter().eq(want.iter().map(|(k, v)| (k.as_str(), *v))), "{:?}", c.claim("x/a"));
    assert!(c.ask("x/a").is_none());
    // No range tells whose they are, so its own words count after a restart.
    c.restart();
    assert_eq!(c.said("x/a"), "2001:db8::1 10.9.0.1");
    assert_eq!(c.apply("x/a", families(&[V4])), "10.9.0.1");
    assert_eq!(c.apply("x/a", families(&[V4, V6])), "10.9.0.1");
    assert_eq!(c.ask("x/a").unwrap().families, [V6], "only what is missing");
    assert_eq!(c.answer("x/a", Ok(&["2001:db8::2"])), "10.9.0.1 2001:db8::2");
    assert_eq!(c.apply("x/b", of_x(&[])), "");
    assert_eq!(c.ask("x/b").unwrap().families, [], "PureLB wants neither then");
    assert_eq!(c.answer("x/b", Ok(&["2001:db8::3"])), "2001:db8::3");
    // A group of ranges and one of a sidecar.
    assert_eq!(c.apply("x/c", |_| {}), "10.0.0.0");
    assert_eq!(c.apply("x/c", of_x(&[V4, V6])), "10.0.0.0");
    assert_eq!(c.answer("x/c", Ok(&["2001:db8::4"])), "10.0.0.0 2001:db8::4");
    assert_eq!(c.annotations("x/c")[annotation::ALLOCATED_FROM], "default, x");
    c.restart();
    assert_eq!(c.annotations("x/c")[annotation::ALLOCATED_FROM], "default, x");
}

#[test]
fn a_sidecar_may_have_lost_its_mind() {
    let mut c = cluster();
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.0");
    c.apply("x/b", of_x(&[V4]));
    assert_eq!(c.answer("x/b", Ok(&["10.9.0.1"])), "10.9.0.1");
    c.apply("x/c", of_x(&[V4]));
    let rows: [(Said<'_>, &str); 10] = [
        (Ok(&["10.9.0.1"]), "gave 10.9.0.1, which Service x/b has"),
        (Ok(&["10.0.0.5"]), "gave 10.0.0.5, which is of ServiceGroup default"),
        (Ok(&["10.9.0.9"]), "gave 10.9.0.9, which spec.exclude names"),
        (Ok(&["2001:db8::1"]), "gave 2001:db8::1, and was not asked for IPv6"),
        (Ok(&["127.0.0.1"]), "gave 127.0.0.1, which no Service can have"),
        (Ok(&["224.0.0.1"]), "gave 224.0.0.1, which no Service can have"),
        (Ok(&["0.0.0.0"]), "gave 0.0.0.0, which no Service can have"),
        (Ok(&["255.255.255.255"]), "gave 255.255.255.255, which no Service can have"),
        (Ok(&[]), "gave no IPv4 address"),
        (Err(("ResourceExhausted", "full")), "answers ResourceExhausted: full"),
    ];
    for (answer, want) in rows {
        assert_eq!(c.answer("x/c", answer), "SidecarFailed", "{want}");
        let said = c.claim("x/c").condition.clone().unwrap().message;
        assert_eq!(said, format!("the sidecar of ServiceGroup x {want}: see its log, and spec.external of the group"));
        assert!(c.ask("x/c").is_some(), "it is asked again");
    }
    assert_eq!(c.answer("x/c", Ok(&["10.9.0.2"])), "10.9.0.2");
    let pin = set(annotation::ADDRESSES, "10.9.0.7");
    assert_eq!(c.apply("x/d", pin), "AddressOutsidePools", "as with PureLB");
    c.apply("x/e", set(annotation::SERVICE_GROUP, "x"));
    assert_eq!(c.apply("x/e", set(annotation::MULTI_POOL, "true")), "MultiPoolRefused");
}

/// PureLB asks every sidecar for every new Service, so that one that is away holds up all of them.
#[test]
fn defect_an_outage_delays_only_its_own() {
    let (mut c, mut sidecars) = (cluster(), Sidecars::new(Vec::new()));
    assert_eq!(c.apply("x/a", |_| {}), "10.0.0.0");
    c.apply("x/b", of_x(&[V4]));
    let calls = c.calls(&mut sidecars);
    assert_eq!(calls.len(), 1, "{calls:?}");
    assert!(sidecars.done(&calls[0], Err(gone("Unavailable")), c.now), "news");
    c.apply("x/c", of_x(&[V4]));
    assert_eq!(c.calls(&mut sidecars), [], "it rests");
    c.calls(&mut sidecars);
    assert_eq!((c.said("x/b").as_str(), c.said("x/c").as_str()), ("SidecarFailed", "SidecarFailed"), "all are told");
    assert_eq!(c.apply("x/d", |_| {}), "10.0.0.1");
    c.remove("x/a");
    assert_eq!(c.calls(&mut sidecars), [], "a release concerns nobody else either");
    for round in 0..10 {
        c.now += 15_000;
        let calls = c.calls(&mut sidecars);
        assert_eq!(calls.len(), 2, "at least every 15 s, round {round}");
        assert!(!calls.iter().any(|call| sidecars.done(call, Err(gone("DeadlineExceeded")), c.now)), "no news");
    }
    c.now += 15_000;
    let calls = c.calls(&mut sidecars);
    assert!(sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into()]), c.now), "news");
    assert!(!sidecars.done(&calls[1], Ok(vec![[10, 9, 0, 2].into()]), c.now));
    c.calls(&mut sidecars);
    assert_eq!((c.said("x/b").as_str(), c.said("x/c").as_str()), ("10.9.0.1", "10.9.0.2"));
}

#[test]
fn a_sidecar_is_told_what_is_free_and_what_is_held() {
    let (mut c, mut sidecars) = (cluster(), Sidecars::new(Vec::new()));
    c.apply("x/a", of_x(&[V4, V6]));
    let calls = c.calls(&mut sidecars);
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into(), "2001:db8::1".parse().unwrap()]), c.now);
    assert_eq!(c.calls(&mut sidecars), []);
    assert_eq!(c.said("x/a"), "10.9.0.1 2001:db8::1");
    assert_eq!(c.apply("x/a", families(&[V4])), "10.9.0.1");
    assert_eq!(c.calls(&mut sidecars), [release("x/a", Some("2001:db8::1"))]);
    // A new leader tells before it asks: this one has lost its memory.
    let mut sidecars = Sidecars::new(sidecars.debts().iter().cloned().collect());
    c.restart();
    c.apply("x/b", of_x(&[V4]));
    let calls = c.calls(&mut sidecars);
    let hold = What::Hold { ip: [10, 9, 0, 1].into(), key: None };
    assert_eq!(calls, [release("x/a", Some("2001:db8::1"))], "one call at a time for a Service");
    sidecars.done(&calls[0], Ok(Vec::new()), c.now);
    let calls = c.calls(&mut sidecars);
    assert_eq!(whats(&calls), std::slice::from_ref(&hold));
    sidecars.done(&calls[0], Err(no("AlreadyExists")), c.now);
    let calls = c.calls(&mut sidecars);
    assert!(matches!(calls[..], [Call { what: What::Allocate(_), .. }]), "{calls:?}");
    // It gives what another one has: that is refused, given back, and it hears again what is held.
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into()]), c.now);
    let calls = c.calls(&mut sidecars);
    assert_eq!(whats(&calls), [What::Release(Some([10, 9, 0, 1].into()))], "as long as it is another one's to it");
    sidecars.done(&calls[0], Ok(Vec::new()), c.now);
    let calls = c.calls(&mut sidecars);
    assert_eq!(whats(&calls), [hold]);
    sidecars.done(&calls[0], Ok(Vec::new()), c.now);
    assert_eq!(c.calls(&mut sidecars), [], "and is not asked again at once");
    c.now += 1_000;
    let calls = c.calls(&mut sidecars);
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 2].into()]), c.now);
    c.calls(&mut sidecars);
    assert_eq!(c.said("x/b"), "10.9.0.2");
    c.remove("x/a");
    assert_eq!(c.calls(&mut sidecars), [release("x/a", None)]);
    let debt = Debt { service: "x/a".into(), group: "x".into(), socket: "/run/x.sock".into(), ip: None };
    assert!(sidecars.debts().contains(&debt));
    // It was not done: by the next leader, though nothing names it any more.
    let mut sidecars = Sidecars::new(sidecars.debts().iter().cloned().collect());
    c.restart();
    let calls = c.calls(&mut sidecars);
    assert!(calls.contains(&release("x/a", None)), "{calls:?}");
    for call in &calls {
        sidecars.done(call, Ok(Vec::new()), c.now);
    }
    assert_eq!(c.calls(&mut sidecars), []);
    assert!(sidecars.debts().is_empty());
}

/// Of a Service that has others what a lost answer named would stay with the sidecar.
#[test]
fn an_answer_that_was_lost_is_asked_for_again() {
    let (mut c, mut sidecars) = (cluster(), Sidecars::new(Vec::new()));
    c.apply("x/a", of_x(&[V4]));
    let calls = c.calls(&mut sidecars);
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into()]), c.now);
    c.calls(&mut sidecars);
    assert_eq!(c.apply("x/a", families(&[V4, V6])), "10.9.0.1");
    let lost = c.calls(&mut sidecars);
    sidecars.done(&lost[0], Err(gone("DeadlineExceeded")), c.now);
    c.apply("x/a", families(&[V4]));
    c.now += 1_000;
    assert_eq!(c.calls(&mut sidecars), lost, "what did it give?");
    // What cannot be read is as good as lost, and asked for less and less often.
    let garbled = Fault { code: "InvalidAnswer", ..no("") };
    sidecars.done(&lost[0], Err(garbled), c.now);
    assert_eq!(c.calls(&mut sidecars), []);
    c.now += 1_000;
    assert_eq!(c.calls(&mut sidecars), lost);
    sidecars.done(&lost[0], Ok(vec!["2001:db8::1".parse().unwrap()]), c.now);
    let calls = c.calls(&mut sidecars);
    assert_eq!(calls, [release("x/a", Some("2001:db8::1"))]);
    sidecars.done(&calls[0], Ok(Vec::new()), c.now);
    assert_eq!(c.calls(&mut sidecars), []);
    assert_eq!(c.said("x/a"), "10.9.0.1");
}

/// Not only a new leader's: a group that comes later or goes back to its sidecar, another socket.
#[test]
fn a_sidecar_hears_of_what_it_did_not_give() {
    let (mut c, mut sidecars) = (cluster(), Sidecars::new(Vec::new()));
    c.apply("x/a", of_x(&[V4]));
    let calls = c.calls(&mut sidecars);
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into()]), c.now);
    assert_eq!(c.calls(&mut sidecars), [], "it knows");
    let hold = [What::Hold { ip: [10, 9, 0, 1].into(), key: None }];
    let external = |socket: &str| {
        let external = External { provider: "p".into(), socket: socket.into(), announce: Announce::Remote };
        Spec { external: Some(external), ..Spec::default() }
    };
    c.group("x", external("/run/y.sock"));
    let calls = c.calls(&mut sidecars);
    assert_eq!((whats(&calls), calls[0].socket.as_str()), (hold.to_vec(), "/run/y.sock"));
    sidecars.done(&calls[0], Ok(Vec::new()), c.now);
    assert_eq!(c.calls(&mut sidecars), []);
    // This leader finds ranges, and then the sidecar.
    c.group("x", Spec { local: Some(pools(&["10.8.0.0/29"])), ..Spec::default() });
    let mut sidecars = Sidecars::new(Vec::new());
    c.restart();
    assert_eq!(c.calls(&mut sidecars), []);
    c.group("x", external("/run/x.sock"));
    let calls = c.calls(&mut sidecars);
    assert_eq!(whats(&calls), hold);
    sidecars.done(&calls[0], Err(no("AlreadyExists")), c.now);
    assert_eq!(c.calls(&mut sidecars), [], "once");
    assert_eq!(c.said("x/a"), "10.9.0.1");
}

/// The next Service of the name waits for what the former one had, and is told so.
#[test]
fn a_sidecar_takes_nothing_back() {
    let (mut c, mut sidecars) = (cluster(), Sidecars::new(Vec::new()));
    c.apply("x/a", of_x(&[V4]));
    let calls = c.calls(&mut sidecars);
    sidecars.done(&calls[0], Ok(vec![[10, 9, 0, 1].into()]), c.now);
    c.calls(&mut sidecars);
    c.remove("x/a");
    let calls = c.calls(&mut sidecars);
    assert_eq!(calls, [release("x/a", None)]);
    sidecars.done(&calls[0], Err(no("FailedPrecondition")), c.now);
    assert_eq!(c.apply("x/a", of_x(&[V4])), "");
    c.calls(&mut sidecars);
    assert_eq!(c.calls(&mut sidecars), []);
    let message = c.claim("x/a").condition.clone().unwrap().message;
    assert!(message.contains("answers FailedPrecondition: does not take back what was given before: no"), "{message}");
    // A group that is gone, and its sidecar too: at some time that is all.
    c.now += 1_000;
    let call = c.calls(&mut sidecars).remove(0);
    c.group("x", Spec::default());
    c.remove("x/a");
    for _ in 0..30 {
        sidecars.done(&call, Err(gone("Unavailable")), c.now);
        c.now += 15_000;
        c.calls(&mut sidecars);
    }
    assert!(sidecars.debts().is_empty(), "{:?}", sidecars.debts());
}

#[test]
fn a_path_that_no_socket_has() {
    for (socket, fits) in [
        ("/run/x.sock".to_owned(), true),
        (format!("/{}", "x".repeat(106)), true),
        (format!("/{}", "x".repeat(107)), false),
        ("x.sock".to_owned(), false),
        ("unix:///run/x.sock".to_owned(), false),
        ("/run/\0".to_owned(), false),
        (String::new(), false),
    ] {
        let external = External { provider: "p".into(), socket: socket.clone(), announce: Announce::Remote };
        let found = Group::parse("purelb", "x", &Spec { external: Some(external), ..Spec::default() });
        assert_eq!(found.is_ok(), fits, "{socket:?}: {found:?}");
    }
}
