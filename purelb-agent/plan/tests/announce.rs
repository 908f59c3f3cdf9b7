//! Announcement: at most one node answers for a local address, at every instant, whatever fails; and soon one does again.
//! Invariant I16.

use std::collections::BTreeSet;
use std::net::IpAddr;

use purelb_plan::announce::election::Preference;
use purelb_plan::announce::owner::{Owner, Phase, Stop};

use model::{Count, Model};

#[path = "announce/api.rs"]
mod api;
#[path = "laws/chance.rs"]
mod chance;
#[path = "announce/mixed.rs"]
mod mixed;
#[path = "announce/model.rs"]
mod model;
#[path = "announce/moves.rs"]
mod moves;
#[path = "announce/room.rs"]
mod room;

const A: &str = "192.0.2.0/24";
const B: &str = "198.51.100.0/24";
const C: &str = "2001:db8::/64";
const IPS: [&str; 4] = ["192.0.2.10", "192.0.2.11", "198.51.100.7", "2001:db8::7"];

fn preference(model: &mut Model) -> Preference {
    let nodes: BTreeSet<String> = model.hosts.iter().map(|host| host.node.clone()).collect();
    let mut some: BTreeSet<String> = BTreeSet::new();
    some.extend(nodes.into_iter().filter(|_| model.chance.permille(400)));
    match model.chance.below(3) {
        0 => Preference::None,
        1 => Preference::Prefer(some),
        _ => Preference::Only(some),
    }
}

fn fault(model: &mut Model) {
    let host = model.chance.below(model.hosts.len() as u64) as usize;
    let unit = model.d / 10;
    let long = unit / 2 + model.chance.below(25 * unit);
    match model.chance.below(28) {
        0..3 => model.stall(host, long),
        3..5 => model.cut(host, long),
        5 => model.api_away(long),
        6..9 => model.freeze(host, long),
        9..11 => {
            model.kill(host);
            model.start_after(host, long);
        }
        11..14 => {
            let node = model.hosts[host].node.clone();
            model.delete(&node);
        }
        14..16 => {
            model.stop(host, Stop::Hold);
        }
        16..18 => {
            model.stop(host, Stop::HandOver);
        }
        18..20 => {
            let all = [A, B, C].iter().filter_map(|net| net.parse().ok());
            let some = all.filter(|_| model.chance.permille(700)).collect();
            model.set_subnets(host, some);
        }
        20..26 => {
            let ips: Vec<IpAddr> = model.wants.keys().copied().collect();
            let wanted = preference(model);
            if let Some(ip) = model.chance.pick(&ips) {
                model.prefer(ip, wanted, 3 * unit);
            }
        }
        26 => model.pause(host, long),
        _ => {
            if model.hosts.len() < 6 && model.chance.permille(300) {
                model.count.doubles += 1;
                let node = model.hosts[host].node.clone();
                model.add(&node, &[A, B]);
            }
        }
    }
}

/// One run: faults, then rest. Everything that is checked is checked in here.
fn run(seed: u64) -> Count {
    let mut chance = chance::Chance(seed);
    let d = if chance.permille(700) { 5000 } else { 10_000 };
    let nets: [&[&str]; 4] = [&[A, B, C], &[A, C], &[A, B], &[A, B, C]];
    let nodes = &nets[..2 + chance.below(3) as usize];
    let ips = &IPS[..1 + chance.below(4) as usize];
    let mut model = Model::new(seed, d, nodes, ips);
    // Some begin in good order, some in the middle of trouble.
    if chance.permille(700) {
        model.run(model.now + 2 * d);
    }
    model.calm = false;
    let dense = 1 + chance.below(6);
    for _ in 0..8 {
        fault(&mut model);
        let pause = chance.below(d * dense / 10);
        model.run(model.now + pause);
        model.note();
    }
    model.heal();
    model.run(model.now + 6 * d);
    // Who saw a node hold for an upgrade, and then that its Lease was another one, waits for the end of that hold.
    let haunted = |owner: &Owner| owner.peers().iter().any(|(_, peer)| peer.is_ghost());
    if model.hosts.iter().any(|host| host.process.as_ref().is_some_and(haunted)) {
        model.run(model.now + 65_000);
    }
    rest(&mut model);
    model.total()
}

