//! Arbitrary JSON as what the watches of a cluster see: into the store, converted, planned, allocated from.
//!
//! Of a stream of values an object is seen, one in a list is gone, `"Service"` begins and ends a list of the kind, and a
//! number is an error.
#![no_main]

use std::collections::BTreeSet;
use std::time::Instant;

use kube::api::DynamicObject;
use libfuzzer_sys::fuzz_target;
use purelb_agent::allocator::networks::Networks;
use purelb_agent::cluster::Cluster;
use purelb_agent::cluster::store::Store;
use purelb_agent::cluster::watch::{Fault, News, of_allocator, of_node, seen};
use purelb_agent::source::Objects as _;
use purelb_agent::source::claim::Home;
use purelb_agent::source::parse::{Key, Kind};
use purelb_fuzz::laws;
use purelb_fuzz::objects::{GOOD, NODE, good, is_good};
use purelb_plan::apply::Twin;
use purelb_plan::world::World;
use serde_json::Value;

const KINDS: [Kind; 6] = [Kind::Service, Kind::Slice, Kind::Node, Kind::NodeAgent, Kind::ServiceGroup, Kind::Lease];

fuzz_target!(|data: &[u8]| {
    let mut told = Told {
        cluster: Cluster::new(NODE, &of_node(), None),
        store: Store::new(&of_allocator("purelb")),
        now: Instant::now(),
    };
    let mut there: BTreeSet<Key> = BTreeSet::new();
    let mut listing: Option<(Kind, BTreeSet<Key>)> = None;
    for kind in KINDS {
        told.tell(|| News::Begun(kind));
        told.all_good(kind);
        told.tell(|| News::Listed(kind));
    }
    for value in serde_json::Deserializer::from_slice(data).into_iter::<Value>().map_while(Result::ok) {
        match &value {
            Value::Object(_) => {
                let Some((kind, object, key)) = object(&value) else { continue };
                there.insert(key.clone());
                if let Some((_, listed)) = listing.as_mut().filter(|(of, _)| *of == kind) {
                    listed.insert(key);
                }
                told.tell(|| seen(kind, object.clone()));
            }
            Value::Array(items) => {
                let Some((_, _, key)) = items.first().and_then(object) else { continue };
                there.remove(&key);
                told.tell(|| News::Gone(key.clone()));
            }
            Value::Number(number) => {
                let number = number.as_u64().unwrap_or_default();
                let fault = match number / 10 {
                    0 => Fault::Unknown,
                    1 => Fault::Forbidden("no".to_owned()),
                    _ => Fault::Away("no".to_owned()),
                };
                told.tell(|| News::Failed(KINDS[number as usize % KINDS.len()], fault.clone()));
            }
            other => {
                let Some(kind) = kind(other) else { continue };
                if let Some((_, listed)) = listing.take_if(|(of, _)| *of == kind) {
                    there.retain(|key| key.0 != kind || listed.contains(key));
                    told.all_good(kind);
                    told.tell(|| News::Listed(kind));
                } else {
                    listing = Some((kind, BTreeSet::new()));
                    told.tell(|| News::Begun(kind));
                }
            }
        }
        told.cluster.look();
        is_good(told.world());
    }
    told.judge(&there);
});

/// What a node and an allocator hear; news cannot be copied, so each gets its own.
struct Told {
    cluster: Cluster,
    store: Store,
    now: Instant,
}

impl Told {
    fn tell(&mut self, news: impl Fn() -> News) {
        self.cluster.hear(vec![news()]);
        self.store.take(news(), self.now);
    }

    fn all_good(&mut self, kind: Kind) {
        for (_, object) in good().iter().filter(|(of, _)| *of == kind) {
            self.tell(|| seen(kind, from(object).expect("the good object can be read")));
        }
    }

    fn world(&self) -> &World {
        self.cluster.world().expect("everything was listed")
    }

    fn judge(&mut self, there: &BTreeSet<Key>) {
        for kind in KINDS {
            let gone = self.store.all(kind).find(|(key, _)| !is_ours(key) && !there.contains(*key));
            assert!(gone.is_none(), "{gone:?} is gone");
        }
        let _ = (self.cluster.problems(), self.store.problems(self.now), self.store.changed());
        let mut twin = Twin::new(1 << 17);
        laws::come_to_rest(self.world(), &mut twin, 100);
        laws::allocate(&self.store, Home::Cluster, [].into());
        let mut networks = Networks::default();
        self.store.all(Kind::Lease).for_each(|(key, _)| networks.read(&self.store, &key.1));
        let _ = networks.alive(self.now);
    }
}

/// Not of the good ones.
fn object(value: &Value) -> Option<(Kind, DynamicObject, Key)> {
    let (kind, object) = kind(&value["kind"]).zip(from(value))?;
    let News::Seen(key, ..) = seen(kind, object.clone()) else { return None };
    (!is_ours(&key)).then_some((kind, object, key))
}

fn kind(value: &Value) -> Option<Kind> {
    KINDS.into_iter().find(|kind| value.as_str() == Some(kind.name()))
}

fn from(value: &Value) -> Option<DynamicObject> {
    serde_json::from_value(value.clone()).ok()
}

fn is_ours(key: &Key) -> bool {
    key.1.starts_with(GOOD)
}
