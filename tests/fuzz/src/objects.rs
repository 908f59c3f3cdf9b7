//! Objects as sources hold them, and the good ones that no input may touch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use purelb_agent::source::convert::{Converter, Whose};
use purelb_agent::source::parse::{Found, Key, Kind};
use purelb_agent::source::state::ServiceState;
use purelb_agent::source::{Host, Objects};
use purelb_plan::world::World;
use serde_json::{Value, json};

/// Nobody else's namespace.
pub const GOOD: &str = "purelb-good";
/// `namespace/name` of the good Service.
pub const GOOD_SERVICE: &str = "purelb-good/good";
/// Its address.
pub const GOOD_VIP: [u8; 4] = [198, 18, 0, 7];
/// This node.
pub const NODE: &str = "n1";

/// Objects by their keys.
#[derive(Debug, Default)]
pub struct Shelf {
    /// The objects.
    pub objects: BTreeMap<Key, Arc<Found>>,
    /// What stands beside Services.
    pub states: BTreeMap<String, ServiceState>,
}

impl Objects for Shelf {
    fn get(&self, key: &Key) -> Option<&Arc<Found>> {
        self.objects.get(key)
    }

    fn all(&self, kind: Kind) -> Box<dyn Iterator<Item = (&Key, &Arc<Found>)> + '_> {
        Box::new(self.objects.iter().filter(move |(key, _)| key.0 == kind))
    }

    fn state(&self, service: &str) -> Option<&ServiceState> {
        self.states.get(service)
    }
}

/// A Service and its slice, as an API server has them.
#[must_use]
pub fn good() -> [(Kind, Value); 2] {
    let meta = |name: &str| json!({"name": name, "namespace": GOOD, "uid": name, "resourceVersion": "1"});
    let vip = std::net::Ipv4Addr::from(GOOD_VIP).to_string();
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": meta("good"),
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local",
            "ports": [{"name": "http", "port": 80}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": vip}]}},
    });
    service["metadata"]["annotations"] = json!({"purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "g"});
    let mut slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": meta("good-a"), "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.7"], "nodeName": NODE}],
        "ports": [{"name": "http", "port": 8080}],
    });
    slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": "good"});
    [(Kind::Service, service), (Kind::Slice, slice)]
}

/// The world of all objects at once, which is that of one after the other.
#[must_use]
pub fn converted(objects: &Shelf, whose: Whose) -> Converter {
    let all: BTreeSet<Key> = objects.objects.keys().cloned().collect();
    let mut converter = Converter::new(NODE, whose, None);
    converter.host(&BTreeSet::new(), &BTreeSet::new(), Host { kube_proxy: false, live: false, detached: false });
    converter.update(objects, &all);
    let mut other = Converter::new(NODE, whose, None);
    let mut seen = Shelf { objects: BTreeMap::new(), states: objects.states.clone() };
    for (key, found) in &objects.objects {
        seen.objects.insert(key.clone(), found.clone());
        other.update(&seen, &[key.clone()].into());
    }
    assert_eq!(converter.world(), other.world(), "the order counts");
    assert_eq!(converter.problems().len(), other.problems().len(), "the order counts for problems");
    converter
}

/// The good Service means what it means.
pub fn is_good(world: &World) {
    let service = world.services.get(GOOD_SERVICE).expect("the good Service is gone");
    assert_eq!(service.endpoints.len(), 1, "{:?}", service.endpoints);
    assert!(service.vips.contains(&GOOD_VIP.into()), "{:?}", service.vips);
}
