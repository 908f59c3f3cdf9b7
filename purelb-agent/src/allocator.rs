//! The allocator's shells: what `purelb_plan::alloc` decides is written to a folder's state, or to Kubernetes.

pub mod cluster;
pub mod folder;
mod groups;
mod networks;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use purelb_plan::alloc::allocator::Settings;
use purelb_plan::alloc::claim::Event;

use crate::args;
use crate::http::Pages;
use crate::metrics::Allocation;

/// What the allocator tells the outside.
#[derive(Debug)]
pub struct Figures {
    metrics: Allocation,
    /// It has a list and gave what could be given, or stands by.
    ready: Arc<AtomicBool>,
}

impl Figures {
    /// On these pages.
    #[must_use]
    pub fn new(pages: &mut Pages) -> Self {
        Self { metrics: Allocation::new(&mut pages.registry), ready: pages.check("the allocator's first list") }
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

fn tell(service: &str, event: &Event) {
    let Event { warning, reason, message } = event;
    if *warning {
        tracing::warn!(service, reason, "{message}");
    } else {
        tracing::info!(service, reason, "{message}");
    }
}
