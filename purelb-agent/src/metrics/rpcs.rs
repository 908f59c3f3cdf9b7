//! Metrics of calls to IPAM sidecars, by PureLB's names.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// As Go's client has them by default, and so PureLB.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Ended {
    socket: String,
    method: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Took {
    socket: String,
    method: String,
}

/// Calls so far.
#[derive(Clone, Debug)]
pub struct Rpcs {
    ended: Family<Ended, Counter>,
    took: Family<Took, Histogram, fn() -> Histogram>,
    known: Arc<Mutex<BTreeSet<Ended>>>,
}

impl Rpcs {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let new: fn() -> Histogram = || Histogram::new(BUCKETS);
        let out = Self { ended: Family::default(), took: Family::new_with_constructor(new), known: Arc::default() };
        registry.register("allocator_sidecar_rpc", "Calls to IPAM sidecars", out.ended.clone());
        let help = "How long calls to IPAM sidecars took";
        registry.register("allocator_sidecar_rpc_duration_seconds", help, out.took.clone());
        out
    }

    /// A call ended.
    pub fn ended(&self, socket: &str, method: &str, code: &'static str, took: Duration) {
        let (socket, method) = (socket.to_owned(), format!("/purelb.ipam.v1.IPAM/{method}"));
        self.took.get_or_create(&Took { socket: socket.clone(), method: method.clone() }).observe(took.as_secs_f64());
        let ended = Ended { socket, method, code };
        self.ended.get_or_create(&ended).inc();
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(ended);
    }

    /// Only these sockets are still there.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).retain(|ended| {
            let keep = is_there(&ended.socket);
            if !keep {
                self.ended.remove(ended);
                self.took.remove(&Took { socket: ended.socket.clone(), method: ended.method.clone() });
            }
            keep
        });
    }
}
