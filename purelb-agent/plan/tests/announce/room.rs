//! More addresses that should be where endpoints are than a Lease has room for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use purelb_plan::announce::election::{Preference, score};
use purelb_plan::announce::lease::{Lease, MOST_CLAIMS, Mark, Ours, Statement};
use purelb_plan::announce::owner::{Effect, Event, Identity, Owner, Phase, Settings, Want, Written};

/// An owner, and another node that lives and leaves a mark for whatever it sees.
struct Two {
    owner: Owner,
    effects: Vec<Effect>,
    now: u64,
    version: u64,
    own: Option<Lease>,
    subnets: BTreeSet<ipnet::IpNet>,
}

impl Two {
    fn other(&self) -> Lease {
        let epoch = self.own.as_ref().and_then(|own| own.says.ours.as_ref()).map(|ours| ours.epoch.clone());
        let yields = epoch.into_iter().map(|epoch| ("n1".to_owned(), Mark { epoch, done: true })).collect();
        let ours = Ours { epoch: "e".to_owned(), settled: true, yields, ..Ours::default() };
        let subnets = self.subnets.clone();
        let says = Arc::new(Statement { duration: 10_000, subnets, ours: Some(ours), ..Statement::default() });
        Lease { node: "n0".to_owned(), uid: "u".to_owned(), version: self.version, says }
    }

    fn run(&mut self, events: Vec<Event>, seconds: u64) {
        let mut events = events;
        for _ in 0..seconds {
            for effect in std::mem::take(&mut self.effects) {
                self.version += 1;
                match effect {
                    Effect::List => {
                        let all = self.own.clone().into_iter().chain([self.other()]).collect();
                        events.push(Event::Listed(Some((self.version, all))));
                    }
                    Effect::Create(says) | Effect::Renew { says, .. } => {
                        let (version, uid) = (self.version, "v".to_owned());
                        self.own =
                            Some(Lease { node: "n1".to_owned(), uid: uid.clone(), version, says: (*says).into() });
                        events.push(Event::Written(Written::Done { version, uid }));
                    }
                    _ => {}
                }
            }
            self.version += 1;
            self.now += 1000;
            events.extend([Event::Observed(self.other()), Event::Tick]);
            for event in events.drain(..) {
                self.effects.extend(self.owner.step(self.now, event));
            }
        }
    }
}

#[test]
fn what_finds_no_room_is_counted() {
    let subnets = BTreeSet::from(["198.18.0.0/15".parse().unwrap()]);
    let many: Vec<IpAddr> = (0..10_000).map(|n| Ipv4Addr::from_bits(0xc612_0000 + n).into()).collect();
    // By their lots about half are the other node's, so these are claimed.
    let others = many.iter().filter(|ip| score("n0", **ip) < score("n1", **ip)).count();
    assert!(others > MOST_CLAIMS, "the test needs more");
    let me = Identity { node: "n1".to_owned(), session: "s".to_owned(), ..Identity::default() };
    let (owner, effects) = Owner::start(me, Settings::default(), &BTreeSet::new(), 0, 1);
    let mut two = Two { owner, effects, now: 1, version: 10, own: None, subnets: subnets.clone() };
    let wants = |preference: Preference| {
        let want = Want { preference, slot: None };
        Event::Wants(many.iter().map(|ip| (*ip, want.clone())).collect())
    };
    two.run(vec![Event::Subnets(subnets), Event::Ready, wants(Preference::None)], 40);
    assert_eq!((two.owner.phase(), two.owner.unclaimed()), (&Phase::In, 0));
    assert_eq!(two.owner.holds().count(), many.len() - others);
    for _ in 0..2 {
        two.run(vec![wants(Preference::Only(BTreeSet::from(["n1".to_owned()])))], 20);
        assert_eq!(two.owner.claims().len(), MOST_CLAIMS);
        assert_eq!(two.owner.unclaimed(), others - MOST_CLAIMS, "what nobody has is counted");
        assert_eq!(two.owner.holds().count(), many.len() - two.owner.unclaimed());
    }
}
