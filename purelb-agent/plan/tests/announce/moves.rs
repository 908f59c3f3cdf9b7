//! How long nobody answers when an owner dies, goes, comes or is replaced, in the model's time (issue 5, section 4), and
//! what is done for it. Calls take 2 to 22 ms each way, a watch up to 27.
#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use purelb_plan::announce::election::Preference;
use purelb_plan::announce::owner::{OnApiLoss, Stop};

use crate::model::Model;
use crate::{A, B};

const IP: &str = "192.0.2.10";

fn ip() -> IpAddr {
    IP.parse().unwrap()
}

/// Nodes that have settled who answers.
fn settled(seed: u64, d: u64, nodes: &[&[&str]]) -> Model {
    let mut model = Model::new(seed, d, nodes, &[IP, "192.0.2.11", "192.0.2.12"]);
    model.comes_back = false;
    model.run(model.now + 3 * d);
    model
}

fn owner(model: &Model) -> usize {
    let owners = model.answers(ip());
    assert_eq!(owners.len(), 1, "one answers");
    owners[0]
}

/// The longest time without an answer, in milliseconds, while so much time passes.
fn silence(model: &mut Model, long: u64) -> u64 {
    let (mut since, mut longest) = (None, 0);
    let until = model.now + long;
    while model.now < until {
        model.run(model.now + 1);
        let owners = model.answers(ip()).len();
        assert!(owners <= 1, "two answer");
        let start = *since.get_or_insert(model.now - 1);
        longest = longest.max(model.now - start);
        if owners == 1 {
            longest = longest.max(model.now - 1 - start);
            since = None;
        }
    }
    longest
}

fn worst(name: &str, seeds: u64, bound: u64, mut case: impl FnMut(u64) -> u64) {
    let worst = (0..seeds).map(&mut case).max().unwrap();
    println!("{name}: {worst} ms without answer at worst, {bound} allowed");
    assert!(worst <= bound, "{name}: {worst} ms");
}

#[test]
fn a_node_dies() {
    for (d, bound) in [(10_000, 12_000), (5000, 6500), (2000, 3000)] {
        worst(&format!("node dies, lease {d}"), 60, bound, |seed| {
            let mut model = settled(seed, d, &[&[A], &[A], &[A, B]]);
            let wait = model.chance.below(d);
            model.run(model.now + wait);
            let dies = owner(&model);
            model.destroy(dies);
            silence(&mut model, 2 * d)
        });
    }
}

#[test]
fn a_process_dies_or_freezes() {
    worst("killed and never back", 60, 12_000, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let dies = owner(&model);
        model.kill(dies);
        silence(&mut model, 20_000)
    });
    worst("killed and back after three seconds", 60, 1, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let dies = owner(&model);
        model.kill(dies);
        model.start_after(dies, 3000);
        silence(&mut model, 30_000)
    });
    worst("frozen and woken later", 60, 12_000, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let dies = owner(&model);
        model.freeze(dies, 25_000);
        silence(&mut model, 60_000)
    });
}

#[test]
fn an_owner_goes_or_comes() {
    worst("handed over", 60, 100, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let goes = owner(&model);
        model.stop(goes, Stop::HandOver);
        let silence = silence(&mut model, 5000);
        assert_ne!(owner(&model), goes);
        silence
    });
    worst("a node joins that wins", 60, 150, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let first = owner(&model);
        model.stop(first, Stop::HandOver);
        model.run(model.now + 20_000);
        model.start_after(first, 0);
        let silence = silence(&mut model, 20_000);
        assert_eq!(owner(&model), first, "it has it back");
        silence
    });
    worst("a node joins that wins, while another one is frozen", 60, 150, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let first = owner(&model);
        model.stop(first, Stop::HandOver);
        model.run(model.now + 20_000);
        model.start_after(first, 0);
        model.run(model.now + 9_000);
        let third = (0..3).find(|host| *host != first && *host != owner(&model)).unwrap();
        model.freeze(third, 30_000);
        let silence = silence(&mut model, 30_000);
        assert_eq!(owner(&model), first, "it has it back");
        silence
    });
    worst("endpoints move", 60, 150, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let first = owner(&model);
        let next = model.hosts[(first + 1) % 3].node.clone();
        model.prefer(ip(), Preference::Only(BTreeSet::from([next.clone()])), 100);
        let there = silence(&mut model, 5000);
        assert_eq!(model.hosts[owner(&model)].node, next);
        model.prefer(ip(), Preference::None, 100);
        let back = silence(&mut model, 5000);
        assert_eq!(owner(&model), first);
        there.max(back)
    });
}

#[test]
fn an_upgrade_is_not_noticed() {
    worst("upgrade, 30 seconds between", 60, 1, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let first = owner(&model);
        model.stop(first, Stop::Hold);
        model.start_after(first, 30_000);
        let silence = silence(&mut model, 60_000);
        assert_eq!(owner(&model), first, "it does not move");
        silence
    });
    worst("upgrade that never comes back", 30, 64_000, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A]]);
        let first = owner(&model);
        model.stop(first, Stop::Hold);
        let silence = silence(&mut model, 100_000);
        assert_ne!(owner(&model), first);
        silence
    });
}

#[test]
fn a_new_address_is_answered_at_once() {
    worst("new address", 60, 1, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let new: IpAddr = "192.0.2.99".parse().unwrap();
        model.wants.insert(new, purelb_plan::announce::owner::Want::default());
        model.prefer(new, Preference::None, 50);
        model.run(model.now + 60);
        u64::from(model.answers(new).len() != 1)
    });
    worst("new address, Local policy on a node without the best lot", 60, 150, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        let new: IpAddr = "192.0.2.99".parse().unwrap();
        let mut none_yet = 0;
        for node in ["n0", "n1", "n2"] {
            model.wants.insert(new, purelb_plan::announce::owner::Want::default());
            model.prefer(new, Preference::Only([].into()), 50);
            model.run(model.now + 3000);
            assert!(model.answers(new).is_empty());
            model.prefer(new, Preference::Only([node.to_owned()].into()), 1);
            let start = model.now;
            while model.answers(new).is_empty() && model.now < start + 5000 {
                model.run(model.now + 1);
            }
            none_yet = none_yet.max(model.now - start);
        }
        none_yet
    });
}

#[test]
fn without_the_api_server_all_is_withdrawn_and_comes_back() {
    worst("API server away for a minute", 20, 60_000, |seed| {
        let mut model = settled(seed, 10_000, &[&[A], &[A], &[A]]);
        model.api_away(60_000);
        let before = owner(&model);
        let gone = silence(&mut model, 12_000);
        assert!(model.hosts.iter().all(|host| host.link.is_empty()), "user space withdraws, beside the fence");
        let silence = gone + silence(&mut model, 78_000);
        assert_eq!(owner(&model), before, "everybody has back what it had");
        assert_eq!(model.total().revoked, 0, "and nobody took a deaf one for dead");
        silence
    });
}

#[test]
fn without_the_api_server_addresses_stay_if_so_set() {
    worst("API server away for a minute, onApiLoss Hold", 20, 1, |seed| {
        let mut model = Model::new(seed, 10_000, &[&[A], &[A], &[A]], &[IP]);
        (model.comes_back, model.on_api_loss) = (false, OnApiLoss::Hold);
        model.run(model.now + 30_000);
        let before = owner(&model);
        model.api_away(60_000);
        let silence = silence(&mut model, 90_000);
        assert_eq!(owner(&model), before);
        silence
    });
}
