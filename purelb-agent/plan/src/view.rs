//! Services as people see them: `status` and `services` print these.

use std::collections::BTreeMap;
use std::net::IpAddr;

use purelb_common::table::{self, FIRST_ENDPOINT, PASS, Slot};
use serde::Serialize;

use crate::desired::Front;
use crate::observed::Frontend;
use crate::world::Protocol;

/// A VIP, port and protocol as people see it.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// `namespace/name`.
    pub service: String,
    /// Address.
    pub vip: IpAddr,
    /// Port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where it was read.
    pub origin: String,
    /// `endpoints`, or what happens without: `pass` or `drop`.
    pub answer: &'static str,
    /// Every slot has one answer.
    pub settled: bool,
    /// Endpoints of this node.
    pub endpoints: Vec<EndpointView>,
}

/// One endpoint of a [`View`].
#[derive(Clone, Debug, Serialize)]
pub struct EndpointView {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// ready, unready, terminating.
    pub state: &'static str,
    /// Share of new flows, 0 to 1.
    pub share: f64,
    /// Its id in the maps.
    pub id: u16,
}

impl View {
    /// Of the agent's halves of a service's slots.
    pub(crate) fn new(
        frontend: &Frontend,
        front: &Front,
        id: impl Fn((IpAddr, u16)) -> Option<u16>,
        halves: &[u32],
    ) -> Self {
        let mut shares: BTreeMap<u16, u32> = BTreeMap::new();
        let mut settled = true;
        for half in halves {
            let slot = Slot(u64::from(*half));
            *shares.entry(slot.cur()).or_insert(0) += 1;
            settled &= !slot.agent_unsettled();
        }
        let endpoint = |(&(addr, port), state): (&(IpAddr, u16), &u16)| {
            let id = id((addr, port))?;
            let share = f64::from(shares.get(&id).copied().unwrap_or(0)) / halves.len().max(1) as f64;
            let state = match *state {
                table::READY => "ready",
                table::TERMINATING => "terminating",
                _ => "unready",
            };
            Some(EndpointView { addr, port, state, share, id })
        };
        let endpoints: Vec<_> = front.endpoints.iter().filter_map(endpoint).collect();
        let answer = match (shares.keys().any(|id| *id >= FIRST_ENDPOINT), front.fallback) {
            (true, _) => "endpoints",
            (false, PASS) => "pass",
            _ => "drop",
        };
        Self {
            service: front.service.clone(),
            vip: frontend.vip,
            port: frontend.port,
            protocol: frontend.protocol,
            origin: front.origin.clone(),
            answer,
            settled,
            endpoints,
        }
    }
}
