//! The allocator's shells: what `purelb_plan::alloc` decides is written to a folder's state, or to Kubernetes.

pub mod cluster;
pub mod folder;
mod groups;
pub mod networks;
pub(crate) mod sidecars;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use purelb_plan::alloc::allocator::Settings;
use purelb_plan::alloc::claim::{Decision, Event, annotation};

use crate::args;
use crate::http::Pages;
use crate::metrics::{Allocation, Rpcs};

/// What the allocator tells the outside.
#[derive(Debug)]
pub struct Figures {
    metrics: Allocation,
    rpcs: Rpcs,
    /// It has a list and gave what could be given, or stands by.
    ready: Arc<AtomicBool>,
}

impl Figures {
    /// On these pages.
    #[must_use]
    pub fn new(pages: &mut Pages) -> Self {
        let (metrics, rpcs) = (Allocation::new(&mut pages.registry), Rpcs::new(&mut pages.registry));
        Self { metrics, rpcs, ready: pages.check("the allocator's first list") }
    }
}

impl From<&args::Allocation> for Settings {
    fn from(args: &args::Allocation) -> Self {
        Self {
            class: args.load_balancer_class.clone(),
            default_announcer: args.default_announcer == "PureLB",
            cool_down: args.cool_down,
        }
    }
}

fn tell(svc: &str, decision: &Decision, event: &Event) {
    let Event { warning, reason, message } = event;
    let ips: Vec<_> = decision.ingress.iter().map(IpAddr::to_string).collect();
    let ip = Some(ips.join(" ")).filter(|ip| !ip.is_empty());
    let pool = decision.annotations.get(annotation::ALLOCATED_FROM).and_then(Option::as_deref);
    if *warning {
        tracing::warn!(svc, ip, pool, event = reason, "{message}");
    } else {
        tracing::info!(svc, ip, pool, event = reason, "{message}");
    }
}