/// Everything is as it should be, and stays so without a word.
fn rest(model: &mut Model) {
    let names: BTreeSet<String> = model.hosts.iter().map(|host| host.node.clone()).collect();
    for name in names {
        let of = model.hosts.iter().filter(|host| host.node == name);
        let inside = of.filter(|host| host.process.as_ref().is_some_and(|owner| *owner.phase() == Phase::In));
        let inside: Vec<_> = inside.collect();
        assert_eq!(inside.len(), 1, "{name} has one agent that counts");
        for host in inside {
            assert_eq!(host.process.as_ref().map(Owner::subnets), Some(&host.subnets), "{name} stands for election");
        }
    }
    for ip in model.wants.keys() {
        let answers: Vec<_> = model.answers(*ip).into_iter().map(|host| model.hosts[host].node.clone()).collect();
        assert_eq!(answers, Vec::from_iter(model.should(*ip)), "{ip}");
    }
    let busy = model.busy;
    // One that another agent keeps out looks at every renewal of that one.
    let revisions = |model: &Model| -> Vec<_> {
        let owners = model.hosts.iter().filter_map(|host| host.process.as_ref());
        owners.filter(|owner| *owner.phase() == Phase::In).map(Owner::revision).collect()
    };
    let before = revisions(model);
    model.hosts.iter_mut().for_each(|host| host.renewals = 0);
    model.run(model.now + model.d);
    assert_eq!(model.busy, busy, "nothing changed, and something was done");
    assert_eq!(revisions(model), before, "nothing changed, and it is said anew how it stands");
    assert!(model.hosts.iter().all(|host| host.renewals <= 6), "nothing changed, and more was written than renewals");
}

#[test]
fn one_owner_and_soon_one_again() {
    let (first, runs) = (seed("OWNER_SEED", 0), seed("OWNER_RUNS", 10_000));
    let halves = [0, 1].map(|half| {
        std::thread::spawn(move || {
            let (mut sum, mut bad) = ([0; NAMES.len()], Vec::new());
            for seed in (first..first + runs).filter(|seed| seed % 2 == half) {
                match std::panic::catch_unwind(|| run(seed)) {
                    Ok(count) => sum.iter_mut().zip(numbers(&count)).for_each(|(sum, one)| *sum += one),
                    Err(_) => {
                        println!("seed {seed}");
                        bad.push(seed);
                    }
                }
            }
            (sum, bad)
        })
    });
    let (mut sum, mut bad) = ([0; NAMES.len()], Vec::new());
    for half in halves {
        let (of_half, bad_of_half) = half.join().unwrap();
        sum.iter_mut().zip(of_half).for_each(|(sum, one)| *sum += one);
        bad.extend(bad_of_half);
    }
    let said: Vec<_> = NAMES.iter().zip(sum).collect();
    println!("{said:?}");
    assert!(bad.is_empty(), "{} of {runs} seeds: {bad:?}", bad.len());
    assert!(sum.iter().all(|sum| *sum >= runs / 20), "the model is too tame: {said:?}");
}

const NAMES: [&str; 14] = [
    "steps",
    "holds",
    "calls",
    "revoked",
    "conflicts",
    "unknown",
    "late",
    "fenced",
    "adopted",
    "refused",
    "claims",
    "deleted",
    "frozen",
    "doubles",
];

fn numbers(count: &Count) -> [u64; NAMES.len()] {
    let Count { steps, holds, calls, revoked, conflicts, unknown, late, .. } = *count;
    let Count { fenced, adopted, refused, claims, deleted, frozen, doubles, .. } = *count;
    [steps, holds, calls, revoked, conflicts, unknown, late, fenced, adopted, refused, claims, deleted, frozen, doubles]
}

fn seed(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
