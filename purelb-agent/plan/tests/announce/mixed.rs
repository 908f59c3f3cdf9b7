//! Among agents of PureLB's, which leave no marks and know no revocation: the same winner, and a good guess of when it may
//! be taken from them.
#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use purelb_plan::announce::election::Preference;
use purelb_plan::announce::lease::{INSTANCE, Lease, SUBNETS, Statement};
use purelb_plan::announce::owner::{Effect, Event, Identity, Owner, Settings, Want};

use crate::api::Api;

/// Our node `node-b`, an API server that answers at once, and PureLB's agents of other nodes.
struct Mixed {
    owner: Owner,
    api: Api,
    now: u64,
    held: Vec<IpAddr>,
}

impl Mixed {
    fn new(ip: &str, want: Want) -> Self {
        let me = Identity { node: "node-b".into(), instance: "pod".into(), place: "here".into(), session: "s".into() };
        let (owner, effects) = Owner::start(me, Settings::default(), &[].into(), 0, 0);
        let mut mixed = Self { owner, api: Api::default(), now: 0, held: Vec::new() };
        mixed.apply(effects);
        mixed.step(Event::Wants(BTreeMap::from([(ip.parse().unwrap(), want)])));
        mixed.step(Event::Subnets(["192.0.2.0/24".parse().unwrap()].into()));
        mixed.step(Event::Ready);
        mixed
    }

    fn step(&mut self, event: Event) {
        let effects = self.owner.step(self.now, event);
        self.apply(effects);
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Hold(ip) => self.held.push(ip),
                Effect::Withdraw(ip) => {
                    self.held.retain(|held| *held != ip);
                    self.step(Event::Withdrawn(ip));
                }
                Effect::Fence(_) | Effect::Stopped => {}
                call => {
                    let (answer, _) = self.api.serve("node-b", &call);
                    self.step(answer);
                }
            }
        }
    }

    /// So many seconds, in each of which these of PureLB's renew their Leases.
    fn pass(&mut self, seconds: u64, renewed: &[&str]) {
        for _ in 0..seconds {
            for node in renewed {
                let texts = BTreeMap::from([(SUBNETS, "192.0.2.0/24"), (INSTANCE, "other")]);
                let texts = texts.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
                self.api.version += 1;
                let (uid, says) = ((*node).to_owned(), Arc::new(Statement::parse(&texts, 10)));
                let lease = Lease { node: (*node).to_owned(), uid, version: self.api.version, says };
                self.api.objects.insert((*node).to_owned(), lease.clone());
                self.step(Event::Observed(lease));
            }
            self.now += 1000;
            self.step(Event::Tick);
        }
    }
}

/// Lots for 192.0.2.10: node-c before node-b before node-a.
const IP: &str = "192.0.2.10";

#[test]
fn the_better_lot_has_it_until_it_is_silent() {
    let mut mixed = Mixed::new(IP, Want::default());
    mixed.pass(40, &["node-a", "node-c"]);
    assert!(mixed.held.is_empty(), "node-c has it");
    mixed.pass(8, &["node-a"]);
    assert!(mixed.held.is_empty(), "it may live");
    mixed.pass(3, &["node-a"]);
    assert_eq!(mixed.held.len(), 1, "it is gone, and nothing was written into its Lease");
    assert_eq!(mixed.api.revoked, 0);
    mixed.pass(1, &["node-a", "node-c"]);
    assert!(mixed.held.is_empty(), "it is back");
}

#[test]
fn the_worse_lot_is_given_time_to_see_us() {
    let mut mixed = Mixed::new(IP, Want::default());
    mixed.pass(10, &["node-a"]);
    assert!(mixed.held.is_empty(), "a start");
    mixed.pass(4, &["node-a"]);
    assert_eq!(mixed.held.len(), 1);
}

#[test]
fn a_move_waits_for_the_cleared_slot() {
    let mine = Preference::Prefer(["node-b".to_owned()].into());
    let want = Want { preference: mine, slot: Some("node-c".to_owned()) };
    let mut mixed = Mixed::new(IP, want.clone());
    mixed.pass(40, &["node-c"]);
    assert!(mixed.owner.claims().is_empty(), "node-c says that it announces it");
    mixed.step(Event::Wants(BTreeMap::from([(IP.parse().unwrap(), Want { slot: None, ..want })])));
    mixed.pass(4, &["node-c"]);
    assert_eq!((mixed.owner.claims().len(), mixed.held.len()), (1, 1));
}
