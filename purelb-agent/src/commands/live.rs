//! What the pinned maps hold, with the names that the last snapshot knows for it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use purelb_common::table::{self, DROP, FIRST_ENDPOINT, PASS, TICK_SHIFT};
use purelb_plan::observed::{Family, Frontend, Observed, Slots as _};
use purelb_plan::world::Protocol;
use serde::{Deserialize, Serialize};

use crate::bpf::Maps;

/// The maps and the names.
pub(crate) struct Live {
    pub observed: Observed,
    names: BTreeMap<Frontend, Named>,
    /// Endpoint ids of each service id.
    ids: BTreeMap<(Family, u32), Vec<u16>>,
}

/// A service of the snapshot.
#[derive(Deserialize)]
struct Named {
    service: String,
    #[serde(default)]
    origin: String,
    vip: IpAddr,
    port: u16,
    protocol: String,
}

/// A VIP, port and protocol as the maps have it.
#[derive(Serialize)]
pub(crate) struct View {
    /// `namespace/name`, empty when no snapshot knows it.
    pub service: String,
    pub origin: String,
    pub vip: IpAddr,
    pub port: u16,
    pub protocol: &'static str,
    /// `endpoints`, or what happens to new flows without: `pass` or `drop`.
    pub answer: &'static str,
    /// Every slot has one answer.
    pub settled: bool,
    pub slots: usize,
    pub unsettled_slots: usize,
    pub packets: u64,
    pub bytes: u64,
    pub new_flows: u64,
    pub drops: u64,
    pub endpoints: Vec<EndpointView>,
}

#[derive(Serialize)]
pub(crate) struct EndpointView {
    pub addr: IpAddr,
    pub port: u16,
    pub state: &'static str,
    /// Share of new flows, 0 to 1.
    pub share: f64,
    pub id: u16,
}

impl Live {
    /// Reads maps and snapshot.
    pub(crate) fn read(root: &Path, maps: &Maps) -> anyhow::Result<Self> {
        let seen = crate::snapshot::read(root).unwrap_or_default();
        let services = super::list(&seen, "services").iter();
        let named = services.filter_map(|s| serde_json::from_value::<Named>(s.clone()).ok());
        let key = |n: &Named| {
            let protocol = if n.protocol.eq_ignore_ascii_case("udp") { Protocol::Udp } else { Protocol::Tcp };
            Frontend { vip: n.vip, port: n.port, protocol }
        };
        let observed = maps.observe()?;
        let mut ids: BTreeMap<(Family, u32), Vec<u16>> = BTreeMap::new();
        for ((family, id), entry) in &observed.endpoints {
            ids.entry((*family, entry.service)).or_default().push(*id);
        }
        Ok(Self { observed, names: named.map(|n| (key(&n), n)).collect(), ids })
    }

    /// `namespace/name`, or what can be said without a snapshot.
    pub(crate) fn service_name(&self, frontend: &Frontend) -> String {
        self.names.get(frontend).map_or_else(|| "(name unknown: no snapshot)".to_owned(), |n| n.service.clone())
    }

    /// An endpoint id for people: `10.0.0.1:8080 (ready)`.
    pub(crate) fn endpoint_name(&self, family: Family, id: u16) -> String {
        match (id, self.observed.endpoints.get(&(family, id))) {
            (DROP, _) => "nobody (DROP)".to_owned(),
            (PASS, _) => "kube-proxy (PASS)".to_owned(),
            (_, Some(e)) => format!("{} ({})", SocketAddr::new(e.addr, e.port), state_name(e.state)),
            (_, None) => format!("endpoint {id}, which is in no table"),
        }
    }

    /// All services, with their counters.
    pub(crate) fn views(&self, maps: &Maps) -> anyhow::Result<Vec<View>> {
        self.observed.services.iter().map(|(frontend, service)| self.view(maps, frontend, service)).collect()
    }

    fn view(&self, maps: &Maps, frontend: &Frontend, service: &table::Service) -> anyhow::Result<View> {
        let block = &maps.block(service);
        let stats = maps.stats(service.id)?;
        let named = self.names.get(frontend);
        let mut shares: BTreeMap<u16, usize> = BTreeMap::new();
        for slot in block {
            *shares.entry(slot.cur()).or_default() += 1;
        }
        let unsettled_slots = block.iter().filter(|slot| slot.unsettled(service)).count();
        let family = if frontend.vip.is_ipv4() { Family::V4 } else { Family::V6 };
        let endpoint = |id: u16| {
            let e = self.observed.endpoints.get(&(family, id))?;
            let count = shares.get(&id).copied().unwrap_or(0);
            let share = count as f64 / block.len().max(1) as f64;
            let gone = e.state == table::GONE && count == 0;
            (!gone).then(|| EndpointView { addr: e.addr, port: e.port, state: state_name(e.state), share, id })
        };
        let ids = self.ids.get(&(family, service.id)).into_iter().flatten();
        let mut endpoints: Vec<EndpointView> = ids.filter_map(|id| endpoint(*id)).collect();
        endpoints.sort_by_key(|e| (e.addr, e.port));
        let answer = match (shares.keys().any(|id| *id >= FIRST_ENDPOINT), shares.contains_key(&PASS)) {
            (true, _) => "endpoints",
            (false, true) => "pass",
            (false, false) => "drop",
        };
        Ok(View {
            service: named.map_or_else(String::new, |n| n.service.clone()),
            origin: named.map_or_else(String::new, |n| n.origin.clone()),
            vip: frontend.vip,
            port: frontend.port,
            protocol: protocol_name(frontend.protocol),
            answer,
            settled: unsettled_slots == 0,
            slots: block.len(),
            unsettled_slots,
            packets: stats.packets,
            bytes: stats.bytes,
            new_flows: stats.new_flows,
            drops: stats.drops,
            endpoints,
        })
    }
}

pub(crate) const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

pub(crate) const fn state_name(state: u16) -> &'static str {
    match state {
        table::READY => "ready",
        table::UNREADY => "unready",
        table::TERMINATING => "terminating",
        _ => "gone",
    }
}

/// Seconds of so many ticks.
pub(crate) fn seconds(ticks: u32, hz: u32) -> f64 {
    f64::from(ticks) * f64::from(1u32 << TICK_SHIFT) / f64::from(hz.max(1))
}

/// How long the agent has been silent, and whether the tables count as stale, as the programs judge it.
pub(crate) fn silence(config: &table::Config, tick: u32) -> (u32, bool) {
    // A heartbeat a moment ahead of the reading is no silence.
    let silent = tick.wrapping_sub(config.heartbeat);
    let silent = if silent > u32::MAX / 2 { 0 } else { silent };
    (silent, config.heartbeat_limit != 0 && silent > config.heartbeat_limit)
}
